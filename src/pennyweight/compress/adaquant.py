"""AdaQuant: tune a layer's weights, bias, ranges and zero points by gradient descent on the layer's own output.

Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming, arXiv 2006.10518.

For a layer with weight W [rows, cols], bias b, inputs X and float outputs Y = X W^T + b, find what minimises

    mean ( Q_x(X) Q_w(V)^T + b' - Y )^2     over V (starting at W), b', and range and zero point of Q_w (a row, or a
                                            group of columns in a row) and of Q_x (a tensor)

Q is the affine quantiser of layers/activation_quantizer.py; rounding passes gradients straight through, so V may move
by more than one step. `LayerProblem` is this, on sampled rows of X; adaquant_model.py takes a whole model through it.

Weights alone need no inputs: with E = Q_w(V) - W the objective is tr(E H E^T), H = X^T X / n, whose gradient is 2 E H.
That is the compressor `adaquant`.

Departures. Learning rates are relative: to W's mean step, to each range, to the spread of Y; the released rates fit
8 bits and ranges near 1. Ranges are optimised through their logarithm and so stay positive. Rates fall along a cosine.
The best iterate is kept (a row at a time for weights alone), so the objective never rises.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats import PackedWeight
from ..formats.integer import Integer
from ..layers.activation_quantizer import ActivationQuantizer, RangeMethod, affine_grid, affine_quantize, row_intervals
from ..layers.sites import WeightSite
from ..registry import register
from .contract import Compressor, LayerView
from .groups import require_finite

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


# -------------------------------------------------------------------------------------- weights alone: the Hessian form


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


# ------------------------------------------------------------------------------ weights and activations: sampled inputs


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
        self.site, self.inputs, self.targets = site, inputs, targets
        self.module: Any = site.module
        self.weight = nn.Parameter(site.matrix())
        bias = getattr(self.module, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().view(inputs.shape[0], 1, -1).clone())
        metric = torch.matmul(inputs.transpose(1, 2), inputs) / inputs.shape[1]
        self.grid = starting_grid(self.weight.detach(), metric, weight_bits, group)
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
                self.module.bias.copy_(self.bias.flatten())
        return before / variance, best / variance
