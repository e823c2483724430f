"""PointNet for classifying point clouds: Deep Learning on Point Sets, arXiv 1612.00593.

A network on each point alone, then the maximum over the points, so that their order does not matter:

    x = T3(x) x;  h = mlp(64, 64)(x);  h = T64(h) h;  h = mlp(64, 128, 1024)(h);  logits = mlp(512, 256, k)(max of h)

T3 and T64 predict a matrix from all points (mlp(64, 128, 1024), max, mlp(512, 256, n^2), plus the identity, which is
where they start). A norm and a ReLU after each layer but the last. 3.48 M parameters, 440 M multiplications; without
the two transforms ("vanilla") 0.8 M and 148 M [paper, 1000 points].

The paper adds 0.001 |I - A A^T|^2 to the loss, A the second matrix: what the module `feature_transform` returns.

Departure: the layers that yield the matrices start with weights of deviation 0.001, not 0, which has no sign.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.product import Product
from .resnet_cifar import Activation, make_activation

_DROPOUT = 0.3
_TRANSFORM_DEVIATION = 1e-3


def _per_point(channels: int, widths: tuple[int, ...], activation: Activation) -> nn.Sequential:
    """Layers shared by the points: [batch, channels, points] -> [batch, widths[-1], points]."""
    layers = nn.Sequential()
    for width in widths:
        layers.extend([nn.Conv1d(channels, width, 1), nn.BatchNorm1d(width), make_activation(activation, width)])
        channels = width
    return layers


def _on_cloud(channels: int, widths: tuple[int, ...], activation: Activation) -> nn.Sequential:
    """Layers on what is known of the whole cloud: [batch, channels] -> [batch, widths[-1]]."""
    layers = nn.Sequential()
    for width in widths:
        layers.extend([nn.Linear(channels, width), nn.BatchNorm1d(width), make_activation(activation, width)])
        channels = width
    return layers


class Transform(nn.Module):
    """Predicts a matrix: [batch, channels, points] -> [batch, channels, channels]; at the start nearly the identity."""

    def __init__(self, channels: int, activation: Activation) -> None:
        super().__init__()
        self.points = _per_point(channels, (64, 128, 1024), activation)
        self.cloud = _on_cloud(1024, (512, 256), activation)
        self.matrix = nn.Linear(256, channels * channels)
        nn.init.normal_(self.matrix.weight, std=_TRANSFORM_DEVIATION)
        with torch.no_grad():
            self.matrix.bias.copy_(torch.eye(channels).flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix(self.cloud(self.points(x).amax(2))).view(len(x), x.shape[1], x.shape[1])


class PointNet(nn.Module):
    """Points [batch, 3, points] -> logits [batch, num_classes]; any number of points, in any order."""

    def __init__(self, num_classes: int, transforms: bool, activation: Activation) -> None:
        super().__init__()
        self.input_transform = Transform(3, activation) if transforms else None
        self.feature_transform = Transform(64, activation) if transforms else None
        self.rotate_points = Product()
        self.rotate_features = Product()
        self.early = _per_point(3, (64, 64), activation)
        self.late = _per_point(64, (64, 128, 1024), activation)
        self.cloud = _on_cloud(1024, (512, 256), activation)
        self.dropout = nn.Dropout(_DROPOUT)
        self.head = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_transform is not None:
            x = self.rotate_points(self.input_transform(x), x)
        x = self.early(x)
        if self.feature_transform is not None:
            x = self.rotate_features(self.feature_transform(x), x)
        return self.head(self.dropout(self.cloud(self.late(x).amax(2))))


def pointnet(num_classes: int = 40, *, transforms: bool = True, activation: Activation = "relu") -> PointNet:
    """PointNet; see the module. A binary one takes activation="hardtanh": the sign of a ReLU is +1 everywhere."""
    return PointNet(num_classes, transforms, activation)
