"""Running weights on a GPU: which inputs the kernels here take, and each weight in their arrangement, once a device."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .launch import DTYPES
from .weights import GpuIntegers

if TYPE_CHECKING:
    from ..integer import IntegerMatrix

_twins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # codes -> {(device, the rest): twin or None}


def takes(x: Tensor) -> bool:
    """Whether the kernels can multiply this input: it lies on a GPU, in a dtype of theirs, and Triton is there."""
    return x.device.type == "cuda" and x.dtype in DTYPES and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def twin(matrix: IntegerMatrix, device: torch.device) -> GpuIntegers | None:
    """The weight on `device`, arranged when first asked for and kept as long as its codes live.

    None where the kernels do not take it (`GpuIntegers.from_matrix`); decode it then.
    """
    if matrix.codes not in _twins:
        _twins[matrix.codes] = {}
    known = _twins[matrix.codes]
    rest = matrix.arguments()[1:]  # weights may share their codes and differ in their scales
    key = device, tuple(part.data_ptr() if isinstance(part, Tensor) else str(part) for part in rest)
    if key not in known:
        made = GpuIntegers.from_matrix(matrix)
        known[key] = None if made is None else made.to(device)
    return known[key]
