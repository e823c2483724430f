"""dense16: every weight in 16 bits, float16 or bfloat16.

The high bytes (sign, exponent) and the low bytes are separate symbol streams: the high bytes of trained weights hold
about half their eight bits, so that a bfloat16 matrix loses a quarter of its size without losing anything.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import WeightError
from ..registry import register
from .base import PackedWeight, Reader, Writer, check_matrix, check_options, format_id
from .scales import read_halves, write_halves

BFLOAT16 = 1  # option bit
_LARGE = 1 << 20  # weights, beyond which `linear` widens so many of them, or so many rows, at once:
_CHUNK, _LEAST_ROWS = 1 << 18, 64


@format_id(1)
@register("dense16", acts_on="formats", description="every weight as float16 or bfloat16")
class Dense16(PackedWeight):
    """halves: float16 or bfloat16 [rows, cols]."""

    format: ClassVar[str] = "dense16"

    def __init__(self, halves: Tensor) -> None:
        self.halves = halves
        self.shape = (halves.shape[0], halves.shape[1])

    @classmethod
    def encode(cls, weight: Tensor, dtype: Literal["float16", "bfloat16"] = "float16") -> Self:
        """Round weight [rows, cols] to nearest. `WeightError` if not finite or beyond float16's range."""
        if dtype not in ("float16", "bfloat16"):
            raise WeightError(f"dense16 dtype {dtype!r} is unknown; choose 'float16' or 'bfloat16'")
        halves = check_matrix(weight, "dense16").to(getattr(torch, dtype))
        if not bool(torch.isfinite(halves).all()):
            raise WeightError(f"dense16 got weights beyond the range of {dtype} ({torch.finfo(halves.dtype).max:g})")
        return cls(halves)

    def decode(self) -> Tensor:
        return self.halves.to(torch.float32)

    def rows(self, index: Tensor) -> Tensor:
        return self.halves[index].to(torch.float32)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Large weights are widened some rows at a time, while they lie in the cache, and never held in float32."""
        if self.halves.numel() <= _LARGE or x.dtype == self.halves.dtype:
            return F.linear(x, self.halves.to(x.dtype), bias)
        at_once = max(_CHUNK // self.shape[1], _LEAST_ROWS)
        y = torch.cat([F.linear(x, part.to(x.dtype)) for part in self.halves.split(at_once)], -1)
        return y if bias is None else y + bias

    def _write(self, writer: Writer) -> int:
        write_halves(writer, self.halves)
        return BFLOAT16 if self.halves.dtype == torch.bfloat16 else 0

    @classmethod
    def _read(cls, reader: Reader, shape: tuple[int, int], options: int) -> Self:
        check_options(options, BFLOAT16, cls.format)
        return cls(read_halves(reader, *shape, torch.bfloat16 if options & BFLOAT16 else torch.float16))
