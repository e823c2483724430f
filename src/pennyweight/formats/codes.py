"""A matrix of small integer codes: bit-packed in memory, a symbol stream in the blob."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .base import Reader, Writer
from .bits import pack, packed_size, unpack, unpack_rows
from .entropy import read_symbols, write_symbols

#: Rows packed or unpacked at once, which bounds the working memory.
_CHUNK_ROWS = 1024


@dataclass
class CodeMatrix:
    """Codes of `bits` bits [rows, cols]; `packed` is uint8 [rows, packed_size(cols, bits)], so rows can be read alone.

    In memory every row begins at a byte; in the blob rows follow each other without a gap (docs/format.md).
    """

    packed: Tensor
    cols: int
    bits: int

    @classmethod
    def of(cls, codes: Tensor, bits: int, lowest: int = 0) -> Self:
        """From integer codes [rows, cols] in lowest .. lowest + 2^bits-1; kept as code - lowest."""
        rows, cols = codes.shape
        packed = torch.empty(rows, packed_size(cols, bits), dtype=torch.uint8, device=codes.device)
        for first in range(0, rows, _CHUNK_ROWS):
            part = codes[first : first + _CHUNK_ROWS]
            packed[first : first + _CHUNK_ROWS] = pack(part.to(torch.int32) - lowest if lowest else part, bits)
        return cls(packed, cols, bits)

    @property
    def rows(self) -> int:
        return self.packed.shape[0]

    def all(self) -> Tensor:
        """The codes [rows, cols], uint8 up to 8 bits, else int32. Not to be changed in place."""
        return unpack_rows(self.packed, self.bits, self.cols, torch.arange(self.rows, device=self.packed.device))

    def take(self, index: Tensor) -> Tensor:
        """The codes [*index.shape, cols] of the rows `index`."""
        return unpack_rows(self.packed, self.bits, self.cols, index)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.packed.to(device), self.cols, self.bits)

    def write(self, writer: Writer) -> None:
        codes = np.empty((self.rows, self.cols), np.uint8 if self.bits <= 8 else np.uint16)
        for first in range(0, self.rows, _CHUNK_ROWS):
            part = slice(first, first + _CHUNK_ROWS)
            codes[part] = unpack(self.packed[part], self.bits, self.cols).cpu().numpy()
        write_symbols(writer, codes, self.bits)

    @classmethod
    def read(cls, reader: Reader, rows: int, cols: int, bits: int) -> Self:
        if bits == 0:
            return cls(torch.zeros(rows, 0, dtype=torch.uint8), cols, bits)
        return cls.of(torch.from_numpy(read_symbols(reader, rows, cols, bits)), bits)
