"""Claims about going on: stopped anywhere and taken up again, a training is to the bit the one that nothing stopped."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import train_here, write_toy
from safetensors import SafetensorError
from stopped import carry_out
from test_layout import CLOSE, STILL, measured

from scalepeft import launch, parts, published, session
from scalepeft import recipe as recipes
from scalepeft.checkpoint import save_state
from scalepeft.errors import UserError
from scalepeft.run import Run, fingerprint, packages

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


def launched(folder: Path, plan: list, layout: str) -> None:
    """Carry out a plan in the two processes of one launch."""
    (folder / "plan.json").write_text(json.dumps([[str(recipe), places, finish] for recipe, places, finish in plan]))
    chosen, fsdp = launch.layout(layout), layout.startswith("fsdp")
    options = ["--config_file", str(chosen.path), "--num_processes", "2", "--main_process_port", "0"]
    words = [*options, str(Path(__file__).with_name("stopped.py")), str(folder / "plan.json")]
    on_cpus = {"SCALEPEFT_TESTS_FSDP_ON_CPU": "1"} if fsdp else launch._without_devices(chosen.engine)
    found = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        env=os.environ | on_cpus | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert found.returncode == 0, found.stderr[-6000:]


@pytest.mark.parametrize("strategy", ["steps", pytest.param("epoch", marks=pytest.mark.long)])
def test_one_process_goes_on_to_the_bit(toy, strategy):
    training = NOISY if strategy == "steps" else NOISY | {f"{what}_strategy": "epoch" for what in ("eval", "save", "logging")}
    places = [(where, step, 0) for where, step, _ in PLACES]
    if strategy == "epoch":
        places[2:] = [("step", 8, 0), ("save", 10, 0)]
    straight = train_here(toy("straight", training=training))
    run = carry_out(toy(training=training), places, training=train_here)
    same_to_the_byte(run, straight)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["multi_cpu", "zero2", "zero3", "fsdp2"])
def test_several_processes_go_on_to_the_bit(layout, tmp_path, tiny_model):
    training = NOISY | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    recipes = [write_toy(tmp_path, tiny_model, name, training=training) for name in ("straight", "run")]
    launched(tmp_path, [(recipes[0], [], True), (recipes[1], PLACES, True)], layout)
    same_to_the_byte(Run(tmp_path / "run"), Run(tmp_path / "straight"))


@pytest.mark.long
def test_another_number_of_processes_takes_the_same_rows_to_the_same_result(tmp_path, tiny_model):
    still = {"model": {"config": STILL}, "adapter": {"lora_dropout": 0.0}, "global_batch_size": 16}
    training = NOISY | {"neftune_noise_alpha": None, "per_device_train_batch_size": 4}
    straight, more, fewer = (
        write_toy(tmp_path, tiny_model, name, training=training, **still) for name in ("straight", "more", "fewer")
    )
    train_here(straight)
    carry_out(more, [("step", 4, 0)], finish=False, training=train_here)
    launched(tmp_path, [(more, [], True), (fewer, [("step", 7, 1)], False)], "multi_cpu")
    train_here(fewer)
    for name in ("more", "fewer"):
        apart = measured(Run(tmp_path / name), Run(tmp_path / "straight"))
        assert max(apart.values()) < CLOSE, apart


# --- checkpoints that can be trusted ------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(complete, tmp_path, toy):
    """A recipe, and a run of it that died before its end: checkpoints after steps 5, 10 and 15 of 20."""
    recipe, run = toy(), Run(tmp_path / "run")
    shutil.copytree(complete.path, run.path)
    for left in ("adapter", "checkpoint-20"):
        shutil.rmtree(run.path / left)
    (run.path / "verification.safetensors").unlink()
    resolved = (run.path / "resolved.yaml").read_text().replace(str(complete.path.parent), str(tmp_path))
    (run.path / "resolved.yaml").write_text(resolved)
    for checkpoint in published.named(run.path):  # a recipe is another one with the paths of its data
        moved = published.manifest(checkpoint) | {"recipe": fingerprint(recipes.load(recipe))}
        (checkpoint / published.MANIFEST).write_text(json.dumps(moved))
    run.update(status="running")
    return recipe, run


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FLAWS = {
    "flipped": (lambda folder: flip(folder / "optimizer.safetensors"), "optimizer.safetensors does not hold what was saved"),
    "cut": (lambda folder: os.truncate(folder / "trainer_state.json", 10), "trainer_state.json has 10 bytes, not "),
    "missing": (lambda folder: (folder / "process_0.safetensors").unlink(), "process_0.safetensors is missing"),
    "unreadable": (lambda folder: os.truncate(folder / published.MANIFEST, 10), "checkpoint.json cannot be read"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_a_damaged_checkpoint_is_known(unfinished, name):
    (_, run), (damage, told) = unfinished, FLAWS[name]
    last = run.last_checkpoint()
    assert published.flaw(last, contents=True) is None
    damage(last)
    assert published.flaw(last, contents=True).startswith(told)
    assert (run.last_checkpoint() == last) == (name == "flipped"), "sizes are always compared"


def test_the_one_before_a_damaged_checkpoint_is_taken_and_that_is_said(unfinished, complete, train, capfd):
    recipe, run = unfinished
    FLAWS["flipped"][0](run.path / "checkpoint-15")
    train(recipe)
    told = f"{run.path}/checkpoint-15: {FLAWS['flipped'][1]}; resuming from checkpoint-10 in its place"
    assert told in capfd.readouterr().err.splitlines()
    same_to_the_byte(run, complete)


def test_when_no_checkpoint_is_whole_nothing_begins_anew(unfinished, train):
    recipe, run = unfinished
    for step in (5, 10, 15):
        FLAWS["flipped"][0](run.path / f"checkpoint-{step}")
    before = {path: path.read_bytes() for path in run.path.rglob("*.jsonl")}
    with pytest.raises(UserError, match=r"no checkpoint is whole \(checkpoint-15: optimizer.*train anew with --fresh"):
        train(recipe)
    assert {path: path.read_bytes() for path in run.path.rglob("*.jsonl")} == before
    assert len(published.named(run.path)) == 3


def test_what_has_no_manifest_is_no_checkpoint(unfinished, complete, train):
    recipe, run = unfinished
    (run.path / "checkpoint-15" / published.MANIFEST).unlink()
    assert published.step_of(run.last_checkpoint()) == 10
    train(recipe)
    same_to_the_byte(run, complete)


def test_the_oldest_checkpoints_are_retired_but_never_the_best(tmp_path):
    for step in (5, 10, 15, 20):
        published.beside(tmp_path, step).mkdir()
        published.publish(tmp_path, step, {"files": {}})
    (tmp_path / "checkpoint-25").mkdir()  # was never published: it does not count
    published.rotate(tmp_path, 2, str(tmp_path / "checkpoint-5"))
    assert [path.name for path in published.named(tmp_path)] == ["checkpoint-5", "checkpoint-20"]
    published.rotate(tmp_path, 1, str(tmp_path / "checkpoint-5"))
    assert len(published.named(tmp_path)) == 2
    published.rotate(tmp_path, None, None)
    published.rotate(tmp_path, 1, None)
    assert [path.name for path in published.named(tmp_path)] == ["checkpoint-20"]
    assert published.leftovers(tmp_path) == [tmp_path / "checkpoint-25"]


class Bomb:
    """What runs when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.file,))


@pytest.mark.long
def test_no_file_of_a_checkpoint_can_run_code(unfinished, train, tmp_path):
    """Each is replaced by a pickle, in torch's form and in the plain one, and the manifest by one that fits."""
    recipe, run = unfinished
    kept, exploded = shutil.copytree(run.path, tmp_path / "kept"), tmp_path / "exploded"
    names = list(published.manifest(run.path / "checkpoint-15")["files"])
    assert {"adapter_model.safetensors", "optimizer.safetensors", "scheduler.safetensors", "trainer_state.json"} < set(names)
    for name, dump in itertools.product(names, (pickle.dump, torch.save)):
        shutil.rmtree(run.path)
        shutil.copytree(kept, run.path)
        checkpoint = run.path / "checkpoint-15"
        with (checkpoint / name).open("wb") as file:
            dump(Bomb(exploded), file)
        manifest = published.manifest(checkpoint)
        manifest["files"] = {n: d for n, d in published.digests(checkpoint, 0).items() if n != published.MANIFEST}
        (checkpoint / published.MANIFEST).write_text(json.dumps(manifest))
        with contextlib.suppress(Exception):  # whether the file is read at all is not the claim
            train(recipe)
        assert not exploded.exists(), name
    Bomb(exploded).__reduce__()[0](exploded)
    assert exploded.exists(), "the bomb is none"


def test_resuming_unpickles_nothing(unfinished, complete, train):
    recipe, run = unfinished
    found: list[object] = []
    watching = [True]
    sys.addaudithook(lambda event, given: found.append(given) if watching and event == "pickle.find_class" else None)
    train(recipe)
    watching.clear()
    same_to_the_byte(run, complete)
    assert not found


def test_a_part_of_deepspeeds_is_read_without_unpickling(tmp_path):
    for dump in (pickle.dump, torch.save):
        with (tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").open("wb") as file:
            dump(Bomb(tmp_path / "exploded"), file)
        with pytest.raises(SafetensorError):
            parts._load(None, str(tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    assert not (tmp_path / "exploded").exists()
    save_state({"optimizer_state_dict": {"loss_scaler": ["Bomb", {}]}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="'Bomb' is no loss scaler"):
        parts._load(None, str(tmp_path / "other.pt"))


def test_a_loss_scaler_of_deepspeeds_comes_back_as_it_was(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    numbers = {"init_scale": 2**16, "scale_window": 1000, "min_scale": 1, "delayed_shift": 2, "consecutive_hysteresis": False}
    scaler = DynamicLossScaler(dtype=torch.float16, **numbers)
    scaler.update_scale(overflow=False)
    parts._save(None, {"optimizer_state_dict": {"loss_scaler": scaler}}, str(tmp_path / "part.pt"))
    found = parts._load(None, str(tmp_path / "part.pt"))["optimizer_state_dict"]["loss_scaler"]
    assert type(found) is type(scaler)
    assert vars(found) == vars(scaler)


FACTS = {
    "recipe": "r",
    "data": {"train": "d"},
    "layout": {"processes": 2, "engine": "ZeRO-3", "offloads": False, "global_batch_size": 16},
}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recipe": "other"}, "was saved with another recipe"),
        ({"data": {"train": "other"}}, "was saved with other rows"),
        (
            {"layout": {**FACTS["layout"], "engine": "ZeRO-2"}},
            "was saved by 2 processes of ZeRO-3, and this is 2 processes of ZeRO-2",
        ),
        (
            {"layout": {**FACTS["layout"], "processes": 4}},
            "and this is 4 processes of ZeRO-3: optimizer states that are divided",
        ),
        ({"layout": {**FACTS["layout"], "global_batch_size": 32}}, "its steps are of 16 rows, and would be of 32"),
    ],
)
def test_what_a_checkpoint_cannot_be_resumed_by_is_told(tmp_path, change, told):
    published.beside(tmp_path, 5).mkdir()
    checkpoint = published.publish(tmp_path, 5, {"files": {}, "versions": packages(), **FACTS})
    with pytest.raises(UserError, match=re.escape(told)):
        session._compare(checkpoint, FACTS | change)
    session._compare(checkpoint, FACTS)


def test_what_differs_and_may_is_said(tmp_path, capsys):
    published.beside(tmp_path, 5).mkdir()
    alone = {"layout": {"processes": 1, "engine": "no engine", "offloads": False, "global_batch_size": 16}}
    two = {"layout": {**alone["layout"], "processes": 2, "engine": "DDP"}}
    checkpoint = published.publish(tmp_path, 5, {"files": {}, "versions": packages() | {"peft": "0.0.1"}, **FACTS, **alone})
    session._compare(checkpoint, FACTS | two)
    layout, version = capsys.readouterr().err.splitlines()
    assert "was saved by 1 process, and this is 2 processes of DDP" in layout
    assert "was saved with peft 0.0.1" in version
