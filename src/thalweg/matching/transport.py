"""Who meets whom: the optimal assignment of two sets of rows, and the optimal transport of unequally many."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from thalweg.errors import ConfigError, NumericalError, ShapeError
from thalweg.structure.tree import IntArray

Metric = Literal["distance", "correlation"]

_MOST_ROWS = 46_340
"""Most rows of an assignment: the squares of more overflow the 32-bit indices of solvers (scipy#13421)."""

_PIVOTS = 100_000_000
"""Most iterations of the network simplex. Chosen by us, far above need: POT's default of 100,000 stops before the
optimum at a few thousand rows, and only warns."""


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which of their rows belongs to which of ours.

    Args:
        order: `theirs[order[i]]` is the partner of `ours[i]`; a permutation, as `structure.permute` takes it.
        cost: sum of the squared distances of partners, or of 1 - correlation.
    """

    order: IntArray
    cost: float


def assign(
    ours: Float[Tensor, "ours features"], theirs: Float[Tensor, "theirs others"], metric: Metric = "distance"
) -> Assignment:
    """Find the one-to-one assignment of least total cost, exactly.

    Costs take one matrix product in float64, |a|² - 2⟨a, b⟩ + |b|².

    Args:
        ours: one row per unit.
        theirs: as many rows of as many features.
        metric: "distance" (default: squared Euclidean, as in the paper) or "correlation" (1 - Pearson's of two
            rows; rows without variance correlate with none).

    Returns:
        The assignment; of several equally good ones, any.

    Raises:
        ShapeError: sets of unlike shapes, or more than 46,340 rows.
        NumericalError: entries that are not finite.

    **Source:** optimal transport of neurons with equal weights is an assignment, Anokhin & Yarotsky 2020 (arXiv
    2008.00741), section 3.2, there by POT; here by scipy's shortest augmenting paths (Crouse 2016), which end at the
    optimum. Correlation: Li et al. 2015 (arXiv 1511.07543).

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [5.0]])
        >>> assign(rows, rows[[2, 0, 1]]).order
        array([1, 2, 0])
    """
    _require_rows(ours, theirs, alike=True)
    if metric == "correlation":
        cost = 1 - correlations(ours, theirs)
        order = best_order(cost)
        return Assignment(order, float(cost[torch.arange(len(order)), torch.from_numpy(order)].sum()))
    a, b = ours.detach().to("cpu", torch.float64), theirs.detach().to("cpu", torch.float64)
    order = best_order(squared_distances(a, b))
    return Assignment(order, float((a - b[torch.from_numpy(order)]).square().sum()))


def transport(
    ours: Float[Tensor, "ours features"],
    theirs: Float[Tensor, "theirs others"],
    weights: tuple[Float[Tensor, " masses"], Float[Tensor, " masses_too"]] | None = None,
) -> Float[Tensor, "ours theirs"]:
    """Find the transport plan of least total squared distance between two sets of rows, of any two sizes.

    Args:
        ours: one row per unit.
        theirs: one row per unit, of as many features.
        weights: mass of each of our and of their rows, not negative, up to a common factor in each set. Default:
            equal, as in the paper; equally many rows of equal mass are then an assignment, and need no extra.

    Returns:
        The plan π ≥ 0: how much of row i goes to row j; sums over j are our masses, over i theirs, 1 in all.

    Raises:
        ConfigError: POT is needed and not installed.
        ShapeError: unlike features, no rows, too many, or masses that do not fit.
        NumericalError: entries or masses that are not finite or sum to nothing, or the solver did not reach the
            optimum.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.2, there for equally many neurons; solved by the
    network simplex of POT (Bonneel et al. 2011).

    Example:
        >>> transport(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [0.0]])).tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """
    _require_rows(ours, theirs, alike=False)
    a, b = ours.detach().to("cpu", torch.float64), theirs.detach().to("cpu", torch.float64)
    if weights is None and len(a) == len(b):
        plan = torch.zeros(len(a), len(a), dtype=torch.float64)
        plan[torch.arange(len(a)), torch.from_numpy(assign(a, b).order)] = 1 / len(a)
        return plan
    masses = [torch.ones(len(rows)) for rows in (a, b)] if weights is None else list(weights)
    source, target = (_mass(m, rows) for m, rows in zip(masses, (a, b), strict=True))
    return _simplex(source, target, squared_distances(a, b))


def squared_distances(
    ours: Float[Tensor, "ours features"], theirs: Float[Tensor, "theirs features"]
) -> Float[Tensor, "ours theirs"]:
    """Compute |a - b|² of every pair of rows by one matrix product."""
    cost = torch.addmm(theirs.square().sum(1)[None, :], ours, theirs.T, alpha=-2)
    return cost.add_(ours.square().sum(1)[:, None]).clamp_(min=0)


def correlations(
    ours: Float[Tensor, "ours samples"], theirs: Float[Tensor, "theirs samples"]
) -> Float[Tensor, "ours theirs"]:
    """Compute Pearson's correlation of every pair of rows; 0 where one of them does not vary.

    Args:
        ours: one row per unit, one column per sample.
        theirs: the same samples.

    Returns:
        Correlations in [-1, 1], float64, on the CPU.
    """
    return _standardised(ours) @ _standardised(theirs).T


def best_order(cost: Float[Tensor, "units units"]) -> IntArray:
    """Solve the assignment problem of a square cost matrix: for every row its column.

    The least cost of each column is taken off first: no order gains by that, and the search begins 2 to 40 times
    nearer to its end, since some rows are near to all others.
    """
    found: IntArray = linear_sum_assignment((cost - cost.amin(0)).numpy())[1].astype("int64")
    return found


def _standardised(rows: Tensor) -> Tensor:
    rows = rows.detach().to("cpu", torch.float64)
    size = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
    centred = rows - rows.mean(1, keepdim=True) if rows.shape[1] else rows
    norms = centred.norm(dim=1, keepdim=True)
    varies = norms > _ROUNDING * size * max(rows.shape[1], 1) ** 0.5
    return torch.where(varies, centred, 0.0) / torch.where(varies, norms, 1.0)


_ROUNDING = 1e-12
"""Spread of a row relative to its largest entry below which it does not vary. Chosen by us: the mean of a constant
row is rounded."""


def _require_rows(ours: Tensor, theirs: Tensor, *, alike: bool) -> None:
    shapes = tuple(ours.shape), tuple(theirs.shape)
    if ours.shape[1] != theirs.shape[1] or not len(ours) or not len(theirs) or (alike and len(ours) != len(theirs)):
        raise ShapeError(
            f"Expected two sets of rows with {'one shape' if alike else 'equally many features'}. Got {shapes}. "
            + ("Use transport for unequal numbers of units." if alike else "Compare the same part of both.")
        )
    if max(len(ours), len(theirs)) > _MOST_ROWS:
        raise ShapeError(f"Expected at most {_MOST_ROWS} rows. Got {shapes}. Match in parts.")
    if not (bool(torch.isfinite(ours).all()) and bool(torch.isfinite(theirs).all())):
        raise NumericalError("Expected finite rows. Got NaN or infinity. Check the checkpoints.")


def _mass(weights: Tensor, rows: Tensor) -> Tensor:
    weights = weights.detach().to("cpu", torch.float64)
    if weights.shape != (len(rows),):
        raise ShapeError(f"Expected {len(rows)} masses. Got {tuple(weights.shape)}. Give one to each row.")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()) or not float(weights.sum()) > 0:
        raise NumericalError(
            "Expected masses that are finite, not negative and not all zero. Got others. Check the weights."
        )
    return weights / weights.sum()


def _simplex(source: Tensor, target: Tensor, cost: Tensor) -> Tensor:
    library = _pot()
    scale = float(cost.max()) or 1.0  # costs far from 1 mislead the solver (POT#229)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, log = library.emd(
            *(source.numpy(), target.numpy(), (cost / scale).numpy()), numItermax=_PIVOTS, log=True
        )
    if log.get("warning"):
        raise NumericalError(
            f"Expected an optimal transport plan. Got from the solver: {log['warning']} "
            "Check the masses, or match fewer rows."
        )
    return torch.from_numpy(plan)


def _pot() -> Any:
    try:
        import ot
    except ImportError as error:
        raise ConfigError(
            "Expected POT to be installed for unequal numbers of units or masses. Got no module ot. "
            "Run pip install 'thalweg[transport]'."
        ) from error
    return ot
