"""Pages of measured results: one Markdown page per experiment, with all it takes to repeat it.

    write_results("docs/results/rd-prune.md", title=..., claim=..., tables=[Table(...)], command=..., seeds=[0, 1, 2],
                  data=..., conclusion_lines=[...])

A page holds what was run and what came out, and nothing that changes from run to run (no date, no host name).
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

Cell = str | float | Sequence[float]


@dataclass(frozen=True)
class Table:
    """One table of a page.

    caption: what is measured, with its unit. columns: header texts, the first one over the row names.
    rows: row name -> one cell per further column; a sequence of numbers is one number per seed. digits: decimals shown.
    """

    caption: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]
    digits: int = 1

    def markdown(self) -> str:
        """The table as Markdown; raises ValueError if a row has not one cell per column."""
        lines = [f"**{self.caption}**", "", _line(self.columns), _line(["---", *["---:"] * (len(self.columns) - 1)])]
        for name, cells in self.rows.items():
            if len(cells) != len(self.columns) - 1:
                raise ValueError(f"row {name!r} has {len(cells)} cells for {len(self.columns) - 1} columns")
            lines.append(_line([name, *(mean_and_spread(cell, self.digits) for cell in cells)]))
        return "\n".join(lines)


def mean_and_spread(cell: Cell, digits: int = 1) -> str:
    """Text of a cell: "mean ± sample standard deviation" of a sequence (the mean alone if it has one number)."""
    if isinstance(cell, str):
        return cell
    values = [float(cell)] if isinstance(cell, int | float) else [float(value) for value in cell]
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences seed by seed, and its standard error: infinite for one seed.

    Raises ValueError unless there are as many of each.
    """
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return statistics.fmean(differences), error


def told_apart(mean: float, error: float, ahead: str = "ahead", behind: str = "behind") -> str:
    """The word for a difference of more than two standard errors, or that there is none."""
    return ahead if mean > 2 * error else behind if mean < -2 * error else "no difference that these seeds can tell"


def versions(packages: Sequence[str] = ("pennyweight", "torch", "numpy", "scipy")) -> str:
    """ "Python 3.11.9, torch 2.13.0, ...": the versions that ran; packages that are not installed are left out."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def write_results(
    path: str | os.PathLike[str],
    title: str,
    claim: str,
    tables: Sequence[Table],
    command: str,
    seeds: Sequence[int],
    data: str,
    conclusion_lines: Sequence[str],
    figures: Mapping[str, str] | None = None,
) -> Path:
    """Write the page and return its path. Folders are made as needed; the page is replaced in one step.

    claim: what the paper says, so that the tables can be read against it. conclusion_lines: one bullet each; they must
    be computed from the measured numbers by the caller. figures: file beside the page -> what it shows.
    """
    path = Path(path)
    facts = [
        f"- Command: `{command}`",
        f"- Seeds: {', '.join(map(str, seeds))}; cells are the mean over seeds ± sample standard deviation.",
        f"- Versions: {versions()}",
        f"- Data: {data}",
    ]
    parts = [
        f"# {title}",
        f"Claim: {claim}",
        "\n".join(facts),
        *(f"![{caption}]({name})\n\n{caption}" for name, caption in (figures or {}).items()),
        *(table.markdown() for table in tables),
        "## What the numbers say",
        "\n".join(f"- {line}" for line in conclusion_lines),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return unfinished.replace(path)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
