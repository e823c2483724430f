"""Sentence encoders in the layout of sentence-transformers, without that package.

    encoder = SentenceEncoder.load("all-MiniLM-L6-v2/")
    small = pw.shrink(encoder.model, size="7MB", data=encoder.batches(texts), output=encoder.output)
    pw.save(small, "out/");  encoder.copy_files("out/")            # out/ is a sentence encoder again
    encoder.with_model(small).encode(["hello"])                    # float32 [1, features]

The layout: `modules.json` lists the stages, `1_Pooling/config.json` says how token vectors become one, and
`sentence_bert_config.json` how long a text may be. Embeddings always come out with length 1, whether or not the layout
lists a normalising stage: they are compared by their cosine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compress.data import Call
from ..errors import ArtifactError, DataError
from .pretrained import load_pretrained, load_tokenizer

MODULES = "modules.json"
#: pooling_mode_* flags of 1_Pooling/config.json that are understood -> the short name newer files use.
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
}
_DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class SentenceEncoder:
    """A transformers model, its tokenizer, and how its token vectors become one embedding.

    poolings: "mean", "cls" or "max"; several are concatenated, in this order. max_length: tokens a text is cut to.
    directory: where it was loaded from.
    """

    model: nn.Module
    tokenizer: Any
    poolings: tuple[str, ...]
    max_length: int
    directory: Path

    @classmethod
    def load(cls, directory: str | Path) -> SentenceEncoder:
        """From a directory with modules.json, whose model may be packed. float32, in eval mode.

        Raises ArtifactError if a file is missing or damaged, or names a stage other than transformer, pooling and
        normalisation.
        """
        path = Path(directory)
        pooling_folder = _pooling_folder(path)
        settings = _read_json(path / pooling_folder / "config.json")
        length = _read_json(path / "sentence_bert_config.json", {}).get("max_seq_length")
        tokenizer = load_tokenizer(path)
        longest = min(tokenizer.model_max_length, _DEFAULT_MAX_LENGTH)
        return cls(load_pretrained(path, "AutoModel"), tokenizer, _poolings(settings, path), length or longest, path)

    def with_model(self, model: nn.Module) -> SentenceEncoder:
        """The same encoder around another model, such as the packed one."""
        return replace(self, model=model)

    def tokenize(self, texts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """input_ids, attention_mask and what else the model takes: int64 [texts, longest]."""
        limit = min(max_length or self.max_length, self.max_length)
        return dict(
            self.tokenizer(list(texts), padding="longest", truncation=True, max_length=limit, return_tensors="pt")
        )

    def batches(
        self, texts: Sequence[str], batch_size: int = 8, max_length: int | None = None
    ) -> list[dict[str, Tensor]]:
        """Calibration data: texts of about the same length together, so that little padding is computed.

        Batches are small by default: the activations of one are what calibration needs memory for.
        """
        return [self.tokenize([texts[i] for i in part], max_length) for part in _by_length(texts, batch_size)]

    def output(self, result: Any, call: Call) -> Tensor:
        """The embeddings in what the model returned for `call`, float [batch, features]: pass it as `output=`."""
        hidden = result[0]
        mask = call.kwargs.get("attention_mask")
        return self._pool(hidden, torch.ones(hidden.shape[:2]) if mask is None else mask)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """float32 [texts, features], each row of length 1, in the order of the texts. Raises DataError on none."""
        if not texts:
            raise DataError("there is no text to encode; give at least one sentence")
        parts = _by_length(texts, batch_size)
        found = []
        for part in parts:
            call = Call((), self.tokenize([texts[i] for i in part]))
            found.append(self.output(call(self.model), call).float())
        order = torch.tensor([i for part in parts for i in part])
        return torch.cat(found)[order.argsort()]

    def copy_files(self, target: str | Path) -> None:
        """Copy tokenizer, pooling and layout beside an artifact, so that it loads as a sentence encoder."""
        copy_side_files(self.directory, target)

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        kept = mask.to(hidden)[..., None]  # [batch, tokens, 1]
        pooled = []
        for pooling in self.poolings:
            if pooling == "cls":
                first = mask.to(torch.int64).argmax(1)  # the first that is no padding, wherever the padding lies
                pooled.append(hidden[torch.arange(hidden.shape[0]), first])
            elif pooling == "max":
                pooled.append(hidden.masked_fill(kept == 0, -torch.inf).amax(1))
            else:
                pooled.append((hidden * kept).sum(1) / kept.sum(1).clamp_min(1e-9))
        return F.normalize(torch.cat(pooled, dim=-1), dim=-1)


def is_sentence_encoder(directory: str | Path) -> bool:
    """Whether a directory has the layout."""
    return (Path(directory) / MODULES).is_file()


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copy what a text model needs beside its weights and config.json: tokenizer, pooling, layout.

    Weights, pickles, folders that are no stage, and files that a save writes anew stay behind. Raises ArtifactError
    if a file cannot be written.
    """
    source, target = Path(source), Path(target)
    patterns = ("*token*.json", "*.txt", "merges.*", "vocab.*", "*.model", MODULES, "*sentence*.json")
    files = {f for p in patterns for f in source.glob(p) if f.is_file()} - {source / "config.json"}
    if is_sentence_encoder(source):
        files |= set((source / _pooling_folder(source)).glob("*.json"))
    try:
        for file in sorted(files):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if copy.resolve() != file.resolve():
                shutil.copyfile(file, copy)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {target}: {error.strerror or error}; the tokenizer is missing there"
        ) from error


def _pooling_folder(path: Path) -> str:
    """The folder of the pooling stage. Raises ArtifactError on stages that `SentenceEncoder` does not have."""
    folder = None
    for stage in _read_json(path / MODULES):
        kind = str(stage.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            folder = str(stage.get("path"))
        elif kind not in ("Transformer", "Normalize"):
            raise ArtifactError(f"{path / MODULES} has the stage {kind}; load the model with your own module:factory")
    if folder is None:
        raise ArtifactError(f"{path / MODULES} has no pooling stage; load the model with your own module:factory")
    if not (path / folder).resolve().is_relative_to(path.resolve()):
        raise ArtifactError(f"{path / MODULES} is damaged: {folder!r} lies outside the directory")
    return folder


def _poolings(settings: dict[str, Any], path: Path) -> tuple[str, ...]:
    named = settings.get("pooling_mode")
    if named is not None:
        found = {named} if isinstance(named, str) else set(named)
    else:
        found = {_POOLINGS.get(k, k) for k, v in settings.items() if k.startswith("pooling_mode_") and v is True}
    known = tuple(_POOLINGS.values())
    if not found or not found <= set(known):
        raise ArtifactError(
            f"{path} pools by {', '.join(sorted(found)) or 'nothing'}; {', '.join(known)} are understood: "
            "load the model with your own module:factory"
        )
    return tuple(name for name in known if name in found)


def _by_length(texts: Sequence[str], batch_size: int) -> list[list[int]]:
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _read_json(path: Path, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing; get the whole directory of the sentence encoder") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); get the file again") from error
