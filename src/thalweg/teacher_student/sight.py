"""Sight: a network seen through the activations of its units, and two of them correlated as data stream by."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from thalweg.batching import num_samples, pieces
from thalweg.errors import DataError, MemoryLimitError, NumericalError, StructureError, ThalwegError
from thalweg.precision import copied, placed
from thalweg.structure import View, trace
from thalweg.structure.places import Place, Seen, of_units, places_of, seen_at
from thalweg.structure.sites import execution
from thalweg.teacher_student.correlation import CrossMoments, rows

Pair = tuple[str, str]
Progress = Callable[[float, str], None]

_PIECE = 128 * 2**20
"""Bytes of activations, in float64, of a network that is run on a piece of the data. Chosen by us."""

_SUMS = 4 * 2**30
"""Bytes of the sums of products, at most. Chosen by us: half the memory of a small machine."""

_POOLS: Mapping[int, Callable[..., Tensor]] = {
    1: functional.adaptive_avg_pool1d,
    2: functional.adaptive_avg_pool2d,
    3: functional.adaptive_avg_pool3d,
}


@dataclass(frozen=True, eq=False)
class Sight:
    """A network, and where the activations of its units are seen.

    Args:
        module: a copy, in eval mode.
        name: for messages.
        view: its groups.
        places: where each group is seen; only of groups that are seen anywhere.
    """

    module: nn.Module
    name: str
    view: View
    places: Mapping[str, tuple[Place, ...]]

    @classmethod
    def of(cls, module: nn.Module, example: Any, name: str, view: View | None = None) -> "Sight":
        """Find where the units of a network are seen.

        Args:
            module: any module; it is copied.
            example: a few samples.
            name: for messages.
            view: of the module. Default: traced on the example.

        Raises:
            StructureError: it does not run on the example, or the view is of another network.
        """
        if view is not None:
            _require_view(module, name, view)
        try:
            view = view or trace(module, example)
            device, dtype = _device(module), _dtype(module)
            twin = copied(module, device=device, dtype=dtype).eval()
            run = execution(twin, placed(example, device=device, dtype=dtype))
        except StructureError as error:
            raise StructureError(str(error).replace(". Got ", f". Got of {name}: ", 1)) from error
        found = {group.name: places_of(group, run) for group in view.groups}
        return cls(twin, name, view, {group: places for group, places in found.items() if places})

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups that are seen, in forward order."""
        return tuple(self.places)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Groups that no linear map reads or makes."""
        return tuple(group.name for group in self.view.groups if group.name not in self.places)

    def size(self, group: str) -> int:
        """Units of a group."""
        return self.view.group(group).size

    def see(self, inputs: Any, groups: Iterable[str]) -> dict[str, tuple[Seen, ...]]:
        """Run the network and give the activations of some groups, at each of their places.

        Raises:
            NumericalError: activations that are not finite.
            StructureError: the network does not run on them.
        """
        own = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        inputs = placed(inputs, device=_device(self.module), dtype=_dtype(self.module))
        wanted = set(groups)
        everywhere = {place for group in wanted for place in self.places[group]}
        try:
            seen = seen_at(self.module, own, inputs, everywhere)
        except (ThalwegError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a user's module raises
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise StructureError(
                f"Expected a network that runs on all data. Got of {self.name}: {reason}. Check that all batches are "
                "of the form of the first."
            ) from error
        found = {}
        for group in (g for g in self.groups if g in wanted):
            own_group = self.view.group(group)
            found[group] = tuple(of_units(self.view, own_group, p, seen[p]) for p in self.places[group])
            if not all(math.isfinite(at.values.sum(dtype=torch.float64)) for at in found[group]):
                raise NumericalError(
                    f"Expected finite activations. Got NaN or infinity in {group} of {self.name}. "
                    "Check its weights and the scale of the data."
                )
        return found


def _require_view(module: nn.Module, name: str, view: View) -> None:
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for key, trees in view.axes.items():
        shape = tuple(own[key].shape) if key in own else None
        if shape != tuple(tree.size for tree in trees):
            raise StructureError(
                f"Expected {name} with the tensors of its view, {key} of {tuple(tree.size for tree in trees)}. Got "
                f"{'none' if shape is None else shape}. An earlier B has the layers and widths of B; views are those "
                "of A and B, in this order."
            )


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _dtype(module: nn.Module) -> torch.dtype:
    """Give the type to run in: the module's own; half precision is run in single."""
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return own if own == torch.float64 else torch.float32


@dataclass(frozen=True)
class Comparison:
    """How two groups are compared.

    Args:
        words: what is done about positions; empty where there are none.
        refusal: why they cannot be compared; empty if they can.
    """

    words: str = ""
    refusal: str = ""


@dataclass(frozen=True, eq=False)
class Found:
    """Correlations of a pair of groups.

    Args:
        correlation: ρ of B's units with A's.
        alive: units of B, and of A, that vary.
        num_rows: samples, positions counted.
    """

    correlation: Float[Tensor, "units_b units_a"]
    alive: tuple[Bool[Tensor, " units_b"], Bool[Tensor, " units_a"]]
    num_rows: int


def comparison(ours: Sequence[Seen], theirs: Sequence[Seen]) -> Comparison:
    """Say how the activations of a group of A and of one of B are compared.

    Args:
        ours: A's, on some samples.
        theirs: B's, on the same.
    """
    words = []
    for a, b in _met(ours, theirs):
        shapes = [tuple(seen.values.shape[2:]) for seen in (a, b)]
        sizes = [seen.values[:, 0].numel() for seen in (a, b)]
        if sizes[0] != sizes[1] and len(a.values) != len(b.values):
            return Comparison(refusal=f"{sizes[0]} and {sizes[1]} activations of a unit on the same inputs")
        if sizes[0] == sizes[1]:
            words.append("each position" if any(shapes) else "")
        elif _is_pooled(a, b):
            words.append(f"maps averaged to {'x'.join(str(min(two)) for two in zip(*shapes, strict=True))}")
        else:
            words.append("averages over positions")
    return Comparison(", ".join(dict.fromkeys(word for word in words if word)))


def together(a: Seen, b: Seen) -> tuple[Float[Tensor, "rows ours"], Float[Tensor, "rows theirs"]]:
    """Give the activations of two groups as rows that belong together.

    Args:
        a: the first.
        b: the second, on the same samples.
    """
    one, two = a.values, b.values
    if one[:, 0].numel() != two[:, 0].numel():
        if _is_pooled(a, b):
            size = [min(pair) for pair in zip(one.shape[2:], two.shape[2:], strict=True)]
            one, two = (_POOLS[len(size)](x.double(), size) for x in (one, two))
        else:
            one, two = (x.double().flatten(2).mean(2) if x.ndim > 2 else x for x in (one, two))
    return rows(one), rows(two)


def _is_pooled(a: Seen, b: Seen) -> bool:
    dims = [seen.values.ndim - 2 for seen in (a, b)]
    return a.is_grid and b.is_grid and dims[0] == dims[1] and dims[0] in _POOLS


def _met(ours: Sequence[Seen], theirs: Sequence[Seen]) -> list[tuple[Seen, Seen]]:
    """Pair the places of two groups: in order if there are as many, else the last ones."""
    return list(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else [(ours[-1], theirs[-1])]


def require_memory(a: Sight, others: Sequence[Sight], pairs: Sequence[Pair]) -> None:
    """See that the sums of products fit into memory.

    Raises:
        MemoryLimitError: they do not.
    """
    needed = 0
    for one, two in pairs:
        for other in others:
            meetings = min(len(a.places[one]), len(other.places[two]))
            needed += 8 * a.size(one) * other.size(two) * meetings
    if needed > _SUMS:
        raise MemoryLimitError(
            f"Expected at most {_SUMS:,} bytes of correlations. Got {needed:,} for {len(pairs)} pairs of layers. "
            "Compare fewer: name them as layers."
        )


def correlated(
    a: Sight, others: Sequence[Sight], pairs: Sequence[Pair], batches: Any, progress: Progress
) -> tuple[dict[Pair, list[Found]], int]:
    """Run networks on all data, once, and correlate their units.

    Args:
        a: the reference.
        others: networks to compare with it.
        pairs: which group of a with which of the others.
        batches: (inputs, targets).
        progress: told what is done.

    Returns:
        For each pair what was found with each of the others; and how many samples there were.

    Raises:
        NumericalError: activations that are not finite.
        StructureError: a network does not run on a batch.
        DataError: a batch is of another form.
    """
    sizes: dict[tuple[Any, ...], float] = {}
    moments: dict[Pair, list[list[CrossMoments]]] = {pair: [[] for _ in others] for pair in pairs}
    total = len(batches) if hasattr(batches, "__len__") else 0
    count = 0
    with torch.no_grad():
        for number, batch in enumerate(batches):
            for inputs, size in _cut(batch, [a, *others], pairs, sizes):
                count += size
                ours = a.see(inputs, {one for one, _ in pairs})
                for place, other in enumerate(others):
                    theirs = other.see(inputs, {two for _, two in pairs})
                    for pair in pairs:
                        _update(moments[pair][place], ours[pair[0]], theirs[pair[1]])
                progress(min(number / total, 0.99) if total else 0.0, f"{count:,} samples")
            progress((number + 1) / total if total else 0.0, f"{count:,} samples")
    return {pair: [_settled(kept) for kept in moments[pair]] for pair in pairs}, count


def _update(moments: list[CrossMoments], ours: Sequence[Seen], theirs: Sequence[Seen]) -> None:
    met = _met(ours, theirs)
    moments.extend(CrossMoments() for _ in range(len(met) - len(moments)))
    for kept, (a, b) in zip(moments, met, strict=True):
        one, two = together(a, b)
        kept.update(two.to(one.device), one)


def _settled(moments: Sequence[CrossMoments]) -> Found:
    """Average the correlations of the places; a unit is alive if it varies at one of them."""
    correlation = torch.stack([kept.correlation().cpu() for kept in moments]).mean(0)
    alive = [torch.stack([kept.varying()[side].cpu() for kept in moments]).any(0) for side in (0, 1)]
    return Found(correlation, (alive[0], alive[1]), moments[0].count)


def _cut(
    batch: Any, sights: Sequence[Sight], pairs: Sequence[Pair], sizes: dict[tuple[Any, ...], float]
) -> Iterator[tuple[Any, int]]:
    """Cut a batch so that its activations take little memory; one that cannot be cut stays whole.

    What a sample takes is measured once for each shape of inputs, and noted in `sizes`.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(
            f"Expected batches (inputs, targets). Got a {type(batch).__name__}. Give pairs; targets are not used."
        )
    try:
        size = num_samples(tuple(batch))
    except DataError:
        yield batch[0], 1
        return
    shapes = tuple(tuple(leaf.shape[1:]) for leaf in tree_leaves(batch[0]) if isinstance(leaf, Tensor))
    if shapes not in sizes:
        few = next(pieces(tuple(batch), min(size, 2)))
        groups = [{pair[min(place, 1)] for pair in pairs} for place in range(len(sights))]
        seen = [at for sight, own in zip(sights[:2], groups, strict=False) for at in _all(sight.see(few[0], own))]
        sizes[shapes] = 8 * sum(at.values.numel() for at in seen) / num_samples(few)
    bytes_each = sizes[shapes]
    for inputs, targets in pieces(tuple(batch), max(1, int(_PIECE / max(bytes_each, 1)))):
        yield inputs, num_samples((inputs, targets))


def _all(seen: Mapping[str, Sequence[Seen]]) -> list[Seen]:
    return [at for group in seen.values() for at in group]
