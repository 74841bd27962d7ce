"""reuse: a sweep over the points of a path, batches outside and points inside, with replay where it holds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from thalweg.batching import Batch, num_samples, rows_of
from thalweg.errors import DataError
from thalweg.kernels import plain_kernels
from thalweg.paths.evaluation import Course, Runner, Spot, State, Stretch
from thalweg.paths.replay import CannotReplayError, Entry, Recording, Replaying
from thalweg.paths.terms import Terms

Visit = Callable[[int, float, Batch, Any], None]
"""Told of a spot's number, the batch's weight, the batch and the outputs."""

# In eps of the largest number compared. As in `probes.shortcuts`: two orders of summation differ by tens of eps, a
# replay that does not hold by far more, and float64 stays within 1e-12.
_TOLERANCE = 1000.0
# Samples of the check. Chosen by us: more of them do the same operations.
_FEW_SAMPLES = 64


@dataclass(frozen=True)
class Group:
    """Spots of one leg that have the same buffers but for those that move.

    Args:
        numbers: of the spots.
        spots: ascending.
        stretch: their leg.
        buffers: of the network at each.
        moving: names of the parameters and buffers that are not the same at all of them.
    """

    numbers: list[int]
    spots: list[Spot]
    stretch: Stretch
    buffers: list[Mapping[str, Tensor]]
    moving: frozenset[str]

    def state(self, place: int) -> State:
        """Give parameters and buffers at one spot."""
        return {**self.stretch.parameters(self.spots[place].s), **self.buffers[place]}


class Reuse:
    """Runs a module at the spots of a path, and does once what is the same at several.

    Each kind of leg, by the names of what moves, is checked first: outputs at two points must be those of the plain
    way up to rounding. Where they are not, or where operations depend on values that move, the plain way is taken.

    Args:
        runner: the module.
        is_wanted: False for the plain way throughout.
    """

    def __init__(self, runner: Runner, *, is_wanted: bool = True) -> None:
        self._runner, self._is_wanted = runner, is_wanted
        kept = [value for part in runner.module.modules() for value in vars(part).values()]
        self._constants = [t for t in (*kept, *runner.module.parameters()) if isinstance(t, Tensor)]
        self._checked: set[tuple[frozenset[str], frozenset[str]]] = set()
        self._refused: dict[tuple[frozenset[str], frozenset[str]], str] = {}
        self._rows: dict[tuple[int, ...], Tensor] = {}
        self._legs: dict[int, str] = {}
        self._maps: set[str] = set()
        self._num_rows = 0
        self._begin()

    @property
    def in_words(self) -> str:
        """Say what was done."""
        if not self._is_wanted:
            return "nothing: every point was evaluated alone"
        replayed = sum(not reason for reason in self._legs.values())
        reasons = sorted({reason for reason in self._legs.values() if reason})
        words = [f"what rests was computed once on {replayed} of {len(self._legs)} legs"]
        if self._maps:
            words.append(f"maps by {', '.join(sorted(self._maps))} from their terms")
        if self._num_rows:
            words.append("of terms only the rows that differ")
        if reasons:
            words.append(f"the others in full ({'; '.join(reasons)})")
        return ", ".join(words)

    def sweep(
        self,
        course: Course,
        spots: Sequence[Spot],
        buffers: Sequence[Mapping[str, Tensor]],
        batches: Callable[[], Iterable[tuple[float, Batch]]],
        visit: Visit,
        *,
        filled: frozenset[str] = frozenset(),
        before: Callable[[int, float], None] | None = None,
    ) -> None:
        """Run the module at all spots on all batches.

        Args:
            course: the path.
            spots: where, ascending.
            buffers: of the network at each spot.
            batches: gives the data, with weights, once for each block of legs.
            visit: told of every result.
            filled: buffers that are written into, which are not read.
            before: told of the spot's number and the batch's weight before each run.
        """
        for block in course.blocks(sorted({spot.leg for spot in spots})):
            self._rows = {}
            groups = _groups(course.stretches(block), spots, buffers, filled)
            with torch.no_grad(), plain_kernels():
                for weight, batch in batches():
                    self._begin()
                    for group in groups:
                        for place, number in enumerate(group.numbers):
                            if before is not None:
                                before(number, weight)
                            outputs = self._run(group, place, batch[0], filled)
                            visit(number, weight, batch, outputs)
                        self._num_rows += self._terms.end_leg()

    def _begin(self) -> None:
        """Say that another batch comes."""
        self._terms = Terms(self._rows)
        self._entries: list[Entry] = []
        self._is_replayed = False
        self._idle: frozenset[str] = frozenset()

    def _run(self, group: Group, place: int, inputs: Any, filled: frozenset[str]) -> Any:
        if place == 0:
            reason = self._reason(group, inputs, filled)
            self._is_replayed = not reason
            leg = group.spots[0].leg
            self._legs[leg] = self._legs.get(leg, reason) and reason
        state: State | None = None
        if self._is_replayed:
            kept = {name: group.buffers[place][name].clone() for name in filled}
            try:
                if place == 0:
                    return self._record(group, place, inputs, filled, self._terms)
                return self._replay(group, place, inputs, self._terms)
            except CannotReplayError as error:
                self._refused[group.moving, filled] = self._legs[group.spots[0].leg] = str(error)
                self._is_replayed, self._entries = False, []
                for name, value in kept.items():
                    group.buffers[place][name].copy_(value)
        state = group.state(place)
        return self._runner.run(state, inputs, filled=filled)

    def _reason(self, group: Group, inputs: Any, filled: frozenset[str]) -> str:
        """Say why a group is evaluated in full; nothing if it need not be."""
        if not self._is_wanted:
            return "not wanted"
        if self._runner.writes:
            return "the module writes into its weights or inputs"
        if group.stretch.blends is None:
            return "not made of blends"
        kind = group.moving, filled
        if len(group.spots) < 2:
            return "" if kind in self._checked and kind not in self._refused else "one point"
        if kind not in self._checked and kind not in self._refused:
            reason, is_telling = self._check(group, inputs, filled)
            if is_telling:
                self._checked.add(kind)
            if reason:
                self._refused[kind] = reason
        return self._refused.get(kind, "")

    def _check(self, group: Group, inputs: Any, filled: frozenset[str]) -> tuple[str, bool]:
        """Compare with the plain way at two points; give what is wrong, and whether outputs differed at all."""
        terms, inputs = Terms(self._rows), _few(inputs)
        middle = max(1, len(group.spots) // 2)
        trial = Group(
            [0, 1],
            [group.spots[0], group.spots[middle]],
            group.stretch,
            [{n: b.clone() if n in filled else b for n, b in group.buffers[k].items()} for k in (0, middle)],
            group.moving,
        )
        entries, plainly = self._entries, []
        try:
            for place in (0, 1):
                plain = {n: b.clone() if n in filled else b for n, b in trial.state(place).items()}
                expected = self._runner.run(plain, inputs, filled=filled)
                plainly.append(expected)
                if place == 0:
                    found = self._record(trial, place, inputs, filled, terms, len(group.spots))
                else:
                    found = self._replay(trial, place, inputs, terms)
                written = [[state[name] for name in sorted(filled)] for state in (trial.buffers[place], plain)]
                if not agree([found, written[0]], [expected, written[1]]):
                    return "replayed outputs differ", True
        except CannotReplayError as error:
            return str(error), True
        except RuntimeError as error:  # whatever an operation says of a tensor that only has a shape
            return f"it fails: {str(error).partition(chr(10))[0][:80]}", True
        finally:
            self._entries = entries
        return "", not agree(plainly[:1], plainly[1:])

    def _record(
        self,
        group: Group,
        place: int,
        inputs: Any,
        filled: frozenset[str],
        terms: Terms,
        num_runs: int | None = None,
    ) -> Any:
        self._place(terms, group.spots[place])
        state = group.state(place)
        blends = group.stretch.blends or {}
        runs = num_runs or len(group.spots)
        leaves = (*tree_leaves(inputs), *self._constants)
        known = frozenset(id(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        recording = Recording(state, blends, group.moving, filled, terms, runs, self._entries, known)
        with recording:
            outputs = self._runner.call(state, inputs)
        self._idle = recording.finish(outputs)
        self._entries = recording.entries
        self._maps |= {entry.map.name for entry in self._entries if entry.map is not None and entry.map.name}
        return outputs

    def _replay(self, group: Group, place: int, inputs: Any, terms: Terms) -> Any:
        spot = group.spots[place]
        self._place(terms, spot)
        blends = group.stretch.blends or {}
        moving = {n: b.terms[0] if n in self._idle else b.at(spot.s) for n, b in blends.items()}
        state = {**group.stretch.fixed, **moving, **group.buffers[place]}
        replaying = Replaying(self._entries, state, terms)
        with replaying:
            outputs = self._runner.call(state, inputs)
        replaying.finish()
        return outputs

    @staticmethod
    def _place(terms: Terms, spot: Spot) -> None:
        terms.s, terms.is_exact = spot.s, spot.t in (0.0, 1.0)


def _groups(
    stretches: Mapping[int, Stretch],
    spots: Sequence[Spot],
    buffers: Sequence[Mapping[str, Tensor]],
    filled: frozenset[str],
) -> list[Group]:
    """Put spots together by leg; an end of the path whose buffers are its own stands alone."""
    groups: list[Group] = []
    for leg, stretch in stretches.items():
        numbers = [k for k, spot in enumerate(spots) if spot.leg == leg]
        inner = [k for k in numbers if 0 < spots[k].t < 1] or numbers
        like = buffers[inner[0]]
        apart = [k for k in numbers if k not in inner and any(buffers[k][n] is not like[n] for n in like)]
        cuts = [[k] for k in apart if k < inner[0]] + [[k for k in numbers if k not in apart]]
        for cut in cuts + [[k] for k in apart if k > inner[0]]:
            own = [buffers[k] for k in cut]
            differing = {n for n in like if n not in filled and any(b[n] is not own[0][n] for b in own)}
            moving = frozenset(stretch.blends or ()) | differing
            groups.append(Group(cut, [spots[k] for k in cut], stretch, own, moving))
    return groups


def _few(inputs: Any) -> Any:
    """Take some samples of a batch; all if they are not rows."""
    try:
        count = num_samples((inputs, ()))
        return rows_of((inputs, ()), slice(0, min(count, _FEW_SAMPLES)))[0]
    except DataError:
        return inputs


def agree(found: Any, expected: Any) -> bool:
    """Say whether the tensors of two structures are equal up to rounding.

    Args:
        found: a structure of tensors.
        expected: another one.
    """
    pairs = [[leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for value in (found, expected)]
    if len(pairs[0]) != len(pairs[1]):
        return False
    return all(a.shape == b.shape and a.dtype == b.dtype and _is_close(a, b) for a, b in zip(*pairs, strict=True))


def _is_close(found: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    is_finite = torch.isfinite(expected)
    if not torch.equal(is_finite, torch.isfinite(found)):
        return False
    if not bool(is_finite.any()):
        return True
    bound = _TOLERANCE * torch.finfo(expected.dtype).eps * expected[is_finite].abs().max()
    return bool((found - expected)[is_finite].abs().max() <= bound)
