"""The products of signs (kernels/binary.py) as operators of torch.library, for torch.compile and torch.export.

    torch.ops.pennyweight.pack_signs(x, threshold)
    torch.ops.pennyweight.binary_linear(x, weight, cols, scale, bias, threshold, flip)
    torch.ops.pennyweight.binary_conv2d(x, weight, channels, stride, padding, dilation, padding_value, scale, bias,
                                        threshold, flip)

Arguments and results are those of the functions of the same names; an epilogue comes as the four tensors of `Scaled`
and `Thresholds`, all None for none. They have no gradient, as bits have none. Importing this file registers them; the
operator of integer weights, which has a gradient, is in kernels/integer.py.
"""

from __future__ import annotations

from torch import Tensor, dtype, float32, int32, int64
from torch.library import custom_op

from . import binary
from .binary import Epilogue, Scaled, Thresholds


def _epilogue(scale: Tensor | None, bias: Tensor | None, threshold: Tensor | None, flip: Tensor | None) -> Epilogue:
    if threshold is not None and flip is not None:
        return Thresholds(threshold, flip)
    return None if scale is None and bias is None else Scaled(scale, bias)


def _result(outputs: int, scaled: bool, packed: bool) -> tuple[int, dtype]:
    """(last size, type) of a product."""
    return (binary.words(outputs), int64) if packed else (outputs, float32 if scaled else int32)


@custom_op("pennyweight::pack_signs", mutates_args=())
def pack_signs(x: Tensor, threshold: Tensor | None) -> Tensor:
    return binary.pack_signs(x, threshold)


@pack_signs.register_fake
def _(x: Tensor, threshold: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], binary.words(x.shape[-1]), dtype=int64)


@custom_op("pennyweight::binary_linear", mutates_args=())
def binary_linear(
    x: Tensor,
    weight: Tensor,
    cols: int,
    scale: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    flip: Tensor | None,
) -> Tensor:
    return binary.binary_linear(x, weight, cols, _epilogue(scale, bias, threshold, flip))


@binary_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    cols: int,
    scale: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    flip: Tensor | None,
) -> Tensor:
    last, kind = _result(weight.shape[0], scale is not None or bias is not None, threshold is not None)
    return x.new_empty(x.shape[0], last, dtype=kind)


@custom_op("pennyweight::binary_conv2d", mutates_args=())
def binary_conv2d(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    padding_value: int,
    scale: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    flip: Tensor | None,
) -> Tensor:
    epilogue = _epilogue(scale, bias, threshold, flip)
    return binary.binary_conv2d(x, weight, channels, stride, padding, dilation, padding_value, epilogue)


@binary_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    padding_value: int,
    scale: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    flip: Tensor | None,
) -> Tensor:
    size = [
        (x.shape[1 + i] + 2 * padding[i] - dilation[i] * (weight.shape[1 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    last, kind = _result(weight.shape[0], scale is not None or bias is not None, threshold is not None)
    return x.new_empty(x.shape[0], *size, *((1,) if threshold is not None else ()), last, dtype=kind)
