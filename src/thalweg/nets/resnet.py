"""Residual networks for small images, every width explicit: streams, and hidden channels of every block."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.errors import ConfigError
from thalweg.nets.norm import Norm, norm_2d
from thalweg.nets.widths import checked_widths


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), with 3×3 convolutions.

    Args:
        width_in: channels that come in.
        hidden: channels between the two convolutions.
        width_out: channels that go out.
        stride: of the first convolution and of the shortcut.
        projection: shortcut by 1×1 convolution and norm; else the identity.
        norm: "batch" or "none".

    Raises:
        ConfigError: an identity shortcut between unlike shapes, or an unknown norm.

    Example:
        >>> tuple(ResidualBlock(2, 5, 3, stride=2, projection=True)(torch.zeros(1, 2, 4, 4)).shape)
        (1, 3, 2, 2)
    """

    def __init__(
        self,
        width_in: int,
        hidden: int,
        width_out: int,
        *,
        stride: int = 1,
        projection: bool = False,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        if not projection and (stride != 1 or width_in != width_out):
            raise ConfigError(
                f"Expected a projection between {width_in} and {width_out} channels at stride {stride}. "
                "Got an identity shortcut. Set projection=True."
            )
        bias = norm == "none"
        self.residual = nn.Sequential(
            nn.Conv2d(width_in, hidden, 3, stride=stride, padding=1, bias=bias),
            *norm_2d(norm, hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, width_out, 3, padding=1, bias=bias),
            *norm_2d(norm, width_out),
        )
        self.shortcut = nn.Sequential()
        if projection:
            conv = nn.Conv2d(width_in, width_out, 1, stride=stride, bias=bias)
            self.shortcut = nn.Sequential(conv, *norm_2d(norm, width_out))

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outgoing rows columns"]:
        """Compute the outgoing feature maps."""
        return torch.relu(self.residual(x) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages of residual blocks, the mean over all positions, a linear layer.

    Each stage has one stream; its first block halves the resolution (but in the first stage). Every width is
    an argument of its own, so every widened net is built by this constructor: keep `projections` as the
    narrow net has them.

    Args:
        stem: channels of the first convolution.
        channels: channels of the stream of each stage.
        hidden: hidden channels of every block, stage by stage; its lengths are the numbers of blocks.
        projections: whether the first block of each stage has a projection shortcut. Default: where the
            identity does not fit.
        in_channels: channels of the images.
        num_classes: number of outputs.
        norm: "batch" or "none".

    Raises:
        ConfigError: a width that is not positive, lists of unlike lengths, or an identity that does not fit.

    Source:
        he2016deep (arXiv 1512.03385), section 4.2, with projections (option B) for its padding.

    Example:
        >>> net = ResNet(stem=4, channels=(4, 6), hidden=((5,), (7, 3)))
        >>> tuple(net(torch.zeros(2, 3, 8, 8)).shape)
        (2, 10)
    """

    def __init__(
        self,
        *,
        stem: int = 16,
        channels: Sequence[int] = (16, 32, 64),
        hidden: Sequence[Sequence[int]] = ((16,) * 3, (32,) * 3, (64,) * 3),
        projections: Sequence[bool] | None = None,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        streams = checked_widths("stem and channels", (stem, *channels), at_least=2)
        plan = tuple(checked_widths("hidden", stage, at_least=1) for stage in hidden)
        if projections is None:
            projections = tuple(s > 0 or old != new for s, (old, new) in enumerate(pairwise(streams)))
        if not len(streams) - 1 == len(plan) == len(projections):
            raise ConfigError(
                "Expected channels, hidden and projections with one entry per stage. "
                f"Got {len(streams) - 1}, {len(plan)} and {len(projections)}. Make them equally long."
            )
        conv = nn.Conv2d(in_channels, stem, 3, padding=1, bias=norm == "none")
        self.stem = nn.Sequential(conv, *norm_2d(norm, stem), nn.ReLU())
        self.stages = nn.ModuleList()
        for number, widths in enumerate(plan):
            old, new = streams[number : number + 2]
            stride = 1 if number == 0 else 2
            first = ResidualBlock(old, widths[0], new, stride=stride, projection=projections[number], norm=norm)
            self.stages.append(nn.Sequential(first, *(ResidualBlock(new, w, new, norm=norm) for w in widths[1:])))
        self.head = nn.Linear(streams[-1], num_classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Compute the logits."""
        maps = self.stem(images)
        for stage in self.stages:
            maps = stage(maps)
        logits: Tensor = self.head(maps.mean(dim=(2, 3)))
        return logits


def resnet20(
    width_multiplier: float = 1.0, *, in_channels: int = 3, num_classes: int = 10, norm: Norm = "batch"
) -> ResNet:
    """Build the 20-layer residual net for 32×32 images: streams of 16, 32, 64 channels, three blocks each.

    Args:
        width_multiplier: factor on every width, rounded, at least 1 channel.
        in_channels: channels of the images.
        num_classes: number of outputs.
        norm: "batch" or "none".

    Returns:
        The net.

    Raises:
        ConfigError: an unknown norm.

    Example:
        >>> sum(p.numel() for p in resnet20().parameters())
        272474
    """
    widths = tuple(max(1, round(width * width_multiplier)) for width in (16, 32, 64))
    return ResNet(
        stem=widths[0],
        channels=widths,
        hidden=tuple((width,) * 3 for width in widths),
        in_channels=in_channels,
        num_classes=num_classes,
        norm=norm,
    )
