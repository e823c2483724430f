"""EMAN against ordinary batch norm in the teacher and averaged weights alone: FixMatch with few labels.

    python -m pennyweight.bench.experiments.eman        (about three minutes on one core)

A student learns from a hundred labelled images of small Fashion-MNIST and, on distorted copies of unlabelled ones, from
what a teacher says of them, where it is sure. The teacher averages the student's weights (layers/eman.py); rows differ
in where its batch norms take their statistics from. Unlabelled batches are drawn from all classes, or each from three
classes at random, as in streams where neighbours resemble each other: there a teacher that normalises by its batch
sees other statistics than its student.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.eman import EMATeacher
from ...training.hooks import attach
from ...training.learning_rate import learning_rate_factor
from ...training.settings import ScheduleSettings
from ..results import Table, write_results
from .command_line import arguments_of
from .kept import kept
from .supervised import fashion_mnist_halved, verdict

COMMAND = "python -m pennyweight.bench.experiments.eman"
LABELS, UNLABELLED, VALIDATION = 100, 20_000, 2_000
BATCH, RATIO, STEPS = 20, 4, 400
MOMENTUM, THRESHOLD, WEIGHT = 0.98, 0.8, 1.0
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
WIDTH, SKEWED_CLASSES = 128, 3
ALONE, OWN, COPIED, EMAN = "labels alone", "own batch", "student's statistics", "EMAN"
#: Row -> options of the teacher; None: there is none.
ROWS: dict[str, dict[str, Any] | None] = {
    ALONE: None,
    OWN: {"buffers": "own", "mode": "train"},
    COPIED: {"buffers": "copy"},
    EMAN: {"buffers": "ema"},
}
REGIMES = ("all classes", "three classes a batch")


class Data(NamedTuple):
    """Images [n, 196], classes [n]; those of the unlabelled draw skewed batches and judge the teacher alone."""

    labelled: tuple[Tensor, Tensor]
    unlabelled: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(seed: int) -> Data:
    """Labels: as many of each class, at random; validation: the last images of the training split."""
    splits = fashion_mnist_halved(UNLABELLED + VALIDATION)
    (x, y), test = (s.batch(torch.arange(len(s))) for s in (splits["train"], splits["test"]))
    order = torch.randperm(UNLABELLED, generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[y[order] == each][: LABELS // 10] for each in range(10)])
    x = x.flatten(1)
    return Data(
        (x[chosen], y[chosen]),
        (x[:UNLABELLED], y[:UNLABELLED]),
        (x[UNLABELLED:], y[UNLABELLED:]),
        (test[0].flatten(1), test[1]),
    )


def student() -> nn.Sequential:
    """[samples, 196] -> logits of 10 classes."""
    return nn.Sequential(
        nn.Linear(196, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )  # fmt: skip


def weak(x: Tensor, draw: torch.Generator) -> Tensor:
    """A little noise."""
    return x + 0.1 * torch.randn(x.shape, generator=draw)


def strong(x: Tensor, draw: torch.Generator) -> Tensor:
    """Much noise, and a square of 5 x 5 pixels wiped out."""
    corner = torch.randint(14 - 4, (2, len(x), 1), generator=draw)
    inside = [(torch.arange(14) >= c) & (torch.arange(14) < c + 5) for c in corner]
    hole = (inside[0][:, :, None] & inside[1][:, None, :]).flatten(1)
    return (x + 0.5 * torch.randn(x.shape, generator=draw)).masked_fill(hole, 0.0)


def unlabelled_rows(regime: str, classes: Tensor, draw: torch.Generator) -> Tensor:
    """Of one step."""
    count = BATCH * RATIO
    if regime == REGIMES[0]:
        return torch.randint(len(classes), (count,), generator=draw)
    present = torch.isin(classes, torch.randperm(10, generator=draw)[:SKEWED_CLASSES]).nonzero()[:, 0]
    return present[torch.randint(len(present), (count,), generator=draw)]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """In percent, in eval mode, which the model keeps."""
    return 100 * float((model.eval()(images).argmax(1) == classes).double().mean())


def train(row: str, regime: str, rate: float, seed: int, data: Data) -> dict[str, float | None]:
    """FixMatch: cross-entropy on labels, and on strong copies wherever the teacher's class of the weak one is sure.

    Accuracies in percent: of the student, of the teacher, and of the teacher's classes over the last half of the steps
    (`pseudo`), all of them, sure or not.
    """
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model, options = student(), ROWS[row]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    teacher = None if options is None else EMATeacher(model.train(), MOMENTUM, **options)
    if teacher is not None:
        attach(optimizer, [teacher])
    right: list[float] = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(step, STEPS, ScheduleSettings())
        rows = torch.randint(LABELS, (BATCH,), generator=draw)
        images, classes = weak(data.labelled[0][rows], draw), data.labelled[1][rows]
        others = unlabelled_rows(regime, data.unlabelled[1], draw)
        if teacher is None:
            loss = F.cross_entropy(model(images), classes)
        else:
            plain = data.unlabelled[0][others]
            sure, guess = teacher(weak(plain, draw)).softmax(1).max(1)
            logits = model(torch.cat([images, strong(plain, draw)]))
            each = F.cross_entropy(logits[BATCH:], guess, reduction="none")
            loss = F.cross_entropy(logits[:BATCH], classes) + WEIGHT * (each * (sure >= THRESHOLD)).mean()
            if step >= STEPS // 2:
                right.append(100 * float((guess == data.unlabelled[1][others]).double().mean()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {
        "validation": accuracy(model, *data.validation),
        "student": accuracy(model, *data.test),
        "teacher": None if teacher is None else accuracy(teacher.model, *data.test),
        "pseudo": fmean(right) if right else None,
    }


Runs = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]


def conclusions(found: Runs) -> list[str]:
    """What the numbers say of the claim: parity on batches of all classes, EMAN ahead on skewed ones."""

    def of(row: str, regime: str, key: str) -> list[float]:
        return [run[key] for run in found[row, regime]]

    lines = []
    for regime in REGIMES:
        for other in (OWN, COPIED, ALONE):
            text = verdict(of(EMAN, regime, "student"), of(other, regime, "student"))
            lines.append(f"{regime.capitalize()}, student, EMAN against {other}: {text}.")
        text = verdict(of(EMAN, regime, "pseudo"), of(OWN, regime, "pseudo"))
        lines.append(f"{regime.capitalize()}, the teacher's classes in training, EMAN against {OWN}: {text}.")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "eman.md", __doc__, arguments, seeds=5)
    data = {seed: load(seed) for seed in options.seeds}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    grid: dict[tuple[str, str], dict[float, float]] = {}

    def run(row: str, regime: str, rate: float, seed: int) -> dict[str, Any]:
        settings = {"row": row, "regime": regime, "rate": rate, "seed": seed, "steps": STEPS, "labels": LABELS}
        made = kept(options.runs, settings, lambda: train(row, regime, rate, seed, data[seed]))
        print(row, regime, rate, seed, made, file=sys.stderr, flush=True)
        return made

    for regime in REGIMES:
        for row in ROWS:
            tried = {rate: run(row, regime, rate, options.seeds[0]) for rate in RATES}
            grid[row, regime] = {rate: one["validation"] for rate, one in tried.items()}
            best = max(tried, key=lambda rate: tried[rate]["validation"])
            found[row, regime] = [tried[best], *(run(row, regime, best, seed) for seed in options.seeds[1:])]
    cells: dict[str, list[Any]] = {
        f"{row}, {regime}": [
            f"{max(grid[row, regime], key=lambda rate: grid[row, regime][rate]):g}",
            *(
                [one[key] for one in runs] if runs[0][key] is not None else ""
                for key in ("student", "teacher", "pseudo")
            ),
        ]
        for (row, regime), runs in found.items()
    }
    edges = [
        f"The learning rate of {row}, {regime}, is at the edge of the grid."
        for (row, regime), tried in grid.items()
        if max(tried, key=lambda rate: tried[rate]) in (RATES[0], RATES[-1])
    ]
    write_results(
        options.out,
        title="EMAN: a teacher with averaged statistics (arXiv 2101.08482)",
        claim="a teacher whose batch norm statistics are averages of the student's, as its weights are, labels better "
        "than one that normalises by its own batch: about seven points with 1 percent of ImageNet's labels.",
        tables=[
            Table(
                "Accuracy in percent: student and teacher on the test images; the teacher's classes of unlabelled "
                "images over the last half of training",
                ["teacher's statistics, unlabelled batches", "learning rate", "student", "teacher", "its classes"],
                cells,
            ),
            Table(
                "Student's accuracy on the validation images in percent at each learning rate, first seed",
                ["teacher's statistics, unlabelled batches", *(f"{rate:g}" for rate in RATES)],
                {f"{row}, {regime}": list(tried.values()) for (row, regime), tried in grid.items()},
            ),
        ],
        command=COMMAND,
        seeds=options.seeds,
        data=f"Fashion-MNIST at 14 x 14 pixels: {LABELS} labelled images, {UNLABELLED:,} unlabelled ones, "
        f"{VALIDATION:,} others for the learning rate, all test images. Network 196-{WIDTH}-{WIDTH}-10 with batch "
        f"norms; {STEPS} steps of {BATCH} labelled and {BATCH * RATIO} unlabelled images, SGD with momentum, cosine; "
        f"teacher's momentum {MOMENTUM:g}, threshold {THRESHOLD:g}, weight {WEIGHT:g}.",
        conclusion_lines=[*conclusions(found), *edges],
    )
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
