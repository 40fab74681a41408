"""recipes/README.md is what the script makes of the recipes and the recorded results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from scalepeft import recipe as recipes
from scalepeft.run import Run, write

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "recipes_table.py"


@pytest.fixture
def script():
    """The script as a module."""
    found = importlib.util.spec_from_file_location("recipes_table", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def quickstart(tmp_path) -> Run:
    """A run directory of the quickstart, as far as its record goes."""
    run = Run(tmp_path / "quickstart")
    run.path.mkdir()
    write(run.path / "resolved.yaml", recipes.dump(recipes.load("quickstart").resolved()))
    write(run.path / "metrics.jsonl", '{"step": 5, "epoch": 1.0}\n')
    record = {
        "name": "quickstart",
        "status": "complete",
        "parameters": {"trainable": 25, "total": 1000},
        "data": {"rows": {"train": 80, "test": 2000}},
        "labels": ["negative", "positive"],
        "evaluation": {"test": {"before": {"accuracy": 0.5, "loss": 1.0}, "after": {"accuracy": 0.75, "loss": 0.5}}},
        "step": 5,
        "seconds": 61.4,
        "samples_per_second": 1.3,
        "layout": {"processes": 1, "device": "cpu", "threads": 2, "precision": "bf16"},
        "ended": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789" * 4 + "-dirty",
        "versions": {"python": "3.11.7", "platform": "here", "torch": "2.13.0"},
    }
    write(run.path / "run.json", json.dumps(record))
    return run


def test_the_page_is_what_the_script_writes(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "stale: run `make recipes-table`"


def test_every_recipe_has_its_row(script):
    lines = script.page().splitlines()
    for name in recipes.shipped_recipes():
        assert sum(line.startswith(f"| [{name}]({name}.yaml): ") for line in lines) == 1


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("Documented best accuracy: 0.594. Words of one's own.", "best accuracy: 0.594"),
        ("Some. Documented: macro F1 0.2, later 0.66; 52.3 rows/s. More: 3.", "macro F1 0.2, later 0.66; 52.3 rows/s"),
        ("Reference: 87.5 +- 0.3 accuracy.", "87.5 \N{PLUS-MINUS SIGN} 0.3 accuracy"),
        ("Reproduces the guide as documented (ten steps).", "-"),
    ],
)
def test_what_is_documented_is_read_from_the_head(script, head, said):
    assert script.documented(head) == said.replace("accuracy:", "accuracy")


def test_a_recorded_run_stands_in_the_table(script, quickstart, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    assert "| not yet |\n" in script.page()
    script.record(quickstart)
    kept = json.loads((tmp_path / "results" / "quickstart.json").read_text())
    assert (kept["before"], kept["after"]) == ({"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.75, "loss": 0.5})
    page = script.page()
    assert (
        "| 25 (2.50%) | - | accuracy 0.5000 \N{RIGHTWARDS ARROW} 0.7500, loss 1.0000 \N{RIGHTWARDS ARROW} 0.5000"
        " on 2,000 rows of test; 61 s, 2 threads of a CPU |" in page
    )
    assert "- quickstart: 2026-01-02, commit 0123456789 with changes, python 3.11.7, torch 2.13.0." in page


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"accuracy": 0.5, "f1_macro": 0.4, "loss": 1.0}, "accuracy 0.5000, macro F1 0.4000"),
        ({"perplexity": 6.5, "mean_token_accuracy": 0.55, "loss": 1.87}, "perplexity 6.5000, loss 1.8700"),
        ({"rewards_accuracies": 0.7, "rewards_margins": 0.2, "loss": 0.6}, "reward accuracy 0.7000, loss 0.6000"),
    ],
)
def test_each_task_is_told_by_its_own_figures(script, found, told):
    run = {"set": "test", "rows": {"test": 9}, "seconds": 1.0, "threads": 2, "processes": 1, "device": "cpu"}
    assert script.result({**run, "after": script.figures(found)}) == f"{told} on 9 rows of test; 1 s, 2 threads of a CPU"


def test_the_language_experiments_have_a_table(script):
    run = {"recipe": "benchmarks/language/lora.yaml", "parameters": {"trainable": 25, "total": 1000}}
    run |= {"before": {"perplexity": 7.0, "loss": 1.9}, "after": {"perplexity": 6.0, "loss": 1.8}}
    run |= {"threads": 2, "processes": 1, "device": "cpu"}
    summary = {"seeds": [0, 1], "loss_before": 1.9, "loss_after": [1.8, 1.7], "mean": 1.75, "spread": 0.07, "seconds": 90.0}
    text = script.language_section({"runs": {"lora-0": run}, "summary": {"lora": summary}})
    cells = "25 (2.50%) | 2 | 1.9000 -> **1.7500** | 0.0700 | perplexity 7.0000 -> 6.0000 | 90 s, 2 threads of a CPU |"
    assert "| [lora](../benchmarks/language/lora.yaml) | " + cells.replace("->", script.ARROW) in text


@pytest.mark.parametrize("change", [{"status": "interrupted"}, {"name": "unheard_of"}])
def test_only_a_complete_run_of_a_recipe_is_recorded(script, quickstart, tmp_path, monkeypatch, change):
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    quickstart.update(**change)
    with pytest.raises(SystemExit, match="is no complete run of a recipe"):
        script.record(quickstart)
    assert not (tmp_path / "results").exists()


def test_a_run_of_a_recipe_that_has_changed_is_not_recorded(script, quickstart):
    values = recipes.load("quickstart", ["training.num_train_epochs=7"]).resolved()
    write(quickstart.path / "resolved.yaml", recipes.dump(values))
    with pytest.raises(SystemExit, match=r"its recipe was another one: training\.num_train_epochs"):
        script.record(quickstart)


@pytest.mark.parametrize(
    "path", [p for p in (SCRIPT.parent / "experiments").glob("*.yaml") if p.stem != "base"], ids=lambda p: p.stem
)
def test_the_experiments_are_valid_recipes(path):
    assert "test" in recipes.load(path).data.evaluation
