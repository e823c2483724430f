"""Self-attention in separate pieces, so that each product and its inputs can be counted, quantised or replaced.

    A = softmax(q k^T / sqrt(d) + mask),   out = W_o (A v) + b_o        per head, d = features / heads

`query`, `key`, `value`, `output` are linear layers; `scores` and `mix` are modules for the two products of activations;
`normalizer` is the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.product import Product


class SelfAttention(nn.Module):
    """x [batch, tokens, features] -> the same shape.

    Raises ValueError if the heads do not divide the features.
    """

    def __init__(self, features: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if features % heads:
            raise ValueError(f"{features} features cannot be divided among {heads} heads; take a divisor")
        self.heads = heads
        self.query = nn.Linear(features, features)
        self.key = nn.Linear(features, features)
        self.value = nn.Linear(features, features)
        self.scores = Product()
        self.normalizer = nn.Softmax(-1)
        self.dropout = nn.Dropout(dropout)
        self.mix = Product()
        self.output = nn.Linear(features, features)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: [batch, tokens], true for the tokens that may be looked at; every text has at least one."""
        query, key, value = (self._by_head(layer(x)) for layer in (self.query, self.key, self.value))
        scores = self.scores(query, key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        if mask is not None:
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask.bool()[:, None, None, :], lowest)
        mixed = self.mix(self.dropout(self.normalizer(scores)), value)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
