"""Randomness as a function of where training stands, so that a resumed run draws what the unbroken one would have.

No generator's state is ever stored: every draw has a seed derived from (seed of the recipe, purpose, counters).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

_PURPOSES = {"model": 0, "validation": 1, "order": 2, "augment": 3, "forward": 4}
Purpose = Literal["model", "validation", "order", "augment", "forward"]


def derived_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """32 well-mixed bits: PyTorch's CPU generator takes no more than that from a seed."""
    return int(np.random.SeedSequence((seed, _PURPOSES[purpose], *counters)).generate_state(1)[0])


def generator(seed: int, purpose: Purpose, *counters: int) -> torch.Generator:
    """A CPU generator in the state that belongs to these counters."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *counters))
