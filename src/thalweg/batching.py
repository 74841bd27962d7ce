"""batching: the data of an objective as batches, and what each of them counts under a mean."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from thalweg.errors import DataError

Batch = tuple[Any, Any]
Weight = Callable[[Any], float]


def batches_of(data: Any, batch_size: int | None) -> Any:
    """Give data as a list of batches, if they are one pair of tensors, else as the re-iterable that they are.

    Raises:
        DataError: the data are empty, of a kind that cannot be read twice, or not pairs.
    """
    if isinstance(data, Iterator):
        raise DataError(
            "Expected data that can be read more than once. Got a one-shot iterator. "
            "Pass a list of (inputs, targets) pairs or a DataLoader."
        )
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor) and data[1].ndim:
        return _split(*data, batch_size)
    if batch_size is not None:
        raise DataError(
            "Expected batch_size only with a pair of tensors. Got data that already come in batches. "
            "Set the batch size of the loader."
        )
    if not isinstance(data, Iterable):
        raise DataError(
            f"Expected (inputs, targets) or batches of them. Got a {type(data).__name__}. Wrap it in a list."
        )
    first = next(iter(data), None)
    if first is None:
        raise DataError("Expected at least one batch. Got empty data. Check the loader.")
    if not isinstance(first, tuple | list) or len(first) != 2:
        raise DataError(
            f"Expected batches (inputs, targets). Got a {type(first).__name__}. "
            "Wrap the loader so that it yields pairs."
        )
    return data


def _split(inputs: Any, targets: Tensor, batch_size: int | None) -> list[Batch]:
    """Cut one pair into batches along the leading axis of its tensors."""
    parts = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    counts = {len(part) for part in parts} | {len(targets)}
    if len(counts) != 1 or 0 in counts:
        raise DataError(f"Expected as many inputs as targets, at least one. Got {sorted(counts)}. Check the data.")

    def cut(rows: slice) -> Any:
        if isinstance(inputs, dict):
            return {key: part[rows] for key, part in inputs.items()}
        return tuple(part[rows] for part in inputs) if isinstance(inputs, tuple) else inputs[rows]

    size = batch_size or len(targets)
    rows = [slice(start, start + size) for start in range(0, len(targets), size)]
    return [(cut(r), targets[r]) for r in rows]


# Losses whose mean is over elements: modules, and functions by name.
_MODULES = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss),
    *(nn.PoissonNLLLoss, nn.GaussianNLLLoss, nn.KLDivLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss),
)
_FUNCTIONS = """mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits
    poisson_nll_loss gaussian_nll_loss kl_div soft_margin_loss hinge_embedding_loss""".split()


def mean_weight(loss: Any, reduction: str) -> Weight:
    """Give the weight of a batch under a mean loss: what the loss itself divides by ("batchmean": the samples)."""
    function: Any = loss.func if isinstance(loss, functools.partial) else loss
    options = loss.keywords if isinstance(loss, functools.partial) else {}
    if isinstance(function, nn.Module):
        options = vars(function) | dict(function.named_buffers())
    if isinstance(function, nn.CrossEntropyLoss | nn.NLLLoss):
        function = functional.cross_entropy
    if function in (functional.cross_entropy, functional.nll_loss):
        return functools.partial(_class_weight, options=options, reduction=reduction)
    elementwise = isinstance(function, _MODULES) or function in [getattr(functional, name) for name in _FUNCTIONS]
    return Tensor.numel if elementwise and reduction != "batchmean" else _num_samples


def _class_weight(targets: Tensor, options: Mapping[str, Any], reduction: str) -> float:
    if targets.is_floating_point():  # probabilities of the classes, which lie along dim 1 (dim 0: one sample)
        return float(targets.numel() // targets.shape[min(1, targets.ndim - 1)])
    if reduction == "none":
        return float(targets.numel())
    weight, kept = options.get("weight"), targets[targets != options.get("ignore_index", -100)]
    return float(kept.numel() if weight is None else weight.to(kept.device)[kept].sum())


def _num_samples(targets: Any) -> float:
    while not isinstance(targets, Tensor):
        targets = next(iter(targets.values() if isinstance(targets, dict) else targets))
    return float(len(targets)) if targets.ndim else 1.0


def num_samples(batch: Batch) -> int:
    """Count the samples of a batch: the length of its targets.

    Raises:
        DataError: some tensor of the batch is not one row per sample, so that it cannot be cut.
    """
    lengths = {len(leaf) if leaf.ndim else 0 for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    if len(lengths) != 1 or 0 in lengths:
        raise DataError(
            f"Expected every tensor of a batch to have one row per sample. Got {sorted(lengths)} rows. "
            "Pass batches that are cut already."
        )
    return int(lengths.pop())


def rows_of(batch: Batch, rows: slice | Tensor) -> Batch:
    """Take some samples of a batch."""
    taken: Batch = tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, batch)
    return taken


def joined(batches: Iterable[Batch]) -> Batch:
    """Make one batch of several of the same structure."""
    flat = [tree_flatten(batch) for batch in batches]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    leaves = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    whole: Batch = tree_unflatten(leaves, flat[0][1])
    return whole


@dataclass(frozen=True)
class Recut:
    """Data read batch by batch, each cut into pieces.

    Args:
        data: a re-iterable of batches.
        size: samples of a piece, at most.
    """

    data: Iterable[Batch]
    size: int

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.data:
            yield from pieces(tuple(batch), self.size)


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """Cut a batch into pieces of at most `size` samples, as even as they can be."""
    total = num_samples(batch)
    parts = -(-total // size)
    for i in range(parts):
        yield rows_of(batch, slice(i * total // parts, (i + 1) * total // parts))


def drawn(data: Iterable[Batch], count: int, generator: torch.Generator) -> Batch:
    """Draw samples without replacement, each equally likely, in their order.

    Args:
        data: a re-iterable of batches.
        count: number of samples.
        generator: source of randomness, on the CPU.

    Returns:
        One batch.

    Raises:
        DataError: there are fewer samples, or their batches cannot be cut.
    """
    sizes = [num_samples(tuple(batch)) for batch in data]
    if not 0 < count <= sum(sizes):
        raise DataError(f"Expected between 1 and {sum(sizes)} samples. Got {count}. Ask for another number.")
    chosen = torch.randperm(sum(sizes), generator=generator)[:count].sort().values
    taken, first = [], 0
    for size, batch in zip(sizes, data, strict=True):
        rows = chosen[(chosen >= first) & (chosen < first + size)] - first
        if len(rows):
            taken.append(rows_of(tuple(batch), rows))
        first += size
    return joined(taken)


# Samples of each half in `adds_up`, and roundings of its terms that are forgiven. Chosen by us: sums of 8 to 16
# terms through float32 networks of 20 layers differed by 30 at most.
_SAMPLES_OF_A_HALF = 8
_ROUNDINGS = 200.0


def adds_up(
    batch: Batch,
    order: Tensor,
    measure: Callable[[Batch], tuple[float, float]],
    *,
    is_sum: bool,
    dtype: torch.dtype,
) -> bool:
    """Say whether the loss of a few samples is the weighted sum of that of their halves, up to rounding.

    Args:
        batch: where they are taken from.
        order: numbers of at least two samples; the first few are taken.
        measure: gives the weight and the loss of a piece.
        is_sum: the loss sums up; else it is a mean, and weights must add up, too.
        dtype: in which the loss is computed.
    """
    half = min(len(order) // 2, _SAMPLES_OF_A_HALF)
    pieces_of_order = (order[:half], order[half : 2 * half], order[: 2 * half])
    (w1, loss1), (w2, loss2), (w, loss) = (measure(rows_of(batch, rows)) for rows in pieces_of_order)
    terms = (w1 * loss1, w2 * loss2, w * loss)
    rounding = _ROUNDINGS * torch.finfo(dtype).eps * sum(map(abs, terms))
    return (is_sum or math.isclose(w1 + w2, w)) and abs(terms[0] + terms[1] - terms[2]) <= rounding
