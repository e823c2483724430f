"""Products with weights of few non-zeros, on the CPU.

    weight   value = stored * scale[row], or what is stored where there is no scale, under a mask; zero elsewhere
    product  float32; a row's products are added up in the order of its columns, each operation rounded by itself

so a result depends neither on the number of threads, nor on the instruction set, nor on what other inputs come with it.
Rows are sorted by their number of non-zeros and interleaved, 64 at a time, so that neighbouring lanes have about equal
work (sliced ELLPACK, arXiv 1307.6209). One input is gathered from; several lie side by side, and a non-zero multiplies
all of them at once. Where the weight is zero an input plays no part, not even NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import _cpu, needs_operator, tell_once  # pyright: ignore[reportAttributeAccessIssue]

BLOCK = 64  # rows that lie together
MOST_COLUMNS = (1 << 16) - 1
_CHUNK_ROWS = 1024  # rows arranged or decoded at once, which bounds the working memory


@dataclass
class SparseMatrix:
    """A weight [rows, cols] in the arrangement of kernels/cpu/sparse.h.

    column: int16 whose bits are unsigned [steps * 64]; step t of a block is a non-zero of each of its 64 rows, and
        the column is `cols` where a row has no more. values: float32, float16 or int8 [steps * 64].
    start: int64 [blocks + 1], the first step of each block. order: int32 [rows], the row that each lane holds.
    scale: float32 [rows], or None for 1.
    """

    column: Tensor
    values: Tensor
    start: Tensor
    order: Tensor
    scale: Tensor | None
    cols: int
    _native: Any = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, mask: Tensor, values: Tensor, scale: Tensor | None = None) -> Self | None:
        """From mask [rows, cols], True where a weight is kept, and the kept values, row by row [kept].

        values: float32, float16 or int8, which the result keeps. scale: [rows]. None for more than 65535 columns.
        """
        rows, cols = mask.shape
        if cols > MOST_COLUMNS:
            return None
        counts = (
            torch.cat([part.sum(1, dtype=torch.int64) for part in mask.split(_CHUNK_ROWS)]) if rows else mask.sum(1)
        )
        order = counts.argsort(descending=True, stable=True)
        longest = counts[order[::BLOCK]]  # the first row of a block has the most
        start = F.pad(longest.cumsum(0), (1, 0))
        column = torch.full((int(start[-1]), BLOCK), cols, dtype=torch.int32).to(torch.int16)
        stored = torch.zeros(int(start[-1]), BLOCK, dtype=values.dtype)
        lane = torch.empty_like(order)
        lane[order] = torch.arange(rows)
        first = 0
        for begin in range(0, rows, _CHUNK_ROWS):
            row, col = mask[begin : begin + _CHUNK_ROWS].nonzero(as_tuple=True)
            own = counts[begin : begin + _CHUNK_ROWS]
            step = torch.arange(len(row)) - (own.cumsum(0) - own)[row]
            place = lane[row + begin]
            step += start[place // BLOCK]
            column[step, place % BLOCK] = col.to(torch.int32).to(torch.int16)
            stored[step, place % BLOCK] = values[first : first + len(row)]
            first += len(row)
        scale = None if scale is None else scale.to(torch.float32).flatten().contiguous()
        return cls(column.flatten(), stored.flatten(), start, order.to(torch.int32), scale, cols)

    @property
    def rows(self) -> int:
        return len(self.order)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., cols] -> [..., rows], in the dtype of x, added up in float32. Differentiable in x and bias.

        On other devices than the CPU torch multiplies by the decoded weight.
        """
        if not needs_operator(x, bias):
            return self._linear(x, bias)
        y = torch.ops.pennyweight.sparse_linear(x, *self._arguments())
        return y if bias is None else y + bias.to(y.dtype)

    def _linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.device.type != "cpu":  # these kernels are the CPU's
            return F.linear(x, self.decode().to(x.device, x.dtype), None if bias is None else bias.to(x.dtype))
        flat = x.detach().reshape(x.shape[:-1].numel(), self.cols).to(torch.float32).contiguous()
        shift = None if bias is None else bias.detach().to(torch.float32).contiguous()
        if _cpu is None:
            tell_once()
            y = linear_reference(self, flat, shift)
        else:
            y = torch.empty(flat.shape[0], self.rows)
            shift = None if shift is None else shift.numpy()
            self.native.linear(flat.numpy(), shift, y.numpy(), torch.get_num_threads())
        return y.view(*x.shape[:-1], self.rows).to(x.dtype)

    def decode(self) -> Tensor:
        """float32 [rows, cols], as the format decodes it, bit for bit."""
        out = torch.empty(self.rows, self.cols)
        for rows, part in self.decoded_parts():
            out[rows] = part
        return out

    def decoded_parts(self) -> Any:
        """The decoded rows, some at a time: (which rows, int64 [n]; float32 [n, cols])."""
        blocks = len(self.start) - 1
        for first in range(0, blocks, _CHUNK_ROWS // BLOCK):
            last = min(first + _CHUNK_ROWS // BLOCK, blocks)
            rows = self.order[first * BLOCK : last * BLOCK].long()
            begin, end = int(self.start[first]), int(self.start[last])
            lengths = self.start[first : last + 1].diff()
            lane = torch.repeat_interleave(torch.arange(last - first), lengths)[:, None] * BLOCK + torch.arange(BLOCK)
            part = torch.zeros((last - first) * BLOCK, self.cols + 1)  # a column for rows that have no more
            part[lane.flatten(), _columns(self, begin, end).flatten()] = _values(self, begin, end).flatten()
            part = part[: len(rows), : self.cols]
            yield rows, part if self.scale is None else part * self.scale[rows, None]

    @property
    def native(self) -> Any:
        """The compiled twin, which refers to the tensors of this one. Raises ValueError for sizes that do not fit."""
        if self._native is None:
            values, kind = self.values, self.values.dtype
            self._native = _cpu.SparseWeight(
                self.column.numpy().view(np.uint16),
                values.numpy() if kind == torch.float32 else None,
                values.view(torch.int16).numpy().view(np.uint16) if kind == torch.float16 else None,
                values.numpy() if kind == torch.int8 else None,
                self.start.numpy(),
                self.order.numpy(),
                None if self.scale is None else self.scale.numpy(),
                self.cols,
            )
        return self._native

    def _arguments(self) -> tuple[Any, ...]:
        return self.column, self.values, self.start, self.order, self.scale, self.cols

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_native": None}  # copies make their own


def _columns(matrix: SparseMatrix, first: int, last: int) -> Tensor:
    """int64 [last - first, 64]: the columns of some steps."""
    return matrix.column.view(-1, BLOCK)[first:last].long() & 0xFFFF


def _values(matrix: SparseMatrix, first: int, last: int) -> Tensor:
    """float32 [last - first, 64]"""
    return matrix.values.view(-1, BLOCK)[first:last].to(torch.float32)


# ------------------------------------------------------------------------------------------------ in plain torch


def linear_reference(matrix: SparseMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`SparseMatrix.linear` of float32 x [n, cols], to the bit."""
    padded = F.pad(x, (0, 1))
    lengths = matrix.start.diff()
    columns, values = _columns(matrix, 0, int(matrix.start[-1])), _values(matrix, 0, int(matrix.start[-1]))
    sums = torch.zeros(len(x), len(lengths), BLOCK)
    for t in range(int(lengths.max()) if len(lengths) else 0):
        active = int((lengths > t).sum())  # the first blocks, as rows are sorted
        step = matrix.start[:active] + t
        sums[:, :active] += values[step] * padded[:, columns[step]]
    y = torch.empty(len(x), matrix.rows)
    y[:, matrix.order.long()] = sums.flatten(1)[:, : matrix.rows]
    if matrix.scale is not None:
        y *= matrix.scale
    return y if bias is None else y + bias


# ------------------------------------------------------------------------------------------------ for torch.compile

_matrices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # column -> the rest of the arguments, and the matrix


def _matrix(column: Tensor, *rest: Any) -> SparseMatrix:
    """The inverse of `SparseMatrix._arguments`, remembered as long as `column` lives: to check all of it takes time."""
    identity = tuple(part.data_ptr() if isinstance(part, Tensor) else part for part in rest)
    if column not in _matrices or _matrices[column][0] != identity:
        _matrices[column] = identity, SparseMatrix(column.detach(), *rest)
    return _matrices[column][1]


@torch.library.custom_op("pennyweight::sparse_linear", mutates_args=())
def _sparse_linear(
    x: Tensor, column: Tensor, values: Tensor, start: Tensor, order: Tensor, scale: Tensor | None, cols: int
) -> Tensor:
    return _matrix(column, values, start, order, scale, cols)._linear(x)


@torch.library.custom_op("pennyweight::sparse_linear_backward", mutates_args=())
def _sparse_linear_backward(
    gradient: Tensor, column: Tensor, values: Tensor, start: Tensor, order: Tensor, scale: Tensor | None, cols: int
) -> Tensor:
    total = gradient.new_zeros(*gradient.shape[:-1], cols, dtype=torch.float32)
    for rows, part in _matrix(column, values, start, order, scale, cols).decoded_parts():
        total += gradient[..., rows].to(torch.float32) @ part.to(gradient.device)
    return total.to(gradient.dtype)


@_sparse_linear.register_fake
def _(x: Tensor, *parts: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], parts[3].shape[0])


@_sparse_linear_backward.register_fake
def _(gradient: Tensor, *parts: Any) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], parts[5])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.weight = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return torch.ops.pennyweight.sparse_linear_backward(gradient, *ctx.weight), *(None for _ in ctx.weight)


_sparse_linear.register_autograd(_backward, setup_context=_keep)
