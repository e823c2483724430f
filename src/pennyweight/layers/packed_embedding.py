"""Packed embeddings look up the rows that occur and never decode the table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats import operators
from .packed_module import PackedModule, twin_of

_FEW = 256  # look-ups up to which decoding a row twice costs less than finding out that it occurs twice


class _RowLookup(PackedModule):
    """Looks up rows, and never decodes the table."""

    _packed_looks_up = True

    def _rows(self, index: Tensor) -> Tensor:
        """[*index.shape, features]."""
        table = self.packed_weight("weight")
        if index.numel():
            least, most = (int(end) for end in torch.aminmax(index))
            if least < 0 or most >= table.shape[0]:
                worst = least if least < 0 else most
                raise IndexError(f"embedding index {worst} is outside the table of {table.shape[0]} entries")
        return table.rows(index.cpu()).to(self._decoded("weight"))

    def _distinct_rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(distinct entries of index [n], their rows [n, features], position of each index among them)."""
        distinct, position = index.unique(return_inverse=True)
        return distinct, self._rows(distinct), position


@twin_of(nn.Embedding)
class PackedEmbedding(_RowLookup):
    """nn.Embedding."""

    max_norm: float | None
    norm_type: float

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.max_norm is None:
            cols = self._packed_views["weight"].matrix_shape[1]
            return operators.rows(self._blob("weight"), input, cols).to(self._decoded("weight").dtype)
        if self.max_norm is None and input.numel() <= _FEW:
            return self._rows(input)
        _, rows, position = self._distinct_rows(input)
        return F.embedding(position, rows, max_norm=self.max_norm, norm_type=self.norm_type)


@twin_of(nn.EmbeddingBag)
class PackedEmbeddingBag(_RowLookup):
    """nn.EmbeddingBag."""

    max_norm: float | None
    norm_type: float
    mode: str
    include_last_offset: bool
    padding_idx: int | None

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if input.numel() == 0:
            return super().forward(input, offsets, per_sample_weights)
        distinct, rows, position = self._distinct_rows(input)
        padding = [] if self.padding_idx is None else (distinct == self.padding_idx).nonzero().flatten().tolist()
        return F.embedding_bag(
            position,
            rows,
            offsets,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding[0] if padding else None,
        )
