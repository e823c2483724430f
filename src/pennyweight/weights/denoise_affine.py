"""Denoising affine transform: rounding and sparsity as noise, undone by a ridge regression that gradients flow through.

Robust Training of Neural Networks at Arbitrary Precision and Sparsity, arXiv 2409.09245. For each block x of N numbers
along the last axis:

    xS = x + stop(keep(x) - x)                                    keep: the largest magnitudes, the others 0
    f  = (xS - min xS) / ((max xS - min xS) / (2^b - 1))          affine
         xS / (max |xS| / (2^(b-1) - 1))                          linear
         xS / mean |x|                                            ternary, and linear at one bit
    q  = f + stop(round(f) - f), clamped to the codes             linear at one bit: sign in place of round
    affine   s = Cov(x, q) / (Var(q) + lam),        y = s (q - mean q) + mean x
    linear   s = <x, q> / (<q, q> + N lam),         y = s q

The regression's target is the dense x. Nothing is detached but the noise: s, both means and f's parameters are in the
graph, which keeps two identities of the forward in the gradient, sum x dL/dx = sum y dL/dy and (affine) sum dL/dx =
sum dL/dy. backward="straight-through" is the ablation: the same y with the gradient of the identity.

What follows from it: mean y = mean x; with lam = 0, no other affine dequantiser of these codes has a smaller error;
lam -> infinity gives the block's mean; a constant block is itself. lam acts in units of codes, so it matters at 1 to 2
bits and hardly at 8. At one bit the affine threshold is the middle of the range, which an outlier moves: blocks are
small (128) for that reason.

Our reading where the public text is silent: min-max f; N lam in the linear form; unstructured sparsity takes its share
of each block, so that no statistic leaves a block. Departure of the weights' adapter: s and the offset, mean x - s mean
q, are rounded to float16's precision, as a file keeps them, with the gradient of the identity: what trains is stored.

Sub-one-bit: one bit at 2:4 halves the products, but a file must say where they are too: three codes, about 1.5 bits a
weight after entropy coding. Temporal: a code in 0..T is the sum of T binary spikes (`spikes`), so that a layer is T
binary products and equals the layer of codes exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..estimators import make_estimator, through
from ..formats import Binary, Integer, PackedWeight
from ..registry import register
from .base import WeightTransform, require_finite
from .stored_scale import as_stored

Bits = int | Literal["ternary"]
Mode = Literal["affine", "linear"]
Backward = Literal["error-aware", "straight-through"]
Sparsity = str | float | None

# Keeps the division by the range of a constant block finite; far below any range that float32 weights have.
SMALLEST_RANGE = 1e-12

_SPARSITY = "write it in quotes as '2:4' (two of every four stay), or as the share below 1 that goes"


def kept(x: Tensor, sparsity: Sparsity) -> Tensor:
    """bool, shape of x: which entries of each block (last axis) stay.

    sparsity: "n:m" keeps the n largest magnitudes of every m consecutive entries (up to n of a shorter rest); a number
    is the share that goes. Of equal magnitudes the first stays.
    """
    if sparsity is None:
        return torch.ones_like(x, dtype=torch.bool)
    length = x.shape[-1]
    if isinstance(sparsity, str):
        keep, group = _pattern(sparsity)
        size = torch.nn.functional.pad(x.detach().abs(), (0, -length % group), value=-1.0).unflatten(-1, (-1, group))
    else:
        size = x.detach().abs().unsqueeze(-2)
        keep = length - int(sparsity * length)
    rank = torch.argsort(size, dim=-1, descending=True, stable=True).argsort(-1)
    return (rank < keep).flatten(-2)[..., :length]


def _pattern(sparsity: str) -> tuple[int, int]:
    keep, separator, group = sparsity.partition(":")
    if not (separator and keep.isdigit() and group.isdigit() and 0 < int(keep) < int(group)):
        raise PlanError(f"denoise-affine: sparsity is {sparsity!r}; {_SPARSITY}")
    return int(keep), int(group)


def prequantise(x: Tensor, bits: Bits, mode: Mode, sparsity: Sparsity = None) -> Tensor:
    """f of each block of x [..., N], within the range of the codes; what is left is to round (or sign) it.

    bits: 1 to 8, or "ternary". Affine codes are 0 .. 2^bits - 1 (ternary 0, 1, 2), linear ones
    -(2^(bits-1) - 1) .. 2^(bits-1) - 1 (ternary -1, 0, 1; at one bit signs, which need no range).
    """
    sparse = x if sparsity is None else through(x, x * kept(x, sparsity), x.new_ones(()))
    if bits == "ternary":
        f = (sparse / (x.abs().mean(-1, keepdim=True) + SMALLEST_RANGE)).clamp(-1, 1)
        return f + 1 if mode == "affine" else f
    if mode == "affine":
        low, most = sparse.amin(-1, keepdim=True), 2**bits - 1
        return ((sparse - low) / ((sparse.amax(-1, keepdim=True) - low) / most + SMALLEST_RANGE)).clamp(0, most)
    if bits == 1:
        return sparse / (x.abs().mean(-1, keepdim=True) + SMALLEST_RANGE)
    most = 2 ** (bits - 1) - 1
    return (sparse / (sparse.abs().amax(-1, keepdim=True) / most + SMALLEST_RANGE)).clamp(-most, most)


def scale_and_offset(x: Tensor, codes: Tensor, lam: float, mode: Mode) -> tuple[Tensor, Tensor | None]:
    """The ridge regression of blocks x [..., N] on their codes: (s, mean x - s mean q), [..., 1]; linear: (s, None)."""
    if mode == "linear":
        return (x * codes).mean(-1, keepdim=True) / (codes.square().mean(-1, keepdim=True) + lam), None
    mean_x, mean_q = x.mean(-1, keepdim=True), codes.mean(-1, keepdim=True)
    centred = codes - mean_q
    scale = ((x - mean_x) * centred).mean(-1, keepdim=True) / (centred.square().mean(-1, keepdim=True) + lam)
    return scale, mean_x - scale * mean_q


def spikes(codes: Tensor, steps: int) -> Tensor:
    """bool [steps, *codes.shape], whose sum over the first axis is codes (whole numbers 0 .. steps)."""
    time = torch.arange(steps, device=codes.device).view(-1, *[1] * codes.ndim)
    return codes > time


def in_blocks(function: Callable[..., Tensor], block: int, *tensors: Tensor) -> Tensor:
    """`function` of the blocks [..., blocks, block] of tensors [..., cols] along the last axis; the last can be short.

    block 0: the whole axis is one block. The function keeps its arguments' shape, or makes the last axis 1: then the
    result is [..., number of blocks].
    """
    cols = tensors[0].shape[-1]
    if block == 0 or block >= cols:
        return function(*tensors)
    whole = cols - cols % block
    parts = [function(*(t[..., :whole].unflatten(-1, (-1, block)) for t in tensors)).flatten(-2)]
    if whole < cols:
        parts.append(function(*(t[..., whole:] for t in tensors)))
    return torch.cat(parts, -1)


class Denoiser(nn.Module):
    """What weights and activations share: x [..., cols] -> y, block by block; dtype of x, computed in float32 at least.

    stored: round scale and offset to the precision of files. Raises `PlanError` on settings without a meaning.
    """

    def __init__(
        self,
        bits: Bits,
        lam: float = 0.01,
        block: int = 128,
        mode: Mode | None = None,
        sparsity: Sparsity = None,
        backward: Backward = "error-aware",
        stored: bool = False,
    ) -> None:
        super().__init__()
        if bits != "ternary" and bits not in range(1, 9):
            raise PlanError(f"denoise-affine: bits is {bits!r}; choose 1 to 8 or 'ternary'")
        if not lam > 0:
            raise PlanError(f"denoise-affine: lam is {lam}; it must be positive (constant blocks give NaN at 0)")
        if block < 0:
            raise PlanError(f"denoise-affine: block is {block}; it is a number of columns, or 0 for all of them")
        if isinstance(sparsity, str):
            _pattern(sparsity)
        elif sparsity is not None and not 0 < sparsity < 1:
            raise PlanError(f"denoise-affine: sparsity is {sparsity}; {_SPARSITY}")
        # Codes that have a zero keep it under the linear form only.
        self.mode: Mode = mode or ("linear" if bits == "ternary" or sparsity is not None else "affine")
        if self.mode not in ("affine", "linear"):
            raise PlanError(f"denoise-affine: mode is {mode!r}; choose 'affine' or 'linear'")
        if backward not in ("error-aware", "straight-through"):
            raise PlanError(f"denoise-affine: backward is {backward!r}; choose 'error-aware' or 'straight-through'")
        self.bits: Bits = bits
        self.lam, self.block, self.sparsity, self.backward, self.stored = lam, block, sparsity, backward, stored
        self.signs = bits == 1 and self.mode == "linear"
        self.step = make_estimator("identity" if self.signs else "round")

    def codes(self, x: Tensor) -> Tensor:
        """q of x [..., cols] (float32 or wider), differentiable."""
        q = self.step(in_blocks(lambda part: prequantise(part, self.bits, self.mode, self.sparsity), self.block, x))
        if self.signs and self.sparsity is not None:
            mask = in_blocks(lambda part: kept(part, self.sparsity), self.block, x)
            q = through(q, q * mask, q.new_ones(()))
        return q

    def scale_and_offset(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of blocks x, codes [..., N], as `forward` uses them."""
        scale, offset = scale_and_offset(x, codes, self.lam, self.mode)
        if not self.stored:
            return scale, offset
        return as_stored(scale), None if offset is None else as_stored(offset)

    def forward(self, x: Tensor) -> Tensor:
        def values(part: Tensor, codes: Tensor) -> Tensor:
            scale, offset = self.scale_and_offset(part, codes)
            return codes * scale if offset is None else codes * scale + offset

        wide = x.float() if x.dtype.itemsize < 4 else x
        y = in_blocks(values, self.block, wide, self.codes(wide)).to(x.dtype)
        return y if self.backward == "error-aware" else through(x, y, x.new_ones(()))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, mode={self.mode}, block={self.block}, lam={self.lam}, sparsity={self.sparsity}"


@register(
    "denoise-affine",
    acts_on="weights",
    paper="2409.09245",
    description="1 to 8 bits, ternary, sparse: dequantised by a ridge regression inside the graph",
)
class DenoisedWeight(WeightTransform):
    """Weights [outputs, ...] quantised and denoised in blocks of consecutive weights of an output.

    bits: 1 to 8 or "ternary". mode: "affine", "linear", or None: linear where ternary or sparse, else affine. sparsity:
    "2:4" (any n:m) or the share of each block that goes. Raises `PlanError` on other values.
    """

    discrete: ClassVar[bool] = True

    def __init__(
        self,
        bits: Bits = 1,
        lam: float = 0.01,
        block: int = 128,
        mode: Mode | None = None,
        sparsity: Sparsity = None,
        backward: Backward = "error-aware",
    ) -> None:
        super().__init__()
        self.denoiser = Denoiser(bits, lam, block, mode, sparsity, backward, stored=True)

    def fit(self, weight: Tensor) -> None:
        require_finite(weight)

    def forward(self, weight: Tensor) -> Tensor:
        return self.denoiser(weight.flatten(1)).view_as(weight)

    @torch.no_grad()
    def packed(self, weight: Tensor) -> PackedWeight:
        """Codes with a scale and, affine, an offset for each block: `forward`, bit for bit as far as float16 with one
        exponent for all scales (and one for all offsets) reaches: 29 octaves from the largest down.

        Raises `WeightError` if the weight is not finite.
        """
        require_finite(weight)
        rows, how = weight.detach().flatten(1).float(), self.denoiser
        block = how.block if how.block < rows.shape[1] else 0
        codes = how.codes(rows)
        scale = in_blocks(lambda *part: how.scale_and_offset(*part)[0], block, rows, codes)
        if how.signs and how.sparsity is None:
            return Binary.from_signs(codes >= 0, scale, block)
        # Signs with zeros among them are three codes.
        bits = 2 if how.signs or how.bits == "ternary" else how.bits
        offset = None
        if how.mode == "affine":
            offset = in_blocks(lambda *part: cast(Tensor, how.scale_and_offset(*part)[1]), block, rows, codes)
        return Integer.from_codes(codes.int(), scale, offset, bits=bits, group=block)
