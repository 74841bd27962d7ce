"""The locally-connected layer: a convolution whose weights are not shared, with a kernel for each output position."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import ShapeError
from thalweg.lifting.geometry import Geometry, local_ties
from thalweg.lifting.patches import Patches


class LocallyConnected(nn.Module):
    """Connect every output position to its patch of the input, with a kernel of its own.

    For inputs x of shape (batch, in_channels, *input_size), with weights W and biases b,

        out[n, o, y] = b[o, y] + Σ_{c, i} W[y, o, i, c] · x[n, c, y·stride + i·dilation - padding],

    where what lies outside the input is 0: a convolution whose weights depend on the position y. Computed by batched
    matrix products over patches, a few megabytes of them at a time. Weights that read nothing but
    padding are 0, and stay 0 under gradients and weight decay alike.

    Args:
        in_channels: channels that go in.
        out_channels: channels that come out.
        kernel_size: taps along each spatial dim.
        input_size: spatial size of the inputs: a number for each dim.
        stride: step of the patches.
        padding: zeros on both sides of each dim; a pair for a dim gives those before and after.
        dilation: distance of the taps.
        groups: blocks of channels that do not read each other.
        bias: whether each output position has a bias of its own.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: of shape (*output_size, out_channels, *kernel_size, in_channels / groups). Starts as torch's
            convolutions do, uniform within ±1/sqrt(fan-in), but for what reads padding.
        bias: of shape (out_channels, *output_size), the same; None without.

    Raises:
        ShapeError: sizes that are not positive or do not fit together, or are no numbers.

    Source:
        The relaxation that dascoli2019finding (arXiv 1906.06766, section 5) names as promising: no weight sharing,
        locality kept. Forward pass ours.

    Example:
        >>> layer = LocallyConnected(3, 8, (3, 3), (5, 7), stride=(2, 2), padding=(1, 1))
        >>> tuple(layer(torch.zeros(4, 3, 5, 7)).shape), tuple(layer.weight.shape)
        ((4, 8, 3, 4), (3, 4, 8, 3, 3, 3))
    """

    def __init__(  # noqa: PLR0913 - those of torch's convolutions
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int] | int,
        input_size: Sequence[int],
        *,
        stride: Sequence[int] | int = 1,
        padding: Sequence[int | Sequence[int]] | int = 0,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.geometry = _geometry(
            (in_channels, out_channels, groups), kernel_size, input_size, stride, padding, dilation
        )
        self._patches = Patches(self.geometry)
        size, kernel = self.geometry.output_size, self.geometry.kernel_size
        shape = (*size, out_channels, *kernel, in_channels // groups)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty((out_channels, *size), device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        if self.weight.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's global generator, like every layer of torch."""
        fan_in = math.prod(self.weight.shape[len(self.geometry.input_size) + 1 :])
        bound = 1 / math.sqrt(fan_in)
        with torch.no_grad():
            drawn = torch.empty_like(self.weight).uniform_(-bound, bound)
            self.weight.zero_()
            for (_, own), (_, new) in zip(
                local_ties(self.geometry, self.weight), local_ties(self.geometry, drawn), strict=True
            ):
                own.copy_(new)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer to inputs of shape (batch, in_channels, *input_size).

        Args:
            inputs: a batch, or one sample without the batch's dim.

        Returns:
            Outputs of shape (batch, out_channels, *output_size).

        Raises:
            ShapeError: inputs of other channels, another size or another type than the layer was made for.
        """
        geometry = self.geometry
        dims, wanted = len(geometry.input_size), (geometry.in_channels, *geometry.input_size)
        if inputs.ndim not in (dims + 1, dims + 2) or tuple(inputs.shape[-dims - 1 :]) != wanted:
            raise ShapeError(
                f"Expected inputs of shape (batch, {', '.join(map(str, wanted))}). Got {tuple(inputs.shape)}. A "
                "locally-connected layer has a kernel for each position: make one for this size."
            )
        kind = inputs.device.type
        is_lowered = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if inputs.dtype != self.weight.dtype and not is_lowered:
            raise ShapeError(
                f"Expected inputs of type {self.weight.dtype}, that of the weights. Got {inputs.dtype}. Convert one."
            )
        batched = inputs if inputs.ndim == dims + 2 else inputs.unsqueeze(0)
        rows = batched.reshape(len(batched), geometry.in_channels, geometry.pixels)
        kernels = self.weight.reshape(geometry.positions, geometry.out_channels, geometry.taps, -1)
        if is_lowered and rows.dtype != torch.float64:  # as torch's convolutions do
            low = torch.get_autocast_dtype(kind)
            rows, kernels = rows.to(low), kernels.to(low)
        found = self._patches.outputs(rows, kernels)
        outputs = found.reshape(len(batched), geometry.out_channels, *geometry.output_size)
        if self.bias is not None:
            outputs = outputs + self.bias.to(outputs.dtype)
        return outputs if batched is inputs else outputs.squeeze(0)

    def extra_repr(self) -> str:
        """Describe the layer as torch's convolutions do."""
        g = self.geometry
        return (
            f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, input_size={g.input_size}, "
            f"stride={g.stride}, padding={g.padding}, dilation={g.dilation}, groups={g.groups}, "
            f"bias={self.bias is not None}"
        )


def _geometry(
    channels: tuple[int, int, int], kernel_size: Any, input_size: Any, stride: Any, padding: Any, dilation: Any
) -> Geometry:
    """Read sizes as torch's convolutions take them: one number for all dims, or one for each."""
    try:
        dims = len(tuple(input_size))
        pads = (padding,) * dims if isinstance(padding, int) else tuple(padding)
        pairs = tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in pads)
        sizes = [(n,) * dims if isinstance(n, int) else tuple(n) for n in (kernel_size, stride, dilation)]
        return Geometry(*channels[:2], tuple(input_size), sizes[0], sizes[1], pairs, sizes[2], channels[2])
    except (TypeError, ValueError, IndexError) as error:
        if isinstance(error, ShapeError):
            raise
        raise ShapeError(
            "Expected input_size as one number for each spatial dim, all others likewise or as one number. Got "
            f"input_size={input_size!r}, kernel_size={kernel_size!r}, stride={stride!r}, padding={padding!r}, "
            f"dilation={dilation!r}. Write them out, as (32, 32)."
        ) from error
