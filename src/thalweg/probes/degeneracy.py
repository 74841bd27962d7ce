"""degeneracy: how many eigenvalues of a Hessian are negative, zero and positive."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import NumericalError
from thalweg.probes.spectrum import Spectrum


@dataclass(frozen=True)
class Inertia:
    """The signs of a spectrum (Sylvester's inertia).

    Args:
        negative: number of eigenvalues below -threshold; at a critical point, its index.
        zero: number within ±threshold; at a critical point, its degeneracy (the Hessian's corank).
        positive: number above threshold.
        threshold: the bound used, in units of the Hessian.
        rule: where the bound comes from, a sentence for printing.
    """

    negative: int
    zero: int
    positive: int
    threshold: float
    rule: str


def inertia(spectrum: Spectrum | Float[Tensor, " params"], threshold: float | None = None) -> Inertia:
    """Count the eigenvalues by sign.

    The default threshold is P·eps·max|λ|. By Weyl's inequality a perturbation E of H moves no eigenvalue by
    more than ‖E‖₂; a backward-stable solver returns the exact spectrum of H+E with ‖E‖₂ of order P·eps·‖H‖₂
    at most, and rounding in the entries of an assembled H (eps·max|H_ij| each, P of them in a row) has the
    same bound. An eigenvalue inside it cannot be told from zero by a computation in this precision.

    Args:
        spectrum: a `Spectrum`, or eigenvalues of shape (params,) in any order.
        threshold: an own bound, e.g. the 1e-11 that Fig. 3 of the paper draws.

    Returns:
        The counts, the bound and its rule.

    Raises:
        NumericalError: an eigenvalue is not finite, or the threshold is negative.

    **Source:** Zhang et al. 2021 (arXiv 2105.14573), Fig. 3 and 4, count signs and call the zeros of a
    critical point its degeneracy; the default bound is ours.

    Example:
        >>> inertia(torch.tensor([-1.0, 0.0, 1e-12, 2.0], dtype=torch.float64), threshold=1e-11)
        Inertia(negative=1, zero=2, positive=1, threshold=1e-11, rule='|λ| ≤ 1.0e-11, as given')
    """
    values = spectrum.eigenvalues if isinstance(spectrum, Spectrum) else spectrum
    if not bool(torch.isfinite(values).all()):
        raise NumericalError("Expected finite eigenvalues. Got NaN or infinity. Check the point.")
    if threshold is None:
        eps, count = torch.finfo(values.dtype).eps, len(values)
        threshold = count * eps * float(values.abs().max()) if count else 0.0
        rule = f"|λ| ≤ P·eps·max|λ| = {threshold:.1e}, with P = {count} and eps = {eps:.1e}: rounding noise"
    elif threshold >= 0.0:
        rule = f"|λ| ≤ {threshold:.1e}, as given"
    else:
        raise NumericalError(f"Expected a threshold of at least 0. Got {threshold}. Pass its absolute value.")
    negative = int((values < -threshold).sum())
    positive = int((values > threshold).sum())
    return Inertia(negative, len(values) - negative - positive, positive, threshold, rule)
