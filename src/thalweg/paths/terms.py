"""terms: linear maps of one batch by blended weights, Σ c_j·(W_j x), each W_j x computed once."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from thalweg.paths.leg import Blend

_CONVOLUTIONS = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
    functional.conv1d: 1,
    functional.conv2d: 2,
    functional.conv3d: 3,
}
_OPTIONS = ("stride", "padding", "dilation", "groups")
_FEW_ROWS = 0.25
"""Share of the rows up to which the rows that differ are computed alone. Chosen by us: copying the others costs about
as much as a quarter of a wide map."""


@dataclass
class LinearMap:
    """A call of `linear` or of a convolution.

    Args:
        function: which.
        inputs: what it is applied to.
        weight: its weight.
        options: of a convolution.
        kernel_dims: 0 for `linear`.
        name: of its weight, if it is a blend.
        blend: of its weight.
        biases: of the terms; None if the bias is added to their blend.
    """

    function: Any
    inputs: Tensor
    weight: Tensor
    options: dict[str, Any]
    kernel_dims: int
    name: str | None = None
    blend: Blend | None = None
    biases: tuple[Tensor | None, ...] | None = None

    @property
    def axis(self) -> int:
        """The dim of the result along which the rows of the weight lie."""
        return -1 - self.kernel_dims

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The weights of the terms."""
        return self.blend.terms if self.blend is not None else (self.weight,)

    def bias_of(self, args: Any, kwargs: Any) -> Tensor | None:
        """Find the bias in the arguments of a call."""
        bias: Tensor | None = args[2] if len(args) > 2 else kwargs.get("bias")
        return bias

    def set_bias(self, bias: Tensor | None, blend: Blend | None) -> None:
        """Let every term have its bias: Σ c_j·(W_j x + b_j), as the c_j sum to 1.

        It can have one if the bias rests, or moves with the same c_j as the weight; else it is added to the blend.
        """
        if blend is None:
            self.biases = (bias,) * len(self.weights) if self.blend is not None or bias is None else None
        elif self.blend is not None and (blend.kind, blend.times) == (self.blend.kind, self.blend.times):
            self.biases = blend.terms

    def apply(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the map with any weight."""
        result: Tensor = self.function(self.inputs, weight, bias, **self.options)
        return result

    def at(self, terms: "Terms", bias: Tensor | None) -> Tensor:
        """Give the result at the s at which the terms are, as a tensor of its own."""
        if self.biases is not None:
            return terms.blended(self)
        if terms.is_exact:
            return self.apply(self.weight if self.blend is None else self.blend.at(terms.s), bias)
        result = terms.blended(self)
        return result if bias is None else result.add_(bias.view(-1, *(1,) * self.kernel_dims))


def linear_map(func: Any, args: Any, kwargs: Any) -> LinearMap | None:
    """Read a call as a linear map; None if it is another function."""
    if func is not functional.linear and func not in _CONVOLUTIONS:
        return None
    given = dict(zip(("input", "weight", "bias", *_OPTIONS), args, strict=False)) | dict(kwargs)
    options = {key: given[key] for key in _OPTIONS if key in given}
    dims = 0 if func is functional.linear else _CONVOLUTIONS[func]
    return LinearMap(func, given["input"], given["weight"], options, dims)


@dataclass
class Terms:
    """The terms W_j x of one batch.

    Args:
        s: where on the leg the run is.
        is_exact: whether results must be those of the plain way to the last bit, as at the ends of a path.
        rows: rows in which two weights differ, by their identities; they hold for many batches.
    """

    rows: dict[tuple[int, ...], Tensor]
    s: float = 0.0
    is_exact: bool = False
    num_rows: int = 0
    _made: dict[Any, tuple[LinearMap, Tensor]] = field(default_factory=dict)
    _used: set[Any] = field(default_factory=set)

    def pays(self, found: LinearMap, num_runs: int) -> bool:
        """Say whether computing the terms is less work than so many runs."""
        work = len(found.weights)
        if self._neighbours(found, 0, -1) is not None:
            work = 0 if any(self._key(found, j) in self._made for j in range(work)) else 1
        return work < num_runs

    def blended(self, found: LinearMap) -> Tensor:
        """Give Σ c_j·(W_j x + b_j) at s, as a tensor of its own."""
        shares = found.blend.coefficients(self.s) if found.blend is not None else (1.0,)
        counting = [(share, j) for j, share in enumerate(shares) if share != 0]
        if len(counting) == 1:
            share, only = counting[0]
            return self._term(found, only).clone() if share == 1 else self._term(found, only) * share
        results = [self._term(found, j) for _, j in counting]
        rows = self._neighbours(found, 0, -1)
        if rows is not None:
            few = [result.index_select(found.axis, rows) for result in results]
            return results[0].clone().index_copy_(found.axis, rows, few[0].lerp_(few[1], counting[1][0]))
        if len(results) == 2 and found.blend is not None and found.blend.kind in ("linear", "knots"):
            return results[0].lerp(results[1], counting[1][0])
        mixed = results[0] * counting[0][0]
        for (share, _), other in zip(counting[1:], results[1:], strict=True):
            mixed.add_(other, alpha=share)
        return mixed

    def end_leg(self) -> int:
        """Forget the terms that the leg did not use; give how many rows were computed alone."""
        self._made = {key: value for key, value in self._made.items() if key in self._used}
        self._used = set()
        counted, self.num_rows = self.num_rows, 0
        return counted

    def _term(self, found: LinearMap, j: int) -> Tensor:
        key = self._key(found, j)
        if key not in self._made:
            self._made[key] = (found, self._computed(found, j))
        self._used.add(key)
        return self._made[key][1]

    def _computed(self, found: LinearMap, j: int) -> Tensor:
        """Compute W_j x + b_j, from the other term where that differs in a few rows."""
        weight, bias = found.weights[j], found.biases[j] if found.biases is not None else None
        rows = self._neighbours(found, 0, -1)
        known = self._made.get(self._key(found, -1 if j == 0 else 0))
        if rows is None or known is None:
            return found.apply(weight, bias)
        self.num_rows += len(rows)
        few = found.apply(weight[rows], None if bias is None else bias[rows])
        return known[1].clone().index_copy_(found.axis, rows, few)

    def _neighbours(self, found: LinearMap, i: int, j: int) -> Tensor | None:
        """Give the rows in which two terms of a line differ, if they are few and may be computed alone."""
        if found.blend is None or found.blend.kind != "linear" or found.options.get("groups", 1) != 1:
            return None
        first, second = found.weights[i], found.weights[j]
        ends = (None, None) if found.biases is None else (found.biases[i], found.biases[j])
        key = (id(first), id(second), id(ends[0]), id(ends[1]))
        if key not in self.rows:
            differs = (first != second).flatten(1).any(1)
            if ends[0] is not None and ends[1] is not None:
                differs = differs | (ends[0] != ends[1])
            self.rows[key] = differs.nonzero().reshape(-1)
        return self.rows[key] if len(self.rows[key]) <= _FEW_ROWS * len(first) else None

    def _key(self, found: LinearMap, j: int) -> Any:
        bias = None if found.biases is None else found.biases[j]
        return found.function, id(found.inputs), id(found.weights[j]), id(bias), repr(found.options)
