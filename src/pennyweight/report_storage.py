"""What the report says of a packed weight: its storage in words, the bytes of its parts, its multiplications."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .compress.data import calls
from .compress.observe import evaluating
from .cost import vectors_multiplied
from .formats import (
    Binary,
    Codebook,
    Dense16,
    Integer,
    LowRank,
    PackedWeight,
    Partial,
    SignedLowRank,
    Sparse,
    Split,
    Stacked,
)
from .layers.packed import packed_blobs


def storage(packed: PackedWeight) -> str:
    """How a weight is stored, in words: "3-bit codes, groups of 64"."""
    rows, cols = packed.shape
    if isinstance(packed, Dense16):
        return f"dense {str(packed.halves.dtype).removeprefix('torch.')}"
    if isinstance(packed, Integer):
        coded = ", range-coded" if 8 * packed.nbytes < packed.bits * rows * cols else ""
        return f"{packed.bits}-bit codes{coded}" + _groups(packed.group, cols)
    if isinstance(packed, Binary):
        return "signs" + _groups(packed.group, cols)
    if isinstance(packed, Sparse):
        return f"sparse, {100 * _kept(packed) / (rows * cols):.3g} % kept"
    if isinstance(packed, LowRank):
        rank = packed.left.shape[1]
        return f"rank {rank} ({storage(packed.left)})" if rank else "rank 0 (all zero)"
    if isinstance(packed, Codebook):
        entries, width = packed.codebook.halves.shape
        return f"codebook of {entries} blocks of {width}"
    if isinstance(packed, SignedLowRank):
        return f"signs, magnitudes of rank {packed.rank}"
    if isinstance(packed, Partial):
        return f"{storage(packed.rest)}; {100 * _kept(packed.salient) / (rows * cols):.3g} % of weights salient"
    if isinstance(packed, Stacked):
        return f"{len(packed.parts)} stages ({storage(packed.parts[0])})"
    if isinstance(packed, Split):
        share = 100 * packed.second.shape[0] / rows
        return f"{storage(packed.first)}; {share:.3g} % of rows {storage(packed.second)}"
    return packed.format


def _groups(group: int, cols: int) -> str:
    return f", groups of {group}" if 0 < group < cols else ""


def _kept(packed: Sparse) -> int:
    return int(packed.mask.all().sum())


def storage_parts(packed: PackedWeight) -> list[tuple[str, int]]:
    """(format, bytes) of the parts of a divided weight; its own header and bitmap count with the first."""
    if not isinstance(packed, Split):
        return [(packed.format, packed.nbytes)]
    first, second = storage_parts(packed.first), storage_parts(packed.second)
    own = packed.nbytes - sum(size for _, size in (*first, *second))
    merged: dict[str, int] = {}
    for kind, size in ((first[0][0], own), *first, *second):
        merged[kind] = merged.get(kind, 0) + size
    return list(merged.items())


# ------------------------------------------------------------------------------------------------------ multiplications


def _weight_macs(packed: PackedWeight) -> Counter[str]:
    """Multiplications of one input row with the weight, by what the weights are stored as."""
    rows, cols = packed.shape
    if isinstance(packed, Split):
        return _weight_macs(packed.first) + _weight_macs(packed.second)
    if isinstance(packed, LowRank):
        return _weight_macs(packed.left) + _weight_macs(packed.right)
    if isinstance(packed, Stacked):
        return sum(map(_weight_macs, packed.parts), Counter())
    if isinstance(packed, Partial):
        return _weight_macs(packed.rest) + _weight_macs(packed.salient)
    if isinstance(packed, SignedLowRank):
        return Counter({"1-bit": packed.rank * rows * cols, "16-bit": packed.rank * (rows + cols)})
    if isinstance(packed, Sparse):
        return Counter({"sparse": _kept(packed)})
    if isinstance(packed, Codebook):
        return Counter({"codebook": rows * cols})
    if isinstance(packed, Integer):
        return Counter({f"{packed.bits}-bit": rows * cols})
    return Counter({"1-bit" if isinstance(packed, Binary) else "16-bit": rows * cols})


@torch.no_grad()
def count_macs(model: nn.Module, packed: Mapping[str, PackedWeight], inputs: Any) -> dict[str, dict[str, int]]:
    """Per weight: multiplications a sample, seen on the first batch. Embeddings multiply nothing."""
    batch = calls(model, inputs)[0]
    counted: dict[str, Counter[str]] = {name: Counter() for name in packed}
    handles = []
    for names in packed_blobs(model):
        for name in names:
            module = model.get_submodule(name.rpartition(".")[0])
            if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
                hook = _mac_hook(counted[names[0]], _weight_macs(packed[names[0]]))
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        with evaluating(model):
            batch(model)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: {key: value // batch.size for key, value in counts.items() if value} for name, counts in counted.items()
    }


def _mac_hook(counts: Counter[str], per_row: Mapping[str, int]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        positions = vectors_multiplied(module, args, kwargs, result)
        input_bits = getattr(getattr(module, "input_quantizer", None), "bits", 32)
        counts.update({f"{key} x {input_bits}-bit": value * positions for key, value in per_row.items()})

    return hook
