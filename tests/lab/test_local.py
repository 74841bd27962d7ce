import math
import os
import signal
import subprocess
import sys
import time

import pytest
from pydantic import ValidationError

from thalweg.errors import ConfigError
from thalweg.lab.sweeps.local import LocalExecutor, WorkerDiedError

WORK = """
import os, signal, time
from pathlib import Path
from thalweg.lab.recipe import Preset

HERE = Path(__file__).parent

def die_once(job):
    marker = HERE / f"died-{job}"
    if job == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return job * 10

def die_always(job):
    if job == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return job * 10

def threads(job):
    return os.environ["OMP_NUM_THREADS"]

def odd(job):
    if job == "pydantic":
        Preset(seed="x")
    if job == "lambda":
        return lambda: 0
    raise ValueError(job)

def sleep(job):
    (HERE / f"pid-{os.getpid()}").touch()
    time.sleep(60)
"""


@pytest.fixture
def work(toys):
    (toys / "work.py").write_text(WORK)
    return __import__(f"{toys.name}.work", fromlist=["work"])


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_comes_back_once_with_its_result_or_its_exception(workers):
    results = dict(LocalExecutor(workers).run(math.sqrt, [4.0, 9.0, -1.0, 16.0]))
    assert (results[4.0], results[9.0], results[16.0]) == (2.0, 3.0, 4.0)
    assert isinstance(results[-1.0], ValueError)


def test_no_jobs_give_no_results():
    assert list(LocalExecutor(2).run(math.sqrt, [])) == []


def test_the_job_of_a_killed_worker_is_tried_once_more(work):
    assert dict(LocalExecutor(2).run(work.die_once, range(4))) == {0: 0, 1: 10, 2: 20, 3: 30}


def test_a_job_that_kills_its_worker_twice_is_given_up_and_the_others_go_on(work):
    results = dict(LocalExecutor(2).run(work.die_always, range(4)))
    assert isinstance(results.pop(1), WorkerDiedError)
    assert results == {0: 0, 2: 20, 3: 30}


def test_each_worker_has_one_thread_and_this_process_keeps_its_own(work, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert dict(LocalExecutor(2).run(work.threads, [0, 1])) == {0: "1", 1: "1"}
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_what_cannot_travel_comes_back_in_words(work):
    results = dict(LocalExecutor(2).run(work.odd, ["pydantic", "lambda", "plain"]))
    assert isinstance(results["plain"], ValueError)
    assert isinstance(results["lambda"], Exception)
    assert isinstance(results["pydantic"], RuntimeError | ValidationError)
    assert "valid integer" in str(results["pydantic"])


def test_ctrl_c_ends_the_workers_at_once(work, toys):
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored behind a shell's &
        f"import sys; sys.path.insert(0, {str(toys.parent)!r})\n"
        f"from {toys.name}.work import sleep\nfrom thalweg.lab.sweeps.local import LocalExecutor\n"
        "list(LocalExecutor(2).run(sleep, [1, 2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while len(list(toys.glob("pid-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=10)
    assert b"KeyboardInterrupt" in error
    assert time.monotonic() - started < 5
    for file in toys.glob("pid-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.name.removeprefix("pid-")), 0)


def test_fewer_than_one_worker_is_refused():
    with pytest.raises(ConfigError, match=r"Expected at least 1 worker. Got 0"):
        LocalExecutor(0)
