"""Small convolutional networks of the zoo: plain modules as a user would write them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def vgg() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(5, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(7 * 2 * 2, 6), nn.ReLU(), nn.Linear(6, 2)),
    )


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.AvgPool2d(2)),
        *(nn.Conv2d(4, 6, 3), nn.Sigmoid(), nn.AvgPool2d(2)),
        *(
            nn.Flatten(),
            nn.Linear(6 * 2 * 2, 9),
            nn.Sigmoid(),
            nn.Linear(9, 7),
            nn.Sigmoid(),
            nn.Linear(7, 2),
        ),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv1d(5, 4, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)),
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU6()),
        *(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 4, 1)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )


def depthwise_multiplier() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 12, 3, padding=1, groups=4), nn.ReLU()),
        *(nn.Conv2d(12, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)),
    )


def grouped_conv() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 10, 3, padding=1, groups=2), nn.ReLU()),
        *(nn.Conv2d(10, 7, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 2)),
    )


def group_norm() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU()),
        *(nn.Conv2d(8, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)),
    )


def instance_norm() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3, padding=1), nn.InstanceNorm2d(5, affine=True), nn.LeakyReLU(0.1)),
        *(nn.Conv2d(5, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )


def autoencoder() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Conv2d(3, 5, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(5, 7, 3, stride=2, padding=1),
            nn.ReLU(),
        ),
        *(nn.ConvTranspose2d(7, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Sigmoid()),
    )


class _Block(nn.Module):
    def __init__(self, channels_in: int, hidden: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, hidden, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(_Block(4, 5, 4), _Block(4, 7, 6, stride=2), _Block(6, 9, 6)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
    )


class PaddedShortcut(nn.Module):
    """Option A of the ResNet paper: the shortcut strides and pads the channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(7)
        self.conv2 = nn.Conv2d(7, 10, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        h = F.relu(h + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3)))
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        self.norm3, self.head = nn.BatchNorm2d(12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], dim=1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], dim=1)
        return self.head(F.relu(self.norm3(x)).mean(dim=(2, 3)))


class SqueezeExcite(nn.Module):
    """Channel gates computed from the pooled channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.squeeze = nn.Conv2d(6, 3, 1)
        self.excite = nn.Conv2d(3, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1)))))
        return self.head((h * gate).mean(dim=(2, 3)))


class ChannelShuffle(nn.Module):
    """A grouped convolution whose channels are shuffled before the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 12, 1)
        self.grouped = nn.Conv2d(12, 15, 3, padding=1, groups=3)
        self.mix = nn.Conv2d(15, 8, 1)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.grouped(F.relu(self.stem(x))))
        batch, channels, rows, columns = h.shape
        h = h.view(batch, 3, channels // 3, rows, columns).transpose(1, 2).reshape(batch, channels, rows, columns)
        return self.head(F.relu(self.mix(h)).mean(dim=(2, 3)))


class Branches(nn.Module):
    """An inception-like block: chunks of one layer go separate ways and are concatenated again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 9, 3, padding=1)
        self.left = nn.Conv2d(4, 3, 1)
        self.right = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).split([4, 5], dim=1)
        h = torch.cat([F.relu(self.left(left)), F.relu(self.right(right))], dim=1)
        return self.head(F.adaptive_max_pool2d(h, 1).flatten(1))


class UNet(nn.Module):
    """Down, up by interpolation, and a skip connection by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 4, 3, padding=1)
        self.down2 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.up = nn.Conv2d(10, 5, 3, padding=1)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.down1(x))
        coarse = F.interpolate(F.relu(self.down2(fine)), scale_factor=2, mode="nearest")
        return self.out(F.relu(self.up(torch.cat([fine, coarse], dim=1))))


class PixelShuffle(nn.Module):
    """Sub-pixel upsampling: channels (units, 2, 2) turn into a finer image."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(F.pixel_shuffle(self.first(x), 2)))
