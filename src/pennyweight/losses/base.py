"""The contract of a penalty: what a model's parameters cost, beside the loss of its task."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Penalty(nn.Module, ABC):
    """A number of a model, registered under `acts_on="losses"`; recipes name it under `penalties`."""

    @abstractmethod
    def forward(self, model: nn.Module) -> Tensor:
        """A scalar, differentiable in the model's parameters. Raises `PlanError` for models that have none."""
