"""pennyweight train: what a run computes, and that neither a kill nor a second process changes it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from pennyweight.cli import app
from pennyweight.errors import ArtifactError, DataError, MissingExtraError, PlanError, UnknownNameError
from pennyweight.training.averaging import WeightAverage
from pennyweight.training.checkpoint import CHECKPOINT
from pennyweight.training.data import Split, load_data
from pennyweight.training.hooks import attach
from pennyweight.training.learning_rate import learning_rate_factor
from pennyweight.training.loop import MODEL, REPORT, train
from pennyweight.training.metrics import METRICS
from pennyweight.training.randomness import derived_seed
from pennyweight.training.settings import DataSettings, ScheduleSettings, TrainingRecipe
from training_runs import curve, import_zoo, recipe, run, stop_and_resume

pytestmark = pytest.mark.usefixtures("here")


# ------------------------------------------------------------------------------------------------- exact repetition


def test_a_killed_run_resumes_to_the_very_same_curve_and_weights(here):
    rest = {"ema": 0.9, "clip": 0.5, "accumulate": 2, "model": {"name": "training_zoo:mlp", "options": {"kill_at": 8}}}
    (here / "r.yaml").write_text(yaml.safe_dump(recipe(output="killed", **rest)))
    command = [sys.executable, "-m", "pennyweight", "train", "r.yaml"]
    killed = subprocess.run(command, env=os.environ | {"KILL": "1"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (here / "killed" / REPORT).exists()
    assert [row["step"] for row in curve(here / "killed")] == ["2", "4", "5", "6"]
    with open(here / "killed" / METRICS, "a") as file:
        file.write("8,1.6,0,0.3")  # a row that the kill cut short
    settings = TrainingRecipe.load(here / "r.yaml")
    with pytest.raises(ArtifactError, match="resume"):
        train(settings)

    resumed = train(settings, resume=True)
    whole = run(output="whole", **rest)
    assert curve(here / "killed") == curve(here / "whole")
    assert len(curve(here / "whole")) == 7  # every second step, and the epoch of five steps
    ours, theirs = load_file(here / "killed" / MODEL), load_file(here / "whole" / MODEL)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.report["test"] == whole.report["test"]
    with pytest.raises(ArtifactError, match="already holds"):
        train(settings, resume=True)


def test_resume_between_logs_at_the_end_of_a_stage_and_after_the_last_step(here, monkeypatch):
    stages = [{"steps": 6}, {"steps": 4}]
    optimizer = {"name": "sgd", "lr": 0.1, "options": {"momentum": 0.9}}
    changes = {"steps": None, "stages": stages, "checkpoint_every": 3, "optimizer": optimizer, "log_every": 4}
    whole = run(**changes)
    stop_and_resume(monkeypatch, [3, 6, 10], changes, curve("run"))
    for stop in (3, 6, 10):
        for name, value in load_file(f"stop{stop}/{MODEL}").items():
            assert torch.equal(value, whole.model.state_dict()[name])


def test_accumulated_parts_make_the_same_step_as_the_whole_batch(here):
    changes = {"model": {"name": "training_zoo:mlp", "options": {"dropout": 0.0}}, "steps": 6}
    whole, parts = run(output="whole", **changes), run(output="parts", accumulate=4, **changes)
    assert int(parts.model[4].steps) == 6  # hooks act once a batch, not once a part
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_training_leaves_the_callers_generator_alone(here):
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    run(steps=2)
    assert torch.equal(torch.rand(4), wanted)


def test_one_step_is_the_optimizers_own(here):
    """The first step by hand: the documented order of rows, clipping by the norm of all gradients."""
    options = {"name": "sgd", "lr": 0.5}
    changes = {"model": {"name": "training_zoo:mlp", "options": {"dropout": 0.0}}, "clip": 0.01, "seed": 4}
    changes |= {"data": {"name": "training_zoo:points"}, "optimizer": options, "steps": 8, "stages": []}
    one = run(**changes | {"steps": 1, "schedule": {"warmup": 0.0}})
    torch.manual_seed(derived_seed(4, "model"))
    model = import_zoo().mlp(dropout=0.0)
    inputs, targets = import_zoo().points()["train"]
    rows = torch.randperm(100, generator=torch.Generator().manual_seed(derived_seed(4, "order", 0)))[:16]
    nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
    norm = float(torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt())
    assert norm > 0.01
    assert float(curve("run")[0]["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    for p, trained in zip(model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(trained, p - 0.5 * p.grad * 0.01 / norm, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- parts


def test_warm_up_and_schedules():
    cosine = ScheduleSettings("cosine", warmup=0.5, floor=0.1)
    factors = [learning_rate_factor(step, 8, cosine) for step in range(8)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])
    linear = ScheduleSettings("linear", floor=0.2)
    assert [learning_rate_factor(s, 4, linear) for s in range(4)] == pytest.approx([1, 0.8, 0.6, 0.4])
    assert learning_rate_factor(7, 8, ScheduleSettings("constant", warmup=0.25)) == 1


def test_logged_rates_follow_the_schedule(here):
    run(optimizer={"lr": 0.02}, log_every=1)
    wanted = [0.02 * learning_rate_factor(s, 12, ScheduleSettings(warmup=0.25)) for s in range(12)]
    assert [float(row["lr"]) for row in curve("run")] == wanted


def test_averaged_weights_have_their_closed_form():
    model = nn.Linear(2, 2, bias=False).double()
    values = [torch.randn(2, 2, dtype=torch.float64) for _ in range(6)]
    model.weight.data.copy_(values[0])
    average = WeightAverage(model, 0.8)
    for value in values[1:]:
        model.weight.data.copy_(value)
        average.update()
    wanted = 0.8**5 * values[0] + 0.2 * sum(0.8 ** (5 - i) * values[i] for i in range(1, 6))
    with average.applied():
        torch.testing.assert_close(model.weight.data, wanted)
    assert torch.equal(model.weight.data, values[-1])


def test_the_average_is_what_is_saved(here):
    """One step from w0 to w1: the file holds decay * w0 + (1 - decay) * w1."""
    live, averaged = run(steps=1, output="live").model, run(steps=1, ema=0.75, output="averaged").model
    torch.manual_seed(derived_seed(0, "model"))
    for first, last, mean in zip(import_zoo().mlp().parameters(), live.parameters(), averaged.parameters()):
        torch.testing.assert_close(mean, 0.75 * first + 0.25 * last)


def test_hooks_freeze_exactly_against_momentum_and_decay_and_know_skipped_steps():
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    calls = []

    class Freeze:
        def before_step(self):
            self.kept = model.weight.detach().clone()
            calls.append("before")

        def after_step(self):
            model.weight.data[0] = self.kept[0]
            calls.append("after")

    attach(optimizer, [Freeze()])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    first = model.weight.detach().clone()
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).square().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert calls == ["before", "after"] * 2  # the step of the infinite loss was skipped
    assert torch.equal(model.weight[0], first[0])
    assert not torch.equal(model.weight[1], first[1])


def test_distillation_alone_reaches_the_teacher(here):
    """With all weight on the teacher, labels do not matter: the loss is the divergence, which is 0 from the start."""
    torch.manual_seed(9)
    save_file(import_zoo().mlp().state_dict(), "teacher.safetensors")
    same = {"name": "training_zoo:mlp", "weights": "teacher.safetensors", "options": {"dropout": 0.0}}
    run(model=same, teacher=same, steps=2, log_every=1)
    assert float(curve("run")[0]["loss"]) == pytest.approx(0, abs=1e-6)
    other = {"name": "training_zoo:mlp", "options": {"dropout": 0.0}}
    run(model=other, teacher=same, steps=60, output="learnt", schedule={})
    losses = [float(row["loss"]) for row in curve("learnt")]
    assert losses[-1] < 0.1 * losses[0]
    half = run(model=other, teacher=same | {"weight": 0.5, "temperature": 2.0}, steps=1, log_every=1, output="half")
    assert half.report["steps"] == 1


def test_bf16_trains_and_the_next_run_is_full_precision_again(here):
    run(precision="bf16", output="bf16", log_every=1)
    run(output="no", log_every=1)
    mixed, full = (float(curve(name)[0]["loss"]) for name in ("bf16", "no"))
    assert mixed != full
    assert mixed == pytest.approx(full, rel=0.02)
    assert load_file("bf16/" + MODEL)["0.weight"].dtype == torch.float32


def test_learns_and_tests_once(here):
    result = run(steps=80, schedule={}, ema=0.9)
    assert result.report["validation"]["accuracy"] > 0.8
    assert set(result.report["test"]) == {"loss", "accuracy"}
    assert not result.model.training


# -------------------------------------------------------------------------------------------------------------- data


def test_random_windows_are_those_of_the_padded_image():
    images = torch.randint(256, (7, 3, 5, 6), dtype=torch.uint8)
    split = Split(images, torch.arange(7), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop=2, flip=True)
    draws = split.augmentation(200, torch.Generator().manual_seed(0))
    assert draws.amin(0).tolist() == [0, 0, 0]
    assert draws.amax(0).tolist() == [4, 4, 1]
    rows = torch.tensor([3, 0, 3, 6])
    found, targets = split.batch(rows, draws[:4])
    assert targets.tolist() == [3, 0, 3, 6]
    mean, std = torch.tensor(split.mean)[:, None, None], torch.tensor(split.std)[:, None, None]
    for image, row, (down, right, mirrored) in zip(found, rows, draws[:4].tolist()):
        padded = nn.functional.pad(images[row], (2, 2, 2, 2))
        window = padded[:, down : down + 5, right : right + 6]
        window = window.flip(2) if mirrored else window
        torch.testing.assert_close(image, (window / 255 - mean) / std)
    assert torch.equal(split.batch(rows)[0], split.batch(rows, torch.tensor([[2, 2, 0]] * 4))[0])


def test_validation_is_carved_from_train_and_never_overlaps(here):
    data = load_data(DataSettings("training_zoo:points", validation=30), seed=1)
    again = load_data(DataSettings("training_zoo:points", validation=30), seed=1)
    other = load_data(DataSettings("training_zoo:points", validation=30), seed=2)
    assert torch.equal(data.validation.inputs, again.validation.inputs)
    assert not torch.equal(data.validation.inputs, other.validation.inputs)
    rows = {tuple(row.tolist()) for row in torch.cat([data.train.inputs, data.validation.inputs])}
    assert (len(data.train), len(data.validation), len(rows)) == (70, 30, 100)
    images = load_data(DataSettings("training_zoo:images", samples=32, crop=1, validation=2), seed=0)
    assert (len(images.train), images.train.crop, images.validation.crop, images.test) == (30, 1, 0, None)


def test_images_train(here):
    data = {"name": "training_zoo:images", "crop": 1, "flip": True}
    assert run(model={"name": "training_zoo:images_net"}, data=data, steps=3).report["steps"] == 3


# ---------------------------------------------------------------------------------------------------------- mistakes


def test_another_recipes_checkpoint_is_refused_by_key(here):
    run(steps=5)
    os.remove("run/" + REPORT)
    changed = TrainingRecipe.from_dict(recipe(steps=5, optimizer={"name": "adamw", "lr": 0.5, "weight_decay": 0.1}))
    with pytest.raises(ArtifactError, match=r"another recipe: optimizer.lr is 0.02 there and 0.5 here"):
        train(changed, resume=True)
    train(TrainingRecipe.from_dict(recipe(steps=5, log_every=1)), resume=True)  # how often to log is free


def test_damaged_checkpoints_are_refused(here):
    run(steps=5)
    os.remove("run/" + REPORT)
    path = here / "run" / CHECKPOINT
    whole = path.read_bytes()
    for damaged in (whole[:-8], b"\x80\x04" + whole, b""):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            train(TrainingRecipe.from_dict(recipe(steps=5)), resume=True)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="no training checkpoint"):
        train(TrainingRecipe.from_dict(recipe(steps=5)), resume=True)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(here):
    with pytest.raises(DataError, match=r"loss is (nan|inf) at step \d+: lower optimizer.lr"):
        run(optimizer={"name": "sgd", "lr": 1e30}, schedule={}, checkpoint_every=1)
    if (here / "run" / CHECKPOINT).exists():
        assert all(
            bool(torch.isfinite(t).all()) for n, t in load_file(here / "run" / CHECKPOINT).items() if "loss" in n
        )


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"optimiser": {}}, UnknownNameError, "optimizer"),
        ({"optimizer": {"name": "adamv"}}, UnknownNameError, "adam"),
        ({"optimizer": {"options": {"betta": 1}}}, PlanError, "refuses its options"),
        ({"data": {"name": "fashion"}}, UnknownNameError, "fashion-mnist"),
        ({"model": {"name": "resnet"}}, UnknownNameError, "model"),
        ({"model": {"name": "training_zoo:mlp", "options": {"classes": 2}}}, DataError, "gives 2 logits"),
        ({"model": {"name": "training_zoo:images_net"}}, DataError, "does not take inputs"),
        ({"model": {"name": "training_zoo:points"}}, ArtifactError, "must return an nn.Module"),
        ({"loss": {"name": "mse"}}, DataError, "real targets"),
        ({"batch": 1000}, DataError, "fewer than a batch"),
        ({"accumulate": 3}, PlanError, "multiple of 3"),
        ({"steps": None}, PlanError, "either epochs or steps"),
        ({"epochs": 1}, PlanError, "epochs and steps"),
        ({"schedule": {"warmup": 2}}, PlanError, "warmup"),
        ({"batch": "many"}, PlanError, "whole number"),
        ({"clip": 0}, PlanError, "clip"),
        ({"data": {"name": "training_zoo:points", "crop": 2}}, DataError, "no uint8 images"),
        ({"data": {"name": "training_zoo:points", "validation": 100}}, DataError, "validation takes"),
        ({"precision": "fp16"}, PlanError, "fp16"),
        ({"model": {"name": "training_zoo:mlp", "weights": "nowhere"}}, ArtifactError, "nowhere"),
    ],
)
def test_mistakes_have_one_clear_error(here, changes, error, text):
    with pytest.raises(error, match=text):
        run(**changes)


def test_data_folder_that_is_not_there(here, monkeypatch):
    monkeypatch.setenv("PENNYWEIGHT_DATA", str(here))
    from pennyweight.training.data import data_sets

    data_sets.cache_clear()
    with pytest.raises(DataError, match="PENNYWEIGHT_DATA"):
        run(data={"name": "cifar10"})


def test_tensorboard_if_it_is_installed(here):
    try:
        run(tensorboard=True, steps=2)
    except MissingExtraError as error:
        assert "pennyweight[train]" in str(error)
    else:
        assert list((here / "run" / "tensorboard").iterdir())


def test_command_line(here):
    (here / "r.yaml").write_text("# a comment\n" + yaml.safe_dump(recipe(steps=5)).replace("0.02", "2e-2"))
    done = CliRunner().invoke(app, ["train", "r.yaml", "-o", "out", "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["steps"] == 5
    assert report["directory"] == "out"
    assert report["parameters"] == 6 * 16 + 16 + 32 + 16 * 3 + 3
    assert json.loads((here / "out" / REPORT).read_text()) | {"directory": "out"} == report
    table = CliRunner().invoke(app, ["train", "r.yaml"])
    assert "test accuracy" in table.stdout
    again = TrainingRecipe.load(here / "out" / "recipe.yaml")
    assert again == dataclasses.replace(TrainingRecipe.load(here / "r.yaml"), output="out")
    for arguments, text in (
        (["r.yaml"], "already holds"),
        (["none.yaml"], "none.yaml"),
        (["r.yaml", "-o", "r.yaml"], "r.yaml"),
    ):
        failed = CliRunner().invoke(app, ["train", *arguments])
        assert failed.exit_code == 2, failed.output
        assert failed.stderr.startswith("error:")
        assert failed.stderr.count("\n") == 1
        assert text in failed.stderr
    (here / "twice.yaml").write_text("batch: 1\nbatch: 2\n")
    assert "given twice" in CliRunner().invoke(app, ["train", "twice.yaml"]).stderr
