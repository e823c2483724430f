"""Estimators against their cards: closed forms, worked numbers, limits and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from pennyweight.errors import PlanError
from pennyweight.estimators import Estimator, make_estimator


def at(name: str, progress: float = 0.0, **options) -> Estimator:
    estimator = make_estimator(name, **options)
    estimator.progress.fill_(progress)
    return estimator


def slope(estimator: Estimator, *points: float) -> list[float]:
    return estimator.surrogate(torch.tensor(points, dtype=torch.float64)).tolist()


def integral(estimator: Estimator, low: float, high: float, *corners: float) -> float:
    return quad(lambda x: slope(estimator, x)[0], low, high, points=corners, limit=400)[0]


def progress_of_power(o: float, o_end: float = 3.0) -> float:
    """Where on its schedule ReSTE's power is o."""
    return math.acos(1 - (o - 1) / (o_end - 1)) * 2 / math.pi


# Straight through, Bi-Real: both rise by 2, the jump of the sign.


def test_windows_are_closed_and_integrate_to_the_jump_of_the_sign():
    assert slope(at("ste"), -1.0001, -1.0, 0.0, 1.0, 1.0001) == [0, 1, 1, 1, 0]
    assert slope(at("identity"), -1e9, 0.0, 1e9) == [1, 1, 1]
    assert slope(at("bi-real"), -2.0, -0.75, 0.0, 0.25, 1.0) == [0, 0.5, 2, 1.5, 0]
    assert integral(at("ste"), -2, 2, -1, 1) == pytest.approx(2)
    assert integral(at("bi-real"), -2, 2, -1, 0, 1) == pytest.approx(2)


def test_bi_real_approximation_is_the_published_polynomial():
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    piecewise = torch.tensor([-1.0, -1.0, 2 * -0.5 + 0.25, 0.0, 2 * 0.5 - 0.25, 1.0, 1.0])
    assert torch.equal(at("bi-real").approximation(x), piecewise)


def test_rounding_is_half_to_even_on_the_grid_and_between():
    estimator = at("round")
    assert estimator(torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.49])).tolist() == [-2, -2, 0, 0, 2, 2, 3]
    grid = torch.arange(-128, 128, dtype=torch.float32)
    assert torch.equal(estimator(grid), grid)


# Annealed sigmoids.


@pytest.mark.parametrize("name", ["tanh", "arctan"])
def test_annealed_slopes_start_at_one_and_close_in_on_the_sign(name):
    assert slope(at(name, 0.0), 0.0)[0] == pytest.approx(1.0)  # gain 10, sharpness 0.1
    assert slope(at(name, 0.5), 0.0)[0] == pytest.approx(1.0, rel=1e-6)  # both 1
    assert slope(at(name, 1.0), 0.0)[0] == pytest.approx(10.0, rel=1e-6)
    x = torch.tensor([0.3, -0.7, 2.0], dtype=torch.float64)
    distance = [(at(name, p).approximation(x) - x.sign()).abs().max() for p in (0.5, 0.75, 1.0)]
    assert distance[0] > distance[1] > distance[2]
    far = at(name, 1.0).approximation(torch.tensor([1e9]))
    assert far.item() == pytest.approx(1.0)


def test_arctan_tails_are_heavier_than_tanh_tails():
    assert slope(at("arctan", 1.0), 1.0)[0] > 1e4 * slope(at("tanh", 1.0), 1.0)[0]


# ReCU.


def test_recu_worked_row():
    row = torch.tensor([3.5775, -1.7888, 0.8944, -2.6831], dtype=torch.float64)
    estimator = at("recu")
    assert estimator.quantile(row).item() == pytest.approx(2.6920, abs=1e-3)
    assert estimator.surrogate(row).tolist() == [0, 1, 1, 1]


def test_recu_quantile_follows_the_published_schedule():
    ones = torch.ones(5, dtype=torch.float64)
    for progress, expected in ((0.0, 1.203973), (0.5, 1.638411), (1.0, 3.912023)):
        assert at("recu", progress).quantile(ones).item() == pytest.approx(expected, abs=2e-5)


# FDA.


def test_fda_worked_slopes():
    assert slope(at("fda"), 0.0, 0.5, 1.0, 1.0001) == pytest.approx([1.273240, 1.071841, 0.579843, 0], abs=1e-6)
    late = at("fda", 1.0)
    assert slope(late, 0.0, 0.999) == pytest.approx([2.291831, -0.280406], abs=1e-5)
    root = math.pi / 3.6
    assert slope(late, root - 1e-3)[0] > 0 > slope(late, root + 1e-3)[0]


@settings(deadline=None, max_examples=40)
@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0.05, 3.1))
def test_fda_closed_form_equals_the_sum_of_cosines(x, progress, omega):
    estimator = at("fda", progress, omega=omega)
    n = 9 + min(math.floor(9 * estimator.progress.item()), 8)
    direct = 4 * omega / math.pi * sum(math.cos((2 * i + 1) * omega * x) for i in range(n + 1))
    assert slope(estimator, x)[0] == pytest.approx(direct, abs=1e-9)


# ReSTE.


def test_reste_at_power_one_is_a_wide_straight_through():
    assert slope(at("reste"), 0.0, 0.05, 0.1, 1.5, -1.5, 1.51) == [1, 1, 1, 1, 1, 0]


def test_reste_worked_slopes():
    three = at("reste", 1.0)
    assert integral(three, -1, 1, -0.1, 0.1) == pytest.approx(2, rel=1e-5)
    points = (0.0, 0.1, 0.100001, 0.125, 0.5, 1.0, 1.5, 1.51)
    expected = [4.641589, 4.641589, 1.547189, 1.333333, 0.529134, 1 / 3, 0.254382, 0]
    assert slope(three, *points) == pytest.approx(expected, abs=2e-5)
    two = at("reste", progress_of_power(2.0))
    assert slope(two, 0.05, 1.0, 1.5) == pytest.approx([3.162278, 0.5, 0.408248], abs=1e-5)


def test_reste_schedule_is_a_quarter_cosine():
    powers = [at("reste", p).power().item() for p in (0, 0.25, 0.5, 0.75, 1)]
    assert powers == pytest.approx([1, 1.152241, 1.585786, 2.234633, 3], abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.floats(1.0, 10.0), st.floats(0, 1))
def test_reste_rises_by_two_and_never_steepens(o_end, progress):
    estimator = at("reste", progress, o_end=o_end)
    ends = estimator.approximation(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([-1, 1], rel=1e-5)
    x = torch.linspace(0, 2, 201, dtype=torch.float64)
    k = estimator.surrogate(x)
    assert bool((k >= 0).all()) and bool((k.diff() <= 1e-12).all())
    assert torch.equal(estimator.surrogate(-x), k)
    o, m = estimator.power().item(), estimator.m
    inside, outside = slope(estimator, m, m * (1 + 1e-12))
    assert inside / outside == pytest.approx(o, rel=1e-5)


def test_reste_error_falls_as_the_power_grows():
    z = torch.tensor([0.2, -0.5, 1.2, -0.9], dtype=torch.float64)
    errors = []
    for o, expected in ((1.0, 0.940000), (2.0, 0.403102), (3.0, 0.220065)):
        approximation = at("reste", progress_of_power(o)).approximation(z)
        errors.append((approximation - z.sign()).square().sum().item())
        assert errors[-1] == pytest.approx(expected, abs=1e-5)
    assert errors == sorted(errors, reverse=True)


def test_reste_clamped_inner_slope_is_continuous():
    estimator = at("reste", 1.0, inner="clamp", m=0.05)
    assert slope(estimator, 0.0)[0] == pytest.approx(2.456, abs=1e-3)
    assert slope(estimator, 0.05)[0] == pytest.approx(slope(estimator, 0.05 + 1e-9)[0], rel=1e-5)


def test_reste_is_finite_in_half_precision_near_the_pole():
    x = torch.tensor([0.0, 6e-8, 6.1e-5, 0.1], dtype=torch.float16)
    assert bool(torch.isfinite(at("reste", 1.0, o_end=30.0).surrogate(x)).all())


# BiPer.


def test_biper_worked_values():
    estimator = at("biper")
    x = torch.tensor([0.05, 0.10, 0.2], dtype=torch.float64)
    assert estimator.approximation(x).tolist() == pytest.approx([0.841471, 0.909297, -0.756802], abs=1e-6)
    assert estimator.surrogate(x).tolist() == pytest.approx([10.806046, -8.322937, -13.072872], abs=1e-6)
    assert estimator(x).tolist() == [1, 1, -1]
    assert slope(estimator, math.pi / 40)[0] == pytest.approx(0, abs=1e-12)
    assert slope(estimator, 0.0)[0] == 20


@settings(deadline=None, max_examples=40)
@given(st.floats(-2, 2), st.floats(1, 40))
def test_biper_is_an_odd_square_wave(w, omega):
    estimator, x = at("biper", omega=omega), torch.tensor(w, dtype=torch.float64)
    phase = abs(math.sin(omega * w))
    if phase < 1e-9:  # on an edge: the side depends on the last bit
        return
    assert estimator(x) == estimator(x + 2 * math.pi / omega) == -estimator(x + math.pi / omega) == -estimator(-x)
    assert abs(slope(estimator, w)[0]) <= omega


# PokeBNN.


def test_pokebnn_window_and_unit_slope_of_its_scaled_output():
    estimator, bound = at("pokebnn"), 3.0
    x = torch.tensor([-5, -1e-6, 0, 1e-6, 2.9, 5])
    assert (estimator(x) * bound / 2).tolist() == [-1.5, -1.5, 1.5, 1.5, 1.5, 1.5]
    scaled = [value * bound / 2 for value in slope(estimator, 2.97, 2.9765624, 2.9765626, 2.98)]
    assert scaled == pytest.approx([1, 1, 0, 0])
    assert integral(estimator, -3, 3, -2.9765625, 2.9765625) == pytest.approx(4 * (1 - 2**-7))


def test_pokebnn_channel_bound_spares_all_but_the_largest():
    estimator = at("pokebnn", bound="channel")
    weight = torch.tensor([[0.2, -0.05, 0.4, -0.3], [0.0, 0.0, 0.0, 0.0]])
    bound = estimator.bound_of(weight)
    assert (estimator(weight) * bound / 2)[0].tolist() == pytest.approx([0.2, -0.2, 0.2, -0.2])
    assert (estimator.surrogate(weight) * bound / 2)[0].tolist() == [1, 1, 0, 1]
    assert bool(torch.isfinite(estimator.surrogate(weight.half())).all())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ste", {"window": 0}),
        ("tanh", {"start": 0}),
        ("arctan", {"start": 2.0, "end": 1.0}),
        ("recu", {"start": 0.4}),
        ("recu", {"end": 1.0}),
        ("fda", {"omega": 4.0}),
        ("fda", {"terms": 0}),
        ("reste", {"o_end": 0.5}),
        ("reste", {"m": 2.0}),
        ("reste", {"inner": "tangent"}),
        ("biper", {"omega": -1}),
        ("pokebnn", {"bound": "layer"}),
        ("pokebnn", {"bound": 0}),
        ("ste", {"window": float("nan")}),
    ],
)
def test_settings_without_a_meaning_are_refused(name, options):
    with pytest.raises(PlanError):
        make_estimator(name, **options)
