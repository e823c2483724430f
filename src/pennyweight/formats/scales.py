"""How the real-valued companions of codes (scales, minima, offsets) are stored: as float16 or in steps of 1/16 octave.

float16: value = half * 2^e with one exponent e per tensor, 0 unless some value leaves float16's normal range.
log8: value = base * 2^((code - 1) / 16), a byte a value and one float32 base per tensor; code 0 stands for zero.
Both are exact: what `round_values` returns is what a reader of the file computes, bit for bit.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import ArtifactError, WeightError
from .base import Reader, Writer
from .entropy import read_symbols, write_symbols

ScaleCoding = Literal["float16", "log8"]
STEPS = 16  # log8: steps an octave
LOG_RANGE = 254  # log8: steps from the smallest to the largest non-zero value
# float32 nearest to 2^(k/16); a table, since exp2 need not be correctly rounded everywhere.
ROOTS = np.array(
    [
        float.fromhex(f"0x1.{digits}p0")
        for digits in (
            "000000",
            "0b5586",
            "172b84",
            "2387a6",
            "306fe0",
            "3dea64",
            "4bfdae",
            "5ab07e",
            "6a09e6",
            "7a1148",
            "8ace54",
            "9c4918",
            "ae89fa",
            "c199be",
            "d5818e",
            "ea4afa",
        )
    ],
    np.float32,
)


def write_halves(writer: Writer, halves: Tensor) -> None:
    """Append 16-bit values [rows, cols] as two symbol streams: their high bytes, then their low bytes."""
    planes = halves.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    write_symbols(writer, (planes >> 8).astype(np.uint8), 8)
    write_symbols(writer, (planes & 255).astype(np.uint8), 8)


def read_halves(reader: Reader, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `write_halves`; values that are not finite raise `ArtifactError`."""
    high = read_symbols(reader, rows, cols, 8).astype(np.uint16)
    low = read_symbols(reader, rows, cols, 8)
    halves = torch.from_numpy((high << 8 | low).view(np.int16)).view(dtype)
    if not bool(torch.isfinite(halves).all()):
        raise ArtifactError("a packed weight holds values that are not finite; the file is damaged")
    return halves


@dataclass
class Float32Values:
    """values [rows, cols], float32, exactly."""

    values: Tensor

    def all(self) -> Tensor:
        return self.values

    def take(self, index: Tensor) -> Tensor:
        return self.values[index]

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.values.to(device))

    def write(self, writer: Writer) -> None:
        """Four symbol streams, the highest bytes first: signs and exponents repeat, mantissas do not."""
        bits = self.values.cpu().contiguous().view(torch.int32).numpy().view(np.uint32)
        for shift in (24, 16, 8, 0):
            write_symbols(writer, (bits >> shift & 255).astype(np.uint8), 8)

    @classmethod
    def read(cls, reader: Reader, rows: int, cols: int) -> Self:
        bits = np.zeros((rows, cols), np.uint32)
        for shift in (24, 16, 8, 0):
            bits |= read_symbols(reader, rows, cols, 8).astype(np.uint32) << shift
        values = torch.from_numpy(bits.view(np.int32)).view(torch.float32)
        if not bool(torch.isfinite(values).all()):
            raise ArtifactError("a packed weight holds values that are not finite; the file is damaged")
        return cls(values)


def power_of_two(exponent: int) -> float:
    return math.ldexp(1.0, exponent)


@dataclass
class Float16Values:
    """values = halves * 2^exponent."""

    halves: Tensor
    exponent: int

    @classmethod
    def of(cls, values: Tensor) -> Self:
        values = values.detach().to(torch.float32)
        size = values.abs()
        largest = float(size.max()) if size.numel() else 0.0
        nonzero = size[size > 0]
        exponent = 0
        if len(nonzero) and (largest > 65504 or float(nonzero.min()) < 2.0**-14):
            # The largest value, rounded to float16's 11 bits, comes to lie in [2^14, 2^15); so rounding is idempotent.
            mantissa, power = math.frexp(largest)
            if round(mantissa * 2048) == 2048:
                power += 1
            exponent = min(max(power - 15, -100), 113)
        return cls((values.double() * power_of_two(-exponent)).to(torch.float16), exponent)

    def all(self) -> Tensor:
        return self._values(self.halves)

    def take(self, index: Tensor) -> Tensor:
        return self._values(self.halves[index])

    def _values(self, halves: Tensor) -> Tensor:
        values = halves.to(torch.float32)
        return values * power_of_two(self.exponent) if self.exponent else values

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.halves.to(device), self.exponent)

    def write(self, writer: Writer) -> None:
        writer.i8(self.exponent)
        write_halves(writer, self.halves)

    @classmethod
    def read(cls, reader: Reader, rows: int, cols: int) -> Self:
        exponent = reader.i8()
        if not -100 <= exponent <= 113:
            raise ArtifactError("a packed weight holds an absurd exponent; the file is damaged")
        return cls(read_halves(reader, rows, cols, torch.float16), exponent)


@dataclass
class Log8Values:
    """values = base * 2^((codes - 1) / 16), or 0 where the code is 0."""

    codes: Tensor
    base: float

    @classmethod
    def of(cls, values: Tensor) -> Self:
        values = values.detach().to(torch.float32)
        if bool((values < 0).any()):
            raise WeightError("log8 scales must not be negative; use float16 scales")
        positive = values[values > 0].double()
        if not len(positive):
            return cls(torch.zeros_like(values, dtype=torch.uint8), 1.0)
        smallest, largest = float(positive.min()), float(positive.max())
        if STEPS * math.log2(largest / smallest) > LOG_RANGE + 0.49:
            smallest = largest * 2.0 ** (-LOG_RANGE / STEPS)
        base = float(np.float32(smallest))
        steps = torch.round(STEPS * torch.log2(values.double() / base)).clamp(0, LOG_RANGE) + 1
        return cls(torch.where(values > 0, steps, 0.0).to(torch.uint8), base)

    def all(self) -> Tensor:
        return self._values(self.codes)

    def take(self, index: Tensor) -> Tensor:
        return self._values(self.codes[index])

    def _values(self, codes: Tensor) -> Tensor:
        return _log8_table(self.base).to(codes.device)[codes.to(torch.int32)]

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.codes.to(device), self.base)

    def write(self, writer: Writer) -> None:
        width = max(int(self.codes.max()).bit_length(), 1) if self.codes.numel() else 1
        writer.f32(self.base)
        writer.u8(width)
        write_symbols(writer, self.codes.cpu().numpy(), width)

    @classmethod
    def read(cls, reader: Reader, rows: int, cols: int) -> Self:
        base = reader.f32()
        if not 0 < base < math.inf:
            raise ArtifactError("a packed weight holds an absurd scale base; the file is damaged")
        width = reader.u8()
        if not 1 <= width <= 8:
            raise ArtifactError(f"scale steps of {width} bits; the file is damaged")
        values = cls(torch.from_numpy(read_symbols(reader, rows, cols, width)), base)
        if not bool(torch.isfinite(values.all()).all()):
            raise ArtifactError("a packed weight holds scales that are not finite; the file is damaged")
        return values


@functools.lru_cache(256)
def _log8_table(base: float) -> Tensor:
    """float32 [256]: the value of each code."""
    step = np.arange(LOG_RANGE + 1)
    with np.errstate(over="ignore"):  # steps that no code takes may lie beyond float32
        table = np.ldexp(np.float32(base) * ROOTS[step % STEPS], step // STEPS)
    return torch.from_numpy(np.append(np.float32(0), table))


Values = Float16Values | Log8Values
CODINGS: dict[str, type[Float16Values] | type[Log8Values]] = {"float16": Float16Values, "log8": Log8Values}


def store(values: Tensor, coding: ScaleCoding, what: str) -> Values:
    """`values` in their stored form. `WeightError` if not finite, negative under log8, or the coding is unknown."""
    if coding not in CODINGS:
        raise WeightError(f"scale coding {coding!r} is unknown; choose 'float16' or 'log8'")
    if not bool(torch.isfinite(values).all()):
        raise WeightError(f"{what} got NaN or infinite scales; mend the weights first")
    return CODINGS[coding].of(values)


def round_values(values: Tensor, coding: ScaleCoding = "float16") -> Tensor:
    """What a reader of the file sees in place of `values`, float32 of the same shape. Idempotent."""
    return store(values, coding, "round_values").all()
