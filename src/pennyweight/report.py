"""What became of a model: bytes, bits, multiplications, distortion, a row a layer.

    report = pw.report(small, inputs=batch, original=model)
    print(report);  report.save("report.html");  report.save("report.json")

inputs and original are optional: the first counts multiplications, the second draws the weights as they were.

    print(pw.report(model, norms=True, inputs=batch))          # of any model, while or after it trains

adds the norms of the weights, the scale of the logits, path norm and Lipschitz bounds (report_norms.py).
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from .artifact import PLAN, read_artifact
from .bundle import config_json, file_bytes, pack_rest
from .compress.data import calls
from .compress.latency import Promise
from .compress.layer_times import Progress, packed_and_original
from .compress.plan import Plan
from .compress.shrink import Record
from .errors import ArtifactError, DataError, WeightError
from .formats import PackedWeight
from .layers.packed import packed_blobs, packed_weights
from .layers.sites import weight_sites
from .report_norms import Norms, effective_weights, measure_norms
from .report_storage import count_macs, storage, storage_parts

#: Layers drawn with a histogram: the largest so many.
HISTOGRAMS = 12
_BINS = 61


@dataclass(frozen=True)
class Histogram:
    """Counts of a weight's values in equal bins from `low` to `high`; values outside count in the outermost bins.

    before: of the original, None where it is not known. after: of the decoded weight.
    """

    low: float
    high: float
    before: list[int] | None
    after: list[int]


@dataclass(frozen=True)
class LayerRow:
    """One packed weight. What is not known is None.

    name: in the state dict. shape: of the parameter (without a plan, of its matrix). method: what the plan says.
    storage: the format in words. parts: (kind of storage, bytes); several for a divided layer. nbytes: on disk.
    original_bytes: in the original file. weights: how many. distortion, sensitivity: see `compress.observe`.
    macs: multiplications a sample by "weight bits x input bits". microseconds, original_microseconds: measured, of one
    forward over the first batch, packed (memory="low") and as it was.
    """

    name: str
    kind: str | None
    shape: tuple[int, ...]
    method: str | None
    storage: str
    parts: list[tuple[str, int]]
    nbytes: int
    original_bytes: int | None
    weights: int
    distortion: float | None = None
    sensitivity: float | None = None
    macs: dict[str, int] | None = None
    histogram: Histogram | None = None
    microseconds: float | None = None
    original_microseconds: float | None = None

    @property
    def slower(self) -> bool:
        """Whether the layer was measured and takes longer than it did."""
        return (self.microseconds or 0.0) > (self.original_microseconds or 0.0)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


@dataclass
class Report:
    """See the module. size: bytes of the files needed to load the model; other_bytes: those of them outside the layers.

    parameters: of the whole model. frontier: (bytes, distortion) of the best plans at other sizes, largest first.
    recovered: loss before and after recovery training, if there was any. promise: seconds asked for and measured, if a
    latency was asked for. plan: as carried out; None for a loaded model. norms: where they were asked for.
    """

    layers: list[LayerRow]
    size: int
    parameters: int
    original_bytes: int | None = None
    budget: int | None = None
    solver: str | None = None
    frontier: list[tuple[int, float]] = field(default_factory=list)
    recovered: tuple[float, float] | None = None
    name: str = "model"
    plan: Plan | None = None
    promise: Promise | None = None
    norms: Norms | None = None

    @property
    def other_bytes(self) -> int:
        return self.size - sum(row.nbytes for row in self.layers)

    @property
    def effective_bits(self) -> float:
        """Bits on disk per parameter, everything counted."""
        return 8 * self.size / self.parameters

    @property
    def ratio(self) -> float | None:
        """How many times smaller than the original weights."""
        return self.original_bytes / self.size if self.original_bytes else None

    @property
    def distortion(self) -> float | None:
        """Sum over the layers; None if some layer's is not known."""
        values = [row.distortion for row in self.layers]
        return None if None in values else math.fsum(v for v in values if v is not None)

    @property
    def macs(self) -> dict[str, int] | None:
        """Multiplications a sample by "weight bits x input bits"; None without inputs."""
        if all(row.macs is None for row in self.layers):
            return None
        total: Counter[str] = Counter()
        for row in self.layers:
            total.update(row.macs or {})
        return dict(total.most_common())

    @property
    def packed(self) -> bool:
        """Whether it is of a packed model: of others only norms are measured."""
        return not all(kind == "float" for row in self.layers for kind, _ in row.parts)

    @property
    def timed(self) -> bool:
        return any(row.microseconds is not None for row in self.layers)

    @property
    def smallest(self) -> int | None:
        """The smallest size that the methods allowed could have reached."""
        return self.frontier[-1][0] if self.frontier else None

    def predicted_distortion(self, size: float) -> float | None:
        """Of the best plan at another size, read off the frontier; None outside it."""
        if not self.frontier or not self.frontier[-1][0] <= size <= self.frontier[0][0]:
            return None
        sizes, distortions = zip(*reversed(self.frontier))
        return float(np.interp(size, sizes, distortions))

    @property
    def step(self) -> int:
        """A round number of bytes, 1 to 10 % of the size, for "what would so much more buy"."""
        return 10 ** max(len(str(self.size)) - 2, 0)

    def gain_of_more(self, extra: int) -> float | None:
        """Share of the predicted distortion that `extra` more bytes would take away; None where not known."""
        now, then = self.predicted_distortion(self.size), self.predicted_distortion(self.size + extra)
        return None if now is None or then is None or now == 0 else 1 - then / now

    def heaviest(self, n: int = 5) -> list[LayerRow]:
        """The layers with most bytes."""
        return sorted(self.layers, key=lambda row: (-row.nbytes, row.name))[:n]

    def to_dict(self) -> dict[str, Any]:
        """Everything but histograms and plan, as plain values that JSON can hold."""
        rows = []
        for row in self.layers:
            values = asdict(row)
            del values["histogram"]
            if not self.timed:
                del values["microseconds"], values["original_microseconds"]
            rows.append(values | {"bits_per_weight": row.bits_per_weight})
        more = {} if self.promise is None else {"latency": self.promise._asdict()}
        more |= {} if self.norms is None else {"norms": self.norms.to_dict()}
        return {
            "name": self.name,
            "size": self.size,
            "original_bytes": self.original_bytes,
            "ratio": self.ratio,
            "budget": self.budget,
            "parameters": self.parameters,
            "effective_bits": self.effective_bits,
            "distortion": self.distortion,
            "other_bytes": self.other_bytes,
            "macs": self.macs,
            "recovered": self.recovered,
            **more,
            "solver": self.solver,
            "smallest": self.smallest,
            "layers": rows,
            "frontier": [list(point) for point in self.frontier],
        }

    def table(self) -> Table:
        """A row a layer, totals at the foot."""
        table = Table(show_footer=True)
        table.add_column("layer", f"{len(self.layers)} layers and {self.other_bytes:,} other bytes", overflow="fold")
        table.add_column("shape", no_wrap=True)
        table.add_column("stored as", overflow="fold")
        table.add_column("bytes", f"{self.size:,}", justify="right", no_wrap=True)
        table.add_column("bits/weight", f"{self.effective_bits:.2f}", justify="right")
        known = self.distortion
        if known is not None:
            table.add_column("distortion", f"{known:.4g}", justify="right")
        if self.timed:
            slower = sum(row.slower for row in self.layers)
            table.add_column("µs", f"{slower} slower", justify="right", no_wrap=True)
            table.add_column("was", justify="right", no_wrap=True)
        for row in self.layers:
            cells = [escape(row.name), "x".join(map(str, row.shape)), row.storage, f"{row.nbytes:,}"]
            cells.append(f"{row.bits_per_weight:.2f}")
            cells += [f"{row.distortion:.4g}"] if known is not None else []
            if self.timed:
                mark = "[red]▲[/] " if row.slower else ""
                cells += [mark + _whole(row.microseconds), _whole(row.original_microseconds)]
            table.add_row(*cells)
        return table

    def to_html(self) -> str:
        """One self-contained page."""
        from .report_page import page

        return page(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write report.html or report.json, told by the suffix. Raises ArtifactError if the file cannot be written."""
        target = Path(path)
        if target.suffix == ".html":
            text = self.to_html()
        elif target.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        else:
            raise ArtifactError(f"a report is saved as .html or .json, not as {target.name!r}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from error
        return target

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=140).print(*[self.table(), *([] if self.norms is None else [self.norms.table()])])
        return out.getvalue()


def report(
    model: nn.Module,
    *,
    inputs: Any = None,
    original: nn.Module | None = None,
    name: str | None = None,
    time: bool = False,
    norms: bool = False,
    p: float = 0.5,
    targets: Tensor | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """The report of a packed model, from `shrink` or `load` (the latter knows neither plan nor distortion).

    inputs: calibration data as `shrink` takes it; its first batch is run to count multiplications. original: the model
    before, for the histograms. name: heads the page. time: measure each layer on the first batch of inputs, beside
    itself unpacked. norms: measure weights, logits and bounds, of models that are not packed, too; p: of the power
    sums, targets: the classes of the inputs (see `report_norms.measure_norms`).
    Raises WeightError if the model is not packed, DataError for a time without inputs.
    """
    packed = packed_weights(model)
    if not packed and not norms:
        raise WeightError(
            f"{type(model).__name__} holds no packed weight; report what shrink or load returns, or give norms=True"
        )
    measured = measure_norms(model, inputs, targets, p) if norms else None
    if not packed:
        return _of_unpacked(model, measured, name)
    blobs = {names[0]: len(blob) for names, blob in packed_blobs(model).items()}
    record = getattr(model, "_pennyweight", None)
    plan = record.plan if isinstance(record, Record) else None
    made = _build(
        packed,
        plan,
        size=file_bytes(blobs, len(pack_rest(model)), len(config_json(model))),
        parameters=sum(math.prod(w.shape) for w in packed.values()) + sum(p.numel() for p in model.parameters()),
        macs=count_macs(model, packed, inputs) if inputs is not None else None,
        histograms=_histograms(model, packed, original),
    )
    made.name, made.norms = name or type(model).__name__, measured
    if isinstance(record, Record):
        made.recovered, made.promise = record.recovered, record.promise
    return with_times(made, model, inputs, progress) if time else made


def _of_unpacked(model: nn.Module, norms: Norms | None, name: str | None) -> Report:
    """Rows of the weights as they are."""
    rows = []
    for layer, weight, _ in effective_weights(model):
        nbytes, kind = weight.numel() * weight.element_size(), str(weight.dtype).removeprefix("torch.")
        row = LayerRow(
            layer, None, tuple(weight.shape), None, kind, [("float", nbytes)], nbytes, nbytes, weight.numel()
        )
        rows.append(row)
    state = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in state)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Report(rows, size, parameters, name=name or type(model).__name__, norms=norms)


def with_times(
    made: Report, model: nn.Module, inputs: Any, progress: Progress = lambda what, done, total: None
) -> Report:
    """The report of that packed model with each layer's time measured. Raises DataError without inputs."""
    if inputs is None:
        raise DataError("the time of layers is measured on the inputs they get; give inputs")
    times = packed_and_original(model, calls(model, inputs)[0], progress)
    unreached = (None, None)
    rows = []
    for row in made.layers:
        now, before = times.get(row.name, unreached)
        rows.append(replace(row, microseconds=now, original_microseconds=before))
    return replace(made, layers=rows)


def report_artifact(directory: str | os.PathLike[str]) -> Report:
    """The report of a saved model, without making the model; with the plan, if plan.yaml is there.

    Raises ArtifactError if the files are damaged, and PlanError if the plan is.
    """
    path = Path(directory)
    artifact = read_artifact(path)
    packed = artifact.packed_weights()
    return _build(
        packed,
        Plan.load(path / PLAN) if (path / PLAN).is_file() else None,
        size=artifact.nbytes,
        parameters=sum(math.prod(w.shape) for w in packed.values()) + sum(t.numel() for t in artifact.rest.values()),
        name=path.resolve().name,
    )


def _build(
    packed: Mapping[str, PackedWeight],
    plan: Plan | None,
    *,
    size: int,
    parameters: int,
    macs: Mapping[str, dict[str, int]] | None = None,
    histograms: Mapping[str, Histogram] | None = None,
    name: str = "model",
) -> Report:
    rows = []
    order = {layer: at for at, layer in enumerate(plan.choices)} if plan else {}
    for layer, weight in sorted(packed.items(), key=lambda item: order.get(item[0], 0)):
        info = plan.layers.get(layer) if plan else None
        choice = plan.choices.get(layer) if plan else None
        rows.append(
            LayerRow(
                name=layer,
                kind=info.kind if info else None,
                shape=info.shape if info else tuple(weight.shape),
                method=_rounded(choice.label) if choice else None,
                storage=storage(weight),
                parts=storage_parts(weight),
                nbytes=weight.nbytes,
                original_bytes=info.original_bytes if info else None,
                weights=math.prod(weight.shape),
                distortion=choice.distortion if choice else None,
                sensitivity=info.sensitivity if info else None,
                macs=macs.get(layer, {}) if macs is not None else None,
                histogram=(histograms or {}).get(layer),
            )
        )
    made = Report(rows, size, parameters, name=name)
    if plan is not None:
        made.original_bytes, made.budget, made.solver = plan.original_bytes, plan.budget, plan.solver
        made.frontier, made.plan = list(plan.frontier), plan
    return made


def _whole(microseconds: float | None) -> str:
    return "" if microseconds is None else f"{microseconds:,.{0 if microseconds >= 10 else 1}f}"


def _rounded(label: str) -> str:
    """A plan's label with its fractions to four digits."""
    return re.sub(r"\d+\.\d{4,}(e-?\d+)?", lambda number: f"{float(number[0]):.4g}", label)


# -------------------------------------------------------------------------------------------------------- histograms


def _histograms(
    model: nn.Module, packed: Mapping[str, PackedWeight], original: nn.Module | None
) -> dict[str, Histogram]:
    """Of the largest layers. Where a batch norm was folded into a layer, the original is drawn folded, too."""
    largest = sorted(packed, key=lambda name: (-math.prod(packed[name].shape), name))[:HISTOGRAMS]
    before = _original_matrices(model, original, largest) if original is not None else {}
    return {name: _histogram(packed[name].decode(), before.get(name)) for name in largest}


def _histogram(after: Tensor, before: Tensor | None) -> Histogram:
    reach = 4 * float((after if before is None else before).double().pow(2).mean().sqrt()) or 1.0

    def counts(values: Tensor) -> list[int]:
        edges = np.linspace(-reach, reach, _BINS + 1)
        return np.histogram(values.clamp(-reach, reach).numpy(), bins=edges)[0].tolist()

    return Histogram(-reach, reach, None if before is None else counts(before), counts(after))


def _original_matrices(model: nn.Module, original: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    folded = [(f.layer, f.norm) for f in getattr(model, "_pennyweight_folded", [])]
    norm_of = dict([*folded, *getattr(model, "_pennyweight_folded_before", [])])
    found = {}
    for site in weight_sites(original):
        if site.name not in names:
            continue
        found[site.name] = site.matrix()
        norm: Any = original.get_submodule(norm_of[site.module_name]) if site.module_name in norm_of else None
        if norm is not None:
            gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
            found[site.name] *= (gamma / (norm.running_var + norm.eps).sqrt()).float()[:, None]
    return found
