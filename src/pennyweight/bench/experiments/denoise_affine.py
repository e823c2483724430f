"""The denoising affine transform at one bit and below against straight-through binarisation: what trains, what breaks.

    python -m pennyweight.bench.experiments.denoise_affine        (about ten minutes on one core)

A small causal transformer learns to predict the next character of Tiny Shakespeare. Weights and inputs of every linear
layer of its blocks are quantised in blocks of 64, embedding and head are real. Every arm trains for the same steps at
every learning rate of one ladder, from the same starts on the same samples; the learning rate of a row is the one with
the lowest mean loss on text held out of the training part.

    STE             sign(x) mean |x|, the mean over what is not pruned; the gradient of the identity
    ridge + STE     the affine ridge regression on 0-1 codes in the forward; the gradient of the identity
    denoised        the same forward, with its own gradient but for the noise of rounding (arXiv 2409.09245)

A run has diverged if its loss is not finite, or, over its last tenth, is above what always predicting by the frequency
of the characters costs: then it has learned nothing. Data: PENNYWEIGHT_DATA, default ../shared/data beside the
repository.
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import DataError
from ...training.prepare import prepare
from ..results import Table, write_results
from .command_line import REPOSITORY

COMMAND = "python -m pennyweight.bench.experiments.denoise_affine"
LADDER = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
STEPS, BATCH, CONTEXT, FEATURES, DEPTH, HEADS, BLOCK = 200, 16, 32, 64, 2, 2, 64
#: Setting -> sparsity of the weights.
SETTINGS: dict[str, str | float | None] = {"1 bit": None, "1 bit, 2:4": "2:4", "1 bit, 75 % gone": 0.75}
STE, RIDGE, DENOISED, REAL = "STE", "ridge + STE", "denoised", "full precision"
#: Arm -> options of the weights' and of the inputs' method.
ARMS: dict[str, Mapping[str, Any]] = {
    STE: {"mode": "linear", "lam": 1e-9, "backward": "straight-through"},
    RIDGE: {"mode": "affine", "backward": "straight-through"},
    DENOISED: {"mode": "affine"},
}
#: What is trained: (arm, setting). The ablation is at one bit only.
ROWS = (
    (REAL, ""),
    *((arm, "1 bit") for arm in ARMS),
    *((arm, setting) for setting in ("1 bit, 2:4", "1 bit, 75 % gone") for arm in (STE, DENOISED)),
)


class Block(nn.Module):
    """x [batch, characters, features] -> the same shape; causal attention, then an MLP, each beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        self.queries_keys_values = nn.Linear(FEATURES, 3 * FEATURES)
        self.output = nn.Linear(FEATURES, FEATURES)
        self.up, self.down = nn.Linear(FEATURES, 4 * FEATURES), nn.Linear(4 * FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.queries_keys_values(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.output(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharacterModel(nn.Module):
    """int64 [batch, characters] -> logits of the next ones, [batch, characters, vocabulary]."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, FEATURES)
        self.positions = nn.Parameter(torch.randn(CONTEXT, FEATURES) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(FEATURES)
        self.head = nn.Linear(FEATURES, vocabulary)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(ids) + self.positions[: ids.shape[1]])))


class Text(NamedTuple):
    """int64 ids of the characters; validation is held out of the training part, test is the end of the text."""

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: int


def load_text() -> Text:
    path = Path(os.environ.get("PENNYWEIGHT_DATA", REPOSITORY.parent / "shared" / "data"))
    path = path / "tinyshakespeare" / "input.txt.gz"
    if not path.is_file():
        raise DataError(f"there is no {path}; set PENNYWEIGHT_DATA to the folder that holds tinyshakespeare")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = file.read()
    place = {character: index for index, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([place[character] for character in text])
    first, second = int(0.8 * len(ids)), int(0.9 * len(ids))
    return Text(ids[:first], ids[first:second], ids[second:], len(place))


def unigram_entropy(ids: Tensor) -> float:
    """Nats a character that the best constant prediction costs."""
    share = ids.bincount().double() / len(ids)
    return -float((share[share > 0] * share[share > 0].log()).sum())


def recipe(arm: str, sparsity: str | float | None) -> dict[str, Any]:
    """Weights of the setting's sparsity, inputs dense, both at one bit."""
    method = {"method": "denoise-affine", "bits": 1, "block": BLOCK, **ARMS[arm]}
    return {"rules": [{"match": "blocks.*", "weight": {**method, "sparsity": sparsity}, "input": method}]}


@torch.no_grad()
def loss_on(model: nn.Module, ids: Tensor, windows: int = 128) -> float:
    """Mean loss in nats a character over windows spread evenly over a text."""
    starts = torch.linspace(0, len(ids) - CONTEXT - 1, windows).long()
    rows = ids[starts[:, None] + torch.arange(CONTEXT + 1)]
    model.eval()
    loss = float(F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()))
    model.train()
    return loss


class Run(NamedTuple):
    """Losses in nats a character. training: mean over the last tenth of the steps. roughness: standard deviation of the
    steps of the loss, over its last half. diverged: see the module."""

    training: float
    roughness: float
    validation: float
    test: float
    diverged: bool


def train(arm: str, setting: str, rate: float, seed: int, text: Text, steps: int = STEPS) -> Run:
    """One training: Adam, warm-up over a twentieth of the steps, cosine to zero, no clipping."""
    torch.manual_seed(seed)
    model = CharacterModel(text.vocabulary)
    if arm != REAL:
        prepare(model, recipe(arm, SETTINGS[setting]))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.99))
    draw = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step in range(steps):
        share = (step + 1) / steps
        optimizer.param_groups[0]["lr"] = rate * min(20 * share, 0.5 + 0.5 * math.cos(math.pi * share))
        starts = torch.randint(len(text.train) - CONTEXT, (BATCH, 1), generator=draw)
        rows = text.train[starts + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return Run(math.inf, math.inf, math.inf, math.inf, True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = fmean(losses[-max(1, steps // 10) :])
    half = losses[len(losses) // 2 :]
    roughness = stdev(after - before for before, after in pairwise(half))
    validation, test = loss_on(model, text.validation), loss_on(model, text.test)
    lost = not math.isfinite(validation) or last > unigram_entropy(text.train)
    return Run(last, roughness, validation if math.isfinite(validation) else math.inf, test, lost)


def cell(values: Sequence[float]) -> str | Sequence[float]:
    """Of a table."""
    return values if all(map(math.isfinite, values)) else "not finite"


Runs = Mapping[tuple[str, str], Mapping[float, Sequence[Run]]]


def best_rate(runs: Mapping[float, Sequence[Run]]) -> float:
    """The learning rate with the lowest mean validation loss over the seeds."""
    return min(runs, key=lambda rate: fmean(run.validation for run in runs[rate]))


def mean_loss(runs: Sequence[Run]) -> float:
    return fmean(run.test for run in runs)


def diverged(runs: Mapping[float, Sequence[Run]]) -> int:
    return sum(run.diverged for of_rate in runs.values() for run in of_rate)


def conclusions(found: Runs) -> list[str]:
    """What the numbers say of the claim: better, and over more learning rates, than straight-through."""
    lines = []
    best = {row: runs[best_rate(runs)] for row, runs in found.items()}
    for setting in SETTINGS:
        ste, denoised = found[STE, setting], found[DENOISED, setting]
        gap = mean_loss(best[STE, setting]) - mean_loss(best[DENOISED, setting])
        wins = sum(a.test < b.test for a, b in zip(best[DENOISED, setting], best[STE, setting]))
        lines.append(
            f"{setting}: denoised {'beats' if gap > 0 else 'does not beat'} STE, by {gap:+.2f} nats a character at "
            f"each one's best learning rate, in {wins} of {len(best[STE, setting])} seeds."
        )
        total = sum(map(len, ste.values()))
        lines.append(
            f"{setting}: {diverged(ste)} of {total} runs of STE diverged over the ladder, and {diverged(denoised)} of "
            f"{total} denoised."
        )
        worst = {
            name: max(mean_loss(of_rate) for of_rate in runs.values())
            for name, runs in ((STE, ste), (DENOISED, denoised))
        }
        lines.append(
            f"{setting}: at its worst learning rate denoised loses {worst[DENOISED]:.2f} nats, STE {worst[STE]:.2f}."
        )
    ridge, denoised = mean_loss(best[RIDGE, "1 bit"]), mean_loss(best[DENOISED, "1 bit"])
    ste = mean_loss(best[STE, "1 bit"])
    lines.append(
        f"1 bit: the regression in the forward alone changes the loss of STE by {ridge - ste:+.2f}; its gradient "
        f"changes that by another {denoised - ridge:+.2f}."
    )
    real = mean_loss(best[REAL, ""])
    lines.append(f"1 bit, denoised: {denoised - real:+.2f} nats against full precision after the same few steps.")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "results" / "denoise-affine.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, text = list(range(options.seeds)), load_text()
    found: dict[tuple[str, str], dict[float, list[Run]]] = {}
    for arm, setting in ROWS:
        found[arm, setting] = {}
        for rate in LADDER:
            runs = [train(arm, setting, rate, seed, text, options.steps) for seed in seeds]
            found[arm, setting][rate] = runs
            print(f"{arm}, {setting}, {rate:g}: {[round(run.test, 3) for run in runs]}", file=sys.stderr, flush=True)

    def rows(quantity: Callable[[Run], float]) -> dict[str, list[str | Sequence[float]]]:
        return {
            ", ".join(filter(None, row)): [cell([quantity(run) for run in runs[rate]]) for rate in LADDER]
            for row, runs in found.items()
        }

    best = {row: (best_rate(runs), runs[best_rate(runs)]) for row, runs in found.items()}
    ladder = [f"{rate:g}" for rate in LADDER]
    write_results(
        options.out,
        title="Denoising affine transform: training at one bit and below (arXiv 2409.09245)",
        claim="weights and activations of one bit, and sparse ones below, train smoothly where straight-through "
        "estimation oscillates, diverges or trails; the affine form pays only with the gradient that knows the error.",
        tables=[
            Table(
                f"Each at its best learning rate; losses in nats a character (best constant prediction "
                f"{unigram_entropy(text.train):.2f})",
                ["arm", "learning rate", "test loss", "final training loss", "roughness", "diverged, whole ladder"],
                {
                    ", ".join(filter(None, row)): [
                        f"{rate:g}",
                        cell([run.test for run in runs]),
                        cell([run.training for run in runs]),
                        cell([run.roughness for run in runs]),
                        f"{diverged(found[row])} of {sum(map(len, found[row].values()))}",
                    ]
                    for row, (rate, runs) in best.items()
                },
                digits=3,
            ),
            Table("Test loss by learning rate", ["arm", *ladder], rows(lambda run: run.test), digits=2),
            Table("Roughness by learning rate", ["arm", *ladder], rows(lambda run: run.roughness), digits=3),
        ],
        command=COMMAND,
        seeds=seeds,
        data=f"Tiny Shakespeare, first 80 % to train, next 10 % to choose the learning rate, last 10 % to test. Causal "
        f"transformer of {DEPTH} blocks, {FEATURES} features, {HEADS} heads, {CONTEXT} characters; {options.steps} "
        f"steps of {BATCH} windows, Adam, cosine. Weights and inputs of all linear layers of the blocks at one bit in "
        f"blocks of {BLOCK}; embedding, positions, norms, head and attention's products real. Roughness: standard "
        f"deviation of the step-to-step change of the training loss over the second half.",
        conclusion_lines=conclusions(found),
    )


if __name__ == "__main__":
    main()
