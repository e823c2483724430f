"""The contract of a storage format: a matrix in its stored form, and the blob it lives in.

docs/format.md specifies the blobs to the bit; `Writer` and `Reader` are its alphabet: bytes, LEB128 integers, float32.
"""

from __future__ import annotations

import copy
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArtifactError, WeightError
from ..kernels.integer import ActivationBits

MAX_SIDE = (1 << 31) - 1  # rows and columns: what a 32-bit index reaches
MAX_DEPTH = 8  # nested blobs (lowrank, split, partial, stacked)


class Writer:
    """Appends the primitives of the blob layout to a byte string."""

    def __init__(self) -> None:
        self.data = bytearray()

    def u8(self, value: int) -> None:
        self.data.append(value)

    def i8(self, value: int) -> None:
        self.data.append(value & 255)

    def varint(self, value: int) -> None:
        """Unsigned LEB128: seven bits a byte, lowest first, the top bit set on all bytes but the last."""
        while value >= 128:
            self.data.append(value & 127 | 128)
            value >>= 7
        self.data.append(value)

    def f32(self, value: float) -> None:
        self.data += struct.pack("<f", value)

    def raw(self, payload: bytes | bytearray | memoryview) -> None:
        self.data += payload


class Reader:
    """Reads the primitives back; every read checks that the bytes are there and raises `ArtifactError` if not."""

    def __init__(self, data: bytes | memoryview, depth: int = 0) -> None:
        if depth > MAX_DEPTH:
            raise ArtifactError(f"a packed weight is nested more than {MAX_DEPTH} deep; the file is damaged")
        self.data = memoryview(data)
        self.position = 0
        self.depth = depth

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def raw(self, count: int) -> memoryview:
        if count > self.left:
            raise ArtifactError(
                f"a packed weight ends {count - self.left} bytes early; the file is truncated or damaged"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def u8(self) -> int:
        return self.raw(1)[0]

    def i8(self) -> int:
        return (self.u8() ^ 128) - 128

    def varint(self, limit: int = MAX_SIDE) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.u8()
            value |= (byte & 127) << shift
            if byte < 128:
                break
        if value > limit or byte >= 128:
            raise ArtifactError("a packed weight holds an absurd count; the file is damaged")
        return value

    def f32(self) -> float:
        return struct.unpack("<f", self.raw(4))[0]


class PackedWeight(ABC):
    """A weight matrix [rows, cols] in stored form.

    `to_bytes` gives the self-describing blob of docs/format.md; `pennyweight.formats.from_bytes` reads any of them.
    The tensors a subclass holds are plain attributes, so `copy.deepcopy` and `to(device)` work on all of them.
    """

    format: ClassVar[str]
    shape: tuple[int, int]
    runs: bool = False  # whether this came from `for_running`
    _blob: bytes | None = None

    @abstractmethod
    def decode(self) -> Tensor:
        """The matrix, float32 [rows, cols]."""

    def rows(self, index: Tensor) -> Tensor:
        """float32 [*index.shape, cols]: the rows asked for. Formats that can do so decode only those."""
        return self.decode()[index]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., cols] -> [..., rows]."""
        return F.linear(x, self.decode().to(x.device, x.dtype), bias)

    def to_bytes(self) -> bytes:
        """The blob, exactly as stored on disk; encoded once and kept. Same matrix, same bytes."""
        if self._blob is None:
            writer = Writer()
            write_blob(self, writer)
            self._blob = bytes(writer.data)
        return self._blob

    def for_running(self, activation_bits: ActivationBits = 16) -> PackedWeight:
        """What does the same and multiplies fast, without ever holding the decoded matrix where that can be had.

        activation_bits: to how many bits the inputs of `linear` are quantised, row by row; 32 does not quantise.
        The result has no bytes of its own.
        """
        running = copy.copy(self)
        running.runs, running._blob = True, None
        return running

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return len(self.to_bytes())

    @property
    def shared_nbytes(self) -> int:
        """Bytes of parts that all rows need: they do not grow with the rows, nor can a division of them share them."""
        return 0

    def to(self, device: torch.device | str) -> Self:
        """A copy whose tensors lie on `device`."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if hasattr(value, "to"):
                setattr(moved, name, value.to(device))
        return moved

    @abstractmethod
    def _write(self, writer: Writer) -> int:
        """Append parameters and streams; return the option bits (0..31) of the blob's second byte."""

    @classmethod
    @abstractmethod
    def _read(cls, reader: Reader, shape: tuple[int, int], options: int) -> Self:
        """Inverse of `_write`; raises `ArtifactError` on anything `_write` cannot have written."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]}x{self.shape[1]}, {self.nbytes} bytes)"


VERSION = 0  # upper three bits of a blob's second byte
OPTION_BITS = 5  # the rest of it
FORMATS: dict[int, type[PackedWeight]] = {}
P = TypeVar("P", bound=PackedWeight)


def format_id(number: int) -> Callable[[type[P]], type[P]]:
    """Class decorator: enter the class under the number that opens its blobs."""

    def enter(cls: type[P]) -> type[P]:
        FORMATS[number] = cls
        return cls

    return enter


def write_blob(packed: PackedWeight, writer: Writer) -> None:
    """Append format id, version and options, rows, cols, then what the format adds."""
    number = next(key for key, cls in FORMATS.items() if cls is type(packed))
    writer.u8(number)
    options_at = len(writer.data)
    writer.u8(0)
    writer.varint(packed.shape[0])
    writer.varint(packed.shape[1])
    writer.data[options_at] = VERSION << OPTION_BITS | packed._write(writer)


def read_blob(reader: Reader) -> PackedWeight:
    """Read one blob to the reader's end. Raises `ArtifactError` on damage, on trailing bytes and on newer versions."""
    number, second = reader.u8(), reader.u8()
    if number not in FORMATS:
        raise ArtifactError(f"unknown weight format {number}; the file is damaged or needs a newer pennyweight")
    if second >> OPTION_BITS != VERSION:
        raise ArtifactError(
            f"weight format {FORMATS[number].format!r} version {second >> OPTION_BITS} is newer than this pennyweight "
            f"reads ({VERSION}); upgrade pennyweight"
        )
    shape = (reader.varint(), reader.varint())
    packed = FORMATS[number]._read(reader, shape, second & (1 << OPTION_BITS) - 1)
    if reader.left:
        raise ArtifactError(f"a packed weight is followed by {reader.left} unread bytes; the file is damaged")
    return packed


def write_nested(packed: PackedWeight, writer: Writer) -> None:
    """Append a blob inside a blob: varint length, then its bytes."""
    blob = packed.to_bytes()
    writer.varint(len(blob))
    writer.raw(blob)


def read_nested(reader: Reader) -> PackedWeight:
    return read_blob(Reader(reader.raw(reader.varint(1 << 62)), reader.depth + 1))


def check_options(options: int, known: int, name: str) -> None:
    """Refuse option bits that this version does not define."""
    if options & ~known:
        raise ArtifactError(f"weight format {name!r} uses options {options:#x} unknown here; upgrade pennyweight")


def check_matrix(weight: Tensor, what: str) -> Tensor:
    """`weight` as a detached float32 matrix; `WeightError` unless two-dimensional and finite."""
    if weight.ndim != 2:
        raise WeightError(f"{what} needs a matrix [rows, cols], got shape {tuple(weight.shape)}; reshape it first")
    matrix = weight.detach().to(torch.float32)
    if not bool(torch.isfinite(matrix).all()):
        raise WeightError(f"{what} got NaN or infinite weights; mend the checkpoint first")
    return matrix


def check_size(tensor: Tensor, size: tuple[int, ...], what: str) -> None:
    """`WeightError` naming both shapes unless `tensor` has the shape `size`."""
    if tuple(tensor.shape) != size:
        raise WeightError(f"{what} has shape {tuple(tensor.shape)}, expected {size}")
