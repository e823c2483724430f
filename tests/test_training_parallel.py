"""Training by several processes: the same curve and weights as by one, and what is refused."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pennyweight.errors import PlanError
from pennyweight.training import loop
from pennyweight.training.loop import MODEL, REPORT, train
from pennyweight.training.parallel import Divided, parallel_of_launch
from pennyweight.training.settings import TrainingRecipe
from training_runs import curve, import_zoo, recipe, run

pytestmark = pytest.mark.usefixtures("here")


def launch(*arguments: str) -> subprocess.CompletedProcess:
    """Two processes of accelerate's launcher."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def assert_same_training(ours, theirs):
    """Every column of the log within 1e-5, and the weights; what one measured, the other did."""
    for row, other in zip(curve(ours), curve(theirs), strict=True):
        for key in row:
            assert (row[key] == "") == (other[key] == ""), key
            if row[key]:
                assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-5), key
    weights, wanted = load_file(ours / MODEL), load_file(theirs / MODEL)
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)


def test_two_processes_train_what_one_does(here):
    changes = {"model": {"name": "training_zoo:mlp", "options": {"dropout": 0.0}}, "clip": 0.5}
    (here / "r.yaml").write_text(yaml.safe_dump(recipe(output="two", **changes)))
    done = launch("--multi_gpu", "-m", "pennyweight", "train", "r.yaml", "--json")
    assert json.loads(done.stdout)["processes"] == 2
    one = run(output="one", accumulate=2, **changes)
    assert_same_training(here / "two", here / "one")
    assert load_file(here / "two" / MODEL).keys() == one.model.state_dict().keys()


# Every checkpoint at step 5 is kept, with the log, as OUTPUT-half. A process without a share of the last batch of an
# evaluation (21 samples in tens) still takes part in it.
DIVIDED = """
import shutil, sys, yaml
from pennyweight.training import evaluation, loop
from pennyweight.training.settings import TrainingRecipe

def keeping(path, tensors, state, save=loop.save_checkpoint):
    save(path, tensors, state)
    if state["step"] == 5:
        shutil.copytree(path.parent, f"{path.parent}-half")

def train_all(path):
    loop.save_checkpoint, evaluation._BATCH = keeping, 5
    for values in yaml.safe_load_all(open(path)):
        loop.train(TrainingRecipe.from_dict(values), resume=values["output"].endswith("half"))

if __name__ == "__main__":
    train_all(sys.argv[1])
"""


def test_two_processes_that_divide_the_parameters_train_what_one_does(here, monkeypatch):
    """FSDP: plain and binary, with averages, clipping, scalars, stages and diagnostics; checkpoints serve any number of
    processes, and resume exactly on as many."""
    (here / "divided.py").write_text(DIVIDED)
    shared = {"model": {"name": "training_zoo:blocks"}, "data": {"name": "training_zoo:points", "validation": 21}}
    shared |= {"clip": 0.5, "ema": 0.9, "steps": None, "stages": [{"steps": 7}, {"steps": 5}]}
    plain, binary = recipe(**shared), recipe(**shared, prepare={"preset": "reste"})
    monkeypatch.setattr(loop, "save_checkpoint", loop.save_checkpoint)
    monkeypatch.setattr("pennyweight.training.evaluation._BATCH", 512)
    ones = [plain | {"output": "plain"}, binary | {"output": "binary"}]
    (here / "one.yaml").write_text(yaml.safe_dump_all(ones))
    runpy.run_path("divided.py")["train_all"]("one.yaml")
    twos = [plain | {"output": "plain-two"}, plain | {"output": "plain-two-half"}]
    twos += [binary | {"output": "binary-two"}, binary | {"output": "binary-half"}]
    (here / "two.yaml").write_text(yaml.safe_dump_all(twos))
    units = ("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "Block")
    launch("--use_fsdp", "--fsdp_version", "2", *units, "divided.py", "two.yaml")

    for name in ("plain", "binary"):
        assert json.loads((here / f"{name}-two" / REPORT).read_text())["processes"] == 2
        assert_same_training(here / f"{name}-two", here / name)
    assert curve("plain-two-half") == curve("plain-two")
    whole = load_file(here / "plain-two" / MODEL)
    assert all(torch.equal(value, whole[name]) for name, value in load_file(f"plain-two-half/{MODEL}").items())
    assert_same_training(here / "binary-half", here / "binary")  # from one process to two
    assert any(float(row["flip_rate"] or 0) > 0 for row in curve("binary-half"))
    assert (here / "binary-two" / "packed" / "model.safetensors").exists()
    train(TrainingRecipe.from_dict(binary | {"output": "binary-two-half"}), resume=True)  # and from two to one
    assert_same_training(here / "binary-two-half", here / "binary")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": {"name": "training_zoo:mlp"}}, "Killer acts on whole weights"),
        ({"model": {"name": "training_zoo:blocks"}, "freeze": {"0.*": 0.5}}, "freeze"),
    ],
)
def test_what_divided_training_refuses(here, monkeypatch, changes, text):
    monkeypatch.setattr(loop, "parallel_of_launch", Divided)
    with pytest.raises(PlanError, match=text):
        run(**changes)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "--fsdp_version 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--fsdp_activation_checkpointing"),
        ({"FSDP_VERSION": "2", "FSDP_IGNORED_MODULES": "a"}, "--fsdp_ignored_modules"),
        ({"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "SIZE_BASED_WRAP"),
    ],
)
def test_settings_of_the_launcher_that_are_not_to_be_had(monkeypatch, settings, text):
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | settings).items():
        monkeypatch.setenv(name, value)
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="MULTI_CPU"))
    with pytest.raises(PlanError, match=text):
        parallel_of_launch(accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert not parallel_of_launch(accelerator).divided
    accelerator.distributed_type.value = "DEEPSPEED"
    with pytest.raises(PlanError, match="DEEPSPEED is not supported"):
        parallel_of_launch(accelerator)


def test_units_that_the_model_does_not_have(here):
    with pytest.raises(PlanError, match="no module is a Blok; there are: Block, LayerNorm"):
        Divided(None, ("Blok",)).units_of(import_zoo().blocks())
