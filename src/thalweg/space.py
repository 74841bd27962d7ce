"""theta: a point of a landscape, the trainable parameters of any `nn.Module` as one flat vector."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.errors import ShapeError


@dataclass(frozen=True)
class Space:
    """The coordinates of theta: which stretch of the flat vector is which parameter.

    Parameters stand in the order of `module.named_parameters()`. A tied parameter stands once, under its
    first name; one with `requires_grad=False` is not a coordinate (it travels with the buffers).

    Args:
        names: dotted names of the parameters.
        shapes: their shapes, in the same order.

    Example:
        >>> space = Space.of(nn.Linear(3, 2))
        >>> space.num_params, space.names
        (8, ('weight', 'bias'))
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    _offsets: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        offsets, position = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            offsets[name] = position
            position += math.prod(shape)
        object.__setattr__(self, "_offsets", offsets)

    @classmethod
    def of(cls, module: nn.Module) -> "Space":
        """Read the coordinates off a module.

        Raises:
            ShapeError: the module has no trainable parameter.
        """
        items = [(n, tuple(p.shape)) for n, p in module.named_parameters() if p.requires_grad]
        if not items:
            raise ShapeError(
                f"Expected a module with trainable parameters. Got {type(module).__name__} with none. "
                "Set requires_grad=True on what is to be a coordinate."
            )
        return cls(tuple(n for n, _ in items), tuple(s for _, s in items))

    @property
    def num_params(self) -> int:
        """Number of coordinates."""
        return sum(math.prod(shape) for shape in self.shapes)

    def slice_of(self, name: str) -> slice:
        """Return the stretch of theta that holds the parameter `name`.

        Raises:
            ShapeError: no such parameter.
        """
        if name not in self._offsets:
            raise ShapeError(f"Expected one of {', '.join(self.names)}. Got {name!r}. Check the name.")
        start = self._offsets[name]
        return slice(start, start + math.prod(self.shapes[self.names.index(name)]))

    def theta(self, source: nn.Module | Mapping[str, Tensor]) -> Float[Tensor, " params"]:
        """Flatten a module's parameters, or a mapping such as a state dict, into a detached copy.

        Args:
            source: the module, or a mapping that has every name of this space (further keys are ignored).

        Returns:
            theta, shape (params,), dtype and device of the parameters.

        Raises:
            ShapeError: a name is missing or a shape differs.
        """
        found = dict(source.named_parameters()) if isinstance(source, nn.Module) else source
        pieces = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in found:
                raise ShapeError(
                    f"Expected a parameter {name!r}. Got {len(found)} others. "
                    "Use the module that this space was read off."
                )
            if tuple(found[name].shape) != shape:
                raise ShapeError(
                    f"Expected {name!r} of shape {shape}. Got {tuple(found[name].shape)}. "
                    "Use the module that this space was read off."
                )
            pieces.append(found[name].detach().reshape(-1))
        return torch.cat(pieces).clone()

    def parameters(self, theta: Float[Tensor, "*batch params"]) -> dict[str, Tensor]:
        """Give the named parameters as views of theta; leading batch axes stay in front.

        Args:
            theta: shape (*batch, params).

        Returns:
            name -> tensor of shape (*batch, *shape), differentiable in theta, no copy.

        Raises:
            ShapeError: the last axis is not `num_params` long.
        """
        if theta.shape[-1:] != (self.num_params,):
            raise ShapeError(
                f"Expected theta with {self.num_params} parameters on its last axis. "
                f"Got shape {tuple(theta.shape)}. Build it with Space.theta(module)."
            )
        views, position = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            size = math.prod(shape)
            views[name] = theta[..., position : position + size].reshape(*theta.shape[:-1], *shape)
            position += size
        return views

    def write(self, theta: Float[Tensor, " params"], module: nn.Module) -> None:
        """Copy theta into a module's parameters, in place, casting to their dtype and device.

        Raises:
            ShapeError: theta or the module does not fit this space.
        """
        views = self.parameters(theta)
        targets = dict(module.named_parameters())
        for name, value in views.items():
            if name not in targets or targets[name].shape != value.shape:
                raise ShapeError(
                    f"Expected a module with {name!r} of shape {tuple(value.shape)}. Got none. "
                    "Use the module that this space was read off."
                )
        with torch.no_grad():
            for name, value in views.items():
                targets[name].copy_(value)
