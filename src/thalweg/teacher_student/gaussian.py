"""Overlaps of ReLU nodes in closed form, for standard normal inputs and no biases."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def angles_between(ours: Float[Tensor, "*n d"], theirs: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """Measure the angle θ in [0, π] between vectors, accurate for small angles and with finite gradients.

    Args:
        ours: vectors; from a zero vector to another the angle is π/2, between two of them 0.
        theirs: as many.

    Returns:
        θ = 2 atan2(‖u - v‖, ‖u + v‖) of the normalised vectors. Its gradient at θ = 0 and π, where it has a kink,
        is 0.

    Source:
        Kahan, "How futile are mindless assessments of roundoff", 2006, section 12: arccos loses half the digits.

    Example:
        >>> float(angles_between(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-6])))
        9.99...e-07
    """
    u, v = _unit(ours), _unit(theirs)
    return 2 * torch.atan2(_norm(u - v), _norm(u + v))


def gaussian_gates(ours: Float[Tensor, "n d"], theirs: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Compute how often two ReLU nodes are active together: ψ_d(w, w') = (π - θ) / 2π for x ~ N(0, I).

    Args:
        ours: weights of nodes, one a row, in any floating type.
        theirs: of other nodes.

    Returns:
        E[1(wᵀx > 0) 1(w'ᵀx > 0)] of each pair; 0 for a zero row, which is never active.

    Source:
        tian2019luck (arXiv 1905.13405), equation 7; Cho and Saul 2009, the arc-cosine kernel of degree 0.

    Example:
        >>> gaussian_gates(torch.eye(2), torch.eye(2)).tolist()
        [[0.5, 0.25], [0.25, 0.5]]
    """
    angles = _pairwise(ours, theirs)
    active = (_norm(ours) > 0).unsqueeze(1) & (_norm(theirs) > 0)
    return torch.where(active, (math.pi - angles) / (2 * math.pi), torch.zeros_like(angles))


def gaussian_activations(ours: Float[Tensor, "n d"], theirs: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Compute how much two ReLU nodes overlap: ψ_l(w, w') = ‖w‖‖w'‖ (sin θ + (π - θ) cos θ) / 2π for x ~ N(0, I).

    Args:
        ours: weights of nodes, one a row.
        theirs: of other nodes.

    Returns:
        E[σ(wᵀx) σ(w'ᵀx)] of each pair.

    Source:
        tian2019luck (arXiv 1905.13405), equation 7; Cho and Saul 2009, the arc-cosine kernel of degree 1.

    Example:
        >>> gaussian_activations(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]])).tolist()
        [[2.0]]
    """
    angles = _pairwise(ours, theirs)
    shape = torch.sin(angles) + (math.pi - angles) * torch.cos(angles)
    return _norm(ours).unsqueeze(1) * _norm(theirs) * shape / (2 * math.pi)


def gaussian_correlations(ours: Float[Tensor, "n d"], theirs: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Compute the correlation ρ of two ReLU nodes' activations for x ~ N(0, I).

    Args:
        ours: weights of nodes, one a row.
        theirs: of other nodes.

    Returns:
        ρ = (ψ_l - μ μ') / (s s') with μ = ‖w‖/√(2π) and s² = ‖w‖² (½ - 1/2π): a function of the angle alone; 0 for
        a zero row, as of all nodes that are silent (`correlations`).

    Source:
        tian2019luck (arXiv 1905.13405), section 4.2 for ρ; the closed form is ours, from `gaussian_activations`.

    Example:
        >>> gaussian_correlations(torch.eye(2), torch.eye(2)).abs().round(decimals=6).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    square_of_mean = 1 / (2 * math.pi)
    scale = _norm(ours).unsqueeze(1) * _norm(theirs)
    active = scale > 0
    shape = gaussian_activations(ours, theirs) / torch.where(active, scale, torch.ones_like(scale))
    return torch.where(active, (shape - square_of_mean) / (0.5 - square_of_mean), torch.zeros_like(scale))


def _pairwise(ours: Tensor, theirs: Tensor) -> Tensor:
    n, m = len(ours), len(theirs)
    return angles_between(ours.unsqueeze(1).expand(n, m, -1), theirs.unsqueeze(0).expand(n, m, -1))


def _norm(x: Tensor) -> Tensor:
    """Take the norm along the last dim; at zero its gradient is 0, not NaN."""
    square = x.square().sum(-1)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), square)


def _unit(x: Tensor) -> Tensor:
    norm = _norm(x).unsqueeze(-1)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))
