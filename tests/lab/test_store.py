import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.lab.toy import calls

from thalweg.errors import StoreError
from thalweg.lab.jobs import Job, perform
from thalweg.lab.runs import store as store_module
from thalweg.lab.runs.run import load_run
from thalweg.lab.runs.store import Store, store_at

WRITER = """
import dataclasses, sys
from pathlib import Path
from thalweg.lab.runs.run import load_run
from thalweg.lab.runs.store import Store
from thalweg.lab.runs.identity import run_id

model = load_run(Path(sys.argv[1])).manifest
store = Store(Path(sys.argv[2]))
content = {"tables.json": b"{}", "arrays.safetensors": b"x" * 2_000_000, "log.jsonl": b""}
print("ready", flush=True)
for seed in range(int(sys.argv[3]), int(sys.argv[4])):
    parameters = model.parameters | {"seed": seed}
    name = run_id(model.recipe, model.version, parameters)
    store.publish(dataclasses.replace(model, id=name, parameters=parameters), content)
"""


@pytest.fixture
def job(toys, tmp_path):
    return Job(f"{toys.name}.good:RECIPE", "quick", {"seed": 0, "widths": [2]}, tmp_path / "store")


def writer(run, root, first, last):
    words = [sys.executable, "-c", WRITER, str(run.folder), str(root), str(first), str(last)]
    return subprocess.Popen(words, stdout=subprocess.PIPE)


def test_a_run_read_back_is_the_run_that_was_written(job):
    run = perform(job)
    again = Store(job.root).find(run.id)
    assert again == run
    assert again.folder == job.root / "objects" / run.id[:2] / run.id
    np.testing.assert_array_equal(again.arrays()["values"], [r["eigenvalue"] for r in again.tables()["spectra"]])
    assert [c.verdict for c in again.manifest.claims] == ["holds", "holds", "untested"]
    assert {"python", "torch", "numpy"} <= set(again.manifest.environment.versions)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["half"]


def test_what_decides_nothing_does_not_enter_the_name(job):
    other = dataclasses.replace(job, device="cuda", data_root=Path("/data"))
    assert perform(other).id == perform(job).id


@pytest.mark.parametrize("name", ["manifest.json", "tables.json", "arrays.safetensors", "log.jsonl"])
@pytest.mark.parametrize("share", [0.0, 0.37, 0.999])
def test_a_flipped_bit_in_any_file_is_noticed_and_named(job, name, share):
    run = perform(job)
    content = bytearray((run.folder / name).read_bytes())
    content[int(share * len(content))] ^= 1
    (run.folder / name).write_bytes(content)
    listing = Store(job.root).runs()
    assert listing.runs == ()
    assert run.id in listing.damaged[0]


def test_a_missing_file_is_damage(job):
    run = perform(job)
    (run.folder / "tables.json").unlink()
    with pytest.raises(StoreError, match=r"Expected a whole run. Got .*tables.json: No such file"):
        Store(job.root).find(run.id)


def test_a_damaged_run_is_run_again_and_replaced(job, toys):
    run = perform(job)
    (run.folder / "tables.json").write_text("[]")
    assert load_run(perform(job).folder) == Store(job.root).find(run.id)
    assert calls(toys) == ["0", "0"]
    assert not list(job.root.glob("aside/tmp-*"))


def test_a_killed_writer_leaves_whole_runs_only(job, tmp_path):
    run, root = perform(job), tmp_path / "killed"
    for first in (0, 1000, 2000):
        process = writer(run, root, first, first + 1000)
        process.stdout.readline()
        time.sleep(0.15)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    listing = Store(root).runs()
    assert listing.damaged == ()
    assert listing.runs
    assert all(len((r.folder / "arrays.safetensors").read_bytes()) == 2_000_000 for r in listing.runs)


def test_of_several_writers_of_the_same_runs_each_run_is_published_once(job, tmp_path):
    run, root = perform(job), tmp_path / "shared"
    processes = [writer(run, root, 0, 12) for _ in range(3)]
    assert [p.wait() for p in processes] == [0, 0, 0]
    for process in processes:
        process.stdout.close()
    listing = Store(root).runs()
    assert (len(listing.runs), listing.damaged, list(root.glob("aside/tmp-*"))) == (12, (), [])


def test_what_a_killed_writer_left_is_removed_after_a_day(job):
    old, young = job.root / "aside" / "tmp-host-1-a", job.root / "aside" / "tmp-host-1-b"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 90_000,) * 2)
    perform(job)
    assert (old.exists(), young.exists()) == (False, True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(job, monkeypatch, code):
    def refuse(path, content):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store_module, "write_flushed", refuse)
    with pytest.raises(StoreError, match=f"Expected a place that can be written. Got .*{os.strerror(code)}"):
        perform(job)
    assert [p for p in job.root.rglob("*") if p.is_file() or p.name.startswith("tmp-")] == []


def test_a_folder_that_cannot_be_written_is_refused_before_the_run(job, toys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"Got .*/file/store: Not a directory. Free some space, or choose"):
        perform(dataclasses.replace(job, root=tmp_path / "file" / "store"))
    assert calls(toys) == []


def test_a_run_is_found_by_the_first_digits_of_its_id(job):
    run = perform(job)
    assert Store(job.root).search(run.id[:8]) == run
    with pytest.raises(StoreError, match=r"Got 'xyz', which 0 runs"):
        Store(job.root).search("xyz")


def test_the_store_is_the_folder_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("THALWEG_RUNS", str(tmp_path))
    assert store_at().root == tmp_path
    monkeypatch.delenv("THALWEG_RUNS")
    assert store_at().root == Path("thalweg-runs")


def test_a_users_own_folder_in_the_store_is_never_touched(job):
    theirs = job.root / "tmp-thesis"
    theirs.mkdir(parents=True)
    os.utime(theirs, (time.time() - 900_000,) * 2)
    perform(job)
    assert theirs.exists()
