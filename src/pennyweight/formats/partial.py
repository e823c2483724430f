"""partial: most weights binary, the salient ones exact or nearly so; value = salient under a mask, else rest.

That is the mixed weight of PB-LLM (arXiv 2310.00034): a few per cent of the weights carry most of the function, and
keep 8 bits; the others keep their signs. Every position has a bit in `rest`, as a row must be readable by itself, so a
mask of a share p with values of b bits costs 1 + H(p) + b p bits a weight beside scales (H: entropy), where leaving
out the signs under the mask would save p. The paper's mean of the unsalient weights (its code's `mu`) makes `rest` an
`int` weight of 1 bit with a minimum; `encode` goes without it.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import ArtifactError, WeightError
from ..kernels.integer import ActivationBits
from ..kernels.sparse import SparseMatrix
from ..registry import register
from .base import (
    PackedWeight,
    Reader,
    Writer,
    check_matrix,
    check_options,
    check_size,
    format_id,
    read_nested,
    write_nested,
)
from .binary import Binary
from .groups import check_group, grouped
from .running import RunningPartial, RunningSparse
from .sparse import Sparse


@format_id(8)
@register(
    "partial",
    acts_on="formats",
    paper="2310.00034",
    description="signs, and the salient weights as integers or float16",
)
class Partial(PackedWeight):
    """rest: [rows, cols] in any format, usually `binary`; salient: `sparse` [rows, cols]; its mask decides."""

    format: ClassVar[str] = "partial"

    def __init__(self, rest: PackedWeight, salient: Sparse) -> None:
        self.rest = rest
        self.salient = salient
        self.shape = rest.shape

    @classmethod
    def from_parts(cls, rest: PackedWeight, salient: Sparse) -> Self:
        """Raises `WeightError` unless both have one shape."""
        if rest.shape != salient.shape:
            raise WeightError(f"partial has a rest {list(rest.shape)} but salient weights {list(salient.shape)}")
        return cls(rest, salient)

    @classmethod
    def encode(cls, weight: Tensor, salient: Tensor, group: int = 64, value_bits: int = 8) -> Self:
        """weight, salient (True where a value is kept) [rows, cols]; value_bits of the salient ones, 16 or 2..8.

        The scale of a group is the mean magnitude of its other weights, for given signs the best one: PB-LLM's formula
        (its code divides by all of them, which shrinks the scale). Raises `WeightError` as `Sparse.encode` does.
        """
        weight = check_matrix(weight, "partial")
        check_group(group)
        check_size(salient, tuple(weight.shape), "the mask of a partial weight")
        others = (~salient.to(torch.bool)).to(torch.float32)
        total = grouped(weight.abs() * others, group, 0.0).sum(-1)
        scale = total / grouped(others, group, 0.0).sum(-1).clamp_min(1)
        return cls(Binary.from_signs(weight >= 0, scale, group), Sparse.encode(weight, salient, value_bits))

    @property
    def shared_nbytes(self) -> int:
        return self.rest.shared_nbytes

    def decode(self) -> Tensor:
        return torch.where(self.salient.mask.all().bool(), self.salient.decode(), self.rest.decode())

    def rows(self, index: Tensor) -> Tensor:
        mask = self.salient.mask.take(index).bool()
        return torch.where(mask, self.salient.rows(index), self.rest.rows(index))

    def for_running(self, activation_bits: ActivationBits = 16) -> PackedWeight:
        mask = self.salient.mask.all().bool()
        difference = SparseMatrix.of(mask, (self.salient.decode() - self.rest.decode())[mask])
        if difference is None:
            return super().for_running()
        return RunningPartial(self.rest.for_running(activation_bits), RunningSparse(difference))

    def _write(self, writer: Writer) -> int:
        write_nested(self.rest, writer)
        write_nested(self.salient, writer)
        return 0

    @classmethod
    def _read(cls, reader: Reader, shape: tuple[int, int], options: int) -> Self:
        check_options(options, 0, cls.format)
        rest, salient = read_nested(reader), read_nested(reader)
        if not isinstance(salient, Sparse) or (rest.shape, salient.shape) != (shape, shape):
            raise ArtifactError("the parts of a partial weight do not fit each other; the file is damaged")
        return cls(rest, salient)
