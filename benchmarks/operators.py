"""The operators that scalepeft replaces on some processors: rows a second of two quickstarts, with them and with torch's own.

    python benchmarks/operators.py [--short]

Each way is a process of its own that trains a shipped recipe, `quickstart` in bf16 and in fp32 and `quickstart_sft` (4 bits,
computed in bf16); they take turns, a few steps each. `plain` is the same program with torch's operators. On a processor with
bf16 in hardware the products are torch's on both sides, and dropout's masks make the difference. Writes results/operators.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import encoder
from ratios import Ratio, interleaved, keep

RECIPES: dict[str, tuple[list[str], int]] = {
    "quickstart, bf16": (["quickstart"], 16),
    "quickstart, fp32": (["quickstart", "training.bf16=false"], 16),
    "quickstart_sft": (["quickstart_sft"], 4),
}
"""What is trained, and the rows of a step."""
COMMON = [
    *("training.eval_on_start=false", "training.eval_strategy=no", "training.save_strategy=no", "training.use_cpu=true"),
    "training.max_steps=100000",
]
PLAIN = " plain"


def main() -> int:
    """Train in turns, compare."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="one turn each, without the language model; keeps nothing")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        train(options.way, options.folder)
        return 0
    recipes = {name: rows for name, (_, rows) in RECIPES.items() if not (options.short and name == "quickstart_sft")}
    subprocess.run(
        [sys.executable, "-m", "scalepeft", "fetch", "quickstart", "quickstart_sft"], check=True, capture_output=True
    )
    with tempfile.TemporaryDirectory() as folder:
        made = {
            way: encoder.Trained(way, Path(folder), script=__file__) for name in recipes for way in (name, f"{name},{PLAIN}")
        }
        try:
            for trained in made.values():
                trained.turn(1)
            ways = {way: _rate(trained, recipes[way.removesuffix(f",{PLAIN}")]) for way, trained in made.items()}
            found = interleaved(ways, repetitions=1 if options.short else 4, warm=False)
        finally:
            for trained in made.values():
                trained.end()
    ratios = [
        Ratio(claim=f"{name}: faster with the operators of its own", ours=name, other=f"{name},{PLAIN}", least=1.0)
        for name in recipes
    ]
    return keep("operators", what=WHAT, unit="rows/s", found=found, ratios=ratios, short=options.short, notes=NOTES)


WHAT = "Training steps of the quickstarts with torch's own operators, and with those that scalepeft replaces on a CPU."
NOTES = [
    "Replaced where the processor has no bf16: products of bf16 matrices, now in float32 and rounded, the same numbers.",
    "Replaced everywhere: the masks of dropout, drawn 16 bits an element in place of one number in float64.",
]
STEPS = 2
"""Of a turn."""


def _rate(trained: encoder.Trained, rows: int) -> Callable[[], float]:
    return lambda: STEPS * rows / trained.turn(STEPS)


def train(way: str, folder: Path) -> None:
    """In the process: train until it is ended."""
    from scalepeft import kinds, operators, recipe
    from scalepeft import train as training

    name = way.removesuffix(f",{PLAIN}")
    if name != way:
        operators.speed_up = lambda: None  # type: ignore[assignment,return-value]
    made = kinds.trainer

    def watched(*given: object, **options: object) -> object:
        trainer = made(*given, **options)  # type: ignore[arg-type]
        trainer.add_callback(encoder.callback())
        return trainer

    kinds.trainer = watched  # type: ignore[assignment]
    os.environ.pop("SCALEPEFT_CACHE", None)  # the rows that were fetched
    words, _ = RECIPES[name]
    output = folder / way.replace(" ", "_")
    training.train(recipe.load(words[0], [*words[1:], *COMMON, f"training.output_dir={output}"]))


if __name__ == "__main__":
    sys.exit(main())
