"""Signs times signs: layers whose inputs and weights are both +1 or -1, and distances between bit strings.

The product of two signs is +1 where their bits agree and -1 where they differ, so that a sum of `cols` products is
cols - 2 * popcount(a xor b): XNOR-Net, arXiv 1603.05279. Batch norm and the next layer's sign come down to comparing
that integer with a threshold: FINN, arXiv 1612.07119. Distances over several bit planes: BEBR, arXiv 2302.08714.

Packed signs are int64 words (PyTorch can do little with uint64): bit k of word j is column 64 j + k, 1 for + and 0 for
-. Columns are filled up to a multiple of 64 with zeros, in both operands, so that they never differ. sign(0) is +, for
-0.0 too, and NaN gives -. Every function gives the same bits whatever the threads and the instruction set, and the same
as its reference in plain torch, which stands next to it.

Tensors on other devices than the CPU, and everything where the compiled kernels are missing, take the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels
from ..errors import WeightError

#: The sums of products are int32.
MOST_COLUMNS = 2**31 - 1
_LEAST = -(2**31)
_WORD = 64


@dataclass(frozen=True)
class Scaled:
    """Output y * scale + bias, float32. scale, bias: float32 [outputs] or None."""

    scale: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Thresholds:
    """Output the packed bits (y >= threshold) != flip. threshold: int32 [outputs], flip: bool [outputs]."""

    threshold: Tensor
    flip: Tensor


#: What becomes of the int32 sums of products: None leaves them as they are.
Epilogue = Scaled | Thresholds | None


def words(cols: int) -> int:
    """Words that so many columns fill."""
    return -(-cols // _WORD)


def pack_signs(x: Tensor, threshold: Tensor | None = None) -> Tensor:
    """Bits x >= threshold. x [..., cols] of any real type, threshold [cols] or None for 0 -> int64 [..., words(cols)].

    Raises ValueError if the threshold has another length.
    """
    cols = x.shape[-1] if x.ndim else 0
    _check(x.ndim > 0, "x must have columns")
    _check(threshold is None or threshold.shape == (cols,), "the threshold must have one number for each column")
    floats = (torch.float32, torch.bfloat16, torch.float16)
    exact = x.dtype in floats and (threshold is None or threshold.dtype in floats)
    if not exact or not _compiled(x):
        return pack_signs_reference(x, threshold)
    out = torch.empty(*x.shape[:-1], words(cols), dtype=torch.int64)
    if x.numel():
        rows = x.detach().float().contiguous().view(-1, cols)
        limit = None if threshold is None else _array(threshold.float())
        kernels._cpu.binary_pack(_array(rows), limit, out.view(len(rows), -1).numpy(), torch.get_num_threads())
    return out


def pack_signs_reference(x: Tensor, threshold: Tensor | None = None) -> Tensor:
    """`pack_signs` in plain torch."""
    bits = x >= (0 if threshold is None else threshold)
    bits = F.pad(bits, (0, -x.shape[-1] % _WORD)).unflatten(-1, (-1, _WORD)) if x.shape[-1] else bits.unsqueeze(-1)
    return (bits.to(torch.int64) << torch.arange(bits.shape[-1], device=x.device)).sum(-1)


def unpack_signs(packed: Tensor, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """+1 and -1 of packed signs: int64 [..., words(cols)] -> dtype [..., cols]. Raises ValueError if sizes differ."""
    _check(packed.ndim > 0 and packed.shape[-1] == words(cols), f"{cols} columns fill {words(cols)} words")
    bits = (packed.unsqueeze(-1) >> torch.arange(_WORD, device=packed.device)) & 1
    return (2 * bits - 1).flatten(-2)[..., :cols].to(dtype)


def pack_images(x: Tensor, groups: int = 1, threshold: Tensor | None = None) -> Tensor:
    """Inputs of `binary_conv2d`: [images, channels, height, width] -> int64 [images, height, width, groups, words].

    threshold: [channels] or None for 0. Raises ValueError unless groups divide the channels.
    """
    _check(x.ndim == 4 and groups > 0 and x.shape[1] % groups == 0, "x must be [images, channels, height, width]")
    _check(threshold is None or threshold.shape == (x.shape[1],), "the threshold must have one number for each channel")
    pixels = x.permute(0, 2, 3, 1)
    if groups == 1:
        return pack_signs(pixels, threshold).unsqueeze(3)
    if threshold is not None:
        pixels = torch.where(pixels >= threshold, 1.0, -1.0)
    return pack_signs(pixels.unflatten(-1, (groups, x.shape[1] // groups)))


def pack_filters(weight: Tensor) -> Tensor:
    """Weights of `binary_conv2d`: [outputs, channels of a group, height, width] -> int64 [.., height, width, words]."""
    _check(weight.ndim == 4, "a weight must be [outputs, channels, height, width]")
    return pack_signs(weight.permute(0, 2, 3, 1))


def binary_linear(x: Tensor, weight: Tensor, cols: int, epilogue: Epilogue = None) -> Tensor:
    """Products of signs, x weight^T, and what the epilogue makes of them.

    x: int64 [rows, words(cols)]. weight: int64 [outputs, words(cols)]. Both packed signs, zeros beyond the columns.
    Returns int32 [rows, outputs]; with `Scaled` float32 [rows, outputs]; with `Thresholds` the packed signs that the
    next layer takes, int64 [rows, words(outputs)]. Raises ValueError if shapes do not fit or bits beyond the columns
    are set.
    """
    _check(0 <= cols <= MOST_COLUMNS, f"columns must be 0 to {MOST_COLUMNS}")
    _check(x.ndim == 2 and weight.ndim == 2, "x and weight must be matrices of packed signs")
    _check_packed(x, cols, "x")
    _check_packed(weight, cols, "weight")
    _check_epilogue(epilogue, len(weight))
    if not _compiled(x):
        return binary_linear_reference(x, weight, cols, epilogue)
    out, arguments = _output(epilogue, len(x), len(weight))
    kernels._cpu.binary_linear(_array(x), _array(weight), cols, out.numpy(), *arguments, torch.get_num_threads())
    return out


def binary_linear_reference(x: Tensor, weight: Tensor, cols: int, epilogue: Epilogue = None) -> Tensor:
    """`binary_linear` in plain torch."""
    product = unpack_signs(x, cols, torch.float64) @ unpack_signs(weight, cols, torch.float64).T
    return apply_epilogue(product.to(torch.int32), epilogue)


def binary_conv2d(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    padding_value: int = -1,
    epilogue: Epilogue = None,
) -> Tensor:
    """Convolution of signs with signs.

    x: int64 [images, height, width, groups, words(channels)], weight: int64 [outputs, kernel height, kernel width,
    words(channels)], `channels` of one group; `pack_images` and `pack_filters` make them. stride, padding, dilation: as
    torch.nn.functional.conv2d has them, but padding as numbers. padding_value: -1, or 0, with which taps outside of the
    image add nothing. Returns int32 [images, height, width, outputs]; with `Scaled` the same in float32; with
    `Thresholds` int64 [images, height, width, 1, words(outputs)], which the next convolution takes. Raises ValueError
    if shapes do not fit each other or bits beyond the channels are set.
    """
    pairs = [_pair(value, name) for value, name in ((stride, "stride"), (padding, "padding"), (dilation, "dilation"))]
    _check(x.ndim == 5, "x must be [images, height, width, groups, words]")
    _check(weight.ndim == 4, "weight must be [outputs, kernel height, kernel width, words]")
    _check(channels >= 0 and padding_value in (-1, 0), "the padding value must be -1 or 0")
    _check_packed(x, channels, "x")
    _check_packed(weight, channels, "weight")
    _check(x.shape[3] > 0 and len(weight) % x.shape[3] == 0, "groups must divide the outputs")
    _check_epilogue(epilogue, len(weight))
    kernel = weight.shape[1:3]
    _check(min(*kernel, *pairs[0], *pairs[2]) > 0 <= min(pairs[1]), "kernel, stride and dilation must be at least 1")
    _check(channels * kernel[0] * kernel[1] <= MOST_COLUMNS, "a sum has too many products for int32")
    size = [(x.shape[1 + i] + 2 * pairs[1][i] - pairs[2][i] * (kernel[i] - 1) - 1) // pairs[0][i] + 1 for i in range(2)]
    _check(min(size) > 0, "the kernel is larger than the padded input")
    if not _compiled(x):
        return binary_conv2d_reference(x, weight, channels, stride, padding, dilation, padding_value, epilogue)
    out, arguments = _output(epilogue, len(x) * size[0] * size[1], len(weight))
    threads = torch.get_num_threads()
    kernels._cpu.binary_convolution(
        _array(x), _array(weight), channels, *pairs, padding_value == 0, out.numpy(), *arguments, threads
    )
    return out.view(len(x), *size, *((1,) if isinstance(epilogue, Thresholds) else ()), out.shape[-1])


def binary_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    channels: int,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    padding_value: int = -1,
    epilogue: Epilogue = None,
) -> Tensor:
    """`binary_conv2d` in plain torch."""
    high, wide = _pair(padding, "padding")
    images = unpack_signs(x, channels, torch.float64).flatten(3).permute(0, 3, 1, 2)
    images = F.pad(images, (wide, wide, high, high), value=float(padding_value))
    filters = unpack_signs(weight, channels, torch.float64).permute(0, 3, 1, 2)
    strides, dilations = _pair(stride, "stride"), _pair(dilation, "dilation")
    if channels:
        y = F.conv2d(images, filters, None, strides, 0, dilations, x.shape[3])
    else:  # which conv2d does not take
        size = [(images.shape[2 + i] - dilations[i] * (filters.shape[2 + i] - 1) - 1) // strides[i] + 1 for i in (0, 1)]
        y = images.new_zeros(len(x), len(weight), *size)
    y = apply_epilogue(y.permute(0, 2, 3, 1).to(torch.int32), epilogue)
    return y.unsqueeze(3) if isinstance(epilogue, Thresholds) else y


def apply_epilogue(y: Tensor, epilogue: Epilogue) -> Tensor:
    """What the kernels make of their sums, in plain torch: int32 [..., outputs] -> as `binary_linear` has it."""
    if epilogue is None:
        return y.contiguous()
    if isinstance(epilogue, Thresholds):
        return pack_signs_reference(((y >= epilogue.threshold) != epilogue.flip).to(torch.int8) - 1)
    out = y.float()
    if epilogue.scale is not None:
        out = out * epilogue.scale
    return out if epilogue.bias is None else out + epilogue.bias


def fold_batch_norm(
    scale: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Thresholds:
    """Thresholds of integers y that are the signs of batch norm: + where batch_norm(float32(y) * scale) >= 0.

    scale: float32 [channels] or None for 1. mean, var: running statistics, weight, bias: the affine part or None;
    float32 [channels]. Exact for every y that fits int32, in float32 as torch.nn.functional.batch_norm rounds it: each
    of its steps is monotone in y, so one comparison is enough, and where it changes is found by bisection with
    batch_norm itself. Raises `WeightError` if a number is not finite, a variance is not positive, or the numbers
    overflow on the way.
    """
    channels = mean.shape
    given = {"scale": scale, "mean": mean, "var": var, "weight": weight, "bias": bias}
    for name, value in given.items():
        _check(value is None or (value.shape == channels and value.ndim == 1), f"{name} must be [channels]")
        if value is not None and not value.isfinite().all():
            raise WeightError(f"batch norm has a {name} that is not finite; no sign can be told from it")

    def norm(y: Tensor) -> Tensor:
        z = y.float() if scale is None else y.float() * scale
        return F.batch_norm(z[None, :, None, None], mean, var, weight, bias, False, 0.0, eps)[0, :, 0, 0]

    ends = [norm(torch.full(channels, end, device=mean.device)) for end in (_LEAST, MOST_COLUMNS)]
    if not (ends[0].isfinite() & ends[1].isfinite()).all():
        raise WeightError("batch norm overflows or has a variance that is not positive; no sign can be told from it")
    return find_thresholds(lambda y: norm(y) >= 0, len(mean), mean.device)


def find_thresholds(positive: Callable[[Tensor], Tensor], channels: int, device: torch.device) -> Thresholds:
    """Thresholds of integers y that say where `positive` holds, which may change once at most as y rises.

    positive: int64 [channels], a number for each channel -> bool [channels]. Found by bisection over all of int32.
    """
    least, most = (torch.full((channels,), end, dtype=torch.int64, device=device) for end in (_LEAST, MOST_COLUMNS))
    starts, ends = positive(least), positive(most)
    low, high = least, most  # where they differ: the sign changes after `low`, and by `high`
    while ((high - low) > 1).any():
        middle = (low + high).div(2, rounding_mode="floor")
        same = positive(middle) == starts
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    changes = starts != ends
    threshold = torch.where(changes, high, least).to(torch.int32)
    return Thresholds(threshold, torch.where(changes, starts, ~starts))


def hamming_distances(x: Tensor, y: Tensor) -> Tensor:
    """Bits in which packed rows differ: int64 [n, words], [m, words] -> int32 [n, m]. Raises ValueError on others."""
    _check(x.ndim == 2 and y.ndim == 2, "x and y must be matrices of words")
    return plane_distances(x.unsqueeze(1), y.unsqueeze(1))


def plane_distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances of codes of several bit planes, the highest plane first: how far the inner product is from its most.

    x: int64 [n, P, words], y: int64 [m, Q, words]. A coordinate of x is worth the sum over its planes i of
    2^(P-1-i) times a sign. Returns int32 [n, m]: the sum over planes i and j of 2^(P-1-i + Q-1-j) popcount(x_i xor y_j)
    = ((2^P - 1)(2^Q - 1) * coordinates - <x, y>) / 2, where the coordinates may be counted with or without those that
    are zero bits in both, provided that both terms are. One plane each: Hamming distance. Raises ValueError if words
    differ or a distance could exceed int32. BEBR, arXiv 2302.08714, section on symmetric distance calculation.
    """
    _check(x.ndim == 3 and y.ndim == 3 and x.shape[2] == y.shape[2], "x and y must be [rows, planes, words]")
    _check(x.dtype == torch.int64 == y.dtype, "packed signs must be int64")
    most = (2 ** x.shape[1] - 1) * (2 ** y.shape[1] - 1) * _WORD * x.shape[2]
    _check(most <= MOST_COLUMNS, "the planes and words are too many for int32 distances")
    if not _compiled(x):
        return plane_distances_reference(x, y)
    out = torch.empty(len(x), len(y), dtype=torch.int32)
    kernels._cpu.binary_distances(_array(x), _array(y), out.numpy(), torch.get_num_threads())
    return out


def plane_distances_reference(x: Tensor, y: Tensor) -> Tensor:
    """`plane_distances` in plain torch."""
    coordinates = _WORD * x.shape[2]

    def values(packed: Tensor) -> Tensor:
        weights = 2.0 ** torch.arange(packed.shape[1] - 1, -1, -1, dtype=torch.float64, device=packed.device)
        return (unpack_signs(packed, coordinates, torch.float64) * weights[:, None]).sum(1)

    most = (2 ** x.shape[1] - 1) * (2 ** y.shape[1] - 1) * coordinates
    return ((most - values(x) @ values(y).T) / 2).to(torch.int32)


def _compiled(x: Tensor) -> bool:
    if x.device.type != "cpu":
        return False
    if kernels._cpu is None:
        kernels.tell_once()
        return False
    return True


def _array(x: Tensor):
    return x.detach().contiguous().numpy()


def _output(epilogue: Epilogue, rows: int, outputs: int):
    """The tensor to be written, and the kernels' arguments scale, bias, threshold, flip."""
    if isinstance(epilogue, Thresholds):
        given = (_array(epilogue.threshold), _array(epilogue.flip.to(torch.uint8)))
        return torch.empty(rows, words(outputs), dtype=torch.int64), (None, None, *given)
    if epilogue is None:
        return torch.empty(rows, outputs, dtype=torch.int32), (None, None, None, None)
    given = (None if value is None else _array(value) for value in (epilogue.scale, epilogue.bias))
    return torch.empty(rows, outputs, dtype=torch.float32), (*given, None, None)


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    _check(len(pair) == 2, f"{name} must be a number or two")
    return pair  # pyright: ignore[reportReturnType]  (its length was checked)


def _check(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(what)


def _check_packed(packed: Tensor, cols: int, name: str) -> None:
    _check(packed.dtype == torch.int64, f"{name} must be packed signs, int64")
    _check(packed.shape[-1] == words(cols), f"{name} must have {words(cols)} words for {cols} columns")
    beyond = -1 << cols % _WORD if cols % _WORD else 0
    if beyond and packed.numel():
        _check(not (packed[..., -1] & beyond).any(), f"{name} has bits beyond its {cols} columns")


def _check_epilogue(epilogue: Epilogue, outputs: int) -> None:
    if isinstance(epilogue, Thresholds):
        wanted = ((epilogue.threshold, torch.int32), (epilogue.flip, torch.bool))
    elif epilogue is not None:
        wanted = ((epilogue.scale, torch.float32), (epilogue.bias, torch.float32))
    else:
        return
    for value, dtype in wanted:
        if value is not None:
            _check(value.shape == (outputs,) and value.dtype == dtype, f"the epilogue needs {dtype} [{outputs}]")
