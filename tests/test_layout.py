"""The loss trap: the same recipe gives the same numbers on whatever layout its global batch is divided."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scalepeft import predict
from scalepeft import recipe as recipes
from scalepeft.console import quiet_upstream
from scalepeft.run import Run

MULTI_CPU = Path(__file__).parents[1] / "accelerate_configs/multi_cpu.yaml"
CLOSE = 1e-5

EXACT = {
    "model": {"config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}},
    "adapter": {"lora_dropout": 0.0},
}
"""Changes of the toy recipe: no random masks, which no two layouts share."""

LAYOUTS = {
    "1x16": {"per_device_train_batch_size": 16},
    "4x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "2x8": {"per_device_train_batch_size": 8},  # on two processes
}


@pytest.fixture
def layout(toy, train):
    """Train the toy recipe on a layout by its name."""

    def run(name: str, training: dict | None = None, **changes) -> Run:
        recipe = toy(name, training={**LAYOUTS[name], **(training or {})}, **changes)
        return launched(recipe) if name == "2x8" else train(recipe)

    return run


def launched(recipe: Path, configuration: Path = MULTI_CPU) -> Run:
    """Train a recipe on two processes as a user would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(configuration), "--main_process_port", port]
    found = subprocess.run(
        [sys.executable, *launcher, "-m", "scalepeft.train", str(recipe)],
        cwd=recipe.parent,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return Run(recipe.with_suffix(""))


def figures(run: Run, *names: str) -> torch.Tensor:
    """The named figures of every line of metrics.jsonl that has them."""
    lines = [[line["step"], *(line[n] for n in names)] for line in run.lines() if names[0] in line]
    assert lines
    return torch.tensor(lines, dtype=torch.float64)


def weights(run: Run) -> torch.Tensor:
    saved = load_file(run.path / "adapter/adapter_model.safetensors")
    return torch.cat([saved[name].flatten() for name in sorted(saved)])


def check_same_numbers(run: Run, other: Run) -> None:
    assert run.record["layout"]["global_batch_size"] == other.record["layout"]["global_batch_size"] == 16
    assert torch.equal(figures(run, "learning_rate"), figures(other, "learning_rate"))
    torch.testing.assert_close(figures(run, "loss", "grad_norm"), figures(other, "loss", "grad_norm"), rtol=CLOSE, atol=1e-6)
    distance = (weights(run) - weights(other)).norm() / weights(other).norm()
    assert distance < CLOSE
    measured = [figures(each, "eval_loss", "eval_accuracy", "eval_f1_macro") for each in (run, other)]
    torch.testing.assert_close(*measured, rtol=CLOSE, atol=1e-6)
    assert run.record["evaluation"]["test"]["after"]["confusion"] == other.record["evaluation"]["test"]["after"]["confusion"]


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, ...]]:
    """The rows of every micro-batch that training takes in this process."""
    from scalepeft.trainer import Rows

    found: list[tuple[int, ...]] = []
    getitems = Rows.__getitems__

    def recording(self, indices):
        if len(self) == 70:  # the training rows; there are 30 for evaluation
            found.append(tuple(indices))
        return getitems(self, indices)

    monkeypatch.setattr(Rows, "__getitems__", recording)
    return found


def steps(taken: list[tuple[int, ...]], accumulation: int, an_epoch: int) -> list[set[int]]:
    """The rows of every optimizer step."""
    epochs = [taken[start : start + an_epoch] for start in range(0, len(taken), an_epoch)]
    return [set().union(*epoch[i : i + accumulation]) for epoch in epochs for i in range(0, an_epoch, accumulation)]


# 70 rows: four steps of 16 and one of 6, which neither 4 x 4 nor 2 x 8 divides evenly


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_accumulation_changes_no_number(layout, strategy):
    training = {"train_sampling_strategy": strategy}
    check_same_numbers(layout("4x4", training, **EXACT), layout("1x16", training, **EXACT))


@pytest.mark.parametrize("strategy", [pytest.param("random", marks=pytest.mark.long), "group_by_length"])
def test_two_processes_change_no_number(layout, strategy):
    training = {"train_sampling_strategy": strategy}
    run = layout("2x8", training, **EXACT)
    assert run.record["layout"]["processes"] == 2
    assert run.record["layout"]["engine"] == "MULTI_CPU"
    assert sum(map(sum, run.record["evaluation"]["test"]["after"]["confusion"])) == 30
    check_same_numbers(run, layout("1x16", training, **EXACT))
    assert predict.evaluate(run)["test"]["loss"] == pytest.approx(run.record["metrics"]["after"]["loss"], rel=CLOSE)


def test_with_dropout_rows_and_rates_are_the_same(layout, taken):
    whole = layout("1x16")
    rows = steps(taken, accumulation=1, an_epoch=5)
    taken.clear()
    parts = layout("4x4")
    assert steps(taken, accumulation=4, an_epoch=18) == rows
    assert [len(of) for of in rows] == [16, 16, 16, 16, 6] * 4
    assert torch.equal(figures(parts, "learning_rate"), figures(whole, "learning_rate"))
    assert not torch.equal(figures(parts, "loss"), figures(whole, "loss")), "there was no dropout"


@pytest.mark.long
def test_two_processes_go_on_where_they_broke_off(toy, layout, tmp_path):
    straight = layout("2x8")
    copy = tmp_path / "run"
    recipe = toy("run", training=LAYOUTS["2x8"])
    shutil.copytree(straight.path, copy)
    for left in ("adapter", "checkpoint-15", "checkpoint-20"):  # as if it had died in step 11
        shutil.rmtree(copy / left)
    (copy / "verification.safetensors").unlink()
    Run(copy).update(status="running")
    again = launched(recipe)
    assert again.record["status"] == "complete"
    assert torch.equal(figures(again, "loss", "grad_norm"), figures(straight, "loss", "grad_norm"))
    assert torch.equal(weights(again), weights(straight))


def test_upstreams_own_loss_grows_with_accumulation(toy):
    """Why the loss is our own: a control that fails when upstream has mended it."""
    from transformers import Trainer, TrainingArguments, set_seed

    from scalepeft import data, model
    from scalepeft.tasks import SequenceClassification
    from scalepeft.trainer import Rows

    quiet_upstream()
    recipe = recipes.load(toy(**EXACT))
    tokenizer = model.tokenizer(recipe)
    corpus = data.prepare(recipe, tokenizer, limit=64)
    first = {}
    for name in ("1x16", "4x4"):
        set_seed(42)
        built, _ = model.build(recipe, corpus.label_names, total_steps=1)
        given = {"max_steps": 1, "logging_steps": 1, "train_sampling_strategy": "sequential", "use_cpu": True, **LAYOUTS[name]}
        args = TrainingArguments(output_dir=str(recipe.output_dir), disable_tqdm=True, dataloader_pin_memory=False, **given)
        collate = SequenceClassification(tokenizer, corpus.label_names).collate
        upstream = Trainer(model=built, args=args, train_dataset=Rows(corpus.train.rows), data_collator=collate)
        upstream.train()
        first[name] = upstream.state.log_history[0]
    for figure in ("loss", "grad_norm"):
        assert first["4x4"][figure] == pytest.approx(4 * first["1x16"][figure], rel=1e-4)
