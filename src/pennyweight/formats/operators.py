"""Packed weights as operators of torch.library, for torch.compile and torch.export: a graph holds nothing but the blob.

    torch.ops.pennyweight.decode(blob, rows, cols)   float32 [rows, cols]
    torch.ops.pennyweight.rows(blob, index, cols)    float32 [*index.shape, cols]

blob: uint8 [nbytes], of any format. It is read once and remembered as long as the tensor lives; it must not be changed.
"""

from __future__ import annotations

from torch import Tensor, float32
from torch.library import custom_op
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ArtifactError
from . import from_bytes
from .base import PackedWeight

_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _packed(blob: Tensor) -> PackedWeight:
    if blob not in _read:
        _read[blob] = from_bytes(blob.cpu().numpy().tobytes())
    return _read[blob]


def _check(packed: PackedWeight, rows: int, cols: int) -> None:
    if tuple(packed.shape) != (rows, cols):
        raise ArtifactError(f"a packed matrix {[rows, cols]} is needed, but the blob holds {list(packed.shape)}")


@custom_op("pennyweight::decode", mutates_args=())
def decode(blob: Tensor, rows: int, cols: int) -> Tensor:
    packed = _packed(blob)
    _check(packed, rows, cols)
    return packed.decode().to(blob.device, copy=True)


@decode.register_fake
def _(blob: Tensor, rows: int, cols: int) -> Tensor:
    return blob.new_empty(rows, cols, dtype=float32)


@custom_op("pennyweight::rows", mutates_args=())
def rows(blob: Tensor, index: Tensor, cols: int) -> Tensor:
    packed = _packed(blob)
    _check(packed, packed.shape[0], cols)
    distinct, position = index.cpu().unique(return_inverse=True)  # in rising order
    if distinct.numel() and not 0 <= distinct[0] <= distinct[-1] < packed.shape[0]:
        worst = int(distinct[0] if distinct[0] < 0 else distinct[-1])
        raise IndexError(f"index {worst} is outside the table of {packed.shape[0]} entries")
    return packed.rows(distinct)[position].to(index.device)


@rows.register_fake
def _(blob: Tensor, index: Tensor, cols: int) -> Tensor:
    return blob.new_empty(*index.shape, cols, dtype=float32, device=index.device)
