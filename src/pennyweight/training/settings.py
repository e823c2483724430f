"""The recipe of a training: one YAML file, read into frozen dataclasses.

    model: {name: resnet20, options: {width: 16}}        # of pennyweight.models, or module:factory
    data: {name: fashion-mnist, validation: 5000, crop: 2, flip: true}
    batch: 128
    epochs: 10                                           # or steps; with stages, each stage has its own
    optimizer: {name: adamw, lr: 0.002, weight_decay: 0.05}
    schedule: {name: cosine, warmup: 0.05}
    prepare: {preset: reste}                             # or {rules: [...]}: what pennyweight.prepare takes
    output: out/fashion

Every key has its default in the classes below. A key, name or kind of value that does not exist is refused with the
close matches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .. import strict_yaml
from ..errors import PlanError, UnknownNameError


@dataclass(frozen=True)
class ModelSettings:
    """name: factory of `pennyweight.models`, or `module:factory`; options: its keyword arguments. weights: safetensors
    file or directory to start from, before anything is prepared."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """name: built-in set, or `module:factory` with `options`. validation: samples carved from the training split, where
    the set has no validation split of its own.

    samples: use only so many of the training split, the first ones. crop: pixels of zero padding for random crops.
    flip: mirror half of the images. length: tokens a sentence is cut or padded to; vocabulary: words, text only.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    validation: int = 0
    samples: int | None = None
    crop: int = 0
    flip: bool = False
    length: int = 64
    vocabulary: int = 8192


@dataclass(frozen=True)
class OptimizerSettings:
    """name: of torch.optim, or a registered method of `optim`. decay: weight decay on `matrices` (two dimensions or
    more: no biases, norms and scales) or on `all` parameters. options: further arguments of the optimizer. around:
    registered methods that wrap the optimizer, innermost first: [{method: pwd, decay: 1e-3, p: 0.8}]."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    decay: Literal["matrices", "all"] = "matrices"
    options: dict[str, Any] = field(default_factory=dict)
    around: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning rate over a stage. warmup: share of its steps. floor: final rate, as a share of `lr`."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.0
    floor: float = 0.0


@dataclass(frozen=True)
class LossSettings:
    """cross-entropy: logits on the last axis, integer targets. mse: same shapes."""

    name: Literal["cross-entropy", "mse"] = "cross-entropy"
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class TeacherSettings:
    """A full-precision network whose logits are matched: (1 - weight) * task + weight * T^2 * KL(teacher || model),
    both logits divided by the temperature T."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    weight: float = 1.0
    temperature: float = 1.0

    @property
    def model(self) -> ModelSettings:
        return ModelSettings(self.name, self.options, self.weights)


@dataclass(frozen=True)
class StageSettings:
    """A part of the training with an optimizer and a schedule of its own, from warm-up to floor.

    optimizer, schedule: keys that differ from the recipe's. What is quantised from where on is no matter of stages but
    of progress, which runs over all of them: weights that wait in a rule with `start: 0.5` become binary at half of the
    steps, activations first (the `two-stage` preset).
    """

    epochs: float | None = None
    steps: int | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShrinkSettings:
    """The size that `pennyweight.shrink` brings the trained model to: one of size ("20kB"), bits and ratio.

    methods: that may compete, all of the preset if there are none. samples: of the training split, to calibrate on.
    recover: steps of its recovery training on them.
    """

    size: str | None = None
    bits: float | None = None
    ratio: float | None = None
    methods: tuple[str, ...] = ()
    preset: str = "balanced"
    samples: int = 512
    recover: int = 0


@dataclass(frozen=True)
class TrainingRecipe:
    """All that decides a training. batch: samples of one optimizer step, over all processes and accumulated parts.

    accumulate: parts the batch of a process is computed in. clip: largest norm of the gradient. ema: decay of the
    averaged weights, which are then the ones evaluated and saved. precision: bf16 and fp16 are mixed precision.
    prepare: what `pennyweight.prepare` takes. anneal, freeze: of the Schedule of what it registers, in shares of all
    steps. hooks: registered methods that act around the step, [{method: cga, band: 0.005}]. penalties: registered
    methods of `losses` added to the loss, [{method: p-norm, strength: 1e-5, p: 1}]; see `training.penalties`.
    shrink: what becomes of the model in `packed/`; without it, `convert` packs what training made discrete or sparse.
    log_every, checkpoint_every: steps; an epoch's end is always logged. diagnostics: measure quantised weights.
    """

    model: ModelSettings
    data: DataSettings
    batch: int
    epochs: float | None = None
    steps: int | None = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    prepare: dict[str, Any] | None = None
    anneal: tuple[float, ...] = (0.0, 1.0)
    freeze: dict[str, float] = field(default_factory=dict)
    hooks: tuple[dict[str, Any], ...] = ()
    penalties: tuple[dict[str, Any], ...] = ()
    stages: tuple[StageSettings, ...] = ()
    teacher: TeacherSettings | None = None
    shrink: ShrinkSettings | None = None
    seed: int = 0
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    log_every: int = 50
    checkpoint_every: int = 500
    diagnostics: bool = True
    tensorboard: bool = False
    output: str = "out"

    def __post_init__(self) -> None:
        _require(self.batch >= 1, "batch", self.batch, "1 or more samples")
        _require(self.accumulate >= 1, "accumulate", self.accumulate, "1 or more")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(self.log_every >= 1, "log_every", self.log_every, "1 or more steps")
        _require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "1 or more steps")
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "a positive norm")
        _require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "a decay between 0 and 1")
        _require(len(self.anneal) == 2, "anneal", self.anneal, "two shares of the training, such as [0, 1]")
        _require(self.data.validation >= 0, "data.validation", self.data.validation, "0 or more samples")
        if self.teacher is not None:
            _require(0 <= self.teacher.weight <= 1, "teacher.weight", self.teacher.weight, "a share from 0 to 1")
            _require(self.teacher.temperature > 0, "teacher.temperature", self.teacher.temperature, "a positive number")
        if self.shrink is not None:
            budgets = [name for name in ("size", "bits", "ratio") if getattr(self.shrink, name) is not None]
            if len(budgets) != 1:
                raise PlanError(f"shrink: give one of size, bits and ratio, found {' and '.join(budgets) or 'none'}")
            _require(self.shrink.samples >= 1, "shrink.samples", self.shrink.samples, "1 or more")
        if self.stages and (self.epochs is not None or self.steps is not None):
            raise PlanError("the recipe has stages and epochs or steps beside them; give each stage its own")
        for index, stage in enumerate(self.all_stages):
            where = f"stages[{index}]" if self.stages else "the recipe"
            given = [name for name in ("epochs", "steps") if getattr(stage, name) is not None]
            if len(given) != 1:
                raise PlanError(f"{where}: give either epochs or steps, found {' and '.join(given) or 'none'}")
            _require(getattr(stage, given[0]) > 0, f"{where}: {given[0]}", getattr(stage, given[0]), "more than 0")
            schedule = self.schedule_of(stage)
            self.optimizer_of(stage)
            _require(0 <= schedule.warmup < 1, "schedule.warmup", schedule.warmup, "a share of the steps, 0 to below 1")
            _require(0 <= schedule.floor <= 1, "schedule.floor", schedule.floor, "a share of lr, 0 to 1")

    @property
    def all_stages(self) -> tuple[StageSettings, ...]:
        """The stages, or the whole training as one."""
        return self.stages or (StageSettings(self.epochs, self.steps),)

    def optimizer_of(self, stage: StageSettings) -> OptimizerSettings:
        return _read(OptimizerSettings, dataclasses.asdict(self.optimizer) | stage.optimizer, "optimizer")

    def schedule_of(self, stage: StageSettings) -> ScheduleSettings:
        return _read(ScheduleSettings, dataclasses.asdict(self.schedule) | stage.schedule, "schedule")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, defaults included; `from_dict` gives the same recipe back."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingRecipe:
        """Raises UnknownNameError for keys there are not, PlanError for values of the wrong kind."""
        return _read(cls, values, "recipe")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainingRecipe:
        """Read the YAML; errors name the file."""
        values = strict_yaml.read(path)
        try:
            return cls.from_dict(values)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None


def _plain(value: Any) -> Any:
    """With lists in place of tuples, which YAML does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _read(kind: Any, values: Any, where: str) -> Any:
    """An instance of the dataclass from plain values; `where` is the path of keys that led here."""
    if not isinstance(values, Mapping):
        raise PlanError(f"{where} must be a mapping, not {values!r}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise UnknownNameError(f"key of {where}:", str(key), hints)
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in values:
            raise PlanError(f"{where} has no {item.name}; it is needed")
    prefix = "" if where == "recipe" else f"{where}."
    return kind(**{key: _value(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation wants it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        value = "no" if value is False and "no" in arguments else value  # YAML takes a bare no for false
        if value not in arguments:
            raise UnknownNameError(where, str(value), map(str, arguments))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise PlanError(f"{where} must be a list, not {value!r}")
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _read(hint, value, where)
    kind = origin or hint
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # 1e-3: a number to everyone but YAML 1.1
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise PlanError(f"{where} must be {_KINDS[kind]}, not {value!r}")
    return float(value) if kind is float else value


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}


def _require(holds: bool, key: str, value: Any, wanted: str) -> None:
    if not holds:
        raise PlanError(f"{key} is {value}; give {wanted}")
