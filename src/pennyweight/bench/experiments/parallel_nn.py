"""The parallel network against splines, kernels, trend filtering, wavelets and a plain network, on noisy functions.

    python -m pennyweight.bench.experiments.parallel_nn        (about a quarter of an hour on one core)

Four functions of Donoho and Johnstone on [0, 1], scaled to a standard deviation of 1, are observed at regular points
with noise of standard deviation 0.2. Every method is fitted to these observations; what it leaves open is chosen by a
second set of observations at the same points, with the first seed, and what is reported is the mean squared distance
to the function itself. The networks are trained as recipes/parallel-nn.yaml says, the plain one in the same way.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import make_smoothing_spline
from torch import Tensor

from ...errors import require
from ...training.building import make_model, make_optimizer
from ...training.learning_rate import learning_rate_factor
from ...training.randomness import derived_seed
from ...training.settings import TrainingRecipe
from ..results import Table, write_results
from .command_line import REPOSITORY
from .kept import kept

COMMAND = "python -m pennyweight.bench.experiments.parallel_nn"
RECIPE = REPOSITORY / "recipes" / "parallel-nn.yaml"
NOISE = 0.2
FUNCTIONS = ("doppler", "bumps", "blocks", "heavisine")
SAMPLES = 256
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
DECAYS = (1e-7, 1e-6, 1e-5)
PARALLEL, PLAIN = "parallel network", "plain network"
#: Penalties of trend filtering.
LAMBDAS = np.logspace(-1.6, 1.4, 61)
#: Network -> options of the model; as many parameters.
NETWORKS: dict[str, Mapping[str, int]] = {
    PARALLEL: {"subnetworks": 48, "width": 6, "depth": 4},
    PLAIN: {"subnetworks": 1, "width": 48, "depth": 4},
}
_PLACES = np.array([0.1, 0.13, 0.15, 0.23, 0.25, 0.40, 0.44, 0.65, 0.76, 0.78, 0.81])
_JUMPS = np.array([4, -5, 3, -4, 5, -4.2, 2.1, 4.3, -3.1, 2.1, -4.2])
_HEIGHTS = np.array([4, 5, 3, 4, 5, 4.2, 2.1, 4.3, 3.1, 5.1, 4.2])
_WIDTHS = np.array([0.005, 0.005, 0.006, 0.01, 0.01, 0.03, 0.01, 0.01, 0.005, 0.008, 0.005])


def true_values(function: str, x: np.ndarray) -> np.ndarray:
    """A test function of Ideal spatial adaptation by wavelet shrinkage (Donoho and Johnstone, 1994), unscaled."""
    if function == "doppler":
        return np.sqrt(x * (1 - x)) * np.sin(2.1 * np.pi / (x + 0.05))
    if function == "heavisine":
        return 4 * np.sin(4 * np.pi * x) - np.sign(x - 0.3) - np.sign(0.72 - x)
    away = x[:, None] - _PLACES
    if function == "blocks":
        return ((1 + np.sign(away)) / 2) @ _JUMPS
    return (1 + np.abs(away / _WIDTHS)) ** -4.0 @ _HEIGHTS


class Observations(NamedTuple):
    """float64 [samples] each: points, noisy values to fit, others to choose by, and the function itself."""

    x: np.ndarray
    y: np.ndarray
    validation: np.ndarray
    truth: np.ndarray


def observe(function: str, samples: int, seed: int) -> Observations:
    """Points at the middle of as many equal parts of [0, 1]."""
    x = (np.arange(samples) + 0.5) / samples
    fine = true_values(function, (np.arange(4096) + 0.5) / 4096)
    truth = (true_values(function, x) - fine.mean()) / fine.std()
    noise = NOISE * np.random.default_rng((seed, samples)).standard_normal((2, samples))
    return Observations(x, truth + noise[0], truth + noise[1], truth)


def noisy_samples(function: str = "doppler", samples: int = 256, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Data of the recipe: the noisy values to fit as training split, the function itself as test split."""
    data = observe(function, samples, seed)
    x, y, truth = (torch.tensor(values, dtype=torch.float32)[:, None] for values in (data.x, data.y, data.truth))
    return {"train": (x, y), "test": (x, truth)}


def squared_error(fit: np.ndarray, values: np.ndarray) -> float:
    return float(np.mean((fit - values) ** 2))


# ------------------------------------------------------------------------------------------------- classical methods

Fits = Iterator[tuple[tuple[Any, ...], np.ndarray]]


def splines(x: np.ndarray, y: np.ndarray) -> Fits:
    """Cubic smoothing splines."""
    for lam in np.logspace(-11, 0, 45):
        yield (float(lam),), make_smoothing_spline(x, y, lam=lam)(x)


def kernel_ridge(x: np.ndarray, y: np.ndarray) -> Fits:
    """With the Gaussian kernel."""
    kernel = require("sklearn.kernel_ridge", "dev").KernelRidge
    for width, alpha in product(np.logspace(-3, 0, 13), np.logspace(-6, 1, 15)):
        model = kernel(kernel="rbf", gamma=1 / (2 * width**2), alpha=alpha)
        yield (float(width), float(alpha)), model.fit(x[:, None], y).predict(x[:, None])


def trend_filtering(x: np.ndarray, y: np.ndarray) -> Fits:
    """min_b 1/2 |y - b|^2 + lambda |D^(k+1) b|_1: piecewise polynomials of degree k.

    As a lasso: b = P c + H a, where the columns of H are functions of which D^(k+1) is 1 at one point and 0 elsewhere,
    and P those (polynomials) of which it is 0 everywhere, which are projected out. Least-angle regression gives its
    whole path, linear between the bends.
    """
    lars_path = require("sklearn.linear_model", "dev").lars_path
    n = len(y)
    for degree in (0, 1, 2):
        basis = np.eye(n)
        for _ in range(degree + 1):
            basis = np.cumsum(basis, axis=0)  # D^(k+1) of the columns is the identity
        polynomials, steps = basis[:, : degree + 1], basis[:, degree + 1 :]
        free = np.linalg.qr(polynomials)[0]
        left = steps - free @ (free.T @ steps)
        residue = y - free @ (free.T @ y)
        bends, _, path = lars_path(left, residue, method="lasso", alpha_min=LAMBDAS[0] / n, max_iter=8 * n)
        lambdas = n * bends[::-1]  # bends count the mean of the squares
        for lam in LAMBDAS:
            coefficients = [np.interp(lam, lambdas, row[::-1]) for row in path]
            yield (degree, float(lam)), free @ (free.T @ y) + left @ coefficients


def wavelets(x: np.ndarray, y: np.ndarray) -> Fits:
    """Thresholds on the coefficients but for the coarsest."""
    pywt = require("pywt", "dev")
    for family, levels in product(("haar", "db4", "sym8"), (2, 3, 4)):
        if levels > pywt.dwt_max_level(len(y), family):
            continue
        coarse, *details = pywt.wavedec(y, family, mode="symmetric", level=levels)
        for kind, threshold in product(("soft", "hard"), np.linspace(0, 6, 31) * NOISE):
            kept_details = [pywt.threshold(detail, threshold, kind) for detail in details]
            fit = pywt.waverec([coarse, *kept_details], family, mode="symmetric")
            yield (family, levels, kind, float(threshold)), fit[: len(y)]


CLASSICAL: dict[str, Callable[[np.ndarray, np.ndarray], Fits]] = {
    "smoothing spline": splines,
    "kernel ridge": kernel_ridge,
    "trend filtering": trend_filtering,
    "wavelets": wavelets,
}


class Fitted(NamedTuple):
    """One method on one problem, one number a seed. choice: what was left open. active: subnetworks not constant."""

    choice: tuple[Any, ...]
    error: list[float]
    fit: np.ndarray
    active: list[float]


def classical(name: str, problem: tuple[str, int], seeds: Sequence[int]) -> Fitted:
    """What is left open is chosen with the first seed."""
    data = [observe(*problem, seed) for seed in seeds]
    tried = [dict(CLASSICAL[name](each.x, each.y)) for each in data]
    choice = min(tried[0], key=lambda key: squared_error(tried[0][key], data[0].validation))
    errors = [squared_error(fits[choice], each.truth) for fits, each in zip(tried, data)]
    return Fitted(choice, errors, tried[0][choice], [])


# ---------------------------------------------------------------------------------------------------------- networks


def fitted(recipe: TrainingRecipe) -> Any:
    """The model as `train` would return it, but for the order of the points within a sum: each step is a whole epoch,
    and what the loop writes down for each costs more than the step itself."""
    torch.manual_seed(derived_seed(recipe.seed, "model"))
    model = make_model(recipe.model)
    optimizer = make_optimizer(recipe.optimizer, model)
    x, y = noisy_samples(**recipe.data.options)["train"]
    steps = recipe.steps or 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.optimizer.lr * learning_rate_factor(step, steps, recipe.schedule)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def trained(network: str, problem: tuple[str, int], rate: float, decay: float, seed: int, runs: Path) -> dict[str, Any]:
    """Fitted values and the number of active subnetworks of one training."""
    recipe = TrainingRecipe.load(RECIPE)
    function, samples = problem
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, options={**recipe.model.options, **NETWORKS[network]}),
        data=dataclasses.replace(recipe.data, options={"function": function, "samples": samples, "seed": seed}),
        optimizer=dataclasses.replace(recipe.optimizer, lr=rate, weight_decay=decay),
        batch=samples,
        seed=seed,
    )

    def measure() -> dict[str, Any]:
        model = fitted(recipe)
        x = noisy_samples(*problem, seed)["train"][0]
        with torch.no_grad():
            fit = model(x)[:, 0].double()
        data = observe(*problem, seed)
        errors = [1000 * squared_error(fit.numpy(), values) for values in (data.validation, data.truth)]
        print(network, problem, rate, decay, seed, errors, int(model.active(x).sum()), file=sys.stderr, flush=True)
        return {"fit": [round(value, 6) for value in fit.tolist()], "active": int(model.active(x).sum())}

    return kept(runs, recipe.to_dict(), measure)


def by_training(
    network: str, problem: tuple[str, int], rate: float, seeds: Sequence[int], runs: Path
) -> tuple[Fitted, dict[float, dict[str, Any]]]:
    """The decay is chosen with the first seed; also what each decay gave: validation error and active subnetworks."""
    data = [observe(*problem, seed) for seed in seeds]
    tried = {decay: trained(network, problem, rate, decay, seeds[0], runs) for decay in DECAYS}
    validation = {decay: squared_error(np.array(run["fit"]), data[0].validation) for decay, run in tried.items()}
    best = min(validation, key=lambda decay: validation[decay])
    every = [tried[best], *(trained(network, problem, rate, best, seed, runs) for seed in seeds[1:])]
    fits = [np.array(run["fit"]) for run in every]
    errors = [squared_error(fit, each.truth) for fit, each in zip(fits, data)]
    grid = {decay: {"validation": validation[decay], "active": run["active"]} for decay, run in tried.items()}
    return Fitted((best,), errors, fits[0], [run["active"] for run in every]), grid


def best_rate(network: str, seed: int, runs: Path) -> tuple[float, dict[float, float]]:
    """By the validation error on the first function with a decay from the middle of the grid; also all of these."""
    problem = (FUNCTIONS[0], SAMPLES)
    data = observe(*problem, seed)
    fits = {rate: trained(network, problem, rate, DECAYS[1], seed, runs)["fit"] for rate in RATES}
    errors = {rate: squared_error(np.array(fit), data.validation) for rate, fit in fits.items()}
    return min(errors, key=lambda rate: errors[rate]), errors


# -------------------------------------------------------------------------------------------------------------- page

Found = Mapping[tuple[str, int], Mapping[str, Fitted]]


def conclusions(found: Found, grids: Mapping[tuple[str, int], Mapping[float, Mapping[str, Any]]]) -> list[str]:
    """What the numbers say of the claim: below splines and kernels, near trend filtering, few active subnetworks."""
    lines = []
    for problem, methods in found.items():
        own = methods[PARALLEL]
        order = sorted(methods, key=lambda name: fmean(methods[name].error))
        spline = methods["smoothing spline"]
        wins = sum(a < b for a, b in zip(own.error, spline.error))
        ratio = fmean(own.error) / fmean(spline.error)
        lines.append(
            f"{problem[0]}, {problem[1]} points: the parallel network has {ratio:.2f} times the error of the smoothing "
            f"spline, lower in {wins} of {len(own.error)} seeds; from the least error: {', '.join(order)}."
        )
    for claim, rivals in (
        ("below smoothing spline and kernel ridge", ("smoothing spline", "kernel ridge")),
        ("below the plain network", (PLAIN,)),
        ("at most 1.5 times trend filtering", ("trend filtering",)),
    ):
        factor = 1.5 if "1.5" in claim else 1
        holds = [
            problem
            for problem, methods in found.items()
            if all(fmean(methods[PARALLEL].error) < factor * fmean(methods[rival].error) for rival in rivals)
        ]
        names = ", ".join(f"{name} at {samples}" for name, samples in holds) or "none"
        lines.append(f"Mean error {claim}: on {len(holds)} of {len(found)} problems ({names}).")
    falling = [
        problem
        for problem, grid in grids.items()
        if all(grid[a]["active"] >= grid[b]["active"] for a, b in pairwise(DECAYS))
    ]
    lines.append(
        f"The number of active subnetworks falls, or stays, with every step of the decay on {len(falling)} of "
        f"{len(grids)} problems."
    )
    count = NETWORKS[PARALLEL]["subnetworks"]
    for problem, methods in found.items():
        active = fmean(methods[PARALLEL].active)
        lines.append(
            f"{problem[0]}: with the decay that is best, {active:.0f} of {count} subnetworks are active: most are "
            f"{'' if active < count / 2 else 'not '}constant."
        )
        for network in NETWORKS:
            (decay,) = methods[network].choice
            if decay in (DECAYS[0], DECAYS[-1]):
                lines.append(f"The decay of the {network} on {problem[0]} at {problem[1]} is at the edge of its grid.")
    return lines


def draw(found: Found, seed: int, path: Path) -> None:
    """The fits of the first seed to each function."""
    require("matplotlib", "dev").use("svg")
    plt = require("matplotlib.pyplot", "dev")
    plt.rcParams.update({"svg.hashsalt": "pennyweight", "svg.fonttype": "none", "font.size": 9})
    rows = (len(found) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(10, 3 * rows), layout="constrained", squeeze=False)
    for axis, (problem, methods) in zip(axes.flat, found.items()):
        data = observe(*problem, seed)
        axis.plot(data.x, data.truth, color="0.7", linewidth=3, label="function")
        for name, colour in ((PARALLEL, "tab:red"), ("smoothing spline", "tab:blue")):
            label = f"{name}, {methods[name].error[0]:.4f}"
            axis.plot(data.x, methods[name].fit, color=colour, linewidth=1, label=label)
        axis.set_title(problem[0])
        axis.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    picture = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"(\d\.\d\d)\d+", r"\1", picture), encoding="utf-8")  # half the bytes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "results" / "parallel-nn.md")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "out" / "parallel-nn", help="where runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one chooses")
    parser.add_argument("--functions", nargs="+", default=FUNCTIONS, choices=FUNCTIONS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    problems = [(name, SAMPLES) for name in options.functions]
    fits: dict[tuple[str, int], dict[str, Fitted]] = {}
    grids: dict[tuple[str, int], dict[float, dict[str, Any]]] = {}
    rates = {network: best_rate(network, options.seeds[0], options.runs) for network in NETWORKS}
    for problem in problems:
        fits[problem] = {name: classical(name, problem, options.seeds) for name in CLASSICAL}
        for network, (rate, _) in rates.items():
            fits[problem][network], grid = by_training(network, problem, rate, options.seeds, options.runs)
            if network == PARALLEL:
                grids[problem] = grid
    names = [f"{name}, {samples}" for name, samples in problems]
    methods = [*CLASSICAL, *NETWORKS]
    picture = options.out.with_suffix(".svg")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(fits, options.seeds[0], picture)
    recipe = TrainingRecipe.load(RECIPE)
    write_results(
        options.out,
        title="The parallel network: weight decay as regression by few learned functions (arXiv 2204.09664)",
        claim="a sum of many thin deep networks under weight decay adapts to where a function is rough, as trend "
        "filtering and wavelets do and as smoothing splines, kernel methods and a plain network do not, while most of "
        "its subnetworks end up constant.",
        tables=[
            Table(
                f"1000 times the mean squared distance to the function (noise: {1000 * NOISE**2:g})",
                ["method", *names],
                {m: [[1000 * e for e in fits[p][m].error] for p in problems] for m in methods},
            ),
            Table(
                "What was chosen with the first seed: penalty; width and penalty; degree and penalty; wavelet, "
                "levels, kind and threshold; weight decay",
                ["method", *names],
                {m: [" ".join(_short(c) for c in fits[p][m].choice) for p in problems] for m in methods},
            ),
            Table(
                f"Active subnetworks of {NETWORKS[PARALLEL]['subnetworks']} / 1000 times the validation error, by "
                "weight decay (first seed)",
                ["weight decay", *names],
                {
                    f"{decay:g}": [
                        f"{grids[p][decay]['active']} / {1000 * grids[p][decay]['validation']:.1f}" for p in problems
                    ]
                    for decay in DECAYS
                },
            ),
            Table(
                f"1000 times the validation error by learning rate: {FUNCTIONS[0]}, decay {DECAYS[1]:g}, first seed",
                ["network", *(f"{rate:g}" for rate in RATES)],
                {network: [1000 * errors[rate] for rate in RATES] for network, (_, errors) in rates.items()},
            ),
        ],
        command=" ".join([COMMAND, *(["--functions", *options.functions] if options.functions != FUNCTIONS else [])]),
        seeds=options.seeds,
        data=f"{', '.join(options.functions)} at regular points of [0, 1], standard deviation 1, noise "
        f"{NOISE:g}; a second set of observations at the same points chooses. Networks: {recipe.steps:,} steps of Adam "
        "on all points, cosine; "
        + "; ".join(f"{n}: {_parameters(n):,} parameters ({_described(n)})" for n in NETWORKS)
        + f". ![fits]({picture.name})",
        conclusion_lines=conclusions(fits, grids),
    )
    print(options.out.read_text(encoding="utf-8"))


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _parameters(network: str) -> int:
    sizes = NETWORKS[network]
    m, w, depth = sizes["subnetworks"], sizes["width"], sizes["depth"]
    return m * (2 * w + (depth - 2) * w * (w + 1) + w + 1)


def _described(network: str) -> str:
    return ", ".join(f"{key} {value}" for key, value in NETWORKS[network].items())


if __name__ == "__main__":
    main()
