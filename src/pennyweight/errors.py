"""What pennyweight raises when the user's input cannot be served: one line that names the culprit and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PennyweightError(Exception):
    """Base of all errors a user can cause. The command line prints it in one line and exits with code 2."""


class BudgetError(PennyweightError):
    """The budget is below what is reachable, or makes no sense. The message says the smallest reachable size."""


class DataError(PennyweightError):
    """Calibration data is empty, not finite, or of a form the model's forward does not take."""


class WeightError(PennyweightError):
    """A weight is not finite or has a shape no format can hold."""


class ArtifactError(PennyweightError):
    """A stored file is truncated, altered, of a newer version, or not an artifact at all."""


class PlanError(PennyweightError):
    """A plan names a layer, method or option that does not exist or does not fit the model."""


class MissingExtraError(PennyweightError, ImportError):
    """An optional dependency is not installed. The message names the extra that brings it."""


class UnknownNameError(PennyweightError, KeyError):
    """A method, format, layer or preset that does not exist. The message lists the close matches."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are: {', '.join(known)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class PennyweightWarning(UserWarning):
    """Something the user should know, after which the work goes on."""


def require(module: str, extra: str):
    """Import `module` or raise `MissingExtraError` naming the extra that brings it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module.split('.')[0]} is not installed; install it with: pip install 'pennyweight[{extra}]'"
        ) from error


def warn(message: str) -> None:
    """Issue a `PennyweightWarning` from the user's point of view."""
    import warnings

    warnings.warn(message, PennyweightWarning, stacklevel=3)
