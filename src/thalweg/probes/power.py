"""power: power iteration with deflation, the method of the papers that follow λ_max along training."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.probes.lanczos import RitzPairs, Watch

# How much closer than asked for a pair is brought before the next is begun; chosen by us.
_AHEAD = 0.1


def power_iteration(
    product: Callable[[Tensor], Tensor],
    start: Float[Tensor, " params"],
    num_pairs: int,
    *,
    tolerance: float,
    max_products: int,
    watch: Watch | None = None,
) -> RitzPairs:
    """Find the eigenvalues of largest magnitude, one after another: v ← Hv/‖Hv‖ beside those already found.

    It stops on the residual ‖Hv - λv‖, which bounds the error, where the usual stop on the change of λ bounds
    nothing; so it takes more products than that, and many more than Lanczos.

    Args:
        product: a symmetric map H.
        start: not zero.
        num_pairs: how many.
        tolerance: a pair has converged when its residual is at most this times |λ|.
        max_products: give up after so many, over all pairs.
        watch: called after each product as watch(products, converged, relative residual).

    Returns:
        The pairs found, converged or not, in the order found.

    **Source:** d'Ascoli et al. 2019 (arXiv 1906.06766), appendix; their stopping rule is not stated.
    """
    found: list[tuple[Tensor, float, float, bool]] = []
    products = 0
    count = min(num_pairs, len(start))
    for place in range(count):
        # What an earlier vector is wrong by is seen again in the residual of the next.
        aim = tolerance if place == count - 1 else _AHEAD * tolerance
        vector = _beside(start, found)
        while True:
            image = product(vector)
            products += 1
            value = float(vector.double() @ image.double())
            residual = float((image - value * vector).double().norm())
            is_done = residual <= aim * abs(value)
            if watch is not None:
                watch(products, len(found) + is_done, residual / max(abs(value), 1e-300))
            if is_done or products >= max_products or not float(_beside(image, found).norm()) > 0.0:
                break
            vector = _beside(image, found)
        found.append((vector, value, residual, residual <= tolerance * abs(value)))
        if products >= max_products:
            break
    residuals = torch.tensor([r for _, _, r, _ in found], dtype=torch.float64)
    return RitzPairs(
        values=torch.tensor([v for _, v, _, _ in found], dtype=torch.float64),
        vectors=torch.stack([vector for vector, *_ in found]),
        residuals=residuals,
        errors=residuals,
        converged=tuple(is_done for *_, is_done in found),
        products=products,
    )


def _beside(vector: Tensor, found: list[tuple[Tensor, float, float, bool]]) -> Tensor:
    """Take out what was found already, and bring to length 1 (0 where nothing is left)."""
    for _ in range(2):
        for other, *_ in found:
            vector = vector - (other @ vector) * other
    return torch.nn.functional.normalize(vector, dim=0)
