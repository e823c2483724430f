"""One run of the benchmark: a training with its evaluations, or a deployment of an untrained network.

    result = execute(Training(...), {"preset": "reste"})         # plain values, for JSON

A method that cannot serve a network (an error of pennyweight's own, a loss that is no longer finite) yields
{"refused": message}: the scores count it as nothing. Other errors are bugs, and raised.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...artifact import save
from ...clock import median_seconds
from ...cost import cost_table
from ...errors import PennyweightError
from ...training.building import make_model
from ...training.convert import convert
from ...training.data import Split
from ...training.loop import train
from ...training.prepare import prepare
from ...training.schedule import set_progress
from ...training.settings import ModelSettings, TrainingRecipe
from .architectures import architecture, published
from .corruptions import CORRUPTIONS
from .data import TaskData, accuracy, corrupted, task_data
from .observed import observed_precision

#: The method that leaves a network as it is: every score is a ratio to this twin.
REAL = "real"

_EVALUATION_BATCH = 250
_SETTLING_BATCHES = 4  # for the running statistics of a network that is not trained


@dataclass(frozen=True)
class Training:
    """track: what it was made for, "task", "architecture" or "consumption" (of training). optimizer: sgd or adam.
    schedule: of pennyweight's recipes. train, test: samples. severities: of the corruptions to measure under, if
    any.
    """

    track: Literal["task", "architecture", "consumption"]
    task: str
    architecture: str
    method: str
    optimizer: str
    lr: float
    schedule: str
    steps: int
    batch: int
    train: int
    test: int
    seed: int
    severities: tuple[int, ...] = ()


@dataclass(frozen=True)
class Deployment:
    """The architecture at its published width. patience: seconds of timing."""

    architecture: str
    method: str
    patience: float


Run = Training | Deployment


def execute(run: Run, method: Mapping[str, Any] | None) -> dict[str, Any]:
    """What came of a run. method: a `prepare` section; None leaves the network as it is. See the module."""
    rules = None if method is None else architecture(run.architecture).rules(dict(method))
    try:
        return _trained(run, rules) if isinstance(run, Training) else _deployed(run, rules)
    except PennyweightError as error:
        if method is None:
            raise  # the twin must run; what stops it (missing data) is for the user to mend
        return {"refused": " ".join(str(error).split())}


# ----------------------------------------------------------------------------------------------------------- training


def _trained(run: Training, rules: dict[str, Any] | None) -> dict[str, Any]:
    """accuracy: 0 to 1 on the test split. seconds: median of an optimizer step. corruptions: accuracy by type, over the
    severities."""
    data = task_data(run.task, run.train, run.test, run.seed)
    options = architecture(run.architecture).options(tuple(data.train.inputs.shape[1:]), data.classes)
    moments: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        recipe = TrainingRecipe.from_dict(
            {
                "model": {"name": architecture(run.architecture).factory, "options": options},
                "data": {
                    "name": f"{__name__}:training_split",
                    "options": {"task": run.task, "train": run.train, "test": run.test, "seed": run.seed},
                },
                "batch": run.batch,
                "steps": run.steps,
                "optimizer": _OPTIMIZERS[run.optimizer] | {"name": run.optimizer, "lr": run.lr},
                "schedule": {"name": run.schedule, "warmup": 0.1},
                "prepare": rules,
                "seed": run.seed,
                "log_every": run.steps,
                "checkpoint_every": run.steps,
                "diagnostics": False,
                "output": str(Path(directory) / "out"),
            }
        )
        model = train(recipe, progress=lambda *_: moments.append(time.perf_counter())).model
    found: dict[str, Any] = {
        "accuracy": _accuracy(model, data.test, data),
        "seconds": median(after - before for before, after in pairwise(moments)),
    }
    if run.severities:
        found["corruptions"] = {
            kind: fmean(_accuracy(model, corrupted(data.test, kind, severity), data) for severity in run.severities)
            for kind in CORRUPTIONS
        }
    return found


#: As the benchmark has them.
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"weight_decay": 1e-4, "decay": "all", "options": {"momentum": 0.9}},
    "adam": {},
}


def training_split(task: str, train: int, test: int, seed: int) -> dict[str, Split]:
    """A task's training samples, as recipes name data."""
    return {"train": task_data(task, train, test, seed).train}


@torch.inference_mode()
def _accuracy(model: nn.Module, split: Split, data: TaskData) -> float:
    parts = torch.arange(len(split)).split(_EVALUATION_BATCH)
    predicted = torch.cat([model(split.batch(rows)[0]).argmax(1) for rows in parts])
    return accuracy(predicted, split.targets, data.balanced)


# ---------------------------------------------------------------------------------------------------------- deployment


def _deployed(run: Deployment, rules: dict[str, Any] | None) -> dict[str, Any]:
    """parameters, macs: of one sample. compression, speedup: r_c and r_s. seconds, bytes: one sample's latency and the
    files of the packed network, with those of its twin; `undeployable` says why there are none."""
    options, inputs = published(run.architecture, batch=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        twin = make_model(ModelSettings(architecture(run.architecture).factory, options)).eval()
    model = copy.deepcopy(twin)
    if rules is not None:
        prepare(model, rules, data=[inputs])
        set_progress(model, 1.0)
        _settle(model, inputs)
    table = cost_table(model, [inputs], observed_precision(model, inputs))
    found: dict[str, Any] = {
        "parameters": table.parameters,
        "macs": table.macs,
        "compression": table.compression,
        "speedup": table.speedup,
    }
    if rules is None:
        return found
    try:
        packed = convert(model)
        with tempfile.TemporaryDirectory() as directory:
            sizes = save(packed, directory), sum(t.numel() * t.element_size() for t in twin.state_dict().values())
    except PennyweightError as error:
        return found | {"undeployable": " ".join(str(error).split())}
    one = inputs[:1]
    seconds = median_seconds([lambda: packed(one), lambda: twin(one)], repeats=200, patience=run.patience)
    return found | {"seconds": seconds[0], "real_seconds": seconds[1], "bytes": sizes[0], "real_bytes": sizes[1]}


@torch.no_grad()
def _settle(model: nn.Module, inputs: Tensor) -> None:
    """Give norms the statistics of what really passes."""
    model.train()
    for _ in range(_SETTLING_BATCHES):
        model(inputs)
    model.eval()
