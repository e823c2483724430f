"""The report's norms: closed forms, bounds that hold and are reached, and where nothing can be said."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import pennyweight as pw
from pennyweight.cli import app
from pennyweight.compress.data import Call
from pennyweight.errors import DataError, PlanError
from pennyweight.lipschitz import jacobian_norm, lipschitz_bound, operator_norm
from pennyweight.losses.path_norm import path_norm
from pennyweight.models.psilon_net import psilon_resnet
from pennyweight.models.resnet_cifar import resnet20
from pennyweight.report_norms import measure_norms


def linear(*rows: list[float]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight = nn.Parameter(torch.tensor(rows))
    return layer


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
    ).double().eval()  # fmt: skip


def test_norms_of_a_weight_by_hand():
    (row,) = measure_norms(nn.Sequential(linear([3.0, 0.0], [0.0, -4.0])), p=0.5).layers
    assert (row.name, row.shape, row.weights, row.zeros) == ("0.weight", (2, 2), 4, 0.5)
    assert (row.l1, row.l2, row.largest) == (7.0, 5.0, 4.0)
    assert row.power_sum == pytest.approx(3**0.5 + 2) and row.adaptivity is None
    assert measure_norms(linear([3.0, 4.0]), p=2).layers[0].power_sum == pytest.approx(25)


def test_logits_and_what_gradient_is_left():
    """Of z = W x the gradient of the cross-entropy is (softmax(z) - onehot) x^T."""
    weight = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])
    model, x = nn.Sequential(linear(*weight.tolist())), torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])
    logits = x @ weight.T
    for targets in (None, torch.tensor([2, 1, 0])):
        classes = logits.argmax(1) if targets is None else targets
        gradient = (logits.softmax(1) - F.one_hot(classes, 3)).T @ x / 3
        found = measure_norms(model, [x[:2], x[2:]], targets)
        assert found.logit_scale == pytest.approx(logits.abs().mean().item())
        assert found.logit_spread == pytest.approx(logits.std(1, correction=0).mean().item())
        assert found.gradient == pytest.approx(gradient.norm().item(), rel=1e-5)
        assert found.layers[0].adaptivity == pytest.approx((gradient.norm() / weight.norm()).item(), rel=1e-5)
    assert model[0].weight.grad is None


def test_growing_logits_take_the_adaptivity_away():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4, bias=False), torch.randn(50, 6)
    before = measure_norms(model, x)
    with torch.no_grad():
        model.weight *= 10
    after = measure_norms(model, x)
    assert after.logit_scale == pytest.approx(10 * before.logit_scale, rel=1e-5)
    assert after.layers[0].adaptivity < 0.1 * before.layers[0].adaptivity


def test_path_norms_exact_bound_and_of_convolutions():
    chain = nn.Sequential(linear([1.0, -2.0], [3.0, 0.5]), nn.ReLU(), linear([-1.0, 2.0]))
    found = measure_norms(chain)
    assert found.path_norm == pytest.approx(1 * 3 + 2 * 3.5) and not found.path_norm_is_bound
    residual = psilon_resnet(4, 2, width=5, hidden=3)
    found = measure_norms(residual)
    assert found.path_norm == pytest.approx(path_norm(residual).item()) and found.path_norm_is_bound
    assert found.layers[0].name.endswith("weight")
    model, x = convolutions(), torch.randn(5, 2, 8, 8).double()
    a, b = x + 0.1 * torch.randn_like(x), x
    ratio = (model(a) - model(b)).abs().sum(1) / (a - b).abs().flatten(1).amax(1)
    found = measure_norms(model, x).path_norm
    assert found is not None and found > float(ratio.detach().max())
    with torch.no_grad():  # all positive, a constant input reaches it: the corner pixels have fewer paths
        for layer in model:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.abs_()
                layer.bias.abs_()
    change = (model(1 + torch.ones(1, 2, 8, 8).double()) - model(torch.ones(1, 2, 8, 8).double())).abs().sum()
    assert change.item() == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_estimate_is_below_the_bound_and_both_hold(seed):
    torch.manual_seed(seed)
    model, x = convolutions(), torch.randn(40, 2, 8, 8).double()
    model[1].running_var.uniform_(0.2, 2)
    model[1].running_mean.normal_()
    call = Call((x,))
    low, high, loose = jacobian_norm(model, call), lipschitz_bound(model, call), lipschitz_bound(model)
    assert low is not None and low <= high <= loose * (1 + 1e-9)
    a, b = x[:20], x[20:]
    with torch.no_grad():
        assert float(((model(a) - model(b)).norm(dim=1) / (a - b).flatten(1).norm(dim=1)).max()) <= high
    assert "Identity" not in repr(model)  # not folded itself


def test_a_linear_network_reaches_its_bound():
    torch.manual_seed(0)
    layer = nn.Linear(7, 5).double()
    top = torch.linalg.svdvals(layer.weight.detach())[0].item()
    assert lipschitz_bound(layer) == pytest.approx(top) == jacobian_norm(layer, Call((torch.randn(3, 7).double(),)))
    tall = torch.randn(2100, 2060)
    assert operator_norm(tall) >= torch.linalg.vector_norm(tall @ torch.linalg.svd(tall[:50])[2][0]).item()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 5, 4, stride=2, dilation=2, padding=3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(2, 3, (2, 3), stride=(3, 2), padding_mode="circular", padding=(0, 1)),
        nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2),
    ],
)
def test_convolutions_never_exceed_their_bound(layer):
    torch.manual_seed(0)
    layer = layer.double()
    x = torch.randn(1, layer.in_channels, *[9] * (layer.weight.ndim - 2)).double()
    jacobian = torch.autograd.functional.jacobian(lambda t: layer(t).flatten(), x).flatten(1)
    top = torch.linalg.svdvals(jacobian)[0].item()
    assert 0.4 * lipschitz_bound(layer) < top <= lipschitz_bound(layer) * (1 + 1e-9)


def test_where_nothing_can_be_said():
    images = torch.randn(2, 3, 16, 16)
    found = measure_norms(resnet20(width=2).eval(), images)
    assert found.path_norm is None and found.lipschitz_bound is None
    assert found.lipschitz_estimate is not None and found.lipschitz_estimate > 0
    words = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3))
    found = measure_norms(words, torch.zeros(5, 2, dtype=torch.int64))
    assert found.lipschitz_estimate is None and found.logit_scale is not None
    with pytest.raises(PlanError, match="padding"):
        lipschitz_bound(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(PlanError, match="p is 0"):
        measure_norms(words, p=0)
    with pytest.raises(DataError, match="each of 5 samples"):
        measure_norms(words, torch.zeros(5, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))


def test_report_of_a_model_in_training_and_packed(tmp_path):
    model, x = small_net(), torch.randn(30, 6)
    with torch.no_grad():
        model[0].weight[:, :3] = 0
    made = pw.report(model, norms=True, inputs=x, p=1.0)
    assert made.norms is not None and made.norms.layers[0].zeros == 0.5
    assert made.size == 4 * (6 * 40 + 40 + 40 * 3 + 3) and made.to_dict()["norms"]["layers"][0]["l1"] > 0
    page = made.save(tmp_path / "report.html").read_text()
    assert "<h2>Norms</h2>" in page and "nan" not in page.partition("<body>")[2].lower() and "adaptivity" in page
    small = pw.shrink(small_net(), size=2500, data=x)
    packed = pw.report(small, norms=True, inputs=x)
    assert packed.norms is not None and packed.norms.layers[0].adaptivity is None
    assert packed.norms.path_norm == pytest.approx(path_norm(small).item())
    assert "adaptivity" not in str(packed) and "path norm" in str(packed) and "path norm" not in str(pw.report(small))
    assert "norms" not in pw.report(small).to_dict()
    pw.prepare(model, {"rules": [{"match": "0", "weight": {"method": "psilon"}}]})
    rows = {row.name: row for row in measure_norms(model, x).layers}
    assert rows["0.weight"].l1 == pytest.approx(40, rel=1e-5) and rows["0.weight"].adaptivity is not None


def test_inspect_shows_the_norms_of_files_and_of_a_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "norms_zoo.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).eval()\n"
        "def data():\n    return [torch.ones(8, 6)]\n"
    )
    pw.save(pw.shrink(small_net(), size=2500), tmp_path / "small")

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["inspect", *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "Lipschitz" not in run("small")
    named = ("--norms", "--reference", "norms_zoo:net", "--data", "norms_zoo:data")
    assert "Lipschitz constant, at most" in run("small", *named) and "checksum ok" in run("small", *named)
    found = json.loads(run("norms_zoo:net", "--norms", "--p", "1", "--json"))
    assert found["norms"]["p"] == 1 and math.isclose(
        found["norms"]["layers"][0]["l1"], found["norms"]["layers"][0]["power_sum"]
    )
    (tmp_path / "trained").mkdir()
    save_file(dict(small_net().state_dict()), tmp_path / "trained" / "model.safetensors")
    (tmp_path / "trained" / "recipe.yaml").write_text(
        "model: {name: 'norms_zoo:net'}\ndata: {name: 'norms_zoo:labelled'}\nbatch: 4\nsteps: 1\n"
    )
    with open(tmp_path / "norms_zoo.py", "a") as file:
        file.write("def labelled():\n    return {'train': (torch.ones(8, 6), torch.zeros(8, dtype=torch.int64))}\n")
    monkeypatch.delitem(__import__("sys").modules, "norms_zoo")
    run("trained", "--norms", "-o", "page.html")
    assert "<h2>Norms</h2>" in (tmp_path / "page.html").read_text()
