"""LAWN: what its card says must be true, and the search for the final homogeneous sub-network."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW

from pennyweight.errors import PennyweightWarning, PlanError, UnknownNameError
from pennyweight.models.resnet_cifar import resnet20
from pennyweight.optim import LAMB, LAWN, final_homogeneous
from pennyweight.training.building import make_optimizer
from pennyweight.training.loop import train as train_recipe
from pennyweight.training.settings import OptimizerSettings, TrainingRecipe
from stepping import closure_is_the_step, compiled_is_eager, resume_is_exact, same, train


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3, bias=False)]
    return nn.Sequential(*layers).to(dtype)


class Single(nn.Module):
    """One weight of two numbers, with the gradient one likes."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([values], dtype=torch.float64))

    def step(self, optimizer: torch.optim.Optimizer, *gradient: float) -> list[float]:
        self.weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        return self.weight[0].tolist()


INNER = {
    "sgd": lambda ps: SGD(ps, lr=0.5, momentum=0.9),
    "adam": lambda ps: Adam(ps, lr=0.1),
    "adamw": lambda ps: AdamW(ps, lr=0.1, weight_decay=0.3),
    "lamb": lambda ps: LAMB(ps, lr=0.1),
}


# ------------------------------------------------------------------------------------------------------ worked numbers


def test_sgd_worked():
    model = Single(3, 4)
    after = model.step(LAWN(SGD(model.parameters(), lr=0.5), model, ["weight"]), 1, 1)
    assert model.weight.grad is not None
    assert model.weight.grad[0].tolist() == pytest.approx([0.16, -0.12])
    assert after == pytest.approx([2.919416, 4.059188], abs=1e-6)


@pytest.mark.parametrize(("project", "expected"), [(True, [2.886869, 4.082400]), (False, [2.887324, 4.082078])])
def test_adam_worked(project, expected):
    model = Single(3, 4)
    optimizer = LAWN(Adam(model.parameters(), lr=0.1), model, ["weight"], project_update=project)
    assert model.step(optimizer, 1, 1) == pytest.approx(expected, abs=1e-6)


def test_lamb_worked():
    """Adam's first direction is the sign of the gradient, scaled from norm sqrt(2) to 5."""
    model = Single(3, 4)
    after = model.step(LAMB(model.parameters(), lr=0.1, eps=0.0), 1, -1)
    size = 0.1 * 5 / math.sqrt(2)
    assert after == pytest.approx([3 - size, 4 + size])
    zero = Single(0, 0)
    assert zero.step(LAMB(zero.parameters(), lr=0.1, eps=0.0), 1, -1) == pytest.approx([-0.1, 0.1])


def test_lamb_without_trust_is_adam():
    left, right = network(), network()
    train(left, LAMB(left.parameters(), lr=0.01, eps=1e-8, trust=False), 5)
    train(right, Adam(right.parameters(), lr=0.01), 5)
    for a, b in zip(left.parameters(), right.parameters()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("momentum", ["clear", "project", "keep"])
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_norms_are_constant(inner, momentum):
    model = network()
    optimizer = LAWN(inner(model.parameters()), model, "all_matrices", free_steps=2, momentum=momentum)
    weights = [p for p in model.parameters() if p.ndim == 2]
    train(model, optimizer, 2)
    norms = [w.detach().double().norm() for w in weights]
    for step in range(2, 8):
        train(model, optimizer, 1, start=step)
        for w, norm in zip(weights, norms):
            assert abs(float(w.detach().double().norm() / norm) - 1) <= 1e-6


def test_projected_gradient_is_tangent():
    model = network(torch.float64)
    optimizer = LAWN(SGD(model.parameters(), lr=0.1), model, "all_matrices")
    optimizer.switch()
    model(torch.ones(1, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.project_gradients()
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for w in model.parameters():
        if w.ndim == 2:
            assert w.grad is not None and abs(float((w.grad * w).sum())) < 1e-12
    optimizer.project_gradients()  # a second time changes nothing
    for before, w in zip(first, model.parameters()):
        assert torch.allclose(before, w.grad, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_free_phase_is_the_inner_optimizer(inner):
    left, right = network(), network()
    optimizer = LAWN(inner(left.parameters()), left, free_steps=4)
    train(left, optimizer, 4)
    train(right, inner(right.parameters()), 4)
    assert same(left, right)
    assert not optimizer.switched
    train(left, optimizer, 1, start=4)
    train(right, inner(right.parameters()), 1, start=4)
    assert optimizer.switched
    assert not same(left, right)


def test_logits_are_bounded_and_scale_with_the_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
    optimizer = LAWN(Adam(model.parameters(), lr=0.1), model)
    model(torch.ones(1, 6).double())
    optimizer.switch()
    norms = [float(w.norm()) for w in model.parameters()]
    train(model, optimizer, 30)
    x = torch.randn(50, 6).double()
    logits = model(x)
    assert (logits.norm(dim=1) <= math.prod(norms) * x.norm(dim=1) * (1 + 1e-9)).all()
    with torch.no_grad():
        for w in model.parameters():
            w.mul_(1.5)
    assert torch.allclose(model(x), 1.5**2 * logits)


def test_small_rates_step_along_the_tangent():
    """The distance from the plain tangent step is of second order in the rate."""

    def distance(lr: float) -> float:
        model = Single(3, 4)
        after = model.step(LAWN(SGD(model.parameters(), lr=lr), model, ["weight"]), 1, 1)
        return math.dist(after, [3 - lr * 0.16, 4 + lr * 0.12])

    assert distance(1e-1) / distance(1e-2) == pytest.approx(100, rel=0.01)


def test_weight_decay_hardly_matters():
    def trained(decay: float) -> torch.Tensor:
        model = network(torch.float64)
        train(model, LAWN(SGD(model.parameters(), lr=1e-3, weight_decay=decay), model, ["4.weight"]), 1)
        return model.get_parameter("4.weight").detach()

    assert (trained(0.0) - trained(0.1)).abs().max() < 1e-6


def test_scale_invariant_layer_has_a_tangent_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, eps=1e-30), nn.Linear(8, 3)).double()
    optimizer = LAWN(SGD(model.parameters(), lr=0.1), model, ["0.weight"])
    optimizer.switch()
    model(torch.randn(16, 6).double()).square().sum().backward()
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    before = gradient.clone()
    optimizer.project_gradients()
    assert torch.allclose(gradient, before, rtol=1e-9, atol=1e-12)


def test_zero_weight_stays_free():
    model = network()
    nn.init.zeros_(model[4].weight)  # type: ignore[arg-type]
    optimizer = LAWN(SGD(model.parameters(), lr=0.1), model, ["2.weight", "4.weight"])
    with pytest.warns(PennyweightWarning, match=r"4\.weight"):
        train(model, optimizer, 1)
    assert list(optimizer.own) == [model[2].weight]
    only = Single(0, 0)
    with pytest.warns(PennyweightWarning), pytest.raises(PlanError, match="zero at the switch"):
        only.step(LAWN(SGD(only.parameters(), lr=0.1), only, ["weight"]), 1, 1)


def test_momentum_at_the_switch():
    for momentum in ("clear", "project", "keep"):
        model = Single(3, 4)
        optimizer = LAWN(
            SGD(model.parameters(), lr=0.1, momentum=0.9), model, ["weight"], free_steps=1, momentum=momentum
        )
        model.step(optimizer, 1, 1)
        held = optimizer.state[model.weight]["momentum_buffer"].clone()
        optimizer.switch()
        buffer = optimizer.state[model.weight].get("momentum_buffer")
        if momentum == "clear":
            assert buffer is None
        elif momentum == "project":
            assert abs(float((buffer * model.weight).sum())) < 1e-12
        else:
            assert torch.equal(buffer, held)


# ---------------------------------------------------------------------------------------------------------- the search


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.first(x).relu()
        return 2 * self.last(hidden + self.inner(hidden))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return {"logits": self.layer(self.layer(x).relu())}["logits"], x


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1)),
        *(nn.Conv2d(8, 8, 3), nn.PReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 16, bias=False)),
        *(nn.LeakyReLU(), nn.Dropout(), nn.Linear(16, 10), nn.LogSoftmax(1)),
    )


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (network(), torch.ones(2, 6), ["4.weight", "2.weight"]),
        (network(), torch.ones(2, 5, 6), ["4.weight", "2.weight"]),
        (convolutional(), torch.ones(2, 3, 14, 14), ["13.weight", "10.weight", "6.weight", "2.weight"]),
        (resnet20(width=4), torch.ones(2, 3, 8, 8), ["linear.weight"]),
        (Residual(), torch.ones(2, 4), ["last.weight"]),
        (Tied(), torch.ones(2, 4), ["layer.weight"]),
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), torch.ones(2, 7, dtype=torch.long), ["1.weight"]),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), torch.ones(2, 4), ["3.weight"]),
    ],
)
def test_final_homogeneous(model, inputs, expected):
    assert final_homogeneous(model, inputs) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert final_homogeneous(model, inputs) == expected


def test_no_homogeneous_end():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    with pytest.raises(PlanError, match="name the layers"):
        final_homogeneous(model, torch.ones(1, 4))
    LAWN(SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(PlanError, match=r"name layers out of: 0\.weight"):
        model(torch.ones(1, 4))


def test_search_is_done_once_and_leaves_nothing_behind():
    model = network()
    optimizer = LAWN(SGD(model.parameters(), lr=0.1), model)
    with torch.no_grad():
        model(torch.ones(1, 6))
    assert optimizer.constrained is None
    with pytest.raises(PlanError, match="no forward pass"):
        optimizer.switch()
    model(torch.ones(1, 6))
    assert optimizer.constrained == [model[4].weight, model[2].weight]
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("layers", "message"),
    [("final", "all_matrices"), (["nothing.*"], "no weight matches"), ([], "none of the weights")],
)
def test_refuses_layers(layers, message):
    model = network()
    with pytest.raises(PlanError, match=message):
        LAWN(SGD(model.parameters(), lr=0.1), model, layers)


@pytest.mark.parametrize("options", [{"free_steps": -1}, {"momentum": "drop"}])
def test_refuses_options(options):
    model = network()
    with pytest.raises(PlanError, match="lawn"):
        LAWN(SGD(model.parameters(), lr=0.1), model, **options)


# ------------------------------------------------------------------------------------ closures, scalers, checkpoints


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("cut", [2, 6])
def test_resume_is_exact(inner, cut):
    """In the free phase and after the switch, which is at step 4."""
    resume_is_exact(network, lambda m: LAWN(inner(m.parameters()), m, free_steps=4), cut)


def test_norms_of_half_weights_are_stored_in_float32():
    model = network().bfloat16()
    optimizer = LAWN(SGD(model.parameters(), lr=0.1), model)
    train(model, optimizer, 1)
    again = LAWN(SGD(model.parameters(), lr=0.1), model)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for weight, kept in optimizer.own.items():
        assert again.own[weight]["lawn_norm"].dtype == torch.float32
        assert torch.equal(again.own[weight]["lawn_norm"], kept["lawn_norm"])


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_closure(inner):
    closure_is_the_step(network, lambda m: LAWN(inner(m.parameters()), m, free_steps=1))


def test_lbfgs():
    model = network()
    optimizer = LAWN(LBFGS(model.parameters(), lr=0.1, max_iter=3), model, ["4.weight"])
    norm = model.get_parameter("4.weight").detach().norm()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 6)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert torch.allclose(model.get_parameter("4.weight").norm(), norm, rtol=1e-6)


def test_scaler():
    model = network()
    optimizer = LAWN(Adam(model.parameters(), lr=0.1), model, free_steps=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    taken = 0
    for poison in (1.0, math.inf, 1.0, math.inf, 1.0):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 6)).square().sum() * poison).backward()
        scaler.step(optimizer)
        scaler.update()
        taken += poison == 1.0
        assert same(model, before) == (poison == math.inf)
        assert optimizer.switched == (taken >= 2)
    for weight, kept in optimizer.own.items():
        assert torch.allclose(weight.norm(), kept["lawn_norm"], rtol=1e-6)


def test_compiled_step():
    compiled_is_eager(network, lambda model: LAWN(SGD(model.parameters(), lr=0.1), model, ["4.weight"]))


# ------------------------------------------------------------------------------------------------------------- recipes

ZOO = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3, bias=False))

def points():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(5))
    return {"train": (x, x[:, :3].argmax(1)), "test": (x[:20], x[:20, :3].argmax(1))}
"""


def test_training_by_recipe_resumes_exactly(tmp_path: Path, monkeypatch):
    """Stopped after the switch within the second stage; LAWN is put around p-norm decay."""
    (tmp_path / "lawn_zoo.py").write_text(ZOO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    class Stop(Exception):
        pass

    def recipe(output: str) -> TrainingRecipe:
        around = [{"method": "pwd", "decay": 1e-3, "p": 0.8, "ramp": 4}, {"method": "lawn", "free_steps": 2}]
        values = {
            "model": {"name": "lawn_zoo:mlp"},
            "data": {"name": "lawn_zoo:points"},
            "batch": 16,
            "stages": [{"steps": 3}, {"steps": 7, "optimizer": {"around": around}}],
            "optimizer": {"name": "adam", "lr": 0.01},
            "checkpoint_every": 1,
            "output": output,
        }
        return TrainingRecipe.from_dict(values)

    def stop(what: str, done: int, total: int) -> None:
        if done == 7:
            raise Stop

    whole = train_recipe(recipe("whole"))
    with pytest.raises(Stop):
        train_recipe(recipe("parts"), progress=stop)
    resumed = train_recipe(recipe("parts"), resume=True)
    assert same(whole.model, resumed.model)


def test_by_name():
    model = network()
    around = ({"method": "lawn", "layers": ["4.*"], "free_steps": 3},)
    optimizer = make_optimizer(OptimizerSettings("lamb", 0.01, around=around), model)
    assert isinstance(optimizer, LAWN) and isinstance(optimizer.inner, LAMB)
    assert optimizer.param_groups[0]["lawn_free"] == 3
    with pytest.raises(UnknownNameError, match="'lawn'"):
        make_optimizer(OptimizerSettings("sgd", 0.01, around=({"method": "lawm"},)), model)


def test_recipe_loads():
    recipe = TrainingRecipe.load("recipes/lawn.yaml")
    first, second = (make_optimizer(recipe.optimizer_of(stage), network()) for stage in recipe.all_stages)
    assert isinstance(first, Adam)
    assert isinstance(second, LAWN)
    assert TrainingRecipe.from_dict(recipe.to_dict()) == recipe
