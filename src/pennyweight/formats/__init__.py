"""How a weight is stored and multiplied: one file a format, each a `PackedWeight`. Specification: docs/format.md."""

from __future__ import annotations

from .base import PackedWeight, Reader, read_blob
from .binary import Binary
from .codebook import Codebook
from .dense16 import Dense16
from .integer import Integer
from .lowrank import LowRank
from .partial import Partial
from .signed_lowrank import SignedLowRank
from .sparse import Sparse
from .split import Split
from .stacked import Stacked

__all__ = [
    "Binary",
    "Codebook",
    "Dense16",
    "Integer",
    "LowRank",
    "PackedWeight",
    "Partial",
    "SignedLowRank",
    "Sparse",
    "Split",
    "Stacked",
    "from_bytes",
]


def from_bytes(blob: bytes | bytearray | memoryview) -> PackedWeight:
    """The packed weight that a blob holds. Raises `ArtifactError` on a truncated, altered or newer blob."""
    return read_blob(Reader(memoryview(blob)))
