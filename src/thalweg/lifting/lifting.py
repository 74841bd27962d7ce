"""The lift as a linear map Φ between two landscapes: forth, its transpose, and the orthogonal projection back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import ShapeError
from thalweg.lifting.layers import LiftedLayer
from thalweg.space import Space


@dataclass(frozen=True)
class Lifting:
    """Carries points of a convolutional network to points of its relaxed one, and back.

    Φ copies every entry of a kernel to all entries of the lifted weight that are tied to it, and a bias to all
    positions of its channel; all else is copied once. It is linear and, but for taps that read nothing but padding,
    injective; its image is the subspace of networks that share weights and are local.

    Args:
        layers: what is lifted.
        space: the coordinates of the convolutional network.
        lifted_space: those of the relaxed one.
        unread: name of a convolution's weight -> its value, where taps read nothing but padding: the lifted network
            does not hold them.

    **Source:** Φ of dascoli2019finding (arXiv 1906.06766), sections 3 and 4; transpose and projection are ours.
    """

    layers: tuple[LiftedLayer, ...]
    space: Space
    lifted_space: Space
    unread: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Lift parameters and buffers by name (a state dict, or part of one).

        Args:
            state: name -> tensor of the convolutional network.

        Returns:
            name -> tensor of the lifted network; what is not lifted is the same object.

        Raises:
            ShapeError: a tensor does not have the shape that its layer has.
        """
        lazy = self.lazily(state)
        return {name: lazy[name] for name in lazy}

    def lazily(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Give the lifted state as a mapping that makes each tensor when it is asked for, and keeps none.

        Args:
            state: as for `state`; not copied.

        Returns:
            name -> tensor of the lifted network.
        """
        return _Lazy(self, state)

    def apply(self, theta: Float[Tensor, " params"]) -> Float[Tensor, " lifted"]:
        """Compute Φθ.

        Raises:
            ShapeError: theta does not fit the convolutional network.
        """
        found = theta.new_zeros(self.lifted_space.num_params)
        places = self.lifted_space.parameters(found)
        for name, value in self.space.parameters(theta.detach()).items():
            layer, kind, lifted = self.original(name)
            place = places[lifted]
            if layer is None:
                place.copy_(value)
            elif kind == "bias":
                place.copy_(value.repeat_interleave(layer.geometry.positions).reshape(layer.bias_shape))
            else:
                spread(layer, value, place)
        return found

    def adjoint(self, theta: Float[Tensor, " lifted"]) -> Float[Tensor, " params"]:
        """Compute Φᵀθ: the sums over tied entries. The gradient at θ is Φᵀ of the gradient at Φθ, by the chain rule.

        Raises:
            ShapeError: theta does not fit the lifted network.
        """
        parts = self.lifted_space.parameters(theta)
        return self.space.theta(self._back(parts, "sum"))

    def project(self, theta: Float[Tensor, " lifted"]) -> Float[Tensor, " params"]:
        """Give the convolutional network whose lift is nearest: the means over tied entries.

        Taps that read nothing but padding are those of the network that was lifted, or 0.

        Raises:
            ShapeError: theta does not fit the lifted network.
        """
        return self.space.theta(self._back(self.lifted_space.parameters(theta), "mean"))

    def nearest(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Project parameters and buffers by name, as `project` does; what is not lifted is the same object.

        Args:
            state: name -> tensor of the lifted network.

        Raises:
            ShapeError: a tensor does not have the shape that its layer has.
        """
        return self._back(state, "mean")

    def original(self, name: str) -> tuple[LiftedLayer | None, Literal["weight", "bias"], str]:
        """Find what a tensor of the convolutional network becomes.

        Args:
            name: of a parameter or buffer.

        Returns:
            The layer, None if it is not lifted; which of its two; the name in the lifted network.
        """
        for layer in self.layers:
            for own in layer.names:
                prefix = f"{own}." if own else ""
                if name == f"{prefix}weight":
                    return layer, "weight", f"{prefix}{layer.inner}weight"
                if name == f"{prefix}bias":
                    return layer, "bias", f"{prefix}{layer.inner}bias"
        return None, "weight", name

    def _back(self, state: Mapping[str, Tensor], how: Literal["sum", "mean"]) -> dict[str, Tensor]:
        names = {
            f"{own}.{layer.inner}{kind}" if own else f"{layer.inner}{kind}": (layer, own, kind)
            for layer in self.layers
            for own in layer.names
            for kind in ("weight", "bias")
        }
        found = {}
        for name, tensor in state.items():
            if name not in names:
                found[name] = tensor
                continue
            layer, own, kind = names[name]
            shape = layer.weight_shape if kind == "weight" else layer.bias_shape
            require_shape(name, tensor, shape)
            back = f"{own}.{kind}" if own else kind
            if kind == "bias":
                rows = tensor.detach().reshape(layer.geometry.out_channels, -1)
                wide = rows.double()
                mean = wide[:, 0] + (wide - wide[:, :1]).mean(1)
                found[back] = (mean if how == "mean" else wide.sum(1)).to(tensor.dtype)
            else:
                first = f"{layer.name}.weight" if layer.name else "weight"
                unread = self.unread.get(first) if how == "mean" else None
                found[back] = gathered(layer, tensor.detach(), how, unread)
        return found


def spread(layer: LiftedLayer, kernel: Tensor, into: Tensor | None = None) -> Tensor:
    """Copy a kernel to all entries of a lifted weight that are tied to it; the rest is 0.

    Fresh memory that is 0 comes from the system untouched, so only what is local is written.

    Args:
        layer: which convolution.
        kernel: of shape (out, in / groups, *kernel).
        into: the lifted weight, contiguous and 0. Default: a new one.

    Returns:
        The lifted weight.
    """
    geometry = layer.geometry
    weight = kernel.new_zeros(layer.weight_shape) if into is None else into
    taps = kernel.detach().reshape(geometry.groups, geometry.out_channels // geometry.groups, -1, geometry.taps)
    for tap, view in layer.ties(weight):
        value = taps[..., tap]
        view.copy_(value.reshape(*value.shape, *[1] * len(geometry.input_size)))
    return weight


def gathered(layer: LiftedLayer, weight: Tensor, how: Literal["sum", "mean"], unread: Tensor | None = None) -> Tensor:
    """Sum or average the entries of a lifted weight that are tied to each entry of the kernel, in double precision.

    Args:
        layer: which convolution.
        weight: of its `weight_shape`.
        how: sum, or mean.
        unread: kernel whose taps stand for those that read nothing but padding; None for 0.

    Returns:
        The kernel.
    """
    geometry, weight = layer.geometry, weight.contiguous()
    shape = (geometry.groups, geometry.out_channels // geometry.groups, geometry.in_channels // geometry.groups)
    kernel = torch.zeros(*shape, geometry.taps, dtype=torch.float64, device=weight.device)
    if unread is not None:
        kernel.copy_(unread.reshape(kernel.shape))
    for tap, view in layer.ties(weight):
        if not view.numel():
            continue
        tied = view.flatten(3).double()
        if how == "sum":
            kernel[..., tap] = tied.sum(3)
        else:  # about the first: the mean of equal numbers is that number to the bit
            kernel[..., tap] = tied[..., 0] + (tied - tied[..., :1]).mean(3)
    out = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel_size)
    return kernel.reshape(out).to(weight.dtype)


class _Lazy(Mapping[str, Tensor]):
    """A lifted state whose tensors are made when they are asked for."""

    def __init__(self, lifting: Lifting, state: Mapping[str, Tensor]) -> None:
        self._lifting, self._state = lifting, state
        self._names = {lifting.original(name)[2]: name for name in state}

    def __getitem__(self, name: str) -> Tensor:
        origin = self._names[name]
        layer, kind, _ = self._lifting.original(origin)
        tensor = self._state[origin]
        if layer is None:
            return tensor
        geometry = layer.geometry
        if kind == "weight":
            ins = geometry.in_channels // geometry.groups
            require_shape(origin, tensor, (geometry.out_channels, ins, *geometry.kernel_size))
            return spread(layer, tensor)
        require_shape(origin, tensor, (geometry.out_channels,))
        return tensor.detach().repeat_interleave(geometry.positions).reshape(layer.bias_shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """See that a tensor has the shape that its layer has.

    Raises:
        ShapeError: it has another.
    """
    if tuple(tensor.shape) != shape:
        raise ShapeError(
            f"Expected {name!r} of shape {shape}. Got {tuple(tensor.shape)}. Use a state of the network that was "
            "lifted, or of what it became."
        )
