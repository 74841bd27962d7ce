"""Where overlaps of nodes come from: the closed form for Gaussian inputs, or samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import ConfigError, ShapeError
from thalweg.teacher_student.gaussian import gaussian_activations, gaussian_gates


@dataclass(frozen=True)
class Overlaps:
    """Two functions of the weights of nodes (rows), n × d and m × d to n × m.

    Args:
        gates: ψ_d(w, w') = E[1(wᵀx > 0) 1(w'ᵀx > 0)].
        activations: ψ_l(w, w') = E[σ(wᵀx) σ(w'ᵀx)].
    """

    gates: Callable[[Tensor, Tensor], Tensor]
    activations: Callable[[Tensor, Tensor], Tensor]


GAUSSIAN = Overlaps(gaussian_gates, gaussian_activations)
"""Overlaps for x ~ N(0, I)."""


def sample_overlaps(inputs: Float[Tensor, "samples d"]) -> Overlaps:
    """Take overlaps as averages over given inputs.

    Args:
        inputs: x, one a row.

    Returns:
        Exact averages over these inputs.

    Raises:
        ShapeError: there is no input.

    Source:
        tian2019luck (arXiv 1905.13405), equation 7.

    Example:
        >>> sample_overlaps(torch.tensor([[1.0, 1.0], [1.0, -1.0]])).gates(torch.eye(2), torch.eye(2)).tolist()
        [[1.0, 0.5], [0.5, 0.5]]
    """
    if not len(inputs):
        raise ShapeError("Expected at least one input. Got none. Pass a batch of inputs.")

    def gates(ours: Tensor, theirs: Tensor) -> Tensor:
        first, second = (((inputs @ rows.T) > 0).to(inputs) for rows in (ours, theirs))
        return first.T @ second / len(inputs)

    def activations(ours: Tensor, theirs: Tensor) -> Tensor:
        return (inputs @ ours.T).relu().T @ (inputs @ theirs.T).relu() / len(inputs)

    return Overlaps(gates, activations)


def simplex_clones(
    nodes: int, num_inputs: int, generator: torch.Generator, *, noise: float = 0.03, copies: int = 50, shared: int = 0
) -> tuple[Float[Tensor, "nodes d"], Float[Tensor, "samples d"]]:
    """Make inputs in which nodes are separated: one clone of samples around each vertex of a regular simplex.

    A node near a vertex is active on its own clone and on no other, whatever its direction within about
    arcsin(1 / (nodes - 1)) of it, so that the premises of theorems 4 and 5 hold: overlaps of gates do not depend
    on the weights at all. The noise is orthogonal to the vertex and antithetic: the vertex is an eigenvector of its
    clone's second moment, which lemma 4 needs.

    Args:
        nodes: number of vertices, at least 2.
        num_inputs: dimension d, at least as many.
        generator: of the noise.
        noise: standard deviation of each coordinate of it, relative to the vertex.
        copies: samples of each clone, an even number.
        shared: samples at the sum of each two vertices, at which both nodes are active: small overlap ε > 0. The sum
            of only 2 vertices is 0, where no node is active.

    Returns:
        The vertices, of norm 1, and the inputs, in float64.

    Raises:
        ConfigError: a number is out of its range.

    Source:
        ours: the paper (tian2019luck, assumption 3) names no inputs that satisfy its premises.

    Example:
        >>> vertices, x = simplex_clones(3, 4, torch.Generator().manual_seed(0), shared=1)
        >>> tuple(vertices.shape), tuple(x.shape)
        ((3, 4), (153, 4))
    """
    if nodes < 2 or num_inputs < nodes or copies < 2 or copies % 2 or shared < 0 or not 0 <= noise < math.inf:
        raise ConfigError(
            "Expected 2 or more nodes, as many inputs at least, an even number of copies, shared and noise >= 0. "
            f"Got {nodes}, {num_inputs}, {copies}, {shared}, {noise}. Change them."
        )
    corners = torch.eye(nodes, num_inputs, dtype=torch.float64)
    vertices = corners - corners.mean(0)
    vertices = vertices / vertices.norm(dim=1, keepdim=True)
    drawn = torch.randn((nodes, copies // 2, num_inputs), generator=generator, dtype=torch.float64)
    along = torch.einsum("ncd,nd->nc", drawn, vertices).unsqueeze(2)
    across = noise * (drawn - along * vertices.unsqueeze(1))
    clones = torch.cat([vertices.unsqueeze(1) + across, vertices.unsqueeze(1) - across], 1).flatten(0, 1)
    pairs = torch.combinations(torch.arange(nodes), 2)
    both = vertices[pairs].sum(1).repeat(shared, 1)
    return vertices, torch.cat([clones, both])
