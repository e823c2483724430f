"""codebook: vector quantisation. Every block of d consecutive weights of a row is one of K stored vectors.

row r = row_scale[r] * concatenation of codebook[code] over the row's blocks, cut to cols
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import ArtifactError, WeightError
from ..registry import register
from .base import PackedWeight, Reader, Writer, check_options, check_size, format_id
from .codes import CodeMatrix
from .scales import Float16Values, Log8Values, ScaleCoding, Values, store

ROW_SCALE, LOG8 = 1, 2  # option bits
MAX_ENTRIES = 1 << 16


@format_id(6)
@register(
    "codebook", acts_on="formats", description="blocks of 1 to 8 weights as entries of a table (vector quantisation)"
)
class Codebook(PackedWeight):
    """codes [rows, ceil(cols / d)]; codebook [K, d]; row_scale [rows, 1] or None."""

    format: ClassVar[str] = "codebook"

    def __init__(self, codes: CodeMatrix, codebook: Float16Values, cols: int, row_scale: Values | None) -> None:
        self.codes = codes
        self.codebook = codebook
        self.row_scale = row_scale
        self.shape = (codes.rows, cols)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        codebook: Tensor,
        *,
        cols: int,
        row_scale: Tensor | None = None,
        scale_coding: ScaleCoding = "float16",
    ) -> Self:
        """codes: integers [rows, ceil(cols / d)] below K. codebook [K, d], rounded to float16. row_scale [rows].

        Raises `WeightError` on shapes that do not fit, codes out of range and values that are not finite.
        """
        if codebook.ndim != 2 or not 1 <= codebook.shape[0] <= MAX_ENTRIES or not 1 <= codebook.shape[1] <= 8:
            raise WeightError(
                f"a codebook is [K, d] with K in 1..{MAX_ENTRIES} and d in 1..8, got shape {tuple(codebook.shape)}"
            )
        entries, d = codebook.shape
        if codes.ndim != 2 or codes.shape[1] != -(-cols // d):
            raise WeightError(f"codebook codes have shape {tuple(codes.shape)}, expected [rows, {-(-cols // d)}]")
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= entries):
            raise WeightError(f"codebook got codes outside 0..{entries - 1}")
        scale = None
        if row_scale is not None:
            check_size(row_scale, (codes.shape[0],), "the row scale of a codebook weight")
            scale = store(row_scale[:, None], scale_coding, "codebook")
        table = store(codebook, "float16", "codebook")
        assert isinstance(table, Float16Values)
        return cls(CodeMatrix.of(codes, (entries - 1).bit_length()), table, cols, scale)

    @property
    def shared_nbytes(self) -> int:
        table = Writer()
        self.codebook.write(table)
        return len(table.data)

    def decode(self) -> Tensor:
        return self._values(self.codes.all(), None if self.row_scale is None else self.row_scale.all())

    def rows(self, index: Tensor) -> Tensor:
        return self._values(self.codes.take(index), None if self.row_scale is None else self.row_scale.take(index))

    def _values(self, codes: Tensor, row_scale: Tensor | None) -> Tensor:
        values = self.codebook.all()[codes.to(torch.int32)].flatten(-2)[..., : self.shape[1]]
        return values.contiguous() if row_scale is None else values * row_scale

    def _write(self, writer: Writer) -> int:
        entries, d = self.codebook.halves.shape
        writer.u8(d)
        writer.varint(entries)
        self.codebook.write(writer)
        self.codes.write(writer)
        if self.row_scale is None:
            return 0
        self.row_scale.write(writer)
        return ROW_SCALE | (LOG8 if isinstance(self.row_scale, Log8Values) else 0)

    @classmethod
    def _read(cls, reader: Reader, shape: tuple[int, int], options: int) -> Self:
        check_options(options, ROW_SCALE | LOG8, cls.format)
        d, entries = reader.u8(), reader.varint(MAX_ENTRIES)
        if not 1 <= d <= 8 or entries < 1:
            raise ArtifactError(f"a codebook of {entries} entries of {d} weights; the file is damaged")
        rows, cols = shape
        codebook = Float16Values.read(reader, entries, d)
        codes = CodeMatrix.read(reader, rows, -(-cols // d), (entries - 1).bit_length())
        if codes.packed.numel() and int(codes.all().max()) >= entries:
            raise ArtifactError("a codebook weight names an entry beyond its table; the file is damaged")
        scale = None
        if options & ROW_SCALE:
            scale = (Log8Values if options & LOG8 else Float16Values).read(reader, rows, 1)
        return cls(codes, codebook, cols, scale)
