"""Residual networks for small images: ResNet-18 in its CIFAR form and ResNet-20 (Deep Residual Learning, 1512.03385).

    resnet18_cifar    3x3 stem to 64 channels, no pooling, stages of 64, 128, 256, 512 with 2 blocks each; where the
                      shape changes the shortcut is a 1x1 convolution with a norm. 11.17 M parameters, 0.56 G
                      multiplications
    resnet20          3x3 stem to 16 channels, stages of 16, 32, 64 with 3 blocks each; where the shape changes the
                      shortcut drops every other pixel and pads channels with zeros on both sides ("option A": no
                      parameters). 0.27 M parameters, 40.6 M multiplications

Two options make the same networks fit for signs. A sign behind a ReLU is +1 everywhere, so binary networks take
activation="hardtanh" (BiBench) or "prelu". shortcut_around="convolution" (Bi-Real net, 1808.00278) leads a shortcut
around each convolution instead of each pair: real values then pass by every sign.

Parameter names are those of the widespread CIFAR implementations (conv1, bn1, layer1.0.conv1, ..., linear), so that
their checkpoints load.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["relu", "hardtanh", "prelu"]
ShortcutAround = Literal["block", "convolution"]


def make_activation(name: Activation, channels: int) -> nn.Module:
    """The activation of that name. Raises ValueError for another."""
    if name == "relu":
        return nn.ReLU()
    if name == "hardtanh":
        return nn.Hardtanh()
    if name == "prelu":
        return nn.PReLU(channels)
    raise ValueError(f"activation must be 'relu', 'hardtanh' or 'prelu', not {name!r}")


class SubsamplePad(nn.Module):
    """The shortcut without parameters: every stride-th pixel, new channels of zeros, half before and half after."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = out_channels - channels, stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


def projection(channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """The shortcut with parameters: a 1x1 convolution and a norm."""
    convolution = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: [batch, channels, h, w] -> [batch, out_channels, h / stride, w / stride].

    In the order convolution, norm, (shortcut,) activation.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        stride: int,
        shortcut: nn.Module,
        activation: Activation,
        shortcut_around: ShortcutAround,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = make_activation(activation, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = make_activation(activation, out_channels)
        self.shortcut = shortcut
        self.shortcut_around = shortcut_around

    def forward(self, x: Tensor) -> Tensor:
        hidden, around = self.bn1(self.conv1(x)), self.shortcut(x)
        if self.shortcut_around == "convolution":
            hidden = around = self.act1(hidden + around)
        else:
            hidden = self.act1(hidden)
        return self.act2(self.bn2(self.conv2(hidden)) + around)


class ResNet(nn.Module):
    """Images [batch, in_channels, h, w] -> logits [batch, num_classes]; any size, the last stage is averaged over.

    blocks: how many each stage has; stage i is width * 2^i wide and, but for the first, halves the image.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int,
        shortcut: Literal["projection", "subsample"],
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        activation: Activation = "relu",
        shortcut_around: ShortcutAround = "block",
    ) -> None:
        super().__init__()
        if shortcut_around not in ("block", "convolution"):
            raise ValueError(f"shortcut_around must be 'block' or 'convolution', not {shortcut_around!r}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = make_activation(activation, width)
        make_shortcut = projection if shortcut == "projection" else SubsamplePad
        channels = width
        for index, count in enumerate(blocks):
            stage, out_channels = nn.Sequential(), width * 2**index
            for block in range(count):
                stride = 2 if index and not block else 1
                same = stride == 1 and channels == out_channels
                around = nn.Sequential() if same else make_shortcut(channels, out_channels, stride)
                stage.append(BasicBlock(channels, out_channels, stride, around, activation, shortcut_around))
                channels = out_channels
            self.add_module(f"layer{index + 1}", stage)
        self.stages = len(blocks)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        for index in range(self.stages):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return self.linear(x.mean((2, 3)))


def resnet18_cifar(
    num_classes: int = 10,
    width: int = 64,
    *,
    in_channels: int = 3,
    activation: Activation = "relu",
    shortcut_around: ShortcutAround = "block",
) -> ResNet:
    """ResNet-18 for images of about 32 pixels; see the module. width: channels of the first stage."""
    return ResNet(
        (2, 2, 2, 2),
        width,
        "projection",
        num_classes=num_classes,
        in_channels=in_channels,
        activation=activation,
        shortcut_around=shortcut_around,
    )


def resnet20(
    num_classes: int = 10,
    width: int = 16,
    *,
    in_channels: int = 3,
    activation: Activation = "relu",
    shortcut_around: ShortcutAround = "block",
) -> ResNet:
    """ResNet-20 for images of about 32 pixels; see the module. width: channels of the first stage."""
    return ResNet(
        (3, 3, 3),
        width,
        "subsample",
        num_classes=num_classes,
        in_channels=in_channels,
        activation=activation,
        shortcut_around=shortcut_around,
    )
