"""Vision transformers in the sizes of DeiT (Training data-efficient image transformers, arXiv 2012.12877).

Patches by a convolution, a class token, learned positions; pre-norm blocks x + attention(norm(x)), x + mlp(norm(x));
norm; logits from the class token. With distillation a second token has a head of its own: training takes both logits,
evaluation their mean.

    deit_tiny     192 features, 12 blocks, 3 heads     5.72 M parameters at 224 pixels, patches of 16
    deit_small    384 features, 12 blocks, 6 heads     22.05 M
    vit_tiny      96 features, 6 blocks, 3 heads       0.68 M at 32 pixels, patches of 4: a size to experiment with
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import SelfAttention

_MLP_RATIO = 4
_NORM_EPS = 1e-6


class Mlp(nn.Module):
    """x [..., features] -> the same shape."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.activation = nn.GELU()
        self.output = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activation(self.hidden(x)))


class TransformerBlock(nn.Module):
    """x [batch, tokens, features] -> the same shape."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(features, eps=_NORM_EPS)
        self.attention = SelfAttention(features, heads)
        self.mlp_norm = nn.LayerNorm(features, eps=_NORM_EPS)
        self.mlp = Mlp(features, _MLP_RATIO * features)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nn.Module):
    """Images [batch, in_channels, image_size, image_size] -> logits [batch, num_classes].

    distilled: with a distillation token; in training mode the result is (logits, logits of that token).
    Raises ValueError if the patches do not tile the image.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_size: int,
        patch_size: int,
        features: int,
        depth: int,
        heads: int,
        in_channels: int = 3,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patches of {patch_size} do not tile an image of {image_size} pixels")
        self.patches = nn.Conv2d(in_channels, features, patch_size, patch_size)
        self.tokens = nn.Parameter(torch.zeros(1 + distilled, features))
        positions = (image_size // patch_size) ** 2 + 1 + distilled
        self.positions = nn.Parameter(torch.zeros(positions, features))
        self.blocks = nn.Sequential(*(TransformerBlock(features, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(features, eps=_NORM_EPS)
        self.head = nn.Linear(features, num_classes)
        self.distillation_head = nn.Linear(features, num_classes) if distilled else None
        nn.init.trunc_normal_(self.tokens, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.tokens.expand(len(x), -1, -1)
        x = self.norm(self.blocks(torch.cat([tokens, patches], 1) + self.positions))
        logits = self.head(x[:, 0])
        if self.distillation_head is None:
            return logits
        distilled = self.distillation_head(x[:, 1])
        return (logits, distilled) if self.training else (logits + distilled) / 2


def vit_tiny(
    num_classes: int = 10, *, image_size: int = 32, patch_size: int = 4, in_channels: int = 3
) -> VisionTransformer:
    """The smallest; see the module."""
    return VisionTransformer(
        num_classes,
        image_size=image_size,
        patch_size=patch_size,
        features=96,
        depth=6,
        heads=3,
        in_channels=in_channels,
    )


def deit_tiny(num_classes: int = 1000, *, image_size: int = 224, distilled: bool = False) -> VisionTransformer:
    """DeiT-Ti; see the module."""
    return VisionTransformer(
        num_classes, image_size=image_size, patch_size=16, features=192, depth=12, heads=3, distilled=distilled
    )


def deit_small(num_classes: int = 1000, *, image_size: int = 224, distilled: bool = False) -> VisionTransformer:
    """DeiT-S; see the module."""
    return VisionTransformer(
        num_classes, image_size=image_size, patch_size=16, features=384, depth=12, heads=6, distilled=distilled
    )
