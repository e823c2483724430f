"""What every compressor owes. Runs for each one in the registry: a new method is tested by being registered."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml

from pennyweight import registry
from pennyweight.compress.contract import Compressor, LayerView
from pennyweight.errors import PennyweightError
from pennyweight.formats import from_bytes

METHODS = [entry.name for entry in registry.methods("compress")]


def make_layer(rows: int, cols: int, *, groups: int = 1, kind: str = "linear", scale: float = 1.0) -> LayerView:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    mix = torch.randn(groups, cols, cols, generator=generator, dtype=torch.float64) / cols**0.5
    hessian = mix @ mix.mT + 0.05 * torch.eye(cols, dtype=torch.float64)
    if kind == "embedding":
        hessian = torch.eye(cols, dtype=torch.float64)[None]
    row_weight = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    return LayerView("block.weight", torch.randn(rows, cols, generator=generator) * scale, hessian, row_weight, kind)


LAYERS = {
    "linear": lambda: make_layer(24, 40),
    "odd": lambda: make_layer(7, 133),
    "one weight": lambda: make_layer(1, 1),
    "one row": lambda: make_layer(1, 9),
    "one column": lambda: make_layer(9, 1),
    "embedding": lambda: make_layer(600, 12, kind="embedding"),
    "grouped convolution": lambda: make_layer(8, 9, groups=4, kind="conv"),
    "recurrent": lambda: make_layer(32, 8, kind="recurrent"),
    "tiny values": lambda: make_layer(6, 10, scale=1e-6),
    "large values": lambda: make_layer(6, 10, scale=1e4),
}


def method(name: str) -> Compressor:
    return registry.get(name, "compress").target()


def unchanged(layer: LayerView, before: LayerView) -> bool:
    fields = ("weight", "hessian", "row_weight")
    return all(torch.equal(getattr(layer, field), getattr(before, field)) for field in fields)


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("name", METHODS)
def test_candidates_are_what_they_claim(name, shape):
    layer, compressor = LAYERS[shape](), method(name)
    before = copy.deepcopy(layer)
    offers, candidates = compressor.offers(layer), list(compressor.candidates(layer))
    assert bool(candidates) == bool(offers)
    for candidate in candidates:
        assert candidate.method == name
        assert yaml.safe_load(yaml.safe_dump(dict(candidate.options))) == dict(candidate.options)
        packed = compressor.compress(layer, **candidate.options)
        blob = packed.to_bytes()
        assert candidate.nbytes == packed.nbytes == len(blob)
        decoded = packed.decode()
        assert decoded.dtype == torch.float32 and decoded.shape == layer.weight.shape
        assert bool(torch.isfinite(decoded).all())
        assert candidate.distortion == pytest.approx(layer.distortion(decoded), rel=1e-6, abs=1e-30)
        assert torch.equal(from_bytes(blob).decode(), decoded)
        assert compressor.compress(layer, **candidate.options).to_bytes() == blob
        assert copy.deepcopy(packed).to_bytes() == blob
    assert unchanged(layer, before)


@pytest.mark.parametrize("name", METHODS)
def test_something_is_offered_and_beats_dropping_the_weight(name):
    layer = make_layer(64, 96)
    best = min(candidate.distortion for candidate in method(name).candidates(layer))
    assert best < layer.distortion(torch.zeros_like(layer.weight))


@pytest.mark.parametrize("name", METHODS)
def test_more_bytes_are_worth_it(name):
    layer = make_layer(64, 96)
    candidates = sorted(method(name).candidates(layer), key=lambda candidate: candidate.nbytes)
    assert len(candidates) == 1 or candidates[-1].distortion < candidates[0].distortion


@pytest.mark.parametrize("damage", ["singular", "zero metric", "zero weight", "zero row weight", "dead columns"])
@pytest.mark.parametrize("name", METHODS)
def test_degenerate_layers_are_served(name, damage):
    layer, compressor = make_layer(16, 24), method(name)
    if damage == "singular":
        x = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        layer.hessian = (x.T @ x)[None]
    elif damage == "zero metric":
        layer.hessian.zero_()
    elif damage == "zero weight":
        layer.weight.zero_()
    elif damage == "zero row weight":
        layer.row_weight.zero_()
    else:
        layer.hessian[:, 5:9] = 0
        layer.hessian[:, :, 5:9] = 0
    for options in compressor.offers(layer):
        decoded = compressor.compress(layer, **options).decode()
        assert bool(torch.isfinite(decoded).all())
        if damage == "zero weight":
            assert bool((decoded == 0).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", METHODS)
def test_weights_that_are_not_finite_are_refused(name, bad):
    layer, compressor = make_layer(8, 12), method(name)
    options = (compressor.offers(layer) or [{}])[-1]
    layer.weight[3, 4] = bad
    with pytest.raises(PennyweightError):
        compressor.compress(layer, **options)


@pytest.mark.parametrize("name", METHODS)
def test_registry_entry_is_complete(name):
    entry = registry.get(name, "compress")
    assert issubclass(entry.target, Compressor) and entry.target.name == name
    assert entry.description and "\n" not in entry.description and len(entry.description) < 120
    assert not entry.paper or entry.paper.replace(".", "").isdigit()
