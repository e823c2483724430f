"""What every weight transform and every layer transform owes. Runs for each in the registry, with its default options:
a new method is tested by being registered."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight import registry
from pennyweight.errors import DataError, WeightError
from pennyweight.formats import from_bytes
from pennyweight.layers.base import LayerTransform
from pennyweight.training.prepare import make_weight_transform
from pennyweight.training.schedule import set_progress
from pennyweight.weights.base import WeightTransform, per_output

HERE = Path(__file__).parent
WEIGHTS = [entry.name for entry in registry.methods("weights")]
LAYERS = [
    entry.name
    for entry in registry.methods("layers")
    if isinstance(entry.target, type) and issubclass(entry.target, LayerTransform)
]
ROLES = {"spatial-scale": "output"}
# What an option without a default gets.
GIVEN = {"bits": 4}
CASES = [("weight", name) for name in WEIGHTS] + [(ROLES.get(name, "input"), name) for name in LAYERS]
SHAPES = [(8, 12), (5, 3, 3, 3), (4, 6, 3), (7, 1), (1, 9)]

weights = pytest.mark.parametrize("name", WEIGHTS)
shapes = pytest.mark.parametrize("shape", SHAPES)
cases = pytest.mark.parametrize("case", CASES, ids="-".join)


def entry_of(place: str, name: str) -> dict:
    """The method in a recipe, with its default options."""
    parameters = inspect.signature(registry.get(name, place).target).parameters.values()
    return {"method": name} | {p.name: GIVEN[p.name] for p in parameters if p.default is p.empty}


def rule_of(case: tuple[str, str]) -> dict:
    role, name = case
    return {"match": ["conv", "linear"], role: entry_of("weights" if role == "weight" else "layers", name)}


def weight_of(shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def fitted(name: str, weight: torch.Tensor, progress: float = 1.0) -> WeightTransform:
    torch.manual_seed(0)
    transform = make_weight_transform(entry_of("weights", name))
    transform.fit(weight)
    set_progress(transform, progress)
    return transform.to(weight.dtype)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.linear, self.head = nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.linear(self.norm(self.conv(self.stem(x))).mean((2, 3))))


def make_net() -> nn.Module:
    torch.manual_seed(1)
    return Net()


IMAGES = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(2))


def trained(case: tuple[str, str]) -> nn.Module:
    """A network whose middle layers use the method, after two steps."""
    model = pw.prepare(make_net(), {"rules": [rule_of(case)]}, data=IMAGES)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for progress in (0.5, 1.0):
        set_progress(model, progress)
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), key
        optimizer.step()
    return model.eval()


# --- weight transforms by themselves ---


@weights
@shapes
def test_forward_is_codes_times_scale(name, shape):
    weight = weight_of(shape)
    transform = fitted(name, weight)
    value, (codes, scale) = transform(weight), transform.factors(weight)
    assert value.shape == weight.shape and value.dtype == weight.dtype and bool(value.isfinite().all())
    product = codes if scale is None else codes * per_output(scale, codes)
    assert torch.allclose(value, product, rtol=1e-6)
    assert torch.equal(transform(weight), value)  # the same again
    if type(transform).discrete:
        assert codes.flatten(1).unique().numel() <= 256


@weights
@shapes
def test_the_packed_form_is_what_the_layer_uses(name, shape):
    weight = weight_of(shape)
    transform = fitted(name, weight)
    packed = transform.packed(weight)
    assert (packed is not None) == type(transform).discrete
    if packed is None:
        return
    codes = transform.factors(weight)[0].flatten(1)
    assert tuple(packed.shape) == tuple(codes.shape)
    assert torch.allclose(packed.decode(), codes, rtol=1e-3)  # scales within may be rounded: convert makes up for it
    blob = packed.to_bytes()
    assert packed.nbytes == len(blob) and torch.equal(from_bytes(blob).decode(), packed.decode())


@weights
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_gradients_are_finite_and_there(name, progress):
    weight = weight_of((6, 4, 3, 3)).requires_grad_()
    transform = fitted(name, weight.detach(), progress)
    (transform(weight) * weight_of((6, 4, 3, 3)).flip(0)).sum().backward()
    learned = [weight, *transform.parameters()]
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in learned)
    assert bool(weight.grad.any())


@weights
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_are_kept(name, dtype):
    weight = weight_of((6, 10), dtype)
    assert fitted(name, weight)(weight).dtype == dtype


@weights
def test_weights_that_are_not_finite_are_refused(name):
    for value in (torch.nan, torch.inf):
        weight = weight_of((6, 10))
        transform = fitted(name, weight)
        weight[2, 3] = value
        with pytest.raises(WeightError):
            make_weight_transform(entry_of("weights", name)).fit(weight)
        if type(transform).discrete:
            with pytest.raises(WeightError):
                transform.packed(weight)


# --- in a network ---


@cases
def test_copies_and_state_dicts(case):
    model = trained(case)
    y = model(IMAGES)
    assert torch.equal(copy.deepcopy(model)(IMAGES), y)
    again = pw.prepare(make_net(), {"rules": [rule_of(case)]}, data=IMAGES).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IMAGES), y)


@cases
def test_outputs_do_not_depend_on_batch_mates(case):
    model = trained(case)
    y = model(IMAGES)
    for i in (0, 3):
        others = torch.cat([IMAGES[i : i + 1], 100 * IMAGES.flip(0)])
        assert torch.allclose(model(others)[:1], y[i : i + 1], rtol=1e-5, atol=1e-5)


@cases
def test_converted_equals_prepared(case):
    model = trained(case)
    with torch.no_grad():
        y = model(IMAGES)
        z = pw.convert(model)(IMAGES)
    assert float((z - y).abs().max()) <= 1e-5 * float(y.abs().max())
    assert not any("parametrizations" in key for key in model.state_dict())


@pytest.mark.parametrize("name", LAYERS)
def test_data_that_is_not_finite_is_refused(name):
    bad = IMAGES.clone()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError):
        pw.prepare(make_net(), {"rules": [rule_of((ROLES.get(name, "input"), name))]}, data=bad)


FRESH = """
import sys, torch
sys.path.insert(0, {tests!r})
import pennyweight as pw
for name in {names!r}:
    torch.save(pw.load(name, "test_battery_weights:make_net")(torch.load("images", weights_only=True)), name + ".out")
"""


def test_every_method_comes_back_in_a_fresh_process(tmp_path):
    torch.save(IMAGES, tmp_path / "images")
    expected = {}
    for case in CASES:
        name = "-".join(case)
        model = pw.convert(trained(case))
        size = pw.save(model, tmp_path / name)
        assert size == sum((tmp_path / name / file).stat().st_size for file in ("config.json", "model.safetensors"))
        expected[name] = model(IMAGES)
    code = FRESH.format(tests=str(HERE), names=list(expected))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment)
    for name, output in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.out", weights_only=True), output), name
