"""From sparse training to a small file: accuracy against bytes of the finished file, on a small convolutional network.

    python -m pennyweight.bench.experiments.sparse_training        (half an hour on one core; goes on where it stopped)

All networks are trained for the same number of steps on the same Fashion-MNIST images, as recipes/sparse-training.yaml
says but for what is named:

    pWD, p = 0.5, 0.8, 1    decoupled decay for the p norm, each at three strengths
    l1 penalty              strength sum |w| in the loss of AdamW, three strengths; afterwards weights below a cut are
                            zero, the largest of `CUTS` that costs at most a quarter of a point on validation images
    pruned                  AdamW for half of the steps, then the least weights of all layers set to zero, three shares,
                            and fine-tuned for the other half under a schedule of its own
    dense                   AdamW with weight decay

Files are of two kinds: zeros as zeros and the other weights in half precision (`pennyweight.convert`), and what
`pennyweight.shrink` makes at a given size. The learning rate of each comes from one grid for all: the one with the best
validation accuracy of a file within each of `SIZES`, on average, with the first seed. Which strength serves at which
size is chosen on validation images of the first seed, too; strengths that serve nowhere are trained with that seed
alone, and stand in the curves without a spread.

Data: PENNYWEIGHT_DATA, default ../shared/data beside the repository.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import prune

from ...artifact import save
from ...checkpoints import WEIGHTS, load_checkpoint
from ...compress.shrink import shrink
from ...errors import require
from ...training.building import make_model
from ...training.convert import convert
from ...training.data import Split, TrainingData, load_data
from ...training.metrics import replacing
from ...training.settings import ModelSettings, TrainingRecipe
from ...training.trained import calibration
from ..results import Table, paired_difference, told_apart, write_results
from .command_line import REPOSITORY, arguments_of
from .recipe_runs import Contender, trained

COMMAND = "python -m pennyweight.bench.experiments.sparse_training"
RECIPE = REPOSITORY / "recipes" / "sparse-training.yaml"
RATES = (3e-3, 1e-2)
#: Contender -> its knob: decay of sum |w|^p, strength of sum |w|, share pruned, weight decay.
KNOBS: dict[str, tuple[float, ...]] = {
    "pWD, p = 0.5": (1e-2, 3e-2, 1e-1),
    "pWD, p = 0.8": (3e-2, 1e-1, 3e-1),
    "pWD, p = 1": (1e-1, 3e-1, 1.0),
    "l1 penalty": (1e-4, 3e-4, 1e-3),
    "pruned": (0.9, 0.96, 0.985),
    "dense": (0.0, 0.05),
}
PRUNED_DECAY = 0.05
CUTS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
#: Bytes: of files in half precision, and of files that shrink makes.
SIZES, SHRUNK = (5_000, 15_000, 50_000), (6_000,)
CALIBRATION, CHANCE = 512, 10.0
#: Points below the best accuracy that the picture reaches down to.
_SHOWN = 15
#: What is shrunk.
TO_SHRINK = ("pWD, p = 0.5", "pWD, p = 0.8", "pruned", "dense")
#: The strengths that serve best within these bytes are trained with all seeds, the others with the first.
REPEATED = (15_000,)


def network() -> nn.Sequential:
    """[n, 1, 28, 28] -> [n, 10]; 106,000 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def pruned(dense: str, amount: float) -> nn.Sequential:
    """The network of a trained directory with that share of its weights, the least of all layers, held at zero."""
    model = network()
    model.load_state_dict(load_checkpoint(dense))
    prune.global_unstructured(_prunable(model), prune.L1Unstructured, amount=amount)
    return model


def _prunable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


class Run(NamedTuple):
    """One training: who, its knob, learning rate and seed."""

    contender: str
    knob: float
    rate: float
    seed: int


class File(NamedTuple):
    """A finished file: its bytes, share of zeros among its weights, accuracies in percent."""

    nbytes: int
    zeros: float
    validation: float
    test: float


def recipe_of(run: Run, runs: Path) -> TrainingRecipe:
    """What is trained; of pruned networks, what is trained after pruning, once the half before is there."""
    base = dataclasses.replace(TrainingRecipe.load(RECIPE), shrink=None)
    changes: dict[str, Any] = {}
    optimizer = dataclasses.replace(base.optimizer, name="adamw", options={}, weight_decay=run.knob)
    if run.contender.startswith("pWD"):
        power = float(run.contender.rpartition(" ")[2])
        optimizer = dataclasses.replace(
            base.optimizer, weight_decay=run.knob, options={**base.optimizer.options, "p": power}
        )
    elif run.contender == "l1 penalty":
        optimizer = dataclasses.replace(optimizer, weight_decay=0.0)
        changes["penalties"] = ({"method": "p-norm", "p": 1, "strength": run.knob},)
    elif run.contender == "pruned":
        optimizer = dataclasses.replace(optimizer, weight_decay=PRUNED_DECAY)
        first = dataclasses.replace(base, optimizer=optimizer, steps=_half(base))
        dense = Contender("pruned, before", first).at(run.rate, run.seed, runs)
        trained(dense, "pruned, before")
        options = {"dense": dense.output, "amount": run.knob}
        changes |= {"model": ModelSettings(f"{__package__}.sparse_training:pruned", options)}
        changes |= {"steps": (base.steps or 0) - _half(base)}
    recipe = dataclasses.replace(base, optimizer=optimizer, **changes)
    return Contender(run.contender, recipe).at(run.rate, run.seed, runs)


def _half(recipe: TrainingRecipe) -> int:
    return (recipe.steps or 0) // 2


class Bench:
    """Trainings and the files made of them, each once; both are kept below `runs`."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self._data: dict[int, TrainingData] = {}

    def data(self, seed: int) -> TrainingData:
        if seed not in self._data:
            self._data[seed] = load_data(TrainingRecipe.load(RECIPE).data, seed)
        return self._data[seed]

    def file(self, run: Run, size: int | None = None) -> File:
        """The file in half precision, or of a size."""
        recipe = recipe_of(run, self.runs)
        trained(recipe, f"{run.contender}, {run.knob:g}")
        path = Path(recipe.output) / ("half.json" if size is None else f"{size}.json")
        if not path.exists():
            made = self._make(run, recipe, size)
            with replacing(path) as file:
                json.dump(made._asdict(), file)
        return File(**json.loads(path.read_text()))

    def _make(self, run: Run, recipe: TrainingRecipe, size: int | None) -> File:
        data = self.data(run.seed)
        assert data.validation is not None and data.test is not None
        model = self._finished(run, recipe, data.validation)
        weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim >= 2])
        if size is None:
            small = convert(model, half=True)
        else:
            small = shrink(model, size=size, data=calibration(data.train, CALIBRATION, run.seed), seed=run.seed)
        nbytes = save(small, Path(recipe.output) / f"file-{size or 'half'}")
        zeros = float((weights == 0).double().mean())
        return File(nbytes, zeros, accuracy(small, data.validation), accuracy(small, data.test))

    def _finished(self, run: Run, recipe: TrainingRecipe, validation: Split) -> nn.Module:
        """The trained network as a plain one, in eval mode."""
        model = make_model(recipe.model)
        model.load_state_dict(load_checkpoint(Path(recipe.output) / WEIGHTS))
        if run.contender == "pruned":
            for module, name in _prunable(model):
                prune.remove(module, name)
        if run.contender == "l1 penalty":
            return _cut(model.eval(), lambda twin: accuracy(twin, validation))
        return model.eval()


@torch.no_grad()
def _cut(model: nn.Module, judge: Callable[[nn.Module], float]) -> nn.Module:
    """The model with weights below the largest cut at zero that keeps its accuracy, but for a quarter of a point."""
    whole = judge(model)
    for cut in CUTS:
        twin = copy.deepcopy(model)
        for module, _ in _prunable(twin):
            weight = module.get_parameter("weight")
            weight.mul_(weight.abs() >= cut)
        if judge(twin) >= whole - 0.25:
            return twin
    return model


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """In percent."""
    right = 0
    for rows in torch.arange(len(split)).split(500):
        inputs, targets = split.batch(rows)
        right += int((model(inputs).argmax(1) == targets).sum())
    return 100 * right / len(split)


def within(files: Mapping[float, File], size: int) -> float | None:
    """The knob whose file of at most `size` bytes does best on validation images; None if none is so small."""
    fitting = {knob: file.validation for knob, file in files.items() if file.nbytes <= size}
    return max(fitting, key=lambda knob: fitting[knob]) if fitting else None


def chosen_rate(files: Mapping[float, Mapping[float, File]], sizes: Sequence[int]) -> float:
    """rate -> knob -> file: the rate with the best accuracy within each size, on average; a size missed is chance."""

    def score(rate: float) -> float:
        knobs = [within(files[rate], size) for size in sizes]
        return fmean(CHANCE if knob is None else files[rate][knob].validation for knob in knobs)

    return max(files, key=score)


Curves = dict[str, dict[float, list[File]]]  # contender -> knob -> a file a seed


def measure(bench: Bench, seeds: Sequence[int]) -> tuple[dict[str, float], Curves, dict[str, list[File]]]:
    """Chosen rates; files in half precision; "contender, size" -> files of that size, a seed each."""
    rates: dict[str, float] = {}
    curves: Curves = {}
    shrunk: dict[str, list[File]] = {}
    first: dict[str, dict[float, File]] = {}
    for contender, knobs in KNOBS.items():
        tried = {rate: {k: bench.file(Run(contender, k, rate, seeds[0])) for k in knobs} for rate in RATES}
        rates[contender] = chosen_rate(tried, SIZES if contender != "dense" else (10**9,))
        first[contender] = tried[rates[contender]]
    best_dense = max(first["dense"].items(), key=lambda item: item[1].validation)
    first["dense"] = dict([best_dense])  # its strength is no matter of size
    for contender, files in first.items():
        kept = {within(files, size) for size in REPEATED} if contender != "dense" else set(files)
        curves[contender] = {
            knob: [
                bench.file(Run(contender, knob, rates[contender], seed))
                for seed in (seeds if knob in kept else seeds[:1])
            ]
            for knob in files
        }
    for contender in TO_SHRINK:
        repeated = [knob for knob, files in curves[contender].items() if len(files) == len(seeds)]
        for size in SHRUNK:
            found = {knob: bench.file(Run(contender, knob, rates[contender], seeds[0]), size) for knob in repeated}
            best = max(found, key=lambda knob: found[knob].validation)
            chosen = [Run(contender, best, rates[contender], seed) for seed in seeds]
            shrunk[f"{contender}, {size}"] = [bench.file(run, size) for run in chosen]
    return rates, curves, shrunk


def best_within(curves: Curves, contender: str, size: int) -> list[File] | None:
    """The files of the strength that serves best within `size` on average, by validation, of those with most seeds."""
    most = max(map(len, curves[contender].values()))
    mean = {
        knob: File(round(fmean(f.nbytes for f in files)), 0, fmean(f.validation for f in files), 0)
        for knob, files in curves[contender].items()
        if len(files) == most
    }
    knob = within(mean, size)
    return None if knob is None else curves[contender][knob]


def compared(a: Sequence[File], b: Sequence[File]) -> str:
    """ "+0.8 points, standard error 0.2: ahead", of test accuracy, seed by seed."""
    mean, error = paired_difference([x.test for x in a], [y.test for y in b])
    return f"{mean:+.1f} points, standard error {error:.1f}: {told_apart(mean, error)}"


def conclusions(rates: Mapping[str, float], curves: Curves, shrunk: Mapping[str, Sequence[File]]) -> list[str]:
    decays = [name for name in KNOBS if name.startswith("pWD")]
    dense = fmean(file.test for files in curves["dense"].values() for file in files)
    lines = []
    for size in REPEATED:
        found = {name: files for name in KNOBS if (files := best_within(curves, name, size))}
        if not found or not any(name in found for name in decays):
            continue
        pwd = max((name for name in decays if name in found), key=lambda name: fmean(f.validation for f in found[name]))
        line = f"Half precision, within {size:,} bytes: {pwd} {fmean(f.test for f in found[pwd]):.1f} %"
        for other in ("pruned", "l1 penalty"):
            line += f"; against {other} {compared(found[pwd], found[other])}" if other in found else ""
            line += f"; no file of {other} is so small" if other not in found else ""
        lines.append(line + ".")
    for size in SHRUNK:
        best = max(TO_SHRINK[:-1], key=lambda name: fmean(f.validation for f in shrunk[f"{name}, {size}"]))
        lines.append(
            f"Shrunk to {size:,} bytes: {best} does best, {fmean(f.test for f in shrunk[f'{best}, {size}']):.1f} %; "
            f"against the dense network shrunk to the same bytes "
            f"{compared(shrunk[f'{best}, {size}'], shrunk[f'dense, {size}'])}."
        )
    near = {name: _most_zeros(curves[name], dense - 1) for name in KNOBS if name != "dense"}
    texts = [f"{name} {100 * share:.1f} %" if share is not None else f"{name} none" for name, share in near.items()]
    lines.append(f"Most zeros on average within one point of the dense network's {dense:.1f} %: {', '.join(texts)}.")
    below, one = [near[name] or 0.0 for name in decays if not name.endswith("= 1")], near["pWD, p = 1"] or 0.0
    shows = "shows" if max(below) > one else "does not show"
    lines.append(f"Sparsest at such an accuracy with p below 1, as the paper has it: {shows}.")
    edge = [name for name, rate in rates.items() if rate in (RATES[0], RATES[-1])]
    if edge:
        lines.append(f"At the edge of the grid of learning rates, a better one may lie beyond: {', '.join(edge)}.")
    return lines


def _most_zeros(files: Mapping[float, Sequence[File]], least: float) -> float | None:
    shares = [fmean(f.zeros for f in row) for row in files.values() if fmean(f.test for f in row) >= least]
    return max(shares, default=None)


def draw(path: Path, curves: Curves, shrunk: Mapping[str, Sequence[File]]) -> None:
    """Accuracy against bytes: lines of half-precision files, points of shrunk ones."""
    matplotlib = require("matplotlib", "report")
    matplotlib.use("Agg")
    plot = require("matplotlib.pyplot", "report")
    plot.rcParams.update({"svg.hashsalt": "pennyweight", "svg.fonttype": "none"})
    figure, axes = plot.subplots(figsize=(8, 5))
    for contender, row in curves.items():
        points = sorted((fmean(f.nbytes for f in files), [f.test for f in files]) for files in row.values())
        heights = [fmean(tests) for _, tests in points]
        spread = [stdev(tests) if len(tests) > 1 else 0 for _, tests in points]
        line = axes.errorbar([at for at, _ in points], heights, spread, marker="o", capsize=2, label=contender)
        if contender in TO_SHRINK:
            small = [fmean(f.test for f in shrunk[f"{contender}, {size}"]) for size in SHRUNK]
            axes.plot(SHRUNK, small, marker="^", linestyle=":", color=line[0].get_color())
    axes.set(xscale="log", xlabel="bytes of the finished file", ylabel="test accuracy, %")
    top = max(file.test for row in curves.values() for files in row.values() for file in files)
    axes.set_ylim(top - _SHOWN, top + 1)
    axes.set_title("dots: half precision, zeros as zeros; triangles: shrunk")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plot.close(figure)


def tables(rates: Mapping[str, float], curves: Curves, shrunk: Mapping[str, Sequence[File]]) -> Iterator[Table]:
    yield Table(
        "Files in half precision, zeros as zeros: every strength at the chosen learning rate",
        ["contender, strength", "learning rate", "zeros, %", "bytes", "test accuracy, %"],
        {
            f"{name}, {knob:g}": [
                f"{rates[name]:g}",
                [100 * f.zeros for f in files],
                f"{fmean(f.nbytes for f in files):,.0f}",
                [f.test for f in files],
            ]
            for name, row in curves.items()
            for knob, files in row.items()
        },
    )
    best = {name: [best_within(curves, name, size) for size in REPEATED] for name in KNOBS}
    yield Table(
        "The best half-precision file within a size, strength chosen on validation images: test accuracy, %",
        ["contender", *(f"{size:,} bytes" for size in REPEATED)],
        {name: [[f.test for f in files] if files else "" for files in row] for name, row in best.items()},
    )
    yield Table(
        "Shrunk to a size, strength chosen on validation images: test accuracy, %",
        ["contender", *(f"{size:,} bytes" for size in SHRUNK)],
        {name: [[f.test for f in shrunk[f"{name}, {size}"]] for size in SHRUNK] for name in TO_SHRINK},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "sparse-training.md", __doc__, arguments)
    torch.set_num_threads(1)
    rates, curves, shrunk = measure(Bench(options.runs), options.seeds)
    recipe = TrainingRecipe.load(RECIPE)
    picture = options.out.with_suffix(".svg")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(picture, curves, shrunk)
    write_results(
        options.out,
        title="From sparse training to a small file: pWD against pruning and shrinking (arXiv 2404.10824)",
        claim="decoupled weight decay for the p norm makes up to 99.5 % of the weights exactly zero at an accuracy "
        "near AdamW's, most of them for p below 1, comparable to pruning; here the finished file is what counts.",
        tables=list(tables(rates, curves, shrunk)),
        command=COMMAND,
        seeds=options.seeds,
        data=f"Fashion-MNIST, {recipe.data.validation:,} of the 60,000 training images for validation, all 10,000 test "
        f"images. Network of 106,000 weights, two convolutions and two linear layers, {recipe.steps} steps of "
        f"{recipe.batch} images, cosine schedule, learning rates {', '.join(f'{rate:g}' for rate in RATES)} for each "
        f"contender and strength with the first seed, which alone trains strengths that do not serve best within "
        f"{REPEATED[0]:,} bytes; weight decay of what is pruned {PRUNED_DECAY:g}; {CALIBRATION} images to calibrate "
        f"shrink. Bytes are those of model.safetensors and config.json. ![curves]({picture.name})",
        conclusion_lines=conclusions(rates, curves, shrunk),
    )
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
