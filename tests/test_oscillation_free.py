"""OFQ's parts against its card: learned steps of activations, confidence-guided annealing, query-key attention."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pennyweight.errors import DataError, PlanError
from pennyweight.layers.denoise_affine_activation import DenoisedActivation
from pennyweight.layers.lsq_activation import LearnedStepActivation
from pennyweight.layers.query_key import QueryKeyAttention, QueryKeyProduct
from pennyweight.optim.confidence_guided_annealing import ConfidenceGuidedAnnealing
from pennyweight.weights.denoise_affine import Denoiser
from pennyweight.weights.lsq import LearnedStep
from pennyweight.weights.statsq import StatisticalQuantizer


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Learned steps of activations.


def fitted(layer: nn.Module, x: Tensor, **options: Any) -> LearnedStepActivation:
    activation = LearnedStepActivation(**options)
    activation.for_layer(layer)
    activation.fit([x[:2], x[2:]])
    return activation


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_activations_are_exact_on_their_grid(bits):
    for signed in (True, False):
        activation = LearnedStepActivation(bits, signed=signed)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        grid = torch.arange(low, high + 1.0)[None]
        assert activation.ends.tolist() == [low, high]
        assert torch.equal(activation(grid), grid)
        assert activation(grid * 100).min() == low and activation(grid * 100).max() == high


def test_lsq_activations_start_from_the_data_and_choose_their_range():
    x = random(6, 5, 8)
    signed = fitted(nn.Linear(8, 2), x, bits=3)
    assert signed.ends.tolist() == [-4, 3]
    torch.testing.assert_close(signed.step.detach(), (2 * x.abs().mean() / math.sqrt(3)).view(1))
    positive = fitted(nn.Linear(8, 2), x.relu(), bits=3)
    assert positive.ends.tolist() == [0, 7]
    torch.testing.assert_close(positive.step.detach(), (4 * x.relu().mean() / math.sqrt(7)).view(1))
    by_channel = fitted(nn.Linear(8, 2), x, bits=3, per="channel").step
    torch.testing.assert_close(by_channel.detach(), 2 * x.abs().mean((0, 1)) / math.sqrt(3))
    by_token = fitted(nn.Linear(8, 2), x, bits=3, per="token").step
    torch.testing.assert_close(by_token.detach(), 2 * x.abs().mean((0, 2)) / math.sqrt(3))
    image = random(4, 3, 5, 5)
    assert fitted(nn.Conv2d(3, 2, 3), image, bits=2, per="channel")(image).shape == image.shape


def test_lsq_activation_gradients_are_the_published_ones():
    x = random(4, 5, 8, dtype=torch.float64).requires_grad_()
    activation = fitted(nn.Linear(8, 2).double(), x, bits=2, per="channel", shift=True)
    with torch.no_grad():
        activation.shift_in.copy_(random(8, seed=5) * 0.3)
    incoming = random(4, 5, 8, seed=1, dtype=torch.float64)
    parameters = (x, activation.step, activation.shift_in, activation.shift_out)
    dx, dstep, dbefore, dafter = torch.autograd.grad(activation(x), parameters, incoming)
    scaled = ((x + activation.shift_in) / activation.step).detach()
    inside = (scaled >= -2) & (scaled <= 1)
    torch.testing.assert_close(dx, incoming * inside)
    torch.testing.assert_close(dbefore, (incoming * inside).sum((0, 1)))
    torch.testing.assert_close(dafter, incoming.sum((0, 1)))
    bracket = torch.where(inside, scaled.round() - scaled, scaled.clamp(-2, 1))
    expected = (incoming * bracket).sum((0, 1)) / math.sqrt(1 * 5)  # five numbers of a sample share a step
    torch.testing.assert_close(dstep.double(), expected, rtol=1e-6, atol=1e-6)


def test_lsq_activations_refuse_what_they_cannot_do():
    layer, x = nn.Linear(8, 2), random(4, 5, 8)
    with pytest.raises(DataError, match="sign"):
        fitted(layer, x, bits=1)
    with pytest.raises(DataError, match="empty"):
        LearnedStepActivation(2).fit([])
    with pytest.raises(DataError, match="NaN"):
        LearnedStepActivation(2).fit([torch.tensor([[math.nan]])])
    by_token = fitted(layer, x, bits=2, per="token")
    with pytest.raises(DataError, match="token"):
        by_token(x[:, :3])
    with pytest.raises(DataError, match="token"):
        LearnedStepActivation(2, per="token").fit([x, x[:, :3]])
    for bad in ({"bits": 0}, {"bits": 2, "per": "batch"}):
        with pytest.raises(PlanError):
            LearnedStepActivation(**bad)


# Denoised activations.


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 2, "block": 4}, {"bits": 4, "sparsity": "2:4"}])
def test_denoised_activations_depend_on_their_own_position_only(options):
    activation = DenoisedActivation(**options)
    activation.for_layer(nn.Conv2d(10, 3, 3))
    x = random(3, 10, 4, 4)
    y = activation(x)
    alone = activation(x[1:2, :, 2:3, 1:2])
    assert torch.equal(y[1:2, :, 2:3, 1:2], alone)
    assert torch.equal(y.movedim(1, -1), Denoiser(**options)(x.movedim(1, -1)))
    assert activation(x.bfloat16()).dtype == torch.bfloat16


# Confidence-guided annealing.


def quantised(transform: Any, inputs: int = 12, outputs: int = 6) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(random(outputs, inputs))
        layer.bias.zero_()
    transform.fit(layer.weight)
    parametrize.register_parametrization(layer, "weight", transform)
    return layer


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5),
}


def step(model: nn.Module, optimizer: Any, annealing: ConfidenceGuidedAnnealing, seed: int) -> None:
    optimizer.zero_grad()
    model(random(5, 12, seed=seed)).square().sum().backward()
    annealing.before_step()
    optimizer.step()
    annealing.after_step()


@pytest.mark.parametrize("transform", [StatisticalQuantizer(2), LearnedStep(2)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_outside_of_the_band_stay_bit_for_bit(name, transform):
    layer = quantised(copy.deepcopy(transform))
    chain = layer.parametrizations.weight
    optimizer = OPTIMIZERS[name](layer.parameters())
    optimizer_only = ConfidenceGuidedAnnealing(layer, band=0.5)
    for seed in range(3):  # momentum is under way
        step(layer, optimizer, optimizer_only, seed)
    annealing = ConfidenceGuidedAnnealing(layer, band=0.1)
    for seed in range(3, 6):
        before = chain.original.detach().clone()
        near = chain[0].boundary_distance(before) <= 0.1
        step(layer, optimizer, annealing, seed)
        assert torch.equal(chain.original[~near], before[~near])
        assert bool(near.any()) and not torch.equal(chain.original[near], before[near])


def test_the_band_is_monotone_and_its_ends_are_all_and_none():
    layer = quantised(StatisticalQuantizer(3), 400)
    weight = layer.parametrizations.weight.original.detach()
    distance = layer.parametrizations.weight[0].boundary_distance(weight)
    counts = [(distance <= band).sum().item() for band in (0.0, 0.005, 0.1, 0.5)]
    assert counts == sorted(counts) and counts[0] == 0
    scaled = layer.parametrizations.weight[0].factors(weight)[0]
    assert bool((scaled[distance > 0.5].abs() == 3.5).all())


def test_it_acts_from_its_start_and_is_found_by_the_loop():
    layer = quantised(StatisticalQuantizer(2))
    model = nn.Sequential(layer)
    model.add_module("annealing", ConfidenceGuidedAnnealing(model, band=0.0, start=0.8))
    annealing: Any = model.annealing
    assert list(model.state_dict()) == list(copy.deepcopy(model).state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    before = layer.parametrizations.weight.original.detach().clone()
    annealing.progress.fill_(0.5)
    step(layer, optimizer, annealing, 0)
    assert not torch.equal(layer.parametrizations.weight.original, before)
    before = layer.parametrizations.weight.original.detach().clone()
    annealing.progress.fill_(0.8)
    step(layer, optimizer, annealing, 1)
    assert torch.equal(layer.parametrizations.weight.original, before)


def test_annealing_needs_boundaries_and_a_band():
    with pytest.raises(PlanError, match="statsq"):
        ConfidenceGuidedAnnealing(nn.Linear(3, 3))
    with pytest.raises(PlanError, match="band"):
        ConfidenceGuidedAnnealing(quantised(StatisticalQuantizer(2)), band=-1)


def test_annealing_stops_oscillation_and_lowers_the_loss_of_a_least_squares_problem():
    """The card's toy: 32 weights in one row at two bits, SGD; flips in the last third, annealed or not."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(256, 32, generator=generator), torch.randn(32, 1, generator=generator)
    y = x @ target

    def train(anneal: bool) -> tuple[int, float]:
        layer = quantised(StatisticalQuantizer(2), 32, 1)
        optimizer = torch.optim.SGD([layer.parametrizations.weight.original], 0.02)
        annealing = ConfidenceGuidedAnnealing(layer, band=0.005)
        flips, last = 0, None
        for number in range(300):
            optimizer.zero_grad()
            loss = (x @ layer.weight.T - y).square().mean()
            loss.backward()
            if anneal and number >= 150:
                annealing.before_step()
            optimizer.step()
            annealing.after_step()
            codes = layer.parametrizations.weight[0].factors(layer.parametrizations.weight.original.detach())[0]
            if last is not None and number >= 200:
                flips += int((codes != last).sum())
            last = codes
        return flips, (x @ layer.weight.T - y).square().mean().item()

    (flips, loss), (annealed_flips, annealed_loss) = train(False), train(True)
    assert flips > 20 and annealed_flips == 0
    print(flips, loss, annealed_loss)


# Query-key reparameterisation.


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Attention(nn.Module):
    """Ordinary attention with the parts that QKR asks for."""

    def __init__(self, features: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(features, features), nn.Linear(features, features)
        self.value, self.output = nn.Linear(features, features), nn.Linear(features, features)
        self.scores, self.mix, self.normalizer, self.dropout = Product(), Product(), nn.Softmax(-1), nn.Dropout(0.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = self.scores(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
        return self.output(self.mix(self.normalizer(scores), v).transpose(1, 2).flatten(2))


def test_without_quantisers_it_is_ordinary_attention_biases_and_mask_included():
    torch.manual_seed(0)
    attention = Attention().double()
    x, mask = random(3, 6, 8, dtype=torch.float64), torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    reparameterised = QueryKeyAttention(attention)
    torch.testing.assert_close(reparameterised(x), attention(x))
    torch.testing.assert_close(reparameterised(x, mask), attention(x, mask))
    # The gradient, too, reaches both latent factors through the product.
    incoming = random(3, 6, 8, seed=2, dtype=torch.float64)
    latent = reparameterised.product.parametrizations.weight.original
    (got,) = torch.autograd.grad(reparameterised(x), latent, incoming)
    # key_logit is a parameter of its own: what W_k gets through the query's bias in ordinary attention is not in `got`.
    attention.query.bias.data.zero_()
    plain = QueryKeyAttention(attention)
    (got,) = torch.autograd.grad(plain(x), plain.product.parametrizations.weight.original, incoming)
    query, key = torch.autograd.grad(attention(x), (attention.query.weight, attention.key.weight), incoming)
    torch.testing.assert_close(got, torch.cat([query, key]))


def test_the_product_is_quantised_row_by_row():
    torch.manual_seed(0)
    attention = Attention()
    layer = QueryKeyAttention(attention, StatisticalQuantizer(2))
    product = (attention.query.weight[4:].T @ attention.key.weight[4:]).detach()
    expected = StatisticalQuantizer(2)(torch.cat([attention.query.weight[:4].T @ attention.key.weight[:4], product]))
    torch.testing.assert_close(layer.product.weight, expected)
    y = layer(random(2, 5, 8))
    y.sum().backward()
    assert bool(torch.isfinite(y).all()) and layer.product.parametrizations.weight.original.grad.abs().sum() > 0


def test_annealing_masks_the_gradient_of_the_product():
    torch.manual_seed(0)
    layer = QueryKeyAttention(Attention(), StatisticalQuantizer(2))
    chain = layer.product.parametrizations.weight
    ConfidenceGuidedAnnealing(layer, band=0.05)
    stacked = chain.original.detach().clone().requires_grad_()
    free = QueryKeyProduct(2)
    product = free(stacked)
    near = chain[1].boundary_distance(product.detach()) <= 0.05
    assert bool(near.any()) and not bool(near.all())
    incoming = random(*product.shape, seed=3)
    (expected,) = torch.autograd.grad(product, stacked, incoming * near)
    (got,) = torch.autograd.grad(chain[0](chain.original), chain.original, incoming)
    torch.testing.assert_close(got, expected)
    ConfidenceGuidedAnnealing(layer, band=0.05, start=0.9)  # not yet
    (got,) = torch.autograd.grad(chain[0](chain.original), chain.original, incoming)
    assert not torch.allclose(got, expected)


def test_what_is_no_attention_is_refused_by_its_missing_parts():
    with pytest.raises(PlanError, match="query"):
        QueryKeyAttention(nn.Linear(3, 3))
    attention = Attention(8, 2)
    attention.heads = 3
    with pytest.raises(PlanError, match="heads"):
        QueryKeyAttention(attention)
    parts = {name: getattr(Attention(), name) for name in ("query", "value", "output", "heads")}
    with pytest.raises(PlanError, match="key, scores"):
        QueryKeyAttention(SimpleNamespace(**parts))
