"""Side by side with the peers: the same checkpoint, the bytes each really writes, the quality each keeps.

    python benchmarks/peers.py                            # every peer on MiniLM, one table
    python benchmarks/peers.py --task resnet20            # ... on the CIFAR-10 ResNet-20
    python benchmarks/peers.py --only hqq                 # rows whose name contains "hqq"
    python benchmarks/peers.py --with-pennyweight         # and pennyweight at each peer's byte count: ahead or behind?
    python benchmarks/peers.py --with-pennyweight --sizes 7.0,6.0,5.5

Measured rows are kept in benchmarks/out/ (one JSON per task and calibration text), so that peers and pennyweight may
run from different environments and an interrupted run goes on where it stopped. They are not measured again when
the code changes: --fresh does that, for all rows or (--fresh pennyweight) for those whose name contains a text.

A peer's file holds its packed tensors and everything else in fp16, tensors of one type in one block: two or three
names in the header, the least any of them could write. The checkpoint's config.json is counted on both sides.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

import cifar
import data
import sts
from quantisers import QUANTISERS, Stored

Row = dict[str, Any]
Batches = list[dict[str, Tensor]]

SMALLEST_MATRIX = 1024  # weights with fewer elements stay fp16: the token types, the ResNet's first and last layer
PACKAGES = {
    "hqq": "hqq",
    "hqq-axis0": "hqq",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
    "torchao-hqq": "torchao",
    "auto-round": "auto-round",
}


@dataclass(frozen=True)
class Configuration:
    """bits: of linear and convolution weights; tables: of the word embeddings (0: the same)."""

    peer: str
    bits: int
    tables: int = 0

    @property
    def name(self) -> str:
        return f"{self.peer} {self.bits}-bit" + (f", {self.tables}-bit tables" if self.tables else "")


@dataclass(frozen=True)
class Task:
    """One model to shrink. predict: model -> what `evaluate` measures. config: bytes of the configuration file."""

    name: str
    metric: str
    samples: str
    load: Callable[[], nn.Module]
    empty: Callable[[], nn.Module]
    batches: Callable[[argparse.Namespace], Batches]
    predict: Callable[[nn.Module], Any]
    evaluate: Callable[[Any], dict[str, float]]
    config: Callable[[], int]
    configurations: tuple[Configuration, ...]


def _configurations(spec: dict[str, Iterable[int | tuple[int, int]]]) -> tuple[Configuration, ...]:
    return tuple(
        Configuration(peer, *bits) if isinstance(bits, tuple) else Configuration(peer, bits)
        for peer, widths in spec.items()
        for bits in widths
    )


TASKS = {
    "minilm": Task(
        name="all-MiniLM-L6-v2",
        metric="STS-B, Spearman x100",
        samples="sentences",
        load=sts.load_encoder,
        empty=sts.empty_encoder,
        batches=lambda args: sts.batches(data.calibration_sentences(args.samples, args.calibration)),
        predict=sts.encode_with,
        evaluate=sts.evaluate,
        config=lambda: (sts.model_folder() / "config.json").stat().st_size,
        configurations=_configurations(
            {
                "rtn": (4, 3, (3, 2), 2, 1),
                "hqq": (4, 3, (3, 2), 2, 1),
                "hqq-axis0": (4, 3, (3, 2), 2, 1),
                "quanto": (8, 4, (4, 2), 2),
                "torchao": (8, 4, 3, (3, 2), 2, 1),
                "torchao-hqq": (4, 3, (3, 2), 2),
                "gptq": (4, 3, (3, 2), 2),
                "auto-round": (4, (3, 2), 2),
            }
        ),
    ),
    "resnet20": Task(
        name="CIFAR-10 ResNet-20",
        metric="top-1 x100",
        samples="training images",
        load=cifar.load_resnet,
        empty=lambda: cifar.load_resnet(pretrained=False),
        batches=lambda args: cifar.batches(args.samples),
        predict=cifar.predict_with,
        evaluate=cifar.evaluate,
        config=lambda: 0,
        configurations=_configurations({"rtn": (8, 4, 3, 2, 1), "hqq": (4, 3, 2, 1), "gptq": (4, 3, 2)}),
    ),
}


# ------------------------------------------------------------------------------------------------------ providers
# A provider measures one row: (task, budget in bytes or None, batches) -> (predict, bytes, processor seconds).

Provider = Callable[[Task, int | None, Batches], tuple[Any, int, float]]


def reference(task: Task, budget: int | None, batches: Batches) -> tuple[Any, int, float]:
    """The fp32 checkpoint itself."""
    model = task.load()
    return task.predict(model), write_file(model, {}, torch.float32) + task.config(), 0.0


def peer(configuration: Configuration) -> Provider:
    """One peer at one setting; it has no notion of a budget."""

    def provide(task: Task, budget: int | None, batches: Batches) -> tuple[Any, int, float]:
        model = task.load()
        bits = bits_of(model, configuration)
        start = time.process_time()
        stored = QUANTISERS[configuration.peer](model, bits, batches)
        seconds = time.process_time() - start
        model = task.load()  # some peers rewrite the modules they were given
        nbytes = write_file(model, stored) + task.config()
        install(model, stored)
        return task.predict(model), nbytes, seconds

    return provide


def pennyweight(task: Task, budget: int | None, batches: Batches) -> tuple[Any, int, float]:
    """pennyweight at that many bytes, measured on the files read back."""
    import pennyweight as pw

    start = time.process_time()
    small = pw.shrink(task.load(), size=budget, data=batches)
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        pw.save(small, folder)
        files = [f for f in Path(folder).iterdir() if not f.name.startswith(("plan.", "report."))]
        return task.predict(pw.load(folder, model=task.empty).eval()), sum(f.stat().st_size for f in files), seconds


def bits_of(model: nn.Module, configuration: Configuration) -> dict[str, int]:
    """Bits for each weight that is quantised, by its name. The small position table always gets 8 bits: fewer would
    cost a peer quality for next to no bytes."""
    bits = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) or module.weight.numel() < SMALLEST_MATRIX:
            continue
        if not isinstance(module, nn.Embedding):
            bits[f"{name}.weight"] = configuration.bits
        else:
            bits[f"{name}.weight"] = 8 if "position" in name else configuration.tables or configuration.bits
    return bits


def write_file(model: nn.Module, stored: dict[str, Stored], rest: torch.dtype = torch.float16) -> int:
    """Write what the peer must keep and give the size of the file: its tensors, and all others as `rest`."""
    tensors = [t for s in stored.values() for t in s.tensors]
    tensors += [t.to(rest) for name, t in model.state_dict().items() if name not in stored and t.is_floating_point()]
    blocks = {
        str(dtype).removeprefix("torch."): torch.cat([t.reshape(-1) for t in tensors if t.dtype == dtype])
        for dtype in dict.fromkeys(t.dtype for t in tensors)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(blocks, path)
        return path.stat().st_size


@torch.no_grad()
def install(model: nn.Module, stored: dict[str, Stored]) -> None:
    """Put the decoded weights into the model, and round everything else to fp16."""
    for name, tensor in model.state_dict().items():
        if name in stored:
            tensor.copy_(stored[name].matrix.reshape(tensor.shape))
        elif tensor.is_floating_point():
            tensor.copy_(tensor.half())


# ------------------------------------------------------------------------------------------------------------ rows


class Rows:
    """The measured rows of one task and calibration, kept in a JSON file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.task = TASKS[args.task]
        self.args = args
        self.path = sts.OUT / f"peers-{args.task}-{args.calibration}-{args.samples}.json"
        self._batches: Batches | None = None

    def kept(self) -> dict[str, Row]:
        """What the file holds now; another run may have added to it."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def row(self, name: str, provider: Provider, budget: int | None = None, package: str = "") -> Row:
        """The row of that name, measured now unless it is kept already. A failure is shown but not kept."""
        fresh = self.args.fresh is not None and self.args.fresh in name
        if not fresh and name in self.kept():
            return self.kept()[name]
        torch.manual_seed(0)
        self._batches = self._batches or self.task.batches(self.args)
        row: Row = {"name": name, "budget": budget, "version": _version(package)}
        try:
            predict, row["bytes"], row["seconds"] = provider(self.task, budget, self._batches)
            row |= self.task.evaluate(predict)
        except Exception as error:  # one failing peer must not lose the others' rows; its words go into the table
            return row | {"note": f"{type(error).__name__}: {error}".splitlines()[0]}
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.kept() | {name: row}, indent=1))
        return row


def rows(args: argparse.Namespace, say: Callable[[str], None]) -> list[Row]:
    """Every row asked for: the reference, the peers, and pennyweight where wanted, each peer judged against it."""
    kept = Rows(args)
    first = kept.row("fp32", reference)
    found = [first]
    for configuration in TASKS[args.task].configurations:
        if not args.only or any(part in configuration.name for part in args.only):
            say(configuration.name)
            package = PACKAGES.get(configuration.peer, "")
            found.append(kept.row(configuration.name, peer(configuration), package=package))
    if args.with_pennyweight:
        sizes = [round(float(s) * 1e6) for s in args.sizes.split(",")] if args.sizes else []
        sizes = sizes or [row["bytes"] for row in found[1:] if "dev" in row and row["bytes"] < 10e6]
        ours = []
        for size in sorted(set(sizes), reverse=True):
            name = f"pennyweight {size:,} bytes"
            say(name)
            ours.append(kept.row(name, pennyweight, size, package="pennyweight"))
        judge(found[1:], ours)
        found += ours
    for row in found:
        for figure in ("dev", "unseen"):
            if figure in row:
                row[f"{figure}_lost"] = first[figure] - row[figure]
    return found


def judge(peers: list[Row], ours: list[Row]) -> None:
    """Give each peer its margin: pennyweight's figures minus its own, for our largest file no larger than its file."""
    for row in peers:
        fitting = [o for o in ours if "dev" in o and "dev" in row and o["bytes"] <= row["bytes"]]
        if fitting:
            rival = max(fitting, key=lambda o: o["bytes"])
            row["against"] = rival["name"]
            row["margin"] = {figure: rival[figure] - row[figure] for figure in ("dev", "unseen")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package) if package else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def table(found: list[Row], args: argparse.Namespace) -> Table:
    """The rows from large to small."""
    task = TASKS[args.task]
    title = f"{task.name}: {task.metric}; calibrated on {args.samples} {task.samples} ({args.calibration})"
    grid = Table(title=title, title_justify="left")
    grid.add_column("name")
    for column in ("bytes", "dev", "lost", "unseen", "lost", "cosine", "CPU s"):
        grid.add_column(column, justify="right")
    grid.add_column("pennyweight, same bytes or fewer")
    for row in sorted(found, key=lambda r: -r.get("bytes", 0)):
        label = f"{row['name']} [dim]{row['version']}[/]" if row["version"] else row["name"]
        if "note" in row:
            grid.add_row(label, *[""] * 7, row["note"])
            continue
        figures = [f"{row[key]:.2f}" for key in ("dev", "dev_lost", "unseen", "unseen_lost")]
        grid.add_row(
            label, f"{row['bytes']:,}", *figures, f"{row['cosine']:.4f}", f"{row['seconds']:.0f}", _verdict(row)
        )
    return grid


def _verdict(row: Row) -> str:
    if "margin" not in row:
        return ""
    ahead = all(value > 0 for value in row["margin"].values())
    words = " ".join(f"{value:+.2f} {figure}" for figure, value in row["margin"].items())
    return f"[{'green]ahead' if ahead else 'red]behind'}[/] {words}"


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="minilm")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="rows whose name contains this; may be repeated"
    )
    parser.add_argument("--with-pennyweight", action="store_true", help="add pennyweight at each peer's byte count")
    parser.add_argument("--sizes", default="", metavar="MB,MB", help="pennyweight at these sizes instead")
    parser.add_argument("--calibration", choices=data.CALIBRATIONS, default="mixture", help="text to calibrate on")
    parser.add_argument("--samples", type=int, default=1024, help="sentences (images) to calibrate on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--fresh", nargs="?", const="", metavar="NAME", help="measure kept rows again: those whose name contains this"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args()
    if args.task == "resnet20":
        args.calibration = "unlabelled"
    torch.set_num_threads(args.threads)
    console, progress = Console(), Console(stderr=True)
    if not console.is_terminal:  # a pipe or a log file has no width to wrap at
        console.width = 180
    found = rows(args, lambda name: progress.print(f"[dim]{name} ...[/]"))
    console.print(table(found, args))
    console.print(
        f"[dim]torch {torch.__version__}, {args.threads} threads, {platform.processor() or platform.machine()}[/]"
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0 if all("dev" in row for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
