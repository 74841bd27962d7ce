"""first_layer: what reads the data directly is affine along a slice, so its products with the data are made once.

W(a, b) = W₀ + a·D₁ + b·D₂, so a linear or convolutional layer with a fixed input x gives F₀ + a·F₁ + b·F₂.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from thalweg.probes.grid import Grid
from thalweg.probes.private import Private

_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Our choice: where F₀, F₁ and F₂ of one layer take more memory, the layer is computed at every point.
_MAX_BYTES = 2**28


class FirstLayer:
    """Stands in for the `forward` of one layer of a private module, and answers from F₀ + a·F₁ + b·F₂.

    The first input after `forget` is learnt. A later call is answered from the terms only if its input equals
    the learnt one and the weights are those of the point, whatever the module does to either. Otherwise the
    layer is computed and the stand-in leaves: that was no first layer.

    Args:
        layer: the layer; its `forward` is replaced.
        spans: where its parameters lie in theta; one that is no coordinate is missing.
        grid: the slice.
    """

    def __init__(self, layer: nn.Module, spans: Mapping[str, slice], grid: Grid) -> None:
        self._layer, self._spans, self._grid = layer, spans, grid
        self._bare = copy.deepcopy(layer)
        self._shapes = {name: p.shape for name, p in self._bare.named_parameters()}
        self._point = (0, 0, grid.origin)
        self.is_used = True
        self.forget()
        layer.forward = self

    def forget(self) -> None:
        """Drop what was learnt: other data come next."""
        self._input: Tensor | None = None
        self._start: Tensor | None = None
        self._start_row = -1
        self._slopes: list[Tensor | None] = []

    def move(self, row: int, column: int, theta: Tensor) -> None:
        """Say at which point of the grid the next call is."""
        self._point = (row, column, theta)

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch's layers call it
        """Compute the layer at the point."""
        x = input
        if self.is_used and self._input is None:
            self._learn(x)
        if self.is_used and not (_is_same(x, self._input) and self._has_weights_of_the_point()):
            self._leave()
        if self.is_used:
            return self._answer()
        output: Tensor = type(self._layer).forward(self._layer, x)
        return output

    def _leave(self) -> None:
        self.forget()
        self.is_used = False

    def _learn(self, x: Tensor) -> None:
        first = self._product(self._grid.origin, x, is_origin=True)
        if first.nbytes * (1 + len(self._grid.axes)) > _MAX_BYTES:
            self._leave()
            return
        self._input, self._first = x, first
        self._slopes = [
            self._product(d, x, is_origin=False) if self._moves(d) else None for d in self._grid.directions
        ]

    def _moves(self, direction: Tensor) -> bool:
        return any(bool(direction[span].any()) for span in self._spans.values())

    def _product(self, vector: Tensor, x: Tensor, *, is_origin: bool) -> Tensor:
        """Apply the layer with its coordinates read off a vector; what is no coordinate counts at the origin."""
        pieces = {
            name: vector[self._spans[name]].view_as(own) if name in self._spans else own * is_origin
            for name, own in self._bare.named_parameters()
        }
        product: Tensor = functional_call(self._bare, pieces, (x,))
        return product

    def _has_weights_of_the_point(self) -> bool:
        theta = self._point[2]
        return all(
            torch.equal(getattr(self._layer, name), theta[span].view(self._shapes[name]))
            for name, span in self._spans.items()
        )

    def _answer(self) -> Tensor:
        """Add up the terms, those of the first axis once per row; the result is memory of its own."""
        row, column, _ = self._point
        step = float(self._grid.axes[0][row])
        if len(self._slopes) == 1:
            return _moved(self._first, self._slopes[0], step)
        if self._start is None or self._start_row != row:
            self._start, self._start_row = _moved(self._first, self._slopes[0], step), row
        return _moved(self._start, self._slopes[1], float(self._grid.axes[1][column]))


def stand_in(private: Private, grid: Grid) -> list[FirstLayer]:
    """Put a stand-in for every layer that might read the data directly; those that do not leave by themselves.

    Args:
        private: the module, whose layers are changed.
        grid: the slice.

    Returns:
        The stand-ins: for plain linear and convolutional layers without hooks, whose weights are parameters.
    """
    names = {id(p): n for n, p in private.module.named_parameters() if n in private.space.names}
    found = []
    for layer in private.module.modules():
        own = dict(layer.named_parameters())
        is_plain = type(layer) in _AFFINE and "weight" in own and "forward" not in vars(layer)
        if is_plain and not layer._forward_hooks and not layer._forward_pre_hooks:
            spans = {n: private.space.slice_of(names[id(p)]) for n, p in own.items() if id(p) in names}
            found.append(FirstLayer(layer, spans, grid))
    return found


def _is_same(x: Tensor, known: Tensor | None) -> bool:
    """Compare without reading where both are one piece of memory, which `torch.equal` does not."""
    if known is None or x.dtype != known.dtype or x.shape != known.shape:
        return False
    return (x.data_ptr() == known.data_ptr() and x.stride() == known.stride()) or torch.equal(x, known)


def _moved(start: Tensor, slope: Tensor | None, step: float) -> Tensor:
    return start.clone() if slope is None else torch.add(start, slope, alpha=step)
