"""Preparing rows: `scalepeft` from a csv file to tokenised rows on disk, against `datasets.map` as notebooks call it.

    python benchmarks/preparation.py [--rows N] [--repetitions N] [--short]

Pairs of MNLI's lengths, made of the fetched review snippets. Of `map` its own time alone counts: the file is read before.
Ours counts all it does: hashing and reading the file, checking rows and labels, tokenising, writing and flushing. Writes
results/preparation.json and results/preparation_again.json; exits 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ratios import Ratio, interleaved, keep

from scalepeft import fetch

ROWS, SHORT = 50_000, 20_000
NOTES = [
    "map without padding, the friendlier of the documented ways: with padding='max_length' it prepared 0.65 times as many rows",
    "CPU time for each row (us, a busy machine): map 175, of which 75 in Python's one thread; scalepeft 105, of which 15 there",
    (
        "the tokenizer's own threads use all cores, but not while it hands tokens to Python: two threads ahead take turns at"
        " that, 18,400 rows/s where one makes 16,800 and map 11,200"
    ),
    "asking the backend for ids alone saves a fifth of the tokenizer's CPU time: 83 us a row against 103",
    "tried without gain: batches of 100, 250, 1,000 or 10,000 rows in place of 500, and three threads",
]


def main() -> int:
    """Measure, print, record, judge."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of the file ({ROWS:,})")
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each way (5)")
    parser.add_argument("--short", action="store_true", help="few rows, two runs; writes nothing")
    options = parser.parse_args()
    if options.short:
        options.rows, options.repetitions = SHORT, 2
    assets = fetch.cache_dir() / "assets"
    fetch.main(["all-MiniLM-L6-v2", "movie-review-snippets"])
    with tempfile.TemporaryDirectory(prefix="scalepeft-preparation-") as name:
        folder = Path(name)
        os.environ |= {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        file = folder / "pairs.csv"
        write_pairs(file, fetch.asset_path("fetched:movie-review-snippets/train.csv"), options.rows)
        cold, again = ways(folder, file, options.rows, assets)
        first = interleaved(cold, repetitions=options.repetitions)
        second = interleaved(again, repetitions=options.repetitions, warm=False)
    second["a second"] = [1.0] * options.repetitions
    claims = [
        Ratio(claim="More rows are prepared in a second than by datasets.map", ours="scalepeft", other="map", least=1.6),
        Ratio(claim="The same against datasets.map in two processes", ours="scalepeft", other="map, 2 processes"),
    ]
    what = f"{options.rows:,} pairs of 41 tokens (mean) of a csv file, tokenised onto disk"
    missed = keep("preparation", what=what, unit="rows/s", found=first, ratios=claims, short=options.short, notes=NOTES)
    claims = [Ratio(claim="Prepared rows are found again within a second", ours="scalepeft", other="a second", most=1.0)]
    what = f"the same {options.rows:,} rows asked for again"
    return missed | keep("preparation_again", what=what, unit="s", found=second, ratios=claims, short=options.short, notes=[])


def write_pairs(file: Path, snippets: Path, rows: int) -> None:
    """Pairs whose lengths are like those of MNLI: a sentence, and the beginning of another."""
    with snippets.open(encoding="utf-8", newline="") as stream:
        known = list(csv.DictReader(stream))
    draw = random.Random(0)  # noqa: S311  # no secret
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["premise", "hypothesis", "label"])
        for _ in range(rows):
            one, other = draw.choice(known), draw.choice(known)
            writer.writerow([one["text"], other["text"][:60], one["label"]])


def in_parallel() -> None:
    """Let tokenizers use all cores: `map` in two processes says that they shall not, and leaves that behind."""
    os.putenv("TOKENIZERS_PARALLELISM", "true")  # os.environ is a copy of the environment from then on


def ways(
    folder: Path, file: Path, rows: int, assets: Path
) -> tuple[dict[str, Callable[[], float]], dict[str, Callable[[], float]]]:
    """The ways of preparing for the first time (rows/s), and again (s)."""
    import datasets
    from transformers import AutoTokenizer

    from scalepeft import data, model
    from scalepeft import recipe as recipes

    datasets.disable_progress_bars()
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(
        "task: sequence-classification\nmodel: {name_or_path: fetched:all-MiniLM-L6-v2}\n"
        f"data:\n  train: {{path: {file}}}\n  text_columns: [premise, hypothesis]\n  max_length: 512\n",
        encoding="utf-8",
    )
    recipe = recipes.load(recipe_file)
    source = fetch.asset_path("fetched:all-MiniLM-L6-v2")
    raw = datasets.load_dataset("csv", data_files=str(file), split="train")
    caches = iter(range(10**6))

    def ours(*, cold: bool) -> float:
        if cold:
            cache = folder / f"cache{next(caches)}"
            cache.mkdir()
            (cache / "assets").symlink_to(assets)
            os.environ["SCALEPEFT_CACHE"] = str(cache)
        tokenizer = model.tokenizer(recipe)
        limit = model.longest_input(recipe, tokenizer)
        in_parallel()
        started = time.perf_counter()
        prepared = data.prepare(recipe, tokenizer, limit=limit).sets["train"]
        taken = time.perf_counter() - started
        assert len(prepared.rows) == rows  # noqa: S101
        return rows / taken if cold else taken

    def mapped(*, processes: int | None = None, cold: bool = True) -> float:
        tokenizer = AutoTokenizer.from_pretrained(source)
        where = folder / ("map" if not cold else f"map{next(caches)}")
        where.mkdir(exist_ok=True)
        in_parallel()
        started = time.perf_counter()
        raw.map(
            lambda batch: tokenizer(batch["premise"], batch["hypothesis"], truncation=True, max_length=512),
            batched=True,
            num_proc=processes,
            cache_file_name=str(where / "rows.arrow"),
        )
        taken = time.perf_counter() - started
        return rows / taken if cold else taken

    mapped(cold=False)
    return (
        {
            "scalepeft": lambda: ours(cold=True),
            "map": mapped,
            "map, 2 processes": lambda: mapped(processes=2),
        },
        {"scalepeft": lambda: ours(cold=False), "map": lambda: mapped(cold=False)},
    )


if __name__ == "__main__":
    sys.exit(main())
