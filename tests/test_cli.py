"""The command line: verbs, statuses and what `check` prints."""

from __future__ import annotations

import subprocess
import sys

import pytest

import scalepeft
from scalepeft import cli

GOOD = "task: sequence-classification\nmodel: {name_or_path: x}\ndata: {train: {path: a.csv}}\n"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the program and return its status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def program(*arguments):
        try:
            status = cli.main(list(arguments))
        except SystemExit as ended:  # argparse's way
            status = ended.code
        return (status, *capsys.readouterr())

    return program


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_help_lists_every_verb(asked, run):
    status, out, err = run(asked)
    assert (status, err) == (0, "")
    assert all(f"  {verb} " in out and what in out for verb, (_, what) in cli.COMMANDS.items())


def test_no_verb_is_an_error_that_helps(run):
    assert run() == (2, "", run("--help")[1])


def test_version(run):
    assert run("--version") == (0, f"scalepeft {scalepeft.__version__}\n", "")


def test_an_unknown_verb_is_told_in_one_line(run):
    assert run("trian", "x.yaml") == (2, "", "scalepeft: there is no verb 'trian'; did you mean 'train'?\n")
    assert run("frobnicate") == (2, "", "scalepeft: there is no verb 'frobnicate'; see scalepeft --help\n")


@pytest.mark.parametrize("start", [["-m", "scalepeft"], ["-m", "scalepeft.cli"]])
def test_the_module_is_the_program(start):
    told = subprocess.run([sys.executable, *start, "chekc"], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (2, "scalepeft: there is no verb 'chekc'; did you mean 'check'?\n")


def test_check_tells_all_problems_of_all_recipes(run, tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "bad.yaml").write_text(GOOD + "trainin: {}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "worse.yaml").write_text("- 1\n")
    (tmp_path / "empty").mkdir()
    status, out, err = run("check", "bad.yaml", "good.yaml", "sub", "empty", "nosuch.yaml", "quickstart")
    assert (status, out.splitlines()) == (2, ["good.yaml: ok", "quickstart: ok"])
    assert err.splitlines() == [
        "bad.yaml:4: a recipe has no 'trainin'; did you mean 'training'?",
        "sub/worse.yaml:1: a recipe is a mapping of sections, this is a list",
        "empty/*.yaml: no such recipe",
        "nosuch.yaml: no such recipe",
    ]


def test_check_of_good_recipes_is_silent_on_stderr(run, tmp_path):
    (tmp_path / "a=b.yaml").write_text(GOOD)
    assert run("check", "a=b.yaml", "training.seed=3") == (0, "a=b.yaml: ok\n", "")


def test_overrides_apply_to_every_recipe(run, tmp_path):
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yaml").write_text(GOOD)
    status, out, err = run("check", "training.sed=3", "a.yaml", "b.yaml", f"training.run_name={'x' * 5000}")
    assert (status, out) == (2, "")
    assert err == "command line (training.sed=3): training (TrainingArguments) has no 'sed'; did you mean 'seed'?\n"


def test_check_without_a_recipe_is_an_error(run):
    assert run("check", "training.seed=3") == (2, "", "command line: no recipe is named, only overrides\n")
    assert run("check")[0] == 2


def test_a_reader_that_has_seen_enough_is_no_error():
    piped = f"{sys.executable} -m scalepeft schema | head -c 100 > /dev/null; echo ${{PIPESTATUS[0]}}"
    told = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=True)
    assert (told.stdout, told.stderr) == ("0\n", "")
