"""The product of two matrices of signs: XNOR and a count of bits, exact in whole numbers.

Signs are kept 32 to a word, as int32 [words, rows] with words = ceil(cols / 32): bit i of word w is 1 where column
32 w + i is not negative, and 0 beyond the columns. Rows lie next to each other, since the kernel takes one word of many
rows at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import DataError
from .launch import OPTIONS, check_input, interpreted, kernels

_TILE = 64


def pack_signs(x: Tensor) -> Tensor:
    """x [rows, cols] of float32, float16 or bfloat16 -> int32 [words, rows]. NaN counts as negative."""
    if x.ndim != 2:
        raise DataError(f"signs are packed of a matrix [rows, cols], not of shape {tuple(x.shape)}")
    check_input(x, x.shape[1], x.device)
    rows, cols = x.shape
    words = -(-cols // 32)
    out = torch.empty(words, rows, dtype=torch.int32, device=x.device)
    x = x.detach()
    if x.numel():
        x = x if x.stride(1) == 1 else x.contiguous()
        with torch.cuda.device_of(x):
            kernels().pack_signs[(-(-rows // 16), -(-words // 8))](
                x, out, rows, cols, x.stride(0), words, BM=16, BW=8, **OPTIONS
            )
    return out


def pack_signs_reference(x: Tensor) -> Tensor:
    """`pack_signs` in plain torch."""
    rows, cols = x.shape
    bits = F.pad((x >= 0).to(torch.int64), (0, -cols % 32)).view(rows, -(-cols // 32), 32)
    words = (bits << torch.arange(32, device=x.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).T.contiguous()


def xnor_product(left: Tensor, right: Tensor, cols: int) -> Tensor:
    """The products of all rows of signs: int32 [words, left rows] and [words, right rows] -> int32 [left, right rows].

    cols: how many signs a row has. Raises DataError unless both have ceil(cols / 32) words and lie on one device.
    """
    words = -(-cols // 32)
    for side in (left, right):
        if side.dtype != torch.int32 or side.ndim != 2 or side.shape[0] != words:
            raise DataError(
                f"{cols} signs a row are int32 [{words}, rows], but got {side.dtype} of shape {tuple(side.shape)}; "
                "make them with pack_signs"
            )
    if left.device != right.device:
        raise DataError(f"signs lie on {left.device} and {right.device}; move one to the other")
    if left.device.type != "cuda" and not interpreted():
        raise DataError(f"the GPU kernels need tensors on cuda, not {left.device}; use the CPU kernels there")
    out = torch.zeros(left.shape[1], right.shape[1], dtype=torch.int32, device=left.device)
    if out.numel() and words:
        left, right = left.contiguous(), right.contiguous()
        grid = (-(-right.shape[1] // _TILE), -(-left.shape[1] // _TILE))
        # popc is NVIDIA's; elsewhere bits are counted by arithmetic
        hardware = torch.version.cuda is not None and not interpreted()
        with torch.cuda.device_of(left):
            kernels().xnor_product[grid](
                left,
                right,
                out,
                left.shape[1],
                right.shape[1],
                cols,
                words,
                BM=_TILE,
                BN=_TILE,
                HARDWARE=hardware,
                **OPTIONS,
            )
    return out


def xnor_product_reference(left: Tensor, right: Tensor, cols: int) -> Tensor:
    """`xnor_product` in plain torch: the product of matrices of +1 and -1."""
    bit = torch.arange(32, device=left.device)
    signs = [(words.T[..., None] >> bit & 1).flatten(1)[:, :cols].to(torch.float64) * 2 - 1 for words in (left, right)]
    return (signs[0] @ signs[1].T).to(torch.int32)
