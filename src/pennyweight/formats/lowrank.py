"""lowrank: the product of two thin factors, each in any format; W = left @ right."""

from __future__ import annotations

from typing import ClassVar, Self

from torch import Tensor

from ..errors import ArtifactError, WeightError
from ..kernels.integer import ActivationBits
from ..registry import register
from .base import PackedWeight, Reader, Writer, check_options, format_id, read_nested, write_nested


@format_id(5)
@register("lowrank", acts_on="formats", description="the product of two thin factors, each in any format")
class LowRank(PackedWeight):
    """left [rows, rank], right [rank, cols]. Rank 0 is the zero matrix."""

    format: ClassVar[str] = "lowrank"

    def __init__(self, left: PackedWeight, right: PackedWeight) -> None:
        self.left = left
        self.right = right
        self.shape = (left.shape[0], right.shape[1])

    @classmethod
    def from_factors(cls, left: PackedWeight, right: PackedWeight) -> Self:
        """Raises `WeightError` if the factors' ranks differ."""
        if left.shape[1] != right.shape[0]:
            raise WeightError(f"lowrank factors {left.shape} and {right.shape} do not multiply")
        return cls(left, right)

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def shared_nbytes(self) -> int:
        return self.nbytes if self.rank == 0 else self.right.nbytes

    def decode(self) -> Tensor:
        return self.left.decode() @ self.right.decode()

    def rows(self, index: Tensor) -> Tensor:
        return self.left.rows(index) @ self.right.decode()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Two thin products instead of one wide one: rank * (rows + cols) multiplications a vector."""
        y = self.left.linear(self.right.linear(x))
        return y if bias is None else y + bias

    def for_running(self, activation_bits: ActivationBits = 16) -> PackedWeight:
        running = super().for_running()
        assert isinstance(running, LowRank)
        running.left, running.right = (part.for_running(activation_bits) for part in (self.left, self.right))
        return running

    def _write(self, writer: Writer) -> int:
        write_nested(self.left, writer)
        write_nested(self.right, writer)
        return 0

    @classmethod
    def _read(cls, reader: Reader, shape: tuple[int, int], options: int) -> Self:
        check_options(options, 0, cls.format)
        left, right = read_nested(reader), read_nested(reader)
        if left.shape[1] != right.shape[0] or (left.shape[0], right.shape[1]) != shape:
            raise ArtifactError("the factors of a lowrank weight do not fit its shape; the file is damaged")
        return cls(left, right)
