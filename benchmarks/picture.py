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
METRICS = {"minilm": ("dev", "STS-B dev, Spearman x100"), "resnet20": ("accuracy", "CIFAR-10 test accuracy, %")}
OURS = "pennyweight"


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
        ours = [row for row in found if row["name"].startswith(OURS)]
        for peer in found:
            beside = [row for row in ours if row["bytes"] <= peer["bytes"]]
            if beside and not peer["name"].startswith((OURS, "fp32")):
                best = max(beside, key=lambda row: row["bytes"])
                gain = best[metric] - peer[metric]
                verdict = "ahead of" if gain > 0 else "behind"
                lines.append(
                    f"{task}: {best['name']} ({best['bytes']:,} bytes) is {abs(gain):.2f} points {verdict} "
                    f"{peer['name']} ({peer['bytes']:,} bytes)."
                )
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
