"""LoRA on a small pretrained encoder against TF-IDF and logistic regression, on the data sets of the documented experiments.

    python benchmarks/experiments.py --data DIR [--only NAME ...] [--runs DIR] [--fresh]

DIR holds a folder of csv files for each recipe in benchmarks/experiments/, which names them. Each recipe is trained by
`scalepeft train`; a complete run is left alone unless --fresh is given. The baseline is fitted on the rows that the run was
trained on, and its penalty chosen on the run's validation rows (given, or held out of training). Writes
benchmarks/results/experiments.json, where experiments that were not run keep their figures, prints a table, and exits 1 when
the adapter is not better than the baseline on the test rows of each.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from recipes_table import EXPERIMENTS, RESULTS, entry, figures
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from scalepeft import data, model
from scalepeft import recipe as recipes
from scalepeft import run as runs
from scalepeft.console import quiet_upstream, table

HERE = Path(__file__).resolve().parent
RECIPES = {path.stem: path for path in sorted((HERE / "experiments").glob("*.yaml")) if path.stem != "base"}
SCALEPEFT = str(Path(sys.executable).with_name("scalepeft"))
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
"""The inverse strengths of regularisation that the baseline chooses from."""
WORD = r"\b\w+\b"  # one letter is a word, too: it matters in short texts

Rows = tuple[list[tuple[str, ...]], np.ndarray[Any, Any]]
"""Texts (one, or the two of a pair) and labels."""


def main() -> int:
    """Train, fit, compare, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="these experiments only")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="where the run directories go")
    parser.add_argument("--fresh", action="store_true", help="train anew where there is a complete run")
    options = parser.parse_args()
    quiet_upstream()
    commit, folder = runs.commit(), options.runs.absolute()
    os.chdir(options.data)  # the recipes' paths are relative to it
    known = json.loads(EXPERIMENTS.read_text(encoding="utf-8")) if EXPERIMENTS.is_file() else {}
    for name in options.only:
        run = runs.Run(folder / name)
        kept = run.record.get("status") == "complete" and not options.fresh
        train(RECIPES[name], run, fresh=options.fresh)
        found = entry(run, RECIPES[name], "test")
        found["commit"] = known.get(name, {}).get("commit") if kept else commit
        known[name] = {**found, "validation": validation(run), "baseline": baseline(run)}
        RESULTS.mkdir(exist_ok=True)
        runs.write(EXPERIMENTS, json.dumps(dict(sorted(known.items())), indent=2) + "\n")
    print(summary({name: known[name] for name in options.only}))
    return 0 if all(known[name]["after"]["accuracy"] > known[name]["baseline"]["accuracy"] for name in options.only) else 1


def train(recipe: Path, run: runs.Run, *, fresh: bool) -> None:
    """Train a recipe into a run directory; without `fresh` a complete run stays."""
    command = [SCALEPEFT, "train", str(recipe), f"training.output_dir={run.path}", *(["--fresh"] if fresh else [])]
    subprocess.run(command, check=True)


def validation(run: runs.Run) -> dict[str, Any]:
    """The set on which something may be chosen, and the run's figures on it."""
    name = next(name for name in run.record["evaluation"] if name != "test")
    return {"set": name, **figures(run.record["evaluation"][name]["after"])}


def baseline(run: runs.Run) -> dict[str, Any]:
    """TF-IDF and logistic regression, fitted on the rows that a run was trained on."""
    sets = rows_of(run.recipe())
    train, test = sets["train"], sets["test"]
    other = sets[validation(run)["set"]]
    started = time.perf_counter()
    features = Pairs() if len(train[0][0]) == 2 else Texts()
    fitted = features.fit(train[0])
    candidates = [LogisticRegression(C=c, max_iter=2000).fit(fitted, train[1]) for c in PENALTIES]
    seen = features.transform(other[0])
    best = max(candidates, key=lambda candidate: float(accuracy_score(other[1], candidate.predict(seen))))
    answers = best.predict(features.transform(test[0]))
    return {
        "what": features.what,
        "accuracy": float(accuracy_score(test[1], answers)),
        "f1_macro": float(f1_score(test[1], answers, average="macro")),
        "C": best.C,
        "features": int(fitted.shape[1]),
        "seconds": round(time.perf_counter() - started, 3),
    }


def rows_of(recipe: recipes.Recipe) -> dict[str, Rows]:
    """The texts and labels of each set of a recipe, as the run saw them: holdout cut, bad rows left out."""
    tokenizer = model.tokenizer(recipe)
    corpus = data.prepare(recipe, tokenizer, limit=model.longest_input(recipe, tokenizer))
    columns = recipe.data.text_columns
    found = {}
    for name, prepared in corpus.sets.items():
        source = prepared.source[0]["path"]
        texts = list(zip(*(read(Path(source), c) for c in ([columns] if isinstance(columns, str) else columns)), strict=True))
        found[name] = ([texts[row] for row in prepared.rows["row"]], prepared.labels)
    return found


def read(path: Path, column: str) -> list[str]:
    """A column of a csv file."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [row[column] for row in csv.DictReader(stream)]


class Texts:
    """TF-IDF of words and pairs of neighbouring words."""

    what = "TF-IDF of 1-2 words, logistic regression"

    def __init__(self) -> None:
        self.words = vectorizer()

    def fit(self, rows: list[tuple[str, ...]]) -> sparse.csr_matrix:
        """Learn the vocabulary; return the features."""
        return self.words.fit_transform([text for (text,) in rows])

    def transform(self, rows: list[tuple[str, ...]]) -> sparse.csr_matrix:
        """Return the features."""
        return self.words.transform([text for (text,) in rows])


class Pairs:
    """TF-IDF of either text, of the words that both or only one of them has, and how much they overlap."""

    what = "TF-IDF of 1-2 words of either text and of shared and unshared words, overlap figures, logistic regression"

    def __init__(self) -> None:
        self.parts = [vectorizer() for _ in range(2)] + [vectorizer(longest=1) for _ in range(3)]

    def fit(self, rows: list[tuple[str, ...]]) -> sparse.csr_matrix:
        """Learn the vocabularies; return the features."""
        return self._features(rows, "fit_transform")

    def transform(self, rows: list[tuple[str, ...]]) -> sparse.csr_matrix:
        """Return the features."""
        return self._features(rows, "transform")

    def _features(self, rows: list[tuple[str, ...]], method: str) -> sparse.csr_matrix:
        words = [[set(re.findall(WORD, text.lower())) for text in pair] for pair in rows]
        views = [
            [pair[0] for pair in rows],
            [pair[1] for pair in rows],
            [" ".join(sorted(a & b)) for a, b in words],
            [" ".join(sorted(a - b)) for a, b in words],
            [" ".join(sorted(b - a)) for a, b in words],
        ]
        overlap = [
            [len(a & b) / len(a | b), len(a & b) / len(a), len(a & b) / len(b), float(a == b), (len(a) - len(b)) / len(a | b)]
            for a, b in words
        ]
        found = [getattr(part, method)(view) for part, view in zip(self.parts, views, strict=True)]
        return sparse.hstack([*found, sparse.csr_matrix(overlap)], format="csr")


def vectorizer(longest: int = 2) -> TfidfVectorizer:
    """TF-IDF of words and, where longest is 2, of pairs of neighbouring ones."""
    return TfidfVectorizer(ngram_range=(1, longest), sublinear_tf=True, token_pattern=WORD)


def summary(found: dict[str, dict[str, Any]]) -> str:
    """The results as a table."""
    rows = [("", "train", "test", "before", "after", "TF-IDF", "F1 before", "after", "TF-IDF", "steps", "seconds")]
    for name, of in found.items():
        pairs = [f"{of[part][figure]:.4f}" for figure in ("accuracy", "f1_macro") for part in ("before", "after", "baseline")]
        counts = (f"{of['rows'][key]:,}" for key in ("train", "test"))
        rows.append((name, *counts, *pairs, f"{of['steps']:,}", f"{of['seconds']:.0f}"))
    return table(rows)


if __name__ == "__main__":
    sys.exit(main())
