"""Runs side by side: what differs between their recipes, what each cost, and what came of it."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scalepeft import document
from scalepeft import run as runs
from scalepeft.console import say, table
from scalepeft.errors import UserError
from scalepeft.page import Cell, Column, Line, page
from scalepeft.run import Run

_METRICS = {"accuracy": max, "f1_macro": max, "f1_weighted": max, "loss": min}
"""The compared figures of the main evaluation set, and which of several is the best."""

_CURVES = {"training loss": "loss"} | {f"evaluation: {m.replace('_', ' ')}": f"eval_{m}" for m in ("loss", *_METRICS)}


def main(arguments: Sequence[str]) -> int:
    """`scalepeft compare RUN... [--csv FILE] [--html FILE] [--markdown FILE]`."""
    parser = argparse.ArgumentParser(prog="scalepeft compare", description="Show what differs between runs, in one table.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run directory, whatever became of the run")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write the unrounded figures to this new file")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write table and curves as a page to this new file")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="also write the table as Markdown to this new file")
    options = parser.parse_args(arguments)
    outputs = {form: path for form in ("csv", "html", "markdown") if (path := getattr(options, form))}
    if problems := list(_unwritable(list(outputs.values()))):
        raise UserError(*problems)
    comparison = Comparison(entries(options.runs))
    say(comparison.text(terminal()))
    for form, path in outputs.items():
        try:
            runs.write(path, getattr(comparison, form)())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        say(f"{path}: written")
    return 0


def _unwritable(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        if path.exists() or paths.count(path) > 1:
            yield f"{path}: exists already; give another file" if path.exists() else f"{path}: is named twice"
        elif not path.absolute().parent.is_dir():
            yield f"{path}: there is no folder {path.absolute().parent}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run as it is compared."""

    name: str
    """What it is called."""
    path: Path
    """Its directory."""
    values: Mapping[str, Any]
    """Its resolved recipe, as `flat` gives it."""
    record: Mapping[str, Any]
    """Its run.json, or as much of one as there is."""
    lines: Sequence[Mapping[str, Any]] = ()
    """Its metrics.jsonl."""

    @property
    def status(self) -> str:
        """complete, failed, interrupted or running; only a complete run competes for the best figures."""
        return str(self.record.get("status", "?"))

    @property
    def reason(self) -> str:
        """Why it is not complete; of one that is said to be running, where it was last heard of."""
        if self.status == "running":
            return f"at step {self.lines[-1]['step'] if self.lines else 0} of {self.record.get('max_steps') or '?'}, or killed"
        return clean(str(self.record.get("reason") or ""))

    def metric(self, name: str, when: str) -> float | None:
        """A figure of the main evaluation set before or after training."""
        found: float | None = ((self.record.get("metrics") or {}).get(when) or {}).get(name)
        return found


def entries(paths: Sequence[Path]) -> list[Entry]:
    """Run directories as they stand, each once. Raises UserError with a line for each that is none."""
    distinct = list({path.resolve(): path for path in reversed(paths)}.items())[::-1]
    problems: list[str] = []
    found: list[Entry] = []
    for (_, path), name in zip(distinct, shortest([str(full) for full, _ in distinct], "/"), strict=True):
        try:
            found.append(entry(path, name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return found


def entry(path: Path, name: str) -> Entry:
    """A run directory as it stands. Its recipe is read, not checked: upstream may have changed since."""
    run = Run(path)
    if not (path / runs.RECORD).is_file():
        raise UserError(f"{path}: is not a run directory: it has no {runs.RECORD}")
    values = flat(document.read(path / runs.RESOLVED).values)
    return Entry(name=clean(name), path=path, values=values, record=run.record, lines=run.lines())


@dataclass(frozen=True)
class Comparison:
    """Runs and the columns in which they are compared."""

    entries: Sequence[Entry]

    @cached_property
    def differing(self) -> list[str]:
        """The recipe keys whose values are not the same in all runs."""
        keys = dict.fromkeys(key for e in self.entries for key in e.values)
        return [key for key in keys if any(e.values.get(key) != self.entries[0].values.get(key) for e in self.entries)]

    @cached_property
    def columns(self) -> list[Column]:
        """Name, what differs, what it cost, what came of it; without columns that no run has anything in."""
        found = [Column(title="run", cells=[Cell(text=e.name, value=e.name) for e in self.entries])]
        for key, title in zip(self.differing, shortest(self.differing, "."), strict=True):
            found.append(_column(title, [e.values.get(key) for e in self.entries], shown))
        parameters = [(e.record.get("parameters") or {}) for e in self.entries]
        found.append(_column("trainable", [p.get("trainable") for p in parameters], "{:,}".format))
        shares = [100 * p["trainable"] / p["total"] if p.get("total") else None for p in parameters]
        found.append(_column("share", shares, "{:.3g}%".format))
        found += [
            _column("seconds", [e.record.get("seconds") for e in self.entries], "{:,.1f}".format),
            _column("rows/s", [e.record.get("samples_per_second") for e in self.entries], "{:,.1f}".format),
            _column("peak GiB", [_gib(e.record.get("peak_memory_bytes")) for e in self.entries], "{:.2f}".format),
        ]
        status = [Cell(text=e.status, value=e.status, note="" if e.status == "complete" else e.reason) for e in self.entries]
        found += [*map(self._scores, _METRICS), Column(title="status", cells=status)]
        return [column for column in found if any(cell.value is not None for cell in column.cells)]

    def _scores(self, metric: str) -> Column:
        competing = [e.metric(metric, "after") for e in self.entries if e.status == "complete"]
        finite = [value for value in competing if value is not None and math.isfinite(value)]
        # one alone, or several that are equal, are no better than any other
        best = _METRICS[metric](finite) if len(set(finite)) > 1 else None
        cells = []
        for e in self.entries:
            before, after = e.metric(metric, "before"), e.metric(metric, "after")
            text = "-" if after is None else f"{after:.4f}"
            text = text if before is None else f"{before:.4f} -> {text}"
            cells.append(Cell(text=text, value=after, best=e.status == "complete" and after is not None and after == best))
        return Column(title=metric, cells=cells)

    @property
    def reasons(self) -> list[str]:
        """Why each run that is not complete is not, one line each."""
        unfinished = [e for e in self.entries if e.status != "complete"]
        return [f"{e.name}: {e.status}{f': {e.reason}' if e.reason else ''}" for e in unfinished]

    def text(self, width: int | None = None) -> str:
        """The table for a terminal, with a run a line; or a run a column, where only that is within `width`, or narrower."""
        marked = [any(cell.best for cell in c.cells) for c in self.columns]
        forms = [table(self._rows(marked))]
        if width is not None and _width(forms[0]) > width:
            forms.append(table(zip(*self._rows([any(marked)] * len(marked)), strict=True)))
        notes = [*(["* the best of the complete runs"] if any(marked) else []), *self.reasons]
        return "\n".join([min(forms, key=_width), *([""] if notes else []), *notes])

    def _rows(self, room: Sequence[bool]) -> list[list[str]]:
        """Cells with the best ones starred, and room for a star beside the others of some columns."""
        columns = [[Cell(text=c.title), *c.cells] for c in self.columns]
        return [
            [c.text + ("*" if c.best else " " * beside) for c, beside in zip(cells, room, strict=True)]
            for cells in zip(*columns, strict=True)
        ]

    def markdown(self) -> str:
        """The table in Markdown, the best figures in bold."""
        rows = [[_markdown(c.title) for c in self.columns], [":--", *("--:" for _ in self.columns[1:])]]
        cells = zip(*(c.cells for c in self.columns), strict=True)
        rows += [[f"**{_markdown(c.text)}**" if c.best else _markdown(c.text) for c in row] for row in cells]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([*lines, *([""] if self.reasons else []), *(f"- {_markdown(r)}" for r in self.reasons)]) + "\n"

    def csv(self) -> str:
        """Unrounded figures, a run a line; what is not known is empty."""
        rows: list[dict[str, Any]] = []
        for e in self.entries:
            row = {"run": e.name, "path": e.path, "status": e.status, "reason": "" if e.status == "complete" else e.reason}
            row |= {key: "" if e.values.get(key) is None else shown(e.values[key]) for key in self.differing}
            row |= {f"{size}_parameters": (e.record.get("parameters") or {}).get(size) for size in ("trainable", "total")}
            row |= {figure: e.record.get(figure) for figure in ("seconds", "samples_per_second", "peak_memory_bytes")}
            row |= {f"{metric}_{when}": e.metric(metric, when) for metric in _METRICS for when in ("before", "after")}
            rows.append(row)
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()

    def html(self, title: str | None = None) -> str:
        """One page that needs nothing else: the table, sortable, and the curves over one another."""
        charts = {
            name: [
                Line(name=e.name, points=[(x["step"], x[key]) for x in e.lines if x.get(key) is not None]) for e in self.entries
            ]
            for name, key in _CURVES.items()
        }
        return page(title or f"Comparison of {len(self.entries)} runs", self.columns, charts)


def terminal() -> int | None:
    """The width of the terminal; None where there is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A resolved recipe by dotted keys, without the output directory; a list is one value, and null is none."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return {key: value for key, value in found.items() if key != "training.output_dir" and value is not None}


def shortest(names: Sequence[str], mark: str) -> list[str]:
    """Distinct names, each by as few of its last parts as tell it from the others."""

    def last(name: str, count: int) -> str:
        return mark.join(name.split(mark)[-count:])

    def alone(name: str, count: int) -> bool:
        return sum(last(other, count) == last(name, count) for other in names) == 1

    return [next(last(n, i) for i in range(1, n.count(mark) + 2) if alone(n, i) or i > n.count(mark)) for n in names]


def shown(value: Any) -> str:
    """A value of a recipe as one would write it."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {shown(v)}' for k, v in value.items())}}}"
    return json.dumps(value) if value is None or isinstance(value, bool) else clean(str(value))


def clean(text: str) -> str:
    """A text without what would break a line or steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _column(title: str, values: Sequence[Any], form: Callable[[Any], str]) -> Column:
    return Column(title=title, cells=[Cell(text="-" if v is None else form(v), value=v) for v in values])


def _gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
