"""pennyweight: name a size, get the best network of that size, in a file that fits."""

from . import compress as compress
from .artifact import load, save
from .compress.plan import Plan
from .compress.shrink import plan, shrink
from .integrations import register_when_imported
from .registry import methods
from .report import report
from .training.convert import convert
from .training.fold import fold
from .training.prepare import prepare

__version__ = "0.1.0"

register_when_imported()

__all__ = ["Plan", "convert", "fold", "load", "methods", "plan", "prepare", "report", "save", "shrink"]
