"""The artifact: what is saved comes back in a fresh process, byte for byte the same, and nothing damaged gets in."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pennyweight import artifact as artifact_module
from pennyweight.artifact import load, load_checkpoint, predict_bytes, read_artifact, round_to_stored, save
from pennyweight.bundle import REST, pack_rest, stored_dtype, unpack_rest
from pennyweight.compress.norms import fold_batch_norm
from pennyweight.errors import ArtifactError
from pennyweight.formats import Binary, Dense16, Integer
from pennyweight.layers.activation_quantizer import ActivationQuantizer, attach_input_quantizer
from pennyweight.layers.packed import install, packed_blobs
from pennyweight.layers.sites import weight_sites

HERE = Path(__file__).parent


class Zoo(nn.Module):
    """Every kind of layer that can be packed, in odd sizes, tied weights, bare parameters and buffers of all sorts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(23, 10, padding_idx=0)
        self.position = nn.Parameter(torch.randn(7, 10))
        self.bag = nn.EmbeddingBag(23, 10)
        self.conv1d = nn.Conv1d(10, 10, 3, padding=1, groups=5)
        self.conv2d = nn.Conv2d(1, 3, 3, padding=1)
        self.norm2d = nn.BatchNorm2d(3)
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.conv3d = nn.Conv3d(3, 2, 1)
        self.up1d = nn.ConvTranspose1d(10, 10, 3, padding=1, groups=2)
        self.up2d = nn.ConvTranspose2d(2, 1, 3, padding=1)
        self.up3d = nn.ConvTranspose3d(2, 2, 1)
        self.lstm = nn.LSTM(10, 5, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 10, batch_first=True)
        self.rnn = nn.RNN(10, 10, batch_first=True)
        self.cell = nn.GRUCell(10, 10)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 23)
        self.head.weight = self.embedding.weight
        self.head_again = nn.Linear(10, 23)
        self.head_again.bias = self.head.bias
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("big", torch.tensor([2**40, -1]))
        self.register_buffer("scale", torch.tensor(1e-6))
        self.register_buffer("scratch", torch.randn(3), persistent=False)

    def forward(self, index):
        x = self.embedding(index) + self.position[: index.shape[1]] + self.bag(index)[:, None]
        x = self.up1d(self.conv1d(x.mT)).mT
        y = self.depthwise(self.norm2d(self.conv2d(x[:, None])))
        y = self.up3d(self.conv3d(y[:, :, None]))[:, :, 0]
        x = x + self.up2d(y)[:, 0]
        x = x + self.lstm(x)[0] + self.gru(x)[0] + self.rnn(x)[0]
        x = x + self.attention(x, x, x)[0]
        x = self.norm(x + self.cell(x.flatten(0, 1)).view_as(x))
        return self.head(x) + self.head_again(x) * self.scale * self.big[1] * self.mask.sum()


def make_zoo() -> nn.Module:
    torch.manual_seed(5)
    model = Zoo()
    nn.init.uniform_(model.norm2d.running_var, 0.5, 2)
    return model.eval()


INDEX = torch.tensor([[1, 2, 22, 0, 5], [7, 7, 7, 3, 1]])


def pack(model: nn.Module, bits: int = 5):
    return {s.name: Integer.encode(s.matrix(), bits, 0) for s in weight_sites(model)}


def zoo(fold: bool = False, quantise: bool = False) -> nn.Module:
    model = make_zoo()
    if fold:
        assert fold_batch_norm(model, INDEX)
    if quantise:
        attach_input_quantizer(model.conv2d, ActivationQuantizer(8, 4.0, -2.0))
        attach_input_quantizer(model.norm, ActivationQuantizer(6, 8.0, -4.0))  # not a packed layer
    install(model, pack(model))
    round_to_stored(model)
    return model


FRESH = """
import sys, torch
sys.path.insert(0, {tests!r})
import pennyweight.artifact as artifact
for name, memory in {cases!r}:
    torch.manual_seed(99)
    model = artifact.load(name, "test_artifact:make_zoo", memory=memory)
    torch.save(model(torch.tensor({index!r})), name + ".out")
    artifact.save(model, name + ".again")
"""


def test_fresh_process(tmp_path):
    cases = [("plain", False, False, "fast"), ("all", True, True, "low")]
    models = {}
    for name, fold, quantise, _ in cases:
        models[name] = zoo(fold, quantise)
        size = save(models[name], tmp_path / name)
        assert size == sum(f.stat().st_size for f in (tmp_path / name).iterdir())
    given = [(str(tmp_path / name), memory) for name, *_, memory in cases]
    script = FRESH.format(tests=str(HERE), cases=given, index=INDEX.tolist())
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(HERE.parent / "src")}
    )
    for name, model in models.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.out"), model(INDEX), rtol=0, atol=0)
        for file in ("model.safetensors", "config.json"):  # what was loaded and saved again is the same artifact
            assert (tmp_path / name / file).read_bytes() == (tmp_path / f"{name}.again" / file).read_bytes()


def test_every_site_is_in_the_file_under_its_name(tmp_path):
    model = zoo()
    save(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["pennyweight"] == "1"
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert stored.keys() == {site.name for site in weight_sites(make_zoo())} | {REST}
    for (name, *_), blob in packed_blobs(model).items():
        assert bytes(stored[name].numpy()) == blob


def test_same_model_same_bytes(tmp_path):
    for name in "ab":
        save(zoo(fold=True, quantise=True), tmp_path / name, plan="plan: 1\n", report={"x": 1})
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("fold", "quantise"), [(False, False), (True, True)])
def test_predicted_size_is_exact(tmp_path, bits, fold, quantise):
    model = make_zoo()
    if fold:
        fold_batch_norm(model, INDEX)
    if quantise:
        attach_input_quantizer(model.conv2d, ActivationQuantizer(8))
    packed = pack(model, bits)
    del packed["lstm.weight_hh_l0"]  # a weight that stays dense
    config = {"hidden": 3, "name": "größe"}
    predicted = predict_bytes(model, {name: weight.nbytes for name, weight in packed.items()}, config)
    assert predicted == save(install(model, packed), tmp_path / "out", config=config)
    assert predicted == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())


def test_given_models(tmp_path):
    model = zoo()
    save(model, tmp_path / "out")
    for given_model in (make_zoo(), make_zoo, Zoo):
        torch.testing.assert_close(load(tmp_path / "out", given_model)(INDEX), model(INDEX), rtol=0, atol=0)
    half = load(tmp_path / "out", make_zoo().bfloat16())
    assert half.embedding(INDEX).dtype == torch.bfloat16


def test_untied_target_and_memory(tmp_path):
    """A model that forgot to tie its weights gets the tied values all the same."""
    model = zoo()
    save(model, tmp_path / "out")
    other = make_zoo()
    other.head.weight = nn.Parameter(torch.zeros(23, 10))
    other.head_again.bias = nn.Parameter(torch.zeros(23))
    loaded = load(tmp_path / "out", other, memory="low")
    torch.testing.assert_close(loaded(INDEX), model(INDEX), rtol=0, atol=0)
    assert next(iter(packed_blobs(loaded))) == ("embedding.weight", "head.weight")
    assert loaded.gru.weight_hh_l0_decoded.numel() == 0


# ------------------------------------------------------------------------------------------------------- the rest


def rest_of(**tensors: torch.Tensor):
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    return unpack_rest(pack_rest(model))[0]


@given(
    st.lists(
        st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1e-5, 65504.0, 65520.0, float("inf")]),
        max_size=8,
    )
)
@settings(max_examples=200, deadline=None)
def test_floats_keep_eleven_bits(values):
    tensor = torch.tensor(values, dtype=torch.float32)
    back = rest_of(x=tensor)["x"].float()
    finite = tensor.isfinite()
    if finite.any():
        magnitude = tensor[finite].abs()
        bound = torch.maximum(magnitude * 2.0**-11, magnitude.max() * 2.0**-20)
        assert bool(((back[finite] - tensor[finite]).abs() <= bound).all())
    assert torch.equal(back[~finite], tensor[~finite])
    assert torch.equal(back, rest_of(x=back)["x"].float())  # a second round changes nothing


def test_stored_dtypes():
    assert stored_dtype(torch.tensor([0.5, 0.0, -3.0])) == torch.float16
    assert stored_dtype(torch.tensor([1.0, 1e-6])) == torch.float16  # lost beside 1.0
    assert stored_dtype(torch.tensor([1e-6])) == torch.float32
    assert stored_dtype(torch.tensor([1e5])) == torch.float32
    assert stored_dtype(torch.tensor([1e5]).bfloat16()) == torch.bfloat16
    assert stored_dtype(torch.tensor([1.0]).double()) == torch.float16
    assert stored_dtype(torch.tensor([float("nan"), float("inf"), 1.0])) == torch.float16
    assert stored_dtype(torch.empty(0)) == torch.float16


def test_exact_types_come_back():
    tensors = {
        "bool": torch.tensor([[True, False]]),
        "i64": torch.tensor(-(2**62)),
        "i8": torch.arange(-4, 4, dtype=torch.int8),
        "i32": torch.zeros(0, 3, dtype=torch.int32),
        "c64": torch.tensor([1 + 2j]),
        "bf16": torch.tensor([1e30, 3.0]).bfloat16(),
        "f32": torch.tensor([[1e-9], [2e30]]),
        "f8": torch.tensor([1.5, 448.0]).to(torch.float8_e4m3fn),
    }
    back = rest_of(**tensors)
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape, name
        wanted = tensor if name != "f8" else tensor.half()  # every float8 is a float16
        assert back[name].dtype == (wanted.dtype) and torch.equal(back[name], wanted), name


def test_empty_rest(tmp_path):
    layer = nn.Linear(3, 2, bias=False)
    save(install(layer, pack(layer)), tmp_path / "out")
    assert load(tmp_path / "out", nn.Linear(3, 2, bias=False))(torch.ones(1, 3)).shape == (1, 2)


def test_extra_state_is_refused(tmp_path):
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"step": 3}

    with pytest.raises(ArtifactError, match="_extra_state is extra state of type dict"):
        save(Stateful(2, 2), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- atomic writing


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fails", ["write", "fsync", "rename"])
def test_disk_full_leaves_what_was_there(tmp_path, monkeypatch, existing, fails):
    target = tmp_path / "out"
    if existing:
        save(zoo(), target, plan="old\n")
        (target / "tokenizer.json").write_text("{}")
    before = {f.name: f.read_bytes() for f in target.iterdir()} if existing else {}

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "write":
        real_open, calls = open, []

        def failing_open(path, mode="r", **kwargs):
            file = real_open(path, mode, **kwargs)
            if "w" in mode:
                calls.append(path)
                if len(calls) == 2:
                    file.close()
                    full()
            return file

        monkeypatch.setattr("builtins.open", failing_open)
    elif fails == "fsync":
        monkeypatch.setattr(artifact_module.os, "fsync", full)
    elif existing:
        monkeypatch.setattr(artifact_module.os, "replace", full)
    else:
        monkeypatch.setattr(artifact_module.os, "rename", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        save(zoo(fold=True), target, report={})
    monkeypatch.undo()
    assert {f.name: f.read_bytes() for f in target.iterdir()} == before if existing else not target.exists()
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existing else [])


def test_saving_over_an_artifact(tmp_path):
    save(zoo(), tmp_path / "out", plan="old\n", report={"old": 1})
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    save(zoo(fold=True), tmp_path / "out", report={"new": 1})
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "report.json",
        "tokenizer.json",
    }
    assert load(tmp_path / "out", make_zoo)(INDEX).shape == (2, 5, 23)


def test_target_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ArtifactError, match="a file of that name exists"):
        save(zoo(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good") / "out"
    save(zoo(), directory)
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
    save(zoo(fold=True), tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"does not fit this Small: .*conv2d"):
        load(tmp_path / "out", Small())


def test_no_model_given(tmp_path):
    save(zoo(), tmp_path / "out")
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
    save(zoo(), tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"open it with pennyweight\.load"):
        load_checkpoint(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- economy


def test_overhead_is_small(tmp_path):
    """A ResNet-20's worth of folded layers: names and structure must not eat a budget of 80 kB."""
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16)) for _ in range(20)])
    fold_batch_norm(model.eval(), torch.randn(1, 16, 48, 48))
    packed = {s.name: Binary.encode(s.matrix(), 0) for s in weight_sites(model)}
    size = save(install(copy.deepcopy(model), packed), tmp_path / "out")
    biases = 20 * 16 * 2
    assert size - sum(w.nbytes for w in packed.values()) - biases < 20 * 85 + 350
