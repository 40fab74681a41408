"""recipes/README.md, written from the recipes and from what was recorded of runs; nothing in it is typed by hand.

    python benchmarks/recipes_table.py                 write it anew
    python benchmarks/recipes_table.py --check         exit 1 when it is stale
    python benchmarks/recipes_table.py --record RUN    first record the figures of a complete run of a recipe as it now stands
    python benchmarks/recipes_table.py --plan          first plan every recipe anew, which takes minutes

What a recipe is, its parameters and its documented figures are read from the comment at its head; a figure counts as measured
when a file in benchmarks/results holds it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from scalepeft import recipe as recipes
from scalepeft import run as runs
from scalepeft.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES, RESULTS = ROOT / "recipes", ROOT / "benchmarks" / "results"
PAGE = RECIPES / "README.md"
CONFIGS, PLANS = ROOT / "benchmarks" / "configs", RESULTS / "plans.json"
EXPERIMENTS, LANGUAGE = RESULTS / "experiments.json", RESULTS / "language.json"
FIGURES = {
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    "matthews_correlation": "Matthews' correlation",
    "pearson": "Pearson's correlation",
    "perplexity": "perplexity",
    "rewards_accuracies": "reward accuracy",
    "loss": "loss",
}
"""What is recorded of an evaluation, and how it is called on the page, which shows the first two that there are."""
ARROW = "\N{RIGHTWARDS ARROW}"
PACKAGES = (
    "scalepeft", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "tokenizers", "numpy",
    "scikit-learn",
)  # fmt: skip


def main() -> int:
    """Record, write or check."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is stale")
    parser.add_argument("--record", metavar="RUN", type=Path, help="record this run directory first")
    parser.add_argument("--plan", action="store_true", help="plan every recipe first")
    options = parser.parse_args()
    if options.plan:
        runs.write(PLANS, json.dumps(plans(), indent=1) + "\n")
    if options.record:
        record(runs.Run(options.record))
    text = page()
    if options.check:
        return int(text != PAGE.read_text(encoding="utf-8"))
    runs.write(PAGE, text)
    print(PAGE.relative_to(ROOT))
    return 0


# --- what is recorded of a run -----------------------------------------------------------------------------------------


def record(run: runs.Run) -> None:
    """Write benchmarks/results/NAME.json. Ends the program when the run is not one of the recipe as it now stands."""
    name, status = run.record.get("name"), run.record.get("status")
    file = next((path for path in recipes.shipped_recipes().values() if path.stem == name), None)
    if status != "complete" or file is None:
        sys.exit(f"{run.path}: is no complete run of a recipe of {RECIPES.name}/ ({name}: {status})")
    was, now = (recipes.flatten(of.resolved()) for of in (run.recipe(), recipes.load(file)))
    changed = sorted(k for k in {*was, *now} if was.get(k) != now.get(k) and k != "training.output_dir")
    if changed:
        sys.exit(f"{run.path}: its recipe was another one: {', '.join(changed)}")
    RESULTS.mkdir(exist_ok=True)
    runs.write(RESULTS / f"{name}.json", json.dumps(entry(run, file, next(iter(run.record["evaluation"]))), indent=2) + "\n")


def entry(run: runs.Run, recipe: Path, reported: str) -> dict[str, Any]:
    """What is worth keeping of a run: its figures on the set `reported`, what they cost, and with which versions."""
    found = run.record
    measured = found["evaluation"][reported]
    return {
        "recipe": relative(recipe),
        "model": run.recipe().model.name_or_path,
        "parameters": found["parameters"],
        "rows": found["data"]["rows"],
        "labels": found["labels"],
        "set": reported,
        **{when: figures(measured[when]) for when in ("before", "after") if measured.get(when)},
        "epochs": found["step"] and run.lines()[-1]["epoch"],
        "steps": found["step"],
        "seconds": found["seconds"],
        "rows_per_second": found["samples_per_second"],
        **{name: found["layout"][name] for name in ("processes", "device", "threads", "precision")},
        "date": found["ended"][:10],
        "commit": found["commit"],
        "versions": {name: found["versions"][name] for name in ("python", *PACKAGES) if name in found["versions"]},
    }


def figures(found: dict[str, Any]) -> dict[str, float]:
    """Those figures of an evaluation that are recorded."""
    return {name: found[name] for name in FIGURES if name in found}


def plans() -> dict[str, Any]:
    """What each recipe takes, by its name."""
    from scalepeft import fitting

    found = {name: list(fitting.cells(path, CONFIGS)) for name, path in recipes.shipped_recipes().items()}
    return {"heads": list(fitting.HEADS), "plans": found}


# --- the page ----------------------------------------------------------------------------------------------------------


PROSE = """\
<!-- Written by benchmarks/recipes_table.py: change the recipes or record a run, then `make recipes-table`. -->
# Recipes

Each file is one experiment: `scalepeft train NAME`, or `scalepeft train FILE` for one that lies elsewhere. `schema.json` is the
JSON Schema by which editors complete and check them.

{recipes}

Documented figures are those of the document or paper that a recipe reproduces, with its base model and on its machines; each
recipe says what was not documented and is chosen here. Measured figures are those of `run.json` after one run, on rows that
were not trained on, before the first step and after the last. Times are for orientation: other programs may have used the
cores, too.
{plans}{experiments}{language}
## Versions

{versions}
"""

PLANS_PROSE = """
## What they need

As `scalepeft plan --all recipes --configs benchmarks/configs` predicts it, with rows as long as the recipe allows where data
are not at hand: the memory of one GPU, and for GPUs of some sizes the least number of 1, 2, 8 and 16 that fits, DDP
(multi_gpu) where that is enough and ZeRO-3 where it is not. [docs/plan.md](../docs/plan.md) says what such a figure is worth.

{table}

The recipes of glue/ that are not listed continue from the adapter of mnli_roberta_base_lora, and need what glue/sst2 does.
"""

EXPERIMENTS_PROSE = """
## The documented data on a CPU

LoRA on {models}, a base model small enough for a CPU, on data of the documented experiments, or like it,
as csv files: measured by [experiments.py](../benchmarks/experiments.py). The baseline is TF-IDF and logistic regression, fitted
on the same rows. Nothing was chosen on the test rows: epochs and learning rate were set beforehand, and the baseline's penalty
is the best of five on validation rows.

{table}
"""

LANGUAGE_PROSE = """
## Language models on a CPU

The same rows of instructions, or of preferences, with a small chat model: measured by [language.py](../benchmarks/language.py).
Losses are of held-out rows; the spread is the standard deviation over the seeds.

{table}
"""


def page() -> str:
    """The text of recipes/README.md."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    experiments, language = (results.pop(path.stem, {}) for path in (EXPERIMENTS, LANGUAGE))
    results = {name: found for name, found in results.items() if "recipe" in found}  # beside them lie other benchmarks'
    measured = {found["recipe"]: found for found in results.values()}
    table = [row(name, path, measured.get(relative(path))) for name, path in recipes.shipped_recipes().items()]
    heads = ("recipe", "base model", "data", "parameters trained", "documented or reference", "measured")
    return PROSE.format(
        recipes=rows(heads, table),
        plans=plans_section(json.loads(PLANS.read_text(encoding="utf-8"))) if PLANS.is_file() else "",
        experiments=section(experiments) if experiments else "",
        language=language_section(language) if language else "",
        versions="\n".join(versions({**results, **experiments, **language.get("runs", {})})),
    )


def plans_section(found: dict[str, Any]) -> str:
    """What each recipe needs."""
    table = [(name, *of) for name, of in found["plans"].items() if len(of) == len(found["heads"]) - 1]
    return PLANS_PROSE.format(table=rows(tuple(found["heads"]), table))


def relative(path: Path) -> str:
    """A file as it is named from the root of the repository."""
    return path.resolve().relative_to(ROOT).as_posix()


def row(name: str, path: Path, measured: dict[str, Any] | None) -> tuple[str, ...]:
    """One recipe."""
    head, recipe = comment(path), recipes.load(path)
    return (
        f"[{name}]({name}.yaml): {head[0].rstrip('.')}",
        f"`{recipe.model.name_or_path}`",
        trained_on(recipe),
        parameters(recipe, measured),
        documented(" ".join(head[1:])),
        result(measured) if measured else "not yet",
    )


def comment(path: Path) -> list[str]:
    """The lines of the comment at the head of a recipe, without the one for editors."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return [line.lstrip("# ").strip() for line in head if not line.startswith("# yaml-language-server")]


def trained_on(recipe: Recipe) -> str:
    """The sources of the training rows and what is taken of them."""
    train = recipe.data.train
    found = []
    for source in train if isinstance(train, list) else [train]:
        part = f"first {source.first_rows:,} rows" if source.first_rows else ""
        part = part or (f"{source.sample_rows:,} rows drawn" if source.sample_rows else "")
        found.append(" ".join(filter(None, (f"`{source.path}`", source.name))) + (f", {part}" if part else ""))
    return "; ".join(found)


def parameters(recipe: Recipe, measured: dict[str, Any] | None) -> str:
    """As recorded, or as the head of the recipe says, or of the one it extends without another model, adapter or data."""
    if measured:
        return shares(measured["parameters"]["trainable"], measured["parameters"]["total"])
    if found := re.search(r"([\d,]+) of ([\d,]+) parameters", " ".join(comment(recipe.document.path))):
        return shares(*(int(number.replace(",", "")) for number in found.groups()))
    parent = re.search(r"^extends: (\S+)", recipe.document.text, re.MULTILINE)
    if parent is None:
        return "-"
    extended = recipes.load(recipe.document.path.parent / parent[1])
    same = all(recipe.resolved().get(key) == extended.resolved().get(key) for key in ("model", "adapter", "data"))
    return parameters(extended, None) if same else "-"


def shares(trainable: int, total: int) -> str:
    """Trained parameters and their share."""
    return f"{trainable:,} ({trainable / total:.2%})"


def documented(head: str) -> str:
    """The sentence of a head that begins with Documented or Reference."""
    found = re.search(r"(?:Documented|Reference)( [^:.]+)?: (.*?)\.(?=\s|$)", head)
    return "-" if found is None else f"{found[1] or ''} {found[2]}".strip().replace("+-", "\N{PLUS-MINUS SIGN}")


def result(found: dict[str, Any]) -> str:
    """The recorded figures, rows and time of a run."""
    told = ", ".join([change(found, figure) for figure in found["after"]][:2])
    rows_of = f"{found['rows'][found['set']]:,} rows of {found['set']}"
    return f"{told} on {rows_of}; {found['seconds']:.0f} s, {machine(found)}"


def change(found: dict[str, Any], figure: str) -> str:
    """A figure before, where that was measured, and after training."""
    before = f"{found['before'][figure]:.4f} {ARROW} " if "before" in found else ""
    return f"{FIGURES[figure]} {before}{found['after'][figure]:.4f}"


def machine(found: dict[str, Any]) -> str:
    """What a run ran on."""
    each = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}"
    count = f"{found['processes']} x " if found["processes"] > 1 else ""
    return f"{count}{each} of a CPU" if found["device"] == "cpu" else f"{count}{found['device']}"


def section(experiments: dict[str, dict[str, Any]]) -> str:
    """The documented data sets with a small base model, against a baseline."""
    heads = ("data", "train", "test", "accuracy", "baseline's", "macro F1", "baseline's", "epochs", "steps", "training time")
    table = [
        (
            f"[{name}](../{of['recipe']}): {' '.join(comment(ROOT / of['recipe']))}",
            f"{of['rows']['train']:,}",
            f"{of['rows'][of['set']]:,}",
            f"{of['before']['accuracy']:.4f} {ARROW} **{of['after']['accuracy']:.4f}**",
            f"{of['baseline']['accuracy']:.4f}",
            f"{of['before']['f1_macro']:.4f} {ARROW} **{of['after']['f1_macro']:.4f}**",
            f"{of['baseline']['f1_macro']:.4f}",
            f"{of['epochs']:g}",
            f"{of['steps']:,}",
            f"{of['seconds']:.0f} s, {machine(of)}",
        )
        for name, of in experiments.items()
    ]
    models = sorted({f"`{of['model']}`" for of in experiments.values()})
    return EXPERIMENTS_PROSE.format(models=", ".join(models), table=rows(heads, table))


def language_section(found: dict[str, Any]) -> str:
    """LoRA and its kin, and DPO, on a small chat model, over seeds."""
    heads = ("experiment", "parameters trained", "seeds", "loss", "spread", "other figures of the first seed", "training time")
    table = []
    for name, of in found["summary"].items():
        first = found["runs"][f"{name}-{of['seeds'][0]}"]
        others = [figure for figure in first["after"] if figure != "loss"]
        table.append(
            (
                f"[{name}](../{first['recipe']})",
                shares(**first["parameters"]),
                f"{len(of['seeds'])}",
                f"{of['loss_before']:.4f} {ARROW} **{of['mean']:.4f}**",
                "-" if of["spread"] is None else f"{of['spread']:.4f}",
                ", ".join(change(first, figure) for figure in others),
                f"{of['seconds']:.0f} s, {machine(first)}",
            )
        )
    return LANGUAGE_PROSE.format(table=rows(heads, table))


def versions(results: dict[str, dict[str, Any]]) -> list[str]:
    """With what each result was measured; results of like versions share a line."""
    lines: dict[str, list[str]] = {}
    for name, found in results.items():
        told = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
        commit = (found["commit"] or "unknown").replace("-dirty", " with changes")
        lines.setdefault(f"{found['date']}, commit {commit[:10]}{commit[40:]}, {told}", []).append(name)
    return [f"- {', '.join(names)}: {told}." for told, names in lines.items()]


def rows(head: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
