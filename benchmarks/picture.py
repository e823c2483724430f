"""The picture and the table of the comparison, from the rows that `peers.py` measured.

    python benchmarks/peers.py --with-pennyweight && python benchmarks/picture.py

Reads benchmarks/out/peers-*.json; writes docs/quality.svg (MiniLM) and docs/results/peers.md (all tasks measured).
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import matplotlib

from pennyweight.bench.results import Table, write_results

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(__file__).resolve().parent / "out"
METRICS = {"minilm": ("dev", "STS-B dev, Spearman x100"), "resnet20": ("dev", "CIFAR-10 test accuracy, %")}
OURS = "pennyweight"
LARGEST = 10_000_000  # bytes: above this size every method is within the noise of the original


def rows(task: str) -> list[dict[str, Any]]:
    """All measured rows of a task, largest file first; errors left out."""
    found = [
        row
        for path in sorted(OUT.glob(f"peers-{task}-*.json"))
        for row in json.loads(path.read_text()).values()
        if METRICS[task][0] in row
    ]
    return sorted(found, key=lambda row: -row["bytes"])


def draw(found: list[dict[str, Any]], path: Path) -> None:
    metric, label = METRICS["minilm"]
    families: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        families.setdefault(row["name"].split(" ")[0], []).append(row)
    reference = families.pop("fp32")[0]
    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "pennyweight", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(7.6, 4.2))
    for name, members in sorted(families.items(), key=lambda item: item[0] == OURS):
        ours = name == OURS
        axes.plot(
            [row["bytes"] / 1e6 for row in members],
            [row[metric] for row in members],
            marker="o" if ours else ".",
            linewidth=2.6 if ours else 1.0,
            color="#c2410c" if ours else None,
            label=name,
            zorder=3 if ours else 2,
        )
    axes.axhline(reference[metric], color="#888888", linewidth=1, linestyle="--")
    axes.text(13, reference[metric] + 0.3, f"fp32, {reference['bytes'] / 1e6:.1f} MB", ha="right", color="#666666")
    axes.set(xlabel="MB on disk", ylabel=label, xlim=(3, 13.2), ylim=(60, 90))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def verdicts(task: str, found: list[dict[str, Any]], figures: list[str]) -> list[str]:
    """For each figure: of how many peers' files under `LARGEST` bytes pennyweight's file, no larger, is ahead."""
    ours = [row for row in found if row["name"].startswith(OURS)]
    peers = [row for row in found if not row["name"].startswith((OURS, "fp32")) and row["bytes"] < LARGEST]
    pairs = [
        (max(beside, key=lambda row: row["bytes"]), peer)
        for peer in peers
        if (beside := [row for row in ours if row["bytes"] <= peer["bytes"]])
    ]
    lines = []
    for figure in figures if pairs else []:
        gains = [(best[figure] - peer[figure], peer["name"]) for best, peer in pairs]
        behind = "".join(f"; behind {name} by {-gain:.2f}" for gain, name in gains if gain <= 0)
        ahead = sum(gain > 0 for gain, _ in gains)
        lines.append(
            f"{task}, {figure}: ahead of {ahead} of {len(pairs)} peers' files under {LARGEST:,} bytes{behind}."
        )
    return lines


def main() -> None:
    tables, lines = [], []
    for task, (metric, label) in METRICS.items():
        found = rows(task)
        if not found:
            continue
        columns = ["row", "bytes", label, *(["unseen", "cosine"] if task == "minilm" else [])]
        keys = ["name", "bytes", metric, *(["unseen", "cosine"] if task == "minilm" else [])]
        cells = {row["name"]: [f"{row['bytes']:,}", *(row.get(key, "") for key in keys[2:])] for row in found}
        tables.append(Table(task, columns, cells, digits=2))
        lines += verdicts(task, found, keys[2:])
    write_results(
        ROOT / "docs" / "results" / "peers.md",
        "Side by side with the peers",
        "At equal or fewer bytes on disk, pennyweight keeps more of the model than any peer.",
        tables,
        "python benchmarks/peers.py --with-pennyweight && python benchmarks/picture.py",
        [0],
        f"shared/data: STS-B dev and every fourth train pair (unseen), CIFAR-10 test; {platform.processor() or 'CPU'}",
        lines,
    )
    draw(rows("minilm"), ROOT / "docs" / "quality.svg")


if __name__ == "__main__":
    main()
