"""What shrinking costs: seconds and memory for MiniLM to 7 MB, and how work grows with parameters and tokens.

    python benchmarks/cost.py                          # about 8 minutes on 2 cores
    python benchmarks/cost.py --skip-minilm --depths 1 2 --widths 64 128 --tokens 512 1024 --samples 16    # a look

1. all-MiniLM-L6-v2 from 91 to 7 MB in a process of its own, with 2 threads. Goal: less than 120 seconds; at its peak,
   less memory above the baseline (all modules imported, sentences tokenised, the model not yet loaded) than four
   times the model's fp32 weights, which themselves count.
2. Ladders of BERT encoders with random weights and random tokens: deeper, wider, with more calibration tokens.
   Processor seconds of one thread, which a busy machine hardly changes, and the slope of their logarithm against that
   of the parameters or tokens, by least squares. Goal: at most 1.1 for depth and for tokens (1 is linear). Width has no
   goal: a square layer of n inputs has n^2 parameters and a Hessian that takes n^3 steps, so its slope tends to 1.5.
The exit code is 1 if a goal is missed. Seconds are those of this machine; run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import common
import data
import pennyweight as pw
import sts
from common import Result, Row, Table, verdict
from pennyweight.memory import return_freed_memory
from pennyweight.progress import progress_bars

SIZE = "7MB"
GOAL_SECONDS, GOAL_MEMORY, GOAL_SLOPE = 120, 4.0, 1.1
#: The rungs of a ladder are shrunk by this factor: about what MiniLM to 7 MB is.
RATIO = 13
LENGTH = 32  # tokens in a random sentence
WIDTH, DEPTH, VOCABULARY = 384, 2, 1000


def minilm(samples: int, threads: int) -> Row:
    """Shrink MiniLM in this process, which must be a fresh one."""
    common.start(threads)
    return_freed_memory()  # as the command line does
    batches = sts.batches(sorted(data.calibration_sentences(samples), key=len))
    for module in ("transformers.models.bert.modeling_bert", "pennyweight.compress.recover", "constriction"):
        importlib.import_module(module)  # what the work would import on its way
    baseline = common.memory_now()
    model = sts.load_encoder()
    weights = sum(4 * p.numel() for p in model.parameters())
    loaded = common.memory_now()
    peaks: dict[str, int] = {}
    watch = common.Stopwatch()
    with progress_bars() as bars:

        def progress(stage: str, done: int, total: int) -> None:
            peaks[stage] = common.peak_memory()
            bars(stage, done, total)

        pw.shrink(model, size=SIZE, data=batches, progress=progress)
    return {
        **watch.read(),
        "weights": weights,
        "baseline": baseline,
        "loaded": loaded,
        "stages": peaks,
        "peak": common.peak_memory(),
        "multiple": (common.peak_memory() - baseline) / weights,
        "tokens": int(sum(batch["attention_mask"].sum() for batch in batches)),
    }


class Encoder(nn.Module):
    """A BERT with random weights, mean over its tokens. ids int64 [batch, length] -> float32 [batch, width]."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 32,
            intermediate_size=4 * width, max_position_embeddings=LENGTH,
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids).last_hidden_state.mean(1)


def rung(width: int, depth: int, tokens: int) -> Row:
    """Shrink one random encoder with so many calibration tokens."""
    torch.manual_seed(0)
    model = Encoder(width, depth).eval()
    batches = list(torch.randint(VOCABULARY, (max(1, tokens // LENGTH), LENGTH)).split(32))
    parameters = sum(p.numel() for p in model.parameters())
    watch = common.Stopwatch()
    pw.shrink(model, ratio=RATIO, data=batches)
    return {"parameters": parameters, "tokens": sum(batch.numel() for batch in batches), **watch.read()}


def slope(rungs: Sequence[Row], against: str) -> float:
    """Exponent of the power law through the processor seconds, by least squares on logarithms."""
    x = np.log([row[against] for row in rungs])
    y = np.log([row["processor_seconds"] for row in rungs])
    return float(np.polyfit(x, y, 1)[0])


def ladders(args: argparse.Namespace, kept: common.Kept) -> dict[str, tuple[str, list[Row]]]:
    """name -> (what the seconds are set against, rungs)."""
    common.start(1)  # two threads would spend processor time waiting for each other
    tokens = args.samples * LENGTH
    wanted: dict[str, tuple[str, list[tuple[int, int, int]]]] = {
        "depth": ("parameters", [(WIDTH, depth, tokens) for depth in args.depths]),
        "width": ("parameters", [(width, DEPTH, tokens) for width in args.widths]),
        "tokens": ("tokens", [(WIDTH, DEPTH, count) for count in args.tokens]),
    }
    rung(64, 1, 512)  # the first one also pays for what is loaded on first use
    return {
        name: (
            against,
            [kept.row(f"width {w}, depth {d}, {t} tokens", lambda w=w, d=d, t=t: rung(w, d, t)) for w, d, t in steps],
        )
        for name, (against, steps) in wanted.items()
    }


def ladder_table(name: str, against: str, rungs: list[Row]) -> Table:
    scale, word = (1e6, "million") if against == "parameters" else (1e3, "thousand")
    cells = {
        f"{row[against]:,}": [
            f"{row['processor_seconds']:.1f}",
            f"{row['seconds']:.1f}",
            f"{scale * row['processor_seconds'] / row[against]:.2f}",
        ]
        for row in rungs
    }
    columns = (against, "processor seconds", "seconds", f"processor seconds per {word} {against}")
    return Table(f"Ladder: {name}", columns, cells)


def minilm_table(row: Row) -> Table:
    cells = {
        "seconds": [f"{row['seconds']:.0f}", f"< {GOAL_SECONDS}", verdict(row["seconds"] < GOAL_SECONDS)],
        "processor seconds": [f"{row['processor_seconds']:.0f}", "", ""],
        "peak above the baseline, times the weights": [
            f"{row['multiple']:.3f}", f"< {GOAL_MEMORY:g}", verdict(row["multiple"] < GOAL_MEMORY),
        ],
        "weights in fp32, MB": [f"{row['weights'] / 1e6:.0f}", "", ""],
        "baseline, MB": [f"{row['baseline'] / 1e6:.0f}", "", ""],
        "with the model loaded, MB": [f"{row['loaded'] / 1e6:.0f}", "", ""],
        **{f"peak by the end of {stage}, MB": [f"{peak / 1e6:.0f}", "", ""] for stage, peak in row["stages"].items()},
        "peak, MB": [f"{row['peak'] / 1e6:.0f}", "", ""],
        "calibration tokens": [f"{row['tokens']:,}", "", ""],
    }  # fmt: skip
    return Table(f"all-MiniLM-L6-v2 to {SIZE}", ("cost", "measured", "goal", "met"), cells)


def arguments() -> argparse.Namespace:
    parser = common.flags(__doc__)
    parser.add_argument("--skip-minilm", action="store_true", help="ladders only")
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="sentences to calibrate on")
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 2, 4, 8], metavar="LAYERS")
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 256, 384, 512], metavar="FEATURES")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096, 8192, 16384], metavar="N")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    kept = common.Kept("cost", args.resume)
    tables, lines, met = [], [], []
    values: dict[str, Any] = {}
    if not args.skip_minilm:
        key = f"all-MiniLM-L6-v2, {args.samples} sentences, {args.threads} threads"
        row = kept.row(key, lambda: common.in_fresh_process(minilm, args.samples, args.threads))
        values["minilm"] = row
        tables.append(minilm_table(row))
        met += [row["seconds"] < GOAL_SECONDS, row["multiple"] < GOAL_MEMORY]
        lines.append(
            f"MiniLM to {SIZE}: {row['seconds']:.0f} seconds with {args.threads} threads, at its peak "
            f"{row['multiple']:.3f} times the fp32 weights."
        )
    for name, (against, rungs) in ladders(args, kept).items():
        exponent = slope(rungs, against)
        values[name] = {"slope": exponent, "rungs": rungs}
        tables.append(ladder_table(name, against, rungs))
        goal = name != "width"
        met += [exponent <= GOAL_SLOPE] if goal else []
        lines.append(
            f"{name}: processor seconds grow like {against}^{exponent:.2f}"
            + (f" (goal: at most {GOAL_SLOPE})." if goal else ".")
        )
    result = Result(
        title="Cost of shrinking",
        claim=f"MiniLM to {SIZE} in under two minutes on 2 cores and under 4 times its fp32 weights in memory; "
        "work linear in parameters and in calibration tokens",
        data=f"MiniLM: {args.samples} sentences (mixture); ladders: random weights and tokens, to 1/{RATIO} of fp32",
        tables=tables,
        conclusions=lines,
        values=values,
        ok=all(met),
    )
    return common.finish("cost", result, args)


if __name__ == "__main__":
    sys.exit(main())
