"""Claims about the proof after training: only weights that answer as trained make a run complete."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalepeft import predict, verify
from scalepeft.console import quiet_upstream
from scalepeft.errors import RunFailed, UserError, program
from scalepeft.run import Run


@pytest.fixture
def trained(complete, tmp_path) -> Run:
    """A run that is trained and saved, and not verified yet."""
    run = Run(tmp_path / "trained")
    shutil.copytree(complete.path, run.path)
    run.update(status="running", verification=None, ended=None)
    return run


def change(run: Run, how) -> None:
    """Change the saved tensors."""
    (file,) = run.weights.glob("*.safetensors")
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop_the_head(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if "classifier" in n]:
        del tensors[name]


def swap_two_layers(tensors: dict[str, torch.Tensor]) -> None:
    names = [n for n in tensors if "layer.0." in n]
    for name in names:
        other = name.replace("layer.0.", "layer.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def forget_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(n for n in tensors if "lora_B" in n)].zero_()


def one_not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    next(t for n, t in tensors.items() if "classifier" in n and t.dim() == 2)[0, 0] = float("nan")


CORRUPTIONS = [drop_the_head, swap_two_layers, forget_one, one_not_a_number]


@pytest.fixture
def no_memory(monkeypatch):
    """A machine on which no base fits."""
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))


def test_a_trained_run_is_complete_once_it_is_verified(trained):
    verify.verify(trained)
    record = trained.record
    assert record["status"] == "complete"
    assert record["ended"] is not None
    found = record["verification"]
    assert (found["method"], found["rows"], found["dtype"]) == ("logits", 30, "float32")
    assert found["max_difference"] <= found["tolerance"] < 1e-2


def test_training_again_only_verifies(trained, train, monkeypatch):
    from scalepeft.trainer import ClassificationTrainer

    monkeypatch.setattr(ClassificationTrainer, "__init__", lambda *_, **__: pytest.fail("it trains"))
    recipe = trained.recipe()
    path = trained.path.parent / "again.yaml"
    path.write_text(recipe.document.text)
    assert train(path, f"training.output_dir={trained.path}").record["status"] == "complete"


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda f: f.__name__)
def test_weights_that_are_not_those_trained_fail_the_run(trained, corruption, capsys):
    change(trained, corruption)
    reason = "cannot be loaded" if corruption is drop_the_head else "do not answer as the trained model did"
    with pytest.raises(RunFailed, match=reason):
        verify.verify(trained)
    record = json.loads((trained.path / "run.json").read_text())
    assert record["status"] == "failed"
    assert reason in record["reason"]
    assert program(verify.main, [str(trained.path)]) == 1
    found = capsys.readouterr()
    assert found.err.startswith(f"{trained.path}: failed: ")
    assert found.err.count("\n") == 1
    with pytest.raises(UserError, match="the run is failed"):
        predict._complete(trained.path)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda f: f.__name__)
def test_where_the_base_does_not_fit_the_tensors_are_compared(trained, corruption):
    verify.verify(trained)
    record = trained.record
    assert record["status"] == "complete"
    found = record["verification"]
    assert found["method"] == "tensors"
    assert found["tensors"] == len(load_file(trained.path / "adapter/adapter_model.safetensors"))
    assert "does not fit into memory" in found["reason"]
    change(trained, corruption)
    with pytest.raises(RunFailed, match="tensors differ"):
        verify.verify(trained)
    assert trained.record["status"] == "failed"
    assert trained.record["verification"]["differing"]


@pytest.mark.usefixtures("no_memory")
def test_one_bit_is_enough_for_the_tensors(trained):
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(tensors)].view(torch.int32).view(-1)[0] ^= 1

    change(trained, flip)
    with pytest.raises(RunFailed, match="1 of"):
        verify.verify(trained)


@pytest.mark.parametrize("damage", ["missing", "torn", "empty"])
@pytest.mark.parametrize("fits", [True, False])
def test_a_damaged_file_fails_the_run(trained, damage, fits, capsys, request):
    if not fits:
        request.getfixturevalue("no_memory")
    file = trained.path / "adapter/adapter_model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "torn" else b"")
    status = program(verify.main, [str(trained.path)])
    told = capsys.readouterr().err
    assert (status, told.count("\n")) == (1, 1), told
    assert trained.record["status"] == "failed"


def test_a_whole_model_is_compared_too(toy, train):
    run = train(toy(adapter=None, training={"num_train_epochs": 1}), verify=False)
    assert run.record["status"] == "running"
    verify.verify(run)
    assert run.record["status"] == "complete"

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors["bert.embeddings.word_embeddings.weight"].mul_(1.1)

    change(run, scale)
    with pytest.raises(RunFailed):
        verify.verify(run)


def test_the_reference_is_the_trained_model_without_dropout(trained):
    from scalepeft import model

    quiet_upstream()
    reference = load_file(trained.path / "verification.safetensors")
    assert reference["logits"].shape == (30, 2)
    assert reference["logits"].dtype == torch.float32
    loaded = model.load(trained)
    with torch.inference_mode():
        logits = loaded(**{k: v for k, v in reference.items() if k != "logits"}).logits
    torch.testing.assert_close(logits, reference["logits"])


def test_the_module_wants_one_run(capsys):
    assert program(verify.main, []) == 2
    assert "usage" in capsys.readouterr().err
