"""Small residual networks for 32 x 32 images: the paper's ResNet-8, and ResNet-18 with the CIFAR stem."""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from distributed import BatchNorm

SLOPE = 0.2  # of every LeakyReLU (paper, Table 5)


class _Block(nn.Module):
    """Pre-activation block without normalisation (paper, Table 5): two 3x3 convolutions and a shortcut.

    The shortcuts of blocks 2 to 4 are not printed in the paper: the pooled identity, or the identity.
    """

    def __init__(self, in_channels: int, channels: int, *, pool: bool, first: bool = False, norm: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()
        self.norm1, self.norm2 = (BatchNorm(channels) if norm else nn.Identity() for _ in range(2))
        self.pool, self.first = pool, first

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.first else F.leaky_relu(x, SLOPE)
        y = self.norm2(self.conv2(F.leaky_relu(self.norm1(self.conv1(y)), SLOPE)))
        if self.pool:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return self.shortcut(x) + y


class ResNet8(nn.Module):
    """ResNet-8 of the paper's Table 5: width F = 128 (256 for CIFAR-100), no normalisation layers.

    `norm=True` puts batch norm behind every 3x3 convolution: not the paper's network, but one that learns in
    minutes on a CPU (see RESULTS.md).

    Shape: (n, 3, H, W), H and W at least 4 -> (n, F).
    """

    def __init__(self, width: int = 128, norm: bool = False):
        super().__init__()
        self.blocks = nn.Sequential(
            _Block(3, width, pool=True, first=True, norm=norm),
            _Block(width, width, pool=True, norm=norm),
            _Block(width, width, pool=False, norm=norm),
            _Block(width, width, pool=False, norm=norm),
        )
        self.num_features = width
        self.to(memory_format=torch.channels_last)  # 1.4 times as fast on a CPU

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))


def resnet18_cifar() -> nn.Module:
    """torchvision's ResNet-18 with a 3x3 stem of stride 1 and no max pooling; 512 features.

    Its batch norm takes the statistics of all ranks.
    """
    net = torchvision.models.resnet18(weights=None, norm_layer=BatchNorm)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    net.fc = nn.Identity()
    net.num_features = 512
    return net.to(memory_format=torch.channels_last)
