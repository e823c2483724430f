"""int: codes of 1 to 16 bits with a scale (and, asymmetric, a minimum) per group of columns.

    symmetric   value = code * scale,            code in [-2^(b-1), 2^(b-1) - 1], stored as code + 2^(b-1)
    asymmetric  value = code * scale + minimum,  code in [0, 2^b - 1]
    centroids   value = centroid[code] * scale   (symmetric; for codes chosen by an entropy-constrained quantiser)

A code's product with the scale is further multiplied by column_scale[column], and column_offset[column] is added to
the value, where there are such. All in float32, left to right, each operation rounded by itself.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import ArtifactError, WeightError
from ..kernels.integer import ActivationBits, IntegerMatrix
from ..registry import register
from .base import PackedWeight, Reader, Writer, check_matrix, check_size, format_id
from .codes import CodeMatrix
from .groups import check_group, combine, group_count, grouped
from .running import RunningIntegers
from .scales import Float16Values, Log8Values, ScaleCoding, Values, read_halves, round_values, store, write_halves

_CHUNK_ROWS = 4096  # rows decoded at once, which bounds the working memory
ASYMMETRIC, OFFSET, LOG8, CENTROIDS, COLUMN_SCALE = 1, 2, 4, 8, 16  # option bits


@format_id(2)
@register("int", acts_on="formats", description="1 to 16 bits a weight with a scale per group of columns")
class Integer(PackedWeight):
    """codes [rows, cols]; scale, minimum [rows, groups]; column_scale, column_offset [1, cols]; centroids [2^bits]."""

    format: ClassVar[str] = "int"

    def __init__(
        self,
        codes: CodeMatrix,
        group: int,
        scale: Values,
        minimum: Float16Values | None,
        column_offset: Float16Values | None,
        centroids: Tensor | None,
        column_scale: Log8Values | None = None,
    ) -> None:
        self.codes = codes
        self.group = group
        self.scale = scale
        self.minimum = minimum
        self.column_offset = column_offset
        self.centroids = centroids
        self.column_scale = column_scale
        self.shape = (codes.rows, codes.cols)

    @property
    def bits(self) -> int:
        return self.codes.bits

    @staticmethod
    def round_scale(scale: Tensor, coding: ScaleCoding = "float16") -> Tensor:
        """The scales as they will be stored. Rounding again changes nothing. Call before choosing codes."""
        return round_values(scale, coding)

    @staticmethod
    def round_minimum(minimum: Tensor) -> Tensor:
        """The minima (or column offsets) as they will be stored."""
        return round_values(minimum, "float16")

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        minimum: Tensor | None = None,
        *,
        bits: int,
        group: int,
        column_offset: Tensor | None = None,
        scale_coding: ScaleCoding = "float16",
        centroids: Tensor | None = None,
        column_scale: Tensor | None = None,
    ) -> Self:
        """From codes chosen by the caller.

        codes: integers [rows, cols]. scale, minimum: [rows, groups] with groups = ceil(cols / group), one if group is
        0 (the whole row). column_offset: [cols]. column_scale: [cols], stored as log8. centroids: [2^bits], indexed by
        code + 2^(bits-1), in units of the scale; rounded to float16, entries of codes that do not occur are dropped.
        Raises `WeightError` on shapes that do not fit, codes out of range, and values that are not finite.
        """
        if not 1 <= bits <= 16:
            raise WeightError(f"int has 1 to 16 bits, got {bits}")
        check_group(group)
        if codes.ndim != 2:
            raise WeightError(f"int needs codes [rows, cols], got shape {tuple(codes.shape)}")
        rows, cols = codes.shape
        check_size(scale, (rows, group_count(cols, group)), "the scale of an int weight")
        lowest = 0
        if minimum is None:
            lowest = -(1 << bits - 1)
        else:
            check_size(minimum, tuple(scale.shape), "the minimum of an int weight")
            if centroids is not None:
                raise WeightError("int takes either a minimum or centroids, not both")
        if codes.numel() and (int(codes.min()) < lowest or int(codes.max()) >= lowest + (1 << bits)):
            raise WeightError(f"int got codes that {bits} bits cannot hold; clamp them first")
        if column_offset is not None:
            check_size(column_offset, (cols,), "the column offset of an int weight")
        if column_scale is not None:
            check_size(column_scale, (cols,), "the column scale of an int weight")
        packed = CodeMatrix.of(codes, bits, lowest)
        return cls(
            packed,
            group,
            store(scale, scale_coding, "int"),
            None if minimum is None else Float16Values.of(_finite(minimum)),
            None if column_offset is None else Float16Values.of(_finite(column_offset)[None]),
            None if centroids is None else _stored_centroids(centroids, packed),
            None if column_scale is None else Log8Values.of(_finite(column_scale)[None]),
        )

    @classmethod
    def encode(cls, weight: Tensor, bits: int, group: int = 64, symmetric: bool = False) -> Self:
        """Round weight [rows, cols] to the nearest of the 2^bits levels between each group's extremes."""
        weight = check_matrix(weight, "int")
        check_group(group)
        if symmetric:
            peak = grouped(weight, group, 0.0).abs().amax(-1)
            scale, minimum = cls.round_scale(peak / max((1 << bits - 1) - 1, 1)), None
            low, high = -(1 << bits - 1), (1 << bits - 1) - 1
        else:
            low, high = 0, (1 << bits) - 1
            minimum = cls.round_minimum(grouped(weight, group, torch.inf).amin(-1))
            scale = cls.round_scale((grouped(weight, group, -torch.inf).amax(-1) - minimum).clamp_min(0) / high)
        steps = weight if minimum is None else combine(torch.sub, weight, minimum, group)
        steps = combine(torch.div, steps, torch.where(scale > 0, scale, 1.0), group)
        codes = steps.round_().clamp_(low, high).to(torch.int32)
        return cls.from_codes(codes, scale, minimum, bits=bits, group=group)

    def decode(self) -> Tensor:
        values = torch.empty(self.shape, dtype=torch.float32, device=self.codes.packed.device)
        index = torch.arange(self.shape[0], device=values.device)
        for first in range(0, self.shape[0], _CHUNK_ROWS):
            values[first : first + _CHUNK_ROWS] = self.rows(index[first : first + _CHUNK_ROWS])
        return values

    def rows(self, index: Tensor) -> Tensor:
        minimum = None if self.minimum is None else self.minimum.take(index)
        return self._values(self.codes.take(index), self.scale.take(index), minimum)

    def for_running(self, activation_bits: ActivationBits = 16) -> PackedWeight:
        if self.centroids is not None:
            return super().for_running()
        matrix = IntegerMatrix.of(
            self.codes.all(),
            self.scale.all(),
            self.group,
            zero=0 if self.minimum is not None else 1 << self.bits - 1,
            minimum=None if self.minimum is None else self.minimum.all(),
            column_scale=None if self.column_scale is None else self.column_scale.all(),
            column_offset=None if self.column_offset is None else self.column_offset.all(),
        )
        return super().for_running() if matrix is None else RunningIntegers(matrix, activation_bits)

    def _values(self, codes: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
        if self.centroids is not None:
            values = self.centroids.to(torch.float32)[codes.to(torch.int32)]
        else:
            values = codes.to(torch.float32)
            if self.minimum is None:
                values -= 1 << self.bits - 1
        values = combine(torch.Tensor.mul_, values, scale, self.group)
        if self.column_scale is not None:
            values *= self.column_scale.all()[0]
        if minimum is not None:
            values = combine(torch.Tensor.add_, values, minimum, self.group)
        if self.column_offset is not None:
            values += self.column_offset.all()[0]
        return values

    def _write(self, writer: Writer) -> int:
        writer.u8(self.bits)
        writer.varint(self.group)
        self.codes.write(writer)
        self.scale.write(writer)
        options = LOG8 if isinstance(self.scale, Log8Values) else 0
        if self.minimum is not None:
            self.minimum.write(writer)
            options |= ASYMMETRIC
        if self.column_offset is not None:
            self.column_offset.write(writer)
            options |= OFFSET
        if self.centroids is not None:
            write_halves(writer, self.centroids[_occurring(self.codes)][None])
            options |= CENTROIDS
        if self.column_scale is not None:
            self.column_scale.write(writer)
            options |= COLUMN_SCALE
        return options

    @classmethod
    def _read(cls, reader: Reader, shape: tuple[int, int], options: int) -> Self:
        if options & ASYMMETRIC and options & CENTROIDS:
            raise ArtifactError("an int weight has both a minimum and centroids; the file is damaged")
        bits, group = reader.u8(), reader.varint()
        if not 1 <= bits <= 16:
            raise ArtifactError(f"an int weight of {bits} bits; the file is damaged")
        rows, cols = shape
        codes = CodeMatrix.read(reader, rows, cols, bits)
        groups = group_count(cols, group)
        scale = (Log8Values if options & LOG8 else Float16Values).read(reader, rows, groups)
        minimum = Float16Values.read(reader, rows, groups) if options & ASYMMETRIC else None
        column_offset = Float16Values.read(reader, 1, cols) if options & OFFSET else None
        centroids = None
        if options & CENTROIDS:
            occurring = _occurring(codes)
            centroids = torch.zeros(1 << bits, dtype=torch.float16)
            centroids[occurring] = read_halves(reader, 1, len(occurring), torch.float16)[0]
        column_scale = Log8Values.read(reader, 1, cols) if options & COLUMN_SCALE else None
        return cls(codes, group, scale, minimum, column_offset, centroids, column_scale)


def _finite(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise WeightError("int got a NaN or infinite minimum, offset or centroid; mend the weights first")
    return values


def _occurring(codes: CodeMatrix) -> Tensor:
    """The stored code values that occur, ascending."""
    return torch.bincount(codes.all().flatten(), minlength=1 << codes.bits).nonzero()[:, 0]


def _stored_centroids(centroids: Tensor, codes: CodeMatrix) -> Tensor:
    check_size(centroids, (1 << codes.bits,), "the centroid table of an int weight")
    occurring = _occurring(codes)
    table = torch.zeros(1 << codes.bits, dtype=torch.float16, device=codes.packed.device)
    table[occurring] = centroids.detach().to(table.device)[occurring].to(torch.float16)
    return _finite(table)
