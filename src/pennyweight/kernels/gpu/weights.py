"""Integer weights as the GPU kernels read them.

    value[n, k] = sum over planes p of (code[p, n, k] - zero) * scale[p, n, group of k] * column_scale[k]
                  + minimum[n, group of k] + column_offset[k]

where table[code] takes the place of code - zero if there is a table. Binary is 1 bit with zero 1/2 and twice its scale,
ternary is 2 bits, stacked is several planes of 1 bit. What lies where:

    low    [planes, rows, bytes]: the low 1, 2, 4 or 8 bits of the codes. A row is padded to 16 bytes, so that every row
           can be read 16 bytes at a time, and neighbouring threads read neighbouring words of it. Within a row code k
           has the bits k * width and up, the lowest bit of the lowest byte first, as in the stored formats.
    high   the same for the bits beyond those, since 3, 5 and 6 bits do not divide a word: 3 = 2 + 1, 5 = 4 + 1,
           6 = 4 + 2. 7 bits take a byte.

A kernel reads a row in units: 32-bit words, each of which holds 32 / width codes, or bytes where a group may end within
a word. All codes of a unit share their scale, so that a product with few rows applies it once a unit. A group is thus
any multiple of 8 columns, or the whole row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import WeightError

if TYPE_CHECKING:  # formats use kernels, not the other way round
    from ...formats.binary import Binary
    from ...formats.integer import Integer
    from ...formats.scales import Values
    from ..integer import IntegerMatrix

#: bits of a code -> widths of its low and high part
WIDTHS = {1: (1, 0), 2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 7: (8, 0), 8: (8, 0)}
ROW_BYTES = 16  # what a row's bytes are a multiple of
_CHUNK_ROWS = 4096  # rows packed at once, which bounds the working memory


@dataclass
class GpuIntegers:
    """A weight [rows, cols] of 1 to 8 bits. See the module for the arrangement and the formula.

    scale [planes, rows, groups], minimum [rows, groups]: float16, or float32 where float16 cannot hold them exactly;
    their values are scale * scale_factor and minimum * minimum_factor. column_scale, column_offset: float32 [cols].
    table: float32 [2^bits]. group: columns in a group, 0 is the whole row. magnitude: a power of two no value exceeds.
    """

    low: Tensor
    high: Tensor | None
    scale: Tensor
    minimum: Tensor | None
    column_scale: Tensor | None
    column_offset: Tensor | None
    table: Tensor | None
    cols: int
    bits: int
    group: int
    zero: float
    scale_factor: float
    minimum_factor: float
    magnitude: float

    @classmethod
    def from_format(cls, packed: Integer | Binary) -> Self:
        """The same values, arranged for the GPU, on the device `packed` lies on. Changes no value.

        Raises WeightError on other formats, on more than 8 bits, and on a group that is neither a multiple of 8 nor the
        whole row; decode those.
        """
        name = getattr(packed, "format", type(packed).__name__)
        if name == "binary":
            return cls.from_planes([packed])  # pyright: ignore[reportArgumentType]
        if name != "int":
            raise WeightError(f"the GPU kernels hold weights of format 'int' and 'binary', not {name!r}; decode it")
        if TYPE_CHECKING:
            assert isinstance(packed, Integer)
        minimum, minimum_factor = (None, 1.0) if packed.minimum is None else _held([packed.minimum])
        return cls._of(
            [packed.codes.all()],
            *_held([packed.scale]),
            packed.bits,
            packed.group,
            zero=0.0 if packed.minimum is not None or packed.centroids is not None else float(1 << packed.bits - 1),
            minimum=None if minimum is None else minimum[0],
            minimum_factor=minimum_factor,
            column_scale=None if packed.column_scale is None else packed.column_scale.all()[0],
            column_offset=None if packed.column_offset is None else packed.column_offset.all()[0],
            table=None if packed.centroids is None else packed.centroids.to(torch.float32),
        )

    @classmethod
    def from_planes(cls, planes: Sequence[Binary]) -> Self:
        """The sum of binary weights of one shape and group size, multiplied in one pass over x."""
        if not planes:
            raise WeightError("a stacked weight needs at least one binary plane")
        for plane in planes:
            if getattr(plane, "format", None) != "binary":
                raise WeightError(f"the planes of a stacked weight must be binary, got {type(plane).__name__}")
            if plane.shape != planes[0].shape or plane.group != planes[0].group:
                raise WeightError(
                    f"the planes of a stacked weight must agree, got {plane.shape[0]}x{plane.shape[1]} in groups of "
                    f"{plane.group} and {planes[0].shape[0]}x{planes[0].shape[1]} in groups of {planes[0].group}"
                )
        signs, scales = [plane.signs.all() for plane in planes], [plane.scale for plane in planes]
        # +-scale is (bit - 1/2) * 2 scale
        scale, factor = _held(scales)
        return cls._of(signs, scale, 2 * factor, 1, planes[0].group, zero=0.5)

    @classmethod
    def from_matrix(cls, matrix: IntegerMatrix) -> Self | None:
        """A weight in the arrangement of the CPU, arranged for the GPU. Changes no value.

        None for what the kernels do not take: escapes, and minima beside column scales where codes are not 0 to 255.
        """
        if matrix.escapes is not None:
            return None
        plain = dataclasses.replace(
            matrix, factor=1, zero=0, scale=torch.ones_like(matrix.scale),
            minimum=None, column_scale=None, column_offset=None,
        )  # fmt: skip
        codes = torch.empty(matrix.rows, matrix.cols, dtype=torch.int16)
        for first in range(0, matrix.rows, _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS, matrix.rows)
            codes[first:last] = plain.decode(first, last).to(torch.int16)
        low, high = int(codes.min()), int(codes.max())
        if matrix.minimum is not None and matrix.column_scale is not None:  # the kernels then know no zero
            low = matrix.zero
            if not 0 <= int(codes.min()) - low <= high - low <= 255:
                return None
        scale, factor = _compact(_by_row(matrix.scale, matrix.rows))
        minimum, minimum_factor = None, 1.0
        if matrix.minimum is not None:
            minimum, minimum_factor = _compact(_by_row(matrix.minimum, matrix.rows))
        return cls._of(
            [(codes - low).to(torch.uint8)],
            scale[None],
            factor * matrix.factor,
            max((high - low).bit_length(), 1),
            matrix.group,
            zero=matrix.zero / matrix.factor - low,
            minimum=minimum,
            minimum_factor=minimum_factor,
            column_scale=matrix.column_scale,
            column_offset=matrix.column_offset,
        )

    @classmethod
    def _of(
        cls,
        codes: Sequence[Tensor],
        scale: Tensor,
        scale_factor: float,
        bits: int,
        group: int,
        *,
        zero: float,
        minimum: Tensor | None = None,
        minimum_factor: float = 1.0,
        column_scale: Tensor | None = None,
        column_offset: Tensor | None = None,
        table: Tensor | None = None,
    ) -> Self:
        if bits not in WIDTHS:
            raise WeightError(f"the GPU kernels hold codes of 1 to 8 bits, not {bits}; decode the weight")
        cols = codes[0].shape[1]
        if group >= cols:
            group = 0
        if group % 8:
            raise WeightError(f"the GPU kernels need groups of a multiple of 8 columns, not {group}; decode the weight")
        low_width, high_width = WIDTHS[bits]
        low = torch.stack([pack_rows(plane, low_width, 0) for plane in codes])
        high = torch.stack([pack_rows(plane, high_width, low_width) for plane in codes]) if high_width else None
        largest = max(abs(zero), abs((1 << bits) - 1 - zero)) if table is None else _largest(table)
        bound = largest * scale_factor * _largest(scale) * len(codes)
        bound *= 1.0 if column_scale is None else _largest(column_scale)
        bound += 0.0 if minimum is None else minimum_factor * _largest(minimum)
        bound += 0.0 if column_offset is None else _largest(column_offset)
        return cls(
            low,
            high,
            scale,
            minimum,
            column_scale,
            column_offset,
            table,
            cols,
            bits,
            group,
            zero,
            scale_factor,
            minimum_factor,
            # float32 ends near 2^128; beyond these bounds the products leave it anyhow
            math.ldexp(1.0, min(max(math.frexp(bound)[1], -100), 100)) if bound else 1.0,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.low.shape[1], self.cols

    @property
    def device(self) -> torch.device:
        return self.low.device

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    @property
    def unit_bytes(self) -> int:
        """What the kernels read at once: 4, or 1 where a group may end within a word."""
        return 1 if self.group % (32 // WIDTHS[self.bits][0]) else 4

    def to(self, device: torch.device | str) -> Self:
        """A copy whose tensors lie on `device`."""
        return dataclasses.replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., cols] -> [..., rows] in x's dtype (float32, float16 or bfloat16), added up in float32.

        Up to 8 rows of x are multiplied in float32; more are multiplied tile by tile in x's dtype, for which the weight
        is rounded to that dtype. Same input, same bits. Not differentiable. Raises DataError on an x that does not fit,
        WeightError on such a bias, MissingExtraError without Triton.
        """
        from .launch import linear

        return linear(self, x, bias)

    def linear_reference(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`linear` in plain torch."""
        return F.linear(x.float(), self.decode(), None if bias is None else bias.float()).to(x.dtype)

    def decode(self) -> Tensor:
        """The weight, float32 [rows, cols], in plain torch. Each operation in the order of the stored formats."""
        rows, cols = self.shape
        low_width, high_width = WIDTHS[self.bits]
        values = torch.zeros(rows, cols, device=self.device)
        for plane in range(self.low.shape[0]):
            codes = unpack_rows(self.low[plane], low_width, cols)
            if self.high is not None:
                codes |= unpack_rows(self.high[plane], high_width, cols) << low_width
            steps = codes - self.zero if self.table is None else self.table[codes]
            values += steps * self._spread(self.scale[plane].float() * self.scale_factor)
        if self.column_scale is not None:
            values *= self.column_scale
        if self.minimum is not None:
            values += self._spread(self.minimum.float() * self.minimum_factor)
        if self.column_offset is not None:
            values += self.column_offset
        return values

    def _spread(self, values: Tensor) -> Tensor:
        """[rows, groups] -> [rows, cols]"""
        return values.repeat_interleave(self.group or max(self.cols, 1), -1)[:, : self.cols]

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def pack_rows(codes: Tensor, width: int, shift: int) -> Tensor:
    """Bits shift .. shift + width - 1 of codes [rows, cols] -> uint8 [rows, bytes]; width is 1, 2, 4 or 8."""
    rows, cols = codes.shape
    per_byte = 8 // width
    size = -(-cols // (per_byte * ROW_BYTES)) * ROW_BYTES
    packed = torch.zeros(rows, size, dtype=torch.uint8, device=codes.device)
    for first in range(0, rows, _CHUNK_ROWS):
        part = (codes[first : first + _CHUNK_ROWS].to(torch.uint8) >> shift) & (1 << width) - 1
        part = F.pad(part, (0, size * per_byte - cols)).view(len(part), size, per_byte)
        for j in range(per_byte):
            packed[first : first + _CHUNK_ROWS] |= part[..., j] << j * width
    return packed


def unpack_rows(packed: Tensor, width: int, cols: int) -> Tensor:
    """Inverse of `pack_rows` with shift 0: int32 [rows, cols]."""
    parts = [(packed >> shift) & (1 << width) - 1 for shift in range(0, 8, width)]
    return torch.stack(parts, -1).flatten(-2)[:, :cols].to(torch.int32)


def _held(values: Sequence[Values]) -> tuple[Tensor, float]:
    """Scales or minima of the planes, stacked, and the power of two they are to be multiplied with."""
    exponents = {getattr(plane, "exponent", None) for plane in values}
    (exponent,) = exponents if len(exponents) == 1 else (None,)
    if exponent is None:  # log8, or planes that differ: float16 would round
        return torch.stack([plane.all() for plane in values]), 1.0
    halves: list[Tensor] = [plane.halves for plane in values]  # pyright: ignore[reportAttributeAccessIssue]
    return torch.stack(halves), math.ldexp(1.0, exponent)


def _compact(values: Tensor) -> tuple[Tensor, float]:
    """Numbers and the power of two to multiply them with: float16 where that is exact, else float32."""
    for exponent in (0, math.frexp(_largest(values))[1] - 15):
        halves = torch.ldexp(values, torch.tensor(-exponent)).to(torch.float16)
        if torch.equal(torch.ldexp(halves.to(torch.float32), torch.tensor(exponent)), values):
            return halves, math.ldexp(1.0, exponent)
    return values, 1.0


def _by_row(values: Tensor, rows: int) -> Tensor:
    """[blocks, groups, 64] -> [rows, groups]"""
    return values.transpose(1, 2).flatten(0, 1)[:rows].contiguous()


def _largest(values: Tensor) -> float:
    return float(values.float().abs().max()) if values.numel() else 0.0
