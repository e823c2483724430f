"""The training loop: `pennyweight train RECIPE.yaml`, on Hugging Face accelerate.

    result = train(TrainingRecipe.load("recipe.yaml"))               # or resume=True after a kill

What a run computes is a function of its recipe: the order of samples, augmentation, dropout and the learning rate
follow from (seed, step), so a resumed run continues bit for bit, and the same recipe on several processes (see
`parallel`) sees the same batches: `batch` counts the samples of one optimizer step over all processes and accumulated
parts. Batch norm takes its statistics from each part alone. A model with a method `training_loss(inputs, targets)`
says itself what training minimises (A-FAN does); evaluation takes the recipe's loss all the same.

One step: draw the rows of the batch; forward and backward of each part; unscale; measure; clip; hooks before,
optimizer, hooks after, average. `step` counts batches; updates that mixed precision skips are logged as
skipped_steps, and neither hooks, average nor flip rates count them. An epoch is as many whole batches as the
training split holds.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn

from ..bench.results import versions
from ..compress.data import output_tensor
from ..compress.distillation import divergence
from ..errors import ArtifactError, DataError, PlanError, require
from .averaging import WeightAverage
from .building import make_hook, make_model, make_optimizer
from .checkpoint import (
    CHECKPOINT,
    join_optimizer,
    load_checkpoint,
    require_same_recipe,
    save_checkpoint,
    save_tensors,
    split_optimizer,
)
from .data import Split, load_data
from .diagnostics import Diagnostics, totals
from .evaluation import evaluate, task_loss, try_out
from .hooks import StepHook, attach, hooks_of
from .learning_rate import learning_rate_factor
from .metrics import Log, replacing
from .packing import can_pack, write_packed
from .parallel import gathered, parallel_of_launch, placed
from .penalties import Penalties
from .prepare import prepare
from .randomness import derived_seed, generator
from .schedule import Schedule, set_progress
from .settings import StageSettings, TrainingRecipe
from .trained import RECIPE, require_plain

MODEL, REPORT = "model.safetensors", "report.json"
PACKED = "packed"
_EVALUATION_BATCH = 512
#: Samples that input quantisers are fitted to.
_CALIBRATION = 256


@dataclass(frozen=True)
class TrainingResult:
    """model: trained, in eval mode, with averaged weights if the recipe has `ema`, whole on every process (on the CPU
    if it was divided). report: what report.json holds."""

    model: nn.Module
    directory: Path
    report: dict[str, Any]


def train(
    recipe: TrainingRecipe,
    *,
    resume: bool = False,
    hooks: Sequence[StepHook] = (),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> TrainingResult:
    """Train as the recipe says and write model.safetensors, metrics.csv, report.json and recipe.yaml to its output.

    resume: go on from the checkpoint there; start anew if a kill came before the first. hooks: act around each
    optimizer step, besides the modules of the model that do. progress: called as progress("train", step, steps).
    Raises PlanError and UnknownNameError for recipes that make no sense, DataError if the data is missing, too small or
    the loss is no longer finite, ArtifactError if the output holds another training or cannot be written.
    """
    accelerate = require("accelerate", "train")
    directory = Path(recipe.output)
    if (directory / REPORT).exists() or ((directory / CHECKPOINT).exists() and not resume):
        raise ArtifactError(
            f"{directory} already holds a training"
            + ("; give another output" if (directory / REPORT).exists() else "; resume it, or give another output")
        )
    try:
        accelerator = accelerate.Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=recipe.precision)
    except ValueError as error:
        raise PlanError(f"precision {recipe.precision} is not to be had here: {error}") from None
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            return _Training(recipe, accelerator, hooks, progress).run(resume)
    finally:
        accelerator.free_memory()
        accelerate.state.AcceleratorState._reset_state()  # another training may want another precision


class _Training:
    """One run. The model changes at the start of a stage, and with it everything that holds its parameters."""

    def __init__(
        self,
        recipe: TrainingRecipe,
        accelerator: Any,
        hooks: Sequence[StepHook],
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.recipe, self.accelerator, self.progress = recipe, accelerator, progress
        self.directory = Path(recipe.output)
        self.main: bool = accelerator.is_main_process
        self.parallel = parallel_of_launch(accelerator)
        _check_setup(recipe, accelerator, self.parallel.divided)
        self.data = load_data(recipe.data, recipe.seed).to(accelerator.device)
        self.per_epoch = len(self.data.train) // recipe.batch
        if self.per_epoch == 0:
            raise DataError(
                f"the training split has {len(self.data.train)} samples, fewer than a batch of {recipe.batch}"
            )
        self.parts = recipe.accumulate * accelerator.num_processes
        if recipe.batch % self.parts:
            raise PlanError(
                f"a batch of {recipe.batch} does not divide into {accelerator.num_processes} processes of "
                f"{recipe.accumulate} parts; give a multiple of {self.parts}"
            )
        self.lengths = [_steps(stage, self.per_epoch) for stage in recipe.all_stages]
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))
        torch.manual_seed(derived_seed(recipe.seed, "model"))
        self.model: nn.Module = make_model(recipe.model).to(accelerator.device)
        self.teacher: nn.Module | None = None
        if recipe.teacher is not None:
            self.teacher = make_model(recipe.teacher.model).to(accelerator.device).requires_grad_(False).eval()
        try_out(self.model, self.data.train, recipe)
        self.own_loss = callable(getattr(self.model, "training_loss", None))
        if self.own_loss and (accelerator.num_processes > 1 or recipe.teacher is not None):
            raise PlanError(
                f"{type(self.model).__name__} has a training loss of its own, which neither a teacher nor several "
                "processes take part in; leave them out"
            )
        if recipe.prepare is not None:
            rows = self._rows_of_epoch(0)[:_CALIBRATION]
            prepare(self.model, recipe.prepare, data=[self.data.train.batch(rows)[0]])
        if recipe.shrink is not None:
            require_plain(self.model, "leave out shrink, and packed/ holds them as they are")
        self.schedule = Schedule(self.model, sum(self.lengths), (recipe.anneal[0], recipe.anneal[1]), recipe.freeze)
        self.hooks = [*(make_hook(entry, self.model) for entry in recipe.hooks), *hooks]
        self.penalties = Penalties(recipe.penalties)
        self.penalties.try_out(self.model)
        self.charged: dict[str, Tensor] = {}  # the penalties of the latest step
        if self.parallel.divided and (self.hooks or hooks_of(self.model)):
            hook = type([*self.hooks, *hooks_of(self.model)][0]).__name__
            raise PlanError(
                f"{hook} acts on whole weights around a step, and FSDP divides them; launch with --multi_gpu"
            )
        self.step = self.skipped = 0
        self.losses: list[Tensor] = []
        self.earlier: tuple[float, int] = (0.0, 0)  # sum and count of the interval's losses before a resume
        self.seconds = 0.0
        self.last_row: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------------------------- stages

    def run(self, resume: bool) -> TrainingResult:
        path = self.directory / CHECKPOINT
        stored = load_checkpoint(path) if resume and path.exists() else None
        if stored is not None:
            require_same_recipe(path, stored.state["recipe"], self.recipe.to_dict())
            self.step = stored.state["step"]
        penalties = [_penalty_column(name) for name in self.penalties.names]
        self.log = Log(self.directory, self.step, self.recipe.tensorboard, penalties) if self.main else None
        started = time.perf_counter()
        self.clock = lambda: self.seconds + time.perf_counter() - started
        first = 0
        for index, length in enumerate(self.lengths):
            if stored is None or self.step <= first + length:  # at the border of two stages, the earlier one's
                self._begin(index)
                if stored is not None:
                    self._restore(stored)
                    stored = None
                while self.step < first + length:
                    self._one_step(self.step - first, length)
                    self._after_step(index, first + length)
                self._end()
            first += length
        return self._finish()

    def _begin(self, index: int) -> None:
        """A new optimizer and average for a stage, and the wrappers of accelerate."""
        stage = self.recipe.all_stages[index]
        self.rate_schedule = self.recipe.schedule_of(stage)
        self.parallel.place(self.model)
        self.optimizer = make_optimizer(self.recipe.optimizer_of(stage), self.model)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        attach(self.optimizer, [*hooks_of(self.model), *self.hooks])
        self.average = None if self.recipe.ema is None else WeightAverage(self.model, self.recipe.ema)
        # Process 0 watches; the others have one only to take part in gathering what is divided.
        watches = self.recipe.diagnostics and (self.main or self.parallel.divided)
        self.diagnostics = Diagnostics(self.model) if watches else None
        self.updated = False  # whether the latest step was carried out
        self.model.train()
        self.runner, self.stepper = self.parallel.wrap(self.model, self.optimizer)

    def _end(self) -> None:
        """Take the wrappers of a stage off the model."""
        self.model = self.parallel.unwrap(self.runner)
        self.accelerator.free_memory()
        if self.diagnostics is not None:
            self.diagnostics.close()

    # --------------------------------------------------------------------------------------------------------- step

    def _rows_of_epoch(self, epoch: int) -> Tensor:
        """All rows of the training split in the epoch's order, the same on every process."""
        if self.order[0] != epoch:
            draw = generator(self.recipe.seed, "order", epoch)
            self.order = (epoch, torch.randperm(len(self.data.train), generator=draw))
        return self.order[1]

    def _tell_hooks(self) -> None:
        """Hooks that are not part of the model follow the same progress."""
        for hook in self.hooks:
            if isinstance(hook, nn.Module):
                set_progress(hook, self.schedule.progress)

    def _one_step(self, at: int, length: int) -> None:
        recipe, rank = self.recipe, self.accelerator.process_index
        epoch, place = divmod(self.step, self.per_epoch)
        rows = self._rows_of_epoch(epoch)[place * recipe.batch : (place + 1) * recipe.batch]
        augmentation = self.data.train.augmentation(len(rows), generator(recipe.seed, "augment", self.step))
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * learning_rate_factor(at, length, self.rate_schedule)
        torch.manual_seed(derived_seed(recipe.seed, "forward", self.step, rank))
        if self.diagnostics is not None and self.main:
            self.diagnostics.watch(self.updated)
        self.parallel.begin_step(self.model)
        size = recipe.batch // self.parts
        losses = []
        for part in range(recipe.accumulate):
            mine = slice((rank * recipe.accumulate + part) * size, (rank * recipe.accumulate + part + 1) * size)
            inputs, targets = self.data.train.batch(rows[mine], None if augmentation is None else augmentation[mine])
            last = part == recipe.accumulate - 1
            with self.parallel.part(self.runner, last):
                loss = self._loss(inputs, targets)
                self.charged = self.penalties(self.model, self.schedule.taken / self.schedule.steps)
                charged = sum(self.charged.values(), start=loss)
                self.accelerator.backward(charged / recipe.accumulate)
            losses.append(loss.detach().float())
        self.parallel.end_backward(self.model)
        self.accelerator.unscale_gradients()
        self.losses.append(torch.stack(losses).mean())
        self.logging = self._logs_after(at + 1 == length)
        measured = self.diagnostics is not None and self.logging
        self.gradients = self.diagnostics.gradients() if measured and self.diagnostics is not None else {}
        self.norm = None
        if recipe.clip is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.norm = self.parallel.clip(trained, recipe.clip)
        self._update()
        self.stepper.zero_grad()
        self.updated = not self.stepper.step_was_skipped
        self.skipped += not self.updated
        if self.updated:
            self.schedule.step()
            self._tell_hooks()
            if self.average is not None:
                self.average.update()
        self.step += 1

    def _update(self) -> None:
        try:
            self.stepper.step()
        except RuntimeError as error:
            if not self.parallel.divided or isinstance(error, torch.OutOfMemoryError):
                raise
            raise PlanError(
                f"{type(self.optimizer).__name__} cannot step on divided parameters; launch with --multi_gpu, or take "
                f"another optimizer ({str(error).splitlines()[0]})"
            ) from error

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.own_loss:
            with self.accelerator.autocast():
                return cast(Any, self.model).training_loss(inputs, targets)
        with self.parallel.forward():
            output = output_tensor(self.runner(inputs)).float()
        teacher = self.recipe.teacher
        if teacher is None or self.teacher is None:
            return task_loss(output, targets, self.recipe.loss)
        with torch.no_grad(), self.accelerator.autocast():
            wanted = output_tensor(self.teacher(inputs)).float()
        if wanted.shape != output.shape:
            raise PlanError(
                f"the teacher's output is {list(wanted.shape)} and the model's {list(output.shape)}; they must agree"
            )
        loss = teacher.temperature**2 * divergence(output / teacher.temperature, wanted / teacher.temperature, "kl")
        if teacher.weight == 1:
            return loss
        return teacher.weight * loss + (1 - teacher.weight) * task_loss(output, targets, self.recipe.loss)

    # ---------------------------------------------------------------------------------------------------- afterwards

    def _logs_after(self, stage_ends: bool) -> bool:
        """Whether the step being taken is followed by a row of the log."""
        done = self.step + 1
        return stage_ends or done % self.recipe.log_every == 0 or done % self.per_epoch == 0

    def _after_step(self, stage: int, stage_end: int) -> None:
        epoch_ends = self.step % self.per_epoch == 0 or self.step == stage_end
        if self.logging:
            self._write_row(stage, epoch_ends)
        if self.main:
            self.progress("train", self.step, sum(self.lengths))
        if self.step % self.recipe.checkpoint_every == 0 or self.step == stage_end:
            self._finite_losses()
            self._save()

    def _evaluate(self, split: Split) -> dict[str, float]:
        """Of the averaged weights, if there are."""
        averaged = contextlib.nullcontext() if self.average is None else self.average.applied()
        with averaged, self.parallel.evaluation(self.model):
            return evaluate(self.model, split, self.recipe.loss, self.accelerator)

    def _finite_losses(self) -> tuple[float, int]:
        """Sum and count of the losses of the interval so far; raises DataError at the first that is not finite."""
        if self.losses:
            losses = self.accelerator.reduce(torch.stack(self.losses), "mean").double().cpu()
            finite = torch.isfinite(losses)
            if not bool(finite.all()):
                at = self.step - len(losses) + 1 + int((~finite).nonzero()[0])
                raise DataError(
                    f"the loss is {float(losses[~finite][0])} at step {at}: lower optimizer.lr, set clip, warm up "
                    f"longer or look for NaN in the data; {self.directory} holds the last finite checkpoint, if any"
                )
            for loss in losses.tolist():  # one by one: the same sum wherever a checkpoint divides the interval
                self.earlier = (self.earlier[0] + loss, self.earlier[1] + 1)
            self.losses = []
        return self.earlier

    def _write_row(self, stage: int, epoch_ends: bool) -> None:
        total, count = self._finite_losses()
        self.earlier = (0.0, 0)
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.step / self.per_epoch, 4),
            "stage": stage,
            "loss": total / count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": None if self.norm is None else float(self.norm),
            "skipped_steps": self.skipped,
        }
        row |= {_penalty_column(name): float(value.detach()) for name, value in self.charged.items()}
        if epoch_ends and self.data.validation is not None:
            found = self._evaluate(self.data.validation)
            row |= {"validation_loss": found["loss"], "validation_accuracy": found.get("accuracy")}
        if self.diagnostics is not None:
            layers = self.diagnostics.report(self.gradients, histograms=epoch_ends)
            self.diagnostics.reset()
            if layers and self.log is not None:
                row |= totals(layers)
                if epoch_ends:
                    self.log.layers(self.step, layers)
        row["seconds"] = round(self.clock(), 3)
        self.last_row = row
        if self.log is not None:
            self.log.row(row)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        """Write the checkpoint, of whole tensors however they are divided; any number of processes may resume it."""
        optimizer, rest = split_optimizer(self.optimizer)
        tensors = _named("model", self.model.state_dict()) | _named("optimizer", optimizer)
        if self.average is not None:
            tensors |= _named("average", self.average.state_dict())
        tensors = gathered(tensors, keep=self.main)
        if not self.main:
            return
        state: dict[str, Any] = {
            "recipe": self.recipe.to_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "updated": self.updated,
            "losses": self.earlier,
            "seconds": self.clock(),
            "optimizer": rest,
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }
        if self.diagnostics is not None:
            watched, state["diagnostics"] = self.diagnostics.state_dict()
            tensors |= _named("diagnostics", watched)
        save_checkpoint(self.directory / CHECKPOINT, tensors, state)

    def _restore(self, stored: Any) -> None:
        state = stored.state
        try:
            own = self.model.state_dict()
            self.model.load_state_dict({n: placed(t, own.get(n)) for n, t in stored.part("model").items()})
            join_optimizer(self.optimizer, stored.part("optimizer"), state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(stored.part("average"))
        except (RuntimeError, LookupError, ValueError) as error:
            path = self.directory / CHECKPOINT
            raise ArtifactError(
                f"{path} does not fit the model of this recipe: {' '.join(str(error).split())}"
            ) from None
        self.schedule.load_state_dict(state["schedule"])
        self._tell_hooks()
        if self.diagnostics is not None and self.main:
            self.diagnostics.load_state_dict(stored.part("diagnostics"), state["diagnostics"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.skipped, self.updated = state["skipped"], state["updated"]
        self.earlier, self.seconds = (state["losses"][0], state["losses"][1]), state["seconds"]

    def _finish(self) -> TrainingResult:
        """Evaluate once on the test split, and write the model and the report."""
        report: dict[str, Any] = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "epochs": self.step / self.per_epoch,
            "skipped_steps": self.skipped,
            "processes": self.accelerator.num_processes,
            "precision": self.recipe.precision,
            "last": {name: value for name, value in self.last_row.items() if value is not None},
        }
        for name, split in (("validation", self.data.validation), ("test", self.data.test)):
            if split is not None:
                report[name] = self._evaluate(split)
        if self.average is not None:
            self.average.store()
        self.model = self.parallel.whole(self.model).eval()
        set_progress(self.model, 1.0)
        if self.main and can_pack(self.model, self.recipe):
            report |= self._save_packed()
        report |= {"seconds": round(self.clock(), 3), "versions": versions(("pennyweight", "torch", "accelerate"))}
        if self.log is not None:
            self.log.close()
            save_tensors(self.directory / MODEL, self.model.state_dict())
            with replacing(self.directory / RECIPE) as file:
                yaml.safe_dump(self.recipe.to_dict(), file, sort_keys=False)
            with replacing(self.directory / REPORT) as file:
                json.dump(report, file, indent=1)
        self.accelerator.wait_for_everyone()
        return TrainingResult(self.model, self.directory, report)

    def _save_packed(self) -> dict[str, Any]:
        """What the report says of the packed model: its bytes, and if it was shrunk, how well it does."""
        model = copy.deepcopy(self.model).cpu()
        packed = write_packed(model, self.recipe, self.data.train, self.directory / PACKED, self.progress)
        if packed is None:
            return {"packed_bytes": None}
        found: dict[str, Any] = {"packed_bytes": packed[1]}
        if self.recipe.shrink is not None and self.accelerator.num_processes == 1:  # others would have to take part
            small = packed[0].to(self.accelerator.device)
            for name, split in (("validation", self.data.validation), ("test", self.data.test)):
                if split is not None:
                    found[f"packed_{name}"] = evaluate(small, split, self.recipe.loss, self.accelerator)
        return found


def _steps(stage: StageSettings, per_epoch: int) -> int:
    return stage.steps if stage.steps is not None else max(1, round((stage.epochs or 0) * per_epoch))


def _penalty_column(name: str) -> str:
    return f"penalty_{name}"


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _check_setup(recipe: TrainingRecipe, accelerator: Any, divided: bool) -> None:
    """Raise PlanError for what cannot be done exactly."""
    if recipe.freeze and (divided or accelerator.num_processes > 1):
        raise PlanError("freeze takes gradients away, which parallel processes do not allow; leave one out")
    if recipe.penalties and divided:
        raise PlanError("penalties look at whole weights, and FSDP divides them; launch with --multi_gpu")
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise PlanError("precision fp16 needs a GPU; use bf16 here")
    if recipe.precision == "fp16" and divided:
        raise PlanError("the gradient scaling of fp16 does not know divided parameters; use bf16, or --multi_gpu")
    if recipe.precision == "fp16" and recipe.optimizer.options.get("fused"):
        raise PlanError("a fused optimizer hides from the hooks which steps fp16 skips; leave out fused, or use bf16")
