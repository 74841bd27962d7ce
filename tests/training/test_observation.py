"""A training that is watched is the training that is not, and what was seen of it outlasts an interruption."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from thalweg.errors import ConfigError
from thalweg.objective import Objective
from thalweg.training import Fit, fit, minibatch, shuffled_batches
from thalweg.training.reporting import observer_words


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


INPUTS = torch.randn(20, 3, generator=seeded(5), dtype=torch.float64)
LABELS = torch.randint(0, 4, (20,), generator=seeded(6))


def net() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 4)).double()
    with torch.no_grad():
        for place, parameter in enumerate(made.parameters()):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=seeded(place), dtype=torch.float64))
    return made


OBJECTIVE = Objective(net(), nn.CrossEntropyLoss(), (INPUTS, LABELS))


class Watch:
    """Measures loss and gradient, draws at random, and is interrupted after one of its looks."""

    def __init__(self, until: int | None = None) -> None:
        self.until, self.epochs = until, []

    def __call__(self, epochs: int, module: nn.Module) -> dict[str, Any] | None:
        assert not any(part.training for part in module.modules())
        assert all(p.grad is None for p in module.parameters())
        self.epochs.append(epochs)
        if epochs == self.until:
            raise KeyboardInterrupt
        if epochs == 1:
            return None
        loss = functional.cross_entropy(module(INPUTS), LABELS)
        loss.backward()
        norms = [float(p.grad.norm()) for p in module.parameters() if p.grad is not None]
        return {"loss": loss, "gradient": sum(norms), "drawn": float(torch.rand(()))}


def run(watch: Any = None, **options: Any) -> Fit:
    chosen: dict[str, Any] = {"epochs": 5, "batch_size": 8, "generator": seeded(3), **options}
    return fit(OBJECTIVE, OBJECTIVE.theta(), observe=watch, **chosen)


def state(result: Fit) -> dict[str, Tensor]:
    return {"theta": result.theta, "losses": result.losses, **result.buffers}


def test_watching_changes_nothing_of_the_training_nor_of_the_world() -> None:
    alone, world = run(), torch.get_rng_state()
    watch = Watch()
    seen = run(watch)
    assert_close(torch.get_rng_state(), world, rtol=0, atol=0)
    assert_close(state(seen), state(alone), rtol=0, atol=0)
    assert alone.observations == ()
    assert watch.epochs == [0, 1, 2, 3, 4, 5]
    assert [len(found) for found in seen.observations] == [3, 0, 3, 3, 3, 3]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(99)  # what it draws is settled by the training, not by the world
        assert run(Watch()).observations == seen.observations


def test_it_sees_the_landscape_at_the_points_of_the_training() -> None:
    found = run(Watch(), epochs=2).observations
    start, end = net().eval(), net().eval()
    run(epochs=2).write(end)
    for seen, module in zip((found[0], found[2]), (start, end), strict=True):
        value = functional.cross_entropy(module(INPUTS), LABELS).detach()
        assert seen["loss"] == pytest.approx(float(value), rel=1e-12)


def test_what_was_seen_before_an_interruption_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minibatch, "_KEPT_EVERY", 0.0)
    undisturbed = run(Watch())
    with pytest.raises(KeyboardInterrupt):
        run(Watch(until=3), keep=tmp_path)
    watch = Watch()
    resumed = run(watch, keep=tmp_path)
    assert watch.epochs == [3, 4, 5]
    assert resumed.observations == undisturbed.observations
    assert_close(state(resumed), state(undisturbed), rtol=0, atol=0)
    watch = Watch()
    assert run(watch, keep=tmp_path).observations == undisturbed.observations
    assert watch.epochs == []


def test_a_training_that_was_not_watched_from_its_start_begins_anew(tmp_path: Path) -> None:
    complete = run(Watch()).observations
    run(keep=tmp_path)
    assert run(Watch(), keep=tmp_path).observations == complete
    watched = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for without in ({}, {"observations": list(complete[:-1])}):  # of before there were observations; of some epochs
        content = torch.load(watched)
        del content["observations"]
        torch.save(content | without, watched)
        watch = Watch()
        assert run(watch, keep=tmp_path).observations == complete
        assert watch.epochs == [0, 1, 2, 3, 4, 5]
    assert run(keep=tmp_path).observations == ()


def test_a_divergence_is_not_seen() -> None:
    watch = Watch()
    found = run(watch, schedule=lambda share: 1.0 if share < 0.5 else 1e200)
    assert (found.status, found.epochs, watch.epochs) == ("diverged", 3, [0, 1, 2, 3])
    assert len(found.observations) == 4


def test_an_observer_counts_with_its_source_but_without_addresses() -> None:
    first, second = (functools.partial(Watch.__call__, object()) for _ in range(2))
    assert observer_words(first) == observer_words(second) != observer_words(Watch())
    assert observer_words(Watch()) == observer_words(Watch(until=2))
    assert observer_words(Watch().__call__) == observer_words(Watch.__call__)


@pytest.mark.parametrize("seen", [{"loss": "low"}, {"loss": None}, 3.0, {"loss": torch.zeros(2)}])
def test_what_are_no_numbers_is_refused(seen: Any) -> None:
    with pytest.raises(ConfigError, match="Expected observe to return numbers by name, or None"):
        run(lambda epochs, module: seen)


def test_without_shuffling_it_is_the_plain_loop_in_the_order_of_the_data() -> None:
    plain = nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)).double()
    objective = Objective(plain, nn.CrossEntropyLoss(), (INPUTS, LABELS))
    options: dict[str, Any] = {"epochs": 3, "batch_size": 6, "learning_rate": 0.1, "schedule": "constant"}
    found = fit(objective, objective.theta(), generator=seeded(1), shuffle=False, **options)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    for _ in range(3):
        for start in range(0, 20, 6):
            optimizer.zero_grad()
            functional.cross_entropy(plain(INPUTS[start : start + 6]), LABELS[start : start + 6]).backward()
            optimizer.step()
    assert_close(found.theta, objective.theta(plain), rtol=0, atol=0)


def test_rows_in_order_are_copies_and_draw_nothing() -> None:
    generator = seeded(2)
    before = generator.get_state()
    objective = Objective(net(), nn.CrossEntropyLoss(), [(INPUTS[:7], LABELS[:7]), (INPUTS[7:], LABELS[7:])])
    batches = list(shuffled_batches(objective, 8, generator, shuffle=False))
    assert_close(torch.cat([y for _, y in batches]), LABELS, rtol=0, atol=0)
    assert_close(generator.get_state(), before, rtol=0, atol=0)
    first = INPUTS[0].clone()
    batches[0][0].zero_()
    assert_close(INPUTS[0], first, rtol=0, atol=0)


def test_shuffling_tells_trainings_apart(tmp_path: Path) -> None:
    mixed, ordered = run(keep=tmp_path), run(keep=tmp_path, shuffle=False)
    assert not torch.equal(mixed.theta, ordered.theta)
    assert len(list(tmp_path.iterdir())) == 2


def test_writing_takes_a_tenth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A clock by hand: an epoch takes a second, a write half of one; so there are five seconds between two."""
    now, written = [0.0], []

    def epoch(inputs: Tensor, _: torch.Generator) -> Tensor:
        now[0] += 1.0
        return inputs

    def write(_: Any, content: dict[str, Any]) -> None:
        now[0] += 0.5
        written.append(len(content["losses"]))

    monkeypatch.setattr(minibatch, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(minibatch.KeptFile, "write", write)
    run(epochs=12, batch_size=20, augment=epoch, keep=tmp_path)
    assert written == [1, 6, 11, 12]
