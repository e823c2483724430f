"""GPTQ on an unbounded uniform grid whose codes are entropy-coded.

GPTQ's error feedback (2210.17323) does not care for the grid. Fixed-width integers spend b bits on every weight and
0.25-0.5 more on group scales; a plain uniform grid followed by an ideal entropy coder spends close to the least there
is (within 0.25 bit a weight of the rate-distortion bound at high rates, less at low ones: Gish and Pierce 1968), and
any size can be had by turning one knob, the step:

    value = code * step * rms(W) * row[r] * column[j],      code any integer, range-coded

High-rate theory sets the multipliers. Column j contributes step^2/12 * column[j]^2 * d_j to a row's error, d_j =
1/U_jj^2 being what error feedback leaves of H_jj; the sum is least, at a given rate, when all terms are equal:
column[j] ~ d_j^-1/2. In the same way row[r] ~ row_weight[r]^-1/2: outputs the model is sensitive to, or words that
occur often, get a finer grid. (`columns=False` drops column[j]: small layers cannot pay for it.) Multipliers have
geometric mean one. One `step` for all layers of equal d would be the optimum of a whole model; the planner finds it.
Zeros of a pruned weight keep the code 0, which range coding stores in next to nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats import Integer, PackedWeight
from ..registry import register
from .contract import Candidate, Compressor, Fit, LayerView
from .error_feedback import Factor, by_group, feedback_uniform

#: Steps in units of the weight's root mean square: from next to nothing (6) to half precision's own accuracy (0.006).
STEPS = (6.0, 4.2, 3.0, 2.2, 1.6, 1.15, 0.8, 0.56, 0.4, 0.28, 0.2, 0.14, 0.1, 0.05, 0.015, 0.006)

#: Before those, for pruned weights, whose few values lie far above their root mean square.
COARSER = (48.0, 24.0, 12.0)

#: A row's (column's) grid is at most this many times coarser or finer than the layer's: the theory ends where codes
# are all zero.
SPREAD = 8.0

_CHUNK_VALUES = 1 << 19
_FIT_ROUNDS = 9
_COARSEST = math.log(1e4)  # of steps tried, as a logarithm: all codes are zero long before


def multipliers(weight: Tensor) -> Tensor:
    """weight^-1/2 with geometric mean one, within a factor `SPREAD`; dead entries (weight 0) get the coarsest grid."""
    alive = weight > 0
    if not bool(alive.any()):
        return torch.ones_like(weight, dtype=torch.float32)
    log = -0.5 * torch.log(torch.where(alive, weight, weight[alive].min()).double())
    log = (log - log[alive].mean()).clamp(-math.log(SPREAD), math.log(SPREAD))
    return log.exp().float()


@register(
    "entropy-gptq",
    acts_on="compress",
    paper="2210.17323",
    description="error feedback on a uniform grid of any step, codes range-coded: any size",
    combines_with=("recover",),
)
class EntropyGPTQ(Compressor):
    """Options: step (units of the weight's rms; half the step costs one more bit a weight), columns, damping."""

    name = "entropy-gptq"
    keeps_zeros = True

    def offers(self, layer: LayerView) -> list[dict[str, Any]]:
        choices = (True, False) if layer.rows * layer.cols < 65536 else (True,)
        if layer.groups > 1:
            choices = (False,)
        steps = STEPS if layer.kept is None else (*COARSER, *STEPS)
        return [{"step": step, "columns": columns} for columns in choices for step in steps]

    def candidates(self, layer: LayerView) -> Iterator[Candidate]:
        factors = list(by_group(layer, 0.01, True))
        offers = self.offers(layer)
        for columns in sorted({o["columns"] for o in offers}):
            steps = [o["step"] for o in offers if o["columns"] == columns]
            for step, packed in zip(steps, self._ladder(layer, factors, steps, columns)):
                yield self.candidate(layer, {"step": step, "columns": columns}, packed)

    def compress(self, layer: LayerView, *, step: float, columns: bool = True, damping: float = 0.01) -> PackedWeight:
        return next(self._ladder(layer, list(by_group(layer, damping, True)), [step], columns))

    def fit(self, layer: LayerView, options: Mapping[str, Any], nbytes: int, tolerance: float = 0.003) -> Fit:
        """The finest grid found with at most `nbytes`, and at least 1 - tolerance of them where that is reachable."""
        columns, damping = options.get("columns", True), options.get("damping", 0.01)
        factors = list(by_group(layer, damping, True))
        target = nbytes * (1 - tolerance / 2)
        fits: tuple[float, float, PackedWeight] | None = None  # (log step, step, packed), the largest known to fit
        over: tuple[float, float, PackedWeight] | None = None  # the latest known not to
        larger: float | None = None
        at = math.log(float(options["step"]))
        for attempt in itertools.count():
            if attempt >= _FIT_ROUNDS and (fits or at > _COARSEST):
                break
            step = float(f"{math.exp(at):.6g}")
            packed = next(self._ladder(layer, factors, [step], columns))
            if packed.nbytes > nbytes:
                over = at, step, packed
                larger = min(larger or step, step)
            elif fits is None or packed.nbytes > fits[2].nbytes:
                fits = at, step, packed
            if fits and fits[2].nbytes >= (1 - tolerance) * nbytes:
                break
            if fits and over:  # between the two: regula falsi, kept off the ends
                share = math.log(target / fits[2].nbytes) / math.log(over[2].nbytes / fits[2].nbytes)
                at = fits[0] + min(max(share, 0.1), 0.9) * (over[0] - fits[0])
            else:  # one more bit a weight for half the step
                bits = (target - packed.nbytes) * 8 / layer.weight.numel()
                change = bits * math.log(2) * (1.0 if bits > 0 else 1.5)
                at -= min(change, 0.7) if bits > 0 else max(min(change, -0.01), -0.7)
        _, step, packed = fits or over or (at, step, packed)
        missed = fits and packed.nbytes < (1 - tolerance) * nbytes  # codes too few for a table: whole bits a weight
        return Fit(packed, {**options, "step": step}, {**options, "step": larger} if missed and larger else None)

    def _ladder(
        self, layer: LayerView, factors: list[tuple[slice, Factor]], steps: list[float], columns: bool
    ) -> Iterator[PackedWeight]:
        """One packed weight a step. Small layers go through the column loop with all their steps stacked as rows."""
        rows, cols = layer.weight.shape
        unit = float(torch.linalg.vector_norm(layer.weight, dtype=torch.float64)) / math.sqrt(max(1, rows * cols))
        column = torch.ones(cols)
        if columns and layer.groups == 1:
            column = multipliers(factors[0][1].conditional_variance.double().masked_fill(factors[0][1].dead, 0))
            column = Integer.round_scale(column, "log8")
        row = multipliers(layer.row_weight)
        if not unit:
            unit = 1.0
        together = max(1, _CHUNK_VALUES // max(1, rows * cols))
        for first in range(0, len(steps), together):
            ladder = steps[first : first + together]
            scales = [Integer.round_scale((row * (unit * step))[:, None], "log8")[:, 0] for step in ladder]
            codes = self._codes(layer, factors, scales, column)
            for code, scale in zip(codes, scales):
                yield _pack(layer, code, scale, column, columns and layer.groups == 1)

    def _codes(
        self, layer: LayerView, factors: list[tuple[slice, Factor]], scales: list[Tensor], column: Tensor
    ) -> Tensor:
        """int16 [steps, rows, cols]."""
        rows, cols = layer.weight.shape
        codes = torch.empty((len(scales), rows, cols), dtype=torch.int16)
        for group_rows, factor in factors:
            step = max(1, _CHUNK_VALUES // (cols * len(scales)))
            for first in range(group_rows.start, group_rows.stop, step):
                part = slice(first, min(first + step, group_rows.stop))
                stacked = layer.weight[part].repeat(len(scales), 1)
                row = torch.cat([s[part] for s in scales])
                kept = None if layer.kept is None else layer.kept[part].repeat(len(scales), 1)
                codes[:, part] = feedback_uniform(stacked, factor, row, column, kept).view(len(scales), -1, cols)
        return codes


def _pack(layer: LayerView, codes: Tensor, scale: Tensor, column: Tensor, columns: bool) -> PackedWeight:
    largest = max(int(codes.max()), -int(codes.min()) - 1, 0) if codes.numel() else 0
    bits = max(1, largest.bit_length() + 1)
    return Integer.from_codes(
        codes,
        scale[:, None],
        bits=bits,
        group=0,
        scale_coding="log8",
        column_scale=column if columns else None,
    )
