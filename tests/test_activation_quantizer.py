"""The affine quantiser: hand-worked values, exact zero, gradients against finite differences, calibration."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pennyweight.errors import DataError
from pennyweight.layers.activation_quantizer import (
    ActivationQuantizer,
    affine_grid,
    affine_quantize,
    attach_input_quantizer,
    detach_input_quantizer,
    interval,
    round_through,
    row_intervals,
)


def codes_of(x: Tensor, r: Tensor, z: Tensor, bits: int) -> Tensor:
    """The integer behind each quantised value."""
    step, zero = affine_grid(r, z, bits)
    return (affine_quantize(x, r, z, bits) / step + zero).round()


EXAMPLE = torch.tensor([-1.0, -0.3, 0.0, 0.4, 2.0])
R, Z = torch.tensor(3.0), torch.tensor(-1.0)


@pytest.mark.parametrize(
    ("bits", "step", "zero", "codes", "values"),
    [
        (2, 1.0, -1, [-2, -1, -1, -1, 1], [-1, 0, 0, 0, 2]),
        (3, 3 / 7, -2, [-4, -3, -2, -1, 3], [-6 / 7, -3 / 7, 0, 3 / 7, 15 / 7]),
    ],
)
def test_by_hand(bits: int, step: float, zero: int, codes: list[int], values: list[float]) -> None:
    got_step, got_zero = affine_grid(R, Z, bits)
    assert got_step.item() == pytest.approx(step)
    assert got_zero.item() == zero
    assert codes_of(EXAMPLE, R, Z, bits).tolist() == codes
    torch.testing.assert_close(affine_quantize(EXAMPLE, R, Z, bits), torch.tensor(values, dtype=torch.float32))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 10),
    seed=st.integers(0, 10_000),
    r=st.floats(0.01, 100),
    share=st.floats(0, 1),
    exponent=st.integers(-6, 6),
)
def test_zero_is_exact_few_values_and_scaling(bits: int, seed: int, r: float, share: float, exponent: int) -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(seed)) * r
    x[0] = 0
    span, low = torch.tensor(r), torch.tensor(-share * r)
    quantized = affine_quantize(x, span, low, bits)
    assert quantized[0] == 0
    assert len(quantized.unique()) <= 2**bits
    c = 2.0**exponent  # a power of two, so that scaling is exact in floating point
    assert torch.equal(codes_of(x * c, span * c, low * c, bits), codes_of(x, span, low, bits))
    assert torch.equal(affine_quantize(x * c, span * c, low * c, bits), quantized * c)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_values_on_the_grid_return_exactly(bits: int) -> None:
    r, z = torch.tensor(float(2**bits - 1)) / 4, torch.tensor(-(2 ** (bits - 1)) / 4)  # step 1/4, exact in binary
    grid = torch.arange(2**bits) / 4 + z
    assert torch.equal(affine_quantize(grid, r, z, bits), grid)


def surrogate(x: Tensor, r: Tensor, z: Tensor, bits: int, fixed: tuple[Tensor, Tensor]) -> Tensor:
    """The quantiser with its two rounding errors held fixed: a smooth function with the straight-through gradient."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = r / (2**bits - 1)
    zero = (low - z / step + fixed[0]).clamp(low, high)
    return ((x / step + zero).clamp(low, high) + fixed[1] - zero) * step


@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_are_those_of_the_straight_through_surrogate(bits: int) -> None:
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    r = torch.full((5, 1), 2.3, dtype=torch.float64) + torch.arange(5)[:, None] * 0.1
    z = torch.full((5, 1), -1.1, dtype=torch.float64)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = r / (2**bits - 1)
    first = (low - z / step).round() - (low - z / step)
    u = (x / step + (low - z / step).round()).clamp(low, high)
    fixed = (first, u.round() - u)
    variables = [v.clone().requires_grad_(True) for v in (x, r, z)]
    weights = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    assert torch.autograd.gradcheck(lambda *v: surrogate(*v, bits, fixed), variables)
    expected = torch.autograd.grad((surrogate(*variables, bits, fixed) * weights).sum(), variables)
    output = affine_quantize(*variables, bits)
    torch.testing.assert_close(output, surrogate(x, r, z, bits, fixed))
    for got, wanted in zip(torch.autograd.grad((output * weights).sum(), variables), expected):
        torch.testing.assert_close(got, wanted)
    assert bool((expected[0] == 0).any()) and bool((expected[0] != 0).any())  # both sides of the clamp were tried


def test_round_through_rounds_half_to_even_and_passes_gradients() -> None:
    x = torch.tensor([0.5, 1.5, 3.3, -2.5], requires_grad=True)
    y = round_through(x)
    assert y.tolist() == [0, 2, 3, -2]
    (gradient,) = torch.autograd.grad((y * torch.arange(4)).sum(), x)
    assert gradient.tolist() == [0, 1, 2, 3]


def test_interval_contains_zero_and_is_never_empty() -> None:
    r, z = interval(torch.tensor([1.0, -3.0, 0.0, -1.0]), torch.tensor([2.0, -1.0, 0.0, 4.0]))
    assert r.tolist() == [2, 3, 1, 5]
    assert z.tolist() == [0, -3, 0, -1]


def test_extremes_average_over_samples_then_batches() -> None:
    quantizer = ActivationQuantizer(8)
    first = torch.tensor([[-1.0, 0.0, 3.0], [-3.0, 2.0, 5.0]])  # means: -2, 4
    second = torch.tensor([[0.0, 1.0, 10.0]])  # 0, 10
    quantizer.calibrate([first, second], "extremes")
    assert quantizer.zero.item() == -1
    assert quantizer.range.item() == 8


def test_searched_clipping_beats_the_extremes_on_rare_large_values() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).abs()
    x[0, 0] = 40.0

    def error(method: str) -> float:
        quantizer = ActivationQuantizer(4).calibrate([x], method)  # pyright: ignore[reportArgumentType]
        return float((quantizer(x) - x).square().mean().detach())

    # One value of 40 among 16,384 costs about 0.1 a value if clipped away (a little more as the sample always holds the
    # extremes); the full range costs 2.7^2 / 12 = 0.6 at worst.
    assert error("squared_error") < 0.13
    wide = affine_quantize(x, torch.tensor(40.0), torch.tensor(0.0), 4)
    assert error("squared_error") < 0.3 * float((wide - x).square().mean())


def test_search_does_not_fall_in_step_with_image_rows() -> None:
    x = torch.zeros(64, 16, 32, 32)
    x[..., 1:] = torch.rand(64, 16, 32, 31, generator=torch.Generator().manual_seed(0))  # column 0 is always zero
    assert ActivationQuantizer(4).calibrate([x]).range.item() == pytest.approx(1.0, rel=0.1)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), cols=st.integers(1, 30), bits=st.integers(1, 6), seed=st.integers(0, 999))
def test_row_search_is_never_worse_than_the_extremes(rows: int, cols: int, bits: int, seed: int) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) ** 3

    def errors(method: str) -> Tensor:
        r, z = row_intervals(weight, bits, method)  # pyright: ignore[reportArgumentType]
        assert r.shape == z.shape == (rows, 1)
        return (affine_quantize(weight, r, z, bits) - weight).square().sum(1)

    assert bool((errors("squared_error") <= errors("extremes")).all())


def test_bad_data_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        ActivationQuantizer(4).calibrate([])
    with pytest.raises(DataError, match="NaN"):
        ActivationQuantizer(4).calibrate([torch.tensor([[1.0, float("nan")]])])
    with pytest.raises(ValueError, match="17"):
        ActivationQuantizer(17)


def test_attached_quantiser_acts_copies_and_detaches() -> None:
    layer, x = nn.Linear(6, 3), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    plain = layer(x)
    quantizer = ActivationQuantizer(3).calibrate([x])
    attach_input_quantizer(layer, quantizer)
    expected = nn.functional.linear(quantizer(x), layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(expected, plain)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.input_quantizer.range.fill_(100.0)  # pyright: ignore
    assert torch.equal(layer(x), expected)
    assert not torch.equal(twin(x), expected)
    attach_input_quantizer(layer, quantizer)  # again: still applied once
    assert len(layer._forward_pre_hooks) == 1
    assert detach_input_quantizer(layer) is quantizer
    assert torch.equal(layer(x), plain)
    assert detach_input_quantizer(layer) is None


def test_state_dict_round_trip_and_dtypes() -> None:
    quantizer = ActivationQuantizer(5, range=2.5, zero=-0.5)
    other = ActivationQuantizer(5)
    other.load_state_dict(quantizer.state_dict())
    x = torch.linspace(-1, 3, 50)
    assert torch.equal(quantizer(x), other(x))
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16
    assert set(quantizer.state_dict()) == {"range", "zero"}


def test_project_keeps_the_range_positive_and_zero_inside() -> None:
    quantizer = ActivationQuantizer(4, range=-1.0, zero=0.5)
    quantizer.project()
    assert quantizer.range.item() > 0
    assert quantizer.zero.item() == 0
    quantizer = ActivationQuantizer(4, range=1.0, zero=-5.0)
    quantizer.project()
    assert quantizer.zero.item() == -1
