"""VGG networks for 32×32 images, every width explicit."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from thalweg.errors import ConfigError
from thalweg.nets.activation import Activation, activation_module
from thalweg.nets.head import linear_head
from thalweg.nets.norm import Norm, norm_2d
from thalweg.nets.widths import checked_widths

VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Stages of 3×3 convolutions, each closed by a 2×2 max pooling, then linear layers.

    Args:
        stages: channels of every convolution, stage by stage.
        hidden: widths of the hidden linear layers.
        in_channels: channels of the images.
        image_size: height and width of the images.
        num_classes: number of outputs.
        activation: after every layer but the last.
        norm: "batch" or "none", after every convolution.
        dropout: share of the inputs of every linear layer that training drops.

    Raises:
        ConfigError: a width that is not positive, images too small for the stages, or an unknown name.

    Source:
        Layout of the VGG16 of anokhin2020lowloss (arXiv 2008.00741): no norm, classifier 512-512-10.

    Example:
        >>> import torch
        >>> net = VGG(((4, 4), (6,)), hidden=(5,), image_size=8)
        >>> tuple(net(torch.zeros(2, 3, 8, 8)).shape)
        (2, 10)
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]] = VGG16_STAGES,
        hidden: Sequence[int] = (512,),
        *,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
        activation: Activation = "relu",
        norm: Norm = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        plan = tuple(checked_widths("stages", stage, at_least=1) for stage in stages)
        size = image_size // 2 ** len(plan)
        if size < 1 or not plan:
            raise ConfigError(
                f"Expected images of at least {2 ** len(plan)} pixels for {len(plan)} stages. "
                f"Got image_size={image_size}. Use fewer stages or larger images."
            )
        layers: list[nn.Module] = []
        old = in_channels
        for stage in plan:
            for new in stage:
                layers += [nn.Conv2d(old, new, 3, padding=1, bias=norm == "none"), *norm_2d(norm, new)]
                layers.append(activation_module(activation))
                old = new
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = linear_head((old * size * size, *hidden, num_classes), activation, dropout=dropout)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Compute the logits."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits


def vgg16(width_multiplier: float = 1.0, *, num_classes: int = 10, norm: Norm = "none", dropout: float = 0.0) -> VGG:
    """Build VGG16 for 32×32 images, all widths scaled together: 15.0 million parameters at 1.

    Args:
        width_multiplier: factor on every width, rounded, at least 1 channel.
        num_classes: number of outputs.
        norm: "batch" or "none".
        dropout: share dropped before every linear layer.

    Returns:
        The net.

    Raises:
        ConfigError: an unknown norm.

    Source:
        anokhin2020lowloss (arXiv 2008.00741); the authors' code trains it with dropout.

    Example:
        >>> sum(p.numel() for p in vgg16(1 / 64).parameters())
        3846
    """

    def scaled(width: int) -> int:
        return max(1, round(width * width_multiplier))

    stages = tuple(tuple(scaled(width) for width in stage) for stage in VGG16_STAGES)
    return VGG(stages, (scaled(512),), num_classes=num_classes, norm=norm, dropout=dropout)
