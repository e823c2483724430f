"""BERT-tiny for classifying texts (Well-Read Students Learn Better, arXiv 1908.08962): 2 layers, 128 features, 2 heads.

Embeddings of words, positions and segments are added and normed; post-norm blocks norm(x + attention(x)),
norm(x + mlp(x)); tanh of a linear layer on the first token; logits. 4.39 M parameters with the vocabulary of
bert-base-uncased, 3.9 M of them its table; functions and formulas are those of transformers' BertModel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import DataError
from .attention import SelfAttention
from .vision_transformer import Mlp

_NORM_EPS = 1e-12
_DROPOUT = 0.1
_SEGMENTS = 2


class BertBlock(nn.Module):
    """x [batch, tokens, features] -> the same shape."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(features, heads, _DROPOUT)
        self.attention_norm = nn.LayerNorm(features, eps=_NORM_EPS)
        self.mlp = Mlp(features, 4 * features)
        self.mlp_norm = nn.LayerNorm(features, eps=_NORM_EPS)
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Bert(nn.Module):
    """Token numbers [batch, tokens] -> logits [batch, num_classes]."""

    def __init__(
        self, num_classes: int, vocabulary: int, positions: int, features: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, features, padding_idx=0)
        self.positions = nn.Embedding(positions, features)
        self.segments = nn.Embedding(_SEGMENTS, features)
        self.norm = nn.LayerNorm(features, eps=_NORM_EPS)
        self.dropout = nn.Dropout(_DROPOUT)
        self.blocks = nn.ModuleList(BertBlock(features, heads) for _ in range(depth))
        self.pooler = nn.Linear(features, features)
        self.head = nn.Linear(features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.words.weight[0].zero_()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """attention_mask: [batch, tokens], 0 at padding. token_type_ids: [batch, tokens], the segment, 0 by default.

        Raises DataError for more tokens than there are positions.
        """
        tokens = input_ids.shape[1]
        if tokens > self.positions.num_embeddings:
            raise DataError(f"{tokens} tokens are more than the model's {self.positions.num_embeddings}; cut the texts")
        segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        positions = self.positions(torch.arange(tokens, device=input_ids.device))
        x = self.dropout(self.norm(self.words(input_ids) + positions + self.segments(segments)))
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.head(self.dropout(torch.tanh(self.pooler(x[:, 0]))))


def bert_tiny(
    num_classes: int = 2, *, vocabulary: int = 30522, positions: int = 512, features: int = 128, depth: int = 2
) -> Bert:
    """BERT-tiny, one head for 64 features; see the module. Raises ValueError if they are no multiple of 64."""
    if features % 64:
        raise ValueError(f"features must be a multiple of 64, one head's share, not {features}")
    return Bert(num_classes, vocabulary, positions, features, depth, features // 64)
