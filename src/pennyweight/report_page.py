"""report.html: one self-contained page, drawn as SVG and HTML, so that it needs no script, font or network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from .compress.budget import time_text
from .report import Histogram, LayerRow, Report

#: Kinds of storage in the order of the legend; the colours are those of the same names in report_page.css.
KINDS = {
    "int": "integer codes",
    "binary": "signs",
    "codebook": "codebook",
    "sparse": "sparse",
    "lowrank": "low rank",
    "partial": "signs and salient weights",
    "stacked": "stages",
    "signed-lowrank": "signs of low rank",
    "dense16": "16-bit floats",
    "float": "floats as trained",
}
#: Layers drawn one by one; the rest share a line.
_BARS = 48
_SENSITIVITIES = 15


def page(report: Report) -> str:
    """The HTML text of a report."""
    sections = (_head, _frontier, _limits, _bars, _sensitivity, _histograms, _norms, _table)
    if not report.packed:
        sections = (_head, _bars, _norms)
    body = "\n".join(filter(None, (section(report) for section in sections)))
    footer = "Written by pennyweight. Bytes are those on disk: model.safetensors and config.json."
    return document(f"{report.name}, {size_text(report.size)}: pennyweight report", body, footer)


def document(title: str, body: str, footer: str) -> str:
    """A whole page in pennyweight's style. title: plain text; body, footer: HTML."""
    style = files("pennyweight").joinpath("report_page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>{footer}</footer>\n"
        "</main>\n</body>\n</html>"
    )


def size_text(nbytes: float) -> str:
    """ "6.99 MB", "94.1 kB", "312 B": powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            value = nbytes / factor
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{nbytes:.0f} B"


# ------------------------------------------------------------------------------------------------------------- header


def _head(report: Report) -> str:
    figures = [("On disk", size_text(report.size), f"{report.size:,} bytes")]
    if report.ratio is not None and report.original_bytes is not None:
        figures.append(("Smaller by", f"{report.ratio:.1f}×", f"was {size_text(report.original_bytes)}"))
    figures.append(
        ("Bits per parameter", f"{report.effective_bits:.2f}", f"{report.parameters:,} parameters, all counted")
    )
    if report.distortion is not None:
        figures.append(("Distortion", _number(report.distortion), "sum over the layers, at the output"))
    if report.macs:
        total = sum(report.macs.values())
        main, share = next(iter(report.macs)), next(iter(report.macs.values())) / max(total, 1)
        figures.append(
            ("Multiplications", _count(total), f"a sample; {100 * share:.0f} % {main.replace(' x ', ' × ')}")
        )
    cards = "".join(f"<div><dt>{t}</dt><dd>{v}<small>{escape(s)}</small></dd></div>" for t, v, s in figures)
    lead = ""
    if report.budget is not None:
        used = report.size / report.budget
        lead = (
            f'<p class="lead">Asked for <strong>{size_text(report.budget)}</strong>; the files take '
            f"<strong>{100 * used:.2f}&nbsp;%</strong> of it.</p>"
        )
    return (
        f'<header><p class="eyebrow">pennyweight report</p><h1>{escape(report.name)}</h1>{lead}</header>'
        f'<dl class="figures">{cards}</dl>'
    )


# ----------------------------------------------------------------------------------------------------------- frontier


def _frontier(report: Report) -> str:
    points = [(size, distortion) for size, distortion in report.frontier if distortion > 0]
    if len(points) < 2:
        return ""
    return (
        "<section><h2>Size against loss</h2>"
        "<p>The best plan at every size, as predicted before compressing. The marked point is this file, judged by its "
        "weights. Layers made on inputs that others had changed, and trained ones, leave the original's weights on "
        "purpose to mend its output; the point may then overstate the loss, which pennyweight eval measures.</p>"
        f'<div class="wide">{_frontier_svg(report, points, 900, 340)}</div>'
        f'<div class="narrow">{_frontier_svg(report, points, 360, 290)}</div></section>'
    )


def _frontier_svg(report: Report, points: Sequence[tuple[int, float]], width: int, height: int) -> str:
    left, right, top, bottom = 46, 14, 26, 44
    shown = [*points, (report.size, report.distortion)] if report.distortion else [*points]
    xs, ys = [math.log10(p[0]) for p in shown], [math.log10(p[1] or 1) for p in shown]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, y1 = max(x1, x0 + 1e-3), max(y1, y0 + 1e-3)

    def x(size: float) -> float:
        return left + (math.log10(size) - x0) / (x1 - x0) * (width - left - right)

    def y(distortion: float) -> float:
        return height - bottom - (math.log10(distortion) - y0) / (y1 - y0) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Distortion against size, both logarithmic">']
    decades = range(math.ceil(y0 - 1e-9), math.floor(y1 + 1e-9) + 1)
    for power in list(decades)[:: max(1, math.ceil(len(decades) / 6))]:
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{_power(power)}</text>')
    last = -math.inf
    for size in _log_ticks(x0, x1):
        if x(size) - last < 62 or x(size) > width - right - 16:
            continue
        last = x(size)
        parts.append(
            f'<line class="axis" x1="{last:.1f}" x2="{last:.1f}" y1="{height - bottom}" y2="{height - bottom + 5}"/>'
        )
        parts.append(f'<text x="{last:.1f}" y="{height - bottom + 19}" text-anchor="middle">{_tick(size)}</text>')
    parts.append(
        f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>'
        f'<text x="{width - right}" y="{height - 6}" text-anchor="end">bytes on disk →</text>'
        f'<text x="0" y="10">↑ distortion</text>'
    )
    line = " ".join(f"{x(size):.1f},{y(distortion):.1f}" for size, distortion in points)
    parts.append(f'<polyline class="curve" points="{line}"/>')
    for size, distortion in points:
        parts.append(
            f'<circle class="hit" cx="{x(size):.1f}" cy="{y(distortion):.1f}" r="8">'
            f"<title>{size_text(size)}: distortion {_number(distortion)}</title></circle>"
        )
    if report.distortion:
        cx, cy = x(report.size), y(report.distortion)
        end = cx + 200 > width  # to the right of a falling curve there is room
        low = cy < top + 34
        parts.append(
            f'<line class="chosen-line" x1="{cx:.1f}" x2="{cx:.1f}" y1="{cy:.1f}" y2="{height - bottom}"/>'
            f'<circle class="chosen" cx="{cx:.1f}" cy="{cy:.1f}" r="6.5"/>'
            f'<text class="strong" x="{cx + (-12 if end else 12):.1f}" y="{cy + (18 if low else -10):.1f}" '
            f'text-anchor="{"end" if end else "start"}">'
            f"{size_text(report.size)}, distortion {_number(report.distortion)}</text>"
        )
    return "".join(parts) + "</svg>"


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= math.log10(m * 10.0**p) <= high]


def _tick(size: float) -> str:
    unit, factor = next(((u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= f), ("B", 1))
    return f"{size / factor:g} {unit}"


# ------------------------------------------------------------------------------------------------------------- limits


def _limits(report: Report) -> str:
    """What stood in the way of a smaller or a better file."""
    heavy = report.heaviest(3)
    share = sum(row.nbytes for row in heavy) / report.size
    names = ", ".join(f"<code>{escape(_short(row.name))}</code> ({size_text(row.nbytes)})" for row in heavy)
    most = "takes" if len(heavy) == 1 else f"(the {len(heavy)} heaviest of {len(report.layers)}) take"
    facts = [f"{names} {most} <strong>{100 * share:.0f}&nbsp;%</strong> of the file."]
    facts.append(
        f"<strong>{size_text(report.other_bytes)}</strong> "
        f"({100 * report.other_bytes / report.size:.1f}&nbsp;%) are not packed layers: norms, biases, headers."
    )
    if report.smallest is not None:
        facts.append(
            f"The smallest file these methods could have made is <strong>{size_text(report.smallest)}</strong>."
        )
    gain = report.gain_of_more(report.step)
    if gain is not None:
        facts.append(
            f"{size_text(report.step)} more would take away <strong>{100 * gain:.1f}&nbsp;%</strong> "
            "of the predicted distortion."
        )
    slower = [row for row in report.layers if row.slower]
    if report.timed:
        names = ", ".join(f"<code>{escape(_short(row.name))}</code>" for row in slower[:3])
        more = f" and {len(slower) - 3} more" if len(slower) > 3 else ""
        facts.append(
            f"Measured here, <strong>{len(slower)}</strong> of {len(report.layers)} layers got slower"
            + (f": {names}{more}." if slower else ".")
        )
    if report.promise is not None:
        asked, taken = (time_text(seconds) for seconds in report.promise)
        facts.append(f"Asked to take {asked}, it took <strong>{taken}</strong> when it was made.")
    worst = sorted((row for row in report.layers if row.distortion), key=lambda row: -(row.distortion or 0))[:3]
    if worst and report.distortion:
        lost = ", ".join(
            f"<code>{escape(_short(row.name))}</code> ({100 * (row.distortion or 0) / report.distortion:.0f}&nbsp;%)"
            for row in worst
        )
        facts.append(f"Most of the loss comes from {lost}.")
    items = "".join(f"<li>{fact}</li>" for fact in facts)
    return f'<section><h2>What held the budget</h2><ul class="facts">{items}</ul></section>'


# --------------------------------------------------------------------------------------------------------------- bars


def _bars(report: Report) -> str:
    rows = report.layers if len(report.layers) <= _BARS else _heaviest_in_order(report)
    used = {kind for row in report.layers for kind, _ in row.parts}
    legend = "".join(f'<li><i style="background:var(--{k})"></i>{t}</li>' for k, t in KINDS.items() if k in used)
    top_before = max((row.original_bytes or 0 for row in rows), default=0)
    top_after = max((row.nbytes for row in rows), default=1)
    cells = []
    if top_before:
        legend = '<li><i style="background:var(--before)"></i>before</li>' + legend
        cells.append(
            '<div class="head name-cell">layer</div><div class="head">before</div><div class="head">after</div>'
        )
    for row in rows:
        cells.append(f'<div class="name-cell"><span class="name">{escape(_short(row.name))}</span></div>')
        if top_before:
            before = row.original_bytes or 0
            cells.append(_bar([("before", before)], before, top_before, f"{row.name} before: {before:,} bytes"))
        title = f"{row.name}: {row.nbytes:,} bytes, {row.bits_per_weight:.2f} bits a weight, {row.storage}"
        cells.append(_bar(row.parts, row.nbytes, top_after, title))
    left_out = len(report.layers) - len(rows)
    rest = ""
    if left_out:
        others = report.size - report.other_bytes - sum(row.nbytes for row in rows)
        rest = f"<p>{left_out} smaller layers, together {size_text(others)}, are in the table below.</p>"
    scale = f", after is {top_before / top_after:.0f} times enlarged" if top_before > top_after else ""
    columns = "" if top_before else ' style="grid-template-columns: minmax(0, 1fr) minmax(0, 1.6fr)"'
    return (
        "<section><h2>Layer by layer</h2>"
        f"<p>Bytes on disk by kind of storage. Each column has its own scale{scale}.</p>"
        f'<ul class="legend">{legend}</ul><div class="bars"{columns}>{"".join(cells)}</div>{rest}</section>'
    )


def _bar(parts: Iterable[tuple[str, int]], value: int, top: int, title: str) -> str:
    inner = "".join(f'<i style="flex:{max(size, 1)};background:var(--{kind})"></i>' for kind, size in parts)
    return (
        f'<div title="{escape(title)}"><span class="room"><span class="bar" style="width:{100 * value / top:.2f}%">'
        f'{inner}</span></span><span class="value">{size_text(value)}</span></div>'
    )


def _heaviest_in_order(report: Report) -> list[LayerRow]:
    kept = {row.name for row in report.heaviest(_BARS)}
    return [row for row in report.layers if row.name in kept]


def _sensitivity(report: Report) -> str:
    rows = [row for row in report.layers if row.sensitivity]
    if not rows:
        return ""
    rows = sorted(rows, key=lambda row: -(row.sensitivity or 0))[:_SENSITIVITIES]
    top_sensitivity = max(row.sensitivity or 0 for row in rows)
    cells = [
        '<div class="head name-cell">layer</div><div class="head">sensitivity</div>'
        '<div class="head">bits a weight</div>'
    ]
    top_bits = max(row.bits_per_weight for row in rows)
    for row in rows:
        cells.append(f'<div class="name-cell"><span class="name">{escape(_short(row.name))}</span></div>')
        for value, top, colour, text in (
            (row.sensitivity or 0, top_sensitivity, "mark", _number(row.sensitivity or 0)),
            (row.bits_per_weight, top_bits, "accent", f"{row.bits_per_weight:.2f}"),
        ):
            cells.append(
                f'<div><span class="room"><span class="bar" style="width:{100 * value / top:.2f}%">'
                f'<i style="flex:1;background:var(--{colour})"></i></span></span>'
                f'<span class="value">{text}</span></div>'
            )
    count = (
        f"the {len(rows)} most sensitive of {len(report.layers)} layers"
        if len(rows) < len(report.layers)
        else "all layers"
    )
    return (
        "<section><h2>Sensitivity</h2><p>How much a change of a layer's output changes what the model returns, and the "
        f"bits the layer was given for it ({count}).</p>"
        f'<div class="bars">{"".join(cells)}</div></section>'
    )


# --------------------------------------------------------------------------------------------------------- histograms


def _histograms(report: Report) -> str:
    rows = [row for row in report.heaviest(len(report.layers)) if row.histogram is not None]
    if not rows:
        return ""
    both = any(row.histogram is not None and row.histogram.before for row in rows)
    legend = '<li><i style="background:var(--before);opacity:.55"></i>before</li>' if both else ""
    legend += '<li><i style="background:var(--accent);height:3px;vertical-align:4px"></i>as stored</li>'
    drawn = "".join(
        f'<figure><figcaption><span class="name" style="color:var(--ink)">{escape(_short(row.name))}</span>'
        f"<span>{row.bits_per_weight:.2f} bits a weight</span></figcaption>{_histogram_svg(row.histogram)}</figure>"
        for row in rows
        if row.histogram is not None
    )
    return (
        f"<section><h2>Weights</h2><p>The {len(rows)} largest layers, from minus four to plus four times the typical "
        "weight. Heights are square roots of counts, so that rare values stay visible.</p>"
        f'<ul class="legend">{legend}</ul><div class="small-multiples">{drawn}</div></section>'
    )


def _histogram_svg(histogram: Histogram) -> str:
    width, height, floor = 220, 92, 76
    top = math.sqrt(max(*histogram.after, *(histogram.before or [0]), 1))
    step = width / len(histogram.after)

    def outline(counts: Sequence[int]) -> str:
        path = [f"M0,{floor}"]
        for i, count in enumerate(counts):
            at = floor - (floor - 4) * math.sqrt(count) / top
            path.append(f"L{i * step:.1f},{at:.1f}L{(i + 1) * step:.1f},{at:.1f}")
        return "".join(path) + f"L{width},{floor}"

    before = f'<path class="was" d="{outline(histogram.before)}Z"/>' if histogram.before else ""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Histogram of the weights">{before}'
        f'<path class="is" d="{outline(histogram.after)}"/>'
        f'<line class="axis" x1="0" x2="{width}" y1="{floor}" y2="{floor}"/>'
        f'<text x="0" y="{height - 2}">{histogram.low:.2g}</text>'
        f'<text x="{width / 2}" y="{height - 2}" text-anchor="middle">0</text>'
        f'<text x="{width}" y="{height - 2}" text-anchor="end">{histogram.high:.2g}</text></svg>'
    )


# -------------------------------------------------------------------------------------------------------------- norms


def _norms(report: Report) -> str:
    if report.norms is None:
        return ""
    facts = "".join(f"<div><dt>{escape(t)}</dt><dd>{escape(v)}</dd></div>" for t, v in report.norms.figures())
    heads, rows = report.norms.cells()
    head = "".join(f"<th{_right(index)}>{escape(text)}</th>" for index, text in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{_right(index)}>{escape(cell)}</td>" for index, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        "<section><h2>Norms</h2><p>What training has done to the weights. Adaptivity is the gradient over the weight: "
        "the share of itself by which a unit of learning rate moves a layer. The Lipschitz constant says how far a "
        "change of the input can go, both measured by their Euclidean norms; the path norm, if inputs are measured by "
        "their largest change and outputs by the sum of theirs. It is exact or a bound; biases do not count.</p>"
        f'<dl class="figures">{facts}</dl><details open><summary>Weight by weight</summary>'
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
        "</section>"
    )


def _right(index: int) -> str:
    return ' class="name"' if index == 0 else "" if index == 1 else ' class="n"'


# -------------------------------------------------------------------------------------------------------------- table


def _table(report: Report) -> str:
    known = report.distortion is not None
    heads = "".join(f"<th>{text}</th>" for text in ("layer", "shape", "method", "stored as"))
    heads += "".join(
        f'<th class="n">{text}</th>' for text in ("bytes", "bits/weight", "distortion")[: 3 if known else 2]
    )
    heads += '<th class="n">µs</th><th class="n">was</th>' if report.timed else ""
    body = []
    for row in report.layers:
        cells = [f'<td class="name">{escape(row.name)}</td>', f"<td>{'×'.join(map(str, row.shape))}</td>"]
        cells += [f"<td>{escape(row.method or '')}</td><td>{escape(row.storage)}</td>"]
        cells += [f'<td class="n">{row.nbytes:,}</td><td class="n">{row.bits_per_weight:.2f}</td>']
        if known:
            cells.append(f'<td class="n">{_number(row.distortion or 0)}</td>')
        if report.timed:
            cells += [_time_cell(row.microseconds, row.slower), _time_cell(row.original_microseconds)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    last = f'<td class="n">{_number(report.distortion or 0)}</td>' if known else ""
    solver = f", found by the {escape(report.solver)} solver" if report.solver else ""
    return (
        f"<section><details open><summary>The plan{solver}</summary><div class='scroll'><table><thead><tr>{heads}"
        f"</tr></thead><tbody>{''.join(body)}</tbody><tfoot>"
        f'<tr><td colspan="4">all else</td><td class="n">{report.other_bytes:,}</td></tr>'
        f'<tr><td colspan="4">the files</td><td class="n">{report.size:,}</td>'
        f'<td class="n">{report.effective_bits:.2f}</td>{last}</tr></tfoot></table></div></details></section>'
    )


def _time_cell(microseconds: float | None, slower: bool = False) -> str:
    text = "" if microseconds is None else _number(microseconds)
    return f'<td class="n">{"<strong>▲ slower</strong> " if slower else ""}{text}</td>'


def _short(name: str) -> str:
    return name.removesuffix(".weight")


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    power = math.floor(math.log10(abs(value)))
    return f"{value / 10.0**power:.1f}·{_power(power)}"


def _power(power: int) -> str:
    return (
        "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        if power not in (0, 1)
        else str(10**power)
    )


def _count(value: int) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return str(value)
