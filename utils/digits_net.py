"""A small residual network for the 8x8 digits of scikit-learn: the whole tool chain in seconds, no download."""

from collections import OrderedDict

import torch
from torch import nn

from utils.preprocess import Preprocess

DIGITS_CLASSES = 10
DIGITS_PREPROCESS = Preprocess(mean=(0.3,), std=(0.375,), resize=None, input_size=8, channels=1)


class ConvBlock(nn.Module):
    """3x3 convolution, BN and, unless it ends a residual branch, ReLU: [N, I, H, W] -> [N, O, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, activate: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.activ = nn.ReLU(inplace=True) if activate else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float32 [N, I, H, W]."""
        return self.activ(self.bn(self.conv(x)))


class ResidualUnit(nn.Module):
    """relu(x + body(x)) with two 3x3 convolutions; shape and channels stay."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBlock(channels, channels)
        self.conv2 = ConvBlock(channels, channels, activate=False)
        self.activ = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float32 [N, C, H, W]."""
        return self.activ(self.conv2(self.conv1(x)) + x)


class DigitsNet(nn.Module):
    """33,322 parameters at 10 classes; grey 8x8 images: float32 [N, 1, 8, 8] -> logits float32 [N, num_classes]."""

    def __init__(self, num_classes: int = DIGITS_CLASSES) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                init_block=ConvBlock(1, 32),
                unit=ResidualUnit(32),
                down=ConvBlock(32, 48, stride=2),
                pool=nn.AdaptiveAvgPool2d(1),
            )
        )
        self.output = nn.Linear(48, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float32 [N, 1, 8, 8], normalised."""
        return self.output(torch.flatten(self.features(x), 1))
