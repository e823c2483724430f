"""From a model to the bytes of its artifact: the bundle of unpacked tensors, the safetensors container, config.json.

Every size can be known before a weight is packed (`predict_bytes`), which is what the planner's promise rests on.
docs/format.md specifies the layout.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ArtifactError
from .layers.activation_quantizer import ActivationQuantizer
from .layers.packed import packed_blobs
from .layers.quantised import structure
from .layers.sites import weight_sites

VERSION = 1
REST = "pennyweight.rest"
NO_CHECKSUM = "00000000"
_STORED_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
        *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    )
}


def stored_dtype(tensor: Tensor, exact: bool = False) -> torch.dtype:
    """The dtype in which a tensor that is not packed is stored: its own, if it is to be exact. Otherwise

    float16 if no value changes by more than 2^-11 of its magnitude, or, below float16's normal range, by more than
    2^-20 of the tensor's largest; otherwise float32. Types of two bytes or less and types that are not floating stay.
    """
    if exact or not tensor.is_floating_point():
        return tensor.dtype
    values = tensor.detach().double()
    finite = values[values.isfinite()].abs()
    error = (finite - finite.half().double()).abs()
    largest = finite.max() if finite.numel() else finite.new_zeros(())
    if bool((error <= torch.maximum(finite * 2.0**-11, largest * 2.0**-20)).all()):
        return torch.float16
    return tensor.dtype if tensor.element_size() <= 2 else torch.float32


def set_exact(model: nn.Module) -> None:
    """Have every tensor of the model that is not packed stored in its own type from now on."""
    model._pennyweight_exact = True  # pyright: ignore[reportArgumentType]


def is_exact(model: nn.Module) -> bool:
    """Whether tensors that are not packed are stored in their own type: told so, or with quantised layers."""
    return bool(getattr(model, "_pennyweight_exact", False)) or bool(structure(model))


@torch.no_grad()
def round_to_stored(model: nn.Module) -> None:
    """Give every tensor that is not packed the value it will have after save and load, in place. Call it after install:
    weights not yet packed are rounded, too."""
    exact = is_exact(model)
    for tensor in _rest_tensors(model, ())[0].values():
        tensor.copy_(tensor.to(stored_dtype(tensor, exact)))


@torch.no_grad()
def halve(parameters: Iterable[Tensor]) -> None:
    """Round parameters to float16 values, in place, so that they are stored in two bytes; too large ones stay."""
    for parameter in parameters:
        if parameter.is_floating_point() and bool((parameter.abs() < 65504).all()):
            parameter.copy_(parameter.half())


def pack_rest(model: nn.Module, packed: Iterable[str] = ()) -> bytes:
    """The bundle `pennyweight.rest` of a model: all of its state that is not packed, zlib-compressed.

    packed: names of weight sites that are yet to be packed and therefore left out (weights already packed always are).
    Inside: uint32 length of the index, the index (JSON), then the data of all tensors with items of 1 byte, of 2 bytes,
    and so on; per item size first the lowest byte of every item, then the next (bytes of one kind compress best).
    """
    tensors, aliases = _rest_tensors(model, packed)
    quantised, exact = structure(model), is_exact(model)
    entries: list[list[Any]] = []
    groups: dict[int, list[bytes]] = {}
    for name, tensor in tensors.items():
        stored = tensor.detach().to("cpu", stored_dtype(tensor, exact)).contiguous()
        entries.append([name, str(stored.dtype).removeprefix("torch."), list(tensor.shape)])
        groups.setdefault(stored.element_size(), []).append(_raw(stored))
    index: dict[str, Any] = {"tensors": entries}
    structures: dict[str, Any] = {"folded": _folded(model), "input_bits": _input_bits(model), "quantised": quantised}
    if exact and not quantised:
        structures["exact"] = True
    for key, value in {"aliases": aliases, **structures}.items():
        if value:
            index[key] = value
    text = compact_json(index)
    planes = [_planes(b"".join(groups[size]), size) for size in sorted(groups)]
    return zlib.compress(b"".join([struct.pack("<I", len(text)), text, *planes]), 9)


def rest_bytes(tensor: Tensor) -> int:
    """About what a tensor takes in the bundle, stored in its own type."""
    return len(zlib.compress(_planes(_raw(tensor.detach().cpu().contiguous()), tensor.element_size()), 9))


def blob_entry_bytes(name: str, nbytes: int) -> int:
    """About what naming a blob in the header takes."""
    return len(_header({name: nbytes})) - len(_header({}))


def _raw(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _planes(raw: bytes, size: int) -> bytes:
    """The lowest byte of every item, then the next."""
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, size).T.tobytes()


def unpack_rest(bundle: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    data = zlib.decompress(bundle)
    (length,) = struct.unpack_from("<I", data)
    index = json.loads(data[4 : 4 + length])
    dtypes = {name: _STORED_DTYPES[dtype] for name, dtype, _ in index["tensors"]}
    sizes = {name: dtypes[name].itemsize for name in dtypes}
    counts = {name: math.prod(shape) for name, _, shape in index["tensors"]}
    tensors: dict[str, Tensor] = {}
    at = 4 + length
    for size in sorted(set(sizes.values())):
        members = [(name, shape) for name, _, shape in index["tensors"] if sizes[name] == size]
        total = sum(counts[name] for name, _ in members)
        planes = np.frombuffer(data, dtype=np.uint8, count=total * size, offset=at).reshape(size, total)
        items = torch.from_numpy(planes.T.copy())
        at += total * size
        first = 0
        for name, shape in members:
            own = items[first : first + counts[name]].reshape(-1).clone()
            tensors[name] = own.view(dtypes[name]).reshape(shape)
            first += counts[name]
    return tensors, index


def _rest_tensors(model: nn.Module, packed: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors that are not packed, by their first name in order; alias -> first name of all tied tensors)."""
    wanted = set(packed)
    left_out = {name for names in packed_blobs(model) for name in names}
    aliases = {alias: names[0] for names in packed_blobs(model) for alias in names[1:]}
    for site in weight_sites(model):
        if wanted & {site.name, *site.aliases}:
            left_out |= {site.name, *site.aliases}
            aliases |= dict.fromkeys(site.aliases, site.name)
    tensors: dict[str, Tensor] = {}
    first_names: dict[int, str] = {}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, Tensor):
            raise ArtifactError(f"{name} is extra state of type {type(tensor).__name__}; only tensors can be saved")
        if name in left_out:
            continue
        first = first_names.setdefault(id(tensor), name)
        if first == name:
            tensors[name] = tensor
        else:
            aliases[name] = first
    return tensors, dict(sorted(aliases.items()))


def _folded(model: nn.Module) -> list[tuple[str, str]]:
    """(layer, norm) of each batch norm that was folded, by this process or before the model was loaded."""
    now = [(record.layer, record.norm) for record in getattr(model, "_pennyweight_folded", [])]
    return [*getattr(model, "_pennyweight_folded_before", []), *now]


def _input_bits(model: nn.Module) -> dict[str, int]:
    quantizers = {name: getattr(module, "input_quantizer", None) for name, module in model.named_modules()}
    return {name: q.bits for name, q in quantizers.items() if isinstance(q, ActivationQuantizer)}


# -------------------------------------------------------------------------------------------- bytes of the files


def config_json(model: nn.Module, config: Mapping[str, Any] | None = None) -> bytes:
    """config.json of a model: `config`, or the model's own configuration (`model.config`, as transformers has it, only
    what differs from its class's defaults), with `quantization_config`."""
    settings = dict(_own_config(model) if config is None else config)
    settings["quantization_config"] = {"quant_method": "pennyweight", "version": VERSION}
    return compact_json(settings)


def _own_config(model: nn.Module) -> dict[str, Any]:
    own = getattr(model, "config", None)
    for method in ("to_diff_dict", "to_dict"):
        if callable(getattr(own, method, None)):
            settings = dict(getattr(own, method)())
            break
    else:
        return {}
    if hasattr(own, "model_type"):  # transformers writes these two when it saves a model
        settings.pop("transformers_version", None)
        settings["architectures"] = [type(model).__name__]
        settings["dtype"] = str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")
    return settings


def file_bytes(blob_bytes: Mapping[str, int], rest_bytes: int, config_bytes: int) -> int:
    """Bytes of config.json and model.safetensors, given the bytes of each blob, of `pack_rest` and of `config_json`."""
    sizes = {**blob_bytes, REST: rest_bytes}
    return len(_header(sizes)) + sum(sizes.values()) + config_bytes


def predict_bytes(model: nn.Module, blob_bytes: Mapping[str, int], config: Mapping[str, Any] | None = None) -> int:
    """The size that `save` would have if the weights named (by site, in a model not yet packed) became blobs of so many
    bytes and all else stayed as it is. Exact."""
    return file_bytes(blob_bytes, len(pack_rest(model, blob_bytes)), len(config_json(model, config)))


def _header(sizes: Mapping[str, int]) -> bytes:
    """Length and JSON header of a safetensors file of uint8 vectors in the order of their names; checksum blank."""
    entries: dict[str, Any] = {
        "__metadata__": {"format": "pt", "pennyweight": str(VERSION), "crc32": NO_CHECKSUM},
    }
    at = 0
    for name, size in sorted(sizes.items()):
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = compact_json(entries)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def weights_file(tensors: Mapping[str, bytes]) -> bytes:
    header = _header({name: len(data) for name, data in tensors.items()})
    body = b"".join(tensors[name] for name in sorted(tensors))
    checksum = f"{zlib.crc32(body, zlib.crc32(header)):08x}".encode()
    at = header.index(checksum_field(NO_CHECKSUM.encode())) + len(checksum_field(b""))
    return header[:at] + checksum + header[at + 8 :] + body


def checksum_field(digits: bytes) -> bytes:
    return b'"crc32":"' + digits


def compact_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=True).encode()
