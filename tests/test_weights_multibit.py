"""StatsQ, LSQ and the denoising affine transform as weights: card properties, gradients, stored forms."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pennyweight.errors import PlanError, WeightError
from pennyweight.formats import from_bytes
from pennyweight.weights import WeightTransform
from pennyweight.weights.denoise_affine import DenoisedWeight, Denoiser, in_blocks, kept, spikes
from pennyweight.weights.lsq import LearnedStep
from pennyweight.weights.statsq import StatisticalQuantizer, statistical_step
from pennyweight.weights.stored_scale import as_stored

DENOISED = [
    {"bits": 1},
    {"bits": 1, "sparsity": "2:4"},
    {"bits": 1, "mode": "linear"},
    {"bits": 1, "mode": "affine", "sparsity": 0.3},
    {"bits": "ternary"},
    {"bits": "ternary", "mode": "affine"},
    {"bits": 2, "block": 0},
    {"bits": 4, "block": 7},
    {"bits": 8, "sparsity": 0.5, "block": 16},
]
MAKERS = {f"statsq {bits}": lambda bits=bits: StatisticalQuantizer(bits) for bits in (1, 2, 4, 8)}
MAKERS |= {
    f"lsq {bits} {per}": lambda b=bits, p=per: LearnedStep(b, p) for bits in (2, 8) for per in ("layer", "output")
}
MAKERS |= {f"denoise {options}": lambda options=options: DenoisedWeight(**options) for options in DENOISED}


class Denoised(NamedTuple):
    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def values(self) -> Tensor:
        return self.codes * self.scale + (0 if self.offset is None else self.offset)


def denoise(x: Tensor, bits, lam: float = 0.01, mode="affine", sparsity=None) -> Denoised:
    """The last axis of x as one block."""
    denoiser = Denoiser(bits, lam, 0, mode, sparsity)
    codes = denoiser.codes(x)
    found = Denoised(codes, *denoiser.scale_and_offset(x, codes))
    assert torch.equal(denoiser(x), found.values())
    return found


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fitted(name: str, weight: Tensor) -> WeightTransform:
    transform = MAKERS[name]()
    transform.fit(weight)
    return transform


# What all of them owe.


@pytest.mark.parametrize("shape", [(6, 133), (1, 1), (4, 3, 3, 3), (5, 1)])
@pytest.mark.parametrize("name", MAKERS)
def test_stored_codes_are_those_of_the_forward_bit_for_bit(name, shape):
    weight = random(*shape)
    transform = fitted(name, weight)
    codes, scale = transform.factors(weight)
    packed = transform.packed(weight)
    assert packed is not None
    assert torch.equal(from_bytes(packed.to_bytes()).decode(), codes.detach().flatten(1))
    product = codes if scale is None else codes * scale.view(-1, *[1] * (weight.ndim - 1))
    forward = transform(weight)
    assert forward.shape == weight.shape and forward.dtype == weight.dtype
    assert torch.equal(forward, product)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_copies_and_checkpoints(name):
    layer = nn.Linear(40, 6)
    with torch.no_grad():
        layer.weight.copy_(random(6, 40))
    transform = fitted(name, layer.weight)
    parametrize.register_parametrization(layer, "weight", transform)
    x = random(3, 40, seed=1)
    y = layer(x)
    y.square().sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    assert gradient is not None and bool(torch.isfinite(gradient).all()) and bool(gradient.any())
    assert torch.equal(copy.deepcopy(layer)(x), y)
    fresh = nn.Linear(40, 6)
    parametrize.register_parametrization(fresh, "weight", fitted(name, random(6, 40, seed=9)))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), y)


@pytest.mark.parametrize("name", MAKERS)
def test_low_precision_weights_keep_their_type(name):
    weight = random(4, 48).bfloat16()
    y = fitted(name, weight)(weight)
    assert y.dtype == torch.bfloat16 and bool(torch.isfinite(y).all())


@pytest.mark.parametrize("name", MAKERS)
def test_nan_is_refused(name):
    weight = random(4, 8)
    transform = fitted(name, weight)
    weight[1, 1] = math.nan
    with pytest.raises(WeightError, match="NaN"):
        MAKERS[name]().fit(weight)
    with pytest.raises(WeightError, match="NaN"):
        transform.packed(weight)


@pytest.mark.parametrize("name", [name for name in MAKERS if not name.startswith("lsq")])
def test_equal_and_zero_weights_stay_finite(name):
    for value in (0.0, 0.25):
        weight = torch.full((3, 20), value, requires_grad=True)
        y = fitted(name, weight)(weight)
        (gradient,) = torch.autograd.grad(y.sum(), weight)
        assert bool(torch.isfinite(y).all()) and bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize(
    "make",
    [
        lambda: StatisticalQuantizer(0),
        lambda: StatisticalQuantizer(9),
        lambda: LearnedStep(1),
        lambda: LearnedStep(4, "column"),  # type: ignore[arg-type]
        lambda: DenoisedWeight(0),
        lambda: DenoisedWeight(lam=0),
        lambda: DenoisedWeight(block=-1),
        lambda: DenoisedWeight(sparsity="4:2"),
        lambda: DenoisedWeight(sparsity=124),
        lambda: DenoisedWeight(mode="quadratic"),  # type: ignore[arg-type]
        lambda: DenoisedWeight(backward="none"),  # type: ignore[arg-type]
    ],
)
def test_settings_without_a_meaning_are_refused(make):
    with pytest.raises(PlanError):
        make()


@settings(deadline=None, max_examples=100)
@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_stored_precision_is_eleven_bits_and_idempotent(value):
    x = torch.tensor(value)
    stored = as_stored(x)
    assert torch.equal(as_stored(stored), stored)
    assert abs(stored.item() - value) <= abs(value) * 2.0**-11
    if 2.0**-14 <= abs(value) <= 60000:
        assert torch.equal(stored, x.half().float())


# StatsQ.


def test_statsq_worked_row():
    row = torch.tensor([[0.2, -0.1, 0.5, -0.8]])
    levels, step = StatisticalQuantizer(2).factors(row)
    assert levels.tolist() == [[0.5, -0.5, 1.5, -1.5]] and step.item() == pytest.approx(0.4)
    assert StatisticalQuantizer(2)(row)[0].tolist() == pytest.approx([0.2, -0.2, 0.6, -0.6])
    assert StatisticalQuantizer(1)(row)[0].tolist() == pytest.approx([0.4, -0.4, 0.4, -0.4])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(0, 1000), st.sampled_from([0.125, 2.0, 64.0]))
def test_statsq_is_homogeneous_antisymmetric_and_never_zero(bits, seed, factor):
    weight, transform = random(3, 50, seed=seed), StatisticalQuantizer(bits)
    y = transform(weight)
    assert torch.equal(transform(factor * weight), factor * y)
    assert torch.equal(transform(-weight), -y)  # a random weight is on no boundary
    assert all(len(row.unique()) <= 2**bits for row in y) and bool((y != 0).all())


def test_statsq_uses_its_levels_as_the_distribution_says():
    uniform = torch.linspace(-1, 1, 100_001)[None]
    usage = torch.bincount((StatisticalQuantizer(3).factors(uniform)[0] + 4 - 0.5).int()[0]) / uniform.numel()
    assert usage.tolist() == pytest.approx([1 / 8] * 8, abs=1e-3)
    gaussian = torch.erfinv(torch.linspace(-1, 1, 100_003)[1:-1])[None] * math.sqrt(2)
    usage = torch.bincount((StatisticalQuantizer(2).factors(gaussian)[0] + 2 - 0.5).int()[0]) / gaussian.numel()
    assert usage.tolist() == pytest.approx([0.212, 0.288, 0.288, 0.212], abs=1e-3)
    assert -(usage * usage.log2()).sum().item() == pytest.approx(1.984, abs=1e-3)


def test_statsq_gradient_is_the_incoming_one_for_every_entry():
    weight = (random(4, 9) * 5).requires_grad_()
    incoming = random(4, 9, seed=2)
    (gradient,) = torch.autograd.grad(StatisticalQuantizer(2)(weight), weight, incoming)
    assert torch.equal(gradient, incoming)


def test_statsq_boundary_distance_is_the_distance_to_the_next_flip():
    transform, weight = StatisticalQuantizer(3), random(1, 200, dtype=torch.float64)
    distance, step = transform.boundary_distance(weight), statistical_step(weight, 3)
    n = 4
    boundaries = torch.arange(-n + 1, n, dtype=torch.float64)
    brute = ((weight / step).unsqueeze(-1) - boundaries).abs().amin(-1)
    torch.testing.assert_close(distance, brute)


# LSQ.


def test_lsq_is_exact_on_its_grid():
    transform = LearnedStep(4)
    transform.fit(torch.ones(2, 8))
    assert transform.step is not None
    with torch.no_grad():
        transform.step.fill_(0.25)
    grid = torch.arange(-8, 8.0).view(2, 8) * 0.25
    assert torch.equal(transform(grid), grid)
    assert torch.equal(transform(grid * 100).abs().amax(), torch.tensor(2.0))


def test_lsq_starts_from_the_mean_magnitude():
    weight = random(5, 30)
    for per, mean in (("layer", weight.abs().mean().view(1)), ("output", weight.abs().mean(1))):
        transform = LearnedStep(3, per)
        transform.fit(weight)
        torch.testing.assert_close(transform.step.detach(), 2 * mean / math.sqrt(3))


@pytest.mark.parametrize("per", ["layer", "output"])
def test_lsq_gradients_are_the_published_ones(per):
    weight = random(3, 40, dtype=torch.float64).requires_grad_()
    transform = LearnedStep(3, per)
    transform.fit(weight)
    incoming = random(3, 40, seed=1, dtype=torch.float64)
    got, got_step = torch.autograd.grad(transform(weight), (weight, transform.step), incoming)
    scaled = (weight / transform.step.detach().view(-1, 1)).detach()
    inside = (scaled >= -4) & (scaled <= 3)
    torch.testing.assert_close(got, incoming * inside)
    bracket = torch.where(inside, scaled.round() - scaled, scaled.clamp(-4, 3))
    shared = weight.numel() / transform.step.numel()
    total = (incoming * bracket).sum(1)
    expected = (total.sum().view(1) if per == "layer" else total) / math.sqrt(3 * shared)
    torch.testing.assert_close(got_step, expected)


def test_lsq_refuses_what_has_no_step():
    with pytest.raises(WeightError, match="zero"):
        LearnedStep(2).fit(torch.zeros(3, 3))
    with pytest.raises(WeightError, match="fit"):
        LearnedStep(2)(torch.ones(3, 3))
    transform, weight = LearnedStep(2, "output"), random(3, 8)
    weight[1] = 0
    transform.fit(weight)
    assert bool((transform.step > 0).all())


def test_lsq_boundary_distance_is_the_distance_to_the_next_flip():
    transform, weight = LearnedStep(2), random(1, 300, dtype=torch.float64)
    transform.fit(weight)
    scaled = weight / transform.step.detach()
    brute = (scaled.unsqueeze(-1) - torch.tensor([-1.5, -0.5, 0.5])).abs().amin(-1)
    torch.testing.assert_close(transform.boundary_distance(weight), brute)


# Denoising affine transform.


def test_denoise_worked_blocks():
    x = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    for lam, scale, values in (
        (1e-300, 1.6842, [-0.105, 1.579, 1.579, 4.947]),
        (0.01, 1.6701, [-0.0877, 1.5825, 1.5825, 4.9228]),
    ):
        found = denoise(x, 2, lam=lam)
        assert found.codes.tolist() == [0, 1, 1, 3] and found.scale.item() == pytest.approx(scale, abs=5e-5)
        assert found.values().tolist() == pytest.approx(values, abs=6e-4)
    signs = torch.tensor([0.5, -1.5, 0.2, 0.8], dtype=torch.float64)
    assert denoise(signs, 1, lam=1e-300, mode="linear").scale.item() == pytest.approx(0.75)
    assert denoise(signs, 1, lam=0.01, mode="linear").scale.item() == pytest.approx(3 / 4.04)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 2, 4, 8, "ternary"]), st.integers(0, 1000), st.floats(0.1, 10), st.floats(-3, 3))
def test_denoise_keeps_the_mean_beats_other_dequantisers_and_follows_the_scale(bits, seed, a, c):
    x = random(5, 32, seed=seed, dtype=torch.float64)
    y = denoise(x, bits).values()
    torch.testing.assert_close(y.mean(-1), x.mean(-1))
    if bits != "ternary":  # its codes depend on mean |x|, which an offset changes
        torch.testing.assert_close(denoise(a * x + c, bits).values(), a * y + c)
    torch.testing.assert_close(denoise(a * x, bits).values(), a * y)
    best = denoise(x, bits, lam=1e-15)
    residual, codes = x - best.values(), best.codes
    assert ((residual * (codes - codes.mean(-1, keepdim=True))).mean(-1).abs() < 1e-9).all()
    width = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / max(2**bits - 1 if bits != "ternary" else 2, 1)
    other = codes * width + x.amin(-1, keepdim=True)
    assert (residual.square().sum(-1) <= (x - other).square().sum(-1) + 1e-9).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_denoise_gradient_identities(bits):
    """sum x dL/dx = sum y G, and sum dL/dx = sum G: the gradient knows that the forward follows scale and offset."""
    x = random(6, 24, dtype=torch.float64).requires_grad_()
    incoming = random(6, 24, seed=4, dtype=torch.float64)
    y = denoise(x, bits).values()
    (gradient,) = torch.autograd.grad(y, x, incoming)
    torch.testing.assert_close((gradient * x).sum(-1), (incoming * y).sum(-1), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gradient.sum(-1), incoming.sum(-1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bits", ["ternary", 1, 4])
def test_linear_denoise_gradient_knows_the_scale(bits):
    x = random(6, 24, dtype=torch.float64).requires_grad_()
    incoming = random(6, 24, seed=4, dtype=torch.float64)
    y = denoise(x, bits, mode="linear").values()
    (gradient,) = torch.autograd.grad(y, x, incoming)
    torch.testing.assert_close((gradient * x).sum(-1), (incoming * y).sum(-1), rtol=1e-8, atol=1e-8)


def test_denoise_gradient_is_the_closed_form():
    """Section 4 of the card: dL/dx directly and through the codes, which f's gradient then carries on."""
    x, lam, bits = random(24, dtype=torch.float64), 0.01, 2
    incoming = random(24, seed=4, dtype=torch.float64)
    low, high = x.min(), x.max()
    q = denoise(x, bits, lam=lam).codes
    n, qc, xc, gc = len(x), q - q.mean(), x - x.mean(), incoming - incoming.mean()
    scale = (xc * qc).mean() / (qc.square().mean() + lam)
    d = qc.square().sum() + n * lam
    direct = (incoming * qc).sum() / d * qc + incoming.mean()
    dq = scale * gc + (incoming * qc).sum() * (xc - scale * qc - scale * qc) / d
    width = (high - low) / 3
    through_f = dq / width
    # f = (x - low) / width with low = min x, width = (max x - min x) / 3
    by_width = -(dq * (x - low)).sum() / width**2 / 3
    through_f[x.argmin()] += -dq.sum() / width - by_width
    through_f[x.argmax()] += by_width
    variable = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(denoise(variable, bits, lam=lam).values(), variable, incoming)
    torch.testing.assert_close(gradient, direct + through_f, rtol=1e-8, atol=1e-8)


def test_denoise_approaches_the_identity_with_bits_and_the_mean_with_lam():
    x = random(4, 64, dtype=torch.float64).requires_grad_()
    incoming = random(4, 64, seed=1, dtype=torch.float64)
    distance = []
    for bits in (1, 2, 4, 8):
        (gradient,) = torch.autograd.grad(denoise(x, bits).values(), x, incoming)
        distance.append(((gradient - incoming).norm() / incoming.norm()).item())
    assert distance == sorted(distance, reverse=True) and distance[-1] < 0.01 < 0.3 < distance[0]
    flat = denoise(x, 2, lam=1e12).values()
    torch.testing.assert_close(flat, x.mean(-1, keepdim=True).expand_as(x), rtol=1e-6, atol=1e-6)
    constant = torch.full((2, 8), 0.7, dtype=torch.float64)
    torch.testing.assert_close(denoise(constant, 2).values(), constant)


def test_straight_through_is_the_same_forward_with_the_incoming_gradient():
    weight = random(3, 200).requires_grad_()
    full, plain = DenoisedWeight(1), DenoisedWeight(1, backward="straight-through")
    incoming = random(3, 200, seed=3)
    assert torch.equal(full(weight), plain(weight))
    assert torch.equal(torch.autograd.grad(plain(weight), weight, incoming)[0], incoming)
    assert not torch.allclose(torch.autograd.grad(full(weight), weight, incoming)[0], incoming, atol=0.1)


def test_sparsity_keeps_the_largest_of_every_group():
    x = torch.tensor([[0.1, -3.0, 2.0, 0.5, 1.0, 1.0, 1.0, -1.0, 0.2, 0.1]])
    assert kept(x, "2:4").int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0, 1, 1]]
    assert kept(x, 0.7).int().tolist() == [[0, 1, 1, 0, 1, 0, 0, 0, 0, 0]]
    for sparsity in ("1:4", "2:4", "3:8"):
        n, m = map(int, sparsity.split(":"))
        assert bool((kept(random(5, 48), sparsity).view(5, -1, m).sum(-1) == n).all())


def test_linear_form_keeps_zeros_and_the_affine_one_fills_them():
    x = random(2, 32)
    mask = kept(x, "2:4")
    linear = denoise(x, 4, mode="linear", sparsity="2:4").values()
    assert bool((linear[~mask] == 0).all()) and bool((linear[mask] != 0).any())
    affine = denoise(x, 4, mode="affine", sparsity="2:4").values()
    assert bool((affine[~mask] != 0).all())


def test_blocks_share_nothing():
    weight = random(2, 300)
    y = Denoiser(2, 0.01, 128)(weight)
    pieces = [denoise(part, 2).values() for part in weight.split(128, 1)]
    torch.testing.assert_close(y, torch.cat(pieces, 1), rtol=0, atol=0)
    sizes = in_blocks(lambda part: part.amax(-1, keepdim=True), 128, weight)
    assert sizes.shape == (2, 3) and torch.equal(sizes[:, 2], weight[:, 256:].amax(1))


def test_spikes_sum_to_the_codes_and_so_do_their_products():
    codes = denoise(random(6, 16), 2).codes
    trains = spikes(codes, 3)
    assert trains.dtype == torch.bool and torch.equal(trains.sum(0), codes.long())
    other = random(16, 5, dtype=torch.float64)
    torch.testing.assert_close((trains.double() @ other).sum(0), codes.double() @ other)


def test_matrix_product_of_two_denoised_factors_needs_one_product_of_codes():
    x, w = denoise(random(4, 24, dtype=torch.float64), 2), denoise(random(3, 24, seed=1, dtype=torch.float64), 1)
    mean_codes, mean_values = (
        [part.mean(-1, keepdim=True) for part in parts] for parts in ((x.codes, w.codes), (x.values(), w.values()))
    )
    codes = x.codes @ w.codes.T - 24 * mean_codes[0] @ mean_codes[1].T
    product = (x.scale @ w.scale.T) * codes + 24 * mean_values[0] @ mean_values[1].T
    torch.testing.assert_close(product, x.values() @ w.values().T)


def test_one_bit_in_blocks_costs_a_bit_and_two_halves_a_block():
    weight = random(64, 1024)
    packed = fitted("denoise {'bits': 1}", weight).packed(weight)
    assert packed is not None
    assert packed.nbytes * 8 / weight.numel() <= 1.25 + 0.01
