"""stacked: a sum of weights of one shape, each in any format, the coarsest first.

Every part is meant to approximate what the parts before it leave over, so any number of the first of them is a weight
by itself: `stages(n)`. That gives one file for every size, as in BitStack (arXiv 2410.23918), whose blocks are
`signed-lowrank`; parts in `binary` are the sums of scaled signs of ABC-Net (arXiv 1711.11294).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import ArtifactError, WeightError
from ..kernels.integer import ActivationBits
from ..registry import register
from .base import PackedWeight, Reader, Writer, check_matrix, check_options, format_id, read_nested, write_nested
from .binary import Binary


@format_id(9)
@register(
    "stacked", acts_on="formats", paper="2410.23918", description="a sum of weights, each of what those before it leave"
)
class Stacked(PackedWeight):
    """parts: one or more of the shape [rows, cols]; the weight is their sum, added up in order in float32."""

    format: ClassVar[str] = "stacked"

    def __init__(self, parts: Sequence[PackedWeight]) -> None:
        self.parts = tuple(parts)
        self.shape = self.parts[0].shape

    @classmethod
    def from_parts(cls, parts: Sequence[PackedWeight]) -> Self:
        """Raises `WeightError` unless there are parts and all have one shape."""
        if not parts or any(part.shape != parts[0].shape for part in parts):
            raise WeightError(f"stacked needs parts of one shape, got {[list(part.shape) for part in parts]}")
        return cls(parts)

    @classmethod
    def encode(cls, weight: Tensor, stages: int, encode_part: Callable[[Tensor], PackedWeight] = Binary.encode) -> Self:
        """Encode weight [rows, cols], then `stages` - 1 times what is left over, as stored: rounding is made up for.

        encode_part: matrix -> its packed form, e.g. a partial `SignedLowRank.encode`.
        """
        if stages < 1:
            raise WeightError(f"stacked needs at least one stage, got {stages}")
        rest = check_matrix(weight, "stacked")
        parts = []
        for _ in range(stages):
            parts.append(encode_part(rest))
            rest = rest - parts[-1].decode()
        return cls.from_parts(parts)

    def stages(self, count: int) -> Self:
        """The sum of the first `count` parts, which it shares with this one. `WeightError` unless 1 <= count <= all."""
        if not 1 <= count <= len(self.parts):
            raise WeightError(f"a stacked weight of {len(self.parts)} stages has no {count}; ask for 1 or more of them")
        return type(self)(self.parts[:count])

    @property
    def shared_nbytes(self) -> int:
        return sum(part.shared_nbytes for part in self.parts)

    def decode(self) -> Tensor:
        return _sum([part.decode() for part in self.parts])

    def rows(self, index: Tensor) -> Tensor:
        return _sum([part.rows(index) for part in self.parts])

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.runs:  # decoded parts multiply together
            return super().linear(x, bias)
        exact = x.to(torch.float32)
        first, *others = self.parts
        y = first.linear(exact, bias)
        for part in others:
            y = y + part.linear(exact)
        return y.to(x.dtype)

    def for_running(self, activation_bits: ActivationBits = 16) -> PackedWeight:
        running = super().for_running()
        assert isinstance(running, Stacked)
        running.parts = tuple(part.for_running(activation_bits) for part in self.parts)
        return running

    def to(self, device: torch.device | str) -> Self:
        moved = super().to(device)
        moved.parts = tuple(part.to(device) for part in self.parts)
        return moved

    def _write(self, writer: Writer) -> int:
        writer.varint(len(self.parts))
        for part in self.parts:
            write_nested(part, writer)
        return 0

    @classmethod
    def _read(cls, reader: Reader, shape: tuple[int, int], options: int) -> Self:
        check_options(options, 0, cls.format)
        count = reader.varint()
        if count < 1 or count > reader.left:
            raise ArtifactError(f"a stacked weight of {count} stages in {reader.left} bytes; the file is damaged")
        parts = [read_nested(reader) for _ in range(count)]
        if any(part.shape != shape for part in parts):
            raise ArtifactError("the stages of a stacked weight do not fit its shape; the file is damaged")
        return cls(parts)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
