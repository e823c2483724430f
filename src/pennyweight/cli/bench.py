"""pennyweight bench ...: measurements on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ..artifact import is_artifact
from ..bench.here import Bench, Timed, time_here
from ..errors import UnknownNameError
from ..layers.forms import ORIGINAL, SPLIT, Form
from ..memory import keep_freed_memory
from .screen import Json, Quiet, Screen
from .shrinking import Data
from .sources import Source, load_packed, load_source, some_data

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure on this machine."""


@app.command()
def here(
    model: Annotated[str, typer.Argument(help="MODEL as for shrink, or a directory that shrink wrote.")],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows given to each layer, several times if you like: 1 and 32.")
    ] = None,
    data: Data = None,
    reference: Annotated[
        str | None, typer.Option(help="The module:factory of a shrunk model that is not transformers'.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew what was measured before.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What each layer takes here in each format, and which formats make it slower."""
    screen = Screen(as_json, quiet)
    with screen.working() as progress:
        source = load_model(model, reference)
        found = time_here(source.model, some_data(data, source), batch or [1, 32], fresh, progress)
    if as_json:
        screen.json(found.to_dict())
        return
    facts = found.machine
    screen.line(
        f"[bold]{escape(source.name)}[/] on {escape(str(facts['processor']))}, {facts['instruction_set']}, "
        f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}, torch {escape(facts['torch'])}"
    )
    for size in dict.fromkeys(row.batch for row in found.rows):
        screen.show(_table(found, size))
    screen.line("Microseconds a call and, below, times those of the layer as it is; [red]slower ones are red[/].")
    if found.left_out:
        names = ", ".join(found.left_out[:5]) + (", ..." if len(found.left_out) > 5 else "")
        screen.note(f"not reached by the data and not timed: {names}")
    screen.line(f"[dim]Kept in {escape(found.cache)}[/]")


@app.command()
def binarization(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of results; one that exists is resumed.")],
    method: Annotated[
        list[str] | None,
        typer.Option(help="Preset or recipe (YAML) to judge; several if you like. Default: all presets."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Task to learn, several times if you like; default: all.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few minutes instead of nights: a look, not a verdict.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Trainings at a time, by Ray (extra `distributed`).")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Which way of making a network binary suits which task, network and machine: the six tracks of BiBench."""
    from ..bench.binarization.benchmark import benchmark
    from ..bench.binarization.data import TASKS
    from ..bench.binarization.grid import FULL, QUICK
    from ..bench.binarization.scores import TRACKS

    screen = Screen(as_json, quiet)
    for name in task or ():
        if name not in TASKS:
            raise UnknownNameError("task", name, TASKS)
    keep_freed_memory()
    with screen.working() as progress:
        tasks = tuple(dict.fromkeys(task or TASKS))
        found = benchmark(output, QUICK if quick else FULL, method or (), tasks, workers, progress)
    if as_json:
        screen.json(found.to_dict())
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("method", no_wrap=True)
    for title in TRACKS.values():
        table.add_column(title.lower().replace(" ", "\n"), justify="right")
    for card in found.cards:
        table.add_row(escape(card.method), *("" if s is None else f"{s:.3f}" for s in card.scores.values()))
    screen.show(table)
    screen.line("Ratios to the real-valued twin: more is better." + (" Too short a run to rank by." if quick else ""))
    if not found.complete:
        screen.note("some runs failed and are missing; the same command tries them again")
    screen.line(f"The page to look at: [bold]{escape(str(found.page.resolve()))}[/]")


def load_model(name: str, reference: str | None) -> Source:
    """MODEL, or a shrunk model. reference: MODEL that makes the latter."""
    if is_artifact(name):
        return load_packed(Path(name), None if reference is None else load_source(reference))
    return load_source(name)


def _table(found: Bench, size: int) -> Table:
    """A row a format, a column a layer."""
    rows = [row for row in found.rows if row.batch == size]
    table = Table(title=f"{size} row{'s' if size != 1 else ''}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("format", no_wrap=True)
    for row in rows:
        count = f"{len(row.layers)} x " if len(row.layers) > 1 else ""
        table.add_column(f"{count}{row.kind}\n{'x'.join(map(str, row.shape))}", justify="right")
    for title, forms in _titles(rows).items():
        table.add_row(title, *(_cell(row, next((f for f in forms if f in row.microseconds), None)) for row in rows))
    return table


def _cell(row: Timed, form: Form | None) -> str:
    if form is None:
        return ""
    taken = f"{row.microseconds[form]:,.0f}" if row.microseconds[form] >= 10 else f"{row.microseconds[form]:.1f}"
    if form == ORIGINAL:
        return taken
    colour = "red" if row.ratio(form) > 1 else "green"
    return f"{taken}\n[{colour}]{row.ratio(form):.2f}[/]"


def _titles(rows: list[Timed]) -> dict[str, list[Form]]:
    """What a format is called -> its forms in the columns, which may differ in numbers of groups and ranks."""
    titles: dict[str, list[Form]] = {}
    for row in sorted(rows, key=lambda row: -len(row.microseconds)):  # the fullest column sets the order
        ranks = sorted(form.at for form in row.microseconds if form.family == "lowrank" and form.at)
        for form in row.microseconds:
            titles.setdefault(_title(form, ranks), []).append(form)
    return titles


def _title(form: Form, ranks: list[float]) -> str:
    if form.family == "lowrank":
        return "lowrank, rank 0" if not form.at else f"lowrank, side/{8 if form.at == ranks[-1] else 32}"
    if form.family in ("int1", "int2", "int3", "int4", "int8", "binary"):
        name = form.family if form.family == "binary" else f"int, {form.family[3:]} bit"
        return name + ("" if form.at == 1 else ", groups")
    if form.family == "codebook":
        return f"codebook of {1 / form.at:g}s"
    if form.family == "sparse":
        return f"sparse, {'half' if form.at > 0.3 else 'a tenth'}"
    if form.family == "partial":
        return f"partial, a {'twentieth' if form.at < 0.1 else 'fifth'}"
    if form.family == "stacked":
        return f"stacked, {form.at:g} signs"
    return {ORIGINAL: "float32 (as it is)", SPLIT: "split, 3 and 4 bit", Form("decoded"): "int, 12 bit"}.get(
        form, form.family
    )
