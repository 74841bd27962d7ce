"""tape: gradients of pieces of the data with their graphs, recorded once and replayed for every Hessian product."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.batching import Batch, num_samples, rows_of
from thalweg.errors import DataError
from thalweg.objective import Objective

# Largest array of a piece on a CPU. Chosen by us: of a network of three 64-channel convolutions, a product over 500
# samples took 2.0 s in pieces of 2 and of 4 MB, 1.7 s in pieces of 8, 1.9 s of 16, and longer uncut (medians on two
# cores): large arrays leave the caches, and above 32 MB go back to the system after every operation.
_ARRAY_BYTES = 8 * 2**20
# The same on an accelerator, where large arrays are the fast ones; chosen by us so that a tape of dozens fits.
_ARRAY_BYTES_ELSEWHERE = 512 * 2**20
# Bytes of a tape times rows, below which one vectorised replay beats a loop: see `hessian.py`.
_REPLAY_BYTES = 32 * 2**20
# Samples of the trial run that measures bytes; chosen by us, few enough to cost nothing.
_SAMPLES_OF_A_TRIAL = 4

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True)
class Tape:
    """The gradient of one piece of the data, with its graph.

    Args:
        weight: of the piece in the total.
        loss: of the piece.
        slopes: name -> gradient; those that do not depend on the leaves have no further derivative.
        leaves: name -> what they are gradients with respect to.
        num_bytes: what the graph holds.
    """

    weight: float
    loss: float
    slopes: dict[str, Tensor]
    leaves: dict[str, Tensor]
    num_bytes: float

    def add_gradient(self, totals: list[Tensor]) -> None:
        """Add the weighted gradient."""
        torch._foreach_add_(totals, [slope.detach() for slope in self.slopes.values()], alpha=self.weight)

    def add_products(self, vectors: Leaves, totals: list[Tensor]) -> None:
        """Add the weighted products of the second derivatives with vectors, each of shape (vectors, *shape)."""
        curved = {n: s for n, s in self.slopes.items() if s.requires_grad}
        if not curved:  # the loss is affine in the leaves
            return
        rows = len(totals[0])
        if 1 < rows and rows * self.num_bytes <= _REPLAY_BYTES:
            try:
                found = self._replay(curved, {n: vectors[n] for n in curved}, batched=True)
            except RuntimeError:  # an operation without a batching rule
                pass
            else:
                torch._foreach_add_(totals, found, alpha=self.weight)
                return
        for row in range(rows):
            found = self._replay(curved, {n: vectors[n][row] for n in curved}, batched=False)
            torch._foreach_add_([t[row] for t in totals], found, alpha=self.weight)

    def _replay(self, curved: Leaves, vectors: Leaves, *, batched: bool) -> list[Tensor]:
        found = torch.autograd.grad(
            *(list(curved.values()), list(self.leaves.values()), list(vectors.values())),
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=batched,
        )
        return [f.detach() for f in found]


def record(
    objective: Objective, point: Leaves, leaves: dict[str, Tensor], weight: float, batch: Batch, num_bytes: float
) -> Tape:
    """Record the gradient of one piece.

    Args:
        objective: the landscape.
        point: all parameters; those that are no leaves are constants.
        leaves: what to differentiate with respect to.
        weight: of the piece.
        batch: the piece.
        num_bytes: what its graph will hold.
    """
    loss = objective.leaf_loss(point, *batch)
    slopes = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if loss.requires_grad:
        slopes = list(torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True))
    return Tape(weight, float(loss.detach()), dict(zip(leaves, slopes, strict=True)), leaves, num_bytes)


@dataclass(frozen=True)
class Sizes:
    """What graphs of a landscape hold.

    Args:
        fixed: bytes of any piece.
        per_sample: bytes of each sample on top.
        largest: bytes of the largest array, for each sample.
    """

    fixed: float
    per_sample: float
    largest: float

    def of(self, batch: Batch) -> float:
        """Bytes of a piece's graph."""
        return self.fixed + self.per_sample * count(batch)


def count(batch: Batch) -> int:
    """Count the samples of a batch; one that cannot be cut counts as one."""
    try:
        return num_samples(batch)
    except DataError:
        return 1


def in_pieces(objective: Objective, theta: Tensor, leaves: dict[str, Tensor], most: int) -> tuple[Objective, Sizes]:
    """Cut the data so that no array is too large and no graph exceeds `most` bytes, where they may be cut.

    Returns:
        The landscape, cut or as it was, and what its graphs hold.
    """
    batch, is_additive = next(iter(objective.batches())), objective.is_additive(theta)
    sizes = _measured(objective, theta, leaves, rows_of(batch, slice(_SAMPLES_OF_A_TRIAL)) if is_additive else batch)
    limit = _ARRAY_BYTES if objective.device.type == "cpu" else _ARRAY_BYTES_ELSEWHERE
    samples = max(1, int(min(limit / max(sizes.largest, 1.0), most / max(sizes.per_sample, 1.0))))
    if not is_additive or (objective.in_memory and all(count(b) <= samples for b in objective.batches())):
        return objective, sizes
    return objective.recut(theta, samples), sizes


def _measured(objective: Objective, theta: Tensor, leaves: dict[str, Tensor], batch: Batch) -> Sizes:
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()  # the storage itself may be that of the whole data
        held[place] = max(held.get(place, 0), tensor.numel() * tensor.element_size())
        return tensor

    point = objective.leaves(theta)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        record(objective, {**point, **leaves}, leaves, 1.0, batch, 0.0)
    fixed = 2.0 * theta.numel() * theta.element_size()  # the parameters' clones, and the gradient itself
    samples = count(batch)
    parameter_sizes = {leaf.numel() * leaf.element_size() for leaf in point.values()}
    arrays = [size for size in held.values() if size not in parameter_sizes]
    return Sizes(fixed, sum(arrays) / samples, max(arrays, default=0) / samples)
