"""The processes of one launch: they start alike or not at all, and one that fails ends them all, with its error told once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from conftest import toy_rows, write_csv

from scalepeft import engines
from scalepeft.run import Run

ROOT = Path(__file__).parents[1]
BOUND = 60
"""Seconds within which all processes must be gone; starting them takes ten."""


def launched(folder: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of two processes on CPUs."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs/multi_cpu.yaml"]
    return subprocess.run(
        [*map(str, launcher), "--main_process_port", "0", *map(str, words)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=BOUND,
    )


def told(found: subprocess.CompletedProcess[str]) -> list[str]:
    """What the processes themselves said: the launcher adds a report of its own, which begins with a line of its logger."""
    lines = found.stderr.splitlines()
    ours = next((i for i, line in enumerate(lines) if line[:1] in "WE" and "torch/distributed/elastic" in line), len(lines))
    return [line for line in lines[:ours] if not line.startswith("step ")]


@pytest.fixture
def recipe(toy, tmp_path) -> str:
    write_csv(tmp_path / "rows.csv", toy_rows(70, seed=1))
    (tmp_path / "other").mkdir()
    shutil.copy(toy(data={"train": {"path": "rows.csv"}}), tmp_path / "other" / "run.yaml")
    write_csv(tmp_path / "other" / "rows.csv", toy_rows(70, seed=3))
    return "run.yaml"


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("recipe", "sees another recipe than process 0 (*): training.learning_rate: 0.5, not 0.01"),
        ("installation", "sees another installation than process 0 (*): peft: '0.0.1', not "),
        ("data", "sees another data than process 0 (*): train: "),
        ("missing", "gone.yaml: no such recipe"),
    ],
)
def test_processes_that_see_different_things_do_not_start(recipe, tmp_path, fault, expected):
    found = launched(tmp_path, ROOT / "tests/faulty.py", recipe, FAULT=fault)
    assert found.returncode != 0
    (line,) = told(found)
    before, _, after = expected.partition("*")
    assert line.startswith("process 1 (")
    assert before in line
    assert after in line
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize(("fault", "expected"), [("raise", "ArithmeticError: the fault of process 1"), ("kill", "")])
def test_one_that_dies_ends_all(recipe, tmp_path, fault, expected):
    found = launched(tmp_path, ROOT / "tests/faulty.py", recipe, FAULT=fault)
    assert found.returncode != 0
    lines = told(found)
    if expected:
        assert lines[-1] == expected
        assert sum("Traceback" in line for line in lines) == 1
    else:
        (line,) = lines
        assert "another process of the launch is gone" in line
        assert "SIGKILL" in found.stderr
    record = Run(tmp_path / "run").record
    assert record["status"] == "failed"
    assert record["step"] == 0


@pytest.mark.long
def test_what_all_processes_meet_is_told_once(recipe, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n,positive\n")
    words = ["-m", "scalepeft", "train", recipe, "--launch", "multi_cpu"]
    found = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=BOUND, env=os.environ
    )
    assert found.returncode == 2
    line, *problems = found.stderr.splitlines()
    assert line.startswith("ACCELERATE_USE_CPU=true ")
    assert line.endswith(f"--main_process_port 0 -m scalepeft.train {recipe}")
    assert len(problems) == 2, found.stderr
    assert problems[0].startswith("rows.csv:2: row 1: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_launcher_that_starts_one_process_of_two(recipe, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\nnum_machines: 1\n"
    )
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "mine.yaml", "-m", "scalepeft.train", recipe]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=BOUND)
    assert found.returncode != 0
    assert found.stderr.startswith("accelerate launch was asked for 2 processes and starts one (MULTI_CPU in mine.yaml)")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_fsdp_that_would_become_ddp(recipe, tmp_path):
    words = ["--config_file", ROOT / "accelerate_configs/fsdp2.yaml", "--num_processes", 2, "-m", "scalepeft.train", recipe]
    found = launched(tmp_path, *words)
    assert found.returncode != 0
    (line,) = told(found)
    assert (
        line
        == "accelerate launch: FSDP needs GPUs: on CPUs accelerate runs DDP in its place; zero3 divides the weights there, too"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_launched_run_is_verified_and_ends_with_0(recipe, tmp_path, command):
    found = command("train", recipe, "--launch", "multi_cpu", "--num-processes", "2")
    assert found.returncode == 0, found.stderr
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["status"], record["layout"]["processes"]) == ("complete", 2)
    again = command("train", recipe, "--launch", "multi_cpu", "--num-processes", "2")
    assert (again.returncode, again.stdout.count("is complete already")) == (0, 1)


@pytest.mark.long
def test_four_processes_prepare_once_on_a_cold_cache(recipe, tmp_path):
    cache = tmp_path / "cache"
    found = launched(
        tmp_path, "--num_processes", 4, "-m", "scalepeft.train", recipe, "training.max_steps=1", SCALEPEFT_CACHE=str(cache)
    )
    assert found.returncode == 0, found.stderr
    prepared = Run(tmp_path / "run").record["data"]["preparation"]
    assert {name: len(writers) for name, writers in prepared.items()} == {"train": 1, "test": 1}
    assert len(list((cache / "prepared").glob("[!.]*"))) == 2


@pytest.mark.long
@pytest.mark.parametrize("name", ["multi_cpu", "zero3"])
def test_two_machines_are_given_the_same_line_but_for_the_rank(recipe, tmp_path, name):
    """Two launchers, here on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "scalepeft", "train", recipe, "--launch", name, "--cpu", "--num-processes", "2"]
    words += ["--num-machines", "2", "--main-process-ip", "127.0.0.1", "--main-process-port", port, "--machine-rank"]
    started = [
        subprocess.Popen([*words, rank], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=2 * BOUND) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    record = Run(tmp_path / "run").record
    assert (record["status"], record["layout"]["processes"]) == ("complete", 2)
    assert not said[1][0], "the second machine has nothing to say"


@pytest.mark.long
def test_deepspeed_compiles_once_for_all_processes_and_says_so(recipe, tmp_path, command):
    words = [recipe, "training.max_steps=1", "--launch", "zero2", "--cpu"]
    found = command("train", *words, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("is compiled, once on this machine") == 1
    assert found.stderr.count("is compiled: ") == 1
    assert "built successfully" not in found.stdout + found.stderr


def test_torch_builds_with_the_ninja_of_the_environment_whatever_the_path(tmp_path, monkeypatch):
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    own = Path(sys.executable).parent / "ninja"
    if not own.exists():
        pytest.skip("this environment has no ninja of its own")
    monkeypatch.setenv("PATH", str(tmp_path))
    engines._own_ninja()
    assert shutil.which("ninja") == str(own)


def test_zeros_bucket_for_gradients_holds_what_is_trained_unless_the_launch_file_names_another():
    plugin = DeepSpeedPlugin(zero_stage=2)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad = False
    engines.before_deepspeed(accelerator, model)
    engines.before_deepspeed(accelerator, torch.nn.Linear(9, 9))
    assert plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] == model.weight.numel()
    assert plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] is False, "offload would step DeepSpeedCPUAdam"
