"""Launching: the files of accelerate_configs/, the line a command stands for, and what is refused before anything starts."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path

import pytest
import yaml

from scalepeft import launch
from scalepeft.errors import UserError
from scalepeft.launch import Machines

FILES = sorted((Path(__file__).parents[1] / "accelerate_configs").glob("*.yaml"))
ENGINES = {
    "cpu": "NO",
    "single_gpu": "NO",
    "multi_cpu": "MULTI_GPU",
    "multi_gpu": "MULTI_GPU",
    **dict.fromkeys(("zero1", "zero2", "zero3", "zero3_offload"), "DEEPSPEED"),
    **dict.fromkeys(("fsdp2", "fsdp2_qlora"), "FSDP"),
}


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setattr(launch, "_gpus", lambda: 0)
    monkeypatch.setattr(launch, "_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)


def line(name: str, processes: int | None = None, *, cpu: bool = False, **machines) -> launch.Line:
    return launch.line(
        launch.layout(name), "scalepeft.train", ["r.yaml"], processes=processes, cpu=cpu, machines=Machines(**machines)
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_file_says_when_to_choose_it_and_holds_processes_and_engine_only(file):
    text = file.read_text()
    name = file.stem.removeprefix("deepspeed_")
    head = [row for row in text.splitlines() if row.startswith("# ")]
    assert text.startswith("# ")
    assert len(" ".join(head)) > 60
    assert f"--launch {name}" in text
    assert not re.search("mixed_precision|accumulation|clipping|bf16:|fp16:|learning", text)
    values = yaml.safe_load(text)
    assert ENGINES[name] == launch.layout(name).engine == values["distributed_type"]


def test_every_engine_has_a_file_and_a_name():
    assert {file.stem.removeprefix("deepspeed_") for file in FILES} == set(ENGINES)
    assert launch.layout("zero3") == launch.layout("deepspeed_zero3")


@pytest.mark.parametrize("name", [name for name in ENGINES if ENGINES[name] in ("MULTI_GPU", "DEEPSPEED")])
def test_cpu_runs_every_file_of_ddp_and_zero_unedited(name):
    found = line(name, 4, cpu=True)
    assert f"--config_file {launch._shown(launch.layout(name).path)} --num_processes 4 --main_process_port 0" in str(found)
    assert str(found).endswith(" -m scalepeft.train r.yaml")
    # accelerate runs DDP in the place of DeepSpeed where its own variable is set
    own = found.environment.get("ACCELERATE_USE_CPU")
    assert own == (None if ENGINES[name] == "DEEPSPEED" else "true")
    assert found.environment.get("DS_ACCELERATOR") == ("cpu" if ENGINES[name] == "DEEPSPEED" else None)
    assert found.environment["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize("name", ["multi_gpu", "zero2", "fsdp2"])
def test_all_gpus_are_used_when_nothing_is_said(name, monkeypatch):
    monkeypatch.setattr(launch, "_gpus", lambda: 4)
    assert "--num_processes 4" in str(line(name))
    assert line(name).environment == {}
    there = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "node0", "main_process_port": 2345}
    machines = "--num_processes 8 --num_machines 2 --machine_rank 1 --main_process_ip node0 --main_process_port 2345"
    assert machines in str(line(name, **there))


def test_accelerate_understands_the_line(monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.setattr(launch, "_gpus", lambda: 4)
    there = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "node0", "main_process_port": 2345}
    words = shlex.split(str(line("zero3", **there)))
    assert words[:2] == ["accelerate", "launch"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert (args.use_deepspeed, args.zero_stage, args.num_processes, args.machine_rank) == (True, 3, 8, 1)
    assert args.deepspeed_multinode_launcher == "standard"  # else it would start the other machines by ssh
    assert (args.module, args.training_script, args.training_script_args) == (True, "scalepeft.train", ["r.yaml"])


@pytest.mark.parametrize(
    ("name", "processes", "options", "told"),
    [
        ("zero33", None, {}, "there is no layout 'zero33'; did you mean 'zero3'?"),
        ("pyproject.toml", None, {}, "is no launch file"),
        ("multi_gpu", 2, {}, "needs GPUs, and none is seen here; --cpu runs it on CPUs"),
        ("single_gpu", None, {}, "needs GPUs, and none is seen here; --launch cpu"),
        ("fsdp2", 2, {}, "needs GPUs"),
        ("fsdp2", 2, {"cpu": True}, "accelerate runs DDP in place of FSDP on CPUs"),
        ("cpu", 2, {}, "starts one process, whatever is asked for; --launch multi_cpu"),
        ("multi_cpu", 1, {}, "starts several processes, and one is asked for; cpu is the layout of one"),
        ("multi_cpu", 0, {}, "is below 1"),
        ("multi_cpu", 3, {"num_machines": 2, "main_process_ip": "a", "main_process_port": 1}, "divided evenly"),
        ("multi_cpu", 4, {"num_machines": 2}, "--main-process-ip"),
    ],
)
def test_a_launch_that_would_not_be_what_was_asked_for(name, processes, options, told, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(UserError) as error:
        line(name, processes, **options)
    (problem,) = error.value.problems
    assert told in problem


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(launch, "_gpus", lambda: 1)
    with pytest.raises(UserError, match="8 processes a machine, and this one has 1 GPU"):
        line("multi_gpu", 8)


def test_a_file_of_accelerates_own_that_starts_one_process(tmp_path):
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n")
    with pytest.raises(UserError, match=r"MULTI_CPU.* starts one process"):
        line(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("words", "at"),
    [
        (["python", "/venv/bin/accelerate", "launch", "--num_processes", "2"], 3),
        (["python", "-m", "accelerate.commands.launch", "-m", "x"], 3),
        (["/venv/bin/python", "/venv/bin/accelerate-launch", "x.py"], 2),
        (["bash", "/home/me/accelerate/run.sh"], None),
        (["/envs/accelerate/bin/python", "-m", "scalepeft", "train"], None),
    ],
)
def test_only_accelerates_own_launcher_is_taken_for_it(words, at):
    assert launch._after_launch(words) == at


def test_options_of_a_launch_without_one(command, toy):
    found = command("train", toy(), "--num-processes", "2")
    assert found.returncode == 2
    assert found.stderr == "command line: --num-processes and what is said of machines go with --launch\n"


def test_the_layout_of_one_process_runs_in_place(command, toy, tmp_path):
    found = command("train", toy(training={"max_steps": 2, "eval_strategy": "no", "eval_on_start": False}), "--launch", "cpu")
    assert found.returncode == 0, found.stderr
    assert found.stderr.startswith("ACCELERATE_USE_CPU=true OMP_NUM_THREADS=")
    assert found.stderr.splitlines()[0].endswith(
        f"accelerate_configs/cpu.yaml --num_processes 1 -m scalepeft.train {tmp_path}/run.yaml"
    )
    assert "  layout   1 process · cpu" in found.stdout


def test_a_signal_to_a_launcher_without_processes_stops_what_has_not_begun_and_nothing_that_is_done():
    with pytest.raises(KeyboardInterrupt):
        launch._pass_on(lambda: False, signal.SIGTERM)
    launch._pass_on(lambda: True, signal.SIGTERM)
