"""Growth: how time and memory rise with rows, length, processes and classes, as exponents (1: in proportion).

    python benchmarks/growth.py [--short]

An exponent is the slope of a straight line through logarithms, fitted over the sizes at which fixed costs no longer show.
Writes results/growth.json with the curves; exits 1 when something grows faster than in proportion.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evaluation import in_a_process
from ratios import Ratio, keep

from scalepeft import fetch

ROWS = (1_000, 10_000, 100_000, 1_000_000)
LENGTHS = (16, 64, 256, 1_024, 4_096)
PROCESSES = (1, 8, 64, 512)
CLASSES = (10, 100, 1_000, 10_000)
MOST = 1.1
"""The largest exponent: time in proportion, and a tenth for sorting, for caches that are left, and for noise."""

WORDS = ("film", "plot", "and", "the", "a", "clever", "dull", "moving", "long", "of", "with", "story", "never", "quite")


def main() -> int:
    """Measure, fit, print, record, judge."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="small sizes; writes nothing")
    short = parser.parse_args().short
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    fetch.main(["all-MiniLM-L6-v2"])
    importlib.import_module("scalepeft.model")  # before processes are forked, which would each import it
    rows = ROWS[:3] if short else ROWS
    many = rows[-1] // 10
    with tempfile.TemporaryDirectory(prefix="scalepeft-growth-") as name:
        folder = Path(name)
        for size in rows:
            write(folder / f"{size}.csv", size)
        curves = {
            "preparing, memory / rows": [(n, memory(folder / f"{n}.csv", folder)) for n in rows],
            "preparing, time / rows": timed(rows, lambda n: lambda: prepare(folder / f"{n}.csv", folder)),
            "preparing, time / tokens of a row": lengthened(LENGTHS[:4] if short else LENGTHS, folder),
        }
    for strategy in ("random", "group_by_length", "longest_first"):
        curves[f"order of an epoch ({strategy}), time / rows"] = timed(rows, lambda n, s=strategy: lambda: epoch(n, s))
    curves["batches of tokens, time / rows"] = timed(rows, lambda n: lambda: tokens(n))
    curves["all processes' batches, time / processes"] = timed(PROCESSES, lambda n: lambda: divided(many, n))
    classes = CLASSES[:3] if short else CLASSES
    curves["figures of an evaluation, time / classes"] = timed(classes, lambda n: lambda: figures(many, n))
    curves["figures of an evaluation, time / rows"] = timed(rows, lambda n: lambda: figures(n, 10))
    return judged(curves, short=short)


def judged(curves: dict[str, list[tuple[float, float]]], *, short: bool) -> int:
    """Print the points, fit the exponents and keep them."""
    for name, points in curves.items():
        print(f"{name}: {', '.join(f'{x:,.0f}: {y:.3g}' for x, y in points)}")
    found = {name: [exponent(points)] for name, points in curves.items()} | {"in proportion": [1.0]}
    ratios = [Ratio(claim=name, ours=name, other="in proportion", most=MOST) for name in curves]
    unit = {"memory": "bytes of anonymous memory at the peak", "time": "s of CPU time"}
    shown = [
        {
            "title": name,
            "x": name.partition(" / ")[2],
            "y": next(word for key, word in unit.items() if key in name),
            "series": {name.partition(",")[0]: [list(point) for point in points]},
        }
        for name, points in curves.items()
    ]
    return keep(
        "growth",
        what="how time and memory rise: exponents, fitted over the last sizes of each curve",
        unit="exponent",
        found=found,
        ratios=ratios,
        short=short,
        curves=shown,
        notes=[
            "scikit-learn's figures make a matrix of classes x classes, 800 MB for 10,000; so did ours: now three counts each",
            "the confusion matrix, which has to grow with the square of the classes, is recorded up to 200 of them",
            "attention alone grows with the square of a row's length; what prepares and batches rows does not",
            "each process draws the order of the whole epoch, so that all have the same: over all, in proportion to them",
        ],
    )


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the logarithms over the last three sizes; what takes no more than a millisecond, or 4 MB, is left out."""
    large = [(x, y) for x, y in points if y > (1e-3 if y < 1e3 else 4e6)][-3:]
    if len(large) < 2:
        return 0.0
    x, y = np.log(np.array(large, dtype=np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def timed(sizes: Sequence[int], of: Callable[[int], Callable[[], Any]]) -> list[tuple[float, float]]:
    """The least of three CPU times for each size, of one where they are long, after one uncounted."""
    found: list[tuple[float, float]] = []
    for size in sizes:
        work = of(size)
        first = _cpu_time(work)
        found.append((size, min(_cpu_time(work) for _ in range(3 if first < 10 else 1))))
    return found


def _cpu_time(work: Callable[[], Any]) -> float:
    """Seconds of all threads: those of the wall would be those of other programs, too."""
    started = time.process_time()
    work()
    return time.process_time() - started


# --- what grows -------------------------------------------------------------------------------------------------------


def write(file: Path, rows: int, words: int = 5) -> None:
    """A csv file of synthetic rows."""
    draw = random.Random(0)  # noqa: S311  # no secret
    with file.open("w", encoding="utf-8") as stream:
        stream.write("text,label\n")
        for row in range(rows):
            stream.write(f"{' '.join(draw.choices(WORDS, k=words))},{'ab'[row % 2]}\n")


_CACHES = itertools.count()


def prepare(file: Path, folder: Path, longest: int = 512) -> None:
    """Prepare a file into a cache of its own, with whatever that takes but the imports."""
    from scalepeft import data, model
    from scalepeft import recipe as recipes

    cache, assets = folder / f"cache{os.getpid()}-{next(_CACHES)}", fetch.cache_dir() / "assets"
    cache.mkdir()
    (cache / "assets").symlink_to(assets.resolve())
    before, os.environ["SCALEPEFT_CACHE"] = os.environ.get("SCALEPEFT_CACHE"), str(cache)
    try:
        recipe_file = cache / "recipe.yaml"
        recipe_file.write_text(
            "task: sequence-classification\nmodel: {name_or_path: fetched:all-MiniLM-L6-v2}\n"
            f"data: {{train: {{path: {file}}}, max_length: {longest}}}\n",
            encoding="utf-8",
        )
        recipe = recipes.load(recipe_file)
        data.prepare(recipe, model.tokenizer(recipe), limit=longest)
    finally:
        if before is None:
            del os.environ["SCALEPEFT_CACHE"]
        else:
            os.environ["SCALEPEFT_CACHE"] = before


def memory(file: Path, folder: Path) -> int:
    """The peak of anonymous memory over that of preparing a small file."""
    return in_a_process(lambda which: prepare(which, folder), file, before=folder / f"{ROWS[0]}.csv")


def lengthened(words: Sequence[int], folder: Path) -> list[tuple[float, float]]:
    """Times of 400 rows of so many words, none of which is cut."""
    for count in words:
        write(folder / f"length{count}.csv", 400, count)
    return timed(words, lambda n: lambda: prepare(folder / f"length{n}.csv", folder, longest=2 * n + 8))


def lengths(rows: int) -> Any:
    """Tokens of rows, as of sentences."""
    return np.random.default_rng(0).geometric(0.03, rows)


def epoch(rows: int, strategy: str) -> None:
    """All batches of an epoch of one process."""
    from scalepeft.sampler import StepBatches

    for _ in StepBatches(lengths(rows), batch_size=16, strategy=strategy):
        pass


def tokens(rows: int) -> None:
    """All batches of an evaluation."""
    from scalepeft.sampler import token_batches

    for _ in token_batches(lengths(rows), tokens=1_024):
        pass


def divided(rows: int, processes: int) -> None:
    """The batches of each of so many processes, as each of them makes its own."""
    from scalepeft.sampler import StepBatches

    of = lengths(rows)
    for process in range(processes):
        for _ in StepBatches(of, batch_size=16, processes=processes, process=process):
            pass


def figures(rows: int, classes: int) -> None:
    """Metrics and details of an evaluation."""
    from scalepeft.tasks import SequenceClassification

    draw = np.random.default_rng(0)
    truth, predicted = draw.integers(0, classes, rows), draw.integers(0, classes, rows)
    task = SequenceClassification(None, [f"class {n}" for n in range(classes)])  # type: ignore[arg-type]  # nothing is tokenised
    reduced = np.stack([predicted.astype(np.float32), np.ones(rows, dtype=np.float32)], axis=1)
    task.metrics(reduced, truth)
    task.details(reduced, truth)


if __name__ == "__main__":
    sys.exit(main())
