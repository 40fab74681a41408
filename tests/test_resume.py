"""Claims about going on: stopped anywhere and taken up again, a training is to the bit the one that nothing stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import train_here, write_toy
from stopped import carry_out

from scalepeft import launch
from scalepeft.run import Run

NOISY = {
    "num_train_epochs": 2,
    "train_sampling_strategy": "group_by_length",
    "neftune_noise_alpha": 5,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "per_device_eval_batch_size": 8,
    "save_strategy": "steps",
    "save_steps": 4,
}
"""Ten steps with dropout and noise, rows grouped by length, a loss that is logged every third step."""
PLACES = [("step", 2, 1), ("evaluation", 5, 0), ("save", 8, 1), ("step", 10, 0)]
"""Between two logs; in an evaluation; while a checkpoint is written; when all steps are done."""


def same_to_the_byte(run: Run, straight: Run) -> None:
    for file in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (run.path / file).read_bytes() == (straight.path / file).read_bytes(), file
    assert run.record["metrics"] == straight.record["metrics"]


def launched(folder: Path, plan: list, layout: str, processes: int = 2) -> None:
    """Carry out a plan in the processes of one launch."""
    (folder / "plan.json").write_text(json.dumps([[str(recipe), places] for recipe, places in plan]))
    line = launch.line(launch.layout(layout), "x", [], processes=processes, cpu=True, machines=launch.Machines())
    options = [word for word in line.arguments if word not in ("-m", "x")]
    words = [*options, str(Path(__file__).with_name("stopped.py")), "plan.json"]
    found = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        cwd=folder,
        env=os.environ | dict(line.environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert found.returncode == 0, found.stderr[-6000:]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_one_process_goes_on_to_the_bit(toy, strategy):
    training = NOISY if strategy == "steps" else NOISY | {f"{what}_strategy": "epoch" for what in ("eval", "save", "logging")}
    places = [(where, step, 0) for where, step, _ in PLACES]
    if strategy == "epoch":
        places[2:] = [("step", 8, 0), ("save", 10, 0)]
    straight = train_here(toy("straight", training=training))
    run = carry_out(toy(training=training), places, train_here)
    same_to_the_byte(run, straight)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["multi_cpu", "zero2", "zero3"])
def test_several_processes_go_on_to_the_bit(layout, tmp_path, tiny_model):
    training = NOISY | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    plan = [(write_toy(tmp_path, tiny_model, name, training=training), places) for name, places in (("straight", []), ("run", PLACES))]
    launched(tmp_path, plan, layout)
    same_to_the_byte(Run(tmp_path / "run"), Run(tmp_path / "straight"))
