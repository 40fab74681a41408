"""What a reader sees of a run: the start panel, the closing table, and pictures of its course and its result."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft.console import table
from scalepeft.records import SetMetrics
from scalepeft.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
"""Of every picture; an SVG is the same bytes for the same numbers."""

MOST_CLASSES = 20
"""Classes of the largest confusion matrix that is drawn."""

_SCORES = {
    "accuracy": ("accuracy", "-"),
    "f1_macro": ("macro F1", "--"),
    "mean_token_accuracy": ("token accuracy", "-"),
    "rewards_accuracies": ("reward accuracy", "-"),
    "pearson": ("Pearson", "-"),
    "spearman": ("Spearman", "--"),
}
"""The figures of the second panel: how they are called there, and their line."""
_LONGEST_NAME = 18  # characters of a class name on an axis


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


def sample(record: Mapping[str, Any]) -> str:
    """The sample question of a language model and its answers, each cut to a few lines; empty when there is none."""
    found = record.get("sample") or {}
    named = (("prompt", "asked"), ("base", "base"), ("trained", "trained"))
    return table([(called, _beginning(found[key])) for key, called in named if key in found], right=False)


def _beginning(text: str, longest: int = 160) -> str:
    """A text on one line, its end left out when it is long, and what a terminal would take for a command."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= longest else f"{line[:longest]}..."


def per_class(details: Mapping[str, Any]) -> str:
    """The per-class table of one evaluation, and its confusion matrix where one was recorded."""
    rows: list[Sequence[str]] = [("class", "precision", "recall", "f1", "rows")]
    for name, found in details["per_class"].items():
        rows.append((name, *(f"{found[k]:.4f}" for k in ("precision", "recall", "f1")), str(found["rows"])))
    if "confusion" not in details:
        return table(rows)
    matrix: list[Sequence[str]] = [("truth \\ predicted", *details["per_class"])]
    matrix += [(name, *map(str, counts)) for name, counts in zip(details["per_class"], details["confusion"], strict=True)]
    return f"{table(rows)}\n\n{table(matrix)}"


def figures(found: Mapping[str, Any]) -> list[str]:
    """The names of an evaluation's figures, as run.json documents them, in the order of reading."""
    return [field.name for field in fields(SetMetrics) if field.name in found]


def curves(run: Run) -> None:
    """Draw metrics.jsonl as curves.png and curves.svg and write its numbers as curves.csv; draw the result beside them."""
    lines, record = run.lines(), run.record
    columns = ["step", "epoch", *sorted({k for line in lines for k in line} - {"step", "epoch"})]
    with (run.path / "curves.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    _save(_curves(lines, record.get("best"), list(record["evaluation"]), record["name"]), run.path / "curves")
    confusion(run)
    before_after(run)


def before_after(run: Run) -> bool:
    """Draw the main set's figures before and after training as before_after.png and before_after.svg.

    Returns whether there is something to draw: it takes training.eval_on_start.
    """
    record = run.record
    before, after = (record["metrics"].get(when) or {} for when in ("before", "after"))
    shown = [name for name in figures(after) if name != "loss" and name in before]
    if shown:
        title = f"{record['name']}: {next(iter(record['evaluation']))}"
        _save(_bars({name: (before[name], after[name]) for name in shown}, title), run.path / "before_after")
    return bool(shown)


def confusion(run: Run) -> bool:
    """Draw the confusion matrix of the main set as confusion.png and confusion.svg; return whether there is one to draw.

    One of more than MOST_CLASSES is not drawn: at the width of a page its numbers and names would be too small to read.
    run.json holds it all the same, up to tasks.MATRIX_CLASSES.
    """
    record = run.record
    for name, found in record["evaluation"].items():
        after = found["after"] or {}
        if not 0 < len(after.get("confusion", ())) <= MOST_CLASSES:
            return False
        _save(_confusion(after["confusion"], list(after["per_class"]), f"{record['name']}: {name}"), run.path / "confusion")
        return True
    return False


def _curves(lines: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None, sets: Sequence[str], title: str) -> Figure:
    """Loss on the left, scores on the right: training as a thin line, each evaluation set in its colour with its points."""
    from matplotlib.figure import Figure

    def series(key: str) -> tuple[list[float], list[float]]:
        found = [(line["step"], line[key]) for line in lines if key in line]
        return [s for s, _ in found], [v for _, v in found]

    logged = {key for line in lines for key in line}
    prefixes = {name: "eval_" if place == 0 else f"eval_{name}_" for place, name in enumerate(sets or ["evaluation"])}
    scored = any(f"{prefix}{key}" in logged for prefix in prefixes.values() for key in _SCORES)
    loss = "mean squared error" if "eval_pearson" in logged else "loss (nats)"
    drawn = [(loss, {"loss": ("loss", "-")}), *([("score", _SCORES)] if scored else [])]
    figure = Figure(figsize=(4.1 * len(drawn), 3.3), dpi=150, layout="constrained")
    chosen = str((best or {}).get("metric", "")).removeprefix("eval_")
    for axis, (label, wanted) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        if label == loss:
            axis.plot(*series("loss"), label="training", color="0.6", linewidth=1)
        for place, (name, prefix) in enumerate(prefixes.items()):
            width = 2.0 if place == 0 else 1.1  # the main set is seen beneath the others where they are alike
            look: dict[str, Any] = {"color": f"C{place}", "marker": "o", "markersize": 2.2 * width, "linewidth": width}
            for key, (called, line) in wanted.items():
                if f"{prefix}{key}" in logged:
                    face = look["color"] if line == "-" else "white"
                    axis.plot(*series(f"{prefix}{key}"), line, label=f"{name}: {called}", markerfacecolor=face, **look)
                if best is not None and f"{prefix}{key}" == f"eval_{chosen}":
                    axis.plot(best["step"], best["value"], "*", color="black", markersize=10, zorder=5, gid="best")
        if best is not None:
            axis.axvline(best["step"], color="0.3", linestyle=":", linewidth=1, label=f"best: step {best['step']:,}")
        axis.set(xlabel="step", ylabel=label)
        axis.grid(visible=True, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        if axis.lines:
            axis.legend(frameon=False, fontsize="small", handlelength=3)
    figure.axes[0].set_ylim(bottom=0)
    figure.suptitle(title, fontsize="medium").set_parse_math(False)
    return figure


def _bars(pairs: Mapping[str, tuple[float, float]], title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.42 * len(pairs) + 1.1), dpi=150)
    axis = figure.subplots()
    for offset, when, colour in ((-0.2, 0, "0.7"), (0.2, 1, "tab:blue")):
        places = [place + offset for place in range(len(pairs))]
        bars = axis.barh(
            places, [pair[when] for pair in pairs.values()], height=0.38, color=colour, label=("before", "after")[when]
        )
        axis.bar_label(bars, fmt="%.3f", padding=3, fontsize="small")
    axis.set_yticks(range(len(pairs)), [name.replace("_", " ") for name in pairs])
    axis.invert_yaxis()
    axis.set_xlim(min(0, *(min(pair) for pair in pairs.values())), 1.08)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    axis.set_title(title, fontsize="medium", loc="left", parse_math=False)
    return figure


def _confusion(counts: Sequence[Sequence[int]], names: Sequence[str], title: str) -> Figure:
    """Rows are the truth, columns what was predicted; in each cell the count and its share of the row."""
    from matplotlib.figure import Figure

    classes, totals = len(names), [sum(row) for row in counts]
    shares = [[count / max(total, 1) for count in row] for row, total in zip(counts, totals, strict=True)]
    few = classes <= 6
    cell = 1.15 if few else 0.62 if classes <= 12 else 0.44  # inches
    widest = max(6, *(len(f"{count:,}") for row in counts for count in row))
    size = min(10.0 if few else 8.0, 72 * cell / (0.62 * widest))  # points; a digit is 0.62 of that wide
    shown = [_short(name) for name in names]
    figure = Figure(figsize=(cell * classes + 2.0, cell * classes + 1.2), dpi=150)
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for truth, row in enumerate(counts):
        for predicted, count in enumerate(row):
            share = shares[truth][predicted]
            colour = "white" if share > 0.5 else "black" if count else "0.6"
            text = f"{count:,}\n{share:{'.1%' if few else '.0%'}}" if count else "0"
            axis.text(predicted, truth, text, ha="center", va="center", color=colour, fontsize=size)
    turned = max(map(len, shown)) * 0.62 * (10 if few else 8) > 72 * cell
    axis.set_xticks(range(classes), shown, rotation=40 if turned else 0, ha="right" if turned else "center", parse_math=False)
    axis.set_yticks(range(classes), [f"{n} ({t:,})" for n, t in zip(shown, totals, strict=True)], parse_math=False)
    axis.tick_params(length=0, labelsize=10 if few else 8)
    axis.set_xticks([place + 0.5 for place in range(classes - 1)], minor=True)
    axis.set_yticks([place + 0.5 for place in range(classes - 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="minor", length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel="predicted", ylabel="truth (rows)")
    axis.set_title(f"{title}, {sum(totals):,} rows", fontsize="medium", parse_math=False)
    return figure


def _short(name: str) -> str:
    """A class name as it fits on an axis: beginning and end, by which the names of many classes differ."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def _save(figure: Figure, path: Path) -> None:
    """Write a figure in each format, without a date and with names of parts that depend on nothing but the figure."""
    import warnings

    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "scalepeft"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class name in a script that the font lacks
        for format_ in FORMATS:
            metadata = {"Date": None} if format_ == "svg" else None
            figure.savefig(path.with_suffix(f".{format_}"), metadata=metadata, bbox_inches="tight", pad_inches=0.08)
