"""replay: operations that a leg does not change are done once for all t on it, and their results given again.

The first run on a batch is recorded, operation by operation. A tensor *moves* if it is made from a parameter or
buffer that changes along the leg. Operations on tensors that rest are replayed from the record; those on tensors
that move are done again. Between the two lie linear maps of what rests with a weight that is a blend Σ c_j·W_j:
they are Σ c_j·(W_j x), so that they are computed once for each term, and only the rows in which two terms differ.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from thalweg.paths.leg import Blend
from thalweg.paths.terms import LinearMap, Terms, linear_map

_KEPT_BYTES = 2**28
"""Results that rest are all kept if they are no larger than this together, for the legs that follow; else only those
that something that moves is made from. Chosen by us."""


_MOST_BYTES = 2**30
"""Results that rest are held while a batch is recorded; beyond this much the batch is evaluated in full. Ours."""


_RECTIFIERS = {torch.relu, functional.relu, Tensor.relu}


class CannotReplayError(Exception):
    """An operation is not the one recorded, or writes where a record would not see it."""


@dataclass
class Entry:
    """One operation of a record.

    Args:
        function: what was called.
        value: the result, if it rests; of an operation that moves, what it gave that is no tensor.
        rests: whether the result is the same all along the leg.
        map: the operation as a linear map of what rests by a weight that moves.
        states: identities of the parameters and buffers that it took.
        fills: statistics that it wrote, by name.
        is_dropped: only the shape of the result is left.
        overwrites: a ReLU that may be done in place, as nothing else takes what it is applied to.
    """

    function: Any
    value: Any
    rests: bool
    map: LinearMap | None = None
    states: tuple[int, ...] = ()
    fills: dict[str, Tensor] = field(default_factory=dict)
    is_dropped: bool = False
    overwrites: bool = False


class Recording(TorchFunctionMode):
    """A first run: does every operation, and keeps what the runs that follow need.

    Args:
        state: parameters and buffers of the run.
        blends: those that move and are blends.
        moving: names of all that move.
        sinks: names of statistics that are written and not read.
        terms: of linear maps on this batch.
        num_runs: how many runs the record is for.
        before: entries of the leg before on the same batch, to be given again where they still hold.
        known: identities of the tensors that rest besides: inputs, constants of the module. Any other tensor that no
            recorded operation made (a scripted function's result) cannot be told from one that moves.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        blends: Mapping[str, Blend],
        moving: frozenset[str],
        sinks: frozenset[str],
        terms: Terms,
        num_runs: int,
        before: list[Entry],
        known: frozenset[int],
    ) -> None:
        super().__init__()
        self._known, self._bytes = set(known), 0
        self.entries: list[Entry] = []
        self._names = {id(value): name for name, value in state.items()}
        self._state, self._blends, self._terms = state, blends, terms
        self._sinks = {id(state[name]) for name in sinks}
        self._moved: dict[int, Tensor] = {id(state[name]): state[name] for name in moving - sinks}
        self._taken: dict[int, tuple[Tensor, int]] = {}
        self._uses: dict[str, int] = {}
        self._num_runs, self._before = num_runs, before
        self._blended: set[int] = set()
        self._times: dict[int, int] = {}
        self._rectified: list[tuple[Entry, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not all(id(t) in self._known or id(t) in self._names or id(t) in self._moved for t in tensors):
            raise CannotReplayError("a tensor comes from an operation that cannot be seen")
        for tensor in tensors:
            self._times[id(tensor)] = self._times.get(id(tensor), 0) + 1
        moves = any(id(tensor) in self._moved for tensor in tensors)
        states = tuple(id(x) for x in tensors if id(x) in self._names and id(x) not in self._sinks)
        given = self._given_again(func, states) if not moves else None
        if given is not None:
            return self._append(given).value
        self._before = []
        for name in (self._names[place] for place in states):
            self._uses[name] = self._uses.get(name, 0) + 1
        if not moves:
            return self._rest(func, tensors, states, args, kwargs)
        return self._move(func, tensors, args, kwargs)

    def finish(self, outputs: Any) -> frozenset[str]:
        """End the record; it cannot be replayed if something that rests was written into after it was taken.

        Returns:
            Weights that only linear maps of what rests take, so that they need not be made at any t.
        """
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                self._take(leaf)
        if any(tensor._version != version for tensor, version in self._taken.values()):
            raise CannotReplayError("a tensor is written into after it was read")
        given = {id(leaf) for leaf in tree_leaves(outputs)}
        for entry, taken in self._rectified:
            entry.overwrites = self._times[taken] == 1 and taken not in given
        self._drop()
        self._moved.clear()
        mapped: dict[str, int] = {}
        for entry in self.entries:
            if entry.map is not None and entry.map.name is not None:
                mapped[entry.map.name] = mapped.get(entry.map.name, 0) + 1
        return frozenset(name for name, count in mapped.items() if count == self._uses[name])

    def _given_again(self, func: Any, states: tuple[int, ...]) -> Entry | None:
        place = len(self.entries)
        entry = self._before[place] if place < len(self._before) else None
        if entry is None or not entry.rests or entry.is_dropped or entry.function != func or entry.states != states:
            return None
        for name, filled in entry.fills.items():
            self._state[name].copy_(filled)
        return entry

    def _rest(self, func: Any, tensors: list[Tensor], states: tuple[int, ...], args: Any, kwargs: Any) -> Any:
        versions = [tensor._version for tensor in tensors]
        value = func(*args, **kwargs)
        fills: dict[str, Tensor] = {}
        for tensor, version in zip(tensors, versions, strict=True):
            if tensor._version != version and id(tensor) in self._names:
                fills[self._written(tensor)] = tensor
        return self._append(Entry(func, value, rests=True, states=states, fills=fills)).value

    def _move(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        found = self._map(func, args, kwargs)
        if found is not None:
            self._append(Entry(func, None, rests=False, map=found))
            self._take(found.inputs)
            value = found.at(self._terms, found.bias_of(args, kwargs))
            self._blended.add(id(value))
        else:
            versions = [tensor._version for tensor in tensors]
            value = func(*args, **kwargs)
            for tensor, version in zip(tensors, versions, strict=True):
                if tensor._version == version:
                    self._take(tensor)
                elif id(tensor) in self._names:
                    self._written(tensor)
                elif id(tensor) not in self._moved:
                    raise CannotReplayError("what moves is written into what rests")
            entry = self._append(Entry(func, _plain_leaves(value), rests=False))
            if func in _RECTIFIERS and len(tensors) == 1 and id(tensors[0]) in self._blended:
                self._rectified.append((entry, id(tensors[0])))
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self._moved[id(leaf)] = leaf
        return value

    def _map(self, func: Any, args: Any, kwargs: Any) -> LinearMap | None:
        found = linear_map(func, args, kwargs)
        if found is None or id(found.inputs) in self._moved or id(found.inputs) in self._names:
            return None
        name = self._names.get(id(found.weight))
        bias = found.bias_of(args, kwargs)
        if id(found.weight) in self._moved and name not in self._blends:
            return None
        if bias is not None and id(bias) in self._moved and id(bias) not in self._names:
            return None
        found.name = name if name in self._blends else None
        found.blend = self._blends.get(found.name or "")
        moved = bias is not None and id(bias) in self._moved
        own = self._blends.get(self._names[id(bias)]) if moved else None
        if not moved or own is not None:
            found.set_bias(bias, own)
        return found if self._terms.pays(found, self._num_runs) else None

    def _written(self, tensor: Tensor) -> str:
        if id(tensor) not in self._sinks:
            raise CannotReplayError("a parameter or buffer is written into")
        return self._names[id(tensor)]

    def _take(self, tensor: Tensor) -> None:
        if id(tensor) not in self._moved and id(tensor) not in self._names:
            self._taken.setdefault(id(tensor), (tensor, tensor._version))

    def _append(self, entry: Entry) -> Entry:
        self.entries.append(entry)
        for leaf in tree_leaves(entry.value) if entry.rests else ():
            if isinstance(leaf, Tensor):
                self._bytes += leaf.nbytes if id(leaf) not in self._known else 0
                self._known.add(id(leaf))
        if self._bytes > _MOST_BYTES:
            raise CannotReplayError("what rests is too large to be kept")
        return entry

    def _drop(self) -> None:
        resting = [(entry, leaf) for entry in self.entries if entry.rests for leaf in tree_leaves(entry.value)]
        made = {id(leaf): leaf.nbytes for _, leaf in resting if isinstance(leaf, Tensor)}
        if sum(made.values()) <= _KEPT_BYTES:
            return
        for entry, value in [(e, e.value) for e in self.entries if e.rests and isinstance(e.value, Tensor)]:
            if id(value) not in self._taken:
                entry.value, entry.is_dropped = value.new_empty(()).expand(value.shape), True


class Replaying(TorchFunctionMode):
    """A further run on the same batch: gives again what rests, and does what moves.

    Args:
        entries: of the record.
        state: parameters and buffers of this run.
        terms: of linear maps on this batch.
    """

    def __init__(self, entries: list[Entry], state: Mapping[str, Tensor], terms: Terms) -> None:
        super().__init__()
        self._entries, self._state, self._terms = entries, state, terms
        self._place = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        entry = self._entries[self._place] if self._place < len(self._entries) else None
        if entry is None or entry.function != func:
            raise CannotReplayError("the operations depend on values that move")
        self._place += 1
        if entry.rests:
            for name, filled in entry.fills.items():
                self._state[name].copy_(filled)
            return entry.value
        if entry.map is not None:
            return entry.map.at(self._terms, entry.map.bias_of(args, kwargs))
        value = args[0].relu_() if entry.overwrites and args else func(*args, **kwargs)
        if entry.value != _plain_leaves(value):
            raise CannotReplayError("the operations depend on values that move")
        return value

    def finish(self) -> None:
        """End the run; there must be no fewer operations than recorded."""
        if self._place != len(self._entries):
            raise CannotReplayError("the operations depend on values that move")


def _plain_leaves(value: Any) -> list[Any]:
    """List what is no tensor in a result; arrays are seen as unlike anything."""
    leaves = [leaf for leaf in tree_leaves(value) if not isinstance(leaf, Tensor)]
    return [leaf if type(leaf).__module__ in ("builtins", "torch") else object() for leaf in leaves]


Call = Callable[[Mapping[str, Tensor]], Any]
"""Runs the module on the batch with parameters and buffers."""
