"""How a gradient crosses a step: exact sign or round forward, a named surrogate backward. One file a family."""

from . import (  # noqa: F401  (importing a method registers it)
    annealed,
    bi_real,
    biper,
    fda,
    pokebnn,
    recu,
    reste,
    straight_through,
)
from .base import Estimator, make_estimator, sign, through

__all__ = ["Estimator", "make_estimator", "sign", "through"]
