"""pennyweight demo."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ..bench.demo import SIZE, Demonstration, demonstrate
from ..report_page import size_text
from .screen import Json, Quiet, Screen

#: Lines of the plan that are shown.
_PLAN_LINES = 8


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")] = Path("demo-out"),
    size: Annotated[str, typer.Option(help="Bytes of all files.")] = SIZE,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Shrink a real sentence encoder (all-MiniLM-L6-v2) from 91 MB to 7 MB, and measure what is left of it."""
    screen = Screen(as_json, quiet)
    if not as_json:
        screen.line(
            f"Shrinking [bold]all-MiniLM-L6-v2[/] to [bold]{escape(size)}[/], calibrated on Python's own documentation."
        )
    with screen.working() as progress:
        result = demonstrate(output, size, progress=progress)
    if as_json:
        screen.json(result.to_dict())
        return
    screen.show(_figures(result))
    screen.line(f"[dim]Measured on {result.held_out} sentences that calibration has not seen.[/]\n")
    screen.show(_plan(result))
    page = (result.directory / "report.html").resolve()
    screen.line(f"The page to look at: [bold]{escape(str(page))}[/]")
    screen.line(f"[dim]The model: {escape(str(result.directory))}/, made in {result.seconds:.0f} s.[/]")


def _figures(result: Demonstration) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    table.add_column("original", justify="right")
    table.add_column("small", justify="right", style="bold")
    ratio = result.original_bytes / result.small_bytes
    table.add_row(
        "size on disk", size_text(result.original_bytes), f"{size_text(result.small_bytes)} ({ratio:.1f} times smaller)"
    )
    table.add_row("bytes", f"{result.original_bytes:,}", f"{result.small_bytes:,}")
    table.add_row("mean cosine to the original", "", f"{result.cosine:.4f}")
    table.add_row("Spearman of pairwise similarities", "", f"{result.spearman:.4f}")
    for batch, (before, after) in result.milliseconds.items():
        what = "ms a sentence, one by one" if batch == 1 else f"ms a sentence, {batch} at a time"
        table.add_row(what, f"{before:.2f}", f"{after:.2f}")
    return table


def _plan(result: Demonstration) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("heaviest layers", no_wrap=True)
    table.add_column("stored as", overflow="fold")
    table.add_column("bytes", justify="right")
    table.add_column("bits", justify="right")
    heaviest = result.report.heaviest(_PLAN_LINES)
    for row in heaviest:
        table.add_row(
            escape(row.name.removesuffix(".weight")), row.storage, f"{row.nbytes:,}", f"{row.bits_per_weight:.2f}"
        )
    rest = [row for row in result.report.layers if row not in heaviest]
    methods = Counter(result.plan.choices[row.name].method for row in rest)
    table.add_row(
        f"{len(rest)} more, in plan.yaml",
        ", ".join(f"{count} {name}" for name, count in methods.most_common()),
        f"{sum(row.nbytes for row in rest):,}",
        f"{8 * sum(row.nbytes for row in rest) / max(sum(row.weights for row in rest), 1):.2f}",
    )
    return table
