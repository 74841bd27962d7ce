"""Convolutional networks to lift: random ones of every option that torch's convolutions have, and a few by hand."""

from collections.abc import Sequence

import torch
from tests.zoo import randomize_
from torch import Tensor, nn

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOL = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Residual(nn.Module):
    """Adds what its branch computes to what goes in."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Asymmetric(nn.Module):
    """Pads one side only before a convolution, as ported code does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 3, (3, 2), stride=(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, (0, 1, 2, 0)))


def random_cnn(seed: int) -> tuple[nn.Module, Tensor]:
    """Draw a net of two convolutions with random options, and a batch for it, in double precision."""
    generator = torch.Generator().manual_seed(seed)

    def one_of(*choices: object) -> object:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    dims = (2, 1, 2, 3)[seed % 4]
    size = [int(one_of(5, 6, 7)) for _ in range(dims)] if dims < 3 else [4, 5, 3]
    groups = int(one_of(1, 1, 2))
    mode = str(one_of("zeros", "zeros", "reflect", "replicate", "circular"))
    kernel = [int(one_of(1, 2, 3)) for _ in range(dims)]
    padding: object = one_of("same", "valid", [int(one_of(0, 1)) for _ in range(dims)])
    stride = 1 if padding == "same" else [int(one_of(1, 2)) for _ in range(dims)]
    dilation = int(one_of(1, 2)) if min(size) > 2 * max(kernel) - 2 else 1
    first = _CONV[dims - 1](
        2, 4, kernel, stride, padding, dilation, groups, bias=bool(one_of(True, False)), padding_mode=mode
    )
    branch = (
        _CONV[dims - 1](4, 6, 3, padding=1),
        nn.Tanh(),
        _CONV[dims - 1](6, 4, 2, padding="same", groups=2, bias=False),
    )
    extra: Sequence[nn.Module] = (_AVERAGE[dims - 1](1),) if seed % 3 else (nn.Dropout(0.5),)
    net = nn.Sequential(
        *(first, _NORM[dims - 1](4), nn.ReLU(), Residual(*branch), *extra),
        *(_POOL[dims - 1](1), nn.Flatten(), nn.Linear(4, 3)),
    )
    return randomize_(net, seed).double().eval(), torch.randn(3, 2, *size, generator=generator, dtype=torch.float64)


def normed() -> tuple[nn.Module, Tensor, Tensor]:
    """Build a net with BatchNorm and a skip connection, a batch and its classes."""
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(Residual(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh()), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, 3)),
    )
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(6, 2, 8, 8, generator=generator, dtype=torch.float64)
    return randomize_(net, 4).double(), images, torch.randint(3, (6,), generator=generator)
