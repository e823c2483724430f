"""docs/regularisers.md, "Which regulariser, when": advice beside what the measured pages say.

    python -m pennyweight.bench.experiments.regularisers        (a second; reads docs/results)

The advice is ours and stands here. What runs showed is taken word for word from the pages that the experiments wrote:
the lines of "What the numbers say" that begin as `Entry.lines` has it. A page that no longer has such a line is an
error, so that the advice is looked at again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import ArtifactError
from .command_line import REPOSITORY

COMMAND = "python -m pennyweight.bench.experiments.regularisers"
HEADING = "## What the numbers say"


@dataclass(frozen=True)
class Entry:
    """One row. want: what the user wants. reach_for: what to use. how: how to ask for it. page: of docs/results. lines:
    how the lines of the page begin that are quoted, in this order."""

    want: str
    reach_for: str
    how: str
    page: str
    lines: tuple[str, ...]


ENTRIES = (
    Entry(
        "exact zeros while training",
        "pWD with p below 1",
        "[recipes/pwd.yaml](../recipes/pwd.yaml), `PAdamW(..., p=0.6)`",
        "pwd.md",
        (
            "images, at least 90 % zeros",
            "images, most zeros within",
            "photographs, at least 90 % zeros",
            "photographs, most zeros within",
            "characters, at least 80 % zeros",
        ),
    ),
    Entry(
        "no zeros, only generalisation",
        "decoupled decay, p = 2 (AdamW)",
        "`optimizer: {name: adamw, weight_decay: ...}`",
        "pwd.md",
        (
            "images: without asking for zeros",
            "photographs: without asking for zeros",
            "characters: without asking for zeros",
        ),
    ),
    Entry(
        "a small file out of training",
        "pWD with p = 0.5, then `shrink` in the recipe",
        "[recipes/sparse-training.yaml](../recipes/sparse-training.yaml)",
        "sparse-training.md",
        ("Half precision", "Shrunk to", "Most zeros on average"),
    ),
    Entry(
        "large batches with Adam",
        "LAWN-Adam; around AdamW where embeddings want decay",
        "[recipes/lawn.yaml](../recipes/lawn.yaml), `LAWN(optimizer, model)`",
        "lawn.md",
        (
            "images, batch 2048: LAWN-Adam against AdamW",
            "images, batch 2048: LAWN-SGD against SGD + decay",
            "ratings, batch 2048: LAWN-Adam against AdamW",
            "ratings, batch 2048: LAWN-AdamW against AdamW",
        ),
    ),
    Entry(
        "weights spread out, fewer near zero",
        "weight compander; not before pruning",
        "[recipes/weight-compander.yaml](../recipes/weight-compander.yaml)",
        "weight-compander.md",
        ("Test accuracy against decay alone", "The kurtosis", "After pruning 80 %"),
    ),
    Entry(
        "small, noisy tables",
        "PSiLON, with its zeros if it is to be small",
        "[recipes/psilon.yaml](../recipes/psilon.yaml)",
        "psilon.md",
        ("Friedman: PSiLON against", "Friedman: PSiLON, zeros against"),
    ),
    Entry(
        "batches of one to four",
        "weight standardisation with group norm or batch-channel normalisation",
        "[recipes/batch-channel-norm.yaml](../recipes/batch-channel-norm.yaml), "
        "[recipes/weight-standardization.yaml](../recipes/weight-standardization.yaml)",
        "weight-standardization.md",
        (
            "Batch 1, GN + WS against GN",
            "Batch 1, BCN + WS against GN + WS",
            "Batch 2, BCN + WS against GN:",
            "Batch 4, BCN + WS against GN:",
            "BN at 1 against",
            "GN + WS at 1 against",
        ),
    ),
    Entry(
        "batch norm's accuracy for less memory and time",
        "MimicNorm",
        "[recipes/mimicnorm.yaml](../recipes/mimicnorm.yaml)",
        "mimicnorm.md",
        ("MimicNorm against batch norm", "Kept for the backward", "A training step"),
    ),
    Entry(
        "depth without norms",
        "residual scaling by 1/sqrt(n)",
        "[recipes/residual-depth.yaml](../recipes/residual-depth.yaml)",
        "residual-depth.md",
        ("no scaling", "200 layers, 1/sqrt(n) against batch norm", "200 layers, 1/sqrt(n) against SkipInit"),
    ),
    Entry(
        "a teacher whose batches are skewed",
        "EMAN",
        "[recipes/eman.yaml](../recipes/eman.yaml), `EMATeacher`",
        "eman.md",
        (
            "Three classes a batch, the teacher's classes in training, EMAN against own batch",
            "Three classes a batch, student, EMAN against own batch",
            "All classes, student, EMAN against own batch",
        ),
    ),
    Entry(
        "robustness against small changes of the input",
        "A-FAN, at some clean accuracy and twice the cost",
        "[recipes/a-fan.yaml](../recipes/a-fan.yaml)",
        "a-fan.md",
        (
            "A-FAN, 0.2, mixed against plain, clean",
            "A-FAN, 0.2, mixed against plain, equal cost, clean",
            "A-FAN, 0.2, mixed against plain, under ten",
        ),
    ),
    Entry(
        "a curve that is smooth here and rough there",
        "trend filtering or wavelets where they apply; the parallel network where a network must do it",
        "[recipes/parallel-nn.yaml](../recipes/parallel-nn.yaml)",
        "parallel-nn.md",
        ("Mean error below smoothing spline", "Mean error below the plain network", "Mean error at most 1.5 times"),
    ),
)


def said(page: Path, beginning: str) -> list[str]:
    """The lines of a measured page that begin so. Raises ArtifactError if there is no page, or no such line."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{page}: {error.strerror}; run its experiment, python -m {__package__}") from error
    lines = [line.removeprefix("- ") for line in text.partition(HEADING)[2].splitlines() if line.startswith("- ")]
    found = [line for line in lines if line.startswith(beginning)]
    if not found:
        raise ArtifactError(f"{page}: no line begins with {beginning!r}; see what it says now, and mend ENTRIES")
    return found


def page(entries: Sequence[Entry], results: Path) -> str:
    """The page as Markdown."""
    rows = []
    for entry in entries:
        found = " <br> ".join(line for start in entry.lines for line in said(results / entry.page, start))
        rows.append(f"| {entry.want} | {entry.reach_for} | {entry.how} | {found} [Page](results/{entry.page}) |")
    return "\n".join(
        [
            "# Which regulariser, when",
            "",
            "The left columns are advice. The right one quotes the measured pages of small experiments, each with "
            "tuned baselines and at least three seeds: what did not show at that size is said, too. Written by "
            f"`{COMMAND}`.",
            "",
            "| you want | reach for | how | what our runs say |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "regularisers.md")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "docs" / "results")
    options = parser.parse_args(arguments)
    options.out.write_text(page(ENTRIES, options.results), encoding="utf-8")


if __name__ == "__main__":
    main()
