"""Data for the benchmarks: the public sets under `PENNYWEIGHT_DATA`, and calibration text.

    PENNYWEIGHT_DATA   folder that holds load.py and the sets; default: ../shared/data beside the repository

Nothing here touches the network. Every function is deterministic: same arguments, same sentences in the same order.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import ModuleType

from pennyweight.errors import DataError
from pennyweight.training.data import data_sets

CALIBRATIONS = ("mixture", "pydoc")
REPOSITORY = Path(__file__).resolve().parent.parent


def sets() -> ModuleType:
    """The data folder's own load.py; ends the benchmark, saying what to do, if the folder is not there."""
    try:
        return data_sets()
    except DataError as error:
        raise SystemExit(str(error)) from None


def calibration_sentences(n: int, source: str = "mixture", seed: int = 0) -> list[str]:
    """`n` distinct English sentences to calibrate on, never from STS-B.

    source: "pydoc", the language reference that every Python ships (no data folder needed), or "mixture", equal parts
        of WikiText-2 (valid), SST-2 (train), CoLA (train) and TinyStories.
    Raises ValueError where the source is unknown or holds fewer than `n`.
    """
    if source == "pydoc":
        sentences = _shuffled(_pydoc(), seed)
    elif source == "mixture":
        parts = [_shuffled(part, seed) for part in (_wikitext(), _sst2("train"), _cola("train"), _tinystories())]
        sentences = list(dict.fromkeys(sentence for row in zip(*parts) for sentence in row))
    else:
        raise ValueError(f"unknown calibration text {source!r}; there are: {', '.join(CALIBRATIONS)}")
    if len(sentences) < n:
        raise ValueError(f"{source} holds {len(sentences)} sentences, {n} were asked for")
    return sentences[:n]


def fidelity_sentences(n: int = 1000) -> list[str]:
    """`n` sentences on which embeddings are compared with the original's: the dev splits of SST-2 and CoLA, which no
    calibration text is drawn from (two of the thousand also stand in the train splits)."""
    return _shuffled([*_sst2("dev"), *_cola("dev")], seed=1)[:n]


def stsb_dev() -> list[tuple[str, str, float]]:
    """The 1,500 pairs of STS-B's dev split, each with its score 0..5."""
    return sets().stsb("dev")


def stsb_unseen() -> list[tuple[str, str, float]]:
    """Every fourth pair of STS-B's train split (1,438), in place of the test split, whose labels are not in the data
    folder. Nothing is calibrated, selected or tuned on it, so for a post-training method it is unseen text."""
    return sets().stsb("train")[::4]


def _shuffled(sentences: list[str], seed: int) -> list[str]:
    sentences = list(dict.fromkeys(sentences))
    random.Random(seed).shuffle(sentences)
    return sentences


def _split(text: str) -> list[str]:
    """Sentences of 5 to 60 words that read as prose."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", re.sub(r"\s+", " ", text))
    return [
        s.strip()
        for s in sentences
        if 5 <= len(s.split()) <= 60 and sum(c.isalpha() or c == " " for c in s) > 0.8 * len(s)
    ]


def _pydoc() -> list[str]:
    from pydoc_data.topics import topics

    paragraphs = [p for name in sorted(topics) for p in topics[name].split("\n\n")]
    return [s for p in paragraphs if not p.startswith("    ") for s in _split(p.replace("*", "").replace("`", ""))]


def _wikitext() -> list[str]:
    lines = [line for line in sets().text("wikitext2/valid").splitlines() if "=" not in line]
    text = "\n".join(lines).replace("<unk>", "it").replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".")
    return [s for line in re.sub(r" ([,.;:!?)'])", r"\1", text).splitlines() for s in _split(line)]


def _tinystories() -> list[str]:
    return [s for story in sets().text("tinystories/sample").split("<|endoftext|>") for s in _split(story)]


def _sst2(split: str) -> list[str]:
    return [sentence for sentence, _ in sets().sst2(split)]


def _cola(split: str) -> list[str]:
    return [sentence for sentence, _ in sets().cola(split)]
