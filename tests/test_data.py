"""Claims about the rows that a recipe gives."""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml

from scalepeft import data, fetch, prepared, recipe, sources
from scalepeft.errors import UserError

FOUR = [("a good film", "pos"), ("a bad film", "neg"), ("good", "pos"), ("bad", "neg")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SCALEPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def prepare(tmp_path, tiny_tokenizer):
    """Prepare a recipe whose data section is given; a table of rows becomes a csv file."""

    def prepare(train, tokenizer=tiny_tokenizer, *, limit=32, need_train=True, trained=None, **section):
        loaded = recipe.load(written(tmp_path, train, **section))
        return data.prepare(loaded, tokenizer, limit=limit, need_train=need_train, label_names=trained)

    return prepare


def written(folder: Path, train, **section) -> Path:
    section |= {"train": source(folder, train)}
    section["evaluation"] = {k: source(folder, v) for k, v in section.get("evaluation", {}).items()}
    values = {"task": "sequence-classification", "model": {"name_or_path": "m"}, "data": section}
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def source(folder: Path, rows):
    if isinstance(rows, str | Path):
        return {"path": str(rows)}
    if isinstance(rows, dict) or (rows and isinstance(rows[0], dict)):
        return rows
    file = folder / f"rows{len(list(folder.glob('rows*')))}.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows])
    return {"path": str(file)}


def file(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(prepare, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        prepare(*arguments, **options)
    return str(caught.value)


# --- what a row becomes --------------------------------------------------------------------------------------------


def test_rows_keep_their_order_their_numbers_and_the_tokenizers_own_tokens(prepare, tiny_tokenizer):
    train = prepare(FOUR).train
    assert train.rows["input_ids"][:] == tiny_tokenizer([t for t, _ in FOUR])["input_ids"]
    assert train.rows["token_type_ids"][:] == tiny_tokenizer([t for t, _ in FOUR])["token_type_ids"]
    assert train.labels.tolist() == [1, 0, 1, 0]
    assert train.lengths.tolist() == [len(ids) for ids in train.rows["input_ids"]]
    assert train.rows["row"][:] == [0, 1, 2, 3]
    assert {k: str(f.dtype) for k, f in train.rows.features.items() if hasattr(f, "dtype")} == {
        "labels": "int64",
        "length": "int32",
        "row": "int64",
    }


def test_what_is_tokenised_ahead_keeps_order_and_numbers(prepare, tiny_tokenizer, monkeypatch):
    rows = [(f"{'good ' * (n % 5)}{'film' if n % 7 else ''}", "pos" if n % 2 else "neg") for n in range(40)]
    whole = prepare(rows, on_bad_rows="drop").train
    monkeypatch.setattr(prepared, "_BATCH", 3)
    monkeypatch.setattr(prepared, "FORMAT", -1)
    parts = prepare(rows, on_bad_rows="drop").train
    assert parts.key != whole.key
    assert parts.rows.to_dict() == whole.rows.to_dict()
    assert parts.dropped == whole.dropped == {prepared.TEXT_EMPTY: 2}
    assert "2 rows of" in refused(prepare, rows)
    good = [text for text, _ in rows if text.strip()]
    assert parts.rows["input_ids"][:] == tiny_tokenizer(good, truncation=True, max_length=32)["input_ids"]


def test_the_first_batch_is_tokenised_alone(prepare, monkeypatch):
    """It tells the tokenizer where to cut; the others use two threads."""
    begun, ended, encode = [], [], prepared.Texts.encode

    def watched(self, rows, source):
        begun.append((rows["row"][0], len(ended)))
        found = encode(self, rows, source)
        time.sleep(0.02)  # or the first would have ended by itself
        ended.append(rows["row"][0])
        return found

    monkeypatch.setattr(prepared, "_BATCH", 2)
    monkeypatch.setattr(prepared.Texts, "encode", watched)
    prepare([(f"good film {n}", "pos" if n % 2 else "neg") for n in range(12)])
    assert begun[:2] == [(0, 0), (2, 1)]
    assert any(before < place for place, (_, before) in enumerate(begun)), "never two at once"


def test_a_tokenizer_that_does_more_than_its_backend_is_asked_itself(prepare, tiny_tokenizer):
    class More(type(tiny_tokenizer)):
        def _encode_plus(self, *arguments, **options):
            found = super()._encode_plus(*arguments, **options)
            found["input_ids"] = [[*ids, 7] for ids in found["input_ids"]]
            return found

    more = copy.deepcopy(tiny_tokenizer)
    more.__class__ = More
    assert prepare(FOUR, more).train.rows["input_ids"][:] == more([text for text, _ in FOUR])["input_ids"]


def test_a_pair_is_truncated_to_the_shorter_of_recipe_and_model(prepare, tiny_tokenizer, tmp_path):
    lines = ["premise,claim,label", "a good film,bad,a", "good good good good good good,bad bad bad bad,b"]
    pairs = file(tmp_path, "p.csv", "\n".join(lines))
    section = {"text_columns": ["premise", "claim"], "max_length": 8}
    assert prepare(pairs, limit=32, **section).train.lengths.tolist() == [7, 8]
    assert prepare(pairs, limit=6, **section).train.lengths.tolist() == [6, 6]
    both = tiny_tokenizer("a good film", "bad")
    assert prepare(pairs, **section).train.rows[0]["token_type_ids"] == both["token_type_ids"]
    assert "leaves no room beside 3 special tokens" in refused(prepare, pairs, limit=3, **section)


def test_texts_that_look_like_nothing_are_texts(prepare, tiny_tokenizer):
    words = ["null", "NA", "None", "nan", "NULL", "n/a"]
    train = prepare([(word, "ab"[i % 2]) for i, word in enumerate(words)]).train
    assert len(train.rows) == 6
    assert train.rows["input_ids"][:] == tiny_tokenizer(words)["input_ids"]


# --- bad rows ------------------------------------------------------------------------------------------------------

LINES = {
    sources.NOT_TEXT: {"text": 5, "label": "pos"},
    prepared.TEXT_MISSING: {"text": None, "label": "pos"},
    prepared.TEXT_EMPTY: {"text": " \t", "label": "pos"},
    prepared.TEXT_LONG: {"text": "x" * 1_000_001, "label": "pos"},
    "label is missing": {"text": "good", "label": None},
    "label is -1 (unlabelled)": {"text": "good", "label": -1},
    "label is not among the label names": {"text": "good", "label": "other"},
}


@pytest.mark.parametrize("reason", LINES)
def test_each_bad_row_is_named_or_dropped_and_counted(prepare, tmp_path, reason):
    good = [json.dumps({"text": text, "label": label}) for text, label in FOUR]
    rows = file(tmp_path, "a.jsonl", "\n".join([*good[:2], json.dumps(LINES[reason]), *good[2:]]))
    names = ["neg", "pos"]
    first, last = refused(prepare, rows, label_names=names).splitlines()
    assert first.startswith(f"{rows}:3: row 3: {reason}")
    assert last.endswith(
        f"1 row of {rows} cannot be used; to leave such rows out, and have them counted, set data.on_bad_rows: drop"
    )
    train = prepare(rows, on_bad_rows="drop", label_names=names).train
    assert train.dropped == {reason: 1}
    assert train.rows["row"][:] == [0, 1, 3, 4]


def test_bad_rows_of_a_csv_are_named_by_line(prepare, tmp_path):
    content = b'text,label\n"two\nlines",pos\n\nbad,neg\ncaf\xe9,pos\na,b,c\ngood\n,neg\ngood,\nx,neg\ngood,NaN\n'
    rows = file(tmp_path, "a.csv", content)
    message = refused(prepare, rows).splitlines()
    assert [line.removeprefix(f"{rows}:") for line in message[:5]] == [
        "6: row 3: text holds bytes that are not UTF-8",
        "7: row 4: number of fields differs from the header's (it has 3 fields, the header has 2)",
        "8: row 5: number of fields differs from the header's (it has 1 field, the header has 2)",
        "9: row 6: text is empty (column 'text')",
        "10: row 7: label is missing",
    ]
    assert len(message) == 6
    assert "6 rows" not in message[5]
    assert prepare(rows, on_bad_rows="drop").train.rows["row"][:] == [0, 1, 7, 8]


def test_only_five_bad_rows_are_listed_and_the_others_counted(prepare):
    message = refused(prepare, [*FOUR, *[("", "pos")] * 9]).splitlines()
    assert len(message) == 6
    assert "data.on_bad_rows: 9 rows of" in message[5]
    assert "(4 more than the 5 above)" in message[5]


def test_a_broken_line_of_jsonl_is_a_bad_row(prepare, tmp_path):
    good = '{"text": "good", "label": "pos"}\n{"text": "bad", "label": "neg"}\n'
    rows = file(tmp_path, "a.jsonl", f'{good}{{broken\n[1]\n{{"text": "\\ud800", "label": "neg"}}')
    message = refused(prepare, rows)
    assert f"{rows}:3: row 3: line is not a JSON object (Expecting property name" in message
    assert f"{rows}:4: row 4: line is not a JSON object ([1])" in message
    assert f"{rows}:5: row 5: text holds bytes that are not UTF-8" in message
    assert len(prepare(rows, on_bad_rows="drop").train.rows) == 2


def test_nothing_left_is_an_error(prepare):
    assert "no rows are left of" in refused(prepare, [("", "pos"), ("", "neg")], on_bad_rows="drop")
    assert "has a label" in refused(prepare, [])


def test_one_class_cannot_be_trained(prepare):
    only = [("good", "pos"), ("better", "pos")]
    assert "data.train: all 2 training rows have the one label 'pos'" in refused(prepare, only)
    assert "have the one label 'pos'" in refused(prepare, only), "the cached entry is checked too"


# --- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        ([1, 5, 2, 1], None, [0, 2, 1, 0], ["1", "2", "5"]),
        ([10, 9, 10, 9], None, [1, 0, 1, 0], ["9", "10"]),
        (["b", "a", "b", "b"], None, [1, 0, 1, 1], ["a", "b"]),
        (["1.0", "0", "1", "0.0"], None, [1, 0, 1, 0], ["0", "1"]),
        ([1, 0, "1", "1.0"], ["neg", "pos"], [1, 0, 1, 1], ["neg", "pos"]),
        (["pos", "neg", 0, 1], ["neg", "pos"], [1, 0, 0, 1], ["neg", "pos"]),
        ([2, 1, "2", 1.0], [2, 1], [0, 1, 0, 1], ["2", "1"]),
        ([-1, 0, 1, -1], [-1, 0, 1], [0, 1, 2, 0], ["-1", "0", "1"]),
        ([True, False, True, False], ["no", "yes"], [1, 0, 1, 0], ["no", "yes"]),
    ],
)
def test_what_labels_stand_for(prepare, tmp_path, case):
    labels, names, numbers, found = case
    lines = [json.dumps({"text": f"good {i}", "label": label}) for i, label in enumerate(labels)]
    corpus = prepare(file(tmp_path, "a.jsonl", "\n".join(lines)), label_names=names)
    assert corpus.train.labels.tolist() == numbers
    assert corpus.label_names == found


def test_evaluation_labels_mean_what_training_labels_mean(prepare):
    corpus = prepare([("x", "5"), ("y", "7"), ("z", "9")], evaluation={"e": [("y", "9"), ("y", "7")]})
    assert corpus.evaluation["e"].labels.tolist() == [2, 1]


def test_labels_of_another_set_are_shown_beside_the_names(prepare):
    message = refused(prepare, FOUR, evaluation={"e": [("good", "1"), ("bad", "0")]}, on_bad_rows="drop")
    assert "data.evaluation.e.label_column: no label of" in message
    assert "is among the label names 'neg', 'pos'; it has '1', '0'; data.label_names says which label is 0" in message
    assert "holds 150 different labels" in refused(prepare, [("good", f"l{i}") for i in range(150)])


def test_the_names_of_a_trained_model_stand_above_the_training_rows(prepare):
    corpus = prepare(FOUR, need_train=False, trained=["pos", "neg"], evaluation={"e": FOUR})
    assert corpus.train is None
    assert corpus.evaluation["e"].labels.tolist() == [0, 1, 0, 1]
    assert prepare(FOUR, need_train=False, evaluation={"e": FOUR}).label_names == ["neg", "pos"]


def test_a_data_set_that_declares_other_labels_is_not_taken_by_place(prepare, tmp_path):
    def saved(name, names):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = {"text": ["good", "bad"], "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / name)
        return tmp_path / name

    ordered, other_order, other = (saved("a", ["x", "y"]), saved("b", ["y", "x"]), saved("c", ["x", "not_x"]))
    corpus = prepare(ordered, evaluation={"e": other_order})
    assert corpus.label_names == ["x", "y"]
    assert corpus.evaluation["e"].labels.tolist() == [1, 0]
    message = refused(prepare, ordered, evaluation={"e": other})
    assert "declares the labels 'x', 'not_x'; the label names are 'x', 'y'" in message
    assert prepare(ordered, label_names=["first", "second"]).train.labels.tolist() == [0, 1]
    assert "declare different labels" in refused(prepare, [{"path": str(ordered)}, {"path": str(other)}])


# --- sources -------------------------------------------------------------------------------------------------------


def test_the_same_rows_from_every_kind_of_file(prepare, tmp_path):
    rows = [{"text": t, "label": label} for t, label in FOUR]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"one": table}).save_to_disk(tmp_path / "splits")
    file(tmp_path, "a.csv", "\ufefftext,label\r\n" + "".join(f'"{t}",{label}\r\n' for t, label in FOUR))
    file(tmp_path, "a.tsv", "label\tother\ttext\n" + "".join(f"{label}\t\t{t}\n" for t, label in FOUR))
    file(tmp_path, "a.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, rows)))
    file(tmp_path, "a.json", json.dumps(rows))
    file(tmp_path, "b.json", json.dumps({"version": 1, "data": rows}))
    names = ("a.parquet", "saved", "splits", "a.csv", "a.tsv", "a.jsonl", "a.json", "b.json")
    found = [prepare(tmp_path / name).train for name in names]
    assert [p.reused for p in found] == [name == "splits" for name in names], "the same content as the folder without splits"
    assert all(p.rows[:] == found[0].rows[:] for p in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'text,label\ngood,pos\n"bad,neg\n', r"a\.csv:3: not csv: a quote is opened and not closed"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "txt,label\na,b\n", r"data\.train.text_columns: there is no column 'text'; the columns are 'txt', 'label'"),
        ("a.jsonl", '{"text": "a", "lable": 1}', "data.train.label_column: there is no column 'label'.*did you mean 'lable'"),
        ("a.csv", "text,text,label\na,b,c\n", "the header has the column 'text' more than once"),
        ("a.csv", "text,label\n".encode("utf-16"), "written in UTF-16; save it as UTF-8"),
        ("a.json", '[{"text": "a"},]', r"a\.json:1: not JSON"),
        ("a.json", '{"text": 1}\n{"text": 2}', "one object a line is the format of .jsonl"),
        ("a.json", '{"a": [1], "b": [2]}', "holds neither a list of objects nor"),
        ("a.parquet", "PAR1", "cannot be read as parquet"),
        ("a.txt", "x", "ends in '.txt'; a data file ends in .csv"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(prepare, tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        prepare(file(tmp_path, name, content))


def test_what_only_a_data_set_has_is_refused_of_a_file(prepare, tmp_path):
    rows = source(tmp_path, FOUR)
    assert "data.train.split: " in refused(prepare, rows | {"split": "train"})
    assert "a file has no revision" in refused(prepare, rows | {"revision": "main"})
    assert "does not exist" in refused(prepare, "absent.csv")
    assert "holds no saved data set (save_to_disk); name one of its files: " in refused(prepare, tmp_path)
    assert "scalepeft fetch movie-review-snippets" in refused(prepare, "fetched:movie-review-snippets/train.csv")


def test_numbers_are_no_text_column(prepare, tmp_path):
    datasets.Dataset.from_dict({"text": [1, 2], "label": ["a", "b"]}).to_parquet(tmp_path / "a.parquet")
    assert "the column 'text' holds int64 and no text" in refused(prepare, tmp_path / "a.parquet")


def test_splits_that_exist_are_named(prepare, tmp_path):
    table = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": ["a", "b"]})
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    saved = {"path": str(tmp_path / "saved")}
    assert "has several splits; say which one: train, test" in refused(prepare, saved)
    assert "no split 'tests'; the splits are train, test; did you mean 'test'" in refused(prepare, saved | {"split": "tests"})
    assert len(prepare(saved | {"split": "test"}).train.rows) == 2


def test_a_hub_data_set_and_its_errors(prepare, tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["good", "bad", "a"], "label": [0, 1, 0]}).to_csv(folder / "train.csv")
    load = datasets.load_dataset
    here = {"path": "some/set"}
    there = {"some/set": str(folder)}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *a, **k: load(there.get(path, path), *a, **k))
    assert len(prepare(here | {"split": "train[:2]"}).train.rows) == 2
    assert len(prepare(here).train.rows) == 3
    assert "no split 'tran'; the splits are train; did you mean" in refused(prepare, here | {"split": "tran"})
    assert "data.train.name: there is no configuration 'x'; name one of default" in refused(prepare, here | {"name": "x"})
    message = refused(prepare, {"path": "no/set"})
    assert "no/set is neither a file here, nor in" in message
    assert str(datasets.config.HF_DATASETS_CACHE) in message


# --- choice and mixture --------------------------------------------------------------------------------------------

MANY = [(f"good {i}", "ab"[i % 2]) for i in range(200)]


def test_first_and_sampled_rows(prepare, tmp_path):
    rows = source(tmp_path, MANY)
    assert prepare(rows | {"first_rows": 3}).train.rows["row"][:] == [0, 1, 2]
    sampled = prepare(rows | {"sample_rows": 50}).train.rows["row"][:]
    assert sampled == sorted(set(sampled))
    assert len(sampled) == 50
    assert sampled == prepare(rows | {"sample_rows": 50, "weight": 1}).train.rows["row"][:]
    assert sampled != prepare(rows | {"sample_rows": 50, "sample_seed": 1}).train.rows["row"][:]
    assert "201 rows are asked of" in refused(prepare, rows | {"sample_rows": 201})


def test_rows_are_chosen_before_they_are_checked(prepare, tmp_path):
    rows = source(tmp_path, [*FOUR, ("", "pos")])
    assert prepare(rows | {"first_rows": 4}).train.dropped == {}


def test_a_mixture_repeats_no_row_and_holds_the_weights(prepare, tmp_path):
    first, second = source(tmp_path, MANY), source(tmp_path, [(f"bad {i}", "ab"[i % 2]) for i in range(60)])
    assert len(prepare([first, second]).train.rows) == 260
    train = prepare([first | {"weight": 0.7}, second | {"weight": 0.3}]).train
    assert [s["taken"] for s in train.source] == [140, 60]
    rows = train.rows["row"][:]
    assert len(set(rows[:140])) == 140
    assert rows[140:] == list(range(60))


def test_a_holdout_is_cut_once_and_keeps_the_shares(prepare):
    rows = [(f"good {i}", "a" if i % 4 else "b") for i in range(200)]
    corpus = prepare(rows, holdout={"size": 0.2}, evaluation={"e": [("x", "a")]})
    held = corpus.evaluation["holdout"]
    assert list(corpus.evaluation) == ["holdout", "e"]
    assert Counter(held.labels.tolist()) == {0: 30, 1: 10}
    assert sorted([*corpus.train.rows["row"], *held.rows["row"]]) == list(range(200))
    assert held.lengths.tolist() == [len(ids) for ids in held.rows["input_ids"]]
    again = prepare(rows, holdout={"size": 0.2}).evaluation["holdout"]
    assert again.rows["row"][:] == held.rows["row"][:]
    assert len(prepare(rows, holdout={"size": 7, "stratified": False}, need_train=False).evaluation["holdout"].rows) == 7
    assert "data.holdout: cannot be cut: " in refused(prepare, rows, holdout={"size": 300})
    assert "stratified: false draws without regard" in refused(prepare, [*rows, ("x", "c")], holdout={"size": 0.2})


# --- the cache -----------------------------------------------------------------------------------------------------


def test_a_second_preparation_reads_nothing(prepare, tmp_path, monkeypatch):
    rows = source(tmp_path, FOUR)
    first = prepare(rows, on_bad_rows="drop").train
    monkeypatch.setattr(prepared, "choose", lambda *_: pytest.fail("read"))
    second = prepare(rows, on_bad_rows="drop").train
    assert (first.reused, second.reused) == (False, True)
    assert second.rows[:] == first.rows[:]
    assert (second.key, second.dropped, second.source) == (first.key, first.dropped, first.source)


def test_the_key_follows_everything_the_rows_depend_on(prepare, tiny_tokenizer, monkeypatch):
    import copy

    keys = [prepare(FOUR).train.key]
    assert prepare(FOUR).train.key == keys[0], "the same content in another file"
    keys.append(prepare([*FOUR[:3], ("worse", "neg")]).train.key)
    keys.append(prepare(FOUR, max_length=9).train.key)
    keys.append(prepare(FOUR, limit=10).train.key)
    keys.append(prepare(FOUR, on_bad_rows="drop").train.key)
    keys.append(prepare(FOUR, label_names=["pos", "neg"]).train.key)
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["film"])
    keys.append(prepare(FOUR, other).train.key)
    monkeypatch.setattr(prepared, "FORMAT", prepared.FORMAT + 1)
    keys.append(prepare(FOUR).train.key)
    assert len(set(keys)) == len(keys)


def test_a_call_of_the_tokenizer_does_not_change_the_key(prepare, tiny_tokenizer):
    key = prepare(FOUR).train.key
    tiny_tokenizer(["good", "a film"], truncation=True, max_length=3, padding="max_length")
    assert prepare(FOUR).train.key == key


def test_half_an_entry_is_not_used_and_leftovers_go(prepare, cache):
    whole = prepare(FOUR).train
    entry = cache / "prepared" / whole.key
    rows = entry / "rows.arrow"
    rows.write_bytes(rows.read_bytes()[:-100])
    leftover = entry.with_name(f".{whole.key}.1.tmp")
    leftover.mkdir()
    mended = prepare(FOUR).train
    assert not mended.reused
    assert mended.labels.tolist() == [1, 0, 1, 0]
    assert not leftover.exists()
    (entry / "info.json").unlink()
    assert not prepare(FOUR).train.reused
    assert {p.name for p in entry.parent.iterdir()} - {whole.key} <= {f".{whole.key}.lock"}


def test_a_failed_preparation_leaves_no_entry(prepare, cache):
    refused(prepare, [*FOUR, ("", "pos")])
    assert [p for p in (cache / "prepared").iterdir() if p.suffix != ".lock"] == []


def test_a_cache_that_cannot_be_written_is_named(prepare, cache):
    cache.write_text("a file")
    assert "cannot be written: " in refused(prepare, FOUR)


RACE = """
import sys, time, pathlib
from transformers import PreTrainedTokenizerFast
from scalepeft import data, recipe
folder = pathlib.Path(sys.argv[1])
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
loaded = recipe.load(folder / "r.yaml")
(folder / f"ready{sys.argv[2]}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
train = data.prepare(loaded, tokenizer, limit=32).train
print(train.reused, len(train.rows), train.key)
"""


def test_two_processes_on_a_cold_cache_tokenise_once(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    written(tmp_path, [(f"good {i}", "ab"[i % 2]) for i in range(20_000)])
    commands = [[sys.executable, "-c", RACE, str(tmp_path), name] for name in "12"]
    both = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env={**os.environ}) for c in commands]
    while not all((tmp_path / f"ready{name}").exists() for name in "12"):
        assert all(p.poll() is None for p in both)
    (tmp_path / "go").touch()
    answers = sorted(p.communicate()[0].split() for p in both)
    assert [a[0] for a in answers] == ["False", "True"]
    assert answers[0][1:] == answers[1][1:]
    assert answers[0][1] == "20000"


# --- rows to predict -----------------------------------------------------------------------------------------------


def test_a_file_to_predict_needs_no_labels_and_keeps_its_order(tmp_path, tiny_tokenizer):
    loaded = recipe.load(written(tmp_path, FOUR))
    options = {"limit": 32, "label_names": ["neg", "pos"]}
    bare = data.prepare_file(loaded, tiny_tokenizer, file(tmp_path, "x.csv", "text\ngood\n\nbad film\n"), **options)
    assert bare.labels.tolist() == [-100, -100]
    assert bare.rows["input_ids"][:] == tiny_tokenizer(["good", "bad film"])["input_ids"]
    some = data.prepare_file(loaded, tiny_tokenizer, file(tmp_path, "y.csv", "text,label\na,pos\nb,\nc,0\nd,-1\n"), **options)
    assert some.labels.tolist() == [1, -100, 0, -100]
    with pytest.raises(UserError, match=r"^.*z\.csv: there is no column 'text'"):
        data.prepare_file(loaded, tiny_tokenizer, file(tmp_path, "z.csv", "txt\na\n"), **options)


# --- the fetched reviews -------------------------------------------------------------------------------------------


def test_the_fetched_reviews_are_prepared_whole(prepare, cache, assets):
    from transformers import AutoTokenizer

    cache.mkdir()
    (cache / "assets").symlink_to(assets)
    tokenizer = AutoTokenizer.from_pretrained(fetch.asset_path("fetched:all-MiniLM-L6-v2"))
    reviews = "fetched:movie-review-snippets"
    corpus = prepare(f"{reviews}/train.csv", tokenizer, limit=512, evaluation={"test": f"{reviews}/test.csv"})
    assert corpus.label_names == ["negative", "positive"]
    assert np.bincount(corpus.train.labels).tolist() == [4221, 4196]
    assert len(corpus.evaluation["test"].rows) == 2151
    assert corpus.train.lengths.max() <= 512
    assert corpus.revisions[f"{reviews}/train.csv"] == fetch.ASSETS["movie-review-snippets"].files["train.csv"]
