"""AdaQuant: the objective never rises, layers are independent, limits, whole networks."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pennyweight.compress.adaquant import AdaQuant, AffineWeight, starting_grid, tune_weight
from pennyweight.compress.adaquant_model import adaquant
from pennyweight.compress.contract import LayerView
from pennyweight.errors import DataError, PlanError, UnknownNameError, WeightError
from pennyweight.formats import from_bytes
from pennyweight.layers.activation_quantizer import affine_quantize


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def view(rows: int, cols: int, groups: int = 1, seed: int = 0, n: int = 200) -> LayerView:
    """A layer whose inputs are correlated, as they are in networks."""
    generator = seeded(seed)
    mixing = torch.randn(cols, cols, generator=generator) / cols**0.5
    x = (torch.randn(groups, n, cols, generator=generator) @ mixing).relu()
    hessian = (x.transpose(1, 2) @ x / n).double()
    weight = torch.randn(rows, cols, generator=generator)
    return LayerView(
        "layer", weight, hessian, torch.ones(rows, dtype=torch.float64), "conv" if groups > 1 else "linear"
    )


def row_errors(layer: LayerView, decoded: Tensor) -> Tensor:
    error = (decoded - layer.weight).double().view(layer.groups, -1, layer.cols)
    return torch.einsum("grc,gcd,grd->gr", error, layer.hessian, error).flatten()


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 4),
    cols=st.integers(1, 37),
    groups=st.sampled_from([1, 2]),
    bits=st.integers(1, 8),
    group=st.sampled_from([0, 8]),
    seed=st.integers(0, 999),
)
def test_no_row_gets_worse_as_stored(rows: int, cols: int, groups: int, bits: int, group: int, seed: int) -> None:
    layer = view(rows * groups, cols, groups, seed)
    metric = layer.hessian.float()
    metric = metric / metric.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-30)
    start = starting_grid(layer.weight, metric, bits, group).pack(layer.weight)
    packed = AdaQuant().compress(layer, bits=bits, group=group, iterations=6)
    before, after = row_errors(layer, start.decode()), row_errors(layer, packed.decode())
    assert bool((after <= before * (1 + 1e-4) + 1e-9).all())
    assert torch.equal(from_bytes(packed.to_bytes()).decode(), packed.decode())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gains_over_rounding_to_nearest(bits: int) -> None:
    layer = view(32, 48)
    start = starting_grid(layer.weight, layer.hessian.float(), bits, 0).pack(layer.weight)
    packed = AdaQuant().compress(layer, bits=bits, group=0)
    ratio = layer.distortion(packed.decode()) / layer.distortion(start.decode())
    assert ratio < 0.8, ratio  # the card's bound; near 0.60 at each width


def test_the_gradient_is_that_of_the_objective() -> None:
    """What is differentiated, (quantized * EH).sum(), has half the gradient of tr(E H E^T)."""
    layer = view(5, 9)
    metric = layer.hessian.float()
    quantized = (layer.weight + 0.1 * torch.randn(5, 9, generator=seeded(2))).requires_grad_(True)
    error = quantized - layer.weight
    (true,) = torch.autograd.grad(((error @ metric[0]) * error).sum(), quantized)
    torch.testing.assert_close(true, 2 * (error @ metric[0]).detach())


def test_rows_do_not_depend_on_each_other() -> None:
    layer = view(6, 20)
    changed = copy.deepcopy(layer)
    changed.weight[3] = changed.weight[3].flip(0)  # same standard deviation of the whole, so the same learning rate
    a = AdaQuant().compress(layer, bits=3, group=0, iterations=30).decode()
    b = AdaQuant().compress(changed, bits=3, group=0, iterations=30).decode()
    others = torch.arange(6) != 3
    torch.testing.assert_close(a[others], b[others], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(a[3], b[3])


def test_scaling_the_weight_scales_the_result() -> None:
    layer = view(6, 20)
    scaled = copy.deepcopy(layer)
    scaled.weight *= 4  # a power of two: float16 steps scale exactly
    a = AdaQuant().compress(layer, bits=3, group=0, iterations=25).decode()
    b = AdaQuant().compress(scaled, bits=3, group=0, iterations=25).decode()
    torch.testing.assert_close(a * 4, b, rtol=1e-4, atol=1e-4)


def test_same_input_same_bytes_and_the_layer_is_not_changed() -> None:
    layer = view(6, 20)
    weight = layer.weight.clone()
    first, second = (AdaQuant().compress(layer, bits=3, group=8).to_bytes() for _ in range(2))
    assert first == second
    assert torch.equal(layer.weight, weight)


def test_zero_metric_and_constant_rows() -> None:
    layer = view(4, 10)
    layer.hessian.zero_()
    layer.weight[1] = 0
    layer.weight[2] = 0.5
    decoded = AdaQuant().compress(layer, bits=4, group=0, iterations=5).decode()
    assert bool(torch.isfinite(decoded).all())
    assert bool((decoded[1] == 0).all())
    torch.testing.assert_close(decoded[2], layer.weight[2], rtol=1e-2, atol=1e-3)


def test_embeddings_are_left_to_others_and_nan_is_refused() -> None:
    layer = view(4, 10)
    layer.kind = "embedding"
    assert AdaQuant().offers(layer) == []
    layer.kind = "linear"
    assert {"bits": 4, "group": 0} in AdaQuant().offers(layer)
    layer.weight[0, 0] = float("nan")
    with pytest.raises(WeightError, match="layer"):
        tune_weight(layer, bits=4)


def test_affine_weight_is_the_quantiser_applied_to_each_group() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=seeded(0))  # 27 columns: groups of 8, 8, 8 and 3
    grid = AffineWeight(weight, 3, 8)
    quantized = grid(weight)
    matrix = weight.flatten(1)
    for i, columns in enumerate(matrix.split(8, 1)):
        low, high = columns.amin(1, keepdim=True).clamp(max=0), columns.amax(1, keepdim=True).clamp(min=0)
        expected = affine_quantize(columns, high - low, low, 3)
        torch.testing.assert_close(quantized.flatten(1)[:, 8 * i : 8 * i + 8], expected)
    packed = grid.pack(weight)
    torch.testing.assert_close(packed.decode(), quantized.flatten(1).detach(), rtol=2e-3, atol=2e-3)


# --------------------------------------------------------------------------------------------------- whole networks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, stride=2, bias=False)
        self.middle = nn.Linear(8, 12)
        self.last = nn.Linear(12, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(x).relu()).relu().mean((2, 3))
        return self.last(self.middle(x).relu())


SITES = ["conv.weight", "grouped.weight", "middle.weight", "last.weight"]


def images(n: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=seeded(seed))


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_network_losses_never_rise_and_weights_are_the_packed_ones(mode: str) -> None:
    net, reference = Net(), Net()
    made = adaquant(net, images().split(16), 3, 4, mode, iterations=20)  # pyright: ignore[reportArgumentType]
    assert list(made.packed) == list(made.losses) == SITES
    assert all(after <= before for before, after in made.losses.values())
    assert any(after < before for before, after in made.losses.values())
    assert made.model is net
    for name, packed in made.packed.items():
        module = net.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(module.weight.detach().flatten(1), packed.decode())  # pyright: ignore
        assert packed.bits == 3
        assert module.input_quantizer.bits == (8 if name == "conv.weight" else 4)  # pyright: ignore
    assert set(net.state_dict()) - set(reference.state_dict()) == {
        f"{name.removesuffix('.weight')}.input_quantizer.{part}" for name in SITES for part in ("range", "zero")
    }
    with torch.no_grad():
        error = (net(images()) - reference(images())).square().mean() / reference(images()).var()
    assert error < 0.3
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_sixteen_bits_change_next_to_nothing() -> None:
    net, reference, x = Net(), Net(), images()
    made = adaquant(net, [x], 16, 16, iterations=3)
    with torch.no_grad():
        assert float((net(x) - reference(x)).abs().max()) < 1e-3
    assert all(after < 1e-5 for _, after in made.losses.values())


def test_parallel_layers_do_not_depend_on_each_other_and_sequential_starts_alike() -> None:
    four = adaquant(Net(), [images()], 4, 4, "parallel", iterations=10)
    mixed = adaquant(Net(), [images()], {"conv.weight": 2, "middle.weight": 4}, 4, "parallel", iterations=10)
    assert mixed.packed["middle.weight"].to_bytes() == four.packed["middle.weight"].to_bytes()
    assert set(mixed.packed) == {"conv.weight", "middle.weight"}  # layers not named stay float
    assert not hasattr(mixed.model.last, "input_quantizer")
    # With nothing quantised before it, a sequential layer sees the float inputs.
    alone = adaquant(Net(), [images()], {"middle.weight": 4}, 4, "sequential", iterations=10)
    assert alone.packed["middle.weight"].to_bytes() == four.packed["middle.weight"].to_bytes()
    sequential = adaquant(Net(), [images()], 2, 4, "sequential", iterations=10)
    assert sequential.packed["middle.weight"].bits == 2


def test_sequential_mends_what_comes_before() -> None:
    """With the first layer at 1 bit, fitting the later ones to its actual output must bring the network closer."""
    x, reference = images(128), Net()
    bits = {"conv.weight": 1, "grouped.weight": 8, "middle.weight": 8, "last.weight": 8}

    def error(mode: str) -> float:
        net = adaquant(Net(), [x], bits, 8, mode, iterations=30).model  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            return float((net(x) - reference(x)).square().mean())

    assert error("sequential") < 0.8 * error("parallel")


def test_distillation_never_makes_the_network_worse() -> None:
    net, reference, x = Net(), Net(), images()
    made = adaquant(net, x.split(16), 2, 3, iterations=5, distil_steps=30)
    assert made.distilled is not None
    before, after = made.distilled
    assert after < before
    with torch.no_grad():
        error = float((net(x) - reference(x)).square().mean() / reference(x).square().mean())
    assert error == pytest.approx(after, rel=0.1)  # what is packed is what was distilled


def test_keep_first_last_and_bad_requests() -> None:
    made = adaquant(Net(), [images()], 3, 3, iterations=1, keep_first_last=True)
    assert [made.packed[name].bits for name in SITES] == [8, 3, 3, 8]
    with pytest.raises(UnknownNameError, match=r"middle\.weight"):
        adaquant(Net(), [images()], {"midle.weight": 4}, 4)
    with pytest.raises(PlanError, match="17"):
        adaquant(Net(), [images()], 17, 4)
    with pytest.raises(DataError, match="empty"):
        adaquant(Net(), [], 4, 4)
    with pytest.raises(DataError, match="NaN"):
        adaquant(Net(), [images() * float("nan")], 4, 4)
