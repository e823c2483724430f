"""The update step: optimizers, and what acts around the step of any optimizer."""

from . import confidence_guided_annealing  # noqa: F401  (importing a method registers it)
