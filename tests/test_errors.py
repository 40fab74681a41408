"""Claims about what goes wrong: one line that says where and what, an exit status, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import datasets
import pytest

from scalepeft import cli
from scalepeft.run import Run


@pytest.fixture
def fails(tmp_path, monkeypatch, capfd):
    """Run a command that must fail, here or as a process of its own; returns the one line it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scalepeft.train._verify_in_place_of_this", lambda run, _: pytest.fail(f"{run.path} is trained"))

    def fails(*arguments: object, silent: bool = True) -> str:
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        before, environment = content(tmp_path), dict(os.environ)
        capfd.readouterr()
        try:
            assert cli.main([str(a) for a in arguments]) == 2
        finally:
            os.environ.clear()
            os.environ.update(environment)
        found = capfd.readouterr()
        assert content(tmp_path) == before
        assert not (silent and found.out)
        return one_line(found.err)

    return fails


def one_line(text: str) -> str:
    assert text.endswith("\n"), repr(text)
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    assert len(text) < 600, text
    return text.rstrip("\n")


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def line_of(recipe: Path, text: str) -> str:
    number = next(n for n, line in enumerate(recipe.read_text().splitlines(), 1) if text in line)
    return f"{recipe}:{number}: "


# --- the recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: [sequence\n", "bad.yaml:"),
        ("task:\n\tname: x\n", "bad.yaml:2"),
        ("", "bad.yaml"),
        ("# nothing\n", "bad.yaml"),
        ("- task: x\n- y\n", "bad.yaml"),
        ("just a sentence\n", "bad.yaml"),
        ("task: a\ntask: b\n", "bad.yaml:2"),
    ],
)
def test_a_file_that_is_no_recipe(fails, tmp_path, text, told):
    (tmp_path / "bad.yaml").write_text(text)
    assert fails("train", "bad.yaml").startswith(told)


def test_a_recipe_that_is_not_there(fails, toy):
    toy()
    assert fails("train", "rum.yaml") == "rum.yaml: no such recipe; did you mean 'run.yaml'?"


def test_a_file_that_is_not_text(fails, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(bytes(range(128, 256)))
    assert fails("train", "bad.yaml").startswith("bad.yaml")


def test_a_folder_is_no_recipe(fails, tmp_path):
    (tmp_path / "folder").mkdir()
    assert fails("train", "folder").startswith("folder")


@pytest.mark.parametrize(
    ("changes", "at", "told"),
    [
        ({"task": "sequence-clasification"}, "task:", "did you mean 'sequence-classification'?"),
        ({"adapter": {"peft_type": "LORRA"}}, "peft_type", "did you mean 'LORA'?"),
        ({"training": {"lerning_rate": 1.0}}, "lerning_rate", "did you mean 'learning_rate'?"),
    ],
)
def test_a_wrong_word_in_the_recipe(fails, toy, changes, at, told):
    recipe = toy(**changes)
    found = fails("train", recipe)
    assert found.startswith(line_of(recipe, at))
    assert told in found


def test_several_problems_are_told_at_once_each_on_its_line(toy, command):
    recipe = toy(training={"lerning_rate": 1.0, "output_dyr": "x"}, adapter={"peft_type": "LORA", "rr": 1})
    found = command("train", recipe)
    assert found.returncode == 2
    lines = found.stderr.splitlines()
    assert len(lines) == 3
    assert {line.split(": ")[0] for line in lines} == {
        line_of(recipe, key).split(": ")[0] for key in ("lerning_rate", "output_dyr", "rr:")
    }


# --- what only upstream knows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"bf16": True, "fp16": True}, "bf16"),
        ({"optim": "adamw_of_my_own"}, "adamw_of_my_own"),
        ({"optim": "galore_adamw"}, "galore"),
        ({"optim": "lomo"}, "lomo"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, ""),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 3}}, "cycles"),
        ({"optim_args": "beta1"}, ""),
        ({"report_to": "trackio_of_my_own"}, "trackio_of_my_own"),
        ({"deepspeed": "zero3.json"}, "--launch zero3"),
        ({"fsdp": "full_shard"}, "--launch fsdp2"),
        ({"metric_for_best_model": "accurracy", "load_best_model_at_end": True}, "accurracy"),
        ({"dataloader_prefetch_factor": 4}, "prefetch"),
        ({"per_device_train_batch_size": 0}, ""),
        ({"num_train_epochs": -1}, ""),
        ({"logging_steps": 0}, ""),
        ({"torch_compile_backend": "of_my_own"}, "of_my_own"),
        ({"parallelism_config": {"a": 1}}, ""),
    ],
    ids=str,
)
def test_training_options_that_upstream_refuses(fails, toy, training, told):
    found = fails("train", toy(training=training))
    assert "training" in found
    assert told in found.casefold()


def test_an_option_that_is_refused_only_when_training_begins(fails, toy):
    assert "liger" in fails("train", toy(training={"use_liger_kernel": True}), silent=False)


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["./no-such-model", "/no/such/model", "no-such-model", "nobody/no-such-model", "fetched:nothing"]
)
def test_a_model_that_is_nowhere(fails, toy, name):
    recipe = toy(model={"name_or_path": name})
    found = fails("train", recipe)
    assert found.startswith(line_of(recipe, "name_or_path"))
    assert name in found


def test_a_folder_without_a_model(fails, toy, tmp_path):
    (tmp_path / "empty").mkdir()
    recipe = toy(model={"name_or_path": str(tmp_path / "empty")})
    assert fails("train", recipe).startswith(line_of(recipe, "name_or_path"))


def test_weights_that_are_torn(fails, toy, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "torn")
    weights = tmp_path / "torn/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    recipe = toy(model={"name_or_path": str(tmp_path / "torn")})
    assert fails("train", recipe).startswith(line_of(recipe, "name_or_path"))


def test_weights_in_a_pickle_are_refused(fails, toy, tiny_model, tmp_path):
    import torch
    from safetensors.torch import load_file

    shutil.copytree(tiny_model, tmp_path / "pickled")
    weights = tmp_path / "pickled/model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled/pytorch_model.bin")
    weights.unlink()
    recipe = toy(model={"name_or_path": str(tmp_path / "pickled")})
    found = fails("train", recipe)
    assert found.startswith(line_of(recipe, "name_or_path"))
    assert "safetensors" in found


def test_an_adapter_in_a_pickle_is_refused(fails, toy, complete, tmp_path):
    import torch
    from safetensors.torch import load_file

    shutil.copytree(complete.path / "adapter", tmp_path / "pickled")
    weights = tmp_path / "pickled/adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled/adapter_model.bin")
    weights.unlink()
    recipe = toy(adapter={"name_or_path": str(tmp_path / "pickled")})
    found = fails("train", recipe)
    assert found.startswith(line_of(recipe, "pickled"))
    assert "no adapter_model.safetensors" in found


def test_an_adapter_that_is_nowhere(fails, toy):
    recipe = toy(adapter={"name_or_path": "./no-such-adapter"})
    found = fails("train", recipe)
    assert found.startswith(line_of(recipe, "./no-such-adapter"))
    assert "no-such-adapter" in found


@pytest.mark.parametrize("adapter", [{"r": 0}, {"r": -4}, {"target_modules": "(("}, {"layers_to_transform": [99]}], ids=str)
def test_adapter_options_that_peft_refuses(fails, toy, adapter):
    assert "adapter" in fails("train", toy(adapter=adapter))


# --- the data ------------------------------------------------------------------------------------------------------


def test_a_column_that_is_not_there(fails, toy):
    recipe = toy(data={"text_columns": "txt"})
    found = fails("train", recipe)
    assert found.startswith(line_of(recipe, "text_columns"))
    assert "did you mean 'text'?" in found


def test_a_split_that_is_not_there(fails, toy, tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["good", "bad"] * 8, "label": ["positive", "negative"] * 8})
    datasets.DatasetDict(train=rows, validation=rows).save_to_disk(tmp_path / "saved")
    recipe = toy(data={"train": {"path": str(tmp_path / "saved"), "split": "valid"}})
    found = fails("train", recipe)
    assert found.startswith(line_of(recipe, "split: valid"))
    assert "train, validation" in found


@pytest.mark.parametrize("text", [b'text,label\n"never closed,positive\n', "text,label\ngood,positive\n".encode("utf-16"), b""])
def test_a_csv_that_cannot_be_read(fails, toy, tmp_path, text):
    (tmp_path / "broken.csv").write_bytes(text)
    recipe = toy(data={"train": {"path": str(tmp_path / "broken.csv")}})
    assert fails("train", recipe).startswith(line_of(recipe, "broken.csv"))


def test_labels_of_another_set(fails, toy, tmp_path):
    (tmp_path / "other.csv").write_text("text,label\n" + "good,entailment\nbad,neutral\n" * 8)
    found = fails("train", toy(data={"evaluation": {"other": {"path": str(tmp_path / "other.csv")}}}))
    assert "entailment" in found
    assert "'negative', 'positive'" in found


# --- the run directory ---------------------------------------------------------------------------------------------


def test_an_output_directory_that_is_no_run(fails, toy, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/letter.txt").write_text("dear")
    recipe = toy()
    assert fails("train", recipe).startswith(line_of(recipe, "output_dir:"))


def test_fresh_moves_runs_aside_and_nothing_else(fails, toy, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/letter.txt").write_text("dear")
    recipe = toy()
    assert fails("train", recipe, "--fresh").startswith(line_of(recipe, "output_dir:"))


def test_rows_too_few_for_a_step_leave_nothing_behind(fails, toy):
    few = toy(training={"per_device_train_batch_size": 500, "dataloader_drop_last": True})
    assert "leaves no batch" in fails("train", few, silent=False)


def test_an_output_directory_that_is_a_file(fails, toy, tmp_path):
    (tmp_path / "run").write_text("dear")
    recipe = toy()
    assert fails("train", recipe).startswith(line_of(recipe, "output_dir:"))
    assert "output_dir" in fails("train", recipe, f"training.output_dir={tmp_path}/run/below")


@pytest.mark.parametrize("damaged", [b'{"status": "comp', b"[1]", b"\xff\xfe\x00"])
def test_a_damaged_record(fails, toy, tmp_path, damaged):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_bytes(damaged)
    assert "run.json: is damaged" in fails("train", toy())


def test_a_place_where_nothing_can_be_made(fails, toy):
    recipe = toy(training={"output_dir": "/proc/run"})
    found = fails("train", recipe)
    assert found.startswith(line_of(recipe, "output_dir:"))
    assert "/proc" in found


@pytest.fixture
def mounted(tmp_path):
    """A file system of a size, mounted in this test's folder; called again, it is given other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        again = ["-o", f"remount,{options}"] if os.path.ismount(folder) else ["-o", options, "-t", "tmpfs"]
        found = subprocess.run(["mount", *again, "tmpfs", folder], capture_output=True, text=True, check=False)
        if found.returncode:
            pytest.skip(f"this machine mounts nothing for us: {found.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", folder], check=True)  # a traceback may hold a file open


def test_a_read_only_disk(fails, toy, mounted):
    recipe = toy(training={"output_dir": str(mounted("ro,size=1m") / "run")})
    found = fails("train", recipe)
    assert found.startswith(line_of(recipe, "output_dir:"))
    assert "cannot be written" in found


def train_on_a_full_disk(recipe: Path, capfd) -> tuple[int, str]:
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    environment = dict(os.environ)
    capfd.readouterr()
    try:
        status = cli.main(["train", str(recipe)])
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return status, capfd.readouterr().err


@pytest.fixture
def full(toy, mounted, monkeypatch, capfd, complete, train):  # noqa: PLR0917  # fixtures
    """Train on a disk of a size in KiB, then with enough space; returns what was said and whether something was kept."""
    monkeypatch.setattr("scalepeft.train._verify_in_place_of_this", lambda *_: None)
    folder = mounted("size=4m")
    recipe = toy(training={"output_dir": str(folder / "run")})

    def full(size: int) -> tuple[str, bool]:
        mounted(f"size={size}k")
        status, told = train_on_a_full_disk(recipe, capfd)
        run = Run(folder / "run")
        if status == 0:
            return "", True
        assert status == 2, told
        *steps, last = told.splitlines()
        assert all(line.startswith("step ") for line in steps), told
        kept = run.last_checkpoint()
        mounted("size=8m")
        again = train(recipe)
        assert again.record["status"] == "complete"
        assert (again.path / "adapter/adapter_model.safetensors").read_bytes() == (
            complete.path / "adapter/adapter_model.safetensors"
        ).read_bytes()
        assert not list(again.path.rglob("*.part"))
        shutil.rmtree(folder / "run")
        return last, kept is not None

    return full


@pytest.mark.parametrize(("size", "saved"), [(8, False), (64, False), (300, True)])
def test_a_full_disk_says_what_was_kept_and_goes_on_once_there_is_space(full, size, saved):
    told, kept = full(size)
    assert kept == saved
    assert "the disk is full" in told or "No space left on device" in told
    assert ("kept: " in told) == saved


@pytest.mark.long
def test_a_disk_that_is_full_at_any_moment(full):
    for size in range(4, 1000, 28):
        told, _ = full(size)
        assert not told or "the disk is full" in told or "No space left on device" in told, f"{size}k"


# --- no network ----------------------------------------------------------------------------------------------------


def test_offline_a_hub_id_and_the_cache_are_named(fails, toy):
    found = fails("train", toy(model={"name_or_path": "nobody/no-such-model"}))
    assert "'nobody/no-such-model'" in found
    assert os.environ["HF_HOME"] in found
    found = fails("train", toy(data={"train": {"path": "nobody/no-such-rows", "split": "train"}}))
    assert "nobody/no-such-rows" in found
    assert os.environ["HF_HOME"] in found


@pytest.mark.parametrize(
    "changes", [{"model": {"name_or_path": "nobody/none"}}, {"data": {"train": {"path": "nobody/none"}}}], ids=["model", "data"]
)
def test_an_unreachable_hub_is_an_error_within_a_minute(toy, command, tmp_path, changes):
    recipe = toy(**changes)
    before, started = content(tmp_path), time.monotonic()
    found = command(
        "train",
        recipe,
        HF_HUB_OFFLINE="0",
        HF_DATASETS_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path.parent / "none"),
    )
    seconds = time.monotonic() - started
    assert found.returncode == 2
    told = one_line(found.stderr)
    assert told.startswith(line_of(recipe, "nobody/none"))
    assert "cannot be reached" in told
    assert str(tmp_path.parent / "none") in told
    assert content(tmp_path) == before
    assert seconds < 60


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_what_is_no_run_is_named(fails, tmp_path, toy, verb):
    toy()
    rest = ["--data", "test.csv", "--output", "out.csv"] if verb == "predict" else []
    assert "is not a run directory" in fails(verb, tmp_path, *rest)
    assert "is not a run directory" in fails(verb, tmp_path / "nothing", *rest)


def test_code_that_comes_with_a_model_is_not_run(toy, tiny_model, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(tiny_model, own)
    config = json.loads((own / "config.json").read_text())
    named = {"AutoConfig": "code.OwnConfig", "AutoModelForSequenceClassification": "code.OwnModel"}
    (own / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": named}))
    (own / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    recipe = toy(model={"name_or_path": str(own)})
    assert cli.main(["train", str(recipe)]) == 2
    assert "model.name_or_path" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
