"""The pictures of a run: they hold the numbers of metrics.jsonl and of the confusion matrix."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from scalepeft import report
from scalepeft.run import Run

LINES: list[dict[str, Any]] = [
    {"step": 0, "epoch": 0.0, "eval_loss": 0.7, "eval_accuracy": 0.5, "eval_f1_macro": 0.4, "eval_other_accuracy": 0.3},
    {"step": 10, "epoch": 0.5, "loss": 0.6, "grad_norm": 1.5, "learning_rate": 1e-3},
    {"step": 20, "epoch": 1.0, "loss": 0.4, "grad_norm": 0.1 + 0.2, "learning_rate": 1e-8},
    {"step": 20, "epoch": 1.0, "eval_loss": 0.35, "eval_accuracy": 0.9, "eval_f1_macro": 0.85, "eval_other_accuracy": 0.8},
    {"step": 40, "epoch": 2.0, "eval_loss": 0.45, "eval_accuracy": 0.8, "eval_f1_macro": 0.75, "eval_other_accuracy": 0.7},
]
BEST = {"step": 20, "metric": "accuracy", "value": 0.9}


def run_of(
    folder: Path,
    names: tuple[str, ...] = ("no", "yes"),
    *,
    best: dict[str, Any] | None = None,
    lines: list[dict[str, Any]] | None = None,
    metrics: dict[str, Any] | None = None,
) -> Run:
    """A run directory as far as pictures need it, of these classes; without any it is a regression."""
    folder.mkdir(exist_ok=True)
    details = {
        "per_class": {n: {} for n in names},
        "confusion": [[8 if i == j else i for j in range(len(names))] for i in range(len(names))],
    }
    found = {"before": None, "after": details if names else {}}
    record = {"name": "films", "best": best, "evaluation": {"test": found, "other": found}, "metrics": metrics or {}}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines or LINES), encoding="utf-8")
    return Run(folder)


def texts(svg: Path) -> list[str]:
    """What is written in a picture: each text stands in a comment before its outlines."""
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))  # noqa: S314  # our own file
    tree = ET.parse(svg, parser)  # noqa: S314
    return [str(element.text).strip() for element in tree.iter() if element.tag is ET.Comment]


def marks(svg: Path, gid: str) -> int:
    return sum(element.get("id") == gid for element in ET.parse(svg).iter())  # noqa: S314


def test_the_table_holds_the_numbers_of_the_log(tmp_path):
    run = run_of(tmp_path)
    report.curves(run)
    with (tmp_path / "curves.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [{key: float(value) for key, value in row.items() if value} for row in rows] == run.lines()


def test_pictures_of_both_formats(tmp_path):
    report.curves(run_of(tmp_path))
    for name in ("curves", "confusion"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
        assert ET.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")  # noqa: S314


def test_training_and_each_set_are_told_apart(tmp_path):
    report.curves(run_of(tmp_path))
    written = texts(tmp_path / "curves.svg")
    assert {"training", "test: loss", "test: accuracy", "test: macro F1", "other: accuracy"} <= set(written)
    assert "other: loss" not in written  # it was not measured


def test_the_same_run_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        report.curves(run_of(tmp_path / folder, best=BEST))
    for name in ("curves.svg", "confusion.svg", "curves.png", "confusion.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert name.endswith("png") or b"dc:date" not in (tmp_path / "a" / name).read_bytes()


@pytest.mark.parametrize("metric", ["accuracy", "eval_f1_macro", "loss", "eval_other_accuracy"])
def test_the_best_step_is_marked(tmp_path, metric):
    report.curves(run_of(tmp_path, best=BEST | {"metric": metric}))
    assert texts(tmp_path / "curves.svg").count("best: step 20") == 2
    assert marks(tmp_path / "curves.svg", "best") == 1


def test_a_best_figure_that_is_not_drawn_still_has_its_step(tmp_path):
    report.curves(run_of(tmp_path, best=BEST | {"metric": "recall_macro"}))
    assert texts(tmp_path / "curves.svg").count("best: step 20") == 2
    assert not marks(tmp_path / "curves.svg", "best")


def test_no_best_step_no_mark(tmp_path):
    report.curves(run_of(tmp_path))
    assert not [text for text in texts(tmp_path / "curves.svg") if "best" in text]


def test_the_confusion_matrix_has_counts_shares_and_names(tmp_path):
    names = ("$cash$ & <more>", "a name much too long for the side of a picture", "neutral")
    assert report.confusion(run_of(tmp_path, names))
    written = texts(tmp_path / "confusion.svg")
    assert {"8", "2", "100.0%", "66.7%", "16.7%", "neutral (12)", "films: test, 30 rows"} <= {
        line for text in written for line in text.splitlines()
    }
    assert [text for text in written if "$cash$" in text]
    assert [text for text in written if text.startswith("a name mu") and text.endswith("a picture")]


@pytest.mark.parametrize(("classes", "drawn"), [(report.MOST_CLASSES, True), (report.MOST_CLASSES + 1, False), (0, False)])
def test_a_matrix_of_very_many_classes_or_of_none_is_not_drawn(tmp_path, classes, drawn):
    assert report.confusion(run_of(tmp_path, tuple(f"class {i}" for i in range(classes)))) is drawn
    assert {path.name for path in tmp_path.glob("confusion.*")} == ({"confusion.png", "confusion.svg"} if drawn else set())


def test_a_class_of_no_rows_has_no_share(tmp_path):
    run = run_of(tmp_path)
    record = run.record
    record["evaluation"]["test"]["after"]["confusion"] = [[0, 0], [1, 3]]
    run.update(evaluation=record["evaluation"])
    assert report.confusion(run)
    assert "no (0)" in texts(tmp_path / "confusion.svg")


def test_regression_has_correlations_and_no_matrix(tmp_path):
    lines = [{"step": s, "epoch": s / 10, "eval_loss": 1.0, "eval_pearson": 0.1, "eval_spearman": 0.2} for s in (0, 10)]
    report.curves(run_of(tmp_path, (), lines=lines))
    assert {"mean squared error", "test: Pearson", "test: Spearman"} <= set(texts(tmp_path / "curves.svg"))
    assert not (tmp_path / "confusion.png").exists()


def test_without_an_evaluation_only_the_loss_is_drawn(tmp_path):
    run = run_of(tmp_path, lines=[{"step": s, "epoch": s / 10, "loss": 1 / s} for s in (1, 2, 3)])
    run.update(evaluation={})
    report.curves(run)
    written = texts(tmp_path / "curves.svg")
    assert "loss (nats)" in written
    assert "score" not in written


def test_the_figures_before_and_after_stand_side_by_side(tmp_path):
    measured = {
        "before": {"accuracy": 0.25, "f1_macro": 0.125, "loss": 1.5},
        "after": {"accuracy": 0.75, "f1_macro": 0.5, "loss": 0.5},
    }
    assert report.before_after(run_of(tmp_path, metrics=measured))
    written = texts(tmp_path / "before_after.svg")
    assert {"0.250", "0.125", "0.750", "0.500", "accuracy", "f1 macro", "before", "after", "films: test"} <= set(written)
    assert "loss" not in written


@pytest.mark.parametrize("metrics", [{}, {"before": None, "after": {"accuracy": 0.5}}, {"before": None, "after": None}])
def test_without_figures_from_before_nothing_is_drawn(tmp_path, metrics):
    assert not report.before_after(run_of(tmp_path, metrics=metrics))
    assert not (tmp_path / "before_after.svg").exists()
