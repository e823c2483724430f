"""RD-Prune (arXiv 2308.10438, ICCV 2023): every layer's pruning ratio chosen jointly from measured output distortion.

    P_a(W)   zero the floor(a N) entries of least |w| of a layer with N weights
    d_l(a)   distortion of the model's output f with P_a in layer l alone, eval mode, over samples b and outputs c:
             mean form   mean_{b,c} (f(x_b)_c - f_{l,a}(x_b)_c)^2
             worst form  max_b mean_c (the same square)
    minimise sum_l d_l(a_l)   subject to   sum_l (N_l - floor(a_l N_l)) <= (1 - sparsity) sum_l N_l

The sum stands for the distortion of pruning all layers at once: to first order the layers' errors are uncorrelated.
`allocate` measures the curves (layers x grid forwards) and solves the problem with the shared dynamic program. No
labels are needed; `calibration="noise"` needs no data either. Rounds: pass the last round's amounts as `previous`.

The compressor offers the same pruned layers, stored sparse, to the planner.

Departures from the released code: the dynamic program's faults listed in `dynamic_program` are not reproduced; amounts
are fractions of all weights of a layer in every round, not of the survivors; a layer can be left out or made to keep a
weight in every row; a tied weight counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BudgetError, DataError, UnknownNameError, WeightError
from ..formats import Sparse
from ..layers.sites import WeightSite, weight_sites
from ..registry import register
from .contract import Compressor, LayerView
from .data import calls, output_tensor, per_sample
from .dynamic_program import solve_dynamic
from .groups import require_finite

Form = Literal["mean", "worst"]
GRID = tuple(step / 100 for step in range(101))


def removed_count(size: int, amount: float) -> int:
    """floor(amount * size), where 0.29 * 100 is 29 although the float product lies below."""
    return min(size, math.floor(amount * size + 1e-6))


def magnitude_mask(weight: Tensor, amount: float) -> Tensor:
    """bool like `weight`, True where kept: all but the floor(amount * numel) entries of least magnitude.

    Of equal magnitudes the first are removed first, so the masks of growing amounts are nested.
    """
    magnitude = weight.detach().abs().flatten()
    remove = removed_count(magnitude.numel(), amount)
    if remove == 0:
        return torch.ones_like(weight, dtype=torch.bool)
    threshold = magnitude.kthvalue(remove).values
    kept = magnitude > threshold
    tied = (magnitude == threshold).nonzero().flatten()
    kept[tied[remove - int((magnitude < threshold).sum()) :]] = True
    return kept.view(weight.shape)


def prune_curve(weight: Tensor, distortion: Callable[[Tensor], float], grid: Sequence[float] = GRID) -> list[float]:
    """distortion(pruned weight) at every amount of the grid; 0 exactly where nothing is removed."""
    return [
        distortion(weight * magnitude_mask(weight, amount)) if removed_count(weight.numel(), amount) else 0.0
        for amount in grid
    ]


def output_distortion(reference: Tensor, output: Tensor, form: Form = "mean") -> float:
    """The squared change of outputs [samples, features]: its mean, or the largest mean of a sample."""
    each = (output.double() - reference.double()).square().mean(1)
    return float(each.mean() if form == "mean" else each.max())


def prunable(model: nn.Module, exclude: Iterable[str] = ()) -> list[WeightSite]:
    """The linear and convolution weights of a model without those named; a tied weight is there once.

    Raises `UnknownNameError` if `exclude` names no such weight.
    """
    sites = [site for site in weight_sites(model) if site.kind in ("linear", "conv")]
    names = {name: site for site in sites for name in (site.name, *site.aliases)}
    for name in (excluded := set(exclude)):
        if name not in names:
            raise UnknownNameError("prunable weight", name, names)
    return [site for site in sites if excluded.isdisjoint((site.name, *site.aliases))]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def model_curves(
    model: nn.Module, data: Any, grid: Sequence[float] = GRID, form: Form = "mean", exclude: Iterable[str] = ()
) -> dict[str, list[float]]:
    """d_l at every amount of the grid, by weight name. Weights and buffers are afterwards what they were, bit for bit.

    data: what `data.calls` takes. Costs weights * grid forwards of all batches.
    Raises `DataError` as `data.calls` does, and if outputs are not finite.
    """
    batches = calls(model, data)

    def outputs() -> Tensor:
        return torch.cat([per_sample(output_tensor(call(model), call), call.size) for call in batches])

    with undisturbed(model):
        reference = outputs()
        if not bool(torch.isfinite(reference).all()):
            raise DataError("the model's outputs on the calibration data are not finite; look for NaN in the weights")
        curves = {}
        for site in prunable(model, exclude):
            original = site.parameter.detach().clone()

            def measured(pruned: Tensor, parameter: nn.Parameter = site.parameter) -> float:
                parameter.copy_(pruned)
                return output_distortion(reference, outputs(), form)

            try:
                curves[site.name] = prune_curve(original, measured, grid)
            finally:
                site.parameter.copy_(original)
    return curves


def allocate(
    model: nn.Module,
    data: Any,
    sparsity: float,
    grid: Sequence[float] = GRID,
    form: Form = "mean",
    calibration: Literal["data", "noise"] = "data",
    previous: Mapping[str, float] | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    keep_one_per_row: bool = False,
    exclude: Iterable[str] = (),
    seed: int = 0,
) -> dict[str, float]:
    """The pruning amount of every linear and convolution weight: {name in the state dict: amount of the grid}.

    data: input batches as `data.calls` takes them; never touched with calibration="noise", which draws N(0, 1) inputs
    of `input_shape` (batch dimension included) from `seed`. sparsity: least fraction of all weights to remove, 0..1.
    previous: amounts of the round before, which may only grow. keep_one_per_row: only amounts whose mask leaves every
    output a weight. exclude: names of weights to leave dense (not counted in the sparsity).
    Raises `BudgetError` if no allowed amounts reach the sparsity, `DataError` without data or input_shape.
    """
    if calibration == "noise":
        if input_shape is None:
            raise DataError("calibration='noise' needs input_shape, the shape of a batch of inputs")
        data = torch.randn(*input_shape, generator=torch.Generator().manual_seed(seed))
    exclude = set(exclude)
    return choose_amounts(
        {site.name: site.matrix() for site in prunable(model, exclude)},
        model_curves(model, data, grid, form, exclude),
        sparsity,
        grid,
        previous=previous,
        keep_one_per_row=keep_one_per_row,
    )


def choose_amounts(
    weights: Mapping[str, Tensor],
    curves: Mapping[str, Sequence[float]],
    sparsity: float,
    grid: Sequence[float] = GRID,
    *,
    previous: Mapping[str, float] | None = None,
    keep_one_per_row: bool = False,
) -> dict[str, float]:
    """The amounts of least summed distortion that keep at most (1 - sparsity) of all weights. Errors as `allocate`.

    weights: the matrices [rows, cols]. curves: their distortion at every amount of the grid.
    """
    costs, allowed = [], []
    for name, weight in weights.items():
        size, least = weight.numel(), (previous or {}).get(name, 0.0)
        costs.append([size - removed_count(size, amount) for amount in grid])
        allowed.append([
            amount >= least and (not keep_one_per_row or _every_row_kept(weight, amount)) for amount in grid
        ])  # fmt: skip
    total = sum(weight.numel() for weight in weights.values())
    keep = total - math.ceil(sparsity * total - 1e-6)
    smallest = sum(min((c for c, a in zip(*pair) if a), default=total + 1) for pair in zip(costs, allowed))
    if smallest > keep:
        most = max(0.0, 1 - smallest / total)
        raise BudgetError(f"sparsity {sparsity:g} is out of reach: the allowed amounts reach at most {most:.4f}")
    distortions = [np.asarray(curves[name], dtype=np.float64) for name in weights]
    choice = solve_dynamic(costs, distortions, keep, allowed=allowed).choice
    return {name: grid[int(index)] for name, index in zip(weights, choice)}


def _every_row_kept(weight: Tensor, amount: float) -> bool:
    return bool(magnitude_mask(weight, amount).any(1).all())


@register(
    "rd-prune",
    acts_on="compress",
    paper="2308.10438",
    description="layer-wise magnitude pruning; the amounts are chosen jointly by rate and distortion",
)
class MagnitudePruning(Compressor):
    """The weights of largest magnitude, stored sparse with fp16 or integer values."""

    name = "rd-prune"
    keeps_zeros = True

    def offers(self, layer: LayerView) -> list[dict[str, Any]]:
        """Of a weight pruned already: its own zeros with more bits for the others, and more zeros."""
        pruned = 0.0 if layer.kept is None else 1 - float(layer.kept.double().mean())
        own = [{"amount": pruned, "value_bits": bits} for bits in (3, 4, 6, 8)] if pruned else []
        more = [a for a in (0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5) if a > pruned and (own or a < 0.98)]
        return [*({"amount": amount, "value_bits": 4} for amount in more), *own]

    def compress(self, layer: LayerView, amount: float = 0.5, value_bits: int = 8) -> Sparse:
        """amount: fraction of the weights removed, 0..1; value_bits: 16 for fp16 values, 2..8 for integers.

        Raises `WeightError` for an amount out of range, and on numbers that are not finite.
        """
        require_finite(layer)
        if not 0 <= amount <= 1:
            raise WeightError(f"{layer.name}: a pruning amount of {amount} is not within 0..1")
        return Sparse.encode(layer.weight, magnitude_mask(layer.weight, amount), value_bits)


def layer_curve(layer: LayerView, grid: Sequence[float] = GRID) -> list[float]:
    """The layer's d_l: on the model's output where the view can measure that, else the layer's own distortion."""
    return prune_curve(layer.weight, layer.distortion if layer.measure is None else layer.measure, grid)
