"""The one registry: a dict and a decorator.

    @register("gptq", acts_on="compress", paper="2210.17323", description="...")
    class GPTQ(Compressor): ...

`methods()` is the documentation table; `pennyweight methods` prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import UnknownNameError

T = TypeVar("T")

PLACES = ("estimators", "weights", "layers", "optim", "losses", "compress", "formats")


@dataclass(frozen=True)
class Entry:
    """One registered method.

    name: lower-case unique name. acts_on: one of `PLACES`. paper: arXiv id, or "" where no paper stands behind it.
    combines_with: names (or places) it can be used together with. target: the class or function itself.
    """

    name: str
    acts_on: str
    description: str
    target: Any
    paper: str = ""
    combines_with: tuple[str, ...] = field(default=())


_ENTRIES: dict[tuple[str, str], Entry] = {}


def register(
    name: str, *, acts_on: str, description: str, paper: str = "", combines_with: tuple[str, ...] = ()
) -> Callable[[T], T]:
    """Class or function decorator that enters `name` once; raises ValueError on a clash or a bad name."""

    def enter(target: T) -> T:
        if name != name.lower() or not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"method name {name!r} must be lower-case letters, digits, '-' or '_'")
        if acts_on not in PLACES:
            raise ValueError(f"method {name!r} acts on {acts_on!r}, which is none of {PLACES}")
        if (acts_on, name) in _ENTRIES:
            raise ValueError(f"{acts_on} {name!r} is registered twice")
        _ENTRIES[acts_on, name] = Entry(name, acts_on, description, target, paper, tuple(combines_with))
        return target

    return enter


def get(name: str, acts_on: str) -> Entry:
    """The entry of that name and place; raises `UnknownNameError` with the close matches."""
    load_all()
    try:
        return _ENTRIES[acts_on, name]
    except KeyError:
        kind = "format" if acts_on == "formats" else "method"
        raise UnknownNameError(kind, name, [n for place, n in _ENTRIES if place == acts_on]) from None


def methods(acts_on: str | None = None) -> list[Entry]:
    """All entries (of one place), in order of place and name."""
    load_all()
    return sorted(
        (e for e in _ENTRIES.values() if acts_on in (None, e.acts_on)), key=lambda e: (PLACES.index(e.acts_on), e.name)
    )


def load_all() -> None:
    """Import the packages whose modules register methods."""
    from . import compress, estimators, formats, layers, losses, optim, weights  # noqa: F401
