"""Top-down modulation: the theory's β, D, L and H of a teacher and a student, averaged over any number of samples."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.errors import ConfigError, DataError, MemoryLimitError, ShapeError
from thalweg.teacher_student.chain import Chain, Trace, chain, require_pair, require_statistics
from thalweg.teacher_student.correlation import pieces, rows
from thalweg.teacher_student.factors import Factor, factors

Quantity = Literal["beta_star", "beta", "d_star", "d", "l_star", "l"]

_MEMORY = 256 * 10**6
_AT_ONCE = 1024
# Arrays of one layer's size that a step from layer to layer holds: A, A at the gates, its pull-back, a copy by rows.
_HELD = 4


@dataclass(frozen=True)
class Modulation:
    """What the theory says of one hidden layer, averaged over samples (and positions); None is what was not asked.

    With `constant`, a last row and column belong to the node that is always 1, by which biases enter.

    Args:
        name: of the layer's linear map in the student.
        beta_star: E[β*], how the outputs see a student and a teacher node together.
        beta: E[β], the same of two student nodes.
        d_star: E[f'_j f'_j°], how often both gates are open.
        d: E[f'_j f'_j'].
        l_star: E[f_j f_j°], the overlap of the activations.
        l: E[f_j f_j'].
    """

    name: str
    beta_star: Float[Tensor, "students teachers"] | None = None
    beta: Float[Tensor, "students students"] | None = None
    d_star: Float[Tensor, "students teachers"] | None = None
    d: Float[Tensor, "students students"] | None = None
    l_star: Float[Tensor, "students teachers"] | None = None
    l: Float[Tensor, "students students"] | None = None  # noqa: E741

    @property
    def h_star(self) -> Float[Tensor, "students teachers"]:
        """H* = β* ∘ D*.

        Raises:
            ConfigError: β* or D* was not asked for.
        """
        return _product(self.beta_star, self.d_star, "beta_star and d_star")

    @property
    def h(self) -> Float[Tensor, "students students"]:
        """H = β ∘ D.

        Raises:
            ConfigError: β or D was not asked for.
        """
        return _product(self.beta, self.d, "beta and d")


def modulation(
    teacher: nn.Module,
    student: nn.Module,
    inputs: "Float[Tensor, 'samples *features'] | Iterable[Tensor]",
    *,
    wanted: Sequence[Quantity] = ("beta_star", "d_star"),
    constant: bool = False,
    memory: int = _MEMORY,
) -> tuple[Modulation, ...]:
    """Average β, D and L over samples, in one pass and within a bound of memory.

    A sample's outputs are A(x) f(x) + b(x) for the nodes f of any layer, and β*(x) = A(x)ᵀ A°(x),
    β(x) = A(x)ᵀ A(x): the recursion (3) of theorem 1, unrolled. Their mean is one product of matrices with a row for
    each sample and output, so that no array has two axes of nodes and one of samples. BatchNorm has its running
    statistics: an affine map of each node. All matrices of one layer are about the same nodes, also the gates of D.

    Args:
        teacher: a chain, see `chain`.
        student: a chain of the same depth, of any widths.
        inputs: all samples, or batches of them.
        wanted: what to compute; only that is paid for. Default: what H* needs.
        constant: whether the node that is always 1 counts as a last row and column.
        memory: bytes that samples may take beside the networks and the results. Default chosen by us.

    Returns:
        One entry for each hidden layer, from the input, in double precision; β is summed up in it, from products
        taken in the networks' own.

    Raises:
        StructureError: a network is no chain, or its BatchNorm has no running statistics.
        ShapeError: they cannot be teacher and student, or their feature maps have different sizes.
        ConfigError: something unknown is wanted, or nothing.
        MemoryLimitError: one sample and one output take more.
        DataError: there are no samples, or batches are no tensors.

    Source:
        tian2019luck (arXiv 1905.13405), theorems 1 and 2, figure 10. Departure: nodes of convolutions are averaged
        over the positions too, each with the same position of the other network.

    Example:
        >>> made = torch.Generator().manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        >>> x = torch.randn(50, 3, generator=made, dtype=torch.float64)
        >>> (layer,) = modulation(net, net, x)
        >>> torch.dist(layer.beta_star, net[2].weight.T @ net[2].weight).item() < 1e-12
        True
    """
    if not wanted or not set(wanted) <= set(get_args(Quantity)):
        raise ConfigError(f"Expected some of {', '.join(get_args(Quantity))}. Got {wanted}. Choose what to compute.")
    theirs, ours = chain(teacher), chain(student)
    require_pair(theirs, ours)
    require_statistics(theirs, ours)
    sums = [_Sums({}) for _ in ours.layers]
    with torch.no_grad():
        for batch in pieces(inputs, _AT_ONCE):
            for x, outputs in _portions(theirs, ours, batch, memory):
                traces = theirs.trace(x), ours.trace(x)
                _require_positions(ours, *traces)
                _add_overlaps(sums, traces, wanted, constant)
                _add_modulations(sums, (theirs, ours), traces, (wanted, constant, outputs))
    if not sums[0].count:
        raise DataError("Expected samples. Got none. Pass inputs.")
    return tuple(Modulation(layer.name, **found.means()) for layer, found in zip(ours.layers, sums, strict=True))


@dataclass
class _Sums:
    """Sums of matrices over samples and positions."""

    totals: dict[Quantity, Tensor]
    count: int = 0

    def add(self, quantity: Quantity, product: Tensor) -> None:
        product = product if product.device.type == "mps" else product.double()
        self.totals[quantity] = self.totals[quantity] + product if quantity in self.totals else product

    def means(self) -> dict[str, Tensor]:
        return {quantity: total / self.count for quantity, total in self.totals.items()}


def _portions(theirs: Chain, ours: Chain, batch: Tensor, memory: int) -> Iterator[tuple[Tensor, int]]:
    """Cut a batch so that A of all, or of some, outputs fits: pieces of samples, and outputs at once."""
    if not len(batch):
        return
    tried = theirs.trace(batch[:1]), ours.trace(batch[:1])
    sizes = [[f[0].numel() for f in trace.activations] for trace in tried]
    size = batch.element_size()
    factor = size * sum(_HELD * max(layers) for layers in sizes)
    sample = size * sum(4 * sum(layers) for layers in sizes)
    outputs = min(ours.head.out_features, (memory - sample) // factor)
    if outputs < 1:
        raise MemoryLimitError(
            f"Expected {factor + sample:,} bytes or more for one sample and output of these networks. "
            f"Got memory={memory:,}. Allow more."
        )
    at_once = max(1, memory // (factor * outputs + sample))
    for x in torch.split(batch, at_once):
        yield x, outputs


def _add_overlaps(
    sums: Sequence[_Sums], traces: tuple[Trace, Trace], wanted: Sequence[Quantity], constant: bool
) -> None:
    """Add D and L."""
    theirs, ours = traces
    for place, found in enumerate(sums):
        f = rows(ours.activations[place])
        found.count += len(f)
        for kind, name in (("gates", "d"), ("activations", "l")):
            pairs = {f"{name}_star": theirs, name: ours}
            for quantity in [quantity for quantity in pairs if quantity in wanted]:
                left, right = (
                    _with_ones(rows(getattr(trace, kind)[place].to(f.dtype)), constant)
                    for trace in (ours, pairs[quantity])
                )
                if name == "l" and f.device.type != "mps":
                    left, right = left.double(), right.double()
                found.add(quantity, left.T @ right)  # type: ignore[arg-type]


def _add_modulations(
    sums: Sequence[_Sums],
    chains: tuple[Chain, Chain],
    traces: tuple[Trace, Trace],
    asked: tuple[Sequence[Quantity], bool, int],
) -> None:
    """Add β* and β, some outputs at a time."""
    wanted, constant, at_once = asked
    if not {"beta_star", "beta"} & set(wanted):
        return
    for start in range(0, chains[1].head.out_features, at_once):
        some = slice(start, start + at_once)
        theirs, ours = (factors(read, trace, some) for read, trace in zip(chains, traces, strict=True))
        teachers = theirs if "beta_star" in wanted else [None] * len(sums)
        for found, star, own, f in zip(reversed(sums), teachers, ours, reversed(traces[1].activations), strict=True):
            samples = len(f)
            if star is not None:
                found.add("beta_star", _gram(own, star, samples, constant))
            if "beta" in wanted:
                found.add("beta", _gram(own, own, samples, constant))


def _gram(left: Factor, right: Factor, samples: int, constant: bool) -> Tensor:
    """Sum AᵀA over outputs, samples and positions."""
    shared = max(left.a.shape[1], right.a.shape[1])
    a, b = (_by_rows(factor, shared, constant) for factor in (left, right))
    product = a.T @ b if a is not b else a.T @ a
    return product * samples if shared < samples else product


def _by_rows(factor: Factor, samples: int, constant: bool) -> Tensor:
    """Lay A out with a row for each output, sample and position, and b beside it."""
    a, b = factor.a, factor.b
    a = a.expand(-1, samples, *a.shape[2:])
    b = b.expand(-1, samples)
    if a.ndim > 3:
        a = a.movedim(2, -1)
    if constant:
        b = b.reshape(*b.shape, *(1 for _ in a.shape[2:-1])).expand(a.shape[:-1])
        a = torch.cat([a, b.unsqueeze(-1)], -1)
    return a.flatten(0, -2)


def _with_ones(values: Tensor, constant: bool) -> Tensor:
    return torch.cat([values, values.new_ones(len(values), 1)], 1) if constant else values


def _require_positions(ours: Chain, theirs_seen: Trace, seen: Trace) -> None:
    for layer, f, other in zip(ours.layers, seen.activations, theirs_seen.activations, strict=True):
        if f.shape[2:] != other.shape[2:]:
            raise ShapeError(
                f"Expected feature maps of one size. Got {tuple(f.shape[2:])} and {tuple(other.shape[2:])} in "
                f"{layer.name!r}. Give teacher and student the same kernels, strides and paddings."
            )


def _product(first: Tensor | None, second: Tensor | None, names: str) -> Tensor:
    if first is None or second is None:
        raise ConfigError(f"Expected {names}. Got at least one of them not computed. Name both in wanted.")
    return first * second
