"""split: some rows in one format, the others in another; one bit a row says which.

Between two candidates of a layer lie as many sizes as it has rows, so that a plan can meet its budget closely.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import ArtifactError, WeightError
from ..kernels.integer import ActivationBits
from ..registry import register
from .base import PackedWeight, Reader, Writer, check_options, format_id, read_nested, write_nested
from .codes import CodeMatrix


@format_id(7)
@register("split", acts_on="formats", description="rows divided between two formats")
class Split(PackedWeight):
    """second_rows: one bit a row [1, rows]; the rows with 0 come in order from `first`, those with 1 from `second`."""

    format: ClassVar[str] = "split"
    place: Tensor | None = None  # kept by what runs

    def __init__(self, second_rows: CodeMatrix, first: PackedWeight, second: PackedWeight) -> None:
        self.second_rows = second_rows
        self.first = first
        self.second = second
        self.shape = (second_rows.cols, first.shape[1])

    @classmethod
    def from_parts(cls, take_second: Tensor, first: PackedWeight, second: PackedWeight) -> Self:
        """take_second: bool [rows]. Raises `WeightError` unless the parts have as many rows as it says."""
        take_second = take_second.to(torch.bool)
        count = int(take_second.sum())
        if first.shape[0] != take_second.numel() - count or second.shape[0] != count:
            raise WeightError(
                f"split takes {take_second.numel() - count} and {count} rows, but its parts have "
                f"{first.shape[0]} and {second.shape[0]}"
            )
        if first.shape[1] != second.shape[1]:
            raise WeightError(f"split parts have {first.shape[1]} and {second.shape[1]} columns; they must agree")
        return cls(CodeMatrix.of(take_second.view(1, -1), 1), first, second)

    def decode(self) -> Tensor:
        flags = self.second_rows.all()[0].bool()
        out = torch.empty(self.shape, device=flags.device)
        out[~flags] = self.first.decode()
        out[flags] = self.second.decode()
        return out

    def rows(self, index: Tensor) -> Tensor:
        flags = self.second_rows.all()[0].to(torch.int64)
        before = flags.cumsum(0) - flags  # rows of `second` above each row
        in_second = flags[index].bool()
        place = torch.where(in_second, before[index], index.remainder(self.shape[0]) - before[index])
        out = torch.empty(*index.shape, self.shape[1], device=flags.device)
        out[~in_second] = self.first.rows(place[~in_second])
        out[in_second] = self.second.rows(place[in_second])
        return out

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        both = torch.cat([self.first.linear(x), self.second.linear(x)], -1)
        y = both.index_select(-1, (self._place() if self.place is None else self.place).to(x.device))
        return y if bias is None else y + bias

    def _place(self) -> Tensor:
        """int64 [rows]: where each row stands when those of `first` come first, those of `second` behind them."""
        flags = self.second_rows.all()[0].to(torch.int64)
        before = flags.cumsum(0) - flags
        return torch.where(
            flags.bool(), self.first.shape[0] + before, torch.arange(len(flags), device=flags.device) - before
        )

    def for_running(self, activation_bits: ActivationBits = 16) -> PackedWeight:
        running = super().for_running()
        assert isinstance(running, Split)
        running.first, running.second = (part.for_running(activation_bits) for part in (self.first, self.second))
        running.place = self._place()
        return running

    def _write(self, writer: Writer) -> int:
        self.second_rows.write(writer)
        write_nested(self.first, writer)
        write_nested(self.second, writer)
        return 0

    @classmethod
    def _read(cls, reader: Reader, shape: tuple[int, int], options: int) -> Self:
        check_options(options, 0, cls.format)
        second_rows = CodeMatrix.read(reader, 1, shape[0], 1)
        first, second = read_nested(reader), read_nested(reader)
        count = int(second_rows.all().sum())
        if (first.shape, second.shape) != ((shape[0] - count, shape[1]), (count, shape[1])):
            raise ArtifactError("the parts of a split weight do not fit its shape; the file is damaged")
        return cls(second_rows, first, second)
