"""What the benchmarks do alike: flags, tables for the terminal and for docs/results, rows kept between runs, memory.

Flags of every script:
    --json       print the measured values as JSON instead of the tables
    --page       also write docs/results/<name>.md (for full runs: a page is a record)
    --resume     take over the rows of an interrupted run with the same settings; without it everything is measured
    --threads    of PyTorch
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import rich.table
import torch
from rich.console import Console
from torch import nn

import pennyweight as pw
from data import REPOSITORY
from pennyweight.bench.results import Table, mean_and_spread, write_results

Row = dict[str, Any]
T = TypeVar("T")

OUT = REPOSITORY / "benchmarks" / "out"
PAGES = REPOSITORY / "docs" / "results"
#: The files whose bytes are a model's size.
MODEL_FILES = ("model.safetensors", "config.json")


@dataclass(frozen=True)
class Result:
    """What a benchmark found. ok: every target is met. title, claim, data, conclusions: as `write_results` has them."""

    title: str
    claim: str
    data: str
    tables: Sequence[Table]
    conclusions: Sequence[str]
    values: Any
    ok: bool


def flags(doc: str | None, threads: int = 2) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have. doc: the script's docstring, shown by --help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--page", action="store_true", help="write the page in docs/results")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an interrupted run")
    parser.add_argument("--threads", type=int, default=threads, help=f"of PyTorch (default: {threads})")
    return parser


def finish(name: str, result: Result, args: argparse.Namespace) -> int:
    """Print (and with --page write) the result; 0 if every target is met, else 1, as the script's exit code."""
    if args.json:
        print(json.dumps(result.values, indent=2))
    else:
        show(result)
    if args.page:
        given = [a for a in sys.argv[1:] if a not in ("--page", "--json", "--resume")]
        write_results(
            PAGES / f"{name}.md",
            result.title,
            result.claim,
            result.tables,
            " ".join(["python", f"benchmarks/{name.replace('-', '_')}.py", *given]),
            [0],
            result.data,
            result.conclusions,
        )
    return 0 if result.ok else 1


def show(result: Result) -> None:
    """The tables and the conclusions on the terminal."""
    console = Console()
    if not console.is_terminal:  # a pipe or a log file has no width to wrap at
        console.width = 160
    console.print(f"[bold]{result.title}[/]")
    for table in result.tables:
        grid = rich.table.Table(title=table.caption, title_justify="left")
        for i, column in enumerate(table.columns):
            grid.add_column(column, justify="right" if i else "left")
        for name, cells in table.rows.items():
            grid.add_row(name, *(mean_and_spread(cell, table.digits) for cell in cells))
        console.print(grid)
    for line in result.conclusions:
        console.print(f"- {line}", highlight=False)


def verdict(met: bool | None) -> str:
    """Text of a "met" cell; None where there is no target."""
    return "" if met is None else "yes" if met else "NO"


class Kept:
    """Rows of one benchmark, written to benchmarks/out/ as they come, so that an interrupted run can go on."""

    def __init__(self, name: str, resume: bool) -> None:
        self.path = OUT / f"{name}.json"
        self.rows: dict[str, Row] = json.loads(self.path.read_text()) if resume and self.path.exists() else {}

    def row(self, key: str, measure: Callable[[], Row]) -> Row:
        """The row of that key, measured unless it is there. key: everything the row depends on, but for the code."""
        if key not in self.rows:
            Console(stderr=True).print(f"[dim]{key} ...[/]", highlight=False)
            self.rows[key] = measure()
            OUT.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.rows, indent=1))
        return self.rows[key]


def save_and_load(small: nn.Module, original: nn.Module | Callable[[], nn.Module]) -> tuple[nn.Module, int]:
    """The model as another process would read it from the files, and the bytes of those files.

    original: the unpacked model to fill, or what makes it.
    """
    with tempfile.TemporaryDirectory() as folder:
        nbytes = save_and_measure(small, folder)
        return pw.load(folder, model=original), nbytes


def save_and_measure(small: nn.Module, folder: str) -> int:
    """Write a packed model there and return the bytes of the files that are needed to load it."""
    pw.save(small, folder)
    return sum((Path(folder) / name).stat().st_size for name in MODEL_FILES)


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """The value of a function of a module's top level, computed in a process of its own: its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


class Stopwatch:
    """Seconds since it was made: on the wall, and of processor time, which other processes hardly change."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "seconds": time.perf_counter() - self._wall,
            "processor_seconds": time.process_time() - self._processor,
        }


def start(threads: int) -> None:
    """The state in which every row is measured."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)


def peak_memory() -> int:
    """The most this process has held in memory so far, in bytes.

    From Linux's own account of this program where there is one: the figure of getrusage survives exec, so that a new
    process starts with its parent's peak.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def memory_now() -> int:
    """What this process holds in memory, in bytes; its peak so far where the system does not tell."""
    return _status("VmRSS") or peak_memory()


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
