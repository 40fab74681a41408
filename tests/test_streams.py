"""Streams: rows that are read while training, the same on every layout, from where the run stopped, with nothing left out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from conftest import toy_rows, write_csv, write_toy
from test_layout import LAYOUTS, STILL, check_same_numbers, figures, launched, steps, weights

from scalepeft import data, model
from scalepeft import recipe as recipes
from scalepeft.console import quiet_upstream
from scalepeft.errors import UserError
from scalepeft.run import Run

STREAMED = {"streaming": True, "buffer_size": 16}
TRAINING = {"max_steps": 6, "save_strategy": "no", "eval_strategy": "no"}
"""6 steps of 16: 96 of 70 rows, so that the stream begins anew within the fifth step."""


def settings(folder: Path, file: str = "train.csv", **training) -> dict:
    """What makes the toy recipe a stream."""
    return {
        "data": {"train": {"path": str(folder / file), **STREAMED}},
        "model": {"config": STILL},
        "adapter": {"lora_dropout": 0.0},
        "training": {**TRAINING, **training},
    }


def stream(recipe: Path) -> data.Streamed:
    quiet_upstream()
    read = recipes.load(recipe)
    tokenizer = model.tokenizer(read)
    found = data.prepare(read, tokenizer, limit=64).train
    found.rows.taken = 96
    return found


def texts(found: data.Streamed, places: list[int]) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in found.rows[places]["input_ids"]]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_an_epoch_holds_every_row_once_and_the_next_one_another_order(toy, tmp_path, suffix):
    recipe = toy(**settings(tmp_path, f"rows{suffix}"))
    rows = [{"text": text, "label": label} for text, label in toy_rows(70, seed=1)]
    table = datasets.Dataset.from_list(rows)
    write: dict[str, Callable[[Path], object]] = {
        ".csv": lambda path: write_csv(path, toy_rows(70, seed=1)),
        ".tsv": lambda path: path.write_text("text\tlabel\n" + "".join(f"{t}\t{n}\n" for t, n in toy_rows(70, seed=1))),
        ".jsonl": table.to_json,
        ".parquet": table.to_parquet,
    }
    write[suffix](tmp_path / f"rows{suffix}")
    found = stream(recipe)
    first, second = texts(found, list(range(70))), texts(found, list(range(70, 140)))
    prepared = data.prepare(recipes.load(toy("whole")), model.tokenizer(recipes.load(recipe)), limit=64).train
    assert sorted(first) == sorted(second) == sorted(tuple(ids) for ids in prepared.rows["input_ids"])
    assert first != second
    assert sorted(first[:16]) == sorted(tuple(ids) for ids in prepared.rows["input_ids"][:16])  # drawn within a window
    assert texts(found, [3, 4, 80]) == [first[3], first[4], second[10]]  # an earlier place: read again


def test_a_window_of_one_row_keeps_the_order(toy, tmp_path):
    changes = settings(tmp_path)
    changes["data"]["train"]["buffer_size"] = 1
    found = stream(toy(**changes))
    prepared = data.prepare(recipes.load(toy("whole")), model.tokenizer(recipes.load(toy("whole"))), limit=64).train
    assert texts(found, list(range(140))) == [tuple(ids) for ids in prepared.rows["input_ids"]] * 2


def test_accumulation_changes_no_number_of_a_stream(toy, train, tmp_path):
    runs = [train(toy(name, **settings(tmp_path, **LAYOUTS[name].training))) for name in ("1x4x4", "1x16")]
    check_same_numbers(*runs)
    assert runs[0].record["data"]["rows"]["train"] == 96


def test_a_stream_of_conversations_is_trained_on(chat, train, tmp_path):
    run = train(chat(data={"train": {"path": str(tmp_path / "chat_train.jsonl"), **STREAMED}}, training=TRAINING))
    assert run.record["step"] == 6
    assert run.record["metrics"]["after"]["loss"] < run.record["metrics"]["before"]["loss"]


@pytest.mark.long
def test_processes_divide_a_stream_without_overlap_and_go_on_where_it_stopped(tmp_path, tiny_model):
    written = {
        name: write_toy(tmp_path, tiny_model, name, **settings(tmp_path, save_strategy="steps", save_steps=3, **of.training))
        for name, of in LAYOUTS.items()
        if name in ("1x16", "2x8")
    }
    launched([written["1x16"]], None)
    launched([written["2x8"]], "multi_cpu")
    alone, two = (Run(path.with_suffix("")) for path in written.values())
    assert steps(alone) == steps(two) == [set(range(start, start + 16)) for start in range(0, 96, 16)]
    check_same_numbers(two, alone)
    expected, trained = figures(two, "loss", "grad_norm"), weights(two)
    for left in ("adapter", "checkpoint-6"):
        shutil.rmtree(two.path / left)
    (two.path / "verification.safetensors").unlink()
    two.update(status="running")
    launched([written["2x8"]], "multi_cpu")
    taken = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("2x8.rows.*.json"))]
    assert [len(batches) for batches in taken] == [3, 3]  # the rows before were not read again, but skipped
    assert torch.equal(figures(two, "loss", "grad_norm"), expected)
    assert torch.equal(weights(two), trained)


def test_bad_rows_stop_the_run_or_are_counted(toy, train, tmp_path):
    rows = toy_rows(70, seed=1)
    rows[5] = ("", "positive")
    recipe = toy(**settings(tmp_path, "dirty.csv"))
    write_csv(tmp_path / "dirty.csv", rows)
    with pytest.raises(UserError) as stopped:
        train(recipe)
    assert stopped.value.problems[0] == f"{tmp_path}/dirty.csv:7: row 6: text is empty (column 'text')"
    run = train(recipe, "data.on_bad_rows=drop", fresh=True)
    assert run.record["data"]["dropped"]["train"] == {
        "text is empty": 2
    }  # 96 rows: once in the first epoch, once in the second


def test_a_stream_may_begin_with_rows_that_cannot_be_used(toy, train, tmp_path):
    changes = settings(tmp_path, "late.csv", per_device_train_batch_size=1, max_steps=6)
    changes["data"] |= {"on_bad_rows": "drop"}
    changes["data"]["train"]["buffer_size"] = 1
    recipe = toy(**changes)
    write_csv(tmp_path / "late.csv", [("", "positive"), ("", "negative"), *toy_rows(20, seed=1)])
    run = train(recipe)
    assert run.record["data"]["dropped"]["train"] == {"text is empty": 2}
    assert all(math.isfinite(line["loss"]) for line in run.lines() if "loss" in line)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.max_steps=0", "data.train.streaming needs training.max_steps"),
        ("data.holdout.size=0.2", "cuts rows that are there before training; give data.evaluation"),
        ("data.augmentation.copies=1", "copies rows that are there before training"),
        ("data.evaluation.test.streaming=true", "evaluation sets are prepared"),
        ("training.train_sampling_strategy=group_by_length", "orders rows that are there before training"),
        ("training.dataloader_num_workers=2", "would read the stream once more in each of them"),
        ("data.train.buffer_size=0", "must be at least 1"),
        ("data.train.sample_rows=5", "draws from all rows"),
    ],
)
def test_what_a_stream_cannot_serve(toy, tmp_path, override, told):
    recipe = toy(**settings(tmp_path))
    with pytest.raises(UserError) as error:
        recipes.load(recipe, [override])
    (problem,) = error.value.problems
    assert told in problem


def test_labels_that_nobody_names(toy, tmp_path):
    changes = settings(tmp_path)
    changes["data"]["label_names"] = None
    with pytest.raises(UserError, match="the labels are not known before the rows are read; give data"):
        stream(toy(**changes))


def test_a_stream_is_not_previewed(command, toy, tmp_path):
    found = command("preview", toy(**settings(tmp_path)))
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "data.train.first_rows=1000 shows its beginning" in found.stderr
