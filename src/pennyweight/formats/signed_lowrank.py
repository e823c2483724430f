"""signed-lowrank: a sign a weight, and the magnitudes the product of two thin factors; W = signs * (left @ right).

With rank 1 that is a scale a row times a scale a column. A matrix of magnitudes has one dominant singular direction,
so a small rank catches most of it: the block of BitStack (arXiv 2410.23918, section 2.2), whose sum is `stacked`.
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
from .running import RunningIntegers, RunningSigned
from .scales import Float16Values, store


@format_id(10)
@register(
    "signed-lowrank",
    acts_on="formats",
    paper="2410.23918",
    description="one sign a weight, magnitudes the product of two thin factors",
)
class SignedLowRank(PackedWeight):
    """signs: one bit a weight [rows, cols], 1 is +; left [rows, r], right [r, cols]; r = 0 is the zero matrix."""

    format: ClassVar[str] = "signed-lowrank"

    def __init__(self, signs: CodeMatrix, left: Float16Values, right: Float16Values) -> None:
        self.signs = signs
        self.left = left
        self.right = right
        self.shape = (signs.rows, signs.cols)

    @classmethod
    def from_factors(cls, signs: Tensor, left: Tensor, right: Tensor) -> Self:
        """signs [rows, cols]: bool (True is +), or numbers of which those >= 0 are +. left [rows, r], right [r, cols].

        The factors are rounded to float16. Raises `WeightError` on shapes that do not fit and values not finite.
        """
        if signs.ndim != 2 or left.ndim != 2:
            raise WeightError(f"signed-lowrank needs matrices, got shapes {tuple(signs.shape)} and {tuple(left.shape)}")
        check_size(left, (signs.shape[0], left.shape[1]), "the left factor of a signed-lowrank weight")
        check_size(right, (left.shape[1], signs.shape[1]), "the right factor of a signed-lowrank weight")
        positive = signs if signs.dtype == torch.bool else signs >= 0
        halves = (store(factor, "float16", "signed-lowrank") for factor in (left, right))
        return cls(CodeMatrix.of(positive, 1), *halves)  # pyright: ignore[reportArgumentType]  (float16 as asked)

    @classmethod
    def encode(cls, weight: Tensor, rank: int = 16) -> Self:
        """weight [rows, cols] -> its signs (sign(0) = +) and the best rank-r approximation of its magnitudes.

        |weight| = P diag(s) Q^T; left = P sqrt(s), right = sqrt(s) Q^T, first `rank` columns and rows. The squared
        error is the sum of the other s squared, up to the rounding of the factors. Takes a full decomposition.
        """
        weight = check_matrix(weight, "signed-lowrank")
        if rank < 0:
            raise WeightError(f"signed-lowrank got rank {rank}; it must be 0 or more")
        left, values, right = torch.linalg.svd(weight.abs(), full_matrices=False)
        rank = min(rank, len(values))
        side = torch.where(left[:, :rank].sum(0) < 0, -1.0, 1.0) * values[:rank].sqrt()  # the positive one of two twins
        return cls.from_factors(weight >= 0, left[:, :rank] * side, right[:rank] * side[:, None])

    @property
    def rank(self) -> int:
        return self.left.halves.shape[1]

    @property
    def shared_nbytes(self) -> int:
        factor = Writer()
        self.right.write(factor)
        return len(factor.data)

    def decode(self) -> Tensor:
        return self._values(self.signs.all(), self.left.all())

    def rows(self, index: Tensor) -> Tensor:
        return self._values(self.signs.take(index), self.left.take(index))

    def _values(self, signs: Tensor, left: Tensor) -> Tensor:
        return signs.to(torch.float32).mul_(2).sub_(1).mul_(left @ self.right.all())

    def for_running(self, activation_bits: ActivationBits = 16) -> PackedWeight:
        left, right, one = self.left.all(), self.right.all(), self.rank == 1
        matrix = IntegerMatrix.of(
            self.signs.all(),
            left if one else torch.ones(self.shape[0], 1),
            0,
            factor=2,
            zero=1,
            column_scale=right if one else None,
        )
        if matrix is None or self.rank == 0:
            return super().for_running()
        return RunningIntegers(matrix, activation_bits) if one else RunningSigned(matrix, left, right, activation_bits)

    def _write(self, writer: Writer) -> int:
        writer.varint(self.rank)
        self.signs.write(writer)
        self.left.write(writer)
        self.right.write(writer)
        return 0

    @classmethod
    def _read(cls, reader: Reader, shape: tuple[int, int], options: int) -> Self:
        check_options(options, 0, cls.format)
        rows, cols = shape
        rank = reader.varint()
        signs = CodeMatrix.read(reader, rows, cols, 1)
        left = Float16Values.read(reader, rows, rank)
        return cls(signs, left, Float16Values.read(reader, rank, cols))
