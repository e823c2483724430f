"""VGG-small, the plain network on which binary methods for CIFAR-10 are compared (as in LQ-Nets, 1807.10029).

Six 3x3 convolutions of 128, 128, 256, 256, 512, 512 channels, the second of each pair followed by 2x2 maximum pooling,
each by a norm and an activation, and one linear layer: 4.66 M parameters, 0.61 G multiplications at 32 pixels.
Pooling comes before the norm: the maximum of signs would be +1 nearly everywhere.
"""

from __future__ import annotations

from torch import Tensor, nn

from .resnet_cifar import Activation, make_activation


class VGGSmall(nn.Module):
    """Images [batch, in_channels, image_size, image_size] -> logits [batch, num_classes]."""

    def __init__(self, num_classes: int, width: int, in_channels: int, image_size: int, activation: Activation) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = in_channels
        for index in range(6):
            out_channels = width * 2 ** (index // 2)
            self.features.append(nn.Conv2d(channels, out_channels, 3, padding=1, bias=False))
            if index % 2:
                self.features.append(nn.MaxPool2d(2))
            self.features.append(nn.BatchNorm2d(out_channels))
            self.features.append(make_activation(activation, out_channels))
            channels = out_channels
        self.classifier = nn.Linear(channels * (image_size // 8) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def vgg_small(
    num_classes: int = 10,
    width: int = 128,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    activation: Activation = "hardtanh",
) -> VGGSmall:
    """VGG-small; see the module. width: channels of the first pair. image_size: at least 8 pixels."""
    if image_size < 8:
        raise ValueError(f"three poolings need an image_size of at least 8 pixels, not {image_size}")
    return VGGSmall(num_classes, width, in_channels, image_size, activation)
