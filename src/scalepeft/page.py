"""A page of HTML that needs nothing else: a sortable table, and line charts as SVG in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_COLOURS = ("#3b82f6", "#f97316", "#10a37a", "#e5484d", "#a855f7", "#c99700", "#ec4899", "#8b7355")
"""Told apart on white and on black; the ninth line has the first one's colour, dashed."""
_DASHES = ("", "6 3", "2 3")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 260, 54, 14, 30, 38
_MOST_POINTS = 400
"""More points than this do not show on a chart of this width; neighbours are averaged."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of one line of a table."""

    text: str
    """As it is shown."""
    value: Any = None
    """As it is sorted; None for what is not known, which stands last."""
    best: bool = False
    """Whether it is the best of its column."""
    note: str = ""
    """What stands under it, in small type."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table."""

    title: str
    cells: Sequence[Cell]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart: its points in the order of steps; what is not finite is left out."""

    name: str
    points: Sequence[Point]


def page(title: str, columns: Sequence[Column], charts: Mapping[str, Sequence[Line]]) -> str:
    """The page. Line i of the table and of every chart belong together and have one colour."""
    head = "".join(f'<th scope="col"><button type="button">{escape(c.title)}</button></th>' for c in columns)
    rows = []
    for i, row in enumerate(zip(*(c.cells for c in columns), strict=True)):
        first, *others = row
        name = f'<th scope="row" data-value="{escape(first.text)}">{_swatch(i)}{escape(first.text)}</th>'
        rows.append(f"<tr>{name}{''.join(map(_cell, others))}</tr>")
    legend = "".join(f"<li>{_swatch(i)}{escape(cell.text)}</li>" for i, cell in enumerate(columns[0].cells))
    drawn = [f"<figure>{svg}</figure>" for name, lines in charts.items() if (svg := chart(name, lines))]
    curves = f'<h2>Curves</h2>\n<ul class="legend">{legend}</ul>\n<div class="charts">{"".join(drawn)}</div>' if drawn else ""
    body = "\n".join(rows)
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    return f"{_HEAD}<title>{escape(title)}</title>\n{_STYLE}\n<h1>{escape(title)}</h1>\n{table}\n{_HINT}\n{curves}\n{_SCRIPT}\n"


def _cell(cell: Cell) -> str:
    value = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    return f"<td{value}{' class=best' if cell.best else ''}>{escape(cell.text)}{note}</td>"


def chart(title: str, lines: Sequence[Line]) -> str:
    """Lines over one another as SVG with labelled axes; nothing when there is no point to draw."""
    drawn = [(line.name, _thinned([p for p in line.points if math.isfinite(p[1])])) for line in lines]
    points = [p for _, some in drawn for p in some]
    if not points:
        return ""
    steps, values = [a for a, _ in points], [b for _, b in points]
    across, up = _ticks(min(steps), max(steps), whole=True), _ticks(min(values), max(values))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(step: float) -> float:
        return round(_LEFT + (step - across[0]) / (across[-1] - across[0]) * (right - _LEFT), 1)

    def y(value: float) -> float:
        return round(bottom - (value - up[0]) / (up[-1] - up[0]) * (bottom - _TOP), 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>')
    for value in up:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value)}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:g}" text-anchor="end">{value:.6g}</text>')
    parts += [f'<text x="{x(step)}" y="{bottom + 16}" text-anchor="middle">{step:.6g}</text>' for step in across]
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>')
    for i, (name, some) in enumerate(drawn):
        path = " ".join(f"{x(a)},{y(b)}" for a, b in some)
        dots = "".join(f'<circle cx="{x(a)}" cy="{y(b)}" r="2.5"/>' for a, b in some) if len(some) <= 24 else ""
        parts.append(f'<g {_style(i)}><title>{escape(name)}</title><polyline points="{path}"/>{dots}</g>')
    return "".join([*parts, "</svg>"])


def _swatch(number: int) -> str:
    return f'<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true"><g {_style(number)}><path d="M0 5H28"/></g></svg>'


def _style(number: int) -> str:
    colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'class="line" stroke="{colour}" fill="{colour}"{dashed}'


def _thinned(points: Sequence[Point]) -> list[Point]:
    size = max(1, math.ceil(len(points) / _MOST_POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(a for a, _ in g) / len(g), sum(b for _, b in g) / len(g)) for g in groups]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """A few round numbers from below a range to above it; only whole ones for steps."""
    span = (high - low) or max(abs(high), 1.0) / 10
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / 5)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


# The policy holds the page to what it says: nothing is loaded from anywhere.
_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
"""
_STYLE = """<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; background: Canvas; color: CanvasText }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; vertical-align: top }
tbody th, thead th:first-child { text-align: left } tbody th { font-weight: 600 }
tbody th, thead th:first-child { position: sticky; left: 0; background: Canvas }
th button { all: unset; cursor: pointer; font-weight: 600 } th button:focus-visible { outline: 2px solid }
th[aria-sort=ascending] button::after { content: " \\2191" } th[aria-sort=descending] button::after { content: " \\2193" }
tbody tr:hover { background: #8881 }
.best { font-weight: 700; background: #10a37a33 }
small { display: block; white-space: normal; width: max-content; max-width: 20rem; margin-left: auto; opacity: .75 }
p { opacity: .75 }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; max-width: 90rem }
figure { margin: 0 } figure svg { width: 100%; height: auto; font-size: 11px } figure text { fill: currentColor }
.title { font-weight: 600; font-size: 13px } .grid { stroke: currentColor; opacity: .15 }
.line polyline, .line path { fill: none; stroke-width: 1.6 } .line circle { stroke: none }
.swatch { width: 28px; height: 10px; margin-right: .5rem } .swatch path { stroke-width: 3 }
</style>"""
_HINT = "<p>A click on a column's head sorts by it. Highlighted: the best of the complete runs.</p>"
_SCRIPT = """<script>
document.querySelectorAll("thead button").forEach((button, column) => button.addEventListener("click", () => {
  const head = button.closest("th"), body = document.querySelector("tbody");
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  document.querySelectorAll("th[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const value = row => row.cells[column].dataset.value;
  const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", {numeric: true}) : a - b;
  body.append(...[...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    return x === undefined || y === undefined ? (x === undefined) - (y === undefined) : sign * order(x, y);
  }));
}));
</script>"""
