"""The artifact: what is saved comes back in a fresh process, byte for byte the same."""

from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from pennyweight import artifact as artifact_module
from pennyweight.artifact import load, predict_bytes, save
from pennyweight.bundle import REST, pack_rest, stored_dtype, unpack_rest
from pennyweight.compress.folding import fold_batch_norm
from pennyweight.errors import ArtifactError
from pennyweight.formats import Binary
from pennyweight.layers.activation_quantizer import ActivationQuantizer, attach_input_quantizer
from pennyweight.layers.packed import install, packed_blobs
from pennyweight.layers.sites import weight_sites
from zoo import INDEX, Zoo, make_zoo, pack, packed_zoo

HERE = Path(__file__).parent

FRESH = """
import sys, torch
sys.path.insert(0, {tests!r})
import pennyweight.artifact as artifact
for name, memory in {cases!r}:
    torch.manual_seed(99)
    model = artifact.load(name, "zoo:make_zoo", memory=memory, activation_bits=32)
    torch.save(model(torch.tensor({index!r})), name + ".out")
    artifact.save(model, name + ".again")
"""


def test_fresh_process(tmp_path):
    cases = [("plain", False, False, "fast"), ("all", True, True, "low")]
    models = {}
    for name, fold, quantise, _ in cases:
        models[name] = packed_zoo(fold, quantise)
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
    model = packed_zoo()
    save(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["pennyweight"] == "1"
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert stored.keys() == {site.name for site in weight_sites(make_zoo())} | {REST}
    for (name, *_), blob in packed_blobs(model).items():
        assert bytes(stored[name].numpy()) == blob


def test_same_model_same_bytes(tmp_path):
    for name in "ab":
        save(packed_zoo(fold=True, quantise=True), tmp_path / name, plan="plan: 1\n", report={"x": 1})
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


def test_overhead_is_small(tmp_path):
    """A ResNet-20's worth of folded layers: names and structure must not eat a budget of 80 kB."""
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16)) for _ in range(20)])
    fold_batch_norm(model.eval(), torch.randn(1, 16, 48, 48))
    packed = {s.name: Binary.encode(s.matrix(), 0) for s in weight_sites(model)}
    size = save(install(copy.deepcopy(model), packed), tmp_path / "out")
    biases = 20 * 16 * 2
    assert size - sum(w.nbytes for w in packed.values()) - biases < 20 * 85 + 350


def test_given_models(tmp_path):
    model = packed_zoo()
    save(model, tmp_path / "out")
    for given_model in (make_zoo(), make_zoo, Zoo):
        torch.testing.assert_close(load(tmp_path / "out", given_model)(INDEX), model(INDEX), rtol=0, atol=0)
    half = load(tmp_path / "out", make_zoo().bfloat16())
    assert half.embedding(INDEX).dtype == torch.bfloat16


def test_untied_target_and_memory(tmp_path):
    """A model that forgot to tie its weights gets the tied values all the same."""
    model = packed_zoo()
    save(model, tmp_path / "out")
    other = make_zoo()
    other.head.weight = nn.Parameter(torch.zeros(23, 10))
    other.head_again.bias = nn.Parameter(torch.zeros(23))
    loaded = load(tmp_path / "out", other, memory="low", activation_bits=32)
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
        save(packed_zoo(), target, plan="old\n")
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
        save(packed_zoo(fold=True), target, report={})
    monkeypatch.undo()
    assert {f.name: f.read_bytes() for f in target.iterdir()} == before if existing else not target.exists()
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existing else [])


def test_saving_over_an_artifact(tmp_path):
    save(packed_zoo(), tmp_path / "out", plan="old\n", report={"old": 1})
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    save(packed_zoo(fold=True), tmp_path / "out", report={"new": 1})
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
        save(packed_zoo(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
