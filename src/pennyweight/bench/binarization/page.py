"""index.html: the score cards as one self-contained page in the style of `report.html`: no script, font or network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...report_page import document, size_text
from .corruptions import CORRUPTIONS
from .runs import REAL
from .scores import TRACKS, Card

_RADIUS = 74.0


def page(cards: Sequence[Card], facts: Mapping[str, Any]) -> str:
    """The HTML text. facts: what heads the page: profile, runs, machine, versions."""
    methods = [card for card in cards if card.method != REAL]
    sections = (
        _head(methods, facts),
        _radars(methods),
        _scores(cards),
        _by("Accuracy by task", "Per cent on test samples; CoLA's is the mean of its two classes.", cards, "accuracy"),
        _by("Accuracy by family of architectures", "Per cent, over all runs of the family.", cards, "families"),
        _corruptions(cards),
        _training(cards),
        _deployed(methods),
        _refused(methods),
        _notes(facts),
    )
    return document("Binarization benchmark", "\n".join(filter(None, sections)), "Written by pennyweight.")


def _head(methods: Sequence[Card], facts: Mapping[str, Any]) -> str:
    machine = facts["machine"]
    shown = [
        ("Methods", str(len(methods)), "each beside its real-valued twin"),
        ("Runs", f"{facts['runs']:,}", f"profile: {facts['profile']}"),
        ("Measured on", escape(str(machine["instruction_set"])), escape(f"{machine['processor']}")),
    ]
    cells = "".join(f"<div><dt>{t}</dt><dd>{v}<small>{s}</small></dd></div>" for t, v, s in shown)
    warning = (
        '<p class="lead">A quick run: it shows that all works and where time and bytes go. '
        "<strong>Its trainings are far too short to tell which method learns best.</strong></p>"
        if facts["profile"] == "quick"
        else '<p class="lead">Six tracks of BiBench, each a ratio to the real-valued twin: more is better.</p>'
    )
    return (
        f'<header><p class="eyebrow">pennyweight bench binarization</p><h1>Which binarization?</h1>{warning}</header>'
        f'<dl class="figures">{cells}</dl>'
    )


# -------------------------------------------------------------------------------------------------------------- radars


def _radars(methods: Sequence[Card]) -> str:
    """One hexagon a method; an axis ends at the best method's score."""
    best = {t: max((card.scores[t] or 0.0 for card in methods), default=0.0) for t in TRACKS}
    drawn = "".join(
        f'<figure><figcaption><span class="name" style="color:var(--ink)">{escape(card.method)}</span></figcaption>'
        f"{_radar(card, best)}</figure>"
        for card in methods
    )
    return (
        "<section><h2>The six tracks</h2><p>An axis ends at the best score of all methods here. Clockwise from the "
        f"top: {', '.join(name.lower() for name in TRACKS.values())}.</p>"
        f'<div class="small-multiples">{drawn}</div></section>'
    )


def radar_points(values: Sequence[float], radius: float) -> list[tuple[float, float]]:
    """Corners of a polygon: values 0..1 along evenly spaced axes, the first upwards, clockwise; y points down."""
    turn = 2 * math.pi / len(values)
    return [(radius * v * math.sin(i * turn), -radius * v * math.cos(i * turn)) for i, v in enumerate(values)]


def _radar(card: Card, best: Mapping[str, float]) -> str:
    def outline(values: Sequence[float]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in radar_points(values, _RADIUS))

    shares = [(card.scores[t] or 0.0) / best[t] if best[t] else 0.0 for t in TRACKS]
    rings = "".join(f'<polygon class="grid" fill="none" points="{outline([r] * 6)}"/>' for r in (0.25, 0.5, 0.75, 1.0))
    spokes = "".join(
        f'<line class="grid" x1="0" y1="0" x2="{x:.1f}" y2="{y:.1f}"/>' for x, y in radar_points([1] * 6, _RADIUS)
    )
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--accent)">'
        f"<title>{escape(TRACKS[t])}: {_score(card.scores[t])}</title></circle>"
        for t, (x, y) in zip(TRACKS, radar_points(shares, _RADIUS))
    )
    labels = "".join(
        f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{"middle" if abs(x) < 1 else "start" if x > 0 else "end"}">{t}'
        "</text>"
        for t, (x, y) in zip(TRACKS, radar_points([1.15] * 6, _RADIUS))
    )
    return (
        f'<svg viewBox="-150 -100 300 200" role="img" aria-label="Scores of {escape(card.method)} on six tracks">'
        f'{rings}{spokes}<polygon points="{outline(shares)}" fill="var(--accent)" fill-opacity=".22" '
        f'stroke="var(--accent)" stroke-width="1.5"/>{marks}{labels}</svg>'
    )


# -------------------------------------------------------------------------------------------------------------- tables


def _table(title: str, text: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; the first of a row names it."""
    if not rows:
        return ""
    top = "".join(f"<th{' class=n' if i else ''}>{head}</th>" for i, head in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f'<td class="{"n" if i else "name"}">{cell}</td>' for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        f"<section><h2>{title}</h2><p>{text}</p><div class='scroll'><table><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _scores(cards: Sequence[Card]) -> str:
    methods = [card for card in cards if card.method != REAL]
    best = {t: max((card.scores[t] or 0.0 for card in methods), default=0.0) for t in TRACKS}
    rows = []
    for card in cards:
        cells = [_score(card.scores[t]) for t in TRACKS]
        bold = [card.method != REAL and card.scores[t] == best[t] and best[t] > 0 for t in TRACKS]
        rows.append([escape(card.method), *(f"<strong>{c}</strong>" if b else c for c, b in zip(cells, bold))])
    text = "BiBench's overall metrics, arXiv 2301.11233; the real-valued twin scores 1. Bold is the best of a track."
    heads = [title.replace(" ", "<br>") for title in TRACKS.values()]
    return _table("Scores", text, ["method", *heads], rows)


def _by(title: str, text: str, cards: Sequence[Card], what: str) -> str:
    names = list(dict.fromkeys(name for card in cards for name in getattr(card, what)))
    rows = [[escape(c.method), *(_percent(getattr(c, what).get(name)) for name in names)] for c in cards]
    return _table(title, text, ["method", *map(escape, names)], rows if names else [])


def _corruptions(cards: Sequence[Card]) -> str:
    if not any(card.lost for card in cards):
        return ""
    rows = [[kind, *(_percent(card.lost.get(kind)) for card in cards)] for kind in CORRUPTIONS]
    text = "Points of accuracy lost to each corruption of the test images, mean over severities."
    return _table("Lost to corruptions", text, ["corruption", *(escape(card.method) for card in cards)], rows)


def _training(cards: Sequence[Card]) -> str:
    rows = [
        [escape(c.method), "–" if c.seconds is None else f"{1e3 * c.seconds:,.1f}", _percent(c.deviation)]
        for c in cards
        if c.seconds is not None
    ]
    text = "Time of a training step, and the deviation of accuracy over optimisers, learning rates and schedules."
    return _table("Training consumption", text, ["method", "ms a step", "deviation of accuracy"], rows)


def _deployed(methods: Sequence[Card]) -> str:
    rows = []
    for name in dict.fromkeys(name for card in methods for name in card.deployed):
        for card in methods:
            found = card.deployed.get(name, {})
            if "compression" not in found:
                continue
            ratios = [f"{found['compression']:.1f}×", f"{found['speedup']:.1f}×"]
            measured = ["–"] * 4
            if "seconds" in found:
                before, after = found["real_seconds"], found["seconds"]
                measured = [f"{1e3 * before:,.2f}", f"{1e3 * after:,.2f}"]
                measured += [size_text(found["real_bytes"]), size_text(found["bytes"])]
            rows.append([escape(f"{name}, {card.method}"), *ratios, *measured])
    heads = ["network, method", "fewer bits (r<sub>c</sub>)", "fewer operations (r<sub>s</sub>)"]
    heads += ["ms, real", "ms, packed", "bytes, real", "bytes, packed"]
    text = (
        "In theory: ratios by the formulas of BiBench, from the bits that were seen to be multiplied. Here: one sample "
        "on this processor, packed by pennyweight.convert and run by its kernels, and the files as written."
    )
    return _table("Complexity and inference", text, heads, rows)


def _refused(methods: Sequence[Card]) -> str:
    items = [f"<li><strong>{escape(c.method)}</strong>, {escape(reason)}</li>" for c in methods for reason in c.refused]
    if not items:
        return ""
    return (
        "<section><h2>What could not be done</h2><p>Such runs count as nothing in the scores.</p>"
        f'<ul class="facts">{"".join(items)}</ul></section>'
    )


def _notes(facts: Mapping[str, Any]) -> str:
    items = (
        "Networks are trained from random weights; BiBench starts from real-valued checkpoints.",
        "A network at chance has nothing to lose to corruptions, and the same accuracy with every setting: read "
        "robustness and training consumption beside its accuracy.",
        f"All with {escape(str(facts['versions']))}; {facts['machine']['threads']} threads.",
    )
    return f'<section><h2>Notes</h2><ul class="facts">{"".join(f"<li>{item}</li>" for item in items)}</ul></section>'


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
