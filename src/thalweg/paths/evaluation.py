"""evaluation: a module at many points of a path, batches outside and points inside, on a copy of its own."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from thalweg.batching import Batch, num_samples, rows_of
from thalweg.errors import DataError, ShapeError
from thalweg.kernels import plain_kernels
from thalweg.objective import Objective
from thalweg.paths.leg import Blend, BlendLeg, LazyLeg, Leg
from thalweg.paths.path import Path
from thalweg.precision import copied

Curve = Callable[[Tensor], Tensor]
State = dict[str, Tensor]

_HELD_BYTES = 2**29
"""Parameters of points, or of lazy legs, that are held at a time. Chosen by us: 40 legs of a net of 784-2000-10."""


@dataclass(frozen=True)
class Spot:
    """A point of a path.

    Args:
        t: where.
        leg: on which leg.
        s: how far along it, in [0, 1].
    """

    t: float
    leg: int
    s: float


@dataclass(frozen=True)
class Stretch:
    """A leg, in the dtype and on the device of the computation.

    Args:
        fixed: the parameters that rest.
        blends: those that move; None if they are no blends.
        point: s -> every parameter, where there are no blends.
        num_kept: how many points are kept, where there are no blends.
    """

    fixed: State
    blends: Mapping[str, Blend] | None
    point: Callable[[float], State] | None
    num_kept: int
    _points: dict[float, State] = field(default_factory=dict, repr=False)

    def parameters(self, s: float) -> State:
        """Give every parameter at s; not to be written into."""
        if self.blends is not None or self.point is None:
            return {**self.fixed, **{name: blend.at(s) for name, blend in (self.blends or {}).items()}}
        if s in self._points:
            return self._points[s]
        made = self.point(s)
        if len(self._points) < self.num_kept:
            self._points[s] = made
        return made

    def ending(self) -> State | None:
        """Give the parameters at s = 1, those that rest as they are."""
        if self.blends is None:
            return None
        return {**self.fixed, **{name: blend.ends[1] for name, blend in self.blends.items()}}


class Course:
    """A path, or a user's own curve, as it is seen by an objective.

    Args:
        path: a path, or a function that gives theta at several t.
        objective: gives the space, the dtype and the device.

    Raises:
        ShapeError: the path is of another network.
    """

    def __init__(self, path: Path | Curve, objective: Objective) -> None:
        self.path = path if isinstance(path, Path) else None
        if self.path is not None and self.path.space != objective.space:
            raise ShapeError(
                f"Expected a path of a network with {objective.num_params} parameters in "
                f"{len(objective.space.names)} tensors. Got one of another network "
                f"({self.path.space.num_params} parameters). Pass the objective of the network of the path."
            )
        self._curve, self._objective = path, objective
        itemsize = torch.empty((), dtype=objective.dtype).element_size()
        self._num_held = max(1, _HELD_BYTES // (2 * objective.num_params * itemsize))

    @property
    def num_legs(self) -> int:
        """How many legs there are; a user's curve is one."""
        return len(self.path.legs) if self.path else 1

    @property
    def intervals(self) -> tuple[tuple[float, float], ...]:
        """The t at which each leg begins and ends."""
        return self.path.intervals if self.path else ((0.0, 1.0),)

    def spot(self, t: float) -> Spot:
        """Give the place of t.

        Raises:
            ShapeError: t is outside [0, 1].
        """
        if self.path is not None:
            return Spot(t, *self.path.place(t))
        if not 0 <= t <= 1:
            raise ShapeError(f"Expected t in [0, 1]. Got {t}. A path begins at 0 and ends at 1.")
        return Spot(t, 0, t)

    def buffers(self, end: int) -> Mapping[str, Tensor]:
        """Give the buffers that the path has for its start (0) or its end (1)."""
        if self.path is None:
            return {}
        return {n: self._cast(b) for n, b in (self.path.end_buffers if end else self.path.start_buffers).items()}

    def blocks(self, legs: Sequence[int]) -> Iterator[list[int]]:
        """Cut the numbers of legs so that the legs of a block may be in memory together."""
        size = self._num_held if self.path and any(isinstance(leg, LazyLeg) for leg in self.path.legs) else len(legs)
        for start in range(0, len(legs), size):
            yield list(legs[start : start + size])

    def stretches(self, legs: Sequence[int]) -> dict[int, Stretch]:
        """Make some legs ready; what two neighbours have in common is one tensor."""
        made: dict[int, Stretch] = {}
        before: State | None = None
        for place in legs:
            made[place] = self._stretch(place, before if place - 1 in made else None)
            before = made[place].ending()
        return made

    def _stretch(self, place: int, before: State | None) -> Stretch:
        if self.path is None:
            return Stretch({}, None, self._on_curve, self._num_held)
        leg: Leg = self.path.legs[place]
        leg = leg.straight() if isinstance(leg, LazyLeg) else leg
        blends = leg.moving()
        if blends is None:
            return Stretch({}, None, lambda s: self._all(leg.parameters(s)), self._num_held)
        start = before or {}
        fixed = leg.fixed if isinstance(leg, BlendLeg) else leg.parameters(0.0)
        resting = {n: start[n] if n in start else self._cast(p) for n, p in fixed.items() if n not in blends}
        return Stretch(resting, {n: self._moving(b, start.get(n)) for n, b in blends.items()}, None, 0)

    def _moving(self, blend: Blend, first: Tensor | None) -> Blend:
        terms = tuple(first if first is not None and j == 0 else self._cast(x) for j, x in enumerate(blend.terms))
        return Blend(blend.kind, terms, blend.times)

    def _on_curve(self, t: float) -> State:
        at: Tensor = self._curve(torch.tensor([t], dtype=torch.float64))
        if at.shape != (1, self._objective.num_params):
            raise ShapeError(
                f"Expected a curve that gives theta of shape (1, {self._objective.num_params}) at one t. "
                f"Got {tuple(at.shape)}. Give a row for each t."
            )
        return self._all(self._objective.space.parameters(at[0]))

    def _all(self, parameters: Mapping[str, Tensor]) -> State:
        return {name: self._cast(p) for name, p in parameters.items()}

    def _cast(self, value: Tensor) -> Tensor:
        dtype = self._objective.dtype if value.is_floating_point() else value.dtype
        return value.detach().to(device=self._objective.device, dtype=dtype)


class Runner:
    """A copy of an objective's module that is run with any parameters and buffers.

    Args:
        objective: the landscape; its module is copied.
    """

    def __init__(self, objective: Objective) -> None:
        self.module = copied(objective.module, device=objective.device, dtype=objective.dtype)
        self.buffers: State = dict(self.module.named_buffers())
        self.norms: dict[str, nn.Module] = {
            name: layer
            for name, layer in self.module.named_modules()
            if isinstance(layer, nn.modules.batchnorm._NormBase)
            and layer.track_running_stats
            and layer.running_mean is not None
        }
        self._parts = list(self.module.modules())
        self._is_known = False
        self.writes = False

    def run(self, state: Mapping[str, Tensor], inputs: Any, *, filled: Collection[str] = ()) -> Any:
        """Run the module with the given parameters and buffers; neither they, the inputs nor an attribute change.

        The first run shows whether the module writes into any of them; only then are they copied ever after.

        Args:
            state: parameters and buffers by name.
            inputs: a batch.
            filled: buffers that are to be written into.
        """
        if self._is_known and not self.writes:
            return self.call(state, inputs)
        own = {name: value if name in filled else value.clone() for name, value in state.items()}
        taken = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
        pairs = [(own[name], value) for name, value in state.items() if name not in filled]
        leaves = zip(tree_leaves(taken), tree_leaves(inputs), strict=True)
        pairs += [(copy, leaf) for copy, leaf in leaves if isinstance(leaf, Tensor)]
        versions = [copy._version for copy, _ in pairs]
        outputs = self.call(own, taken)
        self._is_known = True
        # What is written through `.data` has no new version.
        changed = any(
            copy._version != version or not torch.equal(copy, value)
            for (copy, value), version in zip(pairs, versions, strict=True)
        )
        self.writes = self.writes or changed
        return outputs

    def call(self, state: Mapping[str, Tensor], inputs: Any) -> Any:
        """Run the module with parameters and buffers that it may write into."""
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        before = [(vars(m), vars(m).copy()) for m in self._parts]
        try:
            full = {**self.buffers, **state}
            return functional_call(self.module, full, args if isinstance(args, tuple) else (args,), kwargs)
        finally:
            for attributes, kept in before:
                for name in attributes.keys() - kept.keys():
                    del attributes[name]
                attributes.update(kept)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Let the layers that keep statistics take those of the batch, and only them."""
        modes = {name: layer.training for name, layer in self.norms.items()}
        for layer in self.norms.values():
            layer.training = True
        try:
            yield
        finally:
            for name, layer in self.norms.items():
                layer.training = modes[name]


def recut(objective: Objective, theta: Float[Tensor, " params"], runner: Runner) -> Objective:
    """Give the same landscape in batches whose tensors stay in the processor's reach, where that changes nothing.

    Args:
        objective: the landscape.
        theta: a point of it.
        runner: its module.
    """
    if objective.mode == "train":
        return objective
    inputs, _ = next(iter(objective.batches()))
    try:
        few = rows_of((inputs, ()), slice(0, _FEW_SAMPLES))[0]
        count = max(len(leaf) for leaf in tree_leaves(few) if isinstance(leaf, Tensor) and leaf.ndim)
        with torch.no_grad(), plain_kernels():
            state = objective.space.parameters(theta)
            runner.run(state, few)
            if runner.writes:
                return objective
            with _Largest() as seen:
                runner.run(state, few)
    except (RuntimeError, ValueError, IndexError):  # a size is part of the code, or samples are not rows
        return objective
    size = max(_FEW_SAMPLES, _PIECE_BYTES * count // seen.nbytes)
    if objective.in_memory and max(_rows(batch) for batch in objective.batches()) <= size:
        return objective
    return objective.recut(theta, size)


def _rows(batch: Batch) -> float:
    try:
        return float(num_samples(batch))
    except DataError:
        return float("inf")


class _Largest(TorchFunctionMode):
    """Sees how large the tensors are that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not any(made is leaf for leaf in args):
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


# Samples that are run to see how large tensors are, and the largest tensor that a piece of a batch may make. As in
# `probes.shortcuts`, where it was measured.
_FEW_SAMPLES, _PIECE_BYTES = 50, 2**23


def theta_at(course: Course, spot: Spot, objective: Objective) -> Float[Tensor, " params"]:
    """Give theta at a spot, as the objective takes it."""
    return objective.space.theta(course.stretches([spot.leg])[spot.leg].parameters(spot.s))
