"""Convolutions with integer weights that stay small in memory: the CPU products of kernels/integer.py on patches.

A patch is what one output position sees of its image, a row of the product. Patches are copied out of the image a few
positions at a time, never all at once; a 1x1 kernel on a channels-last image is multiplied where it lies.

Patches are gathered fast where channels lie side by side: "positions first", columns [*kernel, channels]. A weight is
stored "channels first", [channels, *kernel], as torch has it, and can be put in the other order if a row has one scale;
where groups of columns share scales the patches come in the stored order, about three times as slowly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import needs_operator
from .integer import ActivationBits, IntegerMatrix, matrix_of

_PATCH_FLOATS = 1 << 18  # gathered at once: 1 MiB
_LEAST_PATCHES = 96  # what shares a panel of the weight in the product
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Window:
    """What an output position sees: the sizes along each of the one to three axes of the image."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def axes(self) -> int:
        return len(self.kernel)

    def positions(self, size: Sequence[int]) -> list[int]:
        """Output positions along the axes of an image (padded already) of this size."""
        return [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(size, self.kernel, self.stride, self.dilation)]

    def patches(self, image: Tensor, positions_first: bool) -> Tensor:
        """A view [n, *positions, *kernel, channels] of an image [n, *size, channels]; or, not `positions_first`,
        [n, *positions, channels, *kernel] of [n, channels, *size]."""
        first = 1 if positions_first else 2
        for axis, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation)):
            image = image.unfold(first + axis, d * (k - 1) + 1, s)[..., ::d]
        return image.movedim(self.axes + 1, -1) if positions_first else image.movedim(1, self.axes + 1)


def positions_first(matrix: IntegerMatrix, window: Window) -> IntegerMatrix | None:
    """A weight stored channels first, for `convolution` with `positions_first`; None if its scales forbid that."""
    kernel = math.prod(window.kernel)
    channels = matrix.cols // kernel
    if kernel == 1 or channels == 1:
        return matrix
    if matrix.groups > 1:
        return None
    return matrix.part(0, matrix.rows, torch.arange(matrix.cols).view(channels, kernel).T.flatten())


def weight_of(matrix: IntegerMatrix, window: Window, positions_first: bool) -> Tensor:
    """The decoded weight, float32 [outputs, channels, *kernel]."""
    decoded = matrix.decode()
    if positions_first:
        return decoded.view(matrix.rows, *window.kernel, -1).movedim(-1, 1).contiguous()
    return decoded.view(matrix.rows, -1, *window.kernel)


def convolution(
    x: Tensor,
    matrix: IntegerMatrix,
    window: Window,
    positions_first: bool,
    bias: Tensor | None = None,
    activation_bits: ActivationBits = 16,
) -> Tensor:
    """x [n, channels, *size], padded already -> [n, outputs, *positions], in dtype and memory format of x.

    positions_first: the order of the matrix's columns; see the module. activation_bits: 8 or 16, to which each patch is
    quantised. Differentiable in x and bias, as if x had not been quantised.
    """
    if not needs_operator(x, bias):
        return _convolution(x, matrix, window, positions_first, bias, activation_bits)
    sizes = (list(window.kernel), list(window.stride), list(window.dilation))
    y = torch.ops.pennyweight.integer_convolution(x, *matrix.arguments(), *sizes, positions_first, activation_bits)
    return y if bias is None else y + bias.to(y.dtype).view(-1, *(1 for _ in window.kernel))


def _result(x: Tensor, outputs: int, window: Window) -> Tensor:
    """Uninitialised, in the memory format that torch gives a convolution of x."""
    last = _CHANNELS_LAST.get(x.ndim, torch.contiguous_format)
    kept = last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format
    shape = (x.shape[0], outputs, *window.positions(x.shape[2:]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=kept)


def _convolution(
    x: Tensor,
    matrix: IntegerMatrix,
    window: Window,
    positions_first: bool,
    bias: Tensor | None,
    activation_bits: int,
) -> Tensor:
    result = _result(x, matrix.rows, window)
    if not result.numel():
        return result
    image = x.detach().to(torch.float32)
    patches = window.patches(_channels_last(image) if positions_first else image.contiguous(), positions_first)
    y = result.movedim(1, -1)  # [n, *positions, outputs]
    in_place = y.is_contiguous() and y.dtype == torch.float32
    total, at_once = y.numel() // matrix.rows, max(_PATCH_FLOATS // matrix.cols, _LEAST_PATCHES)
    if patches.is_contiguous():
        at_once = total  # nothing is copied
    gathered = _Gathered(min(total, at_once), matrix.cols, positions_first)
    product = torch.empty(0 if in_place else min(total, at_once), matrix.rows)
    for chunk in _chunks(y.shape[:-1], at_once):
        inputs, target = gathered.rows(patches[chunk], window.axes), y[chunk]
        made = target.view(-1, matrix.rows) if in_place else product[: len(inputs)]
        matrix.linear_into(made, inputs, bias, activation_bits)
        if not in_place:
            by_output = made.T.contiguous()  # then long runs are copied
            target.movedim(-1, 0).copy_(by_output.view(-1, *target.shape[:-1]))
    return result


def _channels_last(image: Tensor) -> Tensor:
    """[n, channels, *size] -> [n, *size, channels], contiguous."""
    if not image.is_contiguous():
        return image.movedim(1, -1).contiguous()
    turned = image.new_empty(image.shape[0], *image.shape[2:], image.shape[1])
    for one, to in zip(image.flatten(2), turned.flatten(1, -2)):
        to.copy_(one.T)  # matrices are turned block by block, arrays of more dimensions are not
    return turned


class _Gathered:
    """Copies patches to where they are multiplied, over and over the same memory: fresh pages cost as much again."""

    def __init__(self, rows: int, cols: int, positions_first: bool) -> None:
        self.cols = cols
        self.positions_first = positions_first
        self.size = rows * cols
        self.turned = None if positions_first else torch.empty(self.size)
        self._memory: Tensor | None = None

    def rows(self, patches: Tensor, axes: int) -> Tensor:
        """Patches [.., (columns: axes + 1 dimensions)] as a contiguous matrix [positions, cols]."""
        if patches.is_contiguous():
            return patches.view(-1, self.cols)
        if self._memory is None:
            self._memory = torch.empty(self.size)
        found = self._memory[: patches.numel()]
        if self.turned is None:
            found.view(patches.shape).copy_(patches)
            return found.view(-1, self.cols)
        # Two copies along long runs are faster than one along the kernel's few columns.
        lead = patches.ndim - axes - 1
        by_column = patches.permute(*range(lead, patches.ndim), *range(lead))
        turned = self.turned[: patches.numel()]
        turned.view(by_column.shape).copy_(by_column)
        found = found.view(-1, self.cols)
        return found.copy_(turned.view(self.cols, -1).T)


def _chunks(sizes: Sequence[int], most: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut an array of these sizes into runs of at most `most` entries, in order."""
    inner = math.prod(sizes[1:])
    if inner > most:
        rests = list(_chunks(sizes[1:], most))
        yield from ((i, *rest) for i, rest in itertools.product(range(sizes[0]), rests))
    else:
        step = most // inner
        yield from ((slice(first, first + step),) for first in range(0, sizes[0], step))


# ------------------------------------------------------------------------------------------------ for torch.compile


@torch.library.custom_op("pennyweight::integer_convolution", mutates_args=())
def _integer_convolution(
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
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    positions_first: bool,
    activation_bits: int,
) -> Tensor:
    parts = (codes, scale, minimum, column_scale, column_offset, escape_start, escapes)
    window = Window(tuple(kernel), tuple(stride), tuple(dilation))
    return _convolution(x, matrix_of(*parts, sizes, limit), window, positions_first, None, activation_bits)


@torch.library.custom_op("pennyweight::integer_convolution_backward", mutates_args=())
def _integer_convolution_backward(
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
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    positions_first: bool,
    input_size: list[int],
) -> Tensor:
    parts = (codes, scale, minimum, column_scale, column_offset, escape_start, escapes)
    window = Window(tuple(kernel), tuple(stride), tuple(dilation))
    weight = weight_of(matrix_of(*parts, sizes, limit), window, positions_first).to(gradient.dtype)
    shape_of_x, none = gradient.new_empty(1).expand(input_size), [0] * window.axes
    towards_x, *_ = torch.ops.aten.convolution_backward(
        gradient, shape_of_x, weight, None, stride, none, dilation, False, none, 1, [True, False, False]
    )
    return towards_x.contiguous()


@_integer_convolution.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    *_, sizes, _, kernel, stride, dilation, _, _ = rest
    return _result(x, sizes[0], Window(tuple(kernel), tuple(stride), tuple(dilation)))


@_integer_convolution_backward.register_fake
def _(gradient: Tensor, *rest: Any) -> Tensor:
    return gradient.new_empty(rest[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.rest, _ = inputs
    ctx.input_size = list(x.shape)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    towards_x = torch.ops.pennyweight.integer_convolution_backward(gradient, *ctx.rest, ctx.input_size)
    return towards_x, *(None for _ in ctx.rest), None


_integer_convolution.register_autograd(_backward, setup_context=_keep)
