"""The artifact: a directory that holds a packed model, written whole or not at all, and read with suspicion.

    config.json         the model's own configuration and `quantization_config`
    model.safetensors   a uint8 tensor for each packed weight under its parameter's name, holding the blob, and one,
                        `pennyweight.rest`, for everything else (see `pack_rest`); version and checksum as metadata
    plan.yaml, report.json   what the model became and why; not needed to load it

Only the first two are needed to load the model, and their bytes are its size. docs/format.md specifies both.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .bundle import (
    NO_CHECKSUM,
    REST,
    VERSION,
    checksum_field,
    config_json,
    file_bytes,
    pack_rest,
    predict_bytes,
    round_to_stored,
    set_exact,
    unpack_rest,
    weights_file,
)
from .checkpoints import PICKLE_SUFFIXES, WEIGHTS, load_checkpoint, refuse_pickle, refuse_pickle_bytes
from .errors import ArtifactError, PlanError, UnknownNameError
from .formats import PackedWeight, from_bytes
from .kernels.integer import ActivationBits
from .layers.activation_quantizer import ActivationQuantizer, attach_input_quantizer
from .layers.packed import Memory, arrange, install_blobs, packed_blobs
from .layers.quantised import restore
from .layers.sites import weight_sites

__all__ = [
    "Artifact",
    "file_bytes",
    "fill",
    "load",
    "load_checkpoint",
    "predict_bytes",
    "read_artifact",
    "round_to_stored",
    "save",
]

T = TypeVar("T")

CONFIG, PLAN, REPORT = "config.json", "plan.yaml", "report.json"


@dataclass(frozen=True)
class Artifact:
    """The content of an artifact's two files.

    config: config.json. blobs: name of a packed weight -> its blob. rest: all other tensors by name. aliases: further
    name of a tied tensor -> the name it is stored under. folded: (layer, batch norm) names. input_bits: module name ->
    bits of its input quantiser. quantised: `layers.quantised.structure` of a converted model. nbytes: size of the two
    files. exact: whether the rest is stored in its own types.
    """

    config: dict[str, Any]
    blobs: dict[str, bytes]
    rest: dict[str, Tensor]
    aliases: dict[str, str]
    folded: list[tuple[str, str]]
    input_bits: dict[str, int]
    quantised: dict[str, Any]
    nbytes: int
    exact: bool = False

    def packed_weights(self) -> dict[str, PackedWeight]:
        return {name: from_bytes(blob) for name, blob in self.blobs.items()}

    def below(self, prefix: str) -> Artifact:
        """What belongs to the submodule of that prefix ("bert."), under its own names; all of it if there is none."""
        names = [*self.blobs, *self.rest, *self.aliases]
        if not any(name.startswith(prefix) for name in names):
            return self
        # A tied weight may be stored under a name outside: it then takes the name inside.
        outside = {a: n for a, n in self.aliases.items() if a.startswith(prefix) and not n.startswith(prefix)}
        blobs = self.blobs | {a: self.blobs[n] for a, n in outside.items() if n in self.blobs}
        rest = self.rest | {a: self.rest[n] for a, n in outside.items() if n in self.rest}
        inside = {a: n for a, n in self.aliases.items() if a.startswith(prefix) and n.startswith(prefix)}
        return replace(
            self,
            blobs=_below(prefix, blobs),
            rest=_below(prefix, rest),
            aliases={alias: name.removeprefix(prefix) for alias, name in _below(prefix, inside).items()},
            folded=[
                (layer.removeprefix(prefix), norm.removeprefix(prefix))
                for layer, norm in self.folded
                if layer.startswith(prefix)
            ],
            input_bits=_below(prefix, self.input_bits),
            quantised=self.quantised
            and {
                "layers": _below(prefix, self.quantised["layers"]),
                "removed": [name.removeprefix(prefix) for name in self.quantised["removed"] if name.startswith(prefix)],
            },
        )


def _below(prefix: str, named: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------------------- save


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    plan: str | None = None,
    report: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> int:
    """Write a packed model to a directory and return its size in bytes (model.safetensors and config.json).

    plan: text of plan.yaml. report: content of report.json. config: replaces the model's own configuration.
    The same model gives the same bytes. All files are complete on the disk before any takes its name, so a failure
    leaves what was there. Raises ArtifactError if a file cannot be written or the model holds state that is no tensor.
    """
    target = Path(directory)
    tensors = {names[0]: blob for names, blob in packed_blobs(model).items()}
    tensors[REST] = pack_rest(model)
    files = {CONFIG: config_json(model, config), WEIGHTS: weights_file(tensors)}
    size = sum(map(len, files.values()))
    if plan is not None:
        files[PLAN] = plan.encode()
    if report is not None:
        files[REPORT] = json.dumps(report, indent=1, ensure_ascii=False).encode()
    try:
        _write_all(target, files)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}; nothing was changed") from error
    return size


def _write_all(target: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a temporary sibling, flush them to the disk, then give them their names."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(0, "a file of that name exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, data in files.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if target.exists():
            for name in files:
                os.replace(temporary / name, target / name)
            for name in {PLAN, REPORT} - files.keys():  # they would describe another model
                (target / name).unlink(missing_ok=True)
        else:
            temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            os.rename(temporary, target)
        _flush_directory(target)
        _flush_directory(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_directory(path: Path) -> None:
    if os.name == "posix":  # elsewhere directories cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------- load


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | str | None = None,
    memory: Memory = "fast",
    device: torch.device | str | None = None,
    activation_bits: ActivationBits = 16,
) -> nn.Module:
    """Load a saved model, in eval mode.

    model: the unpacked model to fill (its weights are replaced in place; after an error it must not be used), a
    function or class that makes it, "module:factory", or None for a transformers model named by config.json.
    memory: "fast" keeps decoded weights after their first use; "low" never holds more than one layer's, and multiplies
    what is packed, with each row of inputs quantised to activation_bits: 16 (about 1e-5 off), 8 or 32 (not at all).
    Raises ArtifactError if the files are missing, damaged, of a newer version or do not fit the model.
    """
    artifact = read_artifact(directory)
    filled = _make_model(model, artifact.config, Path(directory))
    fill(filled, artifact, memory, activation_bits)
    arrange(filled)
    return filled.to(device).eval()


def _make_model(
    model: nn.Module | Callable[[], nn.Module] | str | None, config: Mapping[str, Any], directory: Path
) -> nn.Module:
    if model is None:
        from .integrations.transformers import empty_model

        return empty_model(config, directory)
    if isinstance(model, nn.Module):
        return model
    return _factory(model)() if isinstance(model, str) else model()


def _factory(reference: str) -> Callable[[], nn.Module]:
    module, colon, name = reference.partition(":")
    if not colon:
        raise ArtifactError(f"model {reference!r} is not of the form 'module:factory', such as 'my_models:resnet20'")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArtifactError(f"cannot find the model factory {reference!r}: {error}") from error


@torch.no_grad()
def fill(model: nn.Module, artifact: Artifact, memory: Memory = "fast", activation_bits: ActivationBits = 16) -> None:
    """Put an artifact's content into an unpacked model of the same architecture, in place.

    Raises ArtifactError naming the first tensor that the model lacks, has in excess or has in another shape.
    """
    remedy = "pass the model it was saved from (same class, same arguments) as model="
    try:
        _restore_structure(model, artifact)
    except (AttributeError, PlanError, UnknownNameError) as error:
        raise ArtifactError(f"the artifact does not fit this {type(model).__name__}: {error}; {remedy}") from error
    names = {name: site.view.matrix_shape for site in weight_sites(model) for name in (site.name, *site.aliases)}
    state = model.state_dict(keep_vars=True)
    stored = {**artifact.rest, **artifact.blobs}
    covered = stored.keys() | {alias for alias, name in artifact.aliases.items() if name in stored}
    for name in [*stored, *artifact.aliases]:
        if name not in state:
            raise ArtifactError(f"the artifact holds {name}, which this {type(model).__name__} lacks; {remedy}")
    for name in state:
        if name not in covered:
            raise ArtifactError(f"this {type(model).__name__} has {name}, which the artifact lacks; {remedy}")
    packed = {name: (from_bytes(blob), blob) for name, blob in artifact.blobs.items()}
    for name, (weight, _) in packed.items():
        shape = tuple(weight.shape)
        if names.get(name) != shape:
            here = f"{list(names[name])} as a matrix" if name in names else f"{list(state[name].shape)}"
            raise ArtifactError(f"{name} is stored as a matrix {list(shape)}, the model's is {here}; {remedy}")
    for name, tensor in artifact.rest.items():
        if state[name].shape != tensor.shape:
            here = list(state[name].shape)
            raise ArtifactError(f"{name} is stored with shape {list(tensor.shape)}, the model's is {here}; {remedy}")
    for name, tensor in artifact.rest.items():
        state[name].copy_(tensor)
    for alias, name in artifact.aliases.items():
        if name in packed:
            packed[alias] = packed[name]
        elif state[alias] is not state[name]:
            state[alias].copy_(artifact.rest[name])
    install_blobs(model, packed, memory, activation_bits)


def _restore_structure(model: nn.Module, artifact: Artifact) -> None:
    """Folded batch norms away, the biases they left, input quantisers, quantised layers.

    Raises AttributeError if a module is missing, `PlanError` or `UnknownNameError` on methods unknown here.
    """
    for layer_name, norm_name in artifact.folded:
        layer: Any = model.get_submodule(layer_name)
        parent, _, child = norm_name.rpartition(".")
        if getattr(layer, "bias", None) is None:
            outputs = layer.out_channels if hasattr(layer, "out_channels") else layer.out_features
            layer.bias = nn.Parameter(torch.zeros(outputs, dtype=layer.weight.dtype, device=layer.weight.device))
        if not isinstance(model.get_submodule(norm_name), nn.Identity):
            setattr(model.get_submodule(parent), child, nn.Identity())
    if artifact.folded:
        model._pennyweight_folded_before = list(artifact.folded)  # pyright: ignore[reportArgumentType]
    for name, bits in artifact.input_bits.items():
        module = model.get_submodule(name)
        device = next((t.device for t in module.state_dict(keep_vars=True).values()), None)
        attach_input_quantizer(module, ActivationQuantizer(bits).to(device))
    if artifact.exact:
        set_exact(model)
    if artifact.quantised:
        restore(model, artifact.quantised, artifact.rest)


def is_artifact(directory: str | os.PathLike[str]) -> bool:
    """Whether pennyweight wrote that directory; no more than its config.json is looked at."""
    try:
        config = json.loads((Path(directory) / CONFIG).read_bytes())
        return config["quantization_config"]["quant_method"] == "pennyweight"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_artifact(directory: str | os.PathLike[str]) -> Artifact:
    """Read and check the two files of an artifact. Raises ArtifactError for all that can be wrong with them."""
    path = Path(directory)
    refuse_pickle(path)
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a directory; give the directory that pennyweight.save wrote")
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
            refuse_pickle(pickles[0] if pickles else path)
            raise ArtifactError(f"{path} is not a pennyweight artifact: it has no {name}")
    raw = (path / CONFIG).read_bytes()
    config = _parse_config(raw, path / CONFIG)
    data = (path / WEIGHTS).read_bytes()
    tensors = _parse_weights(data, path / WEIGHTS)
    try:
        rest, index = unpack_rest(tensors.pop(REST))
    except (zlib.error, struct.error, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path / WEIGHTS}: {REST} is damaged ({error}); get the file again") from error
    return Artifact(
        config=config,
        blobs=tensors,
        rest=rest,
        aliases=index.get("aliases", {}),
        folded=[(layer, norm) for layer, norm in index.get("folded", [])],
        input_bits=index.get("input_bits", {}),
        quantised=index.get("quantised", {}),
        nbytes=len(raw) + len(data),
        exact=bool(index.get("exact", False)),
    )


def _parse_config(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(raw)
        settings = config.get("quantization_config") or {}
        method, version = settings.get("quant_method"), settings.get("version", VERSION)
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: it is not a JSON object ({error}); get the file again") from error
    if method != "pennyweight":
        raise ArtifactError(f"{path} has no quantization_config of pennyweight: this is not a pennyweight artifact")
    _check_version(version, path)
    return config


def _check_version(version: Any, path: Path) -> None:
    if not isinstance(version, int) or version < 1:
        raise ArtifactError(f"{path} is damaged: {version!r} is no version; get the file again")
    if version > VERSION:
        raise ArtifactError(
            f"{path} was written by a newer pennyweight (version {version}, this one reads up to {VERSION}): "
            "upgrade with pip install --upgrade pennyweight"
        )


def _parse_weights(data: bytes, path: Path) -> dict[str, bytes]:
    """The tensors of model.safetensors, after version, length and checksum were found right."""
    refuse_pickle_bytes(data[:8], path)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or len(data) < 8 + length:
        raise ArtifactError(f"{path} is truncated or damaged: {len(data)} bytes do not hold its header; get it again")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        extents = {name: (entry["dtype"], *entry["data_offsets"]) for name, entry in header.items()}
        size = 8 + length + max([stop for _, _, stop in extents.values()], default=0)
        if len(data) < size:
            raise ArtifactError(f"{path} is truncated: it has {len(data)} of {size} bytes; get the file again")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: its header cannot be read ({error}); get the file again") from error
    if "pennyweight" not in metadata:
        raise ArtifactError(f"{path} was not written by pennyweight (an ordinary checkpoint?): shrink the model first")
    _check_version(int(metadata["pennyweight"]) if str(metadata["pennyweight"]).isdecimal() else None, path)
    digits = str(metadata.get("crc32")).encode()
    at = data.find(checksum_field(digits), 8, 8 + length) + len(checksum_field(b""))
    checksum = zlib.crc32(data[at + 8 :], zlib.crc32(NO_CHECKSUM.encode(), zlib.crc32(data[:at])))
    if len(digits) != 8 or f"{checksum:08x}".encode() != digits:
        raise ArtifactError(f"{path} was altered or damaged: its checksum does not match; get the file again")
    if REST not in extents or any(dtype != "U8" for dtype, _, _ in extents.values()):
        raise ArtifactError(f"{path} is not a pennyweight artifact: its tensors are not those of one")
    return {name: data[8 + length + start : 8 + length + stop] for name, (_, start, stop) in extents.items()}
