"""Least squares by streamed normal equations: no pseudo-inverse of a matrix as tall as the data is ever formed."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg.blas import dsyrk, ssyrk
from torch import Tensor

from thalweg.errors import DataError, NumericalError, ShapeError

Precision = Literal["double", "single"]
Status = Literal["cholesky", "minimum norm", "ridge"]

CHUNK = 4096
"""Rows that are multiplied at a time. Chosen by us: 128 MiB in float64 at 4,096 features."""

_EPS = {"double": float(np.finfo(np.float64).eps), "single": float(np.finfo(np.float32).eps)}


@dataclass(frozen=True)
class Solution:
    """The weights that fit best.

    Args:
        weight: W.
        bias: b; None if none was fitted.
        residual: ‖W F + b - T‖ / ‖T‖, from the sums. Its square is a difference of sums, so that a residual below
            about 1e-7 (1e-3 in single precision) is noise. 0 if the targets are all zero.
        rank: how many directions of the features counted; with a ridge, of those that are not dead.
        status: "cholesky", "minimum norm" (the features depend on each other) or "ridge".
    """

    weight: Float[Tensor, "outputs features"]
    bias: Float[Tensor, " outputs"] | None
    residual: float
    rank: int
    status: Status


_LEAST_SINGLE_RIDGE = 1e-6
"""Measured: below it, Cholesky fails or the weights blow up where samples are fewer than features."""


class Gram:
    """The sums that least squares need: G = Σ f fᵀ and C = Σ t fᵀ over samples, in float64.

    Memory does not depend on the number of samples: 8·features² bytes for G, three times that while solving.

    Args:
        num_features: numbers in a row of features, the constant one of the bias not counted.
        num_targets: numbers in a row of targets.
        bias: fit a bias too, as the weight of a constant feature.
        precision: of the products within a chunk; sums of chunks are float64 always. "single" takes 0.6 of the time
            on a CPU; a positive ridge below 1e-6, which its rounding would swamp, is then taken to be 1e-6.
        device: where the sums are kept; features and targets must be there.

    Example:
        >>> gram = Gram(1, 1, bias=True)
        >>> x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
        >>> gram.add(x, 3 * x + 1)
        >>> fit = gram.solve()
        >>> round(float(fit.weight), 6), round(float(fit.bias), 6)
        (3.0, 1.0)
    """

    def __init__(
        self,
        num_features: int,
        num_targets: int,
        *,
        bias: bool,
        precision: Precision = "double",
        device: torch.device | str = "cpu",
    ) -> None:
        self.precision: Precision = precision
        self.has_bias = bias
        self.samples = 0
        self._device = torch.device(device)
        self._on_cpu = self._device.type == "cpu"
        # BLAS's symmetric product takes Fortran order, and fills the lower triangle alone, for half the work.
        self._square = np.zeros((num_features, num_features), order="F") if self._on_cpu else None
        self._gram = (
            torch.from_numpy(self._square)
            if self._square is not None
            else torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        )
        self._cross = torch.zeros(num_targets, num_features, dtype=torch.float64, device=device)
        self._feature_sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self._target_sum = torch.zeros(num_targets, dtype=torch.float64, device=device)
        self._target_square = 0.0

    @property
    def features(self) -> int:
        """Number of features, the constant one of the bias included."""
        return self._gram.shape[0] + int(self.has_bias)

    @property
    def target_norm(self) -> float:
        """‖T‖."""
        return float(self._target_square**0.5)

    def add(self, features: Float[Tensor, "samples features"], targets: Float[Tensor, "samples outputs"]) -> None:
        """Add samples, one a row.

        Args:
            features: what the map is applied to.
            targets: what it should give.

        Raises:
            ShapeError: rows that do not fit.
        """
        wanted = (len(features), self._gram.shape[0]), (len(features), self._cross.shape[0])
        if (tuple(features.shape), tuple(targets.shape)) != wanted:
            raise ShapeError(
                f"Expected features and targets of shapes {wanted[0]} and {wanted[1]}. Got {tuple(features.shape)} "
                f"and {tuple(targets.shape)}. Give a row for each sample."
            )
        dtype = torch.float64 if self.precision == "double" else torch.float32
        with torch.no_grad():
            for start in range(0, len(features), CHUNK):
                end = start + CHUNK
                self._add_chunk(features[start:end].to(dtype), targets[start:end].to(dtype))

    def _add_chunk(self, rows: Tensor, wishes: Tensor) -> None:
        self.samples += len(rows)
        if self._square is None:
            self._gram += (rows.T @ rows).double()
        elif self.precision == "double":
            dsyrk(1.0, rows.contiguous().numpy().T, beta=1.0, c=self._square, overwrite_c=1, lower=1)
        else:
            self._square += ssyrk(1.0, rows.contiguous().numpy().T, lower=1)
        self._cross += (wishes.T @ rows).double()
        ones = rows.new_ones(len(rows))
        self._feature_sum += (ones @ rows).double()
        self._target_sum += (ones @ wishes).double()
        self._target_square += float(wishes.double().square().sum())

    def solve(
        self,
        ridge: float = 0.0,
        prior: tuple[Float[Tensor, "outputs features"], Float[Tensor, " outputs"] | None] | None = None,
    ) -> Solution:
        """Minimise ‖W F + b - T‖² + μ‖(W, b) - (W₀, b₀)‖², μ = ridge · mean diag(G).

        The bias is a weight like any other, that of a feature that is 1: a ridge draws it to b₀ too, so that
        targets that the prior itself gives have the prior as solution.

        With ridge 0 and features that depend on each other, the solution nearest to the prior (to 0 without one):
        the pseudo-inverse's. Eigenvalues of G below 10·√max(samples, features)·eps of the largest count as 0, which
        is what rounding leaves of them: singular values of F below the root of that, about 5e-7 of the largest.

        Args:
            ridge: μ as a fraction of the mean square of a feature. Default 0: the paper's least squares.
            prior: W₀ and b₀.

        Returns:
            The weights, in float64.

        Raises:
            DataError: no samples.
            NumericalError: a feature or a target is not finite.

        **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.3: W = T F⁺ by an SVD of F. Normal equations
            instead of the SVD, the ridge and its prior are ours.
        """
        gram, cross = self._augmented()
        self._require_sound(cross)
        start = self._start(prior, cross)
        live = gram.diagonal() > 0
        if not bool(live.all()):
            # A dead feature gets its prior: the minimum-norm answer, and the ridge's.
            gram = gram[live][:, live]
        right = cross[:, live]
        if prior is not None:
            right = right - _times(start[:, live], gram)
        if ridge and self.precision == "single":
            ridge = max(ridge, _LEAST_SINGLE_RIDGE)
        penalty = ridge * float(gram.diagonal().sum()) / max(self.features, 1)
        step, rank, status = self._step(gram, right, penalty)
        solved = start.clone()
        solved[:, live] += step
        # G(W) = C - μ(W - W₀), so that ‖WF - T‖² = ‖T‖² - <W, C> - μ<W, W - W₀>.
        square = self._target_square - float((solved * cross).sum()) - penalty * float((solved[:, live] * step).sum())
        residual = (max(square, 0.0) / self._target_square) ** 0.5 if self._target_square else 0.0
        if not self.has_bias:
            return Solution(solved, None, residual, rank, status)
        return Solution(solved[:, :-1], solved[:, -1], residual, rank, status)

    def _augmented(self) -> tuple[Tensor, Tensor]:
        """Give the lower triangle of G, and C, with the constant feature last."""
        size = self._gram.shape[0]
        full = torch.zeros(self.features, self.features, dtype=torch.float64, device=self._device).T
        full[:size, :size] = self._gram
        if self.has_bias:
            full[size, :size] = self._feature_sum
            full[size, size] = self.samples
        cross = torch.cat([self._cross, self._target_sum[:, None]], dim=1) if self.has_bias else self._cross
        return full, cross

    def _require_sound(self, cross: Tensor) -> None:
        if not self.samples:
            raise DataError("Expected samples to fit. Got none. Add some before you solve.")
        if not bool(torch.isfinite(self._feature_sum).all() and torch.isfinite(cross).all()):
            raise NumericalError(
                "Expected finite features and targets. Got NaN or infinity. Look for a network that has diverged."
            )

    def _start(self, prior: tuple[Tensor, Tensor | None] | None, cross: Tensor) -> Tensor:
        if prior is None:
            return torch.zeros_like(cross)
        weight, bias = prior
        columns = [weight]
        if self.has_bias:
            columns.append((torch.zeros(len(weight)) if bias is None else bias)[:, None].to(weight))
        start = torch.cat(columns, dim=1).to(cross)
        if start.shape != cross.shape:
            raise ShapeError(
                f"Expected a prior of shape {tuple(cross.shape)}, the bias included. Got {tuple(start.shape)}. "
                "Give the weights that the fit should stay near."
            )
        return start

    def _step(self, gram: Tensor, right: Tensor, penalty: float) -> tuple[Tensor, int, Status]:
        """Solve S·(G + μ) = R by Cholesky, and where it cannot, by eigenvalues."""
        size = len(gram)
        if not size:
            return right, 0, "ridge" if penalty else "minimum norm"
        scale = gram.diagonal().clone()
        gram.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(gram)
        rounding = 10 * max(self.samples, size) ** 0.5 * _EPS[self.precision]
        # A pivot is what a feature has beyond those before it; at rounding's size the features depend on each other.
        sound = not int(failed) and (bool(penalty) or bool((factor.diagonal().square() > rounding * scale).all()))
        if sound:
            status: Status = "ridge" if penalty else "cholesky" if size == self.features else "minimum norm"
            return torch.cholesky_solve(right.T, factor).T, size, status
        del factor
        values, vectors = torch.linalg.eigh(gram)
        if penalty:  # rounding alone puts an eigenvalue of G + μ below μ
            return (right @ vectors / values.clamp(min=penalty)) @ vectors.T, size, "ridge"
        counts = values > float(values[-1]) * rounding
        vectors, values = vectors[:, counts], values[counts]
        return (right @ vectors / values) @ vectors.T, int(counts.sum()), "minimum norm"


def _times(rows: Tensor, lower: Tensor) -> Tensor:
    """Multiply by a symmetric matrix of which the lower triangle is given."""
    return rows @ lower.tril() + rows @ lower.tril(-1).T
