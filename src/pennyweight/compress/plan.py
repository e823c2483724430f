"""The plan: one choice a layer, what it is predicted to weigh and to lose, as YAML that a person can edit.

    plan.save("plan.yaml");  plan = Plan.load("plan.yaml");  plan.validate(layer_names, methods)

`allocate.py` makes plans; `_HEADER` below tells the reader of the file what may be edited. The rule for edited lines: a
prediction is stored together with the choice it was made for, and holds only while the layer's line still says that.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import strict_yaml
from ..errors import PlanError, UnknownNameError
from .budget import parse_latency, parse_size, time_text

_HEADER = """\
# A pennyweight plan: what becomes of every layer.{summary}
#
# To edit: change a line under `layers` (method, options, split) or `budget`, then run
#     pennyweight shrink MODEL --plan THIS_FILE
# - One line a layer:  name: {{method: ..., options: {{...}}}}; `pennyweight methods` lists methods and their options.
# - split: {{method: ..., options: {{...}}, fraction: 0.25}} gives a quarter of the rows that other method.
# - Every layer of the model needs a line; the method dense keeps one in 16 bits.
# - `measured` belongs to the program. Its bytes and distortion count only while its `choice` equals the layer's line:
#   edit the line, and they are unknown until shrink has made the layer anew. Nothing there needs editing.
"""

_KEYS: dict[str, type | tuple[type, ...]] = {
    "budget": (int, str, type(None)),
    "overhead": int,
    "original_bytes": (int, type(None)),
    "solver": str,
    "seed": int,
    "latency": (int, float, str, type(None)),
    "latency_batch": (int, type(None)),
    "rest_microseconds": (int, float, type(None)),
}
_YAML_NAMES = {int: "a whole number", float: "a number", str: "text", dict: "a mapping", type(None): "null"}


@dataclass(frozen=True)
class SplitChoice:
    """The second part of a divided layer: `fraction` of its rows (0..1, exclusive) is made by this method."""

    method: str
    options: dict[str, Any]
    fraction: float


@dataclass(frozen=True)
class Choice:
    """What becomes of one layer. nbytes, distortion and (for a latency) microseconds in one forward: predictions, None
    where unknown (the plan was edited)."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    nbytes: int | None = None
    distortion: float | None = None
    split: SplitChoice | None = None
    microseconds: float | None = None

    @property
    def label(self) -> str:
        """Short text for tables: "gptq bits=3 group=64 + 25% gptq bits=4 group=64"."""
        text = _label(self.method, self.options)
        if self.split is not None:
            text += f" + {100 * self.split.fraction:.3g}% {_label(self.split.method, self.split.options)}"
        return text

    @property
    def line(self) -> dict[str, Any]:
        """The editable line of the YAML: plain values, without predictions."""
        line: dict[str, Any] = {"method": self.method, "options": dict(self.options)}
        if self.split is not None:
            split = self.split
            line["split"] = {"method": split.method, "options": dict(split.options), "fraction": split.fraction}
        return line


@dataclass(frozen=True)
class LayerInfo:
    """What a plan tells about a layer as it was: parameter shape, kind of weight site, bytes in the original file, and
    the sensitivity of the loss to its output (None where not measured)."""

    shape: tuple[int, ...]
    kind: str
    original_bytes: int
    sensitivity: float | None = None


@dataclass
class Plan:
    """One choice a layer.

    choices: by layer name. budget: bytes of all files, None if unlimited. overhead: bytes in those files that are not
    layer blobs (other tensors, headers, config). solver: what found it. frontier: (total bytes, distortion) of the best
    plans at other sizes, largest first. original_bytes: of the uncompressed model. layers: what they were. seed: of the
    run that made the plan. latency: seconds the model may take on latency_batch samples (None: the first batch of the
    data), None if it was not asked; rest_microseconds: what of it does not go to layers.
    """

    choices: dict[str, Choice]
    budget: int | None = None
    overhead: int = 0
    solver: str = "hull"
    frontier: list[tuple[int, float]] = field(default_factory=list)
    original_bytes: int | None = None
    layers: dict[str, LayerInfo] = field(default_factory=dict)
    seed: int = 0
    latency: float | None = None
    latency_batch: int | None = None
    rest_microseconds: float | None = None

    @property
    def total(self) -> int | None:
        """Predicted bytes of all files; None if some layer's are unknown."""
        sizes = [c.nbytes for c in self.choices.values()]
        return None if None in sizes else self.overhead + sum(s for s in sizes if s is not None)

    @property
    def distortion(self) -> float | None:
        """Sum of the layers' distortions; None if some layer's is unknown."""
        values = [c.distortion for c in self.choices.values()]
        return None if None in values else math.fsum(v for v in values if v is not None)

    @property
    def seconds(self) -> float | None:
        """Predicted time of the model; None without a latency, or if some layer's time is unknown."""
        parts = [self.rest_microseconds, *(c.microseconds for c in self.choices.values())]
        return None if None in parts else math.fsum(p for p in parts if p is not None) / 1e6

    def validate(
        self, model_layer_names: Iterable[str], known_methods: Iterable[str] | Mapping[str, Iterable[str]]
    ) -> None:
        """Check the plan against a model and the methods there are (a mapping also gives each method's options).

        Raises UnknownNameError with the close matches for a layer, method or option that does not exist, and PlanError
        for a layer of the model without a line.
        """
        names = list(model_layer_names)
        options_of: Mapping[str, Iterable[str] | None] = (
            known_methods if isinstance(known_methods, Mapping) else dict.fromkeys(known_methods)
        )
        for name, choice in self.choices.items():
            if name not in names:
                raise UnknownNameError("layer", name, names)
            for part in (choice, choice.split):
                if part is None:
                    continue
                if part.method not in options_of:
                    raise UnknownNameError(f"method of layer {name!r}:", part.method, options_of)
                known = options_of[part.method]
                if known is not None:
                    _expect_keys(f"option of {part.method} for layer {name!r}:", part.options, known)
        missing = [name for name in names if name not in self.choices]
        if missing:
            raise PlanError(
                f"the plan has no line for layer {missing[0]!r}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + "; add one (method dense keeps it in 16 bits)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything, totals included, as plain values that JSON can hold; the layout of the YAML."""
        measured: dict[str, dict[str, Any]] = {}
        for name in [*self.choices, *(n for n in self.layers if n not in self.choices)]:
            entry = measured[name] = {}
            if name in self.layers:
                info = self.layers[name]
                entry |= {"shape": list(info.shape), "kind": info.kind, "original_bytes": info.original_bytes}
                if info.sensitivity is not None:
                    entry["sensitivity"] = info.sensitivity
            choice = self.choices.get(name)
            if choice is not None and (choice.nbytes is not None or choice.distortion is not None):
                entry |= {"choice": choice.line, "bytes": choice.nbytes, "distortion": choice.distortion}
                if choice.microseconds is not None:
                    entry["microseconds"] = choice.microseconds
        timed = {key: getattr(self, key) for key in ("latency", "latency_batch", "rest_microseconds")}
        return {
            "pennyweight_plan": 1,
            "budget": self.budget,
            "overhead": self.overhead,
            "original_bytes": self.original_bytes,
            "solver": self.solver,
            "seed": self.seed,
            **(timed if self.latency is not None else {}),
            "total": self.total,
            "distortion": self.distortion,
            "layers": {name: choice.line for name, choice in self.choices.items()},
            "measured": {name: entry for name, entry in measured.items() if entry},
            "frontier": [list(point) for point in self.frontier],
        }

    def to_yaml(self) -> str:
        """YAML with one line a layer; `from_yaml` gives the same plan back."""
        values = self.to_dict()
        total, distortion = values.pop("total"), values.pop("distortion")
        summary = ""
        if total is not None and distortion is not None:
            summary = f"\n# {len(self.choices)} layers, {total:,} bytes in all, distortion {distortion:.6g}."
        if self.seconds is not None:
            summary += f" Predicted: {time_text(self.seconds)}; latency is in seconds, or text such as 3ms."
        lines = [_HEADER.format(summary=summary)]
        for key, value in values.items():
            if isinstance(value, dict) and value:
                lines += [f"{key}:", *(f"  {_flow(k)}: {_flow(v)}" for k, v in value.items())]
            elif isinstance(value, list) and value:
                lines += [f"{key}:  # [total bytes, distortion], largest first", *(f"  - {_flow(v)}" for v in value)]
            else:
                lines.append(f"{key}: {_flow(value)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_yaml(cls, text: str) -> Plan:
        """Read a plan, edited or not; raises PlanError (line or layer) and UnknownNameError (with close matches)."""
        values = strict_yaml.parse(text, "the plan")
        if not isinstance(values, dict) or "layers" not in values:
            raise PlanError("the plan has no `layers`; expected one line for each under that key")
        version = values.pop("pennyweight_plan", 1)
        if version != 1:
            raise PlanError(f"the plan is of version {version!r}; this pennyweight reads version 1: update pennyweight")
        _expect_keys("key of the plan", values, (*_KEYS, "layers", "measured", "frontier"))
        fields = {key: _typed(values[key], kind, f"`{key}`") for key, kind in _KEYS.items() if key in values}
        if isinstance(fields.get("budget"), str):
            fields["budget"] = parse_size(fields["budget"])
        if fields.get("latency") is not None:
            fields["latency"] = parse_latency(fields["latency"])
        lines = _typed(values["layers"], dict, "`layers`")
        measured = _typed(values.get("measured") or {}, dict, "`measured`")
        choices = {_typed(name, str, "layer name"): _read_choice(name, line) for name, line in lines.items()}
        layers: dict[str, LayerInfo] = {}
        for name, entry in measured.items():
            try:
                if name in choices and entry.get("choice") == choices[name].line:
                    choices[name] = replace(
                        choices[name],
                        nbytes=_maybe(int, entry["bytes"]),
                        distortion=_maybe(float, entry["distortion"]),
                        microseconds=_maybe(float, entry.get("microseconds")),
                    )
                if "shape" in entry:
                    shape = tuple(int(n) for n in entry["shape"])
                    sensitivity = _maybe(float, entry.get("sensitivity"))
                    layers[name] = LayerInfo(shape, str(entry["kind"]), int(entry["original_bytes"]), sensitivity)
            except (AttributeError, KeyError, TypeError, ValueError):
                raise PlanError(f"`measured` of layer {name!r} is damaged; delete its line") from None
        try:
            points = [(int(size), float(distortion)) for size, distortion in values.get("frontier") or []]
        except (TypeError, ValueError):
            raise PlanError("`frontier` is damaged; delete it") from None
        return cls(choices, layers=layers, frontier=points, **fields)

    def save(self, path: str | Path) -> None:
        """Write the YAML."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read the YAML; raises PlanError if the file cannot be read or is no plan."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"plan {path} cannot be read: {error}") from None
        try:
            return cls.from_yaml(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    def table(self) -> Table:
        """A row per layer, totals at the foot."""
        table = Table(show_footer=True)
        table.add_column("layer", f"{len(self.choices)} layers and {self.overhead:,} other bytes", overflow="fold")
        table.add_column("shape")
        table.add_column("becomes", overflow="fold")
        table.add_column("bytes", _number(self.total), justify="right")
        table.add_column("bits/weight", justify="right")
        table.add_column("distortion", _number(self.distortion), justify="right")
        timed = self.latency is not None
        if timed:
            table.add_column("µs", _number(_maybe(lambda s: round(1e6 * s), self.seconds)), justify="right")
        for name, choice in self.choices.items():
            info = self.layers.get(name)
            weights = math.prod(info.shape) if info else 0
            bits = f"{8 * choice.nbytes / weights:.2f}" if choice.nbytes is not None and weights else "?"
            shape = "x".join(map(str, info.shape)) if info else "?"
            becomes = escape(choice.label)  # names may contain what rich takes for markup
            cells = [escape(name), shape, becomes, _number(choice.nbytes), bits, _number(choice.distortion)]
            table.add_row(*cells, *([_number(choice.microseconds)] if timed else []))
        if timed:
            table.add_row("[dim]all else[/]", "", "", f"{self.overhead:,}", "", "", _number(self.rest_microseconds))
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=140).print(self.table())
        return out.getvalue()


def _label(method: str, options: Mapping[str, Any]) -> str:
    return " ".join([method, *(f"{k}={v}" for k, v in options.items())])


def _number(value: int | float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _maybe(kind: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else kind(value)


def _typed(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join(_YAML_NAMES[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise PlanError(f"{what} of the plan must be {names}, not {value!r}")
    return value


def _expect_keys(kind: str, found: Iterable[Any], known: Iterable[str]) -> None:
    known = list(known)
    for key in found:
        if key not in known:
            raise UnknownNameError(kind, str(key), known)


def _read_choice(name: str, line: Any) -> Choice:
    """One line under `layers`."""
    method, options = _read_method(f"layer {name!r}", line, "split")
    split = None
    if line.get("split") is not None:
        where = f"layer {name!r}, split"
        part_method, part_options = _read_method(where, line["split"], "fraction")
        fraction = line["split"].get("fraction")
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
            raise PlanError(f"{where}: fraction is {fraction!r}; give a share of the rows between 0 and 1")
        split = SplitChoice(part_method, part_options, float(fraction))
    return Choice(method, options, split=split)


def _read_method(where: str, line: Any, further_key: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(line, dict) or "method" not in line:
        raise PlanError(f"{where}: expected {{method: ..., options: {{...}}}}, found {line!r}")
    _expect_keys(f"key of {where}:", line, ("method", "options", further_key))
    method, options = line["method"], line.get("options") or {}
    if not isinstance(method, str) or not isinstance(options, dict) or not all(isinstance(k, str) for k in options):
        raise PlanError(f"{where}: method must be a name and options a mapping from names to values, found {line!r}")
    return method, options


class _Dumper(yaml.SafeDumper):
    """Keeps every value on its line: no anchors, and line breaks in strings are escaped."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_line(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_line)


def _flow(value: Any) -> str:
    """One value as YAML on one line."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text.removesuffix("...\n").strip()
