"""Claims about runs that are stopped: asked to, told twice, or killed. Each goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import train_here
from stopped import carry_out

from scalepeft import published, stops
from scalepeft.errors import Interrupted, UserError
from scalepeft.run import Run

STEPS = 150
LONG = {
    "num_train_epochs": STEPS // 5,
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "steps",
    "save_steps": 10,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 25,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_model) -> Run:
    """The run that nothing disturbs."""
    from conftest import train_here, write_toy

    return train_here(write_toy(tmp_path_factory.mktemp("straight"), tiny_model, training=LONG))


class Process:
    """`scalepeft train` as a process of its own."""

    def __init__(self, recipe: Path, *words: str) -> None:
        self.run = Run(recipe.with_suffix(""))
        self.log = recipe.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scalepeft", "train", recipe, *words],
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=recipe.parent,
                start_new_session=True,  # as a terminal gives a command a group of its own
            )

    def wait_for(self, condition) -> None:
        """Wait until something is so, while the process lives."""
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.001)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: any(line["step"] >= step for line in self.run.lines()))

    def signal(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@pytest.fixture
def start():
    """Start a process that ends with the test."""
    started: list[Process] = []

    def start(recipe: Path, *words: str) -> Process:
        started.append(Process(recipe, *words))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def check_as_if_nothing_had_happened(run: Run, straight: Run) -> None:
    def losses(of: Run) -> list[tuple[float, ...]]:
        return [(x["step"], x["loss"], x["grad_norm"], x["learning_rate"]) for x in of.lines() if "loss" in x]

    def evaluated(of: Run) -> list[tuple[float, ...]]:
        return [(x["step"], x["eval_loss"], x["eval_accuracy"]) for x in of.lines() if "eval_loss" in x]

    assert run.record["status"] == "complete"
    assert [step for step, *_ in losses(run)] == list(range(1, STEPS + 1))
    assert losses(run) == losses(straight)
    assert evaluated(run) == evaluated(straight)
    adapters = [(of.path / "adapter/adapter_model.safetensors").read_bytes() for of in (run, straight)]
    assert adapters[0] == adapters[1]
    assert run.record["metrics"] == straight.record["metrics"]
    assert sorted(p.name for p in run.path.iterdir()) == sorted(p.name for p in straight.path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)], ids=lambda n: n.name)
def test_asked_to_stop_it_saves_says_so_and_goes_on(toy, train, start, straight, number):
    recipe = toy(training=LONG)
    process = start(recipe)
    process.wait_for_step(33)
    assert process.signal(number) == 130
    record, run = process.run.record, process.run
    assert record["status"] == "interrupted"
    step = run.last_checkpoint().name.rpartition("-")[2]
    assert f"stopped at step {step} of {STEPS}" in record["reason"]
    *steps, last = process.log.read_text().splitlines()
    assert last == record["reason"]
    assert str(run.path / f"checkpoint-{step}") in last
    assert not [line for line in steps if line and not line.startswith(("step ", "finishing this step"))]
    assert (run.path / stops.INTERRUPTED).exists()
    check_as_if_nothing_had_happened(train(recipe), straight)


@pytest.mark.long
def test_told_twice_it_leaves_at_once_and_keeps_the_last_checkpoint(toy, train, start):
    one_step_an_epoch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 70, "num_train_epochs": 5}
    straight = train(toy("straight", training=one_step_an_epoch))
    recipe = toy(training=one_step_an_epoch)
    process = start(recipe)
    process.wait_for(lambda: process.run.last_checkpoint() is not None)
    process.process.send_signal(signal.SIGINT)
    process.wait_for(lambda: "Ctrl-C again leaves at once" in process.log.read_text())
    assert process.signal(signal.SIGINT) == 130
    assert process.run.record["status"] == "interrupted"
    assert "at once" in process.run.record["reason"]
    assert process.run.last_checkpoint() is not None
    assert "Traceback" not in process.log.read_text()
    again = train(recipe)
    adapters = [(of.path / "adapter/adapter_model.safetensors").read_bytes() for of in (again, straight)]
    assert adapters[0] == adapters[1]


@pytest.mark.long
def test_killed_it_goes_on(toy, train, start, straight):
    recipe = toy(training=LONG)
    process = start(recipe)
    process.wait_for_step(47)
    assert process.signal(signal.SIGKILL) == -signal.SIGKILL
    assert process.run.record["status"] == "running"
    assert 0 < int(process.run.last_checkpoint().name.rpartition("-")[2]) < STEPS
    check_as_if_nothing_had_happened(train(recipe), straight)


@pytest.mark.long
@pytest.mark.parametrize(("layout", "kills"), [("one", 4), ("ddp", 2)])
def test_killed_at_random_moments_it_arrives(layout, kills, monkeypatch):
    """The short form of benchmarks/faults.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import faults

    trials = list(faults.campaign(layout, kills, seed=1))
    found = faults.totals(trials)[layout]
    assert found["kills"] >= kills
    assert faults.holds({layout: found}), trials


def test_a_file_asks_to_stop_and_is_taken_away(toy, monkeypatch):
    monkeypatch.setattr(stops, "_LOOK", 0.0)
    recipe = toy(training={"num_train_epochs": 1})
    run = carry_out(recipe, [("file", 2, 0)], training=train_here)
    assert run.record["status"] == "complete"
    assert not {stops.STOP, stops.INTERRUPTED} & {path.name for path in run.path.iterdir()}


def test_a_request_that_an_earlier_session_did_not_see_stops_no_later_one(toy, train, capfd):
    recipe = toy(training={"num_train_epochs": 1})
    run = Run(recipe.with_suffix(""))
    run.path.mkdir()
    for name in (stops.STOP, stops.INTERRUPTED):
        (run.path / name).touch()
    assert train(recipe).record["status"] == "complete"
    assert f"{run.path / stops.STOP}: of an earlier session; removed" in capfd.readouterr().err
    assert not {stops.STOP, stops.INTERRUPTED} & {path.name for path in run.path.iterdir()}


@pytest.mark.parametrize("number", stops.SIGNALS, ids=lambda n: n.name)
def test_a_signal_while_rows_are_prepared_leaves_at_once_and_says_so(toy, train, monkeypatch, number):
    recipe = toy()
    run, before = Run(recipe.with_suffix("")), signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr("scalepeft.data.prepare", lambda *_, **__: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match="stopped before training; the same command goes on"):
            train(recipe)
    assert [path.name for path in run.path.iterdir()] == [stops.INTERRUPTED]
    assert signal.getsignal(number) == before, "the signal is heard as before"
    assert train(recipe, "training.max_steps=1").record["status"] == "complete"


def test_a_signal_while_the_program_is_loaded_is_heard(toy, start):
    process = start(toy())
    pid = process.process.pid
    heard = 1 << (signal.SIGUSR1 - 1)
    status = Path(f"/proc/{pid}/status")
    process.wait_for(lambda: int(status.read_text().partition("SigCgt:")[2].split()[0], 16) & heard)
    assert process.signal(signal.SIGUSR1) == 130
    assert process.log.read_text().splitlines() == [f"{process.run.path}: stopped before training; the same command goes on"]
    assert [path.name for path in process.run.path.iterdir()] == [stops.INTERRUPTED]


def everyone(process: Process) -> list[psutil.Process]:
    launcher = psutil.Process(process.process.pid)
    return [launcher, *launcher.children(recursive=True)]


WAYS = {
    "Ctrl-C in the terminal": lambda process: os.killpg(process.process.pid, signal.SIGINT),
    "SIGUSR1 to the launcher": lambda process: process.process.send_signal(signal.SIGUSR1),
    "SIGINT to every process": lambda process: [each.send_signal(signal.SIGINT) for each in everyone(process)],
    "SIGTERM to every process": lambda process: [each.send_signal(signal.SIGTERM) for each in everyone(process)],
}


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_one_launched_process_asked_to_stop_is_all_of_them(toy, start, way):
    """With a process that reads rows beside each, which launchers and schedulers signal, too."""
    endless = {"num_train_epochs": 10_000, "save_strategy": "no", "eval_strategy": "no", "dataloader_num_workers": 1}
    process = start(toy(training=endless), "--launch", "multi_cpu", "--num-processes", "2")
    process.wait_for_step(3)
    WAYS[way](process)
    assert process.process.wait(timeout=60) == 130
    record, run = process.run.record, process.run
    step = published.step_of(run.last_checkpoint())
    assert record["status"] == "interrupted"
    assert record["reason"].startswith(f"stopped at step {step} of {record['max_steps']}, saved in ")
    assert (run.path / stops.INTERRUPTED).exists()
    said = process.log.read_text()
    assert said.count(record["reason"]) == 1
    assert "Traceback" not in said
    assert "at once" not in record["reason"]


@pytest.mark.long
def test_a_launcher_that_is_killed_takes_its_processes_with_it(toy, start):
    process = start(
        toy(training={"num_train_epochs": 10_000, "save_strategy": "no", "eval_strategy": "no"}), "--launch", "multi_cpu"
    )
    process.wait_for_step(2)
    launched = everyone(process)
    process.signal(signal.SIGKILL)
    assert psutil.wait_procs(launched, timeout=10)[1] == []


def test_a_second_process_does_not_train_into_the_same_run(toy, train, start):
    recipe = toy(training={"num_train_epochs": 10_000, "save_strategy": "no", "eval_strategy": "no"})
    process = start(recipe)
    process.wait_for_step(2)
    for fresh in (False, True):
        with pytest.raises(UserError) as caught:
            train(recipe, fresh=fresh)
        assert str(caught.value) == f"{process.run.path}: another process is training there"
    assert process.process.poll() is None
    process.wait_for_step(len(process.run.lines()) + 2)
