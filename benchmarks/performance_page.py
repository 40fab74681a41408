"""docs/performance.md, written from what the scripts of this folder have recorded; nothing in it is typed by hand.

    python benchmarks/performance_page.py              write the page and its plots anew
    python benchmarks/performance_page.py --check      exit 1 when the page is stale

A result comes onto the page when it has the form of `ratios.keep`, and merge.json, whose claims are put into that form here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_table import PACKAGES, RESULTS, ROOT, rows

from scalepeft import run as runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = ROOT / "docs" / "performance.md"
TITLES = {
    "encoder": "Training an encoder",
    "frozen_prefix": "Computing the frozen layers once",
    "sft": "Supervised fine-tuning of a language model",
    "qlora": "QLoRA",
    "merge": "Merging",
    "startup": "Starting",
    "preparation": "Preparing rows",
    "preparation_again": "Finding prepared rows",
    "evaluation": "Evaluation and prediction",
    "evaluation_memory": "Memory of evaluation",
    "operators": "Operators of a CPU",
    "host_optimizer": "Optimizer of ZeRO with offload",
    "growth": "Growth",
    "step_profile": "Where the time goes",
}
"""The order of the sections, by the names of the results; what is not named here follows."""

PROSE = """\
<!-- Written by benchmarks/performance_page.py: run a script of benchmarks/, then `make performance`. -->
# Performance

A figure here is a ratio: the ways that are compared ran in turns, on one machine, with the same versions, and what is told is
the median of the turns, with the lowest and the highest. Times alone would say more of the machine than of the program. Each
section names the script that measured it, which anybody can run; `make bench` runs the short forms of all.

{claims}

![Each ratio on a logarithmic scale, with its target](performance_ratios.svg)

{sections}
"""


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is stale")
    options = parser.parse_args()
    found = results(RESULTS)
    text = page(found)
    if options.check:
        return int(not PAGE.is_file() or text != PAGE.read_text(encoding="utf-8"))
    draw(found, PAGE.parent)
    runs.write(PAGE, text)
    print(PAGE.relative_to(ROOT))
    return 0


# --- what was recorded ---------------------------------------------------------------------------------------------------


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of `ratios.keep` in the order of the page, merge.json among them."""
    read = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    found = {name: of for name, of in read.items() if isinstance(of, dict) and {"what", "ratios", "machine"} <= of.keys()}
    if "claims" in read.get("merge", {}):
        found["merge"] = of_merge(read["merge"])
    order = [*TITLES, *found]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def of_merge(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The record of merge.py in the form of `ratios.keep`."""
    ways, claims, model = kept["ways"], kept["claims"], kept["model"]
    named = {"bare": "the bare loop", "peft": "peft"}
    ratios = []
    for claim, of in claims.items():
        what, _, against = claim.partition(" against ")
        other = next((way for way, name in named.items() if name == against), None)
        if other is None:
            continue
        figure = {"time": "seconds", "memory": "memory"}[what]
        pairs = zip(ways["merge"]["runs"], ways[other]["runs"], strict=True)
        each = [ours[figure] / theirs[figure] for ours, theirs in pairs]
        ratios.append(
            {
                "claim": f"Merging takes the {what} of {against}"
                if other == "bare"
                else f"Merging takes less {what} than peft",
                "ours": f"merge, {what}",
                "other": f"{other}, {what}",
                "median": of["found"],
                "lowest": min(each),
                "highest": max(each),
                "most": of["at_most"],
                "kept": of["holds"],
            }
        )
    notes = [
        f"{claim.partition(',')[0].capitalize()}: {of['found'] / 1e6:,.0f} MB, at most {of['at_most'] / 1e6:,.0f}:"
        f" {verdict(of['holds'])}."
        for claim, of in claims.items()
        if claim.endswith(", bytes")
    ]
    copied = statistics.median(
        ours["seconds"] / theirs["seconds"] for ours, theirs in zip(ways["merge"]["runs"], ways["cp"]["runs"], strict=True)
    )
    notes.append(f"The system's copy of the base is {copied:.2g} times as fast.")
    what = f"`scalepeft merge` of a LoRA into {model['bytes'] / 1e9:.1f} GB in {model['dtype']} ({model['files']} files)."
    return {"what": what, "ratios": ratios, "notes": notes, "machine": kept["machine"]}


# --- the page --------------------------------------------------------------------------------------------------------------


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of docs/performance.md."""
    heads = ("claim", "ours / other", "ratio", "lowest to highest", "target", "")
    table = [
        (
            f"[{ratio['claim']}](#{anchor(title(name))})",
            f"{ratio['ours']} / {ratio['other']}",
            f"**{number(ratio['median'])}**",
            f"{number(ratio['lowest'])} to {number(ratio['highest'])}",
            target(ratio) or "none",
            verdict(ratio["kept"]) if target(ratio) else "",
        )
        for name, of in found.items()
        for ratio in of["ratios"]
    ]
    sections = "\n\n".join(section(name, of) for name, of in found.items())
    return PROSE.format(claims=rows(heads, table), sections=sections)


def section(name: str, of: Mapping[str, Any]) -> str:
    """One script's result."""
    script = ROOT / "benchmarks" / f"{name}.py"
    parts = [f"## {title(name)}", of["what"]]
    if "table" in of:
        parts.append(rows(tuple(of["table"]["heads"]), [tuple(row) for row in of["table"]["rows"]]))
    parts += [f"![{curve['title']}]({file})" for file, curve in curves(name, of)]
    if of.get("notes"):
        parts.append("\n".join(f"- {note}" for note in of["notes"]))
    parts.append(" ".join(filter(None, (f"Script: `benchmarks/{name}.py`." if script.is_file() else "", told(of["machine"])))))
    return "\n\n".join(parts)


def title(name: str) -> str:
    """The heading of a result's section."""
    return TITLES.get(name, name.replace("_", " ").capitalize())


def anchor(heading: str) -> str:
    """The heading's anchor, as Markdown makes it."""
    return heading.lower().replace(" ", "-")


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def target(ratio: Mapping[str, Any]) -> str:
    """What was to be reached."""
    return " and ".join(f"{word} {ratio[key]:g}" for key, word in (("least", "at least"), ("most", "at most")) if key in ratio)


def verdict(kept: bool) -> str:
    """Whether it was."""
    return "kept" if kept else "**MISSED**"


def told(machine: Mapping[str, Any]) -> str:
    """Where, when and with what something was measured."""
    on = (machine.get("accelerator"), machine.get("processor"), f"{machine['cores']} cores" if "cores" in machine else None)
    when = (
        f"On {machine['date']}, commit {machine['commit'].replace('+', ' with changes')}" if "date" in machine else "Measured"
    )
    packages = [f"{name} {machine['versions'][name]}" for name in ("python", *PACKAGES) if name in machine["versions"]]
    load = f"load {machine['load']:.1f} at the end" if "load" in machine else None
    return ", ".join(filter(None, (when, *on, load))) + f"; {', '.join(packages)}."


def curves(name: str, of: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The plots of a result by their files' names."""
    return [(f"performance_{name}_{place}.svg", curve) for place, curve in enumerate(of.get("curves", []), start=1)]


# --- plots -----------------------------------------------------------------------------------------------------------------

GREY, KEPT, MISSED = "#808080", "#3b8eea", "#e8833a"
"""Seen on white and on black, and told apart by those who see no red or no green."""
LINES = (KEPT, MISSED, "#2ca58d", "#b07cd8", GREY)


def draw(found: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write the plots of the page; the files."""
    wanted: dict[str, Callable[[], Figure]] = {"performance_ratios.svg": lambda: bars(found)}
    for name, of in found.items():
        wanted |= {file: (lambda curve=curve: lines(curve)) for file, curve in curves(name, of)}
    for stale in {*folder.glob("performance_*.svg")} - {folder / file for file in wanted}:
        stale.unlink()
    for file, made in wanted.items():
        save(made, folder / file)
    return [folder / file for file in wanted]


def bars(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """All ratios on a logarithmic scale from 1, their spread, and a mark at each target."""
    from matplotlib.figure import Figure

    drawn = [(name, ratio) for name, of in found.items() for ratio in of["ratios"]]
    figure = Figure(figsize=(8, 0.42 * len(drawn) + 1.0), layout="constrained")
    axis = figure.subplots()
    for place, (_, ratio) in enumerate(drawn):
        colour = KEPT if ratio["kept"] else MISSED
        axis.barh(place, ratio["median"] - 1, left=1, height=0.4, color=colour)
        beneath, above = place + 0.31, place - 0.36
        axis.plot((ratio["lowest"], ratio["highest"]), (beneath, beneath), color=GREY, linewidth=1.6)
        for key, mark in (("least", ">"), ("most", "<")):
            if key in ratio:
                axis.plot(ratio[key], above, marker=mark, color=GREY, markersize=7, linestyle="none")
    axis.set_xscale("log")
    axis.set_yticks(range(len(drawn)), [f"{title(name)}: {r['ours']} / {r['other']}" for name, r in drawn], parse_math=False)
    axis.invert_yaxis()
    axis.axvline(1, color=GREY, linewidth=0.8)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("ratio and, beneath, its spread; the arrow points from the target to where it is kept; orange: missed")
    return figure


def lines(curve: Mapping[str, Any]) -> Figure:
    """Growth: both axes logarithmic, so that a slope of 1 is linear growth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axis = figure.subplots()
    for place, (name, points) in enumerate(curve["series"].items()):
        at: Sequence[Sequence[float]] = points
        look = {"color": LINES[place % len(LINES)], "marker": "osD^v"[place % 5], "markersize": 4}
        axis.plot([x for x, _ in at], [y for _, y in at], label=name, **look)
    everything = [value for points in curve["series"].values() for point in points for value in point]
    if everything and min(everything) > 0:
        axis.set_xscale("log")
        axis.set_yscale("log")
    axis.set(xlabel=curve["x"], ylabel=curve["y"])
    axis.set_title(curve["title"], fontsize="medium", color=GREY, parse_math=False)
    axis.legend(frameon=False, fontsize="small", labelcolor=GREY)
    return figure


def save(made: Callable[[], Figure], path: Path) -> None:
    """Draw on nothing, in grey, without a date: the page is read on white and on black."""
    import matplotlib as mpl

    grey = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
    spines = {"axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context({"svg.hashsalt": "scalepeft", "axes.facecolor": "none", **grey, **spines}):
        made().savefig(path, metadata={"Date": None}, transparent=True, bbox_inches="tight", pad_inches=0.08)


if __name__ == "__main__":
    sys.exit(main())
