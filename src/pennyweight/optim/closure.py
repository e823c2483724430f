"""What an optimizer may be given to evaluate the loss anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """The loss of a step's closure, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
