"""pWD: closed forms of its card, the equivalence with AdamW at p = 2, and that wrapper, kernels and torch agree."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW

from pennyweight import registry
from pennyweight.errors import PennyweightWarning, PlanError
from pennyweight.kernels import is_compiled
from pennyweight.kernels.optimizer import FusedDecay
from pennyweight.optim import LAMB, PSGD, PAdamW, PNormDecay
from pennyweight.optim.p_norm import exponent_at
from pennyweight.training.building import make_optimizer
from pennyweight.training.settings import OptimizerSettings, TrainingRecipe
from stepping import closure_is_the_step, compiled_is_eager, resume_is_exact, same, train


def weight(*values: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor([values], dtype=dtype))


def still(parameter: nn.Parameter, lr: float, decay: float, p: float, **options) -> PNormDecay:
    """pWD around an optimizer whose own step does nothing."""
    parameter.grad = torch.zeros_like(parameter)
    return PNormDecay(SGD([parameter], lr=lr), decay, p, **options)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)


MAKERS = {
    "padamw": lambda ps: PAdamW(ps, lr=0.01, weight_decay=0.02, p=[[0, 1.5], [8, 0.6]], ramp=6),
    "psgd": lambda ps: PSGD(ps, lr=0.05, momentum=0.9, weight_decay=0.01, p=0.8, ramp=6),
    "pwd": lambda ps: PNormDecay(Adam(ps, lr=0.01), 0.02, [[0, 1.5], [8, 0.6]], ramp=6),
    "pwd-lamb": lambda ps: PNormDecay(LAMB(ps, lr=0.01), 0.02, 0.7),
}


# ------------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize(("p", "expected"), [(2.0, 0.490196), (1.0, 0.490196), (0.5, 0.493028)])
def test_worked_steps(p, expected):
    w = weight(0.5)
    still(w, 0.1, 0.1, p).step()
    assert w.item() == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1.0, [0.041667, 0.033602, 0.025896, 0.018681, 0.012168, 0.006679]),
        (0.5, [0.034549, 0.019425, 0.0068233, 6.912e-4, 2.50e-6, 1.98e-12]),
    ],
)
def test_pure_decay_collapses(p, expected):
    w = weight(0.05)
    optimizer = still(w, 0.01, 1.0, p, zero_below=0.0)
    for value in expected:
        optimizer.step()
        assert w.item() == pytest.approx(value, rel=3e-3 if value < 1e-4 else 1e-4)


@pytest.mark.parametrize(
    ("p", "start", "expected"),
    [
        (2.0, [2.0, 0.3], [2 / 1.2, 0.25]),
        (1.0, [2.0, 0.3, 0.05, -0.3], [1.9, 0.2, 0.0, -0.2]),  # the soft threshold
        (0.5, [2.0, 1.0, 0.3, 0.05], [1.964325, 0.948665, 0.183175, 0.0]),
    ],
)
def test_fixed_points(p, start, expected):
    """Of (w - b)^2 / 2 + 0.1 |w|^p under gradient descent."""
    w = weight(*start)
    target = w.detach().clone()
    optimizer = PNormDecay(SGD([w], lr=0.1), 0.1, p)
    for _ in range(1000):
        w.grad = w.detach() - target
        optimizer.step()
    assert torch.allclose(w.detach(), torch.tensor([expected], dtype=torch.float64), atol=1e-6)
    assert torch.equal(w.detach() == 0, torch.tensor([expected]) == 0)  # exactly


def test_fixed_point_is_stationary_for_the_penalised_loss():
    w = weight(1.0, 2.0, 0.7)
    target = w.detach().clone()
    optimizer = PNormDecay(SGD([w], lr=0.05), 0.08, 1.4)
    for _ in range(800):
        w.grad = w.detach() - target
        optimizer.step()
    here = w.detach().clone().requires_grad_()
    ((here - target) ** 2 / 2 + 0.08 * here.abs() ** 1.4).sum().backward()
    assert here.grad is not None and here.grad.abs().max() < 1e-10


def test_existence_threshold_below_one():
    """p = 0.5, lambda = 0.1: only targets of at least 0.256496 have a fixed point but zero."""
    w = weight(0.2550, 0.2575)
    target = w.detach().clone()
    optimizer = PNormDecay(SGD([w], lr=0.1), 0.1, 0.5)
    for _ in range(1500):
        w.grad = w.detach() - target
        optimizer.step()
    assert w[0, 0] == 0
    assert w[0, 1] > 0.0854


def test_p_2_is_adamw_at_another_rate():
    """lr' = lr / (1 + 2 lr decay) and weight_decay = 2 decay: to rounding, step after step."""
    lr, decay = 0.03, 0.5
    ours, theirs = network(torch.float64), network(torch.float64)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    slower = lr / (1 + 2 * lr * decay)
    groups = [{"params": matrices, "lr": slower, "weight_decay": 2 * decay}, {"params": vectors, "weight_decay": 0.0}]
    train(ours, PAdamW(ours.parameters(), lr=lr, weight_decay=decay, p=2), 30)
    train(theirs, AdamW(groups, lr=lr), 30)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


def test_p_2_differs_from_weight_decay_at_second_order():
    def gap(lr: float) -> float:
        ours, theirs = weight(1.0, -0.5), weight(1.0, -0.5)
        ours.grad = theirs.grad = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
        PSGD([ours], lr=lr, weight_decay=0.4, p=2).step()
        with torch.no_grad():
            theirs.mul_(1 - lr * 0.8).sub_(theirs.grad, alpha=lr)
        return float((ours - theirs).detach().abs().max())

    assert gap(1e-3) < 1e-6
    assert gap(1e-2) / gap(1e-3) == pytest.approx(100, rel=0.05)


# -------------------------------------------------------------------------------------------------------- invariants


@settings(max_examples=60, deadline=None)
@given(
    p=st.floats(0.05, 5),
    lr=st.floats(0, 1),
    decay=st.floats(1e-6, 10),
    w=st.floats(-100, 100),
    d=st.floats(-10, 10),
)
def test_only_shrinks(p, lr, decay, w, d):
    """No sign changes, no growth, no NaN, for every p; also from zero and at rate zero."""
    parameter = weight(w)
    parameter.grad = torch.full_like(parameter, d)
    moved = w - lr * d
    PNormDecay(SGD([parameter], lr=lr), decay, p).step()
    after = parameter.item()
    assert math.isfinite(after)
    assert abs(after) <= abs(moved)
    assert after == 0 or math.copysign(1, after) == math.copysign(1, moved)


@pytest.mark.parametrize("make", [PAdamW, PSGD])
@pytest.mark.parametrize("p", [0.3, 1.0, 1.9])
def test_zero_absorbs(make, p):
    w = weight(0.0, 1.0, dtype=torch.float32)
    w.grad = torch.ones_like(w)
    optimizer = make([w], lr=0.1, weight_decay=0.01, p=p)
    for _ in range(3):
        optimizer.step()
    assert w[0, 0] == 0
    assert w[0, 1] > 0


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_nan_is_not_hidden_and_no_gradients_are_no_step(make):
    w = weight(1.0, float("nan"), dtype=torch.float32)
    optimizer = make([w])
    optimizer.step()
    assert w[0, 0] == 1
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert w[0, 0] != 1
    assert w[0, 1].isnan()


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_zero_with_p_above_two_is_free(lr):
    w = weight(0.0)
    w.grad = torch.ones_like(w)
    PNormDecay(SGD([w], lr=lr), 0.1, 3.0).step()
    assert w.item() == -lr


def test_rate_as_a_tensor_at_zero():
    w = weight(0.0, 0.5)
    w.grad = torch.zeros_like(w)
    PNormDecay(Adam([w], lr=torch.tensor(0.0)), 0.1, 0.5).step()
    assert w.tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda ps: PNormDecay(Adam(ps), 0.0, 0.5), Adam),
        (lambda ps: PAdamW(ps, weight_decay=0.0, fused=False), lambda ps: AdamW(ps, weight_decay=0.0)),
        (lambda ps: PAdamW(ps, weight_decay=0.0), lambda ps: AdamW(ps, weight_decay=0.0, fused=is_compiled())),
        (lambda ps: PSGD(ps, momentum=0.9, weight_decay=0.0, fused=False), lambda ps: SGD(ps, momentum=0.9)),
    ],
)
def test_without_decay_it_is_the_inner_optimizer(ours, theirs):
    left, right = network(), network()
    train(left, ours(left.parameters()), 5)
    train(right, theirs(right.parameters()), 5)
    assert same(left, right)


def test_moments_are_those_of_the_unpenalised_loss():
    w = weight(1.0)
    w.grad = torch.full_like(w, 0.5)
    optimizer = PAdamW([w], weight_decay=0.3, fused=False)
    optimizer.step()
    assert optimizer.state[w]["exp_avg"].item() == pytest.approx(0.05)


def test_lower_p_is_sparser():
    shares = []
    for p in (2.0, 1.0, 0.8, 0.5):
        model = network()
        train(model, PAdamW(model.parameters(), lr=0.02, weight_decay=0.03, p=p), 150)
        matrices = [q for q in model.parameters() if q.ndim == 2]
        shares.append(sum(int((q == 0).sum()) for q in matrices) / sum(q.numel() for q in matrices))
    assert shares[0] == 0
    assert all(left < right for left, right in itertools.pairwise(shares))


def test_threshold():
    """What is at or below it after the step is zero for p < 2; without one, or from p = 2 on, it stays."""
    for p, threshold, zeros in [(1.0, 1e-3, 1), (1.0, 0.0, 0), (2.0, 1e-3, 0)]:
        w = weight(5e-4, 0.5)
        still(w, 1e-6, 1e-6, p, zero_below=threshold).step()
        assert int((w == 0).sum()) == zeros


def test_vectors_and_parameters_without_gradient_stay():
    vector, matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    vector.grad = torch.zeros(3)
    PNormDecay(SGD([vector, matrix], lr=0.1), 1.0).step()
    assert torch.equal(vector, torch.ones(3))
    assert torch.equal(matrix, torch.ones(2, 2))


# --------------------------------------------------------------------------------------------- groups and schedules


def test_groups_have_their_own_values():
    a, b, c = weight(0.5), weight(0.5), weight(0.5)
    for w in (a, b, c):
        w.grad = torch.zeros_like(w)
    groups = [{"params": [a], "p": 0.5}, {"params": [b], "decay": 0.2}]
    optimizer = PNormDecay(SGD(groups, lr=0.1), 0.1, 1.0)
    optimizer.add_param_group({"params": [c], "p": 2.0})
    optimizer.step()
    assert a.item() == pytest.approx(0.493028, abs=1e-6)
    assert b.item() == pytest.approx(0.5 / 1.04)
    assert c.item() == pytest.approx(0.5 / 1.02)


def test_exponent_schedule():
    points = [[2, 2.0], [6, 1.0]]
    assert [exponent_at(points, step) for step in (0, 2, 3, 5, 6, 100)] == [2, 2, 1.75, 1.25, 1, 1]
    assert exponent_at(0.7, 10) == 0.7


def test_ramp_and_schedule_count_steps():
    w = weight(0.5)
    optimizer = still(w, 0.1, 0.1, [[0, 2.0], [2, 1.0]], ramp=2)  # type: ignore[arg-type]
    expected = 0.5
    for p, share in ((2.0, 0.0), (1.5, 0.5), (1.0, 1.0), (1.0, 1.0)):
        optimizer.step()
        expected /= 1 + p * 0.1 * 0.1 * share * expected ** (p - 2)
        assert w.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "options", [{"p": 0.0}, {"p": float("nan")}, {"p": []}, {"p": [[5, 1], [2, 1]]}, {"ramp": -1}, {"zero_below": -1.0}]
)
def test_refuses(options):
    with pytest.raises(PlanError, match="pwd"):
        PNormDecay(SGD([weight(1.0)], lr=0.1), **options)


def test_refuses_decaying_twice():
    with pytest.raises(PlanError, match="twice"):
        PNormDecay(AdamW([weight(1.0)]), 0.1)
    with pytest.raises(PlanError, match="negative"):
        PNormDecay(SGD([weight(1.0)], lr=0.1), -0.1)


# ------------------------------------------------------------------------------------------ compiled kernels and torch

WAYS = {
    "padamw": lambda ps, p, **how: PAdamW(ps, lr=0.01, weight_decay=0.05, p=p, amsgrad=True, **how),
    "psgd": lambda ps, p, **how: PSGD(ps, lr=0.02, momentum=0.9, dampening=0.2, weight_decay=0.05, p=p, **how),
    "psgd-nesterov": lambda ps, p, **how: PSGD(ps, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.05, p=p, **how),
    "psgd-plain": lambda ps, p, **how: PSGD(ps, lr=0.02, weight_decay=0.05, p=p, maximize=True, **how),
    "pwd": lambda ps, p, **_: PNormDecay(AdamW(ps, lr=0.01, weight_decay=0.0), 0.05, p),
}


@pytest.mark.parametrize("p", [0.4, 0.5, 0.8, 1.0, 1.3, 1.5, 2.0, 3.0, 4.5])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kernels", ["used", "refused", "missing"])
def test_steps_agree_with_float64(monkeypatch, way, p, kernels):
    """Each of ten steps, from the same weights and state, of two matrices and a vector, which does not decay.

    Not the ten together: where a weight crosses zero its decay depends on digits that float32 does not have.
    """
    if kernels == "missing":
        monkeypatch.setattr("pennyweight.kernels.optimizer._cpu", None)
        monkeypatch.setattr("pennyweight.kernels._told", True)
    g = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((5, 7), (3, 4, 6), (9,))]
    exact = [nn.Parameter(w.detach().double()) for w in weights]
    optimizer = way(weights, p, fused=False if kernels == "refused" else None)
    reference = way(exact, p)
    for _ in range(10):
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for w, e in zip(weights, exact):
            e.data = w.detach().double()
            w.grad = torch.randn(w.shape, generator=g)
            e.grad = w.grad.double()
        optimizer.step()
        reference.step()
        for w, e in zip(weights, exact):
            assert torch.allclose(w.double(), e, rtol=5e-6, atol=3e-7), float((w - e).abs().max())


@pytest.mark.skipif(not is_compiled(), reason="the kernels are not compiled")
@pytest.mark.parametrize(("make", "method"), [(PAdamW, "adam_step"), (PSGD, "sgd_step"), (still, "divisors")])
def test_kernels_are_used_where_they_fit(monkeypatch, make, method):
    calls = []
    kernel = getattr(FusedDecay, method)
    monkeypatch.setattr(FusedDecay, method, lambda *args, **keywords: (calls.append(1), kernel(*args, **keywords))[1])
    for dtype in (torch.float32, torch.float64):
        w = weight(1.0, dtype=dtype)
        w.grad = torch.ones_like(w)
        (still(w, 0.1, 0.1, 0.8) if make is still else make([w], p=0.8)).step()
    assert len(calls) == 1


@pytest.mark.skipif(not is_compiled(), reason="the kernels are not compiled")
@pytest.mark.parametrize("make", [PAdamW, PSGD])
def test_fused_demands(make, monkeypatch):
    single, double = weight(1.0, dtype=torch.float32), weight(1.0)
    make([single], p=0.8, fused=True)
    make([double], p=0.8)
    for parameters, p, reason in (([double], 0.8, "float64"), ([single], [[0, 2], [9, 4.5]], "p is 4.5")):
        with pytest.raises(PlanError, match=f"fused=True.*{reason}"):
            make(parameters, p=p, fused=True)
    monkeypatch.setattr("pennyweight.kernels.optimizer._cpu", None)
    with pytest.raises(PlanError, match="missing"):
        make([single], fused=True)


def test_says_once_that_the_kernels_are_missing(monkeypatch):
    monkeypatch.setattr("pennyweight.kernels.optimizer._cpu", None)
    monkeypatch.setattr("pennyweight.kernels._told", False)
    w = weight(1.0, dtype=torch.float32)
    w.grad = torch.ones_like(w)
    optimizer = PSGD([w])
    with pytest.warns(PennyweightWarning, match="compiled kernels"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("make", [PAdamW, PSGD, still])
def test_autograd_knows_of_the_step(make):
    w = weight(1.0, dtype=torch.float32)
    optimizer = still(w, 0.1, 0.1, 0.8) if make is still else make([w])
    loss = w.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_numbers_without_dimensions():
    w = nn.Parameter(torch.tensor(0.5))
    w.grad = torch.tensor(0.0)
    PSGD([w], lr=0.1, weight_decay=0.1, p=2.0, min_dims=0).step()
    assert w.item() == pytest.approx(0.5 / 1.02)


def test_first_step_has_no_dampening():
    ours, theirs = weight(1.0), weight(1.0)
    left = PSGD([ours], lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.0)
    right = SGD([theirs], lr=0.1, momentum=0.9, dampening=0.5)
    for _ in range(3):
        ours.grad = theirs.grad = torch.ones_like(ours)
        left.step()
        right.step()
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_orders_of_elements_the_kernels_do_not_take():
    torch.manual_seed(0)
    plain = nn.Parameter(torch.randn(4, 3, 3, 3))
    last = nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    gradient = torch.randn(4, 3, 3, 3)
    for w in (plain, last):
        w.grad = gradient.clone()
        optimizer = PAdamW([w], weight_decay=0.1, p=0.8)
        for _ in range(3):
            optimizer.step()
    assert not last.is_contiguous()
    assert torch.allclose(plain, last, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The factor is computed in float32: |w|^(p-2) of a small half has no room in float16."""
    w = nn.Parameter(torch.full((1, 1), 1e-3, dtype=dtype))
    w.grad = torch.zeros_like(w)
    PSGD([w], lr=1e-4, weight_decay=1e-2, p=0.5).step()
    exact = 1e-3 / (1 + 0.5 * 1e-6 * 1e-3**-1.5)
    assert w.item() == pytest.approx(exact, rel=1e-2)


# ------------------------------------------------------------------------------------ closures, scalers, checkpoints


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_resume_is_exact(make):
    resume_is_exact(network, lambda m: make(m.parameters()), 4)


def test_checkpoint_of_the_bare_optimizer_loads():
    model = network()
    bare = Adam(model.parameters(), lr=0.01)
    train(model, bare, 2)
    around = PNormDecay(Adam(model.parameters(), lr=0.5), 0.02, 0.7)
    around.load_state_dict(bare.state_dict())
    assert around.param_groups[0]["lr"] == 0.01
    assert around.param_groups[0]["p"] == 0.7
    train(model, around, 1)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_closure_and_deepcopy(make):
    model, optimizer = closure_is_the_step(network, lambda m: make(m.parameters()))
    copied_model, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (copied_model, copied)):
        train(m, o, 2)
    assert same(model, copied_model)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_skipped_steps_do_not_decay(make):
    model = network()
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    before = copy.deepcopy(model)
    steps = [group["decay_step"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for poison in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 6)).sum() * poison).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(model, before) == (poison == math.inf)
        if poison == math.inf:
            assert [group["decay_step"] for group in optimizer.param_groups] == steps


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: PAdamW(ps, p=0.8),
        lambda ps: PSGD(ps, lr=0.1, momentum=0.9, p=0.8),
        lambda ps: PNormDecay(SGD(ps, lr=0.1), 1e-2, 0.8),
    ],
)
def test_compiled_step(make):
    compiled_is_eager(network, lambda model: make(model.parameters()))


def test_schedulers_reach_the_rate():
    w = weight(0.5)
    optimizer = still(w, 0.1, 0.1, 2.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step()
    scheduler.step()
    optimizer.step()
    assert w.item() == pytest.approx(0.5 / 1.02 / 1.01)


# ------------------------------------------------------------------------------------------------------------ recipes


def test_by_name():
    assert {"pwd", "padamw", "psgd", "lawn", "lamb"} <= {entry.name for entry in registry.methods("optim")}
    model = network()
    settings = OptimizerSettings("padamw", 0.01, 1e-3, options={"p": 0.8})
    optimizer = make_optimizer(settings, model)
    assert isinstance(optimizer, PAdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-3, 0.0]
    around = ({"method": "pwd", "decay": 1e-3, "p": 0.8},)
    wrapped = make_optimizer(OptimizerSettings("sgd", 0.01, around=around), model)
    assert isinstance(wrapped, PNormDecay)
    with pytest.raises(PlanError, match="pwd"):
        make_optimizer(OptimizerSettings("sgd", 0.01, around=({"method": "pwd", "typo": 1},)), model)
    with pytest.raises(KeyError, match="'pwd'"):
        make_optimizer(OptimizerSettings("sgd", 0.01, around=({"method": "pwx"},)), model)
    with pytest.raises(KeyError, match="pwd"):  # not an optimizer by itself
        make_optimizer(OptimizerSettings("pwd", 0.01), model)


def test_recipe_loads():
    recipe = TrainingRecipe.load("recipes/pwd.yaml")
    assert isinstance(make_optimizer(recipe.optimizer, network()), PAdamW)
    assert TrainingRecipe.from_dict(recipe.to_dict()) == recipe
