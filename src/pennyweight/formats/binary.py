"""binary: one sign a weight and a scale per group of columns; value = +scale where the bit is 1, else -scale.

For given signs the squared error of a group is least at scale = mean |w|, which is what `encode` takes (sign(0) = +).
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import WeightError
from ..kernels.integer import ActivationBits, IntegerMatrix
from ..registry import register
from .base import PackedWeight, Reader, Writer, check_matrix, check_options, check_size, format_id
from .codes import CodeMatrix
from .groups import check_group, combine, group_count, grouped
from .running import RunningIntegers
from .scales import Float16Values, Log8Values, ScaleCoding, Values, store

LOG8 = 1  # option bit


@format_id(3)
@register("binary", acts_on="formats", description="one sign a weight with a scale per group of columns")
class Binary(PackedWeight):
    """signs: one bit a weight [rows, cols], 1 is +; scale [rows, groups]; group 0 is the whole row."""

    format: ClassVar[str] = "binary"

    def __init__(self, signs: CodeMatrix, group: int, scale: Values) -> None:
        self.signs = signs
        self.group = group
        self.scale = scale
        self.shape = (signs.rows, signs.cols)

    @classmethod
    def from_signs(cls, signs: Tensor, scale: Tensor, group: int, scale_coding: ScaleCoding = "float16") -> Self:
        """signs [rows, cols]: bool (True is +), or numbers of which those >= 0 are +. scale [rows, groups].

        Raises `WeightError` on shapes that do not fit and scales that are not finite.
        """
        check_group(group)
        if signs.ndim != 2:
            raise WeightError(f"binary needs signs [rows, cols], got shape {tuple(signs.shape)}")
        check_size(scale, (signs.shape[0], group_count(signs.shape[1], group)), "the scale of a binary weight")
        positive = signs if signs.dtype == torch.bool else signs >= 0
        return cls(CodeMatrix.of(positive, 1), group, store(scale, scale_coding, "binary"))

    @classmethod
    def encode(cls, weight: Tensor, group: int = 64) -> Self:
        """weight [rows, cols] -> its signs and the mean magnitude of each group."""
        weight = check_matrix(weight, "binary")
        check_group(group)
        sizes = grouped(torch.ones_like(weight[:1]), group, 0.0).sum(-1)
        mean = grouped(weight.abs(), group, 0.0).sum(-1) / sizes
        return cls.from_signs(weight >= 0, mean, group)

    def decode(self) -> Tensor:
        return self._values(self.signs.all(), self.scale.all())

    def rows(self, index: Tensor) -> Tensor:
        return self._values(self.signs.take(index), self.scale.take(index))

    def for_running(self, activation_bits: ActivationBits = 16) -> PackedWeight:
        matrix = IntegerMatrix.of(self.signs.all(), self.scale.all(), self.group, factor=2, zero=1)
        return super().for_running() if matrix is None else RunningIntegers(matrix, activation_bits)

    def _values(self, signs: Tensor, scale: Tensor) -> Tensor:
        return combine(torch.Tensor.mul_, signs.to(torch.float32).mul_(2).sub_(1), scale, self.group)

    def _write(self, writer: Writer) -> int:
        writer.varint(self.group)
        self.signs.write(writer)
        self.scale.write(writer)
        return LOG8 if isinstance(self.scale, Log8Values) else 0

    @classmethod
    def _read(cls, reader: Reader, shape: tuple[int, int], options: int) -> Self:
        check_options(options, LOG8, cls.format)
        group = reader.varint()
        signs = CodeMatrix.read(reader, *shape, 1)
        scale = (Log8Values if options & LOG8 else Float16Values).read(reader, shape[0], group_count(shape[1], group))
        return cls(signs, group, scale)
