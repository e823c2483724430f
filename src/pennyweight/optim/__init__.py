"""The update step: optimizers, and what acts around the step of any optimizer."""

from . import confidence_guided_annealing  # noqa: F401  (importing a method registers it)
from .homogeneous import final_homogeneous
from .lamb import LAMB
from .lawn import LAWN
from .p_norm_decay import PNormDecay
from .padamw import PAdamW
from .psgd import PSGD
from .wrapper import OptimizerWrapper

__all__ = ["LAMB", "LAWN", "PSGD", "OptimizerWrapper", "PAdamW", "PNormDecay", "final_homogeneous"]
