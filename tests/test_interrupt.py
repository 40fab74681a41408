"""Claims about runs that are stopped: asked to, told twice, or killed. Each goes on as if nothing had happened."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scalepeft.errors import UserError
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

    def __init__(self, recipe: Path) -> None:
        self.run = Run(recipe.with_suffix(""))
        self.log = recipe.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scalepeft", "train", recipe], stdout=subprocess.DEVNULL, stderr=log, cwd=recipe.parent
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

    def start(recipe: Path) -> Process:
        started.append(Process(recipe))
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
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
    check_as_if_nothing_had_happened(train(recipe), straight)


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


def test_killed_it_goes_on(toy, train, start, straight):
    recipe = toy(training=LONG)
    process = start(recipe)
    process.wait_for_step(47)
    assert process.signal(signal.SIGKILL) == -signal.SIGKILL
    assert process.run.record["status"] == "running"
    assert 0 < int(process.run.last_checkpoint().name.rpartition("-")[2]) < STEPS
    check_as_if_nothing_had_happened(train(recipe), straight)


@pytest.mark.long
def test_killed_again_and_again_it_arrives(toy, train, start, straight):
    recipe = toy(training=LONG)
    for step in (1, 9, 10, 11, 30, 31, 60, 75, 100, 140):
        process = start(recipe)
        process.wait_for_step(step)
        process.signal(signal.SIGKILL)
    check_as_if_nothing_had_happened(train(recipe), straight)


@pytest.mark.long
def test_killed_while_it_saves_it_goes_on(toy, train, start, straight):
    recipe = toy(training=LONG)
    for step in range(10, 60, 10):
        process = start(recipe)
        folder = process.run.path / f"checkpoint-{step}"
        process.wait_for(folder.exists)
        process.signal(signal.SIGKILL)
    check_as_if_nothing_had_happened(train(recipe), straight)


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
