"""Packed LSTM, GRU and RNN."""

from __future__ import annotations

from typing import Any

from torch import nn

from .packed_module import PackedModule, twin_of


@twin_of(nn.RNN, nn.LSTM, nn.GRU)
class PackedRecurrent(PackedModule):
    """nn.LSTM, nn.GRU, nn.RNN: torch reads their weights from a list, which is filled while the forward runs."""

    _flat_weights_names: list[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._init_flat_weights()

    def _init_flat_weights(self) -> None:
        self._flat_weights = [None] * len(self._flat_weights_names)
        self._flat_weight_refs = [None] * len(self._flat_weights_names)

    def _update_flat_weights(self) -> None:
        """Nothing to do: the list is made anew for every forward."""
