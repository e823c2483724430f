"""The promise: a file never exceeds its budget, and uses at least 99 % of it, or the model is lossless before.

    python benchmarks/promise.py                               # 40 budgets on each of three models: about 40 minutes
    python benchmarks/promise.py --models lstm --budgets 5     # a few minutes

Budgets are spread log-uniformly from the smallest reachable size to that of plain fp16, on all-MiniLM-L6-v2, the
CIFAR-10 ResNet-20 and a small LSTM. Each one is really spent: the model is shrunk and saved, and the bytes of
model.safetensors and config.json are those on the disk. "Lossless" means that every weight is kept in fp16, whose file
may be smaller than two bytes a weight because its bytes are entropy-coded. What each layer could become is worked out
once a model; each budget has a plan of its own, carried out by `pw.shrink(plan=...)`. Layers are calibrated on the
original's inputs unless --sequential is given, which takes longer. The exit code is 1 if the promise was broken once.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

import char_lstm
import cifar
import common
import data
import pennyweight as pw
import sts
from common import Result, Row, Table, verdict
from pennyweight.bundle import predict_bytes
from pennyweight.compress import shrink as machinery
from pennyweight.errors import BudgetError, PennyweightWarning
from pennyweight.layers.sites import weight_sites
from pennyweight.progress import progress_bars

LEAST_USE = 0.99


@dataclass(frozen=True)
class Subject:
    """load: the fp32 model. batches: calibration data of so many samples."""

    name: str
    load: Callable[[], nn.Module]
    batches: Callable[[int], list[Any]]


SUBJECTS = {
    "minilm": Subject(
        "all-MiniLM-L6-v2",
        sts.load_encoder,
        lambda n: sts.batches(sorted(data.calibration_sentences(n), key=len)),
    ),
    "resnet20": Subject("CIFAR-10 ResNet-20", lambda: data.sets().resnet_cifar(20), cifar.batches),
    "lstm": Subject("character LSTM", char_lstm.load_lstm, char_lstm.batches),
}


def half_precision_bytes(model: nn.Module) -> int:
    """The size of the model's files with every weight in plain fp16."""
    return predict_bytes(model, {site.name: 2 * site.parameter.numel() for site in weight_sites(model)})


def spread(smallest: int, largest: int, count: int) -> list[int]:
    """`count` sizes from smallest to largest, evenly spaced in their logarithms."""
    step = math.log(largest / smallest) / max(count - 1, 1)
    return [min(math.ceil(smallest * math.exp(i * step)), largest) for i in range(count)]


def plans(model: nn.Module, batches: list[Any], count: int) -> list[pw.Plan]:
    """A plan for each of the budgets."""
    with progress_bars() as progress:
        job = machinery._prepare(model, batches)
        observation = machinery._observe(job, "output", None, machinery.output_tensor, 0, progress)
        offers = machinery._offers(job, observation, machinery._methods(None, "balanced", job), progress)
    least = {name: min(offer.nbytes for offer in found) for name, found in offers.items()}
    budgets = spread(job.overhead(least) + sum(least.values()), half_precision_bytes(job.reference), count)
    return [machinery._allocate(job, observation, offers, budget, "hull", 0) for budget in budgets]


def measure(model: nn.Module, plan: pw.Plan, batches: list[Any], sequential: bool) -> Row:
    """Carry out a plan, save, and look at the files. A refusal breaks the promise, too: the budget is reachable."""
    assert plan.budget is not None
    row: Row = {"budget": plan.budget, "bytes": None, "lossless": False, "kept": False, "note": ""}
    watch = common.Stopwatch()
    try:
        small = pw.shrink(model, plan=plan, data=batches, sequential=sequential)
    except BudgetError as error:
        return row | {"note": str(error), **watch.read()}
    with tempfile.TemporaryDirectory() as folder:
        row["bytes"] = common.save_and_measure(small, folder)
    found: Any = small._pennyweight
    choices = found.plan.choices.values()
    row["lossless"] = all(choice.method == "dense" and choice.split is None for choice in choices)
    row["kept"] = row["bytes"] <= plan.budget and (row["bytes"] >= LEAST_USE * plan.budget or row["lossless"])
    return row | watch.read()


def rows_of(subject: Subject, args: argparse.Namespace, kept: common.Kept) -> list[Row]:
    common.start(args.threads)
    model, batches = subject.load(), subject.batches(args.samples)
    order = "sequential" if args.sequential else "parallel"
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PennyweightWarning)  # they are about quality; this is about bytes
        for plan in plans(model, batches, args.budgets):
            key = f"{subject.name}, {args.samples} samples, {order}, {plan.budget:,} bytes"
            found.append(kept.row(key, lambda plan=plan: measure(model, plan, batches, args.sequential)))
    return found


def conclusion(name: str, rows: list[Row]) -> str:
    """One line that says how often the promise held and how close it was."""
    spent = [row["bytes"] / row["budget"] for row in rows if row["bytes"] and not row["lossless"]]
    line = f"{name}: kept for {sum(row['kept'] for row in rows)} of {len(rows)} budgets"
    if spent:
        line += f"; budgets used {100 * min(spent):.3f} % at least and {100 * max(spent):.3f} % at most"
    return line + f"; lossless for {sum(row['lossless'] for row in rows)}."


def table(name: str, rows: list[Row]) -> Table:
    cells = {
        f"{row['budget']:,}": [
            f"{row['bytes']:,}" if row["bytes"] else "refused",
            f"{100 * row['bytes'] / row['budget']:.3f}" if row["bytes"] else "",
            "yes" if row["lossless"] else "",
            verdict(row["kept"]),
        ]
        for row in rows
    }
    return Table(name, ("budget, bytes", "files, bytes", "used, %", "lossless", "kept"), cells)


def arguments() -> argparse.Namespace:
    parser = common.flags(__doc__)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--budgets", type=int, default=40, metavar="N", help="budgets a model (default: 40)")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="calibration samples (default: 64)")
    parser.add_argument("--sequential", action="store_true", help="calibrate each layer on what the packed ones give")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    kept = common.Kept("promise", args.resume)
    found = {SUBJECTS[name].name: rows_of(SUBJECTS[name], args, kept) for name in args.models}
    result = Result(
        title="The promise: files fit their budget and use it",
        claim="files never exceed the budget and use at least 99 % of it, unless the model is lossless before",
        data=f"{args.budgets} budgets a model from the smallest reachable to fp16; {args.samples} calibration samples",
        tables=[table(name, rows) for name, rows in found.items()],
        conclusions=[
            *(conclusion(name, rows) for name, rows in found.items()),
            *(f"{name}: {row['note']}" for name, rows in found.items() for row in rows if row["note"]),
        ],
        values=found,
        ok=all(row["kept"] for rows in found.values() for row in rows),
    )
    return common.finish("promise", result, args)


if __name__ == "__main__":
    sys.exit(main())
