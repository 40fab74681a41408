"""Training the last layer of an encoder on kept states of the others: against running them in each step, over twelve epochs.

    python benchmarks/frozen_prefix.py [--short]       seconds of a whole training
    python benchmarks/frozen_prefix.py --quality       accuracy on real rows: needs `scalepeft fetch quickstart`

Seconds: DistilBERT's shape with random weights and rows of MultiNLI's lengths, as in encoder.py; recipes/mnli_lora_fast.yaml
as it stands and with `cache_frozen_layers`, in one process of two threads. Both are whole: twelve epochs with an evaluation
after each, on few rows, and 28 % as many to evaluate, as documented. What is timed begins when the model is loaded and ends
when the result is evaluated: running the frozen layers, and a last evaluation of the whole model, are in it. Checkpoints are
not: they take the same both ways, whatever the rows, and would weigh more here than in a training of 50,000 rows.

Quality: LoRA on the last of all-MiniLM-L6-v2's six layers, 1,500 sentences of film reviews, three epochs, three seeds; accuracy
on 1,000 sentences of other reviews.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"

from encoder import pairs, shape
from ratios import RESULTS, ROOT, Ratio, interleaved, keep, machine

from scalepeft.console import quiet_upstream

WAYS = {"kept": "20GB", "plain": None}
"""What cache_frozen_layers says."""
EPOCHS, EVALUATED = 12, 13_832 / 50_000
NO_CHECKPOINTS = {"save_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None}
SEEDS = (1, 2, 3)


def main() -> int:
    """Train both ways, compare."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="a third of the rows, once; keeps nothing")
    parser.add_argument("--quality", action="store_true", help="accuracy instead of seconds")
    options = parser.parse_args()
    quiet_upstream()
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed, which saving imports, warns of what it otherwise finds out
    with tempfile.TemporaryDirectory() as folder:
        return quality(Path(folder)) if options.quality else speed(Path(folder), short=options.short)


# --- seconds -----------------------------------------------------------------------------------------------------------


def speed(folder: Path, *, short: bool) -> int:
    """Seconds of twelve epochs."""
    import torch

    from scalepeft import operators

    os.environ["SCALEPEFT_CACHE"] = str(folder / "cache")
    rows = 32 if short else 96
    shape(folder / "base")
    for name in ("train", "test"):
        pairs(folder / f"{name}.csv")
    in_hardware = operators.computes(torch.bfloat16)
    base: dict[str, Any] = {
        "extends": os.path.relpath(ROOT / "recipes" / "mnli_lora_fast.yaml", folder),
        "model": {"name_or_path": str(folder / "base")},
        "data": {
            "train": {"path": str(folder / "train.csv"), "split": None, "first_rows": rows},
            "evaluation": {
                "matched": {"path": str(folder / "test.csv"), "split": None, "first_rows": round(rows * EVALUATED)},
                "mismatched": None,
            },
            "label_names": ["entailment", "neutral", "contradiction"],
        },
        "training": {"bf16": in_hardware, "use_cpu": True, "num_train_epochs": EPOCHS} | NO_CHECKPOINTS,
    }
    passes: dict[str, list[float]] = {"kept": []}

    def way(name: str) -> Callable[[], float]:
        def run() -> float:
            seconds, frozen = timed(folder, base | ({"cache_frozen_layers": WAYS[name]} if WAYS[name] else {}))
            if name == "kept":
                passes[name].append(frozen)
            return seconds

        return run

    timed(folder, base | {"training": base["training"] | {"max_steps": 1}})  # what is imported late
    found = interleaved({name: way(name) for name in WAYS}, repetitions=1 if short else 3, warm=False)
    claim = "Twelve epochs of an adapter on the last layer take less time when the frozen layers run once"
    dtype, least, most = "bf16" if in_hardware else "fp32", min(passes["kept"]), max(passes["kept"])
    notes = [
        f"Each training is whole, on {rows} rows in {dtype}; {least:.2g} to {most:.2g} s of it ran the frozen layers for all.",
        "The dropout of the frozen layers is off when they run once; that of the last layer and of the adapter stays.",
        TRIED,
    ]
    more: dict[str, Any] = {}
    if of := known().get("quality"):
        more["quality"] = of
        notes.append(of["told"])
    ratios = [Ratio(claim=claim, ours="plain", other="kept", least=2.5)]
    return keep("frozen_prefix", what=WHAT, unit="s", found=found, ratios=ratios, short=short, notes=notes, **more)


TRIED = (
    "By a profile (CPU time of 32 rows in fp32, one thread), the frozen layers take 71 ms a row and a training step on kept"
    " states 22 ms. Evaluations that run the whole model each epoch, which was the first thought, would take as long as such an"
    " epoch: the evaluation sets are kept, too."
)
WHAT = (
    "LoRA on the last layer of DistilBERT's shape, rows of MultiNLI's lengths, batches of 8, twelve epochs, each with an"
    " evaluation, two threads: seconds of a training that keeps the states of the frozen layers, and of one that does not."
)


def timed(folder: Path, recipe: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a training from the loaded model to the last evaluation, and those of running the frozen layers in it."""
    from scalepeft import frozen, report, train

    marks: dict[str, float] = {}

    def marking(function: Any, before: str, after: str) -> Any:
        def marked(*given: Any, **options: Any) -> Any:
            marks[before] = time.perf_counter()
            found = function(*given, **options)
            marks[after] = marks.get(after, 0.0) + time.perf_counter() - marks[before]
            return found

        return marked

    places = ((train, "_tell", "begun", "told"), (report, "curves", "done", "drawn"), (frozen, "_kept", "asked", "kept"))
    with contextlib.ExitStack() as patches:
        for module, name, before, after in places:
            patches.enter_context(mock.patch.object(module, name, marking(getattr(module, name), before, after)))
        trained(folder, recipe)
    return marks["done"] - marks["begun"], marks.get("kept", 0.0)


# --- quality -----------------------------------------------------------------------------------------------------------


def quality(folder: Path) -> int:
    """Accuracy after training with each seed; kept beside the seconds."""
    base = {
        "extends": os.path.relpath(ROOT / "recipes" / "quickstart.yaml", folder),
        "adapter": {"target_modules": ["query", "key", "value", "dense"], "layers_to_transform": [5]},
        "data": {"train": {"sample_rows": 1500}, "evaluation": {"test": {"sample_rows": 1000}}},
        "training": {"bf16": False, "use_cpu": True, "num_train_epochs": 3, "train_sampling_strategy": "group_by_length"},
    }
    base["training"] |= {"eval_on_start": False, "eval_strategy": "no", "save_strategy": "no"}
    seeds = {name: iter(SEEDS) for name in WAYS}

    def way(name: str) -> Callable[[], float]:
        def run() -> float:
            changes = {"training": base["training"] | {"seed": next(seeds[name])}}
            own = {"cache_frozen_layers": WAYS[name]} if WAYS[name] else {}
            return float(trained(folder, base | changes | own)["metrics"]["after"]["accuracy"])

        return run

    found = interleaved({name: way(name) for name in WAYS}, repetitions=len(SEEDS), warm=False)
    each = {name: f"{statistics.mean(of):.3f} ({min(of):.3f} to {max(of):.3f})" for name, of in found.items()}
    told = f"{QUALITY} {each['kept']} with the frozen layers run once, {each['plain']} with them in each step."
    print(told)
    kept = known() | {"quality": {"told": told, "accuracy": found, "seeds": SEEDS, "machine": machine()}}
    (RESULTS / "frozen_prefix.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return int(statistics.mean(found["kept"]) < 0.98 * statistics.mean(found["plain"]))


QUALITY = (
    "Quality: LoRA on the last of all-MiniLM-L6-v2's six layers, 1,500 sentences of film reviews, three epochs, three seeds:"
    " accuracy on 1,000 sentences of other reviews"
)


def known() -> dict[str, Any]:
    """What was recorded last."""
    file = RESULTS / "frozen_prefix.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def trained(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train a recipe; the record of the run."""
    from scalepeft import recipe as recipes
    from scalepeft.train import train

    file = folder / "recipe.yaml"
    training = recipe["training"] | {"output_dir": str(folder / "run")}
    file.write_text(json.dumps({"task": "sequence-classification", **recipe, "training": training}), encoding="utf-8")
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        run = train(recipes.load(file), fresh=True)
    return run.record


if __name__ == "__main__":
    sys.exit(main())
