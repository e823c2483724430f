"""From sparse training to a small file: exact zeros stay zeros, exactly or in few bits, and bytes decide the format."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

import pennyweight as pw
from pennyweight.cli import app
from pennyweight.compress import contract
from pennyweight.compress.contract import LayerView, compressor, kept_of
from pennyweight.compress.dense import half_precision
from pennyweight.compress.entropy_gptq import EntropyGPTQ
from pennyweight.compress.error_feedback import by_group, feedback_uniform
from pennyweight.compress.realise import _masked_solution
from pennyweight.errors import PennyweightWarning, PlanError, WeightError
from pennyweight.formats import Dense16, Sparse
from pennyweight.layers.packed import packed_weights
from pennyweight.layers.sites import weight_sites
from pennyweight.training.loop import train
from pennyweight.training.schedule import set_progress
from pennyweight.training.settings import TrainingRecipe
from pennyweight.training.trained import load_trained, samples_of


def pruned_net(share: float = 0.9, seed: int = 0) -> nn.Sequential:
    """A convolution, a batch norm and two linear layers, most of whose weights are zero."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * 36, 40), nn.ReLU(), nn.Linear(40, 5)),
    ).eval()
    with torch.no_grad():
        for site in weight_sites(model):
            threshold = site.parameter.abs().flatten().quantile(share)
            site.parameter.mul_(site.parameter.abs() > threshold)
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
        model[1].weight.uniform_(0.5, 1.5)
    return model


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.ndim >= 2}


def images(count: int = 48) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# --- convert ---


def test_convert_keeps_every_value_and_takes_fewer_bytes(tmp_path):
    model, plain = pruned_net(), pruned_net()
    expected = model.state_dict()
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    before = model(images())
    dense = pw.save(plain, tmp_path / "dense")
    size = pw.save(pw.convert(model), tmp_path / "small")
    assert {type(w) for w in packed_weights(model).values()} == {Sparse}
    weights = sum(int((p != 0).sum()) for name, p in expected.items() if p.ndim >= 2)
    total = sum(p.numel() for name, p in expected.items() if p.ndim >= 2)
    entropy = total * -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9)) / 8
    assert size < 4 * weights + 1.1 * entropy + 2000 and size < dense
    loaded = pw.load(tmp_path / "small", model=pruned_net(seed=3))
    assert torch.equal(loaded(images()), before)
    for name, tensor in expected.items():
        module, _, attribute = name.rpartition(".")
        assert torch.equal(getattr(loaded.get_submodule(module), attribute), tensor), name
    assert pw.save(loaded, tmp_path / "again") == size  # still exact


def test_half_takes_whichever_format_is_smaller(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight.mul_(torch.rand(64, 64) < 0.1)
    expected = [layer.weight.detach().half().float() for layer in model]
    packed = packed_weights(pw.convert(model, half=True))
    assert isinstance(packed["1.weight"], Sparse) and not isinstance(packed.get("0.weight"), Sparse)
    assert torch.equal(packed["1.weight"].decode(), expected[1])
    assert packed["1.weight"].nbytes < Dense16.encode(expected[1]).nbytes
    for share in (0.0, 0.01, 0.05, 0.3, 0.7, 0.99):
        weight = torch.randn(60, 90) * (torch.rand(60, 90) >= share)
        made = half_precision(weight)
        both = Dense16.encode(weight).nbytes, Sparse.encode(weight, weight != 0).nbytes
        assert made.nbytes == min(both) if share >= 0.05 else made.nbytes == both[0]
        assert torch.equal(made.decode(), weight.half().float())


def test_a_dense_model_is_refused_and_left_alone():
    model = nn.Linear(8, 8)
    weight = model.weight.detach().clone()
    with pytest.raises(PlanError, match="enough exact zeros"):
        pw.convert(model)
    assert torch.equal(model.weight, weight)
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    with pytest.raises(WeightError, match="weight holds NaN"):
        pw.convert(model)


def test_psilon_ends_as_sparse_layers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 80), nn.ReLU(), nn.Linear(80, 60), nn.ReLU(), nn.Linear(60, 2))
    rule = {"match": "Linear", "weight": {"method": "psilon", "initial": None, "sparsify": 0.5, "sharpness": 8}}
    pw.prepare(model, {"rules": [rule]})
    set_progress(model, 1.0)
    model.eval()
    x = torch.randn(4, 60)
    before, weight = model(x), model[2].weight.detach().clone()
    assert float((weight == 0).float().mean()) > 0.5
    pw.save(pw.convert(model), tmp_path / "small")
    assert isinstance(packed_weights(model)["2.weight"], Sparse)
    assert torch.equal(model[2].weight, weight) and torch.equal(model(x), before)
    fresh = nn.Sequential(nn.Linear(60, 80), nn.ReLU(), nn.Linear(80, 60), nn.ReLU(), nn.Linear(60, 2))
    assert torch.equal(pw.load(tmp_path / "small", model=fresh)(x), before)


def test_signs_of_a_companded_layer_and_the_zeros_of_another_share_a_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(64, 40) < 0.1)
    chain = [{"method": "weight-compander"}, {"method": "binary", "estimator": "ste"}]
    pw.prepare(model, {"rules": [{"match": "2", "weight": chain}]})
    x, model = torch.randn(3, 40), model.eval()
    before = model(x)
    kinds = {name: type(w).__name__ for name, w in packed_weights(pw.convert(model)).items()}
    assert kinds["0.weight"] == "Sparse" and kinds["2.weight"] == "Binary"
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


# --- shrink ---


def layer(rows: int = 12, cols: int = 30, share: float = 0.8) -> LayerView:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=g) * (torch.rand(rows, cols, generator=g) >= share)
    x = torch.randn(400, cols, generator=g) @ torch.randn(cols, cols, generator=g)
    hessian = (x.T @ x / len(x))[None]
    return LayerView("w", weight, hessian, torch.ones(rows, dtype=torch.float64), kept=kept_of(weight))


def test_a_weight_counts_as_pruned_from_a_quarter_of_zeros_on():
    weight = torch.ones(10, 10)
    weight.view(-1)[:24] = 0
    assert kept_of(weight) is None and kept_of(0 * weight) is None
    weight.view(-1)[24] = 0
    kept = kept_of(weight)
    assert kept is not None and torch.equal(kept, weight != 0)


def test_error_feedback_with_every_weight_kept_is_error_feedback():
    view = layer(share=0.0)
    ((_, factor),) = by_group(view, 0.01, True)
    row, column = torch.rand(12) + 0.1, torch.rand(30) + 0.5
    free = feedback_uniform(view.weight, factor, row, column)
    kept = feedback_uniform(view.weight, factor, row, column, torch.ones(12, 30, dtype=torch.bool))
    assert torch.equal(free, kept)


def test_zeros_stay_zeros_at_every_step_and_the_others_make_up_for_it():
    view = layer()
    assert view.kept is not None
    for step in (1.0, 0.1, 0.006):
        packed = EntropyGPTQ().compress(view, step=step)
        decoded = packed.decode()
        assert bool((decoded[~view.kept] == 0).all())
        grid = packed.scale.all() * (1 if packed.column_scale is None else packed.column_scale.all())
        nearest = (view.weight / grid).round() * grid
        assert step == 1.0 or view.distortion(decoded) < view.distortion(nearest)
        free = LayerView("w", view.weight, view.hessian, view.row_weight)
        assert step > 0.1 or packed.nbytes < EntropyGPTQ().compress(free, step=step).nbytes


def test_masked_least_squares_is_the_solution_row_by_row():
    view = layer()
    assert view.kept is not None
    left = view.hessian.double() + 0.1 * torch.eye(30).double()
    right = torch.randn(1, 12, 30, generator=torch.Generator().manual_seed(2)).double()
    found = _masked_solution(left, right, view.weight[None].double(), view.kept[None])
    for row in range(12):
        columns = view.kept[row].nonzero().flatten()
        exact = torch.linalg.solve(left[0][columns][:, columns], right[0, row, columns])
        torch.testing.assert_close(found[0, row, columns], exact, rtol=1e-6, atol=1e-8)
    assert bool((found[0][~view.kept] == 0).all())


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("recover", [0, 10])
def test_a_pruned_network_keeps_its_zeros_through_shrink(data, recover):
    if recover and not data:
        return
    model = pruned_net()
    was_zero = zeros(model)
    batches = [images(16), images(24)] if data else None
    size = 4000
    small = pw.shrink(model, size=size, data=batches, recover=recover)
    assert small._pennyweight.size <= size
    for name, packed in packed_weights(small).items():
        matrix = was_zero[name].flatten(1)
        assert bool((packed.decode()[matrix] == 0).all()), name
    assert small._pennyweight.size > 0.95 * size


def test_at_half_precisions_size_nothing_is_lost_but_rounding():
    model = pruned_net()
    small = pw.shrink(model, ratio=2.0, data=[images()])
    assert {type(w) for w in packed_weights(small).values()} == {Sparse}
    torch.testing.assert_close(small(images()), model(images()), rtol=1e-2, atol=1e-2)


def test_keeping_zeros_pays_at_equal_bytes(monkeypatch):
    """A pruned network loses less than when its zeros are taken for numbers like any other."""
    model = pruned_net()
    target, errors = model(images()).detach(), []
    for share in (contract.PRUNED, 2.0):
        monkeypatch.setattr(contract, "PRUNED", share)
        small = pw.shrink(model, size=3500, data=[images()])
        errors.append(float((small(images()).detach() - target).square().mean()))
    assert errors[0] < 0.8 * errors[1], errors


def test_magnitude_pruning_offers_the_zeros_there_are():
    view = layer(40, 50, 0.8)
    assert view.kept is not None
    offers = compressor("rd-prune").candidates(view)
    own = [c for c in offers if c.options["amount"] == pytest.approx(1 - float(view.kept.double().mean()))]
    assert [c.options["value_bits"] for c in own] == [3, 4, 6, 8]
    assert own[-1].distortion < 1e-3 * view.distortion(0 * view.weight)


# --- from a recipe to the file ---


def blobs():
    """Two classes of images [1, 8, 8] that one bright corner tells apart."""
    g = torch.Generator().manual_seed(4)
    pixels, labels = torch.randint(0, 80, (160, 1, 8, 8), dtype=torch.uint8, generator=g), torch.arange(160) % 2
    pixels[labels == 1, :, :4, :4] += 120
    return {"train": (pixels[:120], labels[:120]), "test": (pixels[120:], labels[120:])}


def classifier() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * 64, 32), nn.ReLU(), nn.Linear(32, 2)),
    )


def recipe_file(directory, **changes):
    values = {
        "model": {"name": f"{__name__}:classifier"},
        "data": {"name": f"{__name__}:blobs", "validation": 20},
        "batch": 20,
        "steps": 60,
        "optimizer": {
            "name": "padamw", "lr": 0.01, "weight_decay": 0.2, "options": {"p": 0.8, "zero_below": 1e-6},
        },
        "checkpoint_every": 60,
        "output": str(directory / "out"),
    }  # fmt: skip
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def pennyweight(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_one_command_from_training_to_a_file_that_keeps_the_zeros(tmp_path):
    report = json.loads(pennyweight("train", recipe_file(tmp_path, shrink={"size": "3kB"}), "--json").stdout)
    assert report["packed_bytes"] <= 3000 and report["packed_test"]["accuracy"] > 0.9
    trained, _ = load_trained(tmp_path / "out")
    assert float((trained[4].weight == 0).float().mean()) > 0.6
    small = pw.load(tmp_path / "out" / "packed", model=classifier())
    assert bool((packed_weights(small)["4.weight"].decode()[trained[4].weight == 0] == 0).all())
    assert json.loads((tmp_path / "out" / "packed" / "report.json").read_text())["size"] == report["packed_bytes"]


def test_without_a_size_the_file_holds_the_very_weights(tmp_path):
    report = json.loads(pennyweight("train", recipe_file(tmp_path), "--json").stdout)
    trained, recipe = load_trained(tmp_path / "out")
    shown = json.loads(pennyweight("inspect", tmp_path / "out" / "packed", "--norms", "--json").stdout)
    assert shown["checksum"] == "ok" and shown["norms"]["zeros"] > 0.5 and shown["norms"]["logit_scale"] > 0
    small = pw.load(tmp_path / "out" / "packed", model=classifier())
    x = samples_of(recipe, 40)[0]
    assert torch.equal(small(x), trained(x))
    assert report["packed_bytes"] < 0.5 * (tmp_path / "out" / "model.safetensors").stat().st_size


def test_a_training_is_a_model_to_shrink_and_to_judge_by(tmp_path):
    rules = {"rules": [{"match": "Linear", "weight": {"method": "psilon", "initial": None, "sparsify": 0.5}}]}
    adam = {"name": "adam", "lr": 0.01}
    pennyweight("train", recipe_file(tmp_path, prepare=rules, optimizer=adam))
    done = pennyweight("shrink", tmp_path / "out", "--size", "6kB", "-o", tmp_path / "small")
    assert "data of its training" in done.stderr
    result = json.loads(pennyweight("eval", tmp_path / "small", "--json").stdout)
    assert result["relative_error"] < 0.2 and result["reference"] == str(tmp_path / "out")
    trained, recipe = load_trained(tmp_path / "out")
    assert not any("parametrizations" in key for key in trained.state_dict())
    assert [len(batch) for batch in samples_of(recipe, 70)] == [64, 6]
    assert len(samples_of(recipe, 70, held_out=True)[0]) == 20


def test_what_cannot_be_shrunk_is_told_before_training(tmp_path):
    rules = {"rules": [{"match": "4", "weight": {"method": "lsq", "bits": 2}}]}
    low_bit = TrainingRecipe.load(recipe_file(tmp_path, prepare=rules, shrink={"size": "5kB"}))
    with pytest.raises(PlanError, match=r"4 is a layer of low-bit weights.*leave out shrink"):
        train(low_bit)
    with pytest.raises(PlanError, match="one of size, bits and ratio, found none"):
        TrainingRecipe.load(recipe_file(tmp_path, shrink={}))
    with pytest.raises(PlanError, match="found size and bits"):
        TrainingRecipe.load(recipe_file(tmp_path, shrink={"size": "5kB", "bits": 2}))
    pennyweight("train", recipe_file(tmp_path, prepare=rules, steps=2))
    with pytest.raises(PlanError, match="its packed form lies in"):
        load_trained(tmp_path / "out")


def test_a_size_out_of_reach_leaves_the_training(tmp_path):
    with pytest.warns(PennyweightWarning, match="trained, but not packed: .*smallest"):
        result = train(TrainingRecipe.load(recipe_file(tmp_path, steps=2, shrink={"size": "300B"})))
    assert result.report["packed_bytes"] is None and not (tmp_path / "out" / "packed").exists()
