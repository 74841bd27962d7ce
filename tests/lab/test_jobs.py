import dataclasses

import pytest
from pydantic import ValidationError
from tests.lab.toy import SOURCE, calls

from thalweg.errors import ConfigError
from thalweg.lab.jobs import Job, perform
from thalweg.lab.runs.store import Store


@pytest.fixture
def job(toys, tmp_path):
    return Job(f"{toys.name}.good:RECIPE", "quick", {"seed": 3, "widths": [2]}, tmp_path / "store")


def test_a_finished_run_is_never_run_again(job, toys):
    assert perform(job) == perform(job)
    assert calls(toys) == ["3"]


def test_a_forced_run_is_run_again_and_takes_the_place(job, toys):
    first = perform(job)
    second = perform(dataclasses.replace(job, is_forced=True))
    assert (second.id, len(calls(toys)), len(Store(job.root).runs().runs)) == (first.id, 2, 1)


def test_a_failed_run_is_stored_with_its_traceback_and_tried_again(job, toys):
    failing = dataclasses.replace(job, reference=f"{toys.name}.raises:RECIPE")
    for _ in range(2):
        with pytest.raises(ArithmeticError, match=r"it diverged") as caught:
            perform(failing)
    (failed,) = Store(job.root).runs().failed
    assert failed.manifest.status == "failed"
    assert "ArithmeticError: it diverged" in (failed.folder / "traceback.txt").read_text()
    assert caught.value.__notes__ == [f"The traceback is in {failed.folder / 'traceback.txt'}."]
    assert calls(toys) == ["3", "3"]


def test_success_removes_the_failure_before_it(job):
    run = perform(job)
    failure = job.root / "failed" / run.id
    failure.mkdir(parents=True)
    perform(dataclasses.replace(job, is_forced=True))
    assert not failure.exists()


def test_wrong_parameters_are_refused_before_anything_is_written(job):
    with pytest.raises(ValidationError):
        perform(dataclasses.replace(job, parameters={"widths": "many"}))
    assert not job.root.exists()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ('Outcome({"t": [{"x": [1, 2]}]})', "Expected flat rows. Got lists in a cell of table 't'"),
        ('Outcome({"t": []}, {"z": np.array(["a"])})', "Expected arrays of real numbers"),
        ('Outcome({"t": []}, {}, {"rnak": 1})', "Got rnak"),
    ],
)
def test_an_outcome_that_cannot_be_stored_fails_the_run(job, toys, result, message):
    start = SOURCE.index("    return Outcome(")
    end = SOURCE.index("\n", start)
    (toys / "odd.py").write_text(f"{SOURCE[:start]}    return {result}{SOURCE[end:]}")
    with pytest.raises(ConfigError, match=message):
        perform(dataclasses.replace(job, reference=f"{toys.name}.odd:RECIPE"))
    assert len(Store(job.root).runs().failed) == 1


def test_the_command_of_a_run_names_what_differs_from_its_preset(job):
    command = perform(dataclasses.replace(job, device="mps")).manifest.command
    assert command == f"thalweg run {job.reference} quick seed=3 --device mps"


def test_a_recipe_of_the_same_name_elsewhere_is_refused(job, toys):
    perform(job)
    (toys / "twin.py").write_text((toys / "good.py").read_text())
    for is_forced in (False, True):
        twin = dataclasses.replace(job, reference=f"{toys.name}.twin:RECIPE", is_forced=is_forced)
        with pytest.raises(ConfigError, match="Expected recipes of different names"):
            perform(twin)


def test_a_users_recipe_that_was_edited_runs_again(job, toys):
    perform(job)
    (toys / "good.py").write_text((toys / "good.py").read_text() + "\n# edited\n")
    perform(job)
    assert calls(toys) == ["3", "3"]
    perform(job)
    assert calls(toys) == ["3", "3"]
