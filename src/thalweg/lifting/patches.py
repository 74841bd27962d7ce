"""The product of a locally-connected layer: every position's kernel times its patch, patches made a few at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thalweg.lifting.geometry import Geometry

# Bytes of patches that are made at once. On a CPU they then stay in its cache, and the allocator gives the same pages
# again: fresh pages cost more than the product (64 channels, 5×5 taps, batch 250: 0.22 s against 0.03 s to gather).
_AT_ONCE = {"cpu": 2**22}
_AT_ONCE_ELSEWHERE = 2**28


@dataclass(frozen=True)
class Patch:
    """Positions whose patches read the input through the same taps.

    Args:
        positions: numbers of the output positions.
        taps: numbers of the taps that do not fall into the padding; None for all.
        pixels: which input position each reads through each tap, of shape (positions, taps).
    """

    positions: Int[Tensor, " positions"]
    taps: Int[Tensor, " taps"] | None
    pixels: Int[Tensor, "positions taps"]


@dataclass
class Patches:
    """The patches of a geometry, by the taps that they read through, on any device.

    Args:
        geometry: of the layer.
    """

    geometry: Geometry
    _placed: dict[torch.device, tuple[Patch, ...]] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> tuple[Patch, ...]:
        """Give the patches, with their numbers on a device."""
        if device not in self._placed:
            reads = _reads(self.geometry)
            patterns, which = torch.unique(reads >= 0, dim=0, return_inverse=True)
            found = []
            for number, pattern in enumerate(patterns):
                if not bool(pattern.any()):  # nothing but padding: the product is 0
                    continue
                positions, taps = torch.nonzero(which == number).flatten(), torch.nonzero(pattern).flatten()
                pixels = reads[positions][:, taps].to(device)
                is_full = len(taps) == self.geometry.taps
                found.append(Patch(positions.to(device), None if is_full else taps.to(device), pixels))
            self._placed[device] = tuple(found)
        return self._placed[device]

    def multiplied(
        self, inputs: Float[Tensor, "pixels channels batch"], weight: Float[Tensor, "positions out taps ins"]
    ) -> Float[Tensor, "positions out batch"]:
        """Compute out[l, o, n] = Σ_{t, c} W[l, o, t, c] · x[pixel(l, t), c, n].

        Args:
            inputs: position by position; the batch is the innermost dim, so that a patch is gathered in long rows.
            weight: of every position; what reads padding does not count.

        Returns:
            The products, differentiable twice and under `torch.func`'s transforms.
        """
        if _is_transformed():
            return _plain(self.geometry, inputs, weight)
        found: Tensor = _Product.apply(inputs, weight, self)  # type: ignore[no-untyped-call]
        return found

    def chunks(self, inputs: Tensor) -> Iterator[Patch]:
        """Cut the patches so that those of one piece take a few megabytes."""
        most = _AT_ONCE.get(inputs.device.type, _AT_ONCE_ELSEWHERE)
        row = inputs[0].numel() * inputs.element_size()
        for patch in self.on(inputs.device):
            count = max(1, most // max(1, row * patch.pixels.shape[1]))
            for start in range(0, len(patch.positions), count):
                stretch = slice(start, start + count)
                yield Patch(patch.positions[stretch], patch.taps, patch.pixels[stretch])


class _Product(torch.autograd.Function):
    """The product with its gradient: patches are gathered again in the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, patches: Patches) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.patches = patches
        out = inputs.new_zeros(weight.shape[0], weight.shape[1], inputs.shape[2])
        for patch in patches.chunks(inputs):
            taken = _gathered(patches.geometry, inputs, patch)
            found = torch.bmm(_kernels(patches.geometry, weight, patch), taken)
            out[patch.positions] = found.reshape(len(patch.positions), *out.shape[1:])
        return out

    @staticmethod
    def backward(ctx: Any, *outward: Any) -> tuple[Tensor | None, Tensor | None, None]:
        (slope,) = outward
        inputs, weight = ctx.saved_tensors
        patches: Patches = ctx.patches
        geometry, (wants_inputs, wants_weight) = patches.geometry, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # a gradient that is to be differentiated again
            found = _plain(geometry, inputs, weight)
            wanted = [t for t, wants in ((inputs, wants_inputs), (weight, wants_weight)) if wants]
            slopes = iter(torch.autograd.grad(found, wanted, slope, create_graph=True))
            return next(slopes) if wants_inputs else None, next(slopes) if wants_weight else None, None
        to_inputs = torch.zeros_like(inputs) if wants_inputs else None
        to_weight = torch.zeros_like(weight) if wants_weight else None
        groups = geometry.groups
        for patch in patches.chunks(inputs):
            own = slope[patch.positions].reshape(len(patch.positions) * groups, -1, inputs.shape[2])
            if to_weight is not None:
                taken = _gathered(geometry, inputs, patch)
                grown = torch.bmm(own, taken.transpose(1, 2))
                shape = (len(patch.positions), weight.shape[1], patch.pixels.shape[1], weight.shape[3])
                _put(to_weight, grown.reshape(shape), patch)
            if to_inputs is not None:
                spread = torch.bmm(_kernels(geometry, weight, patch).transpose(1, 2), own)
                spread = spread.reshape(len(patch.positions), groups, patch.pixels.shape[1], -1, inputs.shape[2])
                rows = spread.transpose(1, 2).reshape(patch.pixels.numel(), -1)
                to_inputs.view(len(inputs), -1).index_add_(0, patch.pixels.reshape(-1), rows)
        return to_inputs, to_weight, None


def _gathered(geometry: Geometry, inputs: Tensor, patch: Patch) -> Tensor:
    """Gather patches: (positions · groups, taps · in / groups, batch)."""
    taken = inputs.index_select(0, patch.pixels.reshape(-1))
    shape = (*patch.pixels.shape, geometry.groups, inputs.shape[1] // geometry.groups, inputs.shape[2])
    return taken.reshape(shape).transpose(1, 2).reshape(-1, shape[1] * shape[3], shape[4])


def _kernels(geometry: Geometry, weight: Tensor, patch: Patch) -> Tensor:
    """Select kernels: (positions · groups, out / groups, taps · in / groups)."""
    own = weight[patch.positions] if patch.taps is None else weight[patch.positions[:, None], :, patch.taps]
    if patch.taps is not None:
        own = own.transpose(1, 2)  # advanced indices came first
    return own.reshape(len(own) * geometry.groups, weight.shape[1] // geometry.groups, -1)


def _put(weight: Tensor, grown: Tensor, patch: Patch) -> None:
    if patch.taps is None:
        weight[patch.positions] = grown
    else:
        weight[patch.positions[:, None], :, patch.taps] = grown.transpose(1, 2)


def _plain(geometry: Geometry, inputs: Tensor, weight: Tensor) -> Tensor:
    """Compute the same by operations that can be differentiated and transformed at will; all patches at once."""
    reads = _reads(geometry).to(inputs.device)
    rows = torch.cat([inputs, torch.zeros_like(inputs[:1])])
    every = torch.arange(geometry.positions, device=inputs.device)
    taken = _gathered(geometry, rows, Patch(every, None, torch.where(reads < 0, geometry.pixels, reads)))
    found = torch.bmm(weight.reshape(len(taken), weight.shape[1] // geometry.groups, -1), taken)
    return found.reshape(*weight.shape[:2], -1)


def _reads(geometry: Geometry) -> Tensor:
    """Say which input position each output position reads through each tap; -1 is padding."""
    reads = torch.full((*geometry.output_size, geometry.taps), -1)
    pixels = torch.arange(geometry.pixels).reshape(geometry.input_size)
    for box in geometry.boxes():
        to = tuple(slice(p, p + n) for p, n in zip(box.position, box.size, strict=True))
        of = tuple(
            slice(p, p + n * s, s) if n else slice(0)
            for p, n, s in zip(box.pixel, box.size, geometry.stride, strict=True)
        )
        reads[..., box.tap][to] = pixels[of]
    return reads.reshape(geometry.positions, geometry.taps)


def _is_transformed() -> bool:
    """Say whether a transform of `torch.func` is at work, which sees through plain operations only."""
    is_active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(is_active is not None and is_active())
