"""Nothing damaged, foreign or unfitting gets in: every bad artifact, model and checkpoint is refused in plain words."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pennyweight import artifact as artifact_module
from pennyweight.artifact import load, load_checkpoint, read_artifact, save
from pennyweight.bundle import REST
from pennyweight.errors import ArtifactError
from pennyweight.formats import Dense16
from pennyweight.layers.packed import install
from zoo import make_zoo, pack, packed_zoo


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good") / "out"
    save(packed_zoo(), directory)
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def test_flipped_bits_anywhere(tmp_path, good):
    data = good["model.safetensors"]
    header = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    places = [*range(8), *rng.integers(8, header, 150), *rng.integers(header, len(data), 50), len(data) - 1]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(ArtifactError):
            read_artifact(write(tmp_path, {**good, "model.safetensors": bytes(damaged)}))


def test_truncated_anywhere(tmp_path, good):
    data = good["model.safetensors"]
    for length in (0, 3, 8, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(ArtifactError, match="truncated"):
            read_artifact(write(tmp_path, {**good, "model.safetensors": data[:length]}))
    with pytest.raises(ArtifactError, match="checksum"):
        read_artifact(write(tmp_path, {**good, "model.safetensors": data + b"x"}))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(tmp_path, good, name):
    with pytest.raises(ArtifactError, match=f"has no {name}"):
        read_artifact(write(tmp_path, {k: v for k, v in good.items() if k != name}))


def test_not_an_artifact(tmp_path, good):
    with pytest.raises(ArtifactError, match="not a directory"):
        read_artifact(tmp_path / "nowhere")
    for config in (b"", b"[]", b"\xff", b"{"):
        with pytest.raises(ArtifactError, match=r"config\.json is damaged"):
            read_artifact(write(tmp_path, {**good, "config.json": config}))
    with pytest.raises(ArtifactError, match="not a pennyweight artifact"):
        read_artifact(write(tmp_path, {**good, "config.json": b'{"model_type":"bert"}'}))
    write(tmp_path, good)
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="ordinary checkpoint"):
        read_artifact(tmp_path)


def test_newer_versions(tmp_path, good):
    message = r"newer pennyweight \(version 2, this one reads up to 1\): upgrade"
    config = good["config.json"].replace(b'"version":1', b'"version":2')
    with pytest.raises(ArtifactError, match=message):
        read_artifact(write(tmp_path, {**good, "config.json": config}))
    weights = good["model.safetensors"].replace(b'"pennyweight":"1"', b'"pennyweight":"2"')
    with pytest.raises(ArtifactError, match=message):
        read_artifact(write(tmp_path, {**good, "model.safetensors": weights}))


def test_a_right_checksum_around_a_damaged_bundle(tmp_path, good):
    layer = nn.Linear(3, 2)
    for bundle in (b"", b"junk", zlib.compress(b"\xff\xff\xff\xff"), zlib.compress(b"\x02\x00\x00\x00{}")):
        data = artifact_module.weights_file({"weight": Dense16.encode(layer.weight.detach()).to_bytes(), REST: bundle})
        with pytest.raises(ArtifactError, match=r"pennyweight\.rest is damaged"):
            read_artifact(write(tmp_path, {**good, "model.safetensors": data}))


class Small(nn.Module):
    def __init__(self, features=4, extra=False, bias=True, kernel=3):
        super().__init__()
        self.conv = nn.Conv1d(2, features, kernel, bias=bias)
        self.norm = nn.LayerNorm(features)
        if extra:
            self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("saved", "offered", "message"),
    [
        ({}, {"extra": True}, r"has extra\.weight, which the artifact lacks; pass the model"),
        ({"extra": True}, {}, r"holds extra\.\w+, which this Small lacks; pass the model"),
        ({}, {"features": 5}, r"conv\.weight is stored as a matrix \[4, 6\], the model's is \[5, 6\]"),
        ({}, {"kernel": 5}, r"conv\.weight is stored as a matrix \[4, 6\], the model's is \[4, 10\]"),
        ({}, {"bias": False}, r"holds conv\.bias, which this Small lacks"),
    ],
)
def test_models_that_do_not_fit(tmp_path, saved, offered, message):
    model = Small(**saved)
    save(install(model, pack(model)), tmp_path / "out")
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path / "out", Small(**offered))


def test_folded_layer_missing(tmp_path):
    save(packed_zoo(fold=True), tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"does not fit this Small: .*conv2d"):
        load(tmp_path / "out", Small())


def test_no_model_given(tmp_path):
    save(packed_zoo(), tmp_path / "out")
    with pytest.raises(ArtifactError, match="pass model="):
        load(tmp_path / "out")
    for reference, message in [("zoo", "module:factory"), ("no_such:zoo", "no_such"), ("json:nothing", "nothing")]:
        with pytest.raises(ArtifactError, match=message):
            load(tmp_path / "out", reference)


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "pytorch_model.bin", "weights"])
def test_pickles_are_refused(tmp_path, name, legacy):
    path = tmp_path / name
    torch.save({"weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ArtifactError, match=r"is a pickle, .*can run any code.*save_file"):
        load_checkpoint(path)
    if name != "weights":
        with pytest.raises(ArtifactError, match="is a pickle"):
            load_checkpoint(tmp_path)
        (tmp_path / "config.json").write_text('{"quantization_config":{"quant_method":"pennyweight","version":1}}')
        with pytest.raises(ArtifactError, match="is a pickle"):
            load(tmp_path, make_zoo)
    with pytest.raises(ArtifactError, match="is a pickle"):
        load(path, make_zoo)


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path):
    """Header lengths 0x0280 + 8k begin with the bytes of a pickle of protocol 2."""
    for pad in range(0, 800, 8):
        save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"pad": "x" * pad})
        if (tmp_path / "a.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        raise AssertionError("no such header found")
    assert load_checkpoint(tmp_path / "a.safetensors")["x"].item() == 1


def test_checkpoints(tmp_path):
    first, second = {"a": torch.randn(3)}, {"b": torch.arange(4)}
    save_file(first, tmp_path / "one.safetensors")
    assert torch.equal(load_checkpoint(tmp_path)["a"], first["a"])
    save_file(second, tmp_path / "two.safetensors")
    with pytest.raises(ArtifactError, match=r"holds no model\.safetensors"):
        load_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert load_checkpoint(tmp_path).keys() == {"a", "b"}
    index.write_text("{}")
    with pytest.raises(ArtifactError, match=r"index\.json is damaged"):
        load_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ArtifactError, match="gone"):
        load_checkpoint(tmp_path)
    (tmp_path / "one.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        load_checkpoint(tmp_path / "one.safetensors")
    with pytest.raises(ArtifactError, match="does not exist"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_an_artifact_is_no_checkpoint(tmp_path):
    save(packed_zoo(), tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"open it with pennyweight\.load"):
        load_checkpoint(tmp_path / "out")
