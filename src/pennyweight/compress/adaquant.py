"""AdaQuant: tune a layer's weights, bias, ranges and zero points by gradient descent on the layer's own output.

Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming, arXiv 2006.10518.

For a layer with weight W [rows, cols], bias b, inputs X and float outputs Y = X W^T + b, find what minimises

    mean ( Q_x(X) Q_w(V)^T + b' - Y )^2     over V (starting at W), b', and range and zero point of Q_w (a row, or a
                                            group of columns in a row) and of Q_x (a tensor)

Q is the affine quantiser of layers/activation_quantizer.py; rounding passes gradients straight through, so V may move
by more than one step. X are the float inputs ("parallel": layers are independent) or those that the already quantised
layers before it produce ("sequential": their errors are mended too); Y is the float output either way.

Weights alone need no inputs: with E = Q_w(V) - W the objective is tr(E H E^T), H = X^T X / n, whose gradient is 2 E H.
That is the compressor `adaquant`. `adaquant(model, data)` quantises the inputs of layers as well, on samples of rows.

Departures. Learning rates are relative: to W's mean step, to each range, to the spread of Y; the released
rates fit 8 bits and ranges near 1. Ranges are optimised through their logarithm and so stay positive. Rates fall along
a cosine. The best iterate is kept (a row at a time for weights alone), so the objective never rises. A last, optional
step distils the whole network against the float one on the same data, without labels (the paper tunes biases only).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from ..errors import DataError, PlanError, UnknownNameError
from ..formats import PackedWeight
from ..formats.integer import Integer
from ..layers.activation_quantizer import (
    ActivationQuantizer,
    RangeMethod,
    affine_grid,
    affine_quantize,
    attach_input_quantizer,
    row_intervals,
)
from ..layers.sites import WeightSite, weight_sites
from ..registry import register
from .capture import patches
from .contract import Compressor, LayerView
from .data import Call, calls
from .groups import require_finite
from .norms import distil
from .observe import evaluating

# Input rows kept of a layer; 16,384 rows of a 3x3 convolution over 64 channels are 38 MB.
SAMPLED_ROWS = 1 << 14
# Samples of a convolution's input that are unfolded at once.
SAMPLES_UNFOLDED = 32
# Rows in a step: about what 50 samples (the paper's batch) give at the 16 positions kept of each.
ROWS_PER_STEP = 512


_Kept = tuple[Tensor, list[Tensor]]  # error of each row, and the variables it belongs to


class AffineWeight(nn.Module):
    """Parametrisation of a weight by its quantised value; the float weight behind it is V.

    The weight is read as a matrix [rows, cols], each row cut into groups of `group` columns (0: whole row) with one
    range and zero point each. Range = unit * exp(log_range), zero point = unit * relative_zero, both [rows, groups, 1].
    """

    unit: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        group: int = 0,
        method: RangeMethod = "extremes",
        importance: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.group, self.cols = bits, group, weight.flatten(1).shape[1]
        columns = self.in_groups(weight.detach())
        weighting = None if importance is None else self.in_groups(importance.expand_as(weight.flatten(1)))
        r, z = row_intervals(columns, bits, method, weighting)
        self.register_buffer("unit", r)
        self.log_range = nn.Parameter(torch.zeros_like(r))
        self.relative_zero = nn.Parameter(z / r)

    def in_groups(self, weight: Tensor) -> Tensor:
        """[rows, groups, group], the last group filled up with zeros (which every grid holds exactly)."""
        matrix = weight.flatten(1)
        size = self.group or self.cols
        count = -(-self.cols // size)
        return F.pad(matrix, (0, count * size - self.cols)).view(matrix.shape[0], count, size)

    def span(self) -> tuple[Tensor, Tensor]:
        return self.unit * self.log_range.exp(), self.unit * self.relative_zero

    def mean_step(self) -> float:
        return float(self.span()[0].detach().mean()) / (2**self.bits - 1)

    def forward(self, weight: Tensor) -> Tensor:
        r, z = self.span()
        quantized = affine_quantize(self.in_groups(weight), r, z, self.bits)
        return quantized.flatten(1)[:, : self.cols].reshape(weight.shape)

    @torch.no_grad()
    def pack(self, weight: Tensor) -> Integer:
        """The quantised `weight` on the grid as it will be stored (steps and minima in float16).

        Codes come from the quantised values, not from V: training leaves much of V close to a rounding threshold, where
        the slightest change of the step would flip it.
        """
        step, zero = affine_grid(*self.span(), self.bits)
        scale = Integer.round_scale(step[..., 0])
        minimum = Integer.round_minimum((-(2 ** (self.bits - 1)) - zero[..., 0]) * scale)
        columns = (self.in_groups(self(weight)) - minimum[..., None]) / scale[..., None].clamp_min(1e-30)
        codes = columns.round().clamp(0, 2**self.bits - 1).flatten(1)[:, : self.cols].to(torch.int32)
        return Integer.from_codes(codes, scale, minimum, bits=self.bits, group=self.group)


# ------------------------------------------------------------------------------------- weights alone: the Hessian form


@register(
    "adaquant",
    acts_on="compress",
    paper="2006.10518",
    description="integers tuned by gradient descent on the layer's output",
    combines_with=("bias_tune", "para_normalise"),
)
class AdaQuant(Compressor):
    """Options: bits 1..8, group (columns; 0: whole row), iterations, lr_weight (in mean steps of the grid)."""

    name = "adaquant"

    def offers(self, layer: LayerView) -> list[dict[str, Any]]:
        if layer.kind == "embedding":  # its metric is nearly diagonal: errors have nothing to trade
            return []
        group = 64 if layer.cols > 96 else 0
        return [{"bits": bits, "group": group} for bits in (2, 3, 4, 5, 6, 8)]

    def compress(
        self, layer: LayerView, *, bits: int, group: int = 64, iterations: int = 100, lr_weight: float = 1e-2
    ) -> PackedWeight:
        grid, tuned = tune_weight(layer, bits=bits, group=group, iterations=iterations, lr_weight=lr_weight)
        return grid.pack(tuned)


def _row_errors(error: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """e H e^T of every row [rows], and E H, for E [rows, cols], its rows split evenly over the groups of the metric."""
    moved = torch.matmul(error.view(metric.shape[0], -1, error.shape[1]), metric).view_as(error)
    return (moved * error).sum(1), moved


@torch.no_grad()
def starting_grid(weight: Tensor, metric: Tensor, bits: int, group: int) -> AffineWeight:
    """Row by row the better of two grids: from the extremes, and of the smallest H_jj-weighted squared error."""
    diagonal = metric.diagonal(dim1=-2, dim2=-1).repeat_interleave(weight.shape[0] // metric.shape[0], 0)
    grid = AffineWeight(weight, bits, group, "squared_error", diagonal)
    extremes = AffineWeight(weight, bits, group, "extremes")
    errors = [_row_errors(g(weight) - weight, metric)[0] for g in (grid, extremes)]
    worse = (errors[1] < errors[0])[:, None, None]
    r, z = (torch.where(worse, a, b) for a, b in zip(extremes.span(), grid.span()))
    grid.unit.copy_(r)
    grid.relative_zero.copy_(z / r)
    return grid


def tune_weight(
    layer: LayerView, *, bits: int, group: int = 0, iterations: int = 100, lr_weight: float = 1e-2
) -> tuple[AffineWeight, Tensor]:
    """Minimise tr(E H E^T) over V and its grid, from `starting_grid`; returns the grid and V [rows, cols].

    The result, as packed, is no worse in any row than the start as packed.
    """
    require_finite(layer)
    weight, metric = layer.weight, layer.hessian.float()
    metric = metric / metric.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-30)
    grid = starting_grid(weight, metric, bits, group)
    start = [grid.log_range.detach().clone(), grid.relative_zero.detach().clone(), weight]
    moving = weight.clone().requires_grad_(True)
    optimizer = torch.optim.Adam(
        [
            {"params": [moving], "lr": lr_weight * grid.mean_step()},
            {"params": [grid.log_range, grid.relative_zero], "lr": 1e-3},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(iterations, 1))
    variables = [grid.log_range, grid.relative_zero, moving]
    best_errors, best = _row_errors(grid.pack(weight).decode() - weight, metric)[0], start

    def keep(errors: Tensor, now: list[Tensor], errors_before: Tensor, before: list[Tensor]) -> _Kept:
        better = errors < errors_before
        rows = [better.view(-1, *[1] * (v.dim() - 1)) for v in now]
        kept = [torch.where(row, v.detach(), old) for row, v, old in zip(rows, now, before)]
        return torch.where(better, errors, errors_before), kept

    tuned_errors, tuned = best_errors.clone(), [v.clone() for v in start]
    for _ in range(iterations):
        quantized = grid(moving)
        errors, moved = _row_errors(quantized.detach() - weight, metric)
        tuned_errors, tuned = keep(errors, variables, tuned_errors, tuned)
        optimizer.zero_grad()
        (quantized * moved).sum().backward()  # the gradient of tr(E H E^T) / 2, with one product instead of three
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for variable, value in zip(variables, tuned):
            variable.copy_(value)
        # Rounding of steps to float16 may have undone a gain.
        errors = _row_errors(grid.pack(moving).decode() - weight, metric)[0]
        for variable, value in zip(variables, keep(errors, variables, best_errors, best)[1]):
            variable.copy_(value)
    return grid, moving.detach()


# -------------------------------------------------------------------------------- weights and activations: whole models


@dataclass
class Calibrated:
    """What `adaquant` made. model: float modules holding the dequantised weights, each with an `input_quantizer`.

    packed: site name -> its integers. losses: site name -> (before, after), the layer's mean squared output error on
    its calibration rows relative to the variance of the output. distilled: the network's divergence before and after.
    """

    model: nn.Module
    packed: dict[str, Integer] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    distilled: tuple[float, float] | None = None


def adaquant(
    model: nn.Module,
    data: Any,
    weight_bits: int | Mapping[str, int] = 8,
    activation_bits: int | Mapping[str, int] = 8,
    mode: Literal["sequential", "parallel"] = "sequential",
    *,
    group: int = 0,
    keep_first_last: bool = False,
    input_bits: int = 8,
    iterations: int = 200,
    lr_weight: float = 1e-2,
    distil_steps: int = 0,
    distil_loss: Literal["kl", "mse"] = "mse",
    seed: int = 0,
) -> Calibrated:
    """Quantise weights and inputs of every Linear and Conv1d/2d/3d of a model, in place.

    model: batch norms already folded (`norms.fold_batch_norm`). data: batches as `calls` takes them, no labels.
    weight_bits, activation_bits: one number, or site name -> bits (layers not named stay float). group: columns that
    share a step, 0 for a whole row. keep_first_last: first and last layer at 8 bits. input_bits: of the first layer's
    input, which is the data itself (images have 8 bits).
    distil_steps: Adam steps on all weights, biases and ranges together against the float network's outputs at the end.
    Raises DataError if the data is empty, UnknownNameError if bits are given for a site that does not exist.
    """
    batches = calls(model, data)
    reference = _frozen_copy(model)
    order = _layers_in_order(model, batches[0])
    names = [site.name for site in order]
    if not order:
        raise DataError("adaquant: the data reaches no Linear or convolution of the model")
    widths = _widths(names, weight_bits, 8 if keep_first_last else None)
    input_widths = _widths(names, activation_bits, 8 if keep_first_last else None)
    if names[0] in input_widths:
        input_widths[names[0]] = max(input_widths[names[0]], input_bits)
    result = Calibrated(model)
    originals = {site.name: site for site in weight_sites(reference)}
    grids: dict[str, AffineWeight] = {}
    quantizers: dict[str, ActivationQuantizer] = {}
    with evaluating(model):
        for i, site in enumerate(order):
            if site.name not in widths or site.name not in input_widths:
                continue
            original = originals[site.name]
            inputs = sample_rows(reference, original, batches, seed + i)
            targets = _outputs(original, inputs)
            if mode == "sequential" and grids:
                inputs = sample_rows(model, site, batches, seed + i)
            layer = LayerProblem(site, inputs, targets, widths[site.name], input_widths[site.name], group)
            result.losses[site.name] = layer.solve(iterations, lr_weight, seed + i)
            grids[site.name], quantizers[site.name] = layer.grid, layer.quantizer
            if mode == "sequential":
                _quantise(site.module, layer.grid, layer.quantizer)
        if mode == "parallel":
            for site in order:
                if site.name in grids:
                    _quantise(site.module, grids[site.name], quantizers[site.name])
        done = [site.module for site in order if site.name in grids]
        if distil_steps:
            result.distilled = _distil(model, reference, batches, done, distil_steps, distil_loss, seed)
        for site in order:
            if site.name in grids:
                result.packed[site.name] = _finish(site, grids[site.name])
    return result


class LayerProblem:
    """One layer's weight, bias, ranges and zero points, to be fitted to its float outputs on sampled rows.

    inputs: float32 [groups, n, cols]. targets: [groups, n, rows / groups].
    """

    def __init__(
        self,
        site: WeightSite,
        inputs: Tensor,
        targets: Tensor,
        weight_bits: int,
        activation_bits: int,
        group: int = 0,
    ) -> None:
        self.inputs, self.targets = inputs, targets
        self.weight = nn.Parameter(site.matrix())
        bias = getattr(site.module, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().view(inputs.shape[0], 1, -1).clone())
        metric = torch.matmul(inputs.transpose(1, 2), inputs) / inputs.shape[1]
        self.grid = starting_grid(self.weight.detach(), metric, weight_bits, group)
        self.module = site.module
        self.site = site
        starts: list[tuple[float, ActivationQuantizer]] = []
        for method in ("squared_error", "extremes"):
            self.quantizer = ActivationQuantizer(activation_bits).calibrate([inputs.flatten(0, 1)], method)
            starts.append((self.total(), self.quantizer))
        self.quantizer = min(starts, key=lambda start: start[0])[1]

    def squared_error(self, rows: Tensor | slice, weight: Tensor) -> Tensor:
        inputs = self.quantizer(self.inputs[:, rows])
        output = torch.matmul(inputs, weight.view(inputs.shape[0], -1, weight.shape[1]).transpose(1, 2))
        if self.bias is not None:
            output = output + self.bias
        return (output - self.targets[:, rows]).square().mean()

    @torch.no_grad()
    def total(self) -> float:
        weight, n = self.grid(self.weight), self.inputs.shape[1]
        pieces = [slice(i, min(i + 4096, n)) for i in range(0, n, 4096)]
        return sum(float(self.squared_error(p, weight)) * (p.stop - p.start) for p in pieces) / n

    def solve(self, iterations: int, lr_weight: float, seed: int) -> tuple[float, float]:
        """Adam on random rows; keeps the best of five looks at all rows; stores weight and bias in the module.

        Returns the mean squared error before and after, relative to the variance of the targets.
        """
        generator = torch.Generator().manual_seed(seed)
        variance = max(float(self.targets.var(unbiased=False)), 1e-30)
        initial_range = float(self.quantizer.range.detach())
        groups: list[dict[str, Any]] = [
            {"params": [self.weight], "lr": lr_weight * self.grid.mean_step()},
            {"params": [self.grid.log_range, self.grid.relative_zero], "lr": 1e-3},
            {"params": [self.quantizer.range, self.quantizer.zero], "lr": 1e-2 * initial_range},
        ]
        if self.bias is not None:
            groups.append({"params": [self.bias], "lr": 1e-3 * variance**0.5})
        variables = [p for g in groups for p in g["params"]]
        before = best = self.total()
        kept = [v.detach().clone() for v in variables]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(iterations, 1))
        for step in range(1, iterations + 1):
            rows = torch.randint(self.inputs.shape[1], (ROWS_PER_STEP,), generator=generator)
            optimizer.zero_grad()
            (self.squared_error(rows, self.grid(self.weight)) / variance).backward()
            optimizer.step()
            schedule.step()
            self.quantizer.project()
            if step % max(iterations // 5, 1) == 0 or step == iterations:
                now = self.total()
                if now < best:
                    best, kept = now, [v.detach().clone() for v in variables]
        with torch.no_grad():
            for variable, value in zip(variables, kept):
                variable.copy_(value)
                variable.grad = None
            # The middle of each step, not V itself: see `AffineWeight.pack`.
            self.site.parameter.copy_(self.site.to_parameter(self.grid(self.weight)))
            if self.bias is not None:
                self.module.bias.copy_(self.bias.flatten())  # pyright: ignore[reportCallIssue]
        return before / variance, best / variance


def _frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def _layers_in_order(model: nn.Module, call: Call) -> list[WeightSite]:
    """Sites of Linear and (not transposed) convolution layers in the order in which they first run."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    sites: dict[nn.Module, WeightSite] = {
        site.module: site for site in weight_sites(model) if isinstance(site.module, kinds) and not site.aliases
    }
    order: dict[nn.Module, None] = {}  # a set that remembers the order

    def hook(module: nn.Module, _: Any) -> None:
        order.setdefault(module)

    handles = [module.register_forward_pre_hook(hook) for module in sites]
    try:
        with evaluating(model), torch.no_grad():
            call(model)
    finally:
        for handle in handles:
            handle.remove()
    return [sites[module] for module in order]


def _widths(names: list[str], bits: int | Mapping[str, int], ends: int | None) -> dict[str, int]:
    widths = dict.fromkeys(names, bits) if isinstance(bits, int) else dict(bits)
    for name, width in widths.items():
        if name not in names:
            raise UnknownNameError("layer", name, names)
        if not 1 <= width <= 16:
            raise PlanError(f"{name}: {width} bits asked for; adaquant takes 1 to 16")
    if ends is not None:
        widths.update({name: ends for name in (names[0], names[-1]) if name in widths})
    return widths


class _Reached(Exception):
    """Thrown from a hook once a layer's input has been seen: what comes after it need not run."""


@torch.no_grad()
def sample_rows(model: nn.Module, site: WeightSite, batches: Sequence[Call], seed: int) -> Tensor:
    """At most SAMPLED_ROWS input rows [groups, n, cols] of a layer; the same places for the same seed and shapes."""
    generator = torch.Generator().manual_seed(seed)
    share = -(-SAMPLED_ROWS // len(batches))
    found: list[Tensor] = []
    seen: list[tuple[Any, ...]] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs)
        raise _Reached

    module = site.module
    handle = module.register_forward_pre_hook(hook, prepend=True)  # before its own input quantiser, if it has one
    try:
        with evaluating(model):
            for call in batches:
                with contextlib.suppress(_Reached):
                    call(model)
                if not seen:
                    continue
                x = seen.pop()[0].float()
                for piece in x.split(SAMPLES_UNFOLDED):
                    rows = patches(module, piece) if site.kind == "conv" else piece.reshape(1, -1, piece.shape[-1])
                    places = torch.randperm(rows.shape[1], generator=generator)
                    found.append(rows[:, places[: -(-share * piece.shape[0] // x.shape[0])]])
    finally:
        handle.remove()
    return torch.cat(found, 1)


def _outputs(site: WeightSite, inputs: Tensor) -> Tensor:
    """Float outputs [groups, n, rows / groups] of a layer for input rows [groups, n, cols]."""
    weight = site.matrix().view(inputs.shape[0], -1, inputs.shape[2])
    output = torch.matmul(inputs, weight.transpose(1, 2))
    bias = getattr(site.module, "bias", None)
    return output if bias is None else output + bias.detach().float().view(inputs.shape[0], 1, -1)


def _quantise(module: nn.Module, grid: AffineWeight, quantizer: ActivationQuantizer) -> None:
    """From now on the module computes with its quantised weight and inputs; V stays behind the parametrisation."""
    parametrize.register_parametrization(module, "weight", grid, unsafe=True)
    attach_input_quantizer(module, quantizer)


def _latent(module: nn.Module) -> nn.Parameter:
    return module.parametrizations["weight"].original  # pyright: ignore


@torch.no_grad()
def _finish(site: WeightSite, grid: AffineWeight) -> Integer:
    """Take the parametrisation off, pack V, and leave the decoded weight in the module."""
    module = site.module
    packed = grid.pack(_latent(module))
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    module.weight.copy_(site.to_parameter(packed.decode()))  # pyright: ignore[reportCallIssue]
    return packed


def _distil(
    model: nn.Module,
    reference: nn.Module,
    batches: list[Call],
    layers: Sequence[nn.Module],
    steps: int,
    loss: Literal["kl", "mse"],
    seed: int,
) -> tuple[float, float]:
    """All weights, biases, ranges and zero points of the quantised layers against the float network's outputs."""
    parameters: list[dict[str, Any]] = []
    biases = [m.bias for m in layers if isinstance(m.bias, nn.Parameter)]
    if biases:
        parameters.append({"params": biases, "lr": 1e-3})
    for module in layers:
        grid: Any = module.parametrizations["weight"][0]  # pyright: ignore
        quantizer: Any = module.input_quantizer
        latent = _latent(module)
        parameters += [
            {"params": [latent], "lr": 1e-2 * grid.mean_step()},
            {"params": [grid.log_range, grid.relative_zero], "lr": 3e-4},
            {"params": [quantizer.range, quantizer.zero], "lr": 1e-3 * float(quantizer.range.detach())},
        ]

    def project() -> None:
        for module in layers:
            module.input_quantizer.project()  # pyright: ignore

    return distil(model, reference, batches, parameters, steps=steps, loss=loss, after_step=project, seed=seed)
