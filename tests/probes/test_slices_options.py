"""slices: test data, accuracy, tables, progress, worker processes, and what is refused."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import zoo
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from thalweg.errors import ConfigError, NumericalError, ShapeError
from thalweg.objective import Objective
from thalweg.probes import grid_losses
from thalweg.probes.slices import line, plane

exact = functools.partial(assert_close, rtol=1e-12, atol=1e-14)
A, B = torch.linspace(-1, 0.5, 5).double(), torch.linspace(-0.25, 1, 4).double()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int, number: int = 3) -> Tensor:
    return torch.randint(0, number, shape, generator=torch.Generator().manual_seed(5))


def mlp() -> nn.Module:
    return zoo.randomize_(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))).double()


def landscape(**options: Any) -> Objective:
    return Objective(mlp(), nn.CrossEntropyLoss(), (randn(11, 4), classes(11)), **options)


def moves(objective: Objective, count: int = 2) -> Tensor:
    return randn(count, objective.num_params, seed=1)


@pytest.mark.parametrize("tiny", [0, 10**9], ids=["one by one", "many at once"])
def test_training_and_test_data_are_measured_at_the_same_points(tiny: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_losses, "_TINY", tiny)
    train = landscape()
    test = Objective(mlp(), nn.CrossEntropyLoss(), (randn(7, 4, seed=8), classes(7)), batch_size=3)
    found = plane(train, train.theta(), moves(train), coordinates=(A, B), test=test)
    for i in range(5):
        for j in range(4):
            theta = found.theta(i, j)
            for objective, loss, accuracy in (
                (train, found.loss, found.accuracy), (test, found.test_loss, found.test_accuracy),
            ):  # fmt: skip
                assert loss is not None
                assert accuracy is not None
                exact(loss[i, j], objective.value(theta))
                targets = torch.cat([t for _, t in objective.batches()])
                right = (objective.outputs(theta).argmax(1) == targets).double().mean()
                assert float(accuracy[i, j]) == float(right)


def test_targets_that_are_no_class_numbers_have_no_accuracy() -> None:
    for loss, targets in (
        (nn.MSELoss(), randn(11, 3)),
        (nn.CrossEntropyLoss(), randn(11, 3).softmax(1)),
        (lambda o, t: (o.sum(1) - t).square().mean(), 5 + classes(11)),  # counts, beyond the outputs
    ):
        objective = Objective(mlp(), loss, (randn(11, 4), targets))
        assert line(objective, objective.theta(), moves(objective)[0]).accuracy is None


class Tagger(nn.Module):
    """Classes of every token, along the last dim or along dim 1."""

    def __init__(self, *, is_last: bool) -> None:
        super().__init__()
        self.layer, self.is_last = nn.Linear(4, 3), is_last

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.is_last else self.layer(x).transpose(1, 2)


@pytest.mark.parametrize("is_last", [True, False])
def test_every_token_has_its_class(is_last: bool) -> None:
    loss = lambda o, t: functional.cross_entropy(o.flatten(0, 1) if is_last else o, t.flatten() if is_last else t)
    targets = classes(6, 5)
    targets[2] = -100
    objective = Objective(Tagger(is_last=is_last).double(), loss, (randn(6, 5, 4), targets))
    found = line(objective, objective.theta(), moves(objective)[0], coordinates=A)
    outputs = objective.outputs(found.theta(0))
    right = (outputs.argmax(2 if is_last else 1) == targets)[targets != -100].double().mean()
    assert found.accuracy is not None
    assert float(found.accuracy[0]) == float(right)


def test_an_output_that_is_no_number_predicts_nothing() -> None:
    net = nn.Linear(1, 2, bias=False).double()
    objective = Objective(net, nn.CrossEntropyLoss(), (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)))
    theta = torch.zeros(2, dtype=torch.float64)
    found = line(objective, theta, theta + 1e308, coordinates=torch.tensor([0.0, 1e10], dtype=torch.float64))
    assert found.accuracy is not None
    assert found.accuracy.tolist() == [1.0, 0.0]  # inf·0
    assert found.num_not_finite == 1


def test_a_slice_gives_a_table() -> None:
    train = landscape()
    found = plane(train, train.theta(), moves(train), coordinates=(A, B), test=landscape())
    table = found.rows()
    assert len(table) == 20
    assert list(table[0]) == ["a", "b", "loss", "accuracy", "test_loss", "test_accuracy"]
    assert (table[5]["a"], table[5]["b"], table[5]["loss"]) == (float(A[1]), float(B[1]), float(found.loss[1, 1]))
    assert list(line(train, train.theta(), moves(train)[0]).rows()[0]) == ["a", "loss", "accuracy"]


@pytest.mark.parametrize(("tiny", "workers"), [(0, 1), (10**9, 1), (0, 2)])
def test_progress_grows_to_one(tiny: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_losses, "_TINY", tiny)
    told: list[float] = []
    train = landscape(batch_size=4)
    plane(
        *(train, train.theta(), moves(train)),
        coordinates=(A, B),
        test=landscape(),
        workers=workers,
        progress=lambda fraction, text: told.append(fraction),
    )
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
    assert len(told) > 1


def test_processes_give_the_same_numbers_however_many_they_are() -> None:
    objective = Objective(mlp(), nn.CrossEntropyLoss(), (randn(600, 4), classes(600)), batch_size=590)
    run = functools.partial(plane, objective, objective.theta(), moves(objective), coordinates=A, test=landscape())
    found = [run(workers=n) for n in (1, 2, 3)]
    exact(found[0].loss, found[1].loss)
    for name in ("loss", "accuracy", "test_loss", "test_accuracy"):
        assert torch.equal(getattr(found[1], name), getattr(found[2], name))
    assert found[1].method.endswith("2 processes")
    assert multiprocessing.active_children() == []


def test_what_cannot_be_pickled_is_refused() -> None:
    objective = Objective(mlp(), lambda o, t: (o - t).square().mean(), (randn(11, 4), randn(11, 3)))
    with pytest.raises(ConfigError, match=r"Expected a module, a loss and data that can be pickled. Got .*lambda"):
        line(objective, objective.theta(), moves(objective)[0], workers=2)


def test_an_error_in_a_process_is_raised_here() -> None:
    objective = Objective(mlp(), nn.MSELoss(reduction="none"), (randn(11, 4), randn(11, 3)), reduction="sum")
    with pytest.raises(ShapeError, match=r"Expected a scalar loss"):
        line(objective, objective.theta(), moves(objective)[0], workers=2)
    assert multiprocessing.active_children() == []


def script(tmp_path: Path, guard: str) -> Path:
    """A script that draws a long slice in two processes."""
    path = tmp_path / "slow.py"
    path.write_text(
        textwrap.dedent("""
            import signal
            import sys
            import torch
            from torch import nn
            from thalweg.objective import Objective
            from thalweg.probes.slices import line

            def main():
                signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run behind &
                objective = Objective(nn.Linear(300, 2), nn.CrossEntropyLoss(),
                                      (torch.ones(9000, 300), torch.zeros(9000, dtype=torch.int64)))
                told = lambda fraction, text: print(fraction, flush=True)
                line(objective, objective.theta(), objective.theta(), coordinates=torch.arange(100000.0),
                     workers=2, progress=told)
        """)
        + f"\n{guard}\n    main()\n"
    )
    return path


def children(process: subprocess.Popen[str]) -> list[int]:
    found = []
    for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
        found += [int(pid) for pid in task.read_text().split()]
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the table of processes of Linux")
def test_an_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    command = [sys.executable, script(tmp_path, "if __name__ == '__main__':")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # both are at work
    born = children(process)
    assert len(born) >= 2
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in born) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in born if is_alive(pid)] == []


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_script_without_a_guard_is_told_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, script(tmp_path, "if True:")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "Call it under `if __name__ == '__main__':`" in done.stderr


def test_vectors_of_another_length_are_refused() -> None:
    objective = landscape()
    theta, both = objective.theta(), moves(objective)
    for call in (
        lambda: line(objective, theta[1:], both[0]),
        lambda: line(objective, theta, both[0, 1:]),
        lambda: plane(objective, theta, both[:, 1:]),
        lambda: plane(objective, theta, both[:1]),
        lambda: plane(objective, theta, both[0]),
    ):
        with pytest.raises(ShapeError, match=r"Expected a theta of shape \(51,\) and [12] direction"):
            call()


def test_a_test_landscape_of_another_net_is_refused() -> None:
    objective = landscape()
    other = Objective(nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), (randn(2, 4), classes(2)))
    with pytest.raises(ShapeError, match=r"Expected a test landscape of the same parameters. Got 15 others"):
        line(objective, objective.theta(), moves(objective)[0], test=other)


@pytest.mark.parametrize("coordinates", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([0.0, torch.nan])])
def test_coordinates_that_are_none_are_refused(coordinates: Tensor) -> None:
    objective = landscape()
    with pytest.raises(ConfigError, match=r"Expected finite coordinates along an axis, at least one. Got shape"):
        plane(objective, objective.theta(), moves(objective), coordinates=(A, coordinates))


def test_no_worker_is_refused() -> None:
    objective = landscape()
    with pytest.raises(ConfigError, match=r"Expected at least 1 worker. Got 0"):
        line(objective, objective.theta(), moves(objective)[0], workers=0)


def test_a_direction_that_is_not_finite_is_refused() -> None:
    objective = landscape()
    with pytest.raises(NumericalError, match=r"Expected a finite theta and finite directions"):
        line(objective, objective.theta(), moves(objective)[0] * torch.inf)
