"""Claims about a trained run at work."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from scalepeft import cli, data, kinds, model, predict
from scalepeft.console import quiet_upstream
from scalepeft.run import Run

TEXTS = ["a good film", "bad", "the plot is the film but the end is this a as nothing bad bad bad", "good", "a bad end"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    """Commands run in this test's folder; a file written by name is written there."""
    monkeypatch.chdir(tmp_path)


def written(name: str, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text",)) -> Path:
    with Path(name).open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return Path(name)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def call(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.fixture
def copied(complete, tmp_path) -> Run:
    """A copy of the complete run that a test may change."""
    return Run(shutil.copytree(complete.path, tmp_path / "copied"))


def test_every_row_is_labelled_in_the_order_of_the_file(complete, capsys):
    data = written("new.csv", [(text,) for text in TEXTS * 9])
    assert call("predict", complete.path, "--data", data, "--output", "out.csv") == 0
    assert capsys.readouterr().out == "out.csv: 45 rows\n"
    rows = rows_of(Path("out.csv"))
    assert [row["row"] for row in rows] == [str(n) for n in range(45)]
    assert [row["name"] for row in rows[:5]] == ["positive", "negative", "negative", "positive", "negative"]
    assert [row["label"] for row in rows] == [str(["negative", "positive"].index(row["name"])) for row in rows]
    for row in rows:
        probabilities = [float(row[f"probability_{name}"]) for name in ("negative", "positive")]
        assert sum(probabilities) == pytest.approx(1, abs=2e-6)
        assert max(probabilities) == probabilities[int(row["label"])]
    assert all(
        {k: v for k, v in row.items() if k != "row"} == {k: v for k, v in rows[n % 5].items() if k != "row"}
        for n, row in enumerate(rows)
    )
    assert [p.name for p in Path().iterdir() if p.suffix == ".part"] == []


@pytest.mark.parametrize("label", ["", "positive", "1", "-1", "7", "a label of another set"])
def test_labels_in_the_file_change_nothing(complete, label):
    predict.predict(complete, written("plain.csv", [(text,) for text in TEXTS]), Path("plain.out"))
    data = written("labelled.csv", [(text, label) for text in TEXTS], ("text", "label"))
    predict.predict(complete, data, Path("labelled.out"))
    assert Path("labelled.out").read_text() == Path("plain.out").read_text()


def test_the_predictions_are_those_of_the_evaluation(complete):
    source = complete.recipe().data.evaluation["test"].path
    predict.predict(complete, Path(source), Path("out.csv"))
    truth, found = rows_of(Path(source)), rows_of(Path("out.csv"))
    right = sum(t["label"] == f["name"] for t, f in zip(truth, found, strict=True))
    assert right / len(truth) == pytest.approx(complete.record["metrics"]["after"]["accuracy"])


def test_a_bad_row_is_named_and_nothing_is_written(complete, capsys):
    data = written("new.csv", [("good",), ("   ",), ("bad",)])
    assert call("predict", complete.path, "--data", data, "--output", "out.csv") == 2
    told = capsys.readouterr().err
    assert "new.csv:3: row 2: text is empty" in told
    assert not Path("out.csv").exists()


def test_a_bad_row_is_left_out_where_the_recipe_drops_them(copied):
    resolved = copied.path / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace("data:\n", "data:\n  on_bad_rows: drop\n"))
    data = written("new.csv", [("good",), ("   ",), ("bad",)])
    assert predict.predict(copied, data, Path("out.csv")) == 2
    assert [(row["row"], row["name"]) for row in rows_of(Path("out.csv"))] == [("0", "positive"), ("2", "negative")]


def test_no_file_is_overwritten(complete, capsys):
    data = written("new.csv", [("good",)])
    Path("out.csv").write_text("mine")
    assert call("predict", complete.path, "--data", data, "--output", "out.csv") == 2
    assert call("evaluate", complete.path, "--output", "out.csv") == 2
    assert capsys.readouterr().err == "out.csv: exists already; give another --output\n" * 2
    assert Path("out.csv").read_text() == "mine"
    assert call("predict", complete.path, "--data", data, "--output", "no/such/folder/out.csv") == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_place_where_no_figures_can_be_written(complete, capsys):
    assert call("evaluate", complete.path, "--output", "/proc/figures.json") == 2
    assert capsys.readouterr().err.startswith("/proc/figures.json: cannot be written: ")


@pytest.mark.parametrize("data", ["nothing.csv", "other.csv"])
def test_data_that_do_not_serve_are_named(complete, capsys, data):
    written("other.csv", [("good",)], ("txt",))
    assert call("predict", complete.path, "--data", data, "--output", "out.csv") == 2
    told = capsys.readouterr().err
    assert data in told
    assert told.count("\n") == 1
    assert not Path("out.csv").exists()


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_a_run_that_is_not_complete_is_not_used(copied, capsys, status, verb):
    copied.update(status=status, reason="there was a storm" if status == "failed" else None)
    data = written("new.csv", [("good",)])
    rest = ["--data", data, "--output", "out.csv"] if verb == "predict" else []
    assert call(verb, copied.path, *rest) == 2
    told = capsys.readouterr().err
    assert f"the run is {status}" in told
    assert ("there was a storm" in told) == (status == "failed")
    assert not Path("out.csv").exists()


def test_evaluation_is_told_and_written(complete, capsys):
    assert call("evaluate", complete.path, "--output", "figures.json") == 0
    out = capsys.readouterr().out
    after = complete.record["evaluation"]["test"]["after"]
    found = json.loads(Path("figures.json").read_text())["test"]
    assert set(found) == set(after)
    assert found["confusion"] == after["confusion"]
    assert found["loss"] == pytest.approx(after["loss"])
    for shown in (f"{after['accuracy']:.4f}", f"{after['loss']:.4f}", "negative", "positive", "truth \\ predicted"):
        assert shown in out


def test_other_rows_can_be_evaluated(complete):
    written("new.csv", [("a good film", "positive"), ("bad", "negative"), ("good", "negative")], ("text", "label"))
    found = predict.evaluate(complete, ["data.evaluation.new.path=new.csv"])
    assert list(found) == ["test", "new"]
    assert found["new"]["accuracy"] == pytest.approx(2 / 3)
    assert found["new"]["confusion"] == [[1, 1], [0, 1]]


def test_only_the_data_of_a_trained_run_may_change(complete, capsys):
    assert call("evaluate", complete.path, "adapter.r=2") == 2
    assert "only data.*" in capsys.readouterr().err


def test_evaluating_writes_nothing_into_the_run(complete):
    before = {p: p.stat().st_mtime_ns for p in complete.path.rglob("*")}
    predict.evaluate(complete)
    assert {p: p.stat().st_mtime_ns for p in complete.path.rglob("*")} == before


# --- the fast path is the slow one --------------------------------------------------------------------------------------


def loaded(run: Run, **how):
    """The model of a run, without upstream's warnings."""
    quiet_upstream()
    return model.load(run, **how)


def test_an_adapter_in_the_weights_answers_as_one_beside_them(complete):
    plain, folded = loaded(complete), loaded(complete, folded=True)
    assert isinstance(plain, PeftModel)
    assert not isinstance(folded, PeftModel)
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in plain.parameters())
    inputs = {"input_ids": torch.arange(5, 35).reshape(3, 10)}
    expected = model.answers(complete.recipe(), plain, inputs)
    with plain.disable_adapter():
        assert not torch.allclose(model.answers(complete.recipe(), plain, inputs), expected, atol=1e-2)
    torch.testing.assert_close(model.answers(complete.recipe(), folded, inputs), expected, atol=1e-5, rtol=1e-5)


def test_weights_of_half_precision_keep_the_adapter_beside_them(complete):
    half = loaded(complete).to(torch.bfloat16)
    assert model._folded(half) is half


def test_batches_of_tokens_answer_as_single_rows_do_each_in_its_place(complete):
    recipes = [complete.recipe([f"training.per_device_eval_batch_size={size}"]) for size in (8, 1, 7)]
    del recipes[0].training["per_device_eval_batch_size"]  # type: ignore[attr-defined]
    tokenizer, labels = model.tokenizer_of(complete), complete.record["labels"]
    file = written("new.csv", [(f"{text} {'good ' * (n % 11)}",) for n, text in enumerate(TEXTS * 20)])
    prepared = data.prepare_file(recipes[0], tokenizer, file, limit=64, label_names=labels)
    task, trained = kinds.task(recipes[0], tokenizer, labels), loaded(complete, folded=True)

    def logits(batch):
        seen.append(len(batch["input_ids"]))
        return trained(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits

    found, batches = [], []
    for recipe in recipes:
        seen: list[int] = []
        found.append(predict.Computing(recipe, task, prepared)(np.arange(100), logits))
        batches.append(seen)
    assert len(batches[0]) < len(batches[2]) < len(batches[1]) == 100
    assert max(batches[2]) == 7
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    np.testing.assert_allclose(found[2], found[1], atol=1e-5)
    some = predict.Computing(recipes[0], task, prepared)(np.array([3, 97, 50]), logits)
    np.testing.assert_allclose(some, found[1][[3, 97, 50]], atol=1e-5)


def test_a_file_of_predictions_is_the_same_however_few_numbers_are_held(complete, monkeypatch):
    file = written("new.csv", [(f"{text} {'bad ' * (n % 7)}",) for n, text in enumerate(TEXTS * 3)])
    predict.predict(complete, file, Path("whole.csv"))
    monkeypatch.setattr(predict, "_HELD", 8)
    predict.predict(complete, file, Path("parts.csv"))
    whole, parts = rows_of(Path("whole.csv")), rows_of(Path("parts.csv"))
    assert [(row["row"], row["name"]) for row in parts] == [(row["row"], row["name"]) for row in whole]
    for name in ("probability_negative", "probability_positive"):
        assert [float(row[name]) for row in parts] == pytest.approx([float(row[name]) for row in whole], abs=2e-6)


def test_predictions_that_fail_midway_leave_nothing(complete, monkeypatch):
    def fails(*_):
        raise RuntimeError

    monkeypatch.setattr(predict.Computing, "__call__", fails)
    with pytest.raises(RuntimeError):
        predict.predict(complete, written("new.csv", [("good",)]), Path("out.csv"))
    assert [path.name for path in Path().iterdir()] == ["new.csv"]
