"""Affine quantiser of activations (and of weight rows) with a learnable range and zero point.

Source: Improving Post Training Neural Quantization, arXiv 2006.10518, section 3. With range r, zero point z (the real
number the lowest code stands for), b bits, qmin = -2^(b-1) and qmax = qmin + 2^b - 1:

    D  = clamp(r, 1e-6, 1e5) / (2^b - 1)
    zi = clamp(round(qmin - z / D), qmin, qmax)
    q  = round(clamp(x / D + zi, qmin, qmax))        forward:  x_q = (q - zi) D

Backward: `round` passes the gradient unchanged (straight-through), `clamp` has its true gradient, so x, r and z all
learn. zi is an integer in [qmin, qmax], hence 0 is always represented exactly: zero padding and ReLU stay exact.

Departure: beside the paper's starting range (minimum and maximum of each sample, averaged) there is one that clips to
the smallest squared error. It is the default: at 4 bits the averaged extremes waste most of the codes on rare values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import DataError

RangeMethod = Literal["squared_error", "extremes"]

SMALLEST_RANGE, LARGEST_RANGE = 1e-6, 1e5
# Shares of the full range that the squared-error search tries for each end of the interval.
CLIPPING_GRID = tuple(1 - 0.04 * i for i in range(23))
# Values looked at by the search over one activation tensor; more do not move the optimum.
SEARCH_SAMPLE = 1 << 16


class _RoundThrough(torch.autograd.Function):
    """round(x) exactly; the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def round_through(x: Tensor) -> Tensor:
    """Round half to even, with the gradient of the identity."""
    return _RoundThrough.apply(x)


def affine_grid(r: Tensor, z: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step D and integer zero zi of the quantiser; both have the shape of r and are differentiable in r and z."""
    lowest = -(2 ** (bits - 1))
    step = r.clamp(SMALLEST_RANGE, LARGEST_RANGE) / (2**bits - 1)
    return step, round_through(lowest - z / step).clamp(lowest, lowest + 2**bits - 1)


class _OnGrid(torch.autograd.Function):
    """(round(clamp(x / step + zero)) - zero) step, in few passes over x; gradients as the module docstring has them.

    With u = x / step + zero, inside = [qmin <= u <= qmax] and q the code:
        d x = g inside,   d step = sum g (q - zero - inside x / step),   d zero = sum g (inside - 1) step
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x, step, zero)
        ctx.bits = bits
        lowest = -(2 ** (bits - 1))
        codes = (x / step).add_(zero).clamp_(lowest, lowest + 2**bits - 1).round_()
        return codes.sub_(zero).mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, step, zero = ctx.saved_tensors
        g, lowest = gradients[0], -(2 ** (ctx.bits - 1))
        u = (x / step).add_(zero)
        inside = (u >= lowest) & (u <= lowest + 2**ctx.bits - 1)
        dx = g * inside
        dstep = dzero = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            # q - zero - inside x / step is the rounding error inside, and the end of the grid outside.
            q = u.clamp(lowest, lowest + 2**ctx.bits - 1).round_()
            dstep = q.sub_(torch.where(inside, u, zero)).mul_(g).sum_to_size(step.shape)
            dzero = ((dx - g).sum_to_size(zero.shape)) * step
        return dx, dstep, dzero, None


def affine_quantize(x: Tensor, r: Tensor, z: Tensor, bits: int) -> Tensor:
    """x on the grid of at most 2^bits values that (r, z) span; formulas in the module docstring.

    x: any shape. r, z: broadcast against x (scalars: per tensor; [rows, 1]: per row of a weight matrix). bits: 1..16.
    """
    step, zero = affine_grid(r, z, bits)
    return _OnGrid.apply(x, step, zero, bits)


def interval(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(r, z) of the interval [low, high] widened to contain 0; range 1 where it is empty."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    r = high - low
    return torch.where(r > 0, r, torch.ones_like(r)), low


def row_intervals(
    weight: Tensor, bits: int, method: RangeMethod = "squared_error", importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per-row range and zero point, each [..., 1], for a tensor [..., cols] whose last axis shares one quantiser.

    method: "extremes" takes each row's minimum and maximum; "squared_error" tries shrunken ends and keeps the pair of
    the smallest squared error, weighted by `importance` (broadcasts against weight) where given.
    """
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    best_r, best_z = interval(low, high)
    if method == "extremes":
        return best_r, best_z

    def error(r: Tensor, z: Tensor) -> Tensor:
        squared = (affine_quantize(weight, r, z, bits) - weight).square()
        return (squared if importance is None else squared * importance).sum(-1, keepdim=True)

    best = error(best_r, best_z)
    # First both ends together, then each alone around what was found: a coordinate search instead of the full grid.
    for end in ("both", "low", "high", "low", "high"):
        start_low, start_high = best_z, best_z + best_r
        for share in CLIPPING_GRID[1:]:
            r, z = interval(
                start_low * share if end != "high" else start_low, start_high * share if end != "low" else start_high
            )
            trial = error(r, z)
            better = trial < best
            best, best_r, best_z = (
                torch.where(better, trial, best),
                torch.where(better, r, best_r),
                torch.where(better, z, best_z),
            )
    return best_r, best_z


class ActivationQuantizer(nn.Module):
    """Quantises its input per tensor to `bits` bits. Parameters: `range` and `zero`, scalars in the input's units.

    As made it spans [0, 1]; `calibrate` sets it from data. A module that owns one as `input_quantizer` applies it to
    its first positional input (`attach_input_quantizer`).
    """

    range: nn.Parameter
    zero: nn.Parameter

    def __init__(self, bits: int, range: float = 1.0, zero: float = 0.0) -> None:
        super().__init__()
        if not 1 <= bits <= 16:
            raise ValueError(f"activation bits must be 1..16, not {bits}")
        self.bits = bits
        self.range = nn.Parameter(torch.tensor(float(range)))
        self.zero = nn.Parameter(torch.tensor(float(zero)))

    def forward(self, x: Tensor) -> Tensor:
        return affine_quantize(x, self.range.to(x.dtype), self.zero.to(x.dtype), self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range={self.range.item():.4g}, zero={self.zero.item():.4g}"

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], method: RangeMethod = "squared_error") -> ActivationQuantizer:
        """Set range and zero from tensors [samples, ...] and return self.

        "extremes": minimum and maximum of every sample, averaged over the batch, then over batches (the paper's).
        "squared_error": the interval of the smallest squared error on a fixed random sample of the values.
        Raises DataError if there is no batch or a value is not finite.
        """
        generator = torch.Generator().manual_seed(0)
        lows, highs, values = [], [], []
        for batch in batches:
            samples = batch.detach().float().flatten(1) if batch.dim() > 1 else batch.detach().float()[:, None]
            if not torch.isfinite(samples).all():
                raise DataError(
                    "activation quantiser: the calibration data holds NaN or infinity; remove those samples"
                )
            lows.append(samples.amin(1).mean())
            highs.append(samples.amax(1).mean())
            if method == "squared_error":
                # Random places: an even stride can fall in step with the rows of an image and see its border only.
                places = torch.randint(samples.numel(), (min(SEARCH_SAMPLE, samples.numel()),), generator=generator)
                values += [samples.flatten()[places], torch.stack(torch.aminmax(samples))]
        if not lows:
            raise DataError("activation quantiser: the calibration data is empty; pass at least one batch")
        if method == "squared_error":
            sample = torch.cat(values)
            ends = torch.stack(torch.aminmax(sample))  # must stay in sight: the search looks inside them only
            kept = torch.randperm(sample.numel(), generator=generator)[:SEARCH_SAMPLE]
            sample = torch.cat([sample[kept], ends])
            r, z = row_intervals(sample, self.bits)
        else:
            r, z = interval(torch.stack(lows).mean(), torch.stack(highs).mean())
        self.range.copy_(r.squeeze())
        self.zero.copy_(z.squeeze())
        return self

    @torch.no_grad()
    def project(self) -> None:
        """Put range and zero back where their gradients live (range positive, 0 inside) after an optimiser's step."""
        self.range.clamp_(SMALLEST_RANGE, LARGEST_RANGE)
        self.zero.copy_(torch.maximum(self.zero, -self.range).clamp(max=0))


def _quantize_first_input(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.input_quantizer(inputs[0]), *inputs[1:])


def attach_input_quantizer(module: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Make `quantizer` the submodule `module.input_quantizer`, applied to the module's first positional input."""
    detach_input_quantizer(module)
    module.input_quantizer = quantizer
    module.register_forward_pre_hook(_quantize_first_input)


def detach_input_quantizer(module: nn.Module) -> ActivationQuantizer | None:
    """Undo `attach_input_quantizer`; returns the quantiser, or None if there was none."""
    quantizer = getattr(module, "input_quantizer", None)
    if quantizer is None:
        return None
    del module.input_quantizer
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _quantize_first_input:
            del module._forward_pre_hooks[key]
    return quantizer
