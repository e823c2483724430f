"""Recipes beyond weights and inputs: hooks around the step, attentions replaced, PokeBNN's bits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.cost import cost_table
from pennyweight.errors import DataError, PlanError, UnknownNameError
from pennyweight.layers.lsq_activation import LearnedStepActivation
from pennyweight.layers.pokebnn_activation import BoundedActivation
from pennyweight.layers.quantised import weight_chain
from pennyweight.layers.query_key import QueryKeyAttention
from pennyweight.models.attention import SelfAttention
from pennyweight.models.pokebnn import PokeBNN, pokebnn, precision
from pennyweight.models.vision_transformer import VisionTransformer
from pennyweight.training.building import make_model
from pennyweight.training.hooks import attach, hooks_of
from pennyweight.training.presets import MODEL_PRESETS
from pennyweight.training.recipe import Recipe, preset
from pennyweight.training.schedule import set_progress
from pennyweight.training.settings import TrainingRecipe
from pennyweight.weights.binary import BinaryWeight
from pennyweight.weights.pokebnn import MaximumQuantizer

IMAGES = torch.randn(6, 1, 14, 14, generator=torch.Generator().manual_seed(0))
PICTURES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
STATSQ, LSQ = {"method": "statsq", "bits": 2}, {"method": "lsq", "bits": 2}


def make_transformer() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(5, image_size=14, patch_size=7, features=16, depth=2, heads=2, in_channels=1)


def make_poke() -> PokeBNN:
    torch.manual_seed(0)
    return PokeBNN(0.25, 5, stages=((64, 1), (128, 1)), patch=2)


def prepared(*rules: dict, data: torch.Tensor | None = None) -> VisionTransformer:
    model = make_transformer()
    pw.prepare(model, {"rules": list(rules)}, data=data)
    return model


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.1)
    attach(optimizer, hooks_of(model))
    for _ in range(steps):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()


# --- hooks around the step ---


def test_a_hook_of_a_rule_freezes_its_layers_from_its_start_on():
    model = prepared({"match": "blocks.*.mlp.*", "weight": STATSQ, "hook": {"method": "cga", "start": 0.5}})
    model.blocks.eval()
    watched = {name: layer.parametrizations.weight for name, layer in model.named_modules() if weight_chain(layer)}
    assert len(watched) == 4 and len(hooks_of(model)) == 4

    def moved() -> float:
        before = {name: chain.original.detach().clone() for name, chain in watched.items()}
        train(model, 1)
        return sum(int((chain.original != before[name]).sum()) for name, chain in watched.items())

    total = sum(chain.original.numel() for chain in watched.values())
    assert moved() == total
    set_progress(model, 0.5)
    near = sum(int((chain[-1].boundary_distance(chain.original) <= 0.005).sum()) for chain in watched.values())
    assert 0 < moved() <= near < 0.05 * total


def test_hooks_that_make_no_sense_are_refused_and_leave_the_model_alone():
    hook = {"match": "blocks.*", "hook": "cga"}
    for rules, reason in (
        ([{"match": "blocks.*", "weight": "binary", "hook": "cga"}], "blocks.0.*boundaries"),
        ([hook], "blocks.0.*boundaries"),
        ([{"match": "blocks.*", "weight": STATSQ}, hook, hook], "two rules give it a method for its hook"),
        ([{"match": "blocks.*", "weight": STATSQ, "hook": {"method": "cga", "width": 1}}], "width"),
    ):
        model = make_transformer()
        with pytest.raises(PlanError, match=reason):
            pw.prepare(model, {"rules": rules})
        assert all(type(module).__name__ != "QuantisedLinear" for module in model.modules())
    with pytest.raises(UnknownNameError, match="cga"):
        prepared({"match": "blocks.*", "weight": STATSQ, "hook": "cgaa"})
    chained = prepared({"match": "blocks.*", "weight": STATSQ}, hook)
    assert len(hooks_of(chained)) == 12


# --- attentions ---


def test_a_replaced_attention_without_quantisers_computes_the_same():
    model = make_transformer().double().eval()
    before = model(IMAGES.double())
    pw.prepare(model, {"rules": [{"match": "SelfAttention", "attention": "query-key"}]})
    assert isinstance(model.blocks[0].attention, QueryKeyAttention)
    torch.testing.assert_close(model(IMAGES.double()), before, rtol=1e-10, atol=1e-10)


def test_slots_of_a_replaced_attention_are_fitted_to_what_they_get():
    slots = ("input_quantizer", "product_quantizer", "attention_quantizer", "value_quantizer")
    entry = {"method": "query-key", "weight_quantizer": STATSQ, **{slot: {**LSQ, "per": "channel"} for slot in slots}}
    with pytest.raises(DataError, match=r"blocks\.0\.attention is fitted to data"):
        prepared({"match": "SelfAttention", "attention": entry})
    model = prepared({"match": "SelfAttention", "attention": entry}, data=IMAGES)
    attention = model.blocks[1].attention
    made = [getattr(attention, slot) for slot in slots]
    assert all(isinstance(quantizer, LearnedStepActivation) for quantizer in made)
    assert [quantizer.step.numel() for quantizer in made] == [16, 32, 2, 16]  # features, heads x features, heads
    assert made[2].ends.tolist() == [0, 3] and made[0].ends.tolist() == [-2, 1]
    assert not any(name.split(".")[-1] in ("query", "key") for name, _ in model.named_modules())


def test_ends_and_excluded_attentions_stay_and_wrong_ones_are_named():
    rule = {"match": "SelfAttention", "attention": "query-key"}
    model = prepared(rule, {"match": "blocks.0.*", "exclude": True}, {"match": "blocks.0.attention*", "exclude": True})
    assert isinstance(model.blocks[0].attention, SelfAttention)
    assert isinstance(model.blocks[1].attention, QueryKeyAttention)
    first = nn.Sequential(SelfAttention(8, 2), nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(PlanError, match="matches no attention"):
        pw.prepare(copy.deepcopy(first), {"rules": [rule]})
    named = pw.prepare(copy.deepcopy(first), {"rules": [{**rule, "match": "0"}]})
    assert isinstance(named[0], QueryKeyAttention)
    for rules, reason in (
        ([rule, rule], "two rules replace"),
        ([{**rule, "attention": {"method": "query-key", "heads": 3}}], "has no option heads"),
        ([{**rule, "attention": "lsq"}], "takes the place of an attention"),
        ([{**rule, "match": "blocks.*.mlp"}], "query and key of one size"),
        ([{**rule, "attention": {"method": "query-key", "weight_quantizer": "binary"}, "hook": "cga"}], "boundaries"),
    ):
        model = make_transformer()
        with pytest.raises(PlanError, match=reason):
            pw.prepare(model, {"rules": rules})
        assert isinstance(model.blocks[0].attention, SelfAttention)


def test_ofq_trains_converts_and_comes_back_from_its_file(tmp_path):
    model = make_transformer()
    pw.prepare(model, preset("ofq"), data=IMAGES)
    assert len(hooks_of(model)) == 10  # product, value, output and two layers of the MLP in each block
    products = [block.attention.product.parametrizations.weight for block in model.blocks]
    set_progress(model, 1.0)
    train(model)
    assert all(product[0]._freeze is not None for product in products)
    model.eval()
    with torch.no_grad():
        before = model(IMAGES)
        small = pw.convert(copy.deepcopy(model))
        after = small(IMAGES)
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        assert not hooks_of(small) and not any("original" in name for name, _ in small.named_parameters())
        pw.save(small, tmp_path / "out")
        again = pw.load(tmp_path / "out", make_transformer())
        assert torch.equal(again(IMAGES), after)
        pw.save(again, tmp_path / "again")
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()


def test_recipes_with_hooks_and_attentions_are_what_they_say():
    for name in ("ofq", *MODEL_PRESETS):
        recipe = preset(name)
        assert Recipe.of(recipe.to_dict()) == recipe
        assert Recipe.of({"preset": name}).fingerprint() == recipe.fingerprint()
    with pytest.raises(UnknownNameError, match="pokebnn"):
        preset("pokebn")


# --- PokeBNN ---


def test_pokebnn_is_prepared_as_published():
    model = make_poke()
    pw.prepare(model, preset("pokebnn"), data=PICTURES)
    wanted = precision(model)
    rows = {row.name: row.precision for row in cost_table(model, PICTURES).layers}
    assert rows.keys() == wanted.keys()
    for name, bits in wanted.items():
        assert (rows[name].weight, rows[name].input) == (bits.weight, bits.input), name
        layer = model.get_submodule(name)
        if bits.input > 1:
            assert bool(layer.input_quantizer.negative) == bits.signed_input, name
        else:
            assert layer.input_quantizer.estimator.bound == 3.0
            assert weight_chain(layer)[0].estimator.bound == "channel"


def test_the_ace_of_the_prepared_network_is_the_published_one():
    with torch.device("meta"):
        plain = pokebnn("0.5x")
    expected = cost_table(plain, torch.zeros(1, 3, 224, 224, device="meta"), precision(plain)).ace
    assert round(expected / 1e9, 3) == 1.410
    model = pokebnn("0.5x")
    pw.prepare(model, preset("pokebnn"), data=torch.randn(2, 3, 32, 32))
    assert cost_table(model, torch.zeros(1, 3, 224, 224)).ace == expected


def test_pokebnn_binarises_its_weights_after_a_sixteenth_and_converts(tmp_path):
    model = make_poke()
    pw.prepare(model, preset("pokebnn"), data=PICTURES)
    layer = model.get_submodule("blocks.0.spatial.convolution")
    latent = layer.parametrizations.weight.original
    assert torch.equal(layer.weight, latent)
    set_progress(model, 1 / 16)
    half = latent.abs().flatten(1).amax(1) / 2
    torch.testing.assert_close(layer.weight.abs().flatten(1), half[:, None].expand(-1, latent[0].numel()))
    model.train()
    model(PICTURES).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    model.eval()
    with torch.no_grad():
        before = model(PICTURES)
        small = pw.convert(copy.deepcopy(model))
        after = small(PICTURES)
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        pw.save(small, tmp_path / "out")
        assert torch.equal(pw.load(tmp_path / "out", make_poke())(PICTURES), after)


def test_half_the_maximum_is_the_cards_scale():
    weight = torch.tensor([[0.2, -0.05, 0.4, -0.3]])
    transform = BinaryWeight({"name": "pokebnn", "bound": "channel"}, scale="half-maximum")
    assert torch.equal(transform(weight), torch.tensor([[0.2, -0.2, 0.2, -0.2]]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_reach_the_channels_maximum_and_the_gradient_is_the_identity(bits):
    most = 2 ** (bits - 1) - 1
    grid = torch.arange(-most, most + 1.0)[None] * torch.tensor([[0.5], [3.0]])
    transform = MaximumQuantizer(bits)
    torch.testing.assert_close(transform(grid), grid)
    weight = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(bits)).requires_grad_()
    value = transform(weight)
    step = weight.detach().abs().flatten(1).amax(1) / most
    assert bool(((value - weight).abs() <= step[:, None, None] / 2 * 1.0001).all())
    (gradient,) = torch.autograd.grad(value, weight, incoming := torch.randn(3, 2, 5))
    torch.testing.assert_close(gradient, incoming)
    assert torch.equal(transform(torch.zeros(2, 3)), torch.zeros(2, 3))
    with pytest.raises(PlanError):
        MaximumQuantizer(1)


def fitted(*batches: torch.Tensor, bits: int = 4, signed: bool | None = None) -> BoundedActivation:
    activation = BoundedActivation(bits, signed)
    activation.for_layer(nn.Linear(batches[0].shape[-1], 2))
    activation.fit(batches)
    return activation


def test_bounds_of_inputs_follow_the_formulas():
    first, second = torch.tensor([[1.0, 0.0], [-4.0, 0.0]]), torch.tensor([[3.0, 0.0], [-2.0, 0.0]])
    signed = fitted(first, second)
    assert signed.bound.tolist() == [3.0, 3.0] and bool(signed.negative)  # |-3| of the minima; an empty channel's
    x = torch.tensor([[-9.0, 0.0], [0.6, 3.0], [3.1, -0.2]]).requires_grad_()
    y = signed(x)
    torch.testing.assert_close(y, torch.tensor([[-7, 0], [1, 7], [7, 0]]) * 3 / 7)
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0, 1], [1, 1], [0, 1]]
    positive = fitted(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]]))
    assert positive.bound.tolist() == [2.0] and not bool(positive.negative)  # zeros are left out of the mean
    values = positive(torch.tensor([[0.0], [0.124], [0.126], [1.99], [2.0], [-1.0]]))
    torch.testing.assert_close(values, torch.tensor([[0.0], [0], [1], [15], [15], [0]]) / 8)
    for bad in ([], [torch.zeros(3, 2)]):
        with pytest.raises(DataError):
            BoundedActivation(4).fit(bad)
    with pytest.raises(PlanError):
        BoundedActivation(1)


# --- recipes ---


@pytest.mark.parametrize("name", ["ofq", "denoise-affine", "pokebnn"])
def test_the_recipes_of_the_repository_are_ready(name):
    recipe = TrainingRecipe.load(Path(__file__).parents[1] / "recipes" / f"{name}.yaml")
    model = make_model(recipe.model)
    data = torch.randn(2, 3, 16, 16) if name == "pokebnn" else torch.randn(4, 1, 28, 28)
    assert recipe.prepare is not None
    pw.prepare(model, recipe.prepare, data=data)
    assert model(data).shape == (len(data), 10)
