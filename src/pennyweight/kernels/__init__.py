"""Fast twins of reference code. Each has its reference in plain torch here, and a test that holds the two together.

The compiled module is optional: without it everything works, slower, and says so once.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..errors import UnknownNameError, warn

try:
    from . import _cpu  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without stubs)
except ImportError:  # a source tree that was not built
    _cpu = None

#: Columns the compiled block kernel takes at once.
FEEDBACK_WIDTH = 128
_LARGEST_CODE = 32767.0
_told = False


def is_compiled() -> bool:
    """Whether the compiled kernels are there."""
    return _cpu is not None


def check_instruction_set() -> None:
    """Raise UnknownNameError if PENNYWEIGHT_ISA names an instruction set that is not here, as their first use would."""
    wish = os.environ.get("PENNYWEIGHT_ISA")
    if wish and _cpu is not None and wish not in _cpu.instruction_sets():
        raise UnknownNameError("instruction set in PENNYWEIGHT_ISA", wish, _cpu.instruction_sets())


def feedback_block(work: Tensor, upper: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Error feedback on a uniform grid, within one block of columns.

    work: float32 [rows, width], the block's current values (not changed). upper: [width, width], U of the block. row
    [rows], column [width]: the grid of an entry is row * column. Returns codes int16 [rows, width] and errors float32
    [rows, width], (value - code * grid) / U_jj, by which later blocks are to be corrected.
    """
    if _cpu is None:
        tell_once()
        return feedback_block_reference(work, upper, row, column)
    codes = torch.empty(work.shape, dtype=torch.int16)
    errors = torch.empty(work.shape)
    if not work.numel():
        return codes, errors
    work, upper = (t if t.stride(-1) == 1 else t.contiguous() for t in (work, upper))
    arrays = (t.numpy() for t in (work, upper, row.contiguous(), column.contiguous(), codes, errors))
    _cpu.feedback_block(*arrays, torch.get_num_threads())
    return codes, errors


def feedback_block_reference(work: Tensor, upper: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """`feedback_block` in plain torch."""
    values = work.T.contiguous()  # a row per column of the weight
    codes = torch.empty(values.shape, dtype=torch.int16)
    errors = torch.empty_like(values)
    for j in range(values.shape[0]):
        grid = row * column[j]
        code = torch.where(grid > 0, torch.round(values[j] / grid), 0.0).clamp_(-_LARGEST_CODE, _LARGEST_CODE)
        codes[j] = code.to(torch.int16)
        errors[j] = (values[j] - code * grid) / upper[j, j]
        values[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]
    return codes.T.contiguous(), errors.T.contiguous()


def needs_operator(x: Tensor, bias: Tensor | None) -> bool:
    """Whether to make a product by its operator of torch.library, to trace or differentiate it, and add bias apart."""
    wanted = x.requires_grad or (bias is not None and bias.requires_grad)
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and wanted)


def tell_once() -> None:
    """Warn, the first time, that the compiled kernels are missing."""
    global _told
    if not _told:
        _told = True
        warn(
            "the compiled kernels are missing (install pennyweight with a C++ compiler present): calibration, packed "
            "layers and optimizers are slower"
        )
