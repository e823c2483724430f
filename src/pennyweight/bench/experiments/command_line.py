"""The command line of an experiment that writes a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[4]


def arguments_of(
    command: str,
    page: str,
    doc: str | None,
    arguments: Sequence[str] | None,
    seeds: int = 3,
    tasks: Sequence[str] = (),
) -> argparse.Namespace:
    """--out, --runs and --seeds, and --tasks where there are several to choose from; `command` for the page.

    page: the file's name in docs/results. doc: of the experiment's module. Sets torch to one thread.
    """
    parser = argparse.ArgumentParser(prog=command, description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "results" / page)
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "out" / "experiments", help="where runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)), help="the first chooses settings")
    if tasks:
        parser.add_argument("--tasks", nargs="+", choices=tasks, default=list(tasks), help="of the page")
    options = parser.parse_args(arguments)
    some = bool(tasks) and options.tasks != list(tasks)
    options.command = f"{command} --tasks {' '.join(options.tasks)}" if some else command
    torch.set_num_threads(1)
    return options
