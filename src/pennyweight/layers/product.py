"""The product of two activations, as a module."""

from __future__ import annotations

from torch import Tensor, nn


class Product(nn.Module):
    """a [..., m, k] times b [..., k, n]; a module, so that inputs can be quantised and multiplications counted."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b
