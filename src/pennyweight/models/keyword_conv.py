"""A convolutional network that spots spoken keywords: DS-CNN-S of Hello Edge (arXiv 1711.07128).

Input: cepstral coefficients, 49 frames of 10. A 10x4 convolution of stride 2 to 64 channels, then four times a 3x3
depthwise and a 1x1 convolution of 64 channels, each with a norm and a ReLU; average; linear layer. 23.2 k parameters,
2.66 M multiplications (the paper counts 5.4 M operations, additions included).
"""

from __future__ import annotations

from torch import Tensor, nn

from .resnet_cifar import Activation, make_activation


class KeywordConv(nn.Module):
    """Coefficients [batch, 1, frames, coefficients] -> logits [batch, num_classes]; any number of frames."""

    def __init__(self, num_classes: int, width: int, depth: int, activation: Activation) -> None:
        super().__init__()

        def with_norm(convolution: nn.Conv2d) -> nn.Sequential:
            return nn.Sequential(convolution, nn.BatchNorm2d(width), make_activation(activation, width))

        self.stem = with_norm(nn.Conv2d(1, width, (10, 4), 2, padding=(5, 1), bias=False))
        self.blocks = nn.Sequential()
        for _ in range(depth):
            self.blocks.append(with_norm(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)))
            self.blocks.append(with_norm(nn.Conv2d(width, width, 1, bias=False)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def keyword_conv(
    num_classes: int = 12, width: int = 64, *, depth: int = 4, activation: Activation = "relu"
) -> KeywordConv:
    """DS-CNN-S; see the module. A binary one takes activation="hardtanh": the sign of a ReLU is +1 everywhere."""
    return KeywordConv(num_classes, width, depth, activation)
