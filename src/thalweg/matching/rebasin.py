"""Straight-through refinement of an alignment: permutations that lower the loss half-way."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.batching import Batch, joined
from thalweg.errors import ConfigError
from thalweg.kernels import plain_kernels
from thalweg.matching.align import Alignment, align
from thalweg.matching.comparing import squared_distance
from thalweg.objective import Objective
from thalweg.structure import View, permute
from thalweg.structure.tree import IntArray
from thalweg.training import shuffled_batches

_EVALUATED = 2048
"""Samples on which alignments are compared. Chosen by us: their mean loss is known to a few per cent."""


@dataclass(frozen=True, eq=False)
class Rebasin:
    """An alignment refined by the loss half-way.

    Args:
        alignment: the best that was seen; the start itself if none was better.
        start_loss: loss half-way at the start, on the samples that all alignments are compared on.
        loss: that of `alignment`, never above `start_loss`.
        losses: loss half-way of each step, on its mini-batch.
        best_step: the step before which `alignment` was found; 0 if it is the start.
        has_diverged: a loss was not finite and the steps ended there.
    """

    alignment: Alignment
    start_loss: float
    loss: float
    losses: tuple[float, ...]
    best_step: int
    has_diverged: bool = False


def straight_through(  # noqa: PLR0913 - the pair, and one keyword for each property of the descent
    objective: Objective,
    view: View,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    *,
    start: Alignment,
    steps: int,
    learning_rate: float,
    batch_size: int,
    generator: torch.Generator,
    progress: Callable[[float, str], None] | None = None,
) -> Rebasin:
    """Refine an alignment by the loss of the network half-way between A and the permuted B.

    Free parameters θ̂ begin at A. At every step B is permuted to be closest to θ̂, the loss and its gradient are taken
    at ½(A + P(B)), and the gradient goes to θ̂ as if P(B) were θ̂. Of all alignments on the way, the one with the least
    loss on a fixed part of the data is kept.

    BatchNorm takes the statistics of each batch, half-way and nowhere else; all other modules are in eval mode.

    Args:
        objective: the landscape; its module is copied.
        view: the groups.
        a: the network whose order is kept, parameters and buffers by name.
        b: the network to be permuted.
        start: an alignment of the two, as `align` finds it.
        steps: number of steps.
        learning_rate: of Adam on θ̂.
        batch_size: samples of a mini-batch.
        generator: source of the batches' order.
        progress: called as `progress(share of the work, text)` after each step.

    Returns:
        The refined alignment; its loss is never above that of the start, on the samples compared.

    Raises:
        ConfigError: no step, or no sample in a mini-batch.
        ShapeError: states of different names or shapes.
        DataError: the batches are not one row per sample.

    **Source:** Ainsworth et al. 2022 (arXiv 2209.04836), algorithm 3; θ̂ is their Θ̃_B. Departures, chosen by us: the
    start is any alignment, the projection goes on from the permutations before, steps are Adam's, the best alignment
    seen is kept and not the last one, and BatchNorm's statistics are those of the batch (they had LayerNorm).

    Example:
        >>> from torch import nn
        >>> from thalweg.structure import trace
        >>> x = torch.linspace(-1, 1, 8).unsqueeze(1)
        >>> net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> objective, view = Objective(net, nn.MSELoss(), (x, x)), trace(net, x)
        >>> a = {name: p.detach() for name, p in net.named_parameters()}
        >>> b = {name: p.flip(0) for name, p in a.items()}
        >>> options = {"steps": 2, "learning_rate": 0.01, "batch_size": 8, "generator": torch.Generator()}
        >>> found = straight_through(objective, view, a, b, start=align(view, a, b), **options)
        >>> found.loss <= found.start_loss
        True
    """
    if steps < 1 or batch_size < 1:
        raise ConfigError(
            f"Expected at least one step and one sample. Got steps={steps}, batch_size={batch_size}. Raise them."
        )
    midpoint = _Midpoint(objective, view, a, b)
    batches = itertools.islice(shuffled_batches(objective, batch_size, generator), max(_EVALUATED // batch_size, 1))
    compared = joined(batches)
    best, best_step = start, 0
    start_loss = loss = midpoint.value(start.permutations, compared)
    free = {n: midpoint.ours[n].clone().requires_grad_() for n in objective.space.names if n in midpoint.ours}
    optimizer = torch.optim.Adam(free.values(), lr=learning_rate)
    losses: list[float] = []
    now: Alignment = start
    for step, batch in enumerate(itertools.islice(_endless(objective, batch_size, generator), steps)):
        if step:
            found = align(view, {**midpoint.ours, **free}, midpoint.theirs, start=now.permutations)
            if _differ(found.permutations, now.permutations):
                trial = midpoint.value(found.permutations, compared)
                if trial < loss:
                    best, best_step, loss = found, step, trial
            now = found
        optimizer.zero_grad()
        step_loss = midpoint.loss(now.permutations, batch, free)
        losses.append(float(step_loss.detach()))
        if not torch.isfinite(step_loss):
            return Rebasin(_of_pair(best, view, a, b), start_loss, loss, tuple(losses), best_step, has_diverged=True)
        step_loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if progress is not None:
            progress((step + 1) / steps, f"step {step + 1} of {steps}, loss half-way {loss:.4g}")
    return Rebasin(_of_pair(best, view, a, b), start_loss, loss, tuple(losses), best_step)


class _Midpoint:
    """The loss of ½(A + P(B)), as a function of P and, straight through, of what P(B) stands for."""

    def __init__(self, objective: Objective, view: View, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
        self._objective = objective.in_dtype(objective.dtype)
        self._view = view
        self._module = self._objective.module.eval()
        for part in self._module.modules():
            if isinstance(part, _BatchNorm):
                part.train()
        self.ours, self.theirs = (self._placed(state) for state in (a, b))

    def value(self, permutations: Mapping[str, IntArray], batch: Batch) -> float:
        with torch.no_grad():
            return float(self.loss(permutations, batch, {}))

    def loss(self, permutations: Mapping[str, IntArray], batch: Batch, free: Mapping[str, Tensor]) -> Tensor:
        moved = permute(self._view, self.theirs, permutations)
        state = {}
        for name, ours in self.ours.items():
            theirs = moved[name]
            if name in free:
                theirs = theirs + (free[name] - free[name].detach())
            state[name] = (ours + theirs) / 2 if ours.is_floating_point() else ours.clone()
        inputs, targets = batch
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        with plain_kernels():
            outputs = functional_call(self._module, state, args if isinstance(args, tuple) else (args,), kwargs)
        return self._objective.reduced(outputs, targets)

    def _placed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {n for n, _ in [*self._module.named_parameters(), *self._module.named_buffers()]}
        device, dtype = self._objective.device, self._objective.dtype
        return {
            n: t.detach().to(device=device, dtype=dtype if t.is_floating_point() else t.dtype)
            for n, t in state.items()
            if n in own
        }


def _endless(objective: Objective, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Pass over the data again and again; a smaller last batch counts only if it is the first."""
    while True:
        full = 0
        for batch in shuffled_batches(objective, batch_size, generator):
            size = len(batch[1])
            if size < full:
                continue
            full = size
            yield batch


def _differ(one: Mapping[str, IntArray], two: Mapping[str, IntArray]) -> bool:
    return any((order != two[name]).any() for name, order in one.items())


def _of_pair(found: Alignment, view: View, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Alignment:
    """The same permutations, with the distance of A and B themselves."""
    return replace(found, cost=squared_distance(a, permute(view, b, found.permutations)))
