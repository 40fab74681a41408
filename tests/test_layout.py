"""The loss trap: the same recipe gives the same numbers on whatever layout its global batch is divided."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scalepeft.run import Run

MULTI_CPU = Path(__file__).parents[1] / "accelerate_configs/multi_cpu.yaml"
CLOSE = 1e-5

EXACT = {
    "model": {"config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}},
    "adapter": {"lora_dropout": 0.0},
}
"""Changes of the toy recipe: no random masks, which no two layouts can share."""

LAYOUTS = {
    "16": {"per_device_train_batch_size": 16},
    "4x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "2x8": {"per_device_train_batch_size": 8},  # on two processes
}


def launched(recipe: Path) -> Run:
    """Train a recipe on two processes as a user would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", MULTI_CPU),
            *("--main_process_port", str(port), "-m", "scalepeft.train", recipe),
        ],
        cwd=recipe.parent,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return Run(recipe.with_suffix(""))


def figures(run: Run, *names: str) -> list[list[float]]:
    return [[line["step"], *(line[n] for n in names)] for line in run.lines() if names[0] in line]


def weights(run: Run) -> torch.Tensor:
    saved = load_file(run.path / "adapter/adapter_model.safetensors")
    return torch.cat([saved[name].flatten() for name in sorted(saved)])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, ...]]:
    """The rows of every batch that training takes from the data, in this process."""
    from scalepeft.trainer import Rows

    taken: list[tuple[int, ...]] = []
    getitems = Rows.__getitems__

    def recording(self, indices):
        if len(self) == 70:  # the training rows, not those of the evaluation
            taken.append(tuple(indices))
        return getitems(self, indices)

    monkeypatch.setattr(Rows, "__getitems__", recording)
    return taken


def by_step(taken: list[tuple[int, ...]], micro: int) -> list[set[int]]:
    """The rows of each of an epoch's five steps, of up to 16 rows in micro-batches."""
    rows = [row for batch in taken for row in batch]
    assert max(map(len, taken)) == micro
    return [set(rows[start : start + 16][: 70 - start % 70]) for epoch in range(0, len(rows), 70) for start in range(epoch, epoch + 70, 16)]


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_accumulation_changes_neither_rows_nor_loss_nor_gradient_nor_the_adapter(toy, train, seen, strategy):
    runs, rows = {}, {}
    for name in ("16", "4x4"):
        seen.clear()
        runs[name] = train(toy(name, **EXACT, training={**LAYOUTS[name], "train_sampling_strategy": strategy}))
        rows[name] = [sorted(sum(seen[i : i + 1], ())) for i in range(len(seen))]
    assert [sorted(sum(part, [])) for part in _steps(rows["4x4"], 18)] == [sorted(sum(part, [])) for part in _steps(rows["16"], 5)]
    same_numbers(runs["4x4"], runs["16"])
