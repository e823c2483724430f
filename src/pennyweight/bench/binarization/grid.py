"""Which runs make up the benchmark, and what becomes of their results on the disk.

    runs = make_runs(QUICK, ["real", "bnn", "reste"], TASKS)
    results = carry_out(runs, {"bnn": {"preset": "bnn"}, ...}, Path("out"))

Each run's result is a JSON file of its own in `runs/`, written in one step: a killed benchmark goes on where it was,
and a larger one takes in what a smaller one left. A file counts if the run and the method's rules in it are those
wanted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import ArtifactError, PennyweightError, require, warn
from .corruptions import SEVERITIES
from .runs import Deployment, Run, Training, execute

Rules = Mapping[str, Mapping[str, Any] | None]  # method -> its `prepare` section
Progress = Callable[[str, int, int], None]

#: The network on which each task is learned.
TASK_ARCHITECTURES = {
    "fashion-mnist": "resnet20",
    "cifar10": "resnet20",
    "sst2": "bert-tiny",
    "cola": "bert-tiny",
    "keywords": "keyword-conv",
    "solids": "pointnet",
}
#: Further networks of the architecture track, all on one task.
ARCHITECTURE_TASK, FURTHER_ARCHITECTURES = "cifar10", ("resnet18", "vgg-small", "vit-tiny")
ROBUSTNESS_TASK = "cifar10"
#: Of the training-consumption track, the first of these that is among the tasks.
CONSUMPTION_TASKS = ("fashion-mnist", "cifar10", "keywords", "solids", "sst2", "cola")
SETTINGS = (("sgd", 1e-1), ("sgd", 1e-2), ("adam", 1e-3), ("adam", 1e-4))
DEPLOYED = ("resnet18", "vgg-small", "keyword-conv", "vit-tiny", "bert-tiny", "pointnet")


@dataclass(frozen=True)
class Profile:
    """How much is run. steps: of a task or architecture; consumption_steps: of one setting. patience: seconds of
    timing a deployed network."""

    name: str
    steps: int
    consumption_steps: int
    batch: int
    train: int
    test: int
    seeds: tuple[int, ...]
    severities: tuple[int, ...]
    architectures: tuple[str, ...]
    schedules: tuple[str, ...]
    deployed: tuple[str, ...]
    patience: float


QUICK = Profile("quick", 24, 12, 32, 1000, 100, (0,), (3,), (), ("cosine",), ("resnet18", "bert-tiny", "pointnet"), 0.5)
FULL = Profile(
    "full",
    4000,
    1500,
    64,
    50_000,
    2000,
    (0, 1, 2),
    SEVERITIES,
    FURTHER_ARCHITECTURES,
    ("cosine", "linear"),
    DEPLOYED,
    20.0,
)


def make_runs(profile: Profile, methods: Sequence[str], tasks: Sequence[str]) -> list[Run]:
    """All runs, seed by seed and setting by setting, so that what is there of an unfinished benchmark compares all
    methods. Deployments come last, when nothing else runs."""
    common: Any = {"batch": profile.batch, "train": profile.train, "test": profile.test}
    tuned: Any = {"optimizer": "adam", "lr": 1e-3, "schedule": "cosine", "steps": profile.steps}
    trainings: list[Training] = []
    for seed in profile.seeds:
        for task in tasks:
            run = Training("task", task, TASK_ARCHITECTURES[task], "", **tuned, **common, seed=seed)
            trainings.append(replace(run, severities=profile.severities if task == ROBUSTNESS_TASK else ()))
        if ARCHITECTURE_TASK in tasks:
            trainings += [
                Training("architecture", ARCHITECTURE_TASK, name, "", **tuned, **common, seed=seed)
                for name in profile.architectures
            ]
    task = next(task for task in CONSUMPTION_TASKS if task in tasks)
    trainings += [
        Training(
            "consumption", task, TASK_ARCHITECTURES[task], "", optimizer, lr, schedule, profile.consumption_steps,
            **common, seed=profile.seeds[0],
        )
        for optimizer, lr in SETTINGS
        for schedule in profile.schedules
    ]  # fmt: skip
    deployments = [Deployment(name, "", profile.patience) for name in profile.deployed]
    return [replace(run, method=method) for run in (*trainings, *deployments) for method in methods]


def carry_out(
    runs: Sequence[Run],
    rules: Rules,
    directory: Path,
    workers: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> dict[Run, dict[str, Any]]:
    """Results of the runs, made now or found in the directory. workers: processes of Ray that share the trainings, 0
    for this one alone; deployments are timed in this one.

    A run that fails with an error that is not pennyweight's is left out with a warning, and tried again next time.
    Raises ArtifactError if the directory cannot be written, MissingExtraError for workers without Ray, DataError if a
    task's data is missing.
    """
    try:
        (directory / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot write into {directory}: {error.strerror or error}") from error
    results = {run: found for run in runs if (found := _read(run, rules[run.method], directory)) is not None}
    missing = [run for run in runs if run not in results]
    shared = [run for run in missing if workers and isinstance(run, Training)]
    alone = [run for run in missing if not (workers and isinstance(run, Training))]
    done = 0
    progress("running", done, len(missing))
    for part, made in ((shared, _on_ray), (alone, _here)):
        for run, found in made(part, rules, directory, workers):
            done += 1
            progress("running", done, len(missing))
            if "failed" in found:
                warn(f"{_name(run)} failed and will be tried again next time: {found['failed']}")
            else:
                results[run] = found
    return {run: results[run] for run in runs if run in results}


def _here(runs: Sequence[Run], rules: Rules, directory: Path, workers: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    for run in runs:
        yield run, _one(run, rules[run.method], directory)


def _on_ray(runs: Sequence[Run], rules: Rules, directory: Path, workers: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    if not runs:
        return
    ray = require("ray", "distributed")
    threads = max(1, torch.get_num_threads() // workers)

    def remote(run: Run, method: Mapping[str, Any] | None) -> dict[str, Any]:
        torch.set_num_threads(threads)
        return _one(run, method, directory)

    directory = directory.resolve()  # Ray's processes stand elsewhere
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        task = ray.remote(num_cpus=1, max_retries=0)(remote)
        waiting = {task.remote(run, rules[run.method]): run for run in runs}
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting))
            run = waiting.pop(ready)
            try:
                yield run, ray.get(ready)
            except ray.exceptions.RayError as error:  # the process was killed
                yield run, {"failed": str(error).splitlines()[0]}
    finally:
        ray.shutdown()


def _one(run: Run, method: Mapping[str, Any] | None, directory: Path) -> dict[str, Any]:
    """The result of a run, once it is on the disk."""
    try:
        found = execute(run, method)
    except PennyweightError:
        raise
    except Exception as error:  # one method's bug must not cost a night
        return {"failed": f"{type(error).__name__}: {error}"}
    path = _path(run, method, directory)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps(_identity(run, method) | {"result": found}, indent=1, allow_nan=False))
    unfinished.replace(path)
    return found


def _read(run: Run, method: Mapping[str, Any] | None, directory: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(_path(run, method, directory).read_text())
    except (FileNotFoundError, ValueError):
        return None
    identity = _identity(run, method)
    return stored["result"] if {key: stored.get(key) for key in identity} == identity else None


def _identity(run: Run, method: Mapping[str, Any] | None) -> dict[str, Any]:
    return json.loads(json.dumps({"run": asdict(run), "method": method}))


def _path(run: Run, method: Mapping[str, Any] | None, directory: Path) -> Path:
    digest = hashlib.sha256(json.dumps(_identity(run, method), sort_keys=True).encode()).hexdigest()[:12]
    return directory / "runs" / f"{_name(run).replace(' ', '-')}-{digest}.json"


def _name(run: Run) -> str:
    what = f"{run.task} {run.track}" if isinstance(run, Training) else "deployment"
    return f"{run.method} {run.architecture} {what}"
