"""pennyweight inspect, eval, methods."""

from __future__ import annotations

import inspect as python_inspect
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .. import registry
from ..artifact import REPORT, is_artifact, read_artifact
from ..bench.fidelity import embedding_fidelity, median_milliseconds, output_fidelity
from ..compress.data import calls
from ..compress.shrink import PRESETS
from ..errors import ArtifactError
from ..report import Report, report_artifact, with_times
from ..report import report as make_report
from ..report_norms import measure_norms
from ..training.trained import is_trained
from .screen import Json, Quiet, Screen
from .shrinking import Data, Samples, summary
from .sources import BATCH_SIZE, Source, load_data, load_packed, load_source, some_data

Model = Annotated[str, typer.Argument(help="A directory that pennyweight shrink wrote; with --norms any MODEL.")]
Directory = Annotated[Path, typer.Argument(help="A directory that pennyweight shrink wrote.")]


def inspect(
    model: Model,
    time: Annotated[bool, typer.Option("--time", help="Measure each layer here, beside itself unpacked.")] = False,
    norms: Annotated[
        bool, typer.Option("--norms", help="Measure norms of weights, logits, path norm and Lipschitz bounds.")
    ] = False,
    p: Annotated[float, typer.Option(help="With --norms: the p of sum |w|^p.")] = 0.5,
    reference: Annotated[
        str | None, typer.Option(help="With --time and --norms: the MODEL it was made from, if not transformers'.")
    ] = None,
    data: Data = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the report as .html or .json.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What a shrunk model consists of, layer by layer; its checksum is verified. With --norms of any other, too."""
    screen = Screen(as_json, quiet)
    packed = not norms or is_artifact(model)
    made = report_artifact(model) if packed else None
    if time or norms:
        with screen.working() as progress:
            made = _measured(made, model, reference, data, time, p if norms else None, progress)
    assert made is not None  # of an artifact, or measured
    if output is not None:
        made.save(output)
    if as_json:
        screen.json(made.to_dict() | ({"checksum": "ok"} if packed else {}))
        return
    screen.show(made.table())
    if made.norms is not None:
        screen.show(made.norms.table())
    screen.line(summary(made))
    if packed:
        screen.line("[green]checksum ok[/]")


def _measured(
    made: Report | None, name: str, reference: str | None, data: str | None, time: bool, p: float | None, progress: Any
) -> Report:
    """The report of an artifact, or a new one, with times and (for a p) norms."""
    if made is None:
        source = load_source(name)
        return make_report(source.model, inputs=load_data(data, source, BATCH_SIZE), norms=True, p=p or 0.5, name=name)
    source = load_packed(Path(name), _origin(Path(name), reference))
    if time:
        made = with_times(made, source.model, some_data(data, source), progress)
    if p is not None:
        made.norms = measure_norms(source.model, load_data(data, source, BATCH_SIZE), p=p)
    return made


def _origin(directory: Path, reference: str | None) -> Source | None:
    """The reference, or the training that the artifact comes from; None where that is not known."""
    if reference is None:
        try:
            reference = _made_from(directory)
        except ArtifactError:
            return None
        if not is_trained(Path(reference)):
            return None
    return load_source(reference)


def evaluate(
    directory: Directory,
    reference: Annotated[
        str | None, typer.Option(help="The original MODEL; the default is what it was made from.")
    ] = None,
    data: Data = None,
    samples: Samples = 256,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How far a shrunk model has moved from the original, and the milliseconds either takes."""
    screen = Screen(as_json, quiet)
    with screen.working() as progress:
        read_artifact(directory)  # damage is told before anything long begins
        original = load_source(reference or _made_from(directory))
        small = load_packed(directory, original)
        progress("loading", 1, 3)
        batches = some_data(data, original, samples, held_out=True)
        if data is None and original.recipe is None:
            screen.note("no --data: measuring on held-out sentences of Python's English documentation")
        result = _fidelity(original, small, batches)
        progress("measuring fidelity", 2, 3)
        first = calls(original.model, batches)[len(batches) // 2]
        models = (original.model.eval(), small.model)
        before, after = median_milliseconds([lambda m=m: first(m) for m in models], repeats=7)
        progress("measuring time", 3, 3)
    result |= {"batch_size": first.size, "ms_before": before, "ms_after": after}
    if as_json:
        screen.json(result | {"reference": original.name, "directory": str(directory)})
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("against the original")
    table.add_column("", justify="right")
    for key, value in result.items():
        table.add_row(_FIGURES[key], f"{value:.4f}" if key in _SHARES else f"{value:.3g}")
    screen.line(f"[bold]{escape(str(directory))}[/] against {escape(original.name)}")
    screen.show(table)


_SHARES = ("cosine", "spearman", "relative_error", "top1_agreement")
_FIGURES = {
    "cosine": "mean cosine of the embeddings",
    "spearman": "Spearman of pairwise similarities",
    "relative_error": "relative error of the output",
    "top1_agreement": "same class ranked first",
    "batch_size": "samples in the timed batch",
    "ms_before": "ms a batch, original",
    "ms_after": "ms a batch, small",
}


def _fidelity(original: Source, small: Source, batches: list[Any]) -> dict[str, float]:
    if original.encoder is None:
        return output_fidelity(original.model, small.model, batches, original.output)
    if small.encoder is None:
        raise ArtifactError(f"{small.name} has no modules.json; copy it from {original.name}, or shrink again")
    embeddings = []
    with torch.no_grad():
        for source, encoder in ((original, original.encoder), (small, small.encoder)):
            parts = [encoder.output(call(source.model), call) for call in calls(source.model, batches)]
            embeddings.append(torch.cat(parts))
    return embedding_fidelity(*embeddings)


def _made_from(directory: Path) -> str:
    """The model named in report.json. Only a directory is taken from there: a factory would be code to run."""
    try:
        source = json.loads((directory / REPORT).read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        source = None
    if not isinstance(source, str) or not Path(source).is_dir():
        raise ArtifactError(f"{directory} does not say from which local directory it was made; give --reference MODEL")
    return source


def methods(as_json: Json = False) -> None:
    """The methods there are, their options, and the papers behind them."""
    screen = Screen(as_json)
    entries = registry.methods()
    if as_json:
        screen.json(
            [
                {
                    "name": entry.name,
                    "acts_on": entry.acts_on,
                    "paper": entry.paper or None,
                    "description": entry.description,
                    "options": _options(entry),
                    "presets": _presets(entry),
                }
                for entry in entries
            ]
        )
        return
    for place, title in (("compress", "methods that shrink"), ("formats", "formats they store weights in")):
        here = [entry for entry in entries if entry.acts_on == place]
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("name", "what it does", *(("options", "paper") if place == "compress" else ())):
            table.add_column(column, overflow="fold", no_wrap=column in ("name", "paper"))
        for entry in here:
            more = [", ".join(_options(entry)), entry.paper] if place == "compress" else []
            table.add_row(entry.name, entry.description, *more)
        screen.show(table)
    for name, members in PRESETS.items():
        screen.line(f"preset [bold]{name}[/]: {', '.join(members)}")


def _options(entry: registry.Entry) -> list[str]:
    if entry.acts_on != "compress":
        return []
    parameters = python_inspect.signature(entry.target.compress).parameters.values()
    return [p.name for p in parameters if p.name not in ("self", "layer") and p.kind is not p.VAR_KEYWORD]


def _presets(entry: registry.Entry) -> list[str]:
    return [name for name, names in PRESETS.items() if entry.acts_on == "compress" and entry.name in names]
