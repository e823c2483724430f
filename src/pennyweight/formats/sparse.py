"""sparse: only the weights under a mask are stored, the others are zero.

The mask is a bitmap or the gaps between the weights kept (row by row through the whole matrix), whichever is smaller
once coded. A bitmap suits random positions with rows of different density; gaps suit regular patterns.
Values are float16, float32 (exact), or codes of 2 to 8 bits with a scale a row: value = code * scale, code in
[-2^(b-1), 2^(b-1) - 1].
"""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import ArtifactError, WeightError
from ..kernels.integer import ActivationBits
from ..kernels.sparse import SparseMatrix
from ..registry import register
from .base import PackedWeight, Reader, Writer, check_matrix, check_options, check_size, format_id
from .bits import gather
from .codes import CodeMatrix
from .entropy import read_symbols, symbol_limit, write_symbols
from .running import RunningSparse
from .scales import Float16Values, Float32Values, power_of_two

INDEX, INTEGER, EXACT = 1, 2, 4  # option bits
ESCAPE = 255  # gap symbol: 255 zeros and no weight after them


@format_id(4)
@register("sparse", acts_on="formats", description="only the weights under a mask, as floats or small integers")
class Sparse(PackedWeight):
    """mask: one bit a weight [rows, cols]; values: floats or codes [1, kept], row by row; scale [rows, 1] of codes."""

    format: ClassVar[str] = "sparse"

    def __init__(
        self, mask: CodeMatrix, values: Float16Values | Float32Values | CodeMatrix, scale: Float16Values | None
    ) -> None:
        self.mask = mask
        self.values = values
        self.scale = scale
        self.shape = (mask.rows, mask.cols)
        kept = mask.all().sum(1, dtype=torch.int64)
        self.row_start = kept.cumsum(0) - kept  # [rows]: where each row's values begin

    @classmethod
    def encode(cls, weight: Tensor, mask: Tensor, value_bits: int = 16) -> Self:
        """weight, mask (True where kept) [rows, cols]; value_bits 32, 16 or 2..8.

        Integer values are rounded to nearest with scale = the row's largest kept magnitude / (2^(bits-1) - 1).
        Raises `WeightError` on shapes that differ, other bit widths, and kept weights that are not finite.
        """
        if value_bits not in (16, 32) and not 2 <= value_bits <= 8:
            raise WeightError(f"sparse values have 32, 16 or 2 to 8 bits, got {value_bits}")
        check_size(mask, tuple(weight.shape), "the mask of a sparse weight")
        mask = mask.to(torch.bool)
        weight = check_matrix(torch.where(mask, weight.detach(), 0), "sparse")
        bitmap = CodeMatrix.of(mask, 1)
        if value_bits >= 16:
            kept = weight[mask][None]
            return cls(bitmap, Float16Values.of(kept) if value_bits == 16 else Float32Values(kept.clone()), None)
        top = (1 << value_bits - 1) - 1
        peak = weight.abs().amax(1, keepdim=True) if weight.shape[1] else weight.new_zeros(weight.shape[0], 1)
        scale = Float16Values.of(peak / top)
        step = torch.where(scale.all() > 0, scale.all(), 1.0)
        codes = (weight / step).round().clamp(-top - 1, top)[mask].to(torch.int32) + top + 1
        return cls(bitmap, CodeMatrix.of(codes[None], value_bits), scale)

    def decode(self) -> Tensor:
        mask = self.mask.all().bool()
        out = torch.zeros(self.shape, device=mask.device)
        out[mask] = self._kept()
        return out if self.scale is None else out.mul_(self.scale.all())

    def rows(self, index: Tensor) -> Tensor:
        mask = self.mask.take(index).to(torch.int64)
        out = torch.zeros(mask.shape, device=mask.device)
        place = (self.row_start[index].unsqueeze(-1) + mask.cumsum(-1) - 1)[mask > 0]
        out[mask > 0] = self._kept(place)
        return out if self.scale is None else out.mul_(self.scale.take(index))

    def for_running(self, activation_bits: ActivationBits = 16) -> PackedWeight:
        if isinstance(self.values, Float16Values):
            exponent = self.values.exponent
            scale = torch.full((self.shape[0],), power_of_two(exponent)) if exponent else None
            matrix = SparseMatrix.of(self.mask.all().bool(), self.values.halves[0], scale)
        elif isinstance(self.values, Float32Values):
            matrix = SparseMatrix.of(self.mask.all().bool(), self.values.values[0])
        else:
            assert self.scale is not None
            matrix = SparseMatrix.of(self.mask.all().bool(), self._kept().to(torch.int8), self.scale.all())
        return super().for_running() if matrix is None else RunningSparse(matrix)

    def _kept(self, place: Tensor | None = None) -> Tensor:
        """float32: the stored values, without the scale; all of them, or those at `place`."""
        if isinstance(self.values, Float16Values):
            kept = self.values if place is None else Float16Values(self.values.halves[0, place], self.values.exponent)
            return kept.all().flatten()
        if isinstance(self.values, Float32Values):
            return self.values.values[0] if place is None else self.values.values[0, place]
        values = self.values
        codes = values.all()[0] if place is None else gather(values.packed[0], values.bits, place)
        return codes.to(torch.float32) - (1 << values.bits - 1)

    def _write(self, writer: Writer) -> int:
        bitmap, index = Writer(), Writer()
        self.mask.write(bitmap)
        flat = np.flatnonzero(self.mask.all().cpu().numpy())
        gaps = _gaps(flat)
        index.varint(len(flat))
        index.varint(len(gaps))
        write_symbols(index, gaps[None], 8)
        options = 0
        if isinstance(self.values, CodeMatrix):
            writer.u8(self.values.bits)
            options |= INTEGER
        elif isinstance(self.values, Float32Values):
            options |= EXACT
        if len(index.data) < len(bitmap.data) and self.mask.rows * self.mask.cols <= symbol_limit(len(index.data)):
            options |= INDEX
        writer.raw(index.data if options & INDEX else bitmap.data)
        self.values.write(writer)
        if self.scale is not None:
            self.scale.write(writer)
        return options

    @classmethod
    def _read(cls, reader: Reader, shape: tuple[int, int], options: int) -> Self:
        check_options(options, INDEX | INTEGER | EXACT, cls.format)
        if options & INTEGER and options & EXACT:
            raise ArtifactError("a sparse weight claims integers and floats; the file is damaged")
        rows, cols = shape
        bits = reader.u8() if options & INTEGER else 16
        if options & INTEGER and not 2 <= bits <= 8:
            raise ArtifactError(f"sparse values of {bits} bits; the file is damaged")
        if options & INDEX:
            if rows * cols > symbol_limit(reader.left):
                raise ArtifactError("a sparse weight claims a shape beyond its size; the file is damaged")
            kept, count = reader.varint(), reader.varint()
            flat = _positions(read_symbols(reader, 1, count, 8)[0])
            if len(flat) != kept or (kept and int(flat[-1]) >= rows * cols):
                raise ArtifactError("the gaps of a sparse weight lead outside the matrix; the file is damaged")
            bitmap = np.zeros(rows * cols, np.uint8)
            bitmap[flat] = 1
            mask = CodeMatrix.of(torch.from_numpy(bitmap.reshape(rows, cols)), 1)
        else:
            mask = CodeMatrix.read(reader, rows, cols, 1)
            kept = int(mask.all().sum(dtype=torch.int64))
        if options & INTEGER:
            return cls(mask, CodeMatrix.read(reader, 1, kept, bits), Float16Values.read(reader, rows, 1))
        values = Float32Values if options & EXACT else Float16Values
        return cls(mask, values.read(reader, 1, kept), None)


def _gaps(flat: np.ndarray) -> np.ndarray:
    """Ascending positions -> uint8 symbols: zeros before each position (below 255), 255 for each 255 zeros skipped."""
    zeros = np.diff(flat, prepend=-1) - 1
    escapes = zeros // ESCAPE
    out = np.full(len(flat) + int(escapes.sum()), ESCAPE, np.uint8)
    out[np.cumsum(escapes + 1) - 1] = zeros % ESCAPE
    return out


def _positions(gaps: np.ndarray) -> np.ndarray:
    """Inverse of `_gaps`."""
    keeps = gaps != ESCAPE
    return (np.cumsum(np.where(keeps, gaps.astype(np.int64) + 1, ESCAPE)) - 1)[keeps]
