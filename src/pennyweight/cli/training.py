"""pennyweight train."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ..memory import keep_freed_memory
from ..training.loop import TrainingResult
from ..training.loop import train as run_training
from ..training.metrics import METRICS
from ..training.settings import TrainingRecipe
from .screen import Json, Quiet, Screen


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML with model, data, batch, epochs, optimizer ...: see recipes/.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory to write, instead of the recipe's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint there, if there is one.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a network as a recipe says; several processes by accelerate launch -m pennyweight train RECIPE."""
    first = int(os.environ.get("RANK", "0")) == 0  # of the processes that a launcher started, one speaks
    screen = Screen(as_json, quiet or not first)
    settings = TrainingRecipe.load(recipe)
    if output is not None:
        settings = dataclasses.replace(settings, output=str(output))
    keep_freed_memory()
    with screen.working() as progress:
        result = run_training(settings, resume=resume, progress=progress)
    if not first:
        return
    if as_json:
        screen.json(result.report | {"directory": str(result.directory)})
        return
    screen.show(_table(result))
    packed = ", packed/" if result.report.get("packed_bytes") else ""
    files = f"model.safetensors, {METRICS}, report.json, recipe.yaml{packed}"
    screen.line(f"[dim]{escape(str(result.directory))}: {files}[/]")


def _table(result: TrainingResult) -> Table:
    report = result.report
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right", style="bold")
    table.add_row("parameters", f"{report['parameters']:,}")
    table.add_row("steps", f"{report['steps']:,} ({report['epochs']:.1f} epochs)")
    if report["skipped_steps"]:
        table.add_row("steps that mixed precision skipped", f"{report['skipped_steps']:,}")
    table.add_row("training loss", _number(report["last"].get("loss")))
    for split in ("validation", "test"):
        for name, value in report.get(split, {}).items():
            table.add_row(f"{split} {name}", f"{100 * value:.2f} %" if name == "accuracy" else _number(value))
    for name, value in report["last"].items():
        if name.startswith("penalty_"):
            table.add_row(f"penalty {name.removeprefix('penalty_')}", _number(value))
    if report.get("packed_bytes"):
        table.add_row("bytes, packed", f"{report['packed_bytes']:,}")
    for split in ("validation", "test"):
        if "accuracy" in report.get(f"packed_{split}", {}):
            table.add_row(f"{split} accuracy, packed", f"{100 * report[f'packed_{split}']['accuracy']:.2f} %")
    for name in ("flip_rate", "oscillation_rate", "estimating_error", "gradient_instability"):
        if name in report["last"]:
            table.add_row(name.replace("_", " "), _number(report["last"][name]))
    table.add_row("seconds", f"{report['seconds']:.1f}")
    return table


def _number(value: Any) -> str:
    return "?" if value is None else f"{value:.4g}"
