"""Packed Linear layers: with low memory the format multiplies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .packed_module import PackedModule, twin_of


@twin_of(nn.Linear)
class PackedLinear(PackedModule):
    """nn.Linear; with low memory the format multiplies."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        exact = self._packed_activation_bits == 32
        if self._packed_memory == "fast" or (exact and torch.compiler.is_compiling()):
            return super().forward(input)
        weight = self.packed_weight("weight") if exact else self.running_weight()
        return weight.linear(input, self.bias)
