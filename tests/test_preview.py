"""Claims about rows as they are shown before training."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from scalepeft import cli, data, model, preview
from scalepeft import recipe as recipes
from scalepeft.console import quiet_upstream
from scalepeft.conversations import IGNORED


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet_upstream()


@pytest.fixture
def shown(capsys):
    """What `scalepeft preview` prints."""

    def run(*arguments: object) -> str:
        assert cli.main(["preview", *map(str, arguments)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


@pytest.fixture
def refused(capsys):
    """What it says on stderr when it ends with status 2."""

    def run(*arguments: object) -> str:
        assert cli.main(["preview", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return run


def prepared(recipe, name: str = "train"):
    read = recipes.load(recipe)
    tokenizer = model.tokenizer(read)
    return data.prepare(read, tokenizer, limit=model.longest_input(read, tokenizer)).sets[name], tokenizer


def figure(out: str, name: str) -> list[str]:
    return re.search(rf"^{re.escape(name)}  +(.*)$", out, re.MULTILINE)[1].split()


def test_a_conversation_is_shown_with_what_is_learned(chat, shown):
    recipe = chat()
    (recipe.parent / "chat_train.jsonl").write_text(
        json.dumps(
            {"messages": [{"role": "user", "content": "lamp\nor\x1b[31m?"}, {"role": "assistant", "content": "a\n\nlamp"}]}
        )
    )
    row = prepared(recipe)[0].rows[0]
    assert shown(recipe).partition("\n\n    ")[0].splitlines()[:10] == [
        "what stands in ⟦ ⟧ is in the loss; ↵ ends a line of the row",
        "",
        f"train, row 1 of its source: {len(row['labels'])} tokens, {sum(x != IGNORED for x in row['labels'])} in the loss",
        "<|im_start|>user↵",
        "lamp↵",
        "or\\x1b[31m?<|im_end|>↵",
        "<|im_start|>assistant↵",
        "⟦a↵",
        "↵",
        "lamp<|im_end|>⟧↵",
    ]


def test_the_text_is_that_of_the_tokens_of_training(chat, shown):
    recipe = chat()
    out = shown(recipe, "-n", 44)
    rows, tokenizer = prepared(recipe)
    texts = re.split(r"^train, row \d+ of its source: .*\n", out, flags=re.MULTILINE)[1:]
    assert len(texts) == 44
    for row, text in zip(rows.rows, texts, strict=True):
        whole = text.partition("\n\n")[0]  # behind the last row stand the figures
        plain = re.sub("[⟦⟧\n]", "", whole).replace("↵", "\n")
        assert plain == tokenizer.decode(row["input_ids"])
        learned = tokenizer.decode(
            [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        )
        assert re.findall("⟦(.*?)⟧", whole, re.DOTALL) == [learned]


def test_rows_are_spread_over_the_set(chat, shown):
    recipe = chat()
    numbers = [int(n) for n in re.findall(r"^train, row (\d+) of", shown(recipe), re.MULTILINE)]
    assert (numbers[0], numbers[-1], len(numbers)) == (1, 44, 3)
    assert re.findall(r"^test, row (\d+) of", shown(recipe, "--set", "test", "-n", 2), re.MULTILINE) == ["1", "12"]
    assert len(re.findall("^train, row", shown(recipe, "-n", 1_000), re.MULTILINE)) == 44
    assert "row" not in shown(recipe, "-n", 0).splitlines()[0]


def test_rows_keep_their_numbers_when_others_are_dropped(chat, shown):
    recipe = chat(data={"on_bad_rows": "drop"})
    lines = (recipe.parent / "chat_train.jsonl").read_text().splitlines()
    (recipe.parent / "chat_train.jsonl").write_text("\n".join([json.dumps({"messages": []}), *lines]) + "\n")
    out = shown(recipe, "-n", 1)
    assert "\ntrain, row 2 of its source: " in out
    assert figure(out, "  dropped: conversation is not a list of messages") == ["1", "-"]
    assert figure(out, "rows") == ["44", "12"]


def test_figures_are_those_of_the_rows(chat, shown):
    recipe = chat()
    out = shown(recipe, "-n", 0)
    for column, name in enumerate(("train", "test")):
        rows = prepared(recipe, name)[0].rows
        lengths = sorted(map(len, rows["input_ids"]))
        counted = sum(label != IGNORED for labels in rows["labels"] for label in labels)
        expected = {
            "rows": str(len(rows)),
            "  cut": "0",
            "tokens": f"{sum(lengths):,}",
            "  in the loss": f"{counted / sum(lengths):.1%}",
            "  of a row, mean": f"{sum(lengths) / len(lengths):.1f}",
            "  of a row, longest": str(lengths[-1]),
            "  of a row, limit": "128",
        }
        assert {of: figure(out, of)[column] for of in expected} == expected
        share = sum(length <= int(figure(out, "  of a row, 95th percentile")[column]) for length in lengths) / len(lengths)
        assert share >= 0.95


def test_the_padding_is_that_of_training(chat, train, shown, capsys):
    recipe = chat(training={"max_steps": 1, "eval_on_start": False})
    told = figure(shown(recipe, "-n", 0), "padding")
    train(recipe)
    assert told == [re.search(r"padding +([\d.]+%)", capsys.readouterr().out)[1], "-"]


def test_cut_rows_are_named(chat, shown):
    recipe = chat()
    longest, second = sorted(set(prepared(recipe)[0].lengths.tolist()))[:-3:-1]
    assert "limit:" not in shown(recipe, f"training.max_length={longest}", "-n", 44)
    out = shown(recipe, f"training.max_length={longest - 1}", "-n", 44)
    assert 0 < int(figure(out, "  cut")[0]) == out.count(f", cut at {longest - 1}\n")
    out = shown(recipe, f"training.max_length={second}", "-n", 44)  # which other rows just fit into
    at_the_limit = out.count(": cut, or just fitting\n")
    assert 0 < int(figure(out, "  cut")[0]) < at_the_limit == out.count(f" {second} tokens, ")


def test_packed_rows_show_their_documents(chat, shown):
    recipe = chat(training={"packing": True, "padding_free": True, "max_length": 128})
    out = shown(recipe, "-n", 1)
    row, documents = (
        prepared(recipe)[0].rows[0],
        re.findall(r"^document (\d+), from token (\d+): (\d+) tokens", out, re.MULTILINE),
    )
    begins = [1 + sum(row["seq_lengths"][:number]) for number in range(len(row["seq_lengths"]))]
    assert [tuple(map(int, d)) for d in documents] == list(zip(range(1, 99), begins, row["seq_lengths"], strict=False))
    assert f"train, packed row 1 of {len(prepared(recipe)[0].rows)}: {len(documents)} documents, " in out
    assert figure(out, "rows") == ["44", "12"]
    lengths = prepared(recipe)[0].lengths
    assert figure(out, "  filled") == [f"{lengths.sum() / len(lengths) / 128:.1%}", "-"]
    assert "padding" not in out


def test_preferences_show_both_answers(chat, shown):
    recipe = chat(task="preference")
    out = shown(recipe, "-n", 1)
    row, tokenizer = prepared(recipe)[0].rows[0], prepared(recipe)[1]
    texts = {name: tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}
    assert f"prompt\n{texts['prompt']}\nchosen\n⟦{texts['chosen']}⟧\nrejected\n⟦{texts['rejected']}⟧\n" in out
    counts = ", ".join(f"{name} {len(row[f'{name}_ids'])} tokens" for name in texts)
    assert f"train, row 1 of its source: {counts}\n" in out


def test_classification_shows_tokens_and_the_label(toy, shown):
    out = shown(toy(), "-n", 2)
    assert out.startswith("tokens, with a blank between them\n")
    for row, line in re.findall(r"^train, row (\d+) of its source: \d+ tokens, label '(\w+)'$", out, re.MULTILINE):
        assert line == ["negative", "positive"][int(row) % 2 == 0]
    assert len(re.findall(r"^\[CLS\] .* \[SEP\]$", out, re.MULTILINE)) == 2


def test_a_holdout_is_a_set(toy, shown):
    out = shown(toy(data={"holdout": {"size": 20}, "evaluation": None}), "--set", "holdout", "-n", 1)
    assert "\nholdout, row " in out
    assert figure(out, "rows") == ["50", "20"]


@pytest.mark.parametrize(
    "environment",
    [pytest.param({}, id="colours", marks=pytest.mark.long), pytest.param({"NO_COLOR": "1"}, id="NO_COLOR")],
)
def test_colours_only_on_a_terminal_that_wants_them(chat, tmp_path, environment):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "scalepeft", "preview", str(chat()), "-n", "1"]
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with subprocess.Popen(command, cwd=tmp_path, env=plain | environment, stdout=theirs) as process:
        os.close(theirs)
        out = b""
        while chunk := _read(ours):
            out += chunk
    os.close(ours)
    assert process.returncode == 0
    assert (b"\x1b[1;32m" in out) == (not environment)
    assert ("⟦".encode() in out) == bool(environment)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # Linux says so when the other side is closed
        return b""


def test_colour_is_given_to_each_line_anew():
    marks = preview.COLOUR
    shown = preview.Shown(recipe=None, tokenizer=None, corpus=None, limit=1, marks=marks)
    assert (
        shown._joined([("a\n", False), ("b\nc", True)]) == f"a↵\n{marks.before}b{marks.behind}↵\n{marks.before}c{marks.behind}"
    )


def test_no_weights_are_read(chat, tiny_lm, tmp_path, shown):
    base = tmp_path / "weightless"
    base.mkdir()
    for file in tiny_lm.iterdir():
        if file.suffix != ".safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    assert "train, row 1 " in shown(chat(model={"name_or_path": str(base)}))


def test_the_rows_are_then_ready_for_training(chat, shown):
    recipe = chat(data={"system_prompt": "only here"})
    shown(recipe)
    assert prepared(recipe)[0].reused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "tset"], "command line: --set 'tset': the recipe has no such set; did you mean 'test'?"),
        (["--set", "frobnicate"], "command line: --set 'frobnicate': the recipe has no such set; there are train, test"),
        (["-n", "-1"], "command line: -n is -1; it is 0 or more"),
    ],
)
def test_impossible_wishes_are_told_in_one_line(chat, refused, options, told):
    assert refused(chat(), *options) == f"{told}\n"


def test_mistakes_are_told_as_in_training(chat, refused):
    recipe = chat()
    assert refused(recipe, "data.train.path=nowhere.jsonl").endswith("nowhere.jsonl does not exist\n")
    (recipe.parent / "chat_train.jsonl").write_text('{"messages": []}\n')
    told = refused(recipe).splitlines()
    assert told[0].endswith("chat_train.jsonl:1: row 1: conversation is not a list of messages ([] in column 'messages')")
    assert "data.on_bad_rows" in told[1]
