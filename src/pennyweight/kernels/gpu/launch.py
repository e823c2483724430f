"""Which kernel with which tiles. Shapes alone decide, not the device or timings, so that results depend on no more."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import DataError, WeightError, require
from .weights import ROW_BYTES, WIDTHS

if TYPE_CHECKING:
    from .weights import GpuIntegers

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW_ROWS = 8  # rows of x up to which the product is not worth tensor cores
#: Programs that fill a large GPU; with fewer, the columns are split. A program of `few_rows` is a single warp, which
#: needs no barrier to hand x to its lanes; its tiles are what the registers hold without spilling (on sm_80 and sm_90).
FEW_PROGRAMS, FEW_TILE, FEW_UNITS = 1024, 4, 128
MANY_PROGRAMS, MANY_TILE, MANY_UNITS, MANY_WARPS = 256, 64, 32, 8
LARGEST_SPLIT = 64
#: Compiler options. A multiplication and an addition may round once: the default, said so that no version changes it.
OPTIONS = {"enable_fp_fusion": True}


def kernels() -> ModuleType:
    """The module of kernels. Raises MissingExtraError without Triton."""
    require("triton", "gpu")
    from . import triton_kernels

    return triton_kernels


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which takes tensors on the CPU."""
    return not isinstance(kernels().few_rows, require("triton", "gpu").JITFunction)


def check_input(x: Tensor, cols: int, device: torch.device) -> None:
    """DataError unless x [..., cols] is of a dtype the kernels take and lies where the weight and the kernels are."""
    if x.ndim == 0 or x.shape[-1] != cols:
        raise DataError(f"the packed weight takes {cols} inputs, but x has shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise DataError(f"the GPU kernels take float32, float16 and bfloat16, not {x.dtype}; convert x first")
    if x.device != device:
        raise DataError(f"x lies on {x.device}, but the packed weight on {device}; move one to the other")
    if x.device.type != "cuda" and not interpreted():
        raise DataError(f"the GPU kernels need tensors on cuda, not {x.device}; use the CPU kernels there")


def linear(weight: GpuIntegers, x: Tensor, bias: Tensor | None) -> Tensor:
    """See `GpuIntegers.linear`."""
    rows, cols = weight.shape
    check_input(x, cols, weight.device)
    if bias is not None and (tuple(bias.shape) != (rows,) or bias.dtype not in DTYPES or bias.device != x.device):
        raise WeightError(
            f"a bias of shape {tuple(bias.shape)}, {bias.dtype} on {bias.device} does not fit a packed weight "
            f"of {rows} rows on {x.device}"
        )
    matrix = x.detach().reshape(-1, cols) if cols else x.detach().new_zeros(x.shape[:-1].numel(), 0)
    if matrix.numel() and matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    x_rows = matrix.shape[0]
    if not x_rows * rows * cols:
        out = x.new_zeros(x_rows, rows) if bias is None else bias.detach().to(x.dtype).repeat(x_rows, 1)
    else:
        with torch.cuda.device_of(matrix):
            out = _product(weight, matrix, None if bias is None else bias.detach().contiguous())
    return out.view(*x.shape[:-1], rows)


def _product(weight: GpuIntegers, x: Tensor, bias: Tensor | None) -> Tensor:
    code = kernels()
    (rows, cols), x_rows = weight.shape, x.shape[0]
    low_width, high_width = WIDTHS[weight.bits]
    unit_bytes = weight.unit_bytes
    per_unit = unit_bytes * 8 // low_width
    units = -(-cols // per_unit)
    if x_rows <= FEW_ROWS:
        m_tile, n_tile, programs = _power_of_two(x_rows), FEW_TILE, FEW_PROGRAMS
        unit_tile = min(_power_of_two(units), FEW_UNITS, 2 * FEW_UNITS // m_tile)
        blocks = (_ceil(rows, n_tile),)
    else:
        m_tile, n_tile, programs = min(max(_power_of_two(x_rows), 16), MANY_TILE), MANY_TILE, MANY_PROGRAMS
        unit_tile = MANY_UNITS
        blocks = (_ceil(rows, n_tile), _ceil(x_rows, m_tile))
    steps = _ceil(units, unit_tile)
    splits = max(1, min(programs // math.prod(blocks), steps, LARGEST_SPLIT))
    per_split = _ceil(steps, splits) * unit_tile
    splits = _ceil(units, per_split)

    out = torch.empty(x_rows, rows, dtype=x.dtype, device=x.device)
    target = out if splits == 1 else torch.empty(splits, x_rows, rows, device=x.device)
    kind = torch.int32 if unit_bytes == 4 else torch.uint8
    tensors = (
        weight.low.view(kind),
        None if weight.high is None else weight.high.view(kind),
        weight.scale,
        weight.minimum,
        weight.column_scale,
        weight.column_offset,
        weight.table,
        bias if splits == 1 else None,
        target,
    )
    sizes = (
        weight.low.shape[2] // ROW_BYTES,
        0 if weight.high is None else weight.high.shape[2] // ROW_BYTES,
        weight.scale.shape[2],
        units,
        per_split,
        weight.scale_factor / weight.magnitude,
        weight.minimum_factor / weight.magnitude,
        1 / weight.magnitude,
        weight.magnitude,
    )
    constants = {
        "LOW": low_width,
        "HIGH": high_width,
        "UNIT": unit_bytes,
        "PLANES": weight.low.shape[0],
        "ZERO": weight.zero,
        "GROUP_UNITS": weight.group // per_unit,
    }
    if x_rows <= FEW_ROWS:
        tiles = {"M": m_tile, "BN": n_tile, "BU": unit_tile}
        code.few_rows[(*blocks, splits)](
            x, *tensors, x_rows, rows, cols, x.stride(0), *sizes, **constants, **tiles, **OPTIONS, num_warps=1
        )
    else:
        x_blocks = _ceil(units, 16)
        arranged = torch.empty(x_rows, per_unit, x_blocks * 16, dtype=x.dtype, device=x.device)
        arrange_tile = 1024 // per_unit
        code.arrange_inputs[(x_rows, _ceil(x_blocks * 16, arrange_tile))](
            x, arranged, cols, x.stride(0), units, x_blocks, PER=per_unit, BU=arrange_tile, **OPTIONS
        )
        dot = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}[x.dtype]
        if dot == "bfloat16" and interpreted():
            dot = "float32"
        tiles = {"BM": m_tile, "BN": n_tile, "BU": unit_tile, "DOT": getattr(code.tl, dot)}
        code.many_rows[(*blocks, splits)](
            arranged,
            *tensors,
            x_rows,
            rows,
            cols,
            x_blocks,
            *sizes,
            **constants,
            **tiles,
            **OPTIONS,
            num_warps=MANY_WARPS,
        )
    if splits > 1:
        code.add_splits[(_ceil(out.numel(), 256),)](target, bias, out, out.numel(), rows, splits, BLOCK=256, **OPTIONS)
    return out


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_two(count: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(count - 1, 0).bit_length()
