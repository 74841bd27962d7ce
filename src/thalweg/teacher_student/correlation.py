"""Correlations between the nodes of two networks, over any number of samples in one pass, and what they tell."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from thalweg.errors import DataError, ShapeError
from thalweg.teacher_student.chain import chain, require_pair, require_statistics

_AT_ONCE = 1024
# A node whose standard deviation is below this share of its root mean square is constant: rounding alone varies.
_CONSTANT = 1e-6


@dataclass(frozen=True)
class _Sums:
    """Samples, means, sums of squares and of products about the means."""

    count: int
    means: tuple[Tensor, Tensor]
    squares: tuple[Tensor, Tensor]
    products: Tensor

    def merged(self, other: "_Sums") -> "_Sums":
        total = self.count + other.count
        weight, share = self.count * other.count / total, other.count / total
        gaps = [theirs - ours for ours, theirs in zip(self.means, other.means, strict=True)]
        means = [mean + share * gap for mean, gap in zip(self.means, gaps, strict=True)]
        squares = [a + b + weight * gap.square() for a, b, gap in zip(self.squares, other.squares, gaps, strict=True)]
        products = self.products + other.products + weight * torch.outer(*gaps)
        return _Sums(total, (means[0], means[1]), (squares[0], squares[1]), products)


@dataclass
class CrossMoments:
    """Means, variances and covariances of two sets of nodes, over samples that come in pieces.

    Each piece is centred at its own means, then merged (Chan, Golub & LeVeque 1983), so that a large mean costs no
    digits. Sums are kept in float64, or in float32 where the device has nothing better.

    Args:
        count: samples so far.
        is_quick: form the products of a piece of single-precision values in single precision: correlations then
            err by 1e-5 at most, and cost a third. Not done where torch is set to products of fewer digits (TF32).
    """

    count: int = 0
    is_quick: bool = False
    _sums: "_Sums | None" = None

    def update(self, ours: Float[Tensor, "_ ours"], theirs: Float[Tensor, "_ theirs"]) -> None:
        """Add samples.

        Args:
            ours: values of the first nodes, a row for each sample.
            theirs: values of the second, on the same samples.

        Raises:
            ShapeError: there are not as many samples of both.
        """
        if len(ours) != len(theirs):
            raise ShapeError(
                f"Expected as many samples of both. Got {len(ours)} and {len(theirs)}. Run both on the same inputs."
            )
        if not len(ours):
            return
        best = torch.float32 if ours.device.type == "mps" else torch.float64
        is_single = self.is_quick and ours.dtype == theirs.dtype == torch.float32 and _has_whole_products()
        kind = torch.float32 if is_single else best
        for a, b in zip(_cut(ours.detach()), _cut(theirs.detach()), strict=True):
            piece = _summed(a.to(kind), b.to(kind), best)
            self._sums = piece if self._sums is None else self._sums.merged(piece)
            self.count = self._sums.count

    def correlation(self) -> Float[Tensor, "ours theirs"]:
        """Give the Pearson correlations, in [-1, 1]; 0 where a node does not vary.

        Raises:
            DataError: no samples were added.
        """
        found = self._sums
        if found is None:
            raise DataError("Expected samples. Got none. Call update first.")
        ours, theirs = (_inverse(*pair, found.count) for pair in zip(found.squares, found.means, strict=True))
        return (found.products * ours.unsqueeze(1) * theirs).clamp(-1.0, 1.0)

    def varying(self) -> tuple[Bool[Tensor, " ours"], Bool[Tensor, " theirs"]]:
        """Say which nodes vary at all; the others correlate with none.

        Raises:
            DataError: no samples were added.
        """
        found = self._sums
        if found is None:
            raise DataError("Expected samples. Got none. Call update first.")
        ours, theirs = (_inverse(*pair, found.count) > 0 for pair in zip(found.squares, found.means, strict=True))
        return ours, theirs


def _has_whole_products() -> bool:
    """Whether products of single-precision matrices have single precision."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for some backends only
        return False


def _cut(values: Tensor) -> tuple[Tensor, ...]:
    return torch.split(values, _AT_ONCE)


def _summed(a: Tensor, b: Tensor, kind: torch.dtype) -> _Sums:
    """Sum a piece about its means. These are rounded: what is left of them is taken off afterwards."""
    count = len(a)
    rounded = a.mean(0), b.mean(0)
    a, b = a - rounded[0], b - rounded[1]
    left = [x.sum(0).to(kind) / count for x in (a, b)]
    means = [mean.to(kind) + rest for mean, rest in zip(rounded, left, strict=True)]
    squares = [
        torch.linalg.vector_norm(x, dim=0).to(kind).square() - count * rest.square()
        for x, rest in zip((a, b), left, strict=True)
    ]
    products = (a.T @ b).to(kind) - count * torch.outer(*left)
    return _Sums(count, (means[0], means[1]), (squares[0], squares[1]), products)


def _inverse(squares: Tensor, mean: Tensor, count: int) -> Tensor:
    """1/‖x - mean‖ of each node; 0 for one that is constant."""
    varies = squares > _CONSTANT**2 * (squares + count * mean.square())
    return torch.where(varies, squares.clamp_min(torch.finfo(mean.dtype).tiny).rsqrt(), 0.0)


def correlations(
    teacher: nn.Module,
    student: nn.Module,
    inputs: "Float[Tensor, 'samples *features'] | Iterable[Tensor]",
    *,
    batch_size: int = _AT_ONCE,
) -> tuple[Float[Tensor, "students teachers"], ...]:
    """Correlate every node of a student with every node of its teacher, layer by layer, in one pass over the data.

    ρ_jj° is the Pearson correlation of the activations f_j and f_j° (after ReLU and BatchNorm, with the running
    statistics); positions of convolutions are samples.

    Args:
        teacher: a chain, see `chain`.
        student: a chain of the same depth, of any widths.
        inputs: all samples, or batches of them.
        batch_size: samples that are run at once, of a tensor. Default chosen by us.

    Returns:
        For each hidden layer, from the input: ρ in [-1, 1]; 0 for nodes that do not vary. Of networks in double
        precision to rounding; of others it errs by 1e-5 at most.

    Raises:
        StructureError: a network is no chain, or its BatchNorm has no running statistics.
        ShapeError: they cannot be teacher and student, or their feature maps have different sizes.
        DataError: there are no samples, or batches are no tensors.

    Source:
        tian2019luck (arXiv 1905.13405), section 4.2 and its footnote. Departure: all samples count; its code takes
        192 at random.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> tuple(correlations(net, net, x)[0].shape)
        (4, 4)
    """
    theirs, ours = chain(teacher), chain(student)
    require_pair(theirs, ours)
    require_statistics(theirs, ours)
    found = [CrossMoments(is_quick=True) for _ in ours.layers]
    with torch.no_grad():
        for x in pieces(inputs, batch_size):
            pairs = zip(ours.trace(x).activations, theirs.trace(x).activations, strict=True)
            for moments, (f, f_teacher) in zip(found, pairs, strict=True):
                moments.update(rows(f), rows(f_teacher))
    return tuple(moments.correlation() for moments in found)


def pieces(inputs: Tensor | Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Give inputs in batches; what is no tensor is taken to be batches already.

    Raises:
        DataError: a batch is no tensor.
    """
    for piece in torch.split(inputs, batch_size) if isinstance(inputs, Tensor) else inputs:
        if not isinstance(piece, Tensor):
            raise DataError(
                f"Expected tensors as batches. Got a {type(piece).__name__}. "
                "Leave targets out: (x for x, _ in loader)."
            )
        yield piece


def rows(activations: Float[Tensor, "batch nodes *positions"]) -> Float[Tensor, "samples nodes"]:
    """One row for each sample and position."""
    return activations if activations.ndim == 2 else activations.movedim(1, -1).flatten(0, -2)


def best_students(rho: Float[Tensor, "students teachers"]) -> Int[Tensor, " teachers"]:
    """Find, for each teacher node, the student that correlates best with it.

    Args:
        rho: correlations of a layer.

    Returns:
        Numbers of students; the first one of several that are equal.
    """
    return rho.argmax(0)


def mean_best(rho: Float[Tensor, "students teachers"]) -> float:
    """Average the best correlation over the teacher's nodes: ρ̄ = mean_j° max_j ρ_jj°.

    Args:
        rho: correlations of a layer.

    Returns:
        ρ̄, at most 1.

    Source:
        tian2019luck (arXiv 1905.13405), section 4.2.

    Example:
        >>> mean_best(torch.tensor([[1.0, 0.0], [0.2, 0.5]]))
        0.75
    """
    return float(rho.amax(0).mean())


def ranks(rho: Float[Tensor, "students teachers"]) -> Int[Tensor, "students teachers"]:
    """Rank the students for each teacher node: how many correlate strictly better with it, 0 for the best.

    Args:
        rho: correlations of a layer.

    Returns:
        Ranks from 0 to the number of students less 1; equal correlations share one.

    Example:
        >>> ranks(torch.tensor([[0.1], [0.9], [0.5], [0.5]])).flatten().tolist()
        [3, 0, 1, 1]
    """
    columns = rho.T.contiguous()
    return (len(rho) - torch.searchsorted(columns.sort(dim=1).values, columns, right=True)).T


def mean_rank(rho: Float[Tensor, "students teachers"], winners: Int[Tensor, " teachers"]) -> float:
    """Average the rank that each teacher's winner has: r̄, 0 if all are first and 1 if all are last.

    Args:
        rho: correlations at some time, for instance at the start.
        winners: for each teacher node the student that is best at the end, see `best_students`.

    Returns:
        The mean over the teacher's nodes of the share of other students that are strictly better; 0 if there is one
        student. Teacher nodes that correlate with no student, as they do not vary, are left out; NaN if all are.

    Source:
        tian2019luck (arXiv 1905.13405), section 4.2: the rank is normalised to [0, 1], 0 is first.

    Example:
        >>> mean_rank(torch.tensor([[0.1], [0.9], [0.5]]), torch.tensor([2]))
        0.5
    """
    others = max(len(rho) - 1, 1)
    own = rho.gather(0, winners.unsqueeze(0))
    varies = (rho != 0).any(0)
    return float((rho > own)[:, varies].sum(0).double().mean() / others)
