"""How good the CIFAR-10 ResNet-20 is at a size, and with 4-bit weights and 8- or 4-bit activations.

    python benchmarks/quality_cifar.py                                   # all rows: about 15 minutes on 2 cores
    python benchmarks/quality_cifar.py --rows "141 kB" W4A8 --samples 64      # a quick look

Every row is a process of its own: compress, save, load the files, classify the 10,000 test images (fp32: 91.73 %). No
labels are used: 1,024 training images calibrate; recovery, where it is asked for, also distils on training images. W4A8
and W4A4 go through `adaquant` (batch norms folded, then weights, biases and ranges fitted layer by layer and, if
--distil is not 0, together), the input image at 8 bits. The exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import cifar
import common
import data
import pennyweight as pw
from common import Result, Row, Table, verdict
from pennyweight.artifact import round_to_stored
from pennyweight.compress.adaquant_model import adaquant
from pennyweight.compress.folding import fold_batch_norm
from pennyweight.layers.packed import install
from pennyweight.progress import progress_bars

FP32 = 91.73
#: Steps of recovery, and of AdaQuant's distillation.
RECOVERY_STEPS, DISTIL_STEPS = 1500, 500


@dataclass(frozen=True)
class Case:
    """A row: bytes to reach (with recovery or without), or bits of weights and activations. reach: accuracy, %."""

    name: str
    reach: float
    budget: int | None = None
    recovered: bool = False
    bits: tuple[int, int] = (0, 0)


CASES = (
    Case("141 kB", 91.4, budget=141_000),
    Case("108 kB", 90.0, budget=108_000),
    Case("80 kB, recovered", 87.0, budget=80_000, recovered=True),
    Case("W4A8", FP32 - 0.3, bits=(4, 8)),
    Case("W4A4", FP32 - 1.0, bits=(4, 4)),
)


@dataclass(frozen=True)
class Effort:
    """samples: training images to calibrate on; recovery_samples: to recover on. The others are steps."""

    samples: int
    recovery_samples: int
    recovery_steps: int
    distil_steps: int


def load_resnet() -> nn.Module:
    """The network as its authors published it, batch norms and all."""
    return data.sets().resnet_cifar(20)


def measure(case: Case, effort: Effort, threads: int) -> Row:
    common.start(threads)
    model = load_resnet()
    batches = cifar.batches(effort.samples)
    watch = common.Stopwatch()
    if case.budget is not None:
        small = _shrunk(model, case, batches, effort)
    else:
        small = _quantised(model, case, batches, effort)
    row: Row = {**watch.read(), "peak_memory": common.peak_memory()}
    loaded, row["bytes"] = common.save_and_load(small, load_resnet)
    return row | _accuracy(loaded)


def measure_reference(threads: int) -> Row:
    """The fp32 network."""
    common.start(threads)
    model = load_resnet()
    return {"bytes": 4 * sum(p.numel() for p in model.parameters())} | _accuracy(model)


def _shrunk(model: nn.Module, case: Case, batches: list[dict[str, torch.Tensor]], effort: Effort) -> nn.Module:
    more: dict[str, Any] = {}
    if case.recovered:
        more = {"recover": effort.recovery_steps, "recover_data": cifar.batches(effort.recovery_samples)}
    with progress_bars() as progress:
        return pw.shrink(model, size=case.budget, data=batches, progress=progress, **more)


def _quantised(model: nn.Module, case: Case, batches: list[dict[str, torch.Tensor]], effort: Effort) -> nn.Module:
    fold_batch_norm(model, batches[0])
    weight_bits, activation_bits = case.bits
    made = adaquant(model, batches, weight_bits, activation_bits, distil_steps=effort.distil_steps)
    small = install(made.model, made.packed)
    round_to_stored(small)
    return small


def _accuracy(model: nn.Module) -> dict[str, float]:
    found = cifar.evaluate(cifar.predict_with(model))
    return {"accuracy": found["dev"], "cosine": found["cosine"]}


def table(reference: Row, found: dict[Case, Row]) -> Table:
    cells = {"fp32": [f"{reference['bytes']:,}", "", f"{reference['accuracy']:.2f}", "", "", "", "", "", ""]}
    for case, row in found.items():
        cells[case.name] = [
            f"{row['bytes']:,}",
            f"{case.reach:.2f}",
            f"{row['accuracy']:.2f}",
            verdict(is_met(case, row)),
            f"{reference['accuracy'] - row['accuracy']:.2f}",
            f"{row['cosine']:.4f}",
            f"{row['seconds']:.0f}",
            f"{row['processor_seconds']:.0f}",
            f"{row['peak_memory'] / 1e6:.0f}",
        ]
    columns = (
        "model",
        "bytes",
        "reach",
        "accuracy",
        "met",
        "lost",
        "cosine",
        "seconds",
        "processor s",
        "peak memory, MB",
    )
    return Table("Accuracy on the 10,000 test images, %; cosine of the logits to the original's", columns, cells)


def is_met(case: Case, row: Row) -> bool:
    """Exact to one image in ten thousand, against rounding of the target."""
    fits = case.budget is None or row["bytes"] <= case.budget
    return fits and row["accuracy"] >= case.reach - 1e-6


def arguments() -> argparse.Namespace:
    parser = common.flags(__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, help="which rows (default: all)")
    parser.add_argument("--samples", type=int, default=1024, metavar="N", help="images to calibrate on")
    parser.add_argument("--recover-samples", type=int, default=10_000, metavar="N", help="images to recover on")
    parser.add_argument("--recover", type=int, default=RECOVERY_STEPS, metavar="STEPS", help="steps of recovery")
    parser.add_argument("--distil", type=int, default=DISTIL_STEPS, metavar="STEPS", help="steps of W4A8 and W4A4")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    effort = Effort(args.samples, args.recover_samples, args.recover, args.distil)
    kept = common.Kept("quality-cifar", args.resume)
    reference = kept.row("fp32", lambda: common.in_fresh_process(measure_reference, args.threads))
    found = {
        case: kept.row(
            f"{case.name}; {effort}", lambda case=case: common.in_fresh_process(measure, case, effort, args.threads)
        )
        for case in CASES
        if case.name in args.rows
    }
    met = [is_met(case, row) for case, row in found.items()]
    result = Result(
        title="Quality of the CIFAR-10 ResNet-20 by size and by bits",
        claim="without labels, files counted whole: accuracy as in the column `reach`",
        data=f"{args.samples} training images without labels ({args.recover_samples} where recovered), all test images",
        tables=[table(reference, found)],
        conclusions=[
            f"Targets met: {sum(met)} of {len(met)}.",
            *(
                f"{case.name}: {row['accuracy']:.2f} %, {row['accuracy'] - case.reach:+.2f} against {case.reach:.2f}."
                for case, row in found.items()
            ),
        ],
        values={"fp32": reference, **{case.name: row for case, row in found.items()}},
        ok=all(met),
    )
    return common.finish("quality-cifar", result, args)


if __name__ == "__main__":
    sys.exit(main())
