"""Critical embedding of any module over its view: one gather and one scale, linear and injective in theta."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.embeddings.plan import Plan
from thalweg.embeddings.surgery import resized_module
from thalweg.errors import ShapeError
from thalweg.space import Space
from thalweg.structure import View
from thalweg.structure.symmetry import factors_along, scaled_along
from thalweg.structure.tree import FloatArray, IntArray, gather, resized, spread


@dataclass(frozen=True)
class Embedding:
    """Carries a point of a narrow network exactly into a wider one.

    With a split (p, a) for each group, a weight whose rows make group l and whose columns read group k becomes

        W'[i, j] = a_k(j) · W[p_l(i), p_k(j)],    b'[i] = b[p_l(i)],

    and everything along a group that is not an outgoing weight (biases, normalisation, running statistics,
    kernels of a channel) is copied. At every point, critical or not: the outputs stay, features copy, errors
    share, and ∂R/∂W'[i, j] = a_l(i) · ∂R/∂W[p_l(i), p_k(j)], so that critical points go to critical points.

    Source:
        zhang2021embedding, definition 5, proposition 1 and theorem 1, in closed form for any composition of
        steps; departures: any module over its view in place of fully-connected networks.

    Args:
        view: the groups of the narrow module.
        space: the coordinates of the narrow module.
        plan: a split for some of the groups.

    Example:
        >>> from thalweg.embeddings import split_plan
        >>> from thalweg.structure import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> view = trace(net, torch.zeros(3, 1))
        >>> embedding = Embedding(view, Space.of(net), split_plan(view, {"0": 4}))
        >>> embedding.apply(Space.of(net).theta(net)).shape
        torch.Size([13])
    """

    view: View
    space: Space
    plan: Plan

    @property
    def wide_space(self) -> Space:
        """Coordinates of the wide module."""
        shapes = []
        for name, shape in zip(self.space.names, self.space.shapes, strict=True):
            trees = self.view.axes.get(name)
            shapes.append(shape if trees is None else tuple(resized(t, self.plan.widths).size for t in trees))
        return Space(self.space.names, tuple(shapes))

    def state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embed parameters and buffers by name (a state dict, or part of one).

        Args:
            state: name -> tensor of the narrow module.

        Returns:
            name -> tensor of the wide module, in the same dtype; what no split touches is the same object.

        Raises:
            ShapeError: a tensor does not have the shape that the view knows.
        """
        return {name: self._carried(name, tensor, "point") for name, tensor in state.items()}

    def apply(self, theta: Float[Tensor, " narrow"]) -> Float[Tensor, " wide"]:
        """Embed a point; linear and injective.

        Raises:
            ShapeError: theta does not fit the narrow module.
        """
        return self.wide_space.theta(self.state(self.space.parameters(theta)))

    def gradient(self, gradient: Float[Tensor, " narrow"]) -> Float[Tensor, " wide"]:
        """Predict ∇R at the embedded point from ∇R at the narrow one: exact at every point.

        Raises:
            ShapeError: the gradient does not fit the narrow module.
        """
        parts = self.space.parameters(gradient)
        return self.wide_space.theta({n: self._carried(n, t, "gradient") for n, t in parts.items()})

    def wide(self, module: nn.Module) -> nn.Module:
        """Build the wide module: a copy of the narrow one whose layers have the new sizes and weights.

        Raises:
            StructureError: a layer of a kind that cannot be resized.
        """
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            return resized_module(module, self.view, self.plan.widths, self.state(state))

    def _carried(self, name: str, tensor: Tensor, what: Literal["point", "gradient"]) -> Tensor:
        trees = self.view.axes.get(name)
        if trees is None:
            return tensor
        if tuple(t.size for t in trees) != tuple(tensor.shape):
            raise ShapeError(
                f"Expected {name!r} of shape {tuple(t.size for t in trees)}. Got {tuple(tensor.shape)}. "
                "Embed the module that was traced."
            )
        roles = self.view.members_of(name)
        sources = {g: s.sources for g, s in self.plan.splits.items()}
        # Scaled dims first: they work on the smaller tensor.
        order = sorted(range(tensor.ndim), key=lambda d: all(roles.get((d, g)) != "consumer" for g in sources))
        blocks = [1] * tensor.ndim
        for dim in order:
            here = {g for (d, g) in roles if d == dim and g in sources}
            if not here:
                continue
            index = gather(trees[dim], {g: sources[g] for g in here})
            scale = spread(trees[dim], {g: self._factor(g, roles[dim, g] == "consumer", what) for g in here})
            tensor, blocks[dim] = _gathered(tensor, dim, index, scale)
        return tensor if max(blocks, default=1) == 1 else tensor.repeat(blocks)

    def _factor(self, group: str, consumes: bool, what: Literal["point", "gradient"]) -> FloatArray:
        """A share goes with outgoing weights at a point, and with incoming weights in a gradient."""
        split = self.plan.splits[group]
        return split.shares if consumes == (what == "point") else split.alive


def _gathered(tensor: Tensor, dim: int, index: IntArray, scale: FloatArray) -> tuple[Tensor, int]:
    """Compute W'[j] = scale[j] · W[index[j]] along one dim, up to a number of equal blocks that are left to repeat.

    One repetition over all dims at the end writes every wide weight once; gathering dim by dim reads and writes
    the larger part of them twice.
    """
    size = tensor.shape[dim]
    if not np.array_equal(index, np.arange(len(index)) % size) or len(index) % size:
        tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
        return (tensor if bool((scale == 1).all()) else tensor.mul_(factors_along(tensor, dim, scale))), 1
    rows = scale.reshape(-1, size)
    if bool((rows == rows[0]).all()):
        return (tensor if bool((rows[0] == 1).all()) else scaled_along(tensor, dim, rows[0])), len(rows)
    factors = torch.from_numpy(rows).to(tensor).reshape([len(rows), size] + [1] * (tensor.ndim - dim - 1))
    return (tensor.unsqueeze(dim) * factors).flatten(dim, dim + 1), 1
