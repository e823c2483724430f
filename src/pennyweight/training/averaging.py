"""Exponential moving average of weights: average <- decay * average + (1 - decay) * weight after every update.

It begins as the weights are when it is made. Buffers (batch statistics, progress) are copied, not averaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .parallel import placed


class WeightAverage:
    """The averages, by the names of `model.state_dict()`."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.averages = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now; once per optimizer step that was carried out."""
        for name, p in self.model.named_parameters():
            self.averages[name].lerp_(p, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with the averages in place of its weights."""
        self._swap()
        try:
            yield self.model
        finally:
            self._swap()

    @torch.no_grad()
    def store(self) -> None:
        """Make the averages the model's weights."""
        for name, p in self.model.named_parameters():
            p.copy_(self.averages[name])

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, average in self.averages.items():
            average.copy_(placed(state[name], average))

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.model.named_parameters():
            kept = p.detach().clone()
            p.copy_(self.averages[name])
            self.averages[name].copy_(kept)
