"""A matrix of small integer codes: bit-packed in memory, a symbol stream in the blob."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .base import Reader, Writer
from .bits import pack, unpack
from .entropy import read_symbols, write_symbols


@dataclass
class CodeMatrix:
    """Codes of `bits` bits [rows, cols]; `packed` is uint8 [rows, packed_size(cols, bits)], so rows can be read alone.

    In memory every row begins at a byte; in the blob rows follow each other without a gap (docs/format.md).
    """

    packed: Tensor
    cols: int
    bits: int

    @classmethod
    def of(cls, codes: Tensor, bits: int) -> Self:
        """From integer codes [rows, cols] in 0 .. 2^bits-1."""
        return cls(pack(codes, bits), codes.shape[1], bits)

    @property
    def rows(self) -> int:
        return self.packed.shape[0]

    def all(self) -> Tensor:
        """The codes [rows, cols], uint8 up to 8 bits, else int32. Not to be changed in place."""
        return unpack(self.packed, self.bits, self.cols)

    def take(self, index: Tensor) -> Tensor:
        """The codes [*index.shape, cols] of the rows `index`."""
        return unpack(self.packed[index], self.bits, self.cols)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.packed.to(device), self.cols, self.bits)

    def write(self, writer: Writer) -> None:
        write_symbols(writer, self.all().cpu().numpy(), self.bits)

    @classmethod
    def read(cls, reader: Reader, rows: int, cols: int, bits: int) -> Self:
        if bits == 0:
            return cls(torch.zeros(rows, 0, dtype=torch.uint8), cols, bits)
        return cls.of(torch.from_numpy(read_symbols(reader, rows, cols, bits)), bits)
