"""A-FAN against plain training at equal steps and at equal cost: clean accuracy, and accuracy under attack.

    python -m pennyweight.bench.experiments.a_fan        (about three minutes on one core)

A small residual network on two thousand small images of Fashion-MNIST, cut after its first stage. Rows differ in what
the tail learns from beside the clean features: nothing, random changes of the size of the attack's, or attacked ones
(layers/a_fan.py). The test images are attacked by the sign of the gradient (one step) and by projected gradients (ten
steps of a quarter of the reach from the image itself), both without regard to the range of pixels.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...cost import cost_table
from ...layers.a_fan import AdversarialFeatures
from ...models.resnet_cifar import ResNet
from ...training.learning_rate import learning_rate_factor
from ...training.settings import ScheduleSettings
from ..results import Table, write_results
from .command_line import arguments_of
from .kept import kept
from .supervised import fashion_mnist_halved, verdict

COMMAND = "python -m pennyweight.bench.experiments.a_fan"
SAMPLES, VALIDATION, TESTED = 2_000, 2_000, 1_000
STEPS, BATCH, WIDTH = 160, 50, 8
RATES = (3e-2, 1e-1, 3e-1, 1.0)
#: Reach of attacks on images, in pixels of 0 to 1, and the standard deviation that images are divided by.
REACH, DEVIATION = 8 / 255, 0.3530
PLAIN, LONGER, RANDOM = "plain", "plain, equal cost", "random, 0.2"
#: Row -> options of `AdversarialFeatures`; `RANDOM` changes features by 0.2 of their root mean square at random.
ROWS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    LONGER: {},
    RANDOM: {"steps": 0, "gamma": 0.2},
    "A-FAN, 0.02": {"gamma": 0.02},
    "A-FAN, 0.2": {"gamma": 0.2},
    "A-FAN, 0.2, mixed": {"gamma": 0.2, "mixed": [1]},
}


class RandomFeatures(AdversarialFeatures):
    """The same loss with random signs in place of the gradient's: what is left is the size of the change."""

    def attack(self, features: Tensor, targets: Tensor) -> Tensor:
        clean = features.detach()
        return clean + self.gamma * clean.square().mean().sqrt() * torch.randn_like(clean).sign()


def network(row: str) -> AdversarialFeatures:
    """Images [samples, 1, 14, 14] -> logits of 10 classes."""
    model: Any = ResNet((1, 1, 1), WIDTH, "subsample", in_channels=1)
    head = nn.Sequential(model.conv1, model.bn1, model.act1, model.layer1)
    tail = nn.Sequential(model.layer2, model.layer3, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.linear)
    return (RandomFeatures if row == RANDOM else AdversarialFeatures)(head, tail, **ROWS[row])


def cost(row: str) -> float:
    """Multiplications of a training step over those of a plain one, by `passes` and what head and tail cost."""
    model = network(row).eval()
    image = torch.zeros(1, 1, 14, 14)
    head, tail = (
        cost_table(part, inputs).macs for part, inputs in ((model.head, image), (model.tail, model.head(image)))
    )
    passes = (1, 1) if row in (PLAIN, LONGER) else model.passes
    return (passes[0] * head + passes[1] * tail) / (head + tail)


def steps_of(row: str) -> int:
    """Plain training at equal cost has as many more as a step of A-FAN costs more."""
    return round(STEPS * cost("A-FAN, 0.2")) if row == LONGER else STEPS


@cache
def images(part: str) -> tuple[Tensor, Tensor]:
    """Images and classes of "train", "validation" or "test"."""
    splits = fashion_mnist_halved(SAMPLES + VALIDATION)
    rows = {"train": range(SAMPLES), "validation": range(SAMPLES, SAMPLES + VALIDATION), "test": range(TESTED)}[part]
    return splits["test" if part == "test" else "train"].batch(torch.tensor(rows))


def accuracy(model: nn.Module, part: str, attack: Callable[[Tensor, Tensor], Tensor] = lambda x, y: x) -> float:
    """In percent, in eval mode."""
    model.eval()
    right = 0
    for x, y in zip(*(tensor.split(250) for tensor in images(part))):
        attacked = attack(x, y)
        with torch.no_grad():
            right += int((model(attacked).argmax(1) == y).sum())
    return 100 * right / len(images(part)[1])


def on_images(model: nn.Module, steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The attack of A-FAN with its cut before the first layer: of one step, or of several within the same reach."""
    reach = REACH / DEVIATION
    gamma = reach if steps == 1 else reach / 4
    return AdversarialFeatures(nn.Identity(), model, steps=steps, gamma=gamma, units="absolute", reach=reach).attack


def train(row: str, rate: float, seed: int) -> dict[str, float]:
    """Accuracies in percent, of the test images clean and attacked, and milliseconds of the processor a step."""
    torch.manual_seed(seed)
    model, steps = network(row), steps_of(row)
    x, y = images("train")
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    started = time.process_time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(step, steps, ScheduleSettings(warmup=0.05))
        rows = torch.randint(SAMPLES, (BATCH,))
        plain = row in (PLAIN, LONGER)
        loss = F.cross_entropy(model(x[rows]), y[rows]) if plain else model.training_loss(x[rows], y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {
        "ms": 1000 * (time.process_time() - started) / steps,
        "validation": accuracy(model, "validation"),
        "clean": accuracy(model, "test"),
        **{f"{n} steps": accuracy(model, "test", on_images(model, n)) for n in (1, 10)},
    }


def conclusions(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """What the numbers say of the claims: clean accuracy rises, by more than random changes and more steps give."""
    lines = []
    for row in list(ROWS)[3:]:
        for key, what in (("clean", "clean"), ("10 steps", "under ten steps of attack")):
            for other in (PLAIN, LONGER, RANDOM):
                text = verdict([one[key] for one in found[row]], [one[key] for one in found[other]])
                lines.append(f"{row} against {other}, {what}: {text}.")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "a-fan.md", __doc__, arguments)
    found: dict[str, list[dict[str, Any]]] = {}
    grid: dict[str, dict[float, float]] = {}

    def run(row: str, rate: float, seed: int) -> dict[str, Any]:
        settings = {"options": ROWS[row], "random": row == RANDOM, "steps": steps_of(row), "rate": rate, "seed": seed}
        settings |= {"samples": SAMPLES, "width": WIDTH}
        made = kept(options.runs, settings, lambda: train(row, rate, seed))
        print(row, rate, seed, made, file=sys.stderr, flush=True)
        return made

    for row in ROWS:
        tried = {rate: run(row, rate, options.seeds[0]) for rate in RATES}
        grid[row] = {rate: one["validation"] for rate, one in tried.items()}
        best = max(RATES, key=lambda rate: grid[row][rate])
        found[row] = [tried[best], *(run(row, best, seed) for seed in options.seeds[1:])]
    chosen = {row: max(tried, key=lambda rate: tried[rate]) for row, tried in grid.items()}
    keys = ("clean", "1 steps", "10 steps", "ms")
    write_results(
        options.out,
        title="A-FAN: adversarial features as training samples (arXiv 2103.12171)",
        claim="training the tail of a network on attacked feature maps as well raises its accuracy on clean images, at "
        "less cost than attacks on images; inference costs what it did.",
        tables=[
            Table(
                "Accuracy in percent on clean and attacked test images, and what training costs",
                ["row", "learning rate", "steps", "clean", "one step", "ten steps", "ms a step", "times the products"],
                {
                    row: [
                        f"{chosen[row]:g}",
                        f"{steps_of(row)}",
                        *([one[key] for one in runs] for key in keys),
                        f"{cost(row):.2f}",
                    ]
                    for row, runs in found.items()
                },
            ),
            Table(
                "Accuracy on the validation images in percent at each learning rate, first seed",
                ["row", *(f"{rate:g}" for rate in RATES)],
                {row: list(tried.values()) for row, tried in grid.items()},
            ),
        ],
        command=COMMAND,
        seeds=options.seeds,
        data=f"Fashion-MNIST at 14 x 14 pixels: {SAMPLES:,} training images, {VALIDATION:,} others for the learning "
        f"rate, {TESTED:,} test images. ResNet-8 of width {WIDTH}, {STEPS} steps of {BATCH} images, SGD with momentum "
        f"0.9, cosine; one step of attack on the features behind the first stage, its size in root mean squares. Reach "
        f"of attacks on images {255 * REACH:.0f}/255.",
        conclusion_lines=[
            *conclusions(found),
            *(
                f"The learning rate of {row} is at the edge of the grid."
                for row, rate in chosen.items()
                if rate in (RATES[0], RATES[-1])
            ),
        ],
    )
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
