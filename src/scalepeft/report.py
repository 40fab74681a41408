"""What a reader sees of a run: the start panel, the closing table, the curves."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from scalepeft.console import table
from scalepeft.run import Run, SetMetrics


def panel(title: str, rows: Mapping[str, str]) -> str:
    """A title and named lines, as printed at the start of a run."""
    return f"{title}\n{table(((f'  {name}', text) for name, text in rows.items()), right=False)}"


def closing(record: Mapping[str, Any]) -> str:
    """Each set's metrics before and after as a table, from a run's record."""
    blocks = []
    for name, found in record["evaluation"].items():
        before, after = found.get("before") or {}, found["after"]
        rows: list[Sequence[str]] = [(name, "before", "after")]
        rows += [(f"  {k}", f"{before[k]:.4f}" if k in before else "-", f"{after[k]:.4f}") for k in figures(after)]
        blocks.append(table(rows))
    return "\n".join(blocks)


def per_class(details: Mapping[str, Any]) -> str:
    """The per-class table and the confusion matrix of one evaluation."""
    rows: list[Sequence[str]] = [("class", "precision", "recall", "f1", "rows")]
    for name, found in details["per_class"].items():
        rows.append((name, *(f"{found[k]:.4f}" for k in ("precision", "recall", "f1")), str(found["rows"])))
    matrix: list[Sequence[str]] = [("truth \\ predicted", *details["per_class"])]
    matrix += [(name, *map(str, counts)) for name, counts in zip(details["per_class"], details["confusion"], strict=True)]
    return f"{table(rows)}\n\n{table(matrix)}"


def figures(found: Mapping[str, Any]) -> list[str]:
    """The names of an evaluation's figures, as run.json documents them, in the order of reading."""
    return [field.name for field in fields(SetMetrics) if field.name in found]


def curves(run: Run) -> None:
    """Draw metrics.jsonl as curves.png and write its numbers as curves.csv, in the run directory."""
    lines = run.lines()
    columns = ["step", "epoch", *sorted({k for line in lines for k in line} - {"step", "epoch"})]
    with (run.path / "curves.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    _draw(lines, run.record.get("best"), f"{run.record['name']}: training", run.path / "curves.png")


def _draw(lines: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None, title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def series(key: str) -> tuple[list[float], list[float]]:
        found = [(line["step"], line[key]) for line in lines if key in line]
        return [s for s, _ in found], [v for _, v in found]

    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss, scores = figure.subplots(1, 2)
    loss.plot(*series("loss"), label="training", color="tab:blue", alpha=0.7, linewidth=1)
    for key in sorted({k for line in lines for k in line if k.startswith("eval_")}):
        name = key.removeprefix("eval_")
        axis = loss if name.endswith("loss") else scores if name.endswith(("accuracy", "f1_macro")) else None
        if axis is not None:
            label = f"evaluation {name.removesuffix('loss').strip('_')}".strip() if axis is loss else name.replace("_", " ")
            color = "tab:orange" if key == "eval_loss" else None
            axis.plot(*series(key), marker="o", markersize=3.5, linewidth=1.4, label=label, color=color)
    for axis, label in ((loss, "loss (nats)"), (scores, "score")):
        axis.set(xlabel="step", ylabel=label)
        axis.grid(visible=True, alpha=0.3)
        if best is not None:
            axis.axvline(best["step"], color="0.5", linestyle=":", label=f"best: step {best['step']}")
        if axis.lines:
            axis.legend(frameon=False, fontsize="small")
    loss.set_ylim(bottom=0)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path)
