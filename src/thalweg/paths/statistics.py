"""statistics: what a network's buffers are along a path; BatchNorm's statistics taken anew from the training data."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from thalweg.batching import Batch, num_samples, rows_of
from thalweg.errors import ConfigError, DataError
from thalweg.objective import Objective
from thalweg.paths.evaluation import Course, Runner, Spot, State
from thalweg.paths.reuse import Reuse

Choice = Literal["re-estimate", "own"]
_OWN = {"re-estimate", "own"}
_FEWEST = 2
"""Samples of a batch that statistics can be taken of; a last batch of fewer is left out."""


class Statistics:
    """The buffers of the network at each point of a path.

    At t = 0 and 1 they are those of the path's ends (the module's own where the path has none). Within, the running
    statistics of normalisation layers are taken anew at each t: the mean over batches of a fixed part of the
    training data, weighted by their samples; only these layers are in train mode, dropout is off. Any other
    floating buffer that differs between the ends goes straight from one to the other.

    Args:
        runner: the module.
        course: the path.
        objective: the landscape on the training data.
        choice: "re-estimate", or "own": running statistics go straight as other buffers do.
        num_samples: how many samples are used, at least: the first ones.
        reuse: runs the module.

    Raises:
        ConfigError: no such choice.

    **Source:** Garipov et al. 2018 (arXiv 1802.10026), section 3, and `update_bn` of their code, which uses all the
    training data.
    """

    def __init__(
        self,
        runner: Runner,
        course: Course,
        objective: Objective,
        choice: str,
        num_samples: int,
        reuse: Reuse,
    ) -> None:
        if choice not in _OWN:
            raise ConfigError(f"Expected statistics 're-estimate' or 'own'. Got {choice!r}. Choose one of them.")
        self._runner, self._course, self._objective = runner, course, objective
        self._num_samples, self._reuse = num_samples, reuse
        self.start = {**runner.buffers, **course.buffers(0)}
        self.end = {**runner.buffers, **course.buffers(1)}
        has_norms = bool(runner.norms) and objective.mode == "eval"
        self.is_estimated = has_norms and choice == "re-estimate"
        self._names = [f"{layer}.{part}" if layer else part for layer in runner.norms for part in _PARTS]
        self._choice = choice
        self._used = 0
        self._drawn: list[tuple[float, Batch]] = []

    @property
    def in_words(self) -> str:
        """Say what was done."""
        if self._objective.mode == "train":
            return "those of each batch (train mode)" if self._runner.norms else "none"
        if not self._runner.norms:
            return "none: no layer keeps any"
        within = (
            f"re-estimated at each t within on the first {self._used or self._num_samples} training samples"
            if self.is_estimated
            else "those of the ends, going straight from one to the other"
        )
        return f"at t = 0 and 1 the networks' own; {within}"

    def at(self, spots: Sequence[Spot]) -> list[Mapping[str, Tensor]]:
        """Give the buffers at some spots."""
        found: list[Mapping[str, Tensor]] = [self._between(spot.t) for spot in spots]
        within = [k for k, spot in enumerate(spots) if 0 < spot.t < 1]
        if self.is_estimated and within:
            own = [self._blank(found[k]) for k in within]
            self._estimate([spots[k] for k in within], own)
            alike: dict[int, State] = {}
            for k, state in zip(within, own, strict=True):
                found[k] = _shared(state, alike.setdefault(spots[k].leg, state))
        return found

    def _estimate(self, spots: list[Spot], states: list[State]) -> None:
        """Fill the running statistics of each spot's state."""
        layers = self._runner.norms.values()
        filled = frozenset(name for name in self._names if name in states[0])
        kept = [layer.momentum for layer in layers]
        seen = [0.0] * len(spots)

        def before(number: int, weight: float) -> None:
            seen[number] += weight
            for layer in layers:
                layer.momentum = weight / seen[number]  # type: ignore[assignment]

        with self._runner.measuring():
            try:
                self._reuse.sweep(self._course, spots, states, self._batches, _nothing, filled=filled, before=before)
            finally:
                for layer, momentum in zip(layers, kept, strict=True):
                    layer.momentum = momentum

    def _batches(self) -> Iterator[tuple[float, Batch]]:
        """Yield the first batches, with their samples, until there are enough; the last is cut where it can be."""
        if not self._drawn:  # read once: a loader that shuffles would give others on every pass
            self._drawn = list(self._read())
        yield from self._drawn

    def _read(self) -> Iterator[tuple[float, Batch]]:
        self._used = 0
        for whole in self._objective.batches():
            batch = whole
            try:
                count = num_samples(batch)
                missing = self._num_samples - self._used
                if self._used and min(count, missing) < _FEWEST:
                    return
                if count > missing:
                    batch, count = rows_of(batch, slice(0, missing)), missing
            except DataError:
                count = 1
            self._used += count
            yield float(count), batch
            if self._used >= self._num_samples:
                return

    def _between(self, t: float) -> State:
        if t in (0.0, 1.0):
            return self.end if t else self.start
        return {name: _straight(first, self.end[name], t) for name, first in self.start.items()}

    def _blank(self, state: Mapping[str, Tensor]) -> State:
        own = dict(state)
        for name in self._names:
            if name in own:
                own[name] = torch.ones_like(own[name]) if name.endswith("var") else torch.zeros_like(own[name])
        return own


_PARTS = ("running_mean", "running_var", "num_batches_tracked")


def _shared(state: State, other: State) -> State:
    """Give a state whose tensors are the other's where they are equal."""
    return {name: other[name] if torch.equal(value, other[name]) else value for name, value in state.items()}


def _straight(first: Tensor, last: Tensor, t: float) -> Tensor:
    if first is last or not first.is_floating_point() or bool((first == last).all()):
        return first
    return first.lerp(last, t)


def _nothing(number: int, weight: float, batch: Batch, outputs: Any) -> None:
    """Ignore the outputs."""
