"""Several students in training at a time: the same results, threads, errors and progress."""

import threading
import time

import pytest
import torch
from tests.teacher_student.test_training import pair, stream
from torch import Tensor
from torch.testing import assert_close

from thalweg.data import GaussianStream
from thalweg.nets import widened
from thalweg.teacher_student import Fall, train_students


def several(count: int = 3, **changed: object) -> tuple[Fall, ...]:
    both = [pair("after_relu", seed=seed) for seed in range(count)]
    given: dict[str, object] = {"steps": 40, "batch_size": 7, "observe_at": [0, 20, 40]}
    given["observe"] = lambda step, k, module: {"first": next(module.parameters()).detach()}
    given |= {"teachers": [t for t, _ in both], "students": [s for _, s in both]}
    given["sources"] = [stream(seed) for seed in range(count)]
    return train_students(**(given | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_what_students_come_to_does_not_depend_on_how_many_train_at_a_time(engine: str) -> None:
    before = torch.get_num_threads()
    alone, together = (several(engine=engine, workers=workers) for workers in (1, 2))
    assert torch.get_num_threads() == before
    for one, other in zip(alone, together, strict=True):
        assert_close(one.state, other.state, rtol=0, atol=0)
        assert_close(one.losses, other.losses, rtol=0, atol=0)
        assert_close(one.observations, other.observations, rtol=0, atol=0)


def test_a_batchnorm_of_torch_in_a_thread_differs_by_rounding_alone() -> None:
    both = [pair("after_relu", seed=seed) for seed in range(2)]
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        wide = [widened(teacher, factor=40, norm="after_relu").double() for teacher, _ in both]
    options: dict[str, object] = {"students": wide, "steps": 5, "observe_at": [], "engine": "autograd"}
    one, other = (several(2, workers=workers, batch_size=64, **options)[0] for workers in (1, 2))
    assert_close(one.state, other.state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_callers_inference_mode_holds_for_all_workers(workers: int) -> None:
    with torch.inference_mode():
        found = several(2, workers=workers)
    assert_close(found[0].state, several(1)[0].state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("wild", [{2}, {0, 1, 2}])
def test_progress_reaches_the_end_where_students_diverge(
    workers: int, wild: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thalweg.teacher_student.training._TOLD_EVERY", 0.0)
    told: list[float] = []
    sources = [
        (lambda n: torch.full((n, 5), 1e200, dtype=torch.float64)) if k in wild else stream(k) for k in range(3)
    ]
    found = several(workers=workers, sources=sources, progress=lambda share, _: told.append(share))
    assert {k for k, fall in enumerate(found) if fall.status == "diverged"} == wild
    assert told == sorted(told)
    assert told[-1] == 1.0


@pytest.mark.parametrize(("threads", "each"), [(2, 1), (5, 2)])
def test_students_share_torchs_threads_where_their_sources_are_known_to_be_apart(threads: int, each: int) -> None:
    seen: dict[int, tuple[int, int]] = {}
    both = threading.Barrier(2)

    class Watched(GaussianStream):
        def __call__(self, count: int) -> Tensor:
            if id(self) not in seen:  # neither goes on before the other has begun
                both.wait(timeout=60)
            seen[id(self)] = threading.get_ident(), torch.get_num_threads()
            return super().__call__(count)

    own = threading.get_ident()
    sources = [Watched(5, std=1.0, seed=seed, dtype=torch.float64) for seed in range(2)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        several(2, sources=sources, observe_at=[])
        assert torch.get_num_threads() == threads
        together = dict(seen)
        several(2, sources=[lambda count, source=source: source(count) for source in sources])
    finally:
        torch.set_num_threads(before)
    assert len({ident for ident, _ in together.values()} | {own}) == 3
    assert [found for _, found in together.values()] == [each, each]
    assert list(seen.values()) == [(own, threads)] * 2  # these may share a generator, for all that is known


@pytest.mark.parametrize("workers", [1, 2])
def test_gradients_are_taken_where_the_caller_takes_none(workers: int) -> None:
    with torch.no_grad():
        found = several(2, workers=workers, engine="autograd")
    assert_close(found[0].state, several(1, engine="autograd")[0].state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
def test_what_one_student_or_the_reader_raises_ends_all(
    raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thalweg.teacher_student.runs._HELD", 1000)
    monkeypatch.setattr("thalweg.teacher_student.training._TOLD_EVERY", 0.0)
    drawn: list[int] = []

    class Broken(Exception):
        pass

    def endless(count: int) -> Tensor:
        drawn.append(count)
        return torch.zeros(count, 5, dtype=torch.float64)

    def broken(count: int) -> Tensor:
        while not drawn:
            time.sleep(0.001)
        raise Broken

    def stop(share: float, text: str) -> None:
        raise raised

    with pytest.raises(Broken):
        several(2, sources=[endless, broken], steps=10**6, observe_at=[], workers=2)
    with pytest.raises(raised):
        several(2, steps=10**6, observe_at=[], workers=2, progress=stop)
    count = len(drawn)
    assert 0 < count < 10**6
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("student")]


def test_progress_of_several_is_told_by_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thalweg.teacher_student.training._TOLD_EVERY", 0.0)
    told: list[tuple[float, str, int]] = []
    several(workers=2, progress=lambda share, text: told.append((share, text, threading.get_ident())))
    assert told[-1] == (1.0, "3 students, step 40 of 40", threading.get_ident())
    assert [share for share, *_ in told] == sorted(share for share, *_ in told)
    assert {ident for *_, ident in told} == {threading.get_ident()}
