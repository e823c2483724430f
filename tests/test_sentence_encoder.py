"""Sentence encoders: pooling by hand, order of texts, the layout of sentence-transformers, damaged files."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import pennyweight as pw  # noqa: E402
from pennyweight.compress.data import Call  # noqa: E402
from pennyweight.errors import ArtifactError, DataError, PennyweightWarning  # noqa: E402
from pennyweight.models.english_text import calibration_text, held_out_text  # noqa: E402
from pennyweight.models.sentence_encoder import SentenceEncoder, copy_side_files, is_sentence_encoder  # noqa: E402

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "house", "red", "blue", "big", "small", "and"]
TEXTS = ["the cat sat", "a dog ran under the big red house and sat on the mat", "cat", "blue mat on the house"]


def make_encoder_directory(path, pooling=None, **config):
    """A tiny BERT in the layout, with random weights."""
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    settings = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertModel(
        transformers.BertConfig(vocab_size=20, max_position_embeddings=64, **settings, **config)
    )
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    stages = ["Transformer", "Pooling", "Normalize"]
    (path / "modules.json").write_text(
        json.dumps(
            [
                {
                    "idx": i,
                    "name": str(i),
                    "path": f"{i}_{kind}" if i else "",
                    "type": f"sentence_transformers.models.{kind}",
                }
                for i, kind in enumerate(stages)
            ]
        )
    )
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_encoder_directory(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="module")
def encoder(directory):
    return SentenceEncoder.load(directory)


def with_pooling(encoder, *poolings):
    return SentenceEncoder(encoder.model, encoder.tokenizer, poolings, encoder.max_length, encoder.directory)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("mean", [4.0, 0.0]), ("cls", [2.0, 0.0]), ("max", [6.0, 0.0])],
)
def test_pooling_leaves_padding_out(encoder, pooling, expected):
    hidden = torch.tensor([[[2.0, 0.0], [6.0, 0.0], [99.0, 99.0]]])
    call = Call((), {"attention_mask": torch.tensor([[1, 1, 0]])})
    pooled = with_pooling(encoder, pooling)._pool(hidden * torch.tensor([1.0, 1.0]), call.kwargs["attention_mask"])
    assert torch.allclose(pooled, nn.functional.normalize(torch.tensor([expected]), dim=-1))


def test_mean_of_two_tokens_by_hand(encoder):
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [50.0, 50.0]]])
    pooled = encoder._pool(hidden, torch.tensor([[1, 1, 0]]))
    assert torch.allclose(pooled, torch.tensor([[0.6, 0.8]]))


def test_cls_finds_the_first_token_behind_left_padding(encoder):
    hidden = torch.tensor([[[9.0, 9.0], [0.0, 5.0], [1.0, 1.0]]])
    assert torch.equal(
        with_pooling(encoder, "cls")._pool(hidden, torch.tensor([[0, 1, 1]])), torch.tensor([[0.0, 1.0]])
    )


def test_several_poolings_are_concatenated(encoder):
    hidden = torch.tensor([[[3.0], [1.0]]])
    pooled = with_pooling(encoder, "cls", "mean")._pool(hidden, torch.tensor([[1, 1]]))
    assert torch.allclose(pooled, nn.functional.normalize(torch.tensor([[3.0, 2.0]]), dim=-1))


def test_encode_keeps_the_order_of_the_texts_whatever_the_batches(encoder):
    together = encoder.encode(TEXTS, batch_size=3)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    assert together.shape == (4, 24)
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=-1), torch.ones(4), atol=1e-6)


def test_embeddings_are_the_mean_of_the_models_tokens(encoder):
    tokens = encoder.tokenizer("the cat sat", return_tensors="pt")
    with torch.no_grad():
        expected = encoder.model(**tokens).last_hidden_state.mean(1)
    assert torch.allclose(encoder.encode(["the cat sat"]), nn.functional.normalize(expected, dim=-1), atol=1e-6)


def test_texts_are_cut_to_the_encoders_length(encoder):
    assert encoder.tokenize([TEXTS[1]])["input_ids"].shape == (1, 12)
    assert encoder.tokenize([TEXTS[1]], max_length=5)["input_ids"].shape == (1, 5)
    assert encoder.tokenize([TEXTS[1]], max_length=500)["input_ids"].shape == (1, 12)


def test_batches_hold_every_text_once_sorted_by_length(encoder):
    batches = encoder.batches(TEXTS, batch_size=2)
    assert [b["attention_mask"].sum(1).tolist() for b in batches] == [[3, 5], [7, 12]]


def test_no_text_is_refused(encoder):
    with pytest.raises(DataError, match="at least one"):
        encoder.encode([])


def test_packed_encoder_loads_again_as_an_encoder(tmp_path, encoder, directory):
    with pytest.warns(PennyweightWarning, match=r"pooler\.dense\.weight"):
        small = pw.shrink(
            encoder.model, bits=9, data=encoder.batches(TEXTS), output=encoder.output, methods=["entropy-gptq"]
        )
    pw.save(small, tmp_path / "out")
    encoder.copy_files(tmp_path / "out")
    again = SentenceEncoder.load(tmp_path / "out")
    assert torch.equal(again.encode(TEXTS), encoder.with_model(small).encode(TEXTS))
    assert (again.encode(TEXTS) * encoder.encode(TEXTS)).sum(-1).min() > 0.95
    assert (again.max_length, again.poolings) == (12, ("mean",))


def test_copied_files_are_those_of_text_and_layout_only(tmp_path, directory):
    (directory / "pytorch_model.bin").write_bytes(b"x")
    (directory / "README.md").write_text("x")
    copy_side_files(directory, tmp_path / "out")
    copied = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json"} <= copied
    assert not copied & {"config.json", "model.safetensors", "pytorch_model.bin", "README.md"}


def test_pooling_named_by_a_word(tmp_path):
    path = make_encoder_directory(tmp_path / "e", pooling={"pooling_mode": "cls"})
    assert is_sentence_encoder(path)
    assert SentenceEncoder.load(path).poolings == ("cls",)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", '{"pooling_mode_weightedmean_tokens": true}', "pools by pooling_mode_weightedmean"),
        ("1_Pooling/config.json", "{", "is damaged"),
        ("1_Pooling/config.json", None, "is missing"),
        ("modules.json", '[{"type": "sentence_transformers.models.Transformer"}]', "no pooling stage"),
        ("modules.json", '[{"type": "x.Dense", "path": "2_Dense"}]', "the stage Dense"),
        ("modules.json", '[{"type": "x.Pooling", "path": "../elsewhere"}]', "outside the directory"),
        ("model.safetensors", None, "no safetensors"),
        ("config.json", None, "no config.json"),
    ],
)
def test_what_is_wrong_with_a_directory_is_said(tmp_path, file, content, message):
    path = make_encoder_directory(tmp_path / "e")
    if content is None:
        (path / file).unlink()
    else:
        (path / file).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        SentenceEncoder.load(path)


def test_only_a_pickle_is_refused_with_the_reason(tmp_path):
    path = make_encoder_directory(tmp_path / "e")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"pytorch_model\.bin is a pickle"):
        SentenceEncoder.load(path)


def test_built_in_text_is_prose_and_held_out_text_is_not_in_it():
    calibration, held_out = calibration_text(), held_out_text()
    assert len(calibration) > 1000 and len(held_out) > 250
    assert not set(calibration) & set(held_out)
    assert calibration_text(7) == calibration[:7]
    assert all(5 <= len(s.split()) <= 60 for s in calibration)
