"""Recipes, prepare and schedules: what rules do to a model, the parts' formulas, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pennyweight as pw
from pennyweight.errors import DataError, PlanError, UnknownNameError, WeightError
from pennyweight.estimators import make_estimator
from pennyweight.layers.base import make_layer_transform
from pennyweight.layers.noise_adaptation import NoiseAdaptation
from pennyweight.layers.quantised import QuantisedLayer
from pennyweight.layers.rprelu import RPReLU
from pennyweight.training.presets import PRESETS
from pennyweight.training.recipe import Recipe, preset
from pennyweight.training.schedule import Schedule, set_progress
from pennyweight.weights.binary import BinaryWeight
from pennyweight.weights.dorefa import DoReFaWeight

BINARY = {"method": "binary"}
RULE = {"match": "Linear", "weight": BINARY, "input": {"method": "sign"}}


def chain(*middle: nn.Module) -> nn.Sequential:
    """first -> the modules given -> last."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), *middle, nn.Linear(6, 3))


def quantised(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantisedLayer)]


# --- rules ---


def test_first_and_last_stay_real_unless_named():
    assert quantised(pw.prepare(chain(nn.Linear(6, 6), nn.Linear(6, 6)), {"rules": [RULE]})) == ["1", "2"]
    named = {"rules": [RULE, {"match": "0", "weight": BINARY}]}
    assert quantised(pw.prepare(chain(nn.Linear(6, 6)), named)) == ["0", "1"]
    with pytest.raises(PlanError, match="exact names"):
        pw.prepare(chain(nn.Linear(6, 6)), {"rules": [RULE, {"match": "[02]", "weight": BINARY}]})


def test_globs_types_lists_and_exclusion():
    model = chain(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    rules = [{"match": "2.*", "exclude": True}, {"match": ["Conv2d", "Linear"], "weight": "binary"}]
    assert quantised(pw.prepare(model, {"rules": rules})) == ["1"]


def test_a_rule_that_matches_nothing_prints_the_names():
    model = chain(nn.Linear(6, 6))
    with pytest.raises(PlanError, match=r"block\.\* matches no layer; there are: 0 \(Linear\), 1 \(Linear\)"):
        pw.prepare(model, {"rules": [{"match": "block.*", "weight": BINARY}]})
    assert not quantised(model)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([RULE, {"match": "1", "weight": {"method": "dorefa"}}], "1: 'dorefa' cannot follow 'binary'"),
        ([{"match": "1", "weight": [BINARY, BINARY]}], "do not chain"),
        ([RULE, {"match": "1", "input": "rsign"}], "1: two rules give it a method for its input"),
        ([{"match": "1"}], "name methods"),
        ([{"match": "1", "weigth": BINARY}], "'weigth'"),
        ([{"match": "1", "weight": {"method": "binary", "scal": "none"}}], "no option scal"),
        ([{"match": "1", "weight": {"method": "binary", "scale": "some"}}], "1: binary weights: scale is 'some'"),
        ([{"match": "1", "weight": {"method": "binary", "estimator": "round"}}], "rounds"),
        ([{"match": "1", "weight": {"method": "binary", "start": 2}}], "start is 2"),
        ([{"match": "1", "weight": {"method": "dorefa", "bits": 1}}], "2 to 8 bits"),
        ([{"match": "1", "input": {"method": "dorefa", "bits": 0}}], "1 to 16 bits"),
        ([{"match": "1", "input": {"method": "sign", "estimator": {"window": 1}}}], "needs a name"),
        ([{"match": "1", "input": "rprelu"}], "module of its own"),
        ([{"match": "1", "exclude": True}, {"match": "1", "weight": BINARY}], "is excluded"),
        ([], "no rules"),
        ("1", "are a list"),
        ([{"match": "", "weight": BINARY}], "no layer"),
        ([{"weight": BINARY}], "needs 'match'"),
        ([{"match": "1", "weight": [3]}], "method"),
    ],
)
def test_contradictions_are_refused_and_leave_the_model(rules, said):
    model = chain(nn.Linear(6, 6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match=said):
        pw.prepare(model, {"rules": rules})
    assert not quantised(model) and type(model[1]) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "entry", [{"weight": "binry"}, {"input": "rsing"}, {"weight": {**BINARY, "estimator": "rest"}}]
)
def test_unknown_names_say_the_close_ones(entry):
    with pytest.raises(UnknownNameError, match="did you mean"):
        pw.prepare(chain(nn.Linear(6, 6)), {"rules": [{"match": "1", **entry}]})
    with pytest.raises(UnknownNameError, match="did you mean 'reste'"):
        preset("rest")


def test_kinds_of_layers_that_no_method_takes():
    class OwnForward(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    for layer in (nn.LSTM(6, 6), OwnForward(6, 6), nn.MultiheadAttention(6, 2), nn.ConvTranspose1d(6, 6, 1)):
        model = chain(layer)
        with pytest.raises(PlanError, match=f"1.*: a {type(layer).__name__}.* is a kind of layer"):
            pw.prepare(model, {"rules": [{"match": "1", "weight": BINARY}]})
    with pytest.raises(PlanError, match="Conv3d"):
        conv3d = {"match": "1", "output": "spatial-scale"}
        pw.prepare(chain(nn.Conv3d(6, 6, 1)), {"rules": [conv3d]})
    with pytest.raises(PlanError, match="no layers"):
        pw.prepare(nn.ReLU(), {"rules": [RULE]})
    with pytest.raises(PlanError, match="already"):
        pw.prepare(pw.prepare(chain(nn.Linear(6, 6)), {"rules": [RULE]}), {"rules": [RULE]})


@pytest.mark.parametrize("method", ["binary", "fda", "dorefa"])
def test_weights_that_no_method_can_represent(method):
    for value in (0.0, math.nan, math.inf):
        model = chain(nn.Linear(6, 6))
        nn.init.constant_(model[1].weight, value)
        with pytest.raises(WeightError, match="1: "):
            pw.prepare(model, {"rules": [{"match": "1", "weight": method}]})
        assert not quantised(model)
    model = chain(nn.Linear(6, 6))
    model[1].weight.data[2] = 0  # one output of zeros yields zeros
    pw.prepare(model, {"rules": [{"match": "1", "weight": "binary"}]})
    assert bool((model[1].weight[2] == 0).all())


def test_recipes_of_files_and_presets(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("preset: reste\nrules:\n- match: '3'\n  exclude: true\n")
    model = pw.prepare(chain(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), path)
    assert quantised(model) == ["1"]
    recipe = Recipe.of(path)
    again = Recipe.of(recipe.to_dict())
    assert again == recipe and again.fingerprint() == recipe.fingerprint() != preset("reste").fingerprint()
    for text in ("rules: [", "- 1", "rulez: []", "preset: reste\npreset: fda"):
        path.write_text(text)
        with pytest.raises(PlanError):
            Recipe.of(path)
    with pytest.raises(PlanError, match="cannot be read"):
        Recipe.of(tmp_path / "none.yaml")


def test_data_is_asked_for_and_checked():
    class Needy(type(make_layer_transform({"method": "dorefa"}, nn.Linear(1, 1)))):
        needs_data = True

        def fit(self, batches):
            self.seen = list(batches)

    from pennyweight import registry

    entry = registry.Entry("needy", "layers", "", Needy)
    registry._ENTRIES["layers", "needy"] = entry
    try:
        rules = {"rules": [{"match": "1", "input": "needy"}]}
        with pytest.raises(DataError, match="quantiser of 1 is fitted to data"):
            pw.prepare(chain(nn.Linear(6, 6)), rules)
        model = chain(nn.Linear(6, 6), nn.Dropout(0.5))
        x = torch.randn(4, 6)
        pw.prepare(model, rules, data=x)
        assert torch.equal(model[1].input_quantizer.seen[0], model[0](x)) and model[2].training
    finally:
        del registry._ENTRIES["layers", "needy"]


# --- the parts' formulas ---


def test_the_binariser_by_hand():
    weight = torch.tensor([[0.4, -0.2, 0.1, -0.3], [0.0, 2.0, -2.0, -4.0]])
    assert torch.equal(BinaryWeight(scale="none")(weight), torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]]))
    assert torch.allclose(BinaryWeight()(weight)[:, 1], torch.tensor([-0.25, 2.0]))
    assert torch.allclose(BinaryWeight(scale="layer")(weight).abs(), torch.tensor(1.125))
    assert torch.equal(BinaryWeight(scale="none", pre="centred")(weight)[1], torch.tensor([1.0, 1, -1, -1]))
    # ReCU's card: this row alone, standardised with gain 2 sqrt 2
    row = BinaryWeight("recu", pre="standardised", gain=2 * math.sqrt(2)).before_sign(weight[:1])
    assert torch.allclose(row, torch.tensor([[3.5775, -1.7888, 0.8944, -2.6831]]), atol=1e-3)


def test_learned_scales_start_as_asked():
    weight = torch.randn(5, 3, 2, 2)
    for init, expected in (("mean", weight.abs().flatten(1).mean(1)), ("ones", torch.ones(5))):
        part = BinaryWeight(scale="learned", init=init)
        part.fit(weight)
        assert torch.equal(part.scale, expected)
    part = BinaryWeight(scale="learned", init="uniform")
    part.fit(weight)
    assert part.scale.shape == (5,) and bool(((part.scale >= 0) & (part.scale < 1)).all())


@given(st.integers(0, 99), st.sampled_from(["layer", "output"]), st.booleans())
@settings(deadline=None, max_examples=20)
def test_gradient_of_scaled_signs(seed, scale, detached):
    """dL/dw = s k(w) G + sign(w)/n sum(G sign(w)), the second term only where the scale is not detached."""
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    weight = weight.detach().requires_grad_()
    part = BinaryWeight("reste", scale=scale, detached=detached)
    set_progress(part, 0.6)
    part(weight).backward(gradient)
    w = weight.detach()
    sign = torch.where(w >= 0, 1.0, -1.0).to(w)
    axes = (0, 1) if scale == "layer" else (1,)
    s = w.abs().mean(axes, keepdim=True)
    expected = s * part.estimator.surrogate(w) * gradient
    if not detached:
        n = w.numel() if scale == "layer" else w.shape[1]
        expected = expected + sign / n * (gradient * sign).sum(axes, keepdim=True)
    assert torch.allclose(weight.grad, expected, rtol=1e-12)


def test_delayed_binarisation_trains_what_it_says():
    weight = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    real = BinaryWeight(start=0.5)
    assert torch.equal(real(weight), weight)
    sine = BinaryWeight({"name": "biper", "omega": 20.0}, scale="none", start=0.5, before="approximation")
    assert torch.autograd.gradcheck(sine, (weight,))  # a stage of its own, with true gradients
    stage_one = torch.autograd.grad(sine(weight).sum(), weight)[0]
    for part in (real, sine):
        set_progress(part, 0.5)
        assert part(weight).abs().flatten(1).unique(dim=1).shape[1] == 1
        with pytest.raises(ValueError, match="between 0 and 1"):
            set_progress(part, 1.5)
    assert torch.allclose(torch.autograd.grad(sine(weight).sum(), weight)[0], stage_one)  # BiPer's card


def test_dorefa_weights_by_hand():
    weight = torch.atanh(torch.tensor([[0.5, -0.5, 0.1, 0.3]]))
    assert torch.allclose(DoReFaWeight(2)(weight), torch.tensor([[1.0, -1.0, 1 / 3, 1 / 3]]))
    codes, scale = DoReFaWeight(3).factors(torch.randn(5, 40))
    assert set(codes.unique().tolist()) <= set(range(-7, 8, 2)) and torch.allclose(scale, torch.tensor(1 / 7))


def test_dorefa_activations_by_hand():
    x = torch.tensor([-1.0, 0.0, 0.1, 0.5, 0.9, 1.0, 3.0], requires_grad=True)
    y = make_layer_transform({"method": "dorefa", "bits": 2}, nn.Linear(7, 1))(x)
    assert torch.allclose(y, torch.tensor([0, 0, 0, 2 / 3, 1, 1, 1]))
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv1d(3, 2, 1), nn.Conv2d(3, 2, 1)])
def test_sign_activations(layer):
    axes = len(getattr(layer, "kernel_size", ()))
    x = torch.randn(4, 3, *[5] * axes, requires_grad=True)
    shift = torch.tensor([0.5, 0.0, -0.5]).view(-1, *[1] * axes)
    made = make_layer_transform({"method": "rsign"}, layer)
    assert torch.equal(made(x), torch.where(x >= 0, 1.0, -1.0))  # the shift starts at 0
    made.shift.data.copy_(shift.flatten())
    y = made(x)
    assert torch.equal(y, torch.where(x + shift >= 0, 1.0, -1.0))
    y.sum().backward()
    k = (2 - 2 * (x + shift).abs()).clamp_min(0).detach()
    assert torch.allclose(x.grad, k) and torch.allclose(made.shift.grad, k.transpose(0, 1).flatten(1).sum(1))
    scaled = make_layer_transform({"method": "sign", "sample_scale": True}, layer)
    kappa = x.abs().flatten(1).mean(1).view(-1, *[1] * (axes + 1))
    assert torch.allclose(scaled(x), torch.where(x >= 0, 1.0, -1.0) * kappa)


def test_standardised_activations_only_move_the_window():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    made = make_layer_transform({"method": "sign", "estimator": "bi-real", "standardise": True}, nn.Conv2d(3, 1, 1))
    trained, x_grad = made(x), torch.autograd.grad((made(x) * torch.randn(4, 3, 5, 5)).sum(), x)[0]
    assert torch.equal(trained, made.eval()(x)) and torch.equal(trained, made.train()(7 * x))
    assert not torch.allclose(x_grad, torch.autograd.grad(made(7 * x).sum(), x)[0])
    for same in (torch.full((2, 3, 5, 5), 0.3), torch.zeros(1, 3, 1, 1), torch.randn(1, 3, 4, 4)):
        same.requires_grad_()
        made(same).sum().backward()
        assert bool(same.grad.isfinite().all())
    one = make_layer_transform({"method": "sign", "standardise": True}, nn.Linear(1, 1))
    assert bool(one(torch.randn(5, 1, requires_grad=True)).isfinite().all())


def test_rprelu():
    module, x = RPReLU(3), torch.randn(2, 3, 4)
    assert torch.equal(module(x), F.leaky_relu(x, 0.25))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    kink = -module.shift_in[:, None]
    assert torch.allclose(module(kink.expand(2, 3, 4)), module.shift_out[:, None].expand(2, 3, 4))
    y = torch.where(x > kink, x - kink, module.slope[:, None] * (x - kink)) + module.shift_out[:, None]
    assert torch.allclose(module(x), y, atol=1e-6)


def test_spatial_scale():
    made = make_layer_transform({"method": "spatial-scale", "positions": 6}, nn.Conv2d(3, 2, 1))
    x = torch.randn(2, 2, 4, 6)
    assert torch.equal(made(x), x)
    for scale in made.scales:
        nn.init.normal_(scale)
    assert torch.allclose(made(x), x * made.scales[0][:4, None] * made.scales[1])
    with pytest.raises(DataError, match="7 positions"):
        made(torch.randn(1, 2, 7, 1))


def test_noise_of_fda_ends():
    noise, x = NoiseAdaptation(8), torch.randn(5, 8)
    assert noise.down.weight.shape == (2, 8) and NoiseAdaptation(200).down.out_features == 3
    assert NoiseAdaptation(2).down.out_features == 1
    expected = noise.up(F.relu(noise.down(x))) + 0.1 * x.sin()
    assert torch.allclose(noise(x), 0.1 * expected)
    set_progress(noise, 1)
    assert noise.is_over() and not noise(x).any()


# --- training ---


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.middle, self.norm2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm2(self.middle(self.norm(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_learns_and_its_checkpoint_continues(name):
    torch.manual_seed(1)
    x, target = torch.randn(16, 2, 6, 6), torch.randint(3, (16,))

    def start():
        torch.manual_seed(2)
        model = pw.prepare(Small(), preset(name), data=x)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        return model, optimizer, Schedule(model, 12, freeze={"stem.*": 0.75})

    def train(model, optimizer, schedule, steps):
        losses = []
        for _ in range(steps):
            loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return losses

    model, optimizer, schedule = start()
    first = train(model, optimizer, schedule, 6)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    rest = train(model, optimizer, schedule, 6)
    assert min(rest) < first[0] and schedule.progress == 1
    model, optimizer, schedule = start()
    for part, state in zip((model, optimizer, schedule), saved):
        part.load_state_dict(state)
    assert train(model, optimizer, schedule, 6) == rest  # to the bit


def test_the_schedule_anneals_freezes_and_tells_others_apart():
    model = pw.prepare(Small(), preset("reste"))
    schedule = Schedule(model, 10, anneal=(0.2, 0.6), freeze={"stem.*": 0.5})
    seen = []
    for _ in range(12):
        seen.append(round(schedule.progress, 6))
        frozen = not model.stem.weight.requires_grad
        assert frozen == (schedule.taken >= 5) and model.head.weight.requires_grad
        schedule.step()
    assert seen == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]
    assert float(model.middle.parametrizations.weight[0].estimator.progress) == 1
    state = schedule.state_dict()
    with pytest.raises(PlanError, match="steps"):
        Schedule(model, 11, anneal=(0.2, 0.6), freeze={"stem.*": 0.5}).load_state_dict(state)
    for bad in ({"steps": 0}, {"anneal": (0.5, 0.5)}, {"freeze": {"none.*": 0.5}}, {"freeze": {"stem.*": 1.5}}):
        with pytest.raises(PlanError):
            Schedule(model, **{"steps": 5, **bad})


def test_a_quantised_layer_multiplies_codes_before_scales():
    model = pw.prepare(chain(nn.Linear(6, 6)), {"rules": [RULE]})
    layer, x = model[1], torch.randn(4, 6)
    signs = torch.where(x >= 0, 1.0, -1.0)
    assert torch.allclose(layer(x), F.linear(signs, layer.weight, layer.bias), atol=1e-6)
    latent = layer.parametrizations.weight.original
    integers = signs @ torch.where(latent >= 0, 1.0, -1.0).T
    assert torch.equal(layer(x), integers * latent.abs().mean(1) + layer.bias)
    assert make_estimator("ste").step == "sign"


@pytest.mark.parametrize("name", PRESETS)
def test_mixed_precision_and_a_batch_of_one(name):
    model = pw.prepare(Small(), preset(name), data=torch.randn(2, 2, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 2, 5, 5)).float().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(bool(g.isfinite().all()) for g in gradients)
    model(torch.randn(1, 2, 5, 5)).sum().backward()
    model.eval()
    assert bool(model(torch.full((1, 2, 5, 5), 0.7)).isfinite().all())  # all-equal activations
