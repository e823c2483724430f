"""Products with integer weights that stay small in memory, on the CPU.

    weight   value = (factor * stored - zero) * scale[row, group] * column_scale[col] + minimum[row, group]
                     + column_offset[col], where what is stored are 1 to 4 bits or signed bytes; see `IntegerMatrix`
    input    quantised row by row to whole numbers of 8 or 16 bits: x = q * step, step = max |x * column_scale| / most
    product  whole numbers, exact; scales, minima, offsets and bias then come in float32, in one order

so a result depends neither on the number of threads nor on the instruction set. With 16 bits it differs from the
float32 product by about 1e-5 of its size, less than bfloat16 loses in rounding its inputs; with 8 bits by about 1e-2.
Few inputs meet codes of 4 and 8 bits as bytes, unpacked in registers, and the bit planes of 1 to 3 bits by table
look-up: the sums of any of four inputs are tabulated, and four bits of a weight's row choose one (the idea of T-MAC,
arXiv 2407.00088). Many inputs meet weights unpacked to bytes or 16 bits, panel by panel.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cpu, needs_operator, tell_once  # pyright: ignore[reportAttributeAccessIssue]
from .gpu import twins

ActivationBits = Literal[8, 16, 32]

BLOCK = 64  # rows that lie together
_CHUNK_ROWS = 4096  # rows arranged or decoded at once, which bounds the working memory
#: More escapes than one in so many codes, and bytes are the wrong arrangement.
_CODES_PER_ESCAPE = 64
_LARGEST = {8: 127.0, 16: 32639.0}  # 127 * 256 + 127: what two signed bytes hold


@dataclass
class IntegerMatrix:
    """A weight [rows, cols] in the arrangement of kernels/cpu/integer.h.

    codes: uint8; rows lie in blocks of 64, and for each step of columns the block's rows lie side by side.
        bits 1 to 3: planes [blocks, cols / 8, bits, 64]. bits 4: fours [blocks, cols / 8, 64, 4], byte j with columns j
        and 4 + j. bits 8: signed bytes [blocks, cols / 2, 64, 2]. cols are filled up to a multiple of 8.
    group: columns in a group, a multiple of 8. scale, minimum: float32 [blocks, groups, 64]. column_scale,
        column_offset: float32 [cols].
    escape_start int32 [blocks + 1], escapes int32 [3, count]: row in the block, column, and what is to be added to the
        code there. limit: most that sum |code| over a group comes to.
    """

    codes: Tensor
    rows: int
    cols: int
    bits: int
    group: int
    factor: int
    zero: int
    scale: Tensor
    minimum: Tensor | None
    column_scale: Tensor | None
    column_offset: Tensor | None
    escape_start: Tensor | None
    escapes: Tensor | None
    limit: float
    _native: Any = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        codes: Tensor,
        scale: Tensor,
        group: int,
        *,
        factor: int = 1,
        zero: int = 0,
        minimum: Tensor | None = None,
        column_scale: Tensor | None = None,
        column_offset: Tensor | None = None,
    ) -> Self | None:
        """From codes (integers [rows, cols]) that mean factor * code - zero, and scales and minima [rows, groups].

        group: columns in a group, 0 for the whole row. None where this arrangement does not suit: groups that are no
        multiple of 8 columns, or a wide range of codes whose ends are not rare.
        """
        rows, cols = codes.shape
        padded = -(-cols // 8) * 8
        group = group if 0 < group < cols else padded
        if codes.numel() == 0 or group % 8:
            return None
        if factor == 1:
            codes, zero = codes.to(torch.int32) - zero, 0
        low, high = int(codes.min()), int(codes.max())
        bits = max((high - low).bit_length(), 1)
        escape_start = escapes = None
        if bits <= 4 and factor * low - zero >= -128 and factor * high - zero <= 127:
            base = low
        elif high - low < 256:
            bits, base = 8, low + 128
        else:
            bits, base = 8, 0
            found = _escapes(codes)
            if found is None or factor != 1:
                return None
            escape_start, escapes = found
        arranged, limit = _arrange(codes, bits, base, factor, zero, group)
        return cls(
            arranged, rows, cols, bits, group, factor, zero - factor * base, _by_block(scale),
            None if minimum is None else _by_block(minimum), _flat(column_scale), _flat(column_offset),
            escape_start, escapes, limit,
        )  # fmt: skip

    @property
    def blocks(self) -> int:
        return -(-self.rows // BLOCK)

    @property
    def groups(self) -> int:
        return -(-self.cols // self.group)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    def linear(self, x: Tensor, bias: Tensor | None = None, activation_bits: ActivationBits = 16) -> Tensor:
        """x [..., cols] -> [..., rows], in the dtype of x. activation_bits: 8, 16, or 32 for a product in float32.

        An x on a GPU is not quantised: the kernels of kernels/gpu multiply it, or torch, by the decoded weight.
        Differentiable in x and bias, as if x had not been quantised.
        """
        if not needs_operator(x, bias):
            return self._linear(x, activation_bits, bias)
        y = torch.ops.pennyweight.integer_linear(x, *self.arguments(), activation_bits)
        return y if bias is None else y + bias.to(y.dtype)

    def _linear(self, x: Tensor, activation_bits: int, bias: Tensor | None = None) -> Tensor:
        if x.shape[-1] != self.cols or (bias is not None and bias.numel() != self.rows):
            raise ValueError(f"a weight [{self.rows}, {self.cols}] takes no input {list(x.shape)} with this bias")
        if activation_bits != 32 and twins.takes(x):
            twin = twins.twin(self, x.device)
            if twin is not None:
                return twin.linear(x, bias)
        if x.device.type == "cuda":
            shift = None if bias is None else bias.to(x.dtype)
            return F.linear(x, self.decode().to(x.device, x.dtype), shift)
        if activation_bits == 32:
            y = self._in_float32(x.reshape(-1, self.cols).to(torch.float32))
            if bias is not None:
                y += bias
            return y.view(*x.shape[:-1], self.rows).to(x.dtype)
        y = torch.empty((*x.shape[:-1], self.rows), dtype=torch.float32)
        self._multiply(y, _ready(x), bias, activation_bits)
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def linear_into(self, y: Tensor, x: Tensor, bias: Tensor | None, activation_bits: int) -> None:
        """`linear` of x [n, cols] written to y [n, rows], both float32 and contiguous; activation_bits 8 or 16.

        Raises ValueError for tensors of other shapes, types or layouts.
        """
        fits = x.shape[1:] == (self.cols,) and y.shape == (x.shape[0], self.rows)
        plain = all(t.dtype == torch.float32 and t.is_contiguous() and t.device.type == "cpu" for t in (x, y))
        if not (fits and plain) or (bias is not None and bias.numel() != self.rows):
            raise ValueError(f"a weight [{self.rows}, {self.cols}] takes no {list(x.shape)} into {list(y.shape)}")
        self._multiply(y, x, bias, activation_bits)

    def _multiply(self, y: Tensor, x: Tensor, bias: Tensor | None, activation_bits: int) -> None:
        """The kernel gets addresses: whoever calls this has checked that the tensors are what it expects."""
        if _cpu is None:
            tell_once()
            made = linear_reference(self, x.reshape(-1, self.cols), activation_bits)
            y.copy_((made if bias is None else made + bias).view(y.shape))
            return
        shift = None if bias is None else _ready(bias)
        self.native.linear(
            x.data_ptr(),
            x.shape[:-1].numel(),
            0 if shift is None else shift.data_ptr(),
            y.data_ptr(),
            activation_bits,
            torch.get_num_threads(),
        )

    def part(self, first: int, last: int, columns: Tensor | None = None) -> IntegerMatrix:
        """Rows first .. last-1, with their columns in the order given: ValueError if groups of them share scales."""
        if columns is not None and self.groups > 1:
            raise ValueError("columns with scales in groups keep their order")
        plain = dataclasses.replace(
            self, scale=torch.ones_like(self.scale), minimum=None, column_scale=None, column_offset=None
        )
        codes = ((plain.decode(first, last) + self.zero) / self.factor).to(torch.int32)
        whole = torch.arange(self.cols) if columns is None else columns
        made = IntegerMatrix.of(
            codes[:, whole],
            _by_row(self.scale, self.rows)[first:last],
            self.group,
            factor=self.factor,
            zero=self.zero,
            minimum=None if self.minimum is None else _by_row(self.minimum, self.rows)[first:last],
            column_scale=None if self.column_scale is None else self.column_scale[whole],
            column_offset=None if self.column_offset is None else self.column_offset[whole],
        )
        assert made is not None  # what could be arranged once can be again
        return made

    def _in_float32(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, part) for part in self._decoded_parts()], 1)

    def _decoded_parts(self) -> Any:
        return (self.decode(first, min(first + _CHUNK_ROWS, self.rows)) for first in range(0, self.rows, _CHUNK_ROWS))

    def decode(self, first: int = 0, last: int | None = None) -> Tensor:
        """The rows first .. last - 1 (all of them), float32 [n, cols], as the format decodes them, bit for bit."""
        last = self.rows if last is None else last
        if _cpu is None:
            tell_once()
            return decode_reference(self)[first:last]
        out = torch.empty(last - first, self.cols)
        if out.numel():
            self.native.decode(first, last, out.numpy(), torch.get_num_threads())
        return out

    @property
    def native(self) -> Any:
        """The compiled twin, which refers to the tensors of this one. Raises ValueError for sizes that do not fit."""
        if self._native is None:
            arrays = [
                None if t is None else t.numpy()
                for t in (
                    self.scale,
                    self.minimum,
                    self.column_scale,
                    self.column_offset,
                    self.escape_start,
                    self.escapes,
                )
            ]
            self._native = _cpu.IntegerWeight(
                self.codes.numpy(),
                self.rows,
                self.cols,
                self.bits,
                self.group,
                self.factor,
                self.zero,
                *arrays,
                self.limit,
            )
        return self._native

    def arguments(self) -> tuple[Any, ...]:
        """What an operator of torch.library takes in place of this; `matrix_of` is the inverse."""
        sizes = [self.rows, self.cols, self.bits, self.group, self.factor, self.zero]
        parts = (self.minimum, self.column_scale, self.column_offset, self.escape_start, self.escapes)
        return (self.codes, self.scale, *parts, sizes, self.limit)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_native": None}  # copies make their own


def _ready(values: Tensor) -> Tensor:
    """As the kernels read it by its address."""
    if values.device.type != "cpu":
        raise ValueError(f"the kernels of the CPU take no tensor on {values.device}")
    return values if values.dtype == torch.float32 and values.is_contiguous() else values.to(torch.float32).contiguous()


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(torch.float32).flatten().contiguous()


def _by_block(values: Tensor) -> Tensor:
    """[rows, groups] -> float32 [blocks, groups, 64]."""
    padded = F.pad(values.to(torch.float32), (0, 0, 0, -values.shape[0] % BLOCK))
    return padded.view(-1, BLOCK, values.shape[1]).transpose(1, 2).contiguous()


def _by_row(values: Tensor, rows: int) -> Tensor:
    """Inverse of `_by_block`."""
    return values.transpose(1, 2).flatten(0, 1)[:rows]


def _escapes(codes: Tensor) -> tuple[Tensor, Tensor] | None:
    """(start of each block's escapes, [row in the block, column, what a byte leaves out]); None if too many."""
    rest = codes.to(torch.int32) - codes.clamp(-128, 127).to(torch.int32)
    row, column = rest.nonzero(as_tuple=True)
    if len(row) * _CODES_PER_ESCAPE > codes.numel():
        return None
    blocks = -(-codes.shape[0] // BLOCK)
    start = torch.searchsorted(row, torch.arange(blocks + 1) * BLOCK).to(torch.int32)
    return start, torch.stack([row % BLOCK, column, rest[row, column]]).to(torch.int32)


def _arrange(codes: Tensor, bits: int, base: int, factor: int, zero: int, group: int) -> tuple[Tensor, float]:
    """(arranged codes - base, most that sum |factor * code - zero| over a group comes to)."""
    rows, cols = codes.shape
    padded = -(-cols // 8) * 8
    parts, limit = [], 0.0
    for first in range(0, rows, _CHUNK_ROWS):
        part = (codes[first : first + _CHUNK_ROWS].to(torch.int32) - base).clamp_(-128, 255).to(torch.int16)
        if bits == 8:
            part.clamp_(-128, 127)
        size = (factor * (part.to(torch.float32) + base) - zero).abs_()
        limit = max(limit, float(F.pad(size, (0, -cols % group)).view(len(part), -1, group).sum(2).max()))
        if _cpu is None:
            parts.append(arrange_reference(part, bits))
            continue
        out = torch.empty(-(-len(part) // BLOCK) * BLOCK * padded * bits // 8, dtype=torch.uint8)
        _cpu.integer_arrange(part.contiguous().numpy(), bits, out.numpy(), torch.get_num_threads())
        parts.append(out)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)), limit


# ------------------------------------------------------------------------------------------------ in plain torch


def arrange_reference(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, cols] -> uint8, the arrangement of `IntegerMatrix.codes`."""
    rows, cols = codes.shape
    padded = F.pad(codes.to(torch.int32), (0, -cols % 8, 0, -rows % BLOCK))
    if bits == 8:
        pairs = padded.view(-1, BLOCK, padded.shape[1] // 2, 2).transpose(1, 2)
        return pairs.contiguous().to(torch.int8).view(torch.uint8).flatten()
    if bits == 4:
        low, high = padded.view(-1, BLOCK, padded.shape[1] // 8, 2, 4).unbind(3)
        return (low | high << 4).transpose(1, 2).contiguous().to(torch.uint8).flatten()
    columns = padded.view(-1, BLOCK, padded.shape[1] // 8, 8)
    weights = 1 << torch.arange(8)
    planes = [(((columns >> p) & 1) * weights).sum(3).transpose(1, 2) for p in range(bits)]
    return torch.stack(planes, 2).to(torch.uint8).flatten()


def codes_reference(matrix: IntegerMatrix) -> Tensor:
    """int32 [rows, cols]: factor * stored - zero, escapes included."""
    width = -(-matrix.cols // 8) * 8
    if matrix.bits == 8:
        pairs = matrix.codes.view(torch.int8).view(matrix.blocks, width // 2, BLOCK, 2)
        stored = pairs.transpose(1, 2).reshape(-1, width)
    elif matrix.bits == 4:
        fours = matrix.codes.view(matrix.blocks, width // 8, BLOCK, 4).transpose(1, 2)
        stored = torch.stack([fours & 15, fours >> 4], 3).reshape(-1, width)
    else:
        planes = matrix.codes.view(matrix.blocks, width // 8, matrix.bits, BLOCK).to(torch.int32)
        columns = torch.stack([planes >> k & 1 for k in range(8)], 4)  # [blocks, bytes, bits, 64, 8]
        weights = (1 << torch.arange(matrix.bits)).view(-1, 1, 1)
        stored = (columns * weights).sum(2).transpose(1, 2).reshape(-1, width)
    codes = matrix.factor * stored.to(torch.int32) - matrix.zero
    if matrix.escapes is not None and matrix.escape_start is not None:
        row, column, extra = matrix.escapes
        block = torch.repeat_interleave(torch.arange(matrix.blocks), matrix.escape_start.diff().long())
        codes[block * BLOCK + row.long(), column.long()] += extra
    return codes[: matrix.rows, : matrix.cols]


def decode_reference(matrix: IntegerMatrix) -> Tensor:
    """`IntegerMatrix.decode`."""
    spread = functools.partial(torch.repeat_interleave, repeats=matrix.group, dim=1)
    values = codes_reference(matrix).to(torch.float32)
    values *= spread(_by_row(matrix.scale, matrix.rows))[:, : matrix.cols]
    if matrix.column_scale is not None:
        values *= matrix.column_scale
    if matrix.minimum is not None:
        values += spread(_by_row(matrix.minimum, matrix.rows))[:, : matrix.cols]
    if matrix.column_offset is not None:
        values += matrix.column_offset
    return values


def linear_reference(matrix: IntegerMatrix, x: Tensor, activation_bits: int) -> Tensor:
    """`IntegerMatrix.linear` of float32 x [n, cols], with sums in float64 in place of whole numbers."""
    largest = float(int(max(1.0, min(_LARGEST[activation_bits], 2147483647.0 / max(matrix.limit, 1.0)))))
    scaled = x if matrix.column_scale is None else x * matrix.column_scale
    size = scaled.abs().amax(1, keepdim=True) if matrix.cols else torch.zeros(len(x), 1)
    flat = size < 1e-30
    inverse = torch.full_like(size, largest) / size  # not largest / size, which torch rounds twice
    q = torch.where(flat, 0.0, scaled * inverse).round()
    step = torch.where(flat, 0.0, size / largest)
    step = torch.where(scaled.isfinite().all(1, keepdim=True), step, torch.nan)
    plain = dataclasses.replace(matrix, minimum=None, column_scale=None, column_offset=None)
    y = (q.double().nan_to_num() @ decode_reference(plain).double().T).to(torch.float32) * step
    if matrix.minimum is not None:
        ends = F.pad(x, (0, -matrix.cols % matrix.group)).view(len(x), -1, matrix.group).sum(2)
        y = y + ends @ _by_row(matrix.minimum, matrix.rows).T
    if matrix.column_offset is not None:
        y = y + (x @ matrix.column_offset)[:, None]
    return y.to(torch.float32)


# ------------------------------------------------------------------------------------------------ for torch.compile


def matrix_of(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    column_scale: Tensor | None,
    column_offset: Tensor | None,
    escape_start: Tensor | None,
    escapes: Tensor | None,
    sizes: list[int],
    limit: float,
) -> IntegerMatrix:
    """The inverse of `IntegerMatrix.arguments`."""
    rows, cols, bits, group, factor, zero = sizes
    parts = (scale, minimum, column_scale, column_offset, escape_start, escapes)
    return IntegerMatrix(codes, rows, cols, bits, group, factor, zero, *parts, limit)


@torch.library.custom_op("pennyweight::integer_linear", mutates_args=())
def _integer_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    column_scale: Tensor | None,
    column_offset: Tensor | None,
    escape_start: Tensor | None,
    escapes: Tensor | None,
    sizes: list[int],
    limit: float,
    activation_bits: int,
) -> Tensor:
    parts = (codes, scale, minimum, column_scale, column_offset, escape_start, escapes)
    return matrix_of(*parts, sizes, limit)._linear(x, activation_bits)


@torch.library.custom_op("pennyweight::integer_linear_backward", mutates_args=())
def _integer_linear_backward(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    column_scale: Tensor | None,
    column_offset: Tensor | None,
    escape_start: Tensor | None,
    escapes: Tensor | None,
    sizes: list[int],
    limit: float,
) -> Tensor:
    parts = (codes, scale, minimum, column_scale, column_offset, escape_start, escapes)
    total = gradient.new_zeros(*gradient.shape[:-1], sizes[1], dtype=torch.float32)
    first = 0
    for part in matrix_of(*parts, sizes, limit)._decoded_parts():
        total += gradient[..., first : first + len(part)].to(torch.float32) @ part.to(gradient.device)
        first += len(part)
    return total.to(gradient.dtype)


@_integer_linear.register_fake
def _(x: Tensor, *parts: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], parts[7][0])


@_integer_linear_backward.register_fake
def _(gradient: Tensor, *parts: Any) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], parts[7][1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.weight, _ = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return torch.ops.pennyweight.integer_linear_backward(gradient, *ctx.weight), *(None for _ in ctx.weight), None


_integer_linear.register_autograd(_backward, setup_context=_keep)
