"""Bit packing: codes of b bits, 0 <= b <= 16, least significant bit first, without gaps.

Code i of a row occupies bits i*b .. i*b+b-1 of it; bit k of a row is bit k%8 of its byte k//8. Eight codes fill b
bytes exactly, so packing and unpacking work on all groups of eight at once, code by code of the group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits fill."""
    return (count * bits + 7) // 8


def code_dtype(bits: int) -> torch.dtype:
    """The type `unpack` returns: uint8 up to 8 bits, int32 above."""
    return torch.uint8 if bits <= 8 else torch.int32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes [..., n] in 0 .. 2^bits-1 -> uint8 [..., packed_size(n, bits)]."""
    *lead, n = codes.shape
    codes = codes.to(code_dtype(bits))
    if bits == 8:
        return codes.clone()
    size = packed_size(n, bits)
    eights = F.pad(codes, (0, -n % 8)).view(*lead, (n + 7) // 8, 8)
    out = torch.zeros(*lead, (n + 7) // 8, bits, dtype=torch.uint8, device=codes.device)
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        code = eights[..., j]
        for k in range(byte, (j * bits + bits + 7) // 8):
            part = code << shift if shift >= 0 else code >> -shift
            out[..., k] |= part if bits <= 8 else (part & 255).to(torch.uint8)
            shift -= 8
    return out.flatten(-2)[..., :size].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """uint8 [..., packed_size(n, bits)] -> codes [..., n], uint8 (bits <= 8) or int32."""
    lead = packed.shape[:-1]
    if bits == 0:
        return torch.zeros(*lead, n, dtype=torch.uint8, device=packed.device)
    if bits == 8:
        return packed
    if bits == 16:
        pairs = packed.view(*lead, n, 2).to(torch.int32)
        return pairs[..., 0] | pairs[..., 1] << 8
    if bits in (1, 2, 4):
        mask = (1 << bits) - 1
        parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(parts, -1).flatten(-2)[..., :n]
    groups = (n + 7) // 8
    dtype = code_dtype(bits)
    source = F.pad(packed, (0, groups * bits - packed.shape[-1])).view(*lead, groups, bits).to(dtype)
    out = torch.empty(*lead, groups, 8, dtype=dtype, device=packed.device)
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        code = source[..., byte] >> shift
        for k in range(byte + 1, (j * bits + bits + 7) // 8):
            code |= source[..., k] << (8 * (k - byte) - shift)
        out[..., j] = code & ((1 << bits) - 1)
    return out.flatten(-2)[..., :n]


def unpack_rows(packed: Tensor, bits: int, n: int, index: Tensor) -> Tensor:
    """The codes [*index.shape, n] of the rows `index` of packed [rows, packed_size(n, bits)]; compiled on the CPU."""
    if _cpu is None or packed.device.type != "cpu" or bits in (0, 8) or not packed.shape[0]:
        return unpack(packed[index], bits, n)
    out = torch.empty(index.numel(), n, dtype=code_dtype(bits))
    if out.numel():
        source, threads = packed.contiguous().numpy(), torch.get_num_threads()
        try:
            _cpu.unpack_rows(source, bits, n, index.flatten().numpy(), out.numpy(), threads)
        except IndexError:  # torch counts from the end, too
            rows = torch.where(index < 0, index + packed.shape[0], index).flatten()
            _cpu.unpack_rows(source, bits, n, rows.numpy(), out.numpy(), threads)
    return out.view(*index.shape, n)


def gather(packed: Tensor, bits: int, index: Tensor) -> Tensor:
    """The codes (1 to 8 bits) at positions `index` of one packed row, uint8 [size] -> int32 [*index.shape]."""
    first = index * bits
    byte = first >> 3
    low, high = packed[byte], packed[(byte + 1).clamp_max(packed.shape[0] - 1)]
    return (low.to(torch.int32) | high.to(torch.int32) << 8) >> (first & 7).to(torch.int32) & (1 << bits) - 1
