"""Steps with p-norm decay by the compiled kernels: against float64, on every instruction set, for any threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]
from pennyweight.kernels.optimizer import POWER_ERROR, FusedDecay, divide_, fits

pytestmark = pytest.mark.skipif(_cpu is None, reason="the kernels are not compiled")
ISAS = _cpu.instruction_sets() if _cpu else []
EXACT = (0.5, 1.0, 1.5, 2.0)
EXPONENTS = (0.05, 0.4, 0.5, 0.8, 1.0, 1.3, 1.5, 1.9, 2.0, 2.1, 2.5, 3.0, 3.7, 4.0)
SIZES = (0, 1, 15, 16, 17, 100)


@pytest.fixture(autouse=True)
def best_instruction_set():
    yield
    _cpu.use(ISAS[-1])


def random(size: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def exact_divisor(w: Tensor, p: float, strength: float) -> Tensor:
    return 1 + strength * w.double().abs() ** (p - 2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("p", EXPONENTS)
def test_power(isa, p):
    """Within its bound for every mantissa, and from 2^-62 to 2^20; negative weights are as positive ones."""
    _cpu.use(isa)
    bound = 4e-7 if p in EXACT else POWER_ERROR / (2 if p < 2 else 1)
    for exponent in range(-62, 20, 3):
        w = torch.cat([torch.linspace(1, 8, 4001) * 2.0**exponent, -torch.tensor([1.0, 1.5]) * 2.0**exponent])
        power = w.double().abs() ** (p - 2)
        strength = float(1 / power.min())  # divisors from 2 on
        if not 2.0**-80 < strength < 1e30:
            continue
        found = FusedDecay(p, strength, 0).divisors(w).double()
        error = (found - 1) / (strength * power) - 1
        assert float(error.abs().max()) < bound, (exponent, float(error.abs().max()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("p", EXPONENTS)
def test_zero_absorbs_below_two_and_is_free_above(isa, p):
    _cpu.use(isa)
    for w in (0.0, -0.0, *([] if p in EXACT else [1e-19, -1e-19, 1e-45])):
        for strength in (1e-3, 1e-40):
            divisor = float(FusedDecay(p, strength, 0).divisors(torch.tensor([w])))
            assert divisor == (float("inf") if p < 2 else pytest.approx(1 + strength * (p == 2)))


# ------------------------------------------------------------------------------------------------------ whole steps


def adam_in_float64(
    lists: list[Tensor], step: int, p: float, strength: float, zero_below: float, **options
) -> list[Tensor]:
    w, g, mean, square, *largest = (t.double() for t in lists)
    beta1, beta2, rate = options["beta1"], options["beta2"], options["rate"]
    mean = beta1 * mean + (1 - beta1) * (-g if options["maximize"] else g)
    square = beta2 * square + (1 - beta2) * g**2
    largest = [torch.maximum(largest[0], square)] if largest else []
    root = (largest[0] if largest else square).sqrt() / (1 - beta2**step) ** 0.5 + options["eps"]
    moved = (w - rate / (1 - beta1**step) * mean / root) / exact_divisor(w, p, strength)
    return [torch.where(moved.abs() <= zero_below, 0.0, moved), mean, square, *largest]


def sgd_in_float64(lists: list[Tensor], p: float, strength: float, zero_below: float, **options) -> list[Tensor]:
    w, g, *momentum = (t.double() for t in lists)
    direction = g = -g if options["maximize"] else g
    if momentum:
        momentum = [options["momentum"] * momentum[0] + (1 - options["dampening"]) * g]
        direction = g + options["momentum"] * momentum[0] if options["nesterov"] else momentum[0]
    moved = (w - options["rate"] * direction) / exact_divisor(w, p, strength)
    return [torch.where(moved.abs() <= zero_below, 0.0, moved), *momentum]


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    """To a unit in the last place of the numbers that are added, however small their sum, and the error of the power.

    (Without fused multiplication and addition, as in emulation, two roundings of half a unit come together.)
    """
    for ours, exact in zip(found, expected):
        unit = 2.0**-23 * max(1.0, float(exact.abs().max())) if exact.numel() else 0.0
        assert torch.allclose(ours.double(), exact, rtol=4e-6, atol=unit), float((ours - exact).abs().max())


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    p=st.sampled_from(EXPONENTS),
    sizes=st.lists(st.one_of(st.sampled_from(SIZES), st.integers(0, 70)), min_size=1, max_size=3),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    zero_below=st.sampled_from([0.0, 1e-13, 1e-2]),
    strength=st.sampled_from([1e-7, 1e-3, 0.1]),
    step=st.integers(1, 2000),
    seed=st.integers(0, 10**6),
)
def test_adam(isa, p, sizes, amsgrad, maximize, zero_below, strength, step, seed):
    _cpu.use(isa)
    options = {"rate": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "maximize": maximize}
    tensors = []
    for k, size in enumerate(sizes):
        squares = [random(size, seed + 10 * k + i).square() for i in range(1 + amsgrad)]
        tensors.append([*(random(size, seed + 10 * k + 2 + i) for i in range(3)), *squares])
    expected = [adam_in_float64(t, step + k, p, strength, zero_below, **options) for k, t in enumerate(tensors)]
    columns = [list(column) for column in zip(*tensors)]
    steps = [step + k for k in range(len(sizes))]
    FusedDecay(p, strength, zero_below).adam_step(columns, steps, **options)
    for (w, _, *state), exact in zip(tensors, expected):
        agree([w, *state], exact)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    p=st.sampled_from(EXPONENTS),
    sizes=st.lists(st.one_of(st.sampled_from(SIZES), st.integers(0, 70)), min_size=1, max_size=3),
    momentum=st.sampled_from([0.0, 0.9]),
    dampening=st.sampled_from([0.0, 0.3]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    zero_below=st.sampled_from([0.0, 1e-13, 1e-2]),
    strength=st.sampled_from([1e-7, 1e-3, 0.1]),
    seed=st.integers(0, 10**6),
)
def test_sgd(isa, p, sizes, momentum, dampening, nesterov, maximize, zero_below, strength, seed):
    _cpu.use(isa)
    nesterov = nesterov and momentum > 0 and dampening == 0
    options = {"rate": 0.01, "momentum": momentum, "dampening": dampening, "nesterov": nesterov, "maximize": maximize}
    tensors = [[random(size, seed + 10 * k + i) for i in range(2 + (momentum > 0))] for k, size in enumerate(sizes)]
    expected = [sgd_in_float64(t, p, strength, zero_below, **options) for t in tensors]
    columns = [list(column) for column in zip(*tensors)]
    FusedDecay(p, strength, zero_below).sgd_step(columns, **options)
    for (w, _, *state), exact in zip(tensors, expected):
        agree([w, *state], exact)


@pytest.mark.parametrize("isa", ISAS)
def test_division(isa):
    _cpu.use(isa)
    for size in SIZES:
        w, divisors = random(size, size), 1 + random(size, size + 1).abs()
        divided = w / divisors
        divide_(w, divisors, 0.3)
        assert torch.equal(w, torch.where(divided.abs() <= 0.3, 0.0, divided))
    w = torch.tensor([float("nan"), 1.0, 0.0])
    divide_(w, torch.ones(3), 1e-13)
    assert w[0].isnan() and w[1] == 1 and w[2] == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("p", [0.5, 0.8, 1.0, 2.0, 3.0])
def test_same_bits_whatever_the_threads_and_the_pieces(isa, p):
    """Also for the same numbers as many weights, whose parts fall elsewhere in vectors and pieces."""
    _cpu.use(isa)
    decay, threads = FusedDecay(p, 1e-3, 1e-13), torch.get_num_threads()
    numbers = [random(70_001, i) for i in range(3)]
    options = {"rate": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "maximize": False}
    found = []
    try:
        for count, cuts in ((1, [70_001]), (3, [70_001]), (2, [1, 40_000, 7, 29_993])):
            torch.set_num_threads(count)
            w, g, mean, square, momentum = *(t.clone() for t in numbers), numbers[2].square(), numbers[0].clone()
            parts = [list(t.split(cuts)) for t in (w, g, mean, square)]
            decay.adam_step(parts, [3] * len(cuts), **options)
            divisors = decay.divisors(w)
            sgd = {"rate": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": True, "maximize": False}
            decay.sgd_step([parts[0], parts[1], list(momentum.split(cuts))], **sgd)
            found.append([w, mean, square, divisors, momentum])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_instruction_sets_differ_in_the_last_digit_at_most():
    found = {}
    for isa in ISAS:
        _cpu.use(isa)
        lists = [[random(1000, i)] for i in range(3)] + [[random(1000, 3).square()]]
        FusedDecay(0.8, 1e-3, 0).adam_step(lists, [5], rate=0.01, beta1=0.9, beta2=0.99, eps=1e-8, maximize=False)
        found[isa] = lists[0][0]
    for isa in ISAS:
        assert torch.allclose(found[isa], found["plain"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("isa", ISAS)
def test_huge_gradients(isa):
    """The sign of a first step is all that Adam sees, up to the size that the docstring names."""
    _cpu.use(isa)
    for size in (1e10, 1e20):
        w, g, mean, square = torch.ones(20), torch.full((20,), size), torch.zeros(20), torch.zeros(20)
        adam = {"rate": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "maximize": False}
        FusedDecay(0.8, 0.0, 0).adam_step([[w], [g], [mean], [square]], [1.0], **adam)
        assert torch.allclose(w, torch.tensor(0.9), rtol=1e-5)


def test_gradients_are_not_written():
    g = np.ones(37, dtype=np.float32)
    g.flags.writeable = False
    w, momentum = np.ones(37, dtype=np.float32), np.zeros(37, dtype=np.float32)
    _cpu.sgd_step([w], [g], [momentum], 0.1, 0.9, 0.0, False, False, _cpu.Decay(1.0, 0.1, -1.0), 1)
    assert (g == 1).all() and (momentum == 1).all() and w == pytest.approx(0.9 / 1.1)


def test_refusals():
    for p, strength in ((0.0, 0.1), (4.1, 0.1), (float("nan"), 0.1), (1.0, -0.1)):
        with pytest.raises(ValueError, match="decay"):
            FusedDecay(p, strength, 0)
    decay, one, two = FusedDecay(1.0, 0.1, 0), torch.ones(1), torch.ones(2)
    adam = {"rate": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "maximize": False}
    for lists, steps in (
        (([two], [one], [two], [two]), [1]),
        (([two], [two], [two], [two], [one]), [1]),
        (([two, two], [two], [two], [two]), [1, 1]),
        (([two], [two], [], [two]), [1]),
        (([two], [two], [two], [two]), []),
    ):
        with pytest.raises(ValueError, match="step of"):
            decay.adam_step(lists, steps, **adam)
    sgd = {"rate": 0.1, "dampening": 0.0, "nesterov": False, "maximize": False}
    for lists, momentum in ((([two], [two]), 0.9), (([two], [two], [two]), 0.0), (([two], [two], [one]), 0.9)):
        with pytest.raises(ValueError, match="step of"):
            decay.sgd_step(lists, momentum=momentum, **sgd)
    with pytest.raises(ValueError, match="divisors"):
        divide_(two, one, 0.0)
    with pytest.raises(TypeError):
        divide_(two.double(), two.double(), 0.0)
    with pytest.raises(TypeError):
        divide_(torch.ones(4, 4).T[:2], torch.ones(2, 4), 0.0)


def test_what_fits():
    ones = torch.ones(4, 4)
    assert fits([ones, torch.nn.Parameter(ones)], 0.3)
    for other in (ones.double(), ones[:, :2], ones.to("meta"), ones.to_sparse(), torch.nn.Buffer(ones).bfloat16()):
        assert not fits([ones, other], 0.3)
    assert not fits([ones], 4.5)
