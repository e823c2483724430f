"""The log of a training: metrics.csv, one row a logged step; TensorBoard where asked; diagnostics.jsonl a layer.

A resumed run first drops the rows written after its checkpoint, so that the files are those of an unbroken run (but for
the seconds).
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..errors import ArtifactError, require

METRICS, DIAGNOSTICS = "metrics.csv", "diagnostics.jsonl"

#: The columns. Empty cells: not measured at that step.
COLUMNS: tuple[str, ...] = (
    "step", "epoch", "stage", "loss", "lr", "gradient_norm", "skipped_steps", "validation_loss", "validation_accuracy",
    "flip_rate", "oscillation_rate", "estimating_error", "gradient_instability", "seconds",
)  # fmt: skip


class Log:
    """Appends to the files of a directory. keep_until: the last step whose rows stay; 0 starts anew. penalties: columns
    besides COLUMNS."""

    def __init__(
        self, directory: Path, keep_until: int = 0, tensorboard: bool = False, penalties: Sequence[str] = ()
    ) -> None:
        self.columns = (*COLUMNS[:-1], *penalties, COLUMNS[-1])
        self.metrics, self.diagnostics = directory / METRICS, directory / DIAGNOSTICS
        try:
            directory.mkdir(parents=True, exist_ok=True)
            rows = [row for row in read_metrics(directory) if int(row["step"]) <= keep_until] if keep_until else []
            with replacing(self.metrics) as file:
                writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            lines = self.diagnostics.read_text().splitlines(True) if keep_until and self.diagnostics.exists() else []
            with replacing(self.diagnostics) as file:
                file.writelines(
                    line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= keep_until
                )
        except OSError as error:
            raise ArtifactError(f"cannot write into {directory}: {error.strerror or error}") from error
        self.board: Any = None
        if tensorboard:
            require("tensorboard", "train")
            self.board = require("torch.utils.tensorboard", "train").SummaryWriter(
                str(directory / "tensorboard"), purge_step=keep_until + 1
            )

    def row(self, values: Mapping[str, Any]) -> None:
        """One row; floats in full precision. Keys are of the columns; None is an empty cell."""
        with open(self.metrics, "a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(values)
        if self.board is not None:
            for name, value in values.items():
                if value is not None and name != "step":
                    self.board.add_scalar(name, value, values["step"])

    def layers(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        """What was measured of each layer, as one line of JSON."""
        with open(self.diagnostics, "a") as file:
            file.write(json.dumps({"step": step, "layers": values}) + "\n")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_metrics(directory: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The whole rows of metrics.csv, as text; a last row that a kill cut short is left out."""
    path = Path(directory) / METRICS
    if not path.exists():
        return []
    with open(path, newline="") as file:
        lines = [line for line in file if line.endswith("\n")]
    return list(csv.DictReader(lines))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes its name, and another's place, when it is complete."""
    unfinished = path.with_name(f".{path.name}.part")
    with open(unfinished, "w", newline="", encoding="utf-8") as file:
        yield file
    os.replace(unfinished, path)
