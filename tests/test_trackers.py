"""Claims about experiment trackers, with the real ones."""

from __future__ import annotations

import sys

import pytest

from scalepeft.run import Run

pytestmark = pytest.mark.long


def test_tensorboard_has_every_loss(toy, command, tmp_path):
    pytest.importorskip("tensorboard")
    found = command("train", toy(training={"report_to": "tensorboard"}))
    assert found.returncode == 0, found.stderr
    run = Run(tmp_path / "run")
    assert run.record["status"] == "complete"
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    print(*files, sep="\n", file=sys.stderr)
    assert files
    assert all(run.path in file.parents for file in files)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    told = {event.step: event.value for event in events.Scalars("train/loss")}
    assert told == pytest.approx({line["step"]: line["loss"] for line in run.lines() if "loss" in line})
    assert [event.step for event in events.Scalars("eval/accuracy")] == [0, 5, 10, 15, 20]
    assert [line for line in found.stderr.splitlines() if not line.startswith("step ")] == []


def test_wandb_offline_has_every_loss(toy, command, tmp_path):
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_TOKEN": "hf_thisIsASecretThatMustNotLeak0123"}
    found = command("train", toy(training={"report_to": "wandb"}), **environment)
    assert found.returncode == 0, found.stderr
    run = Run(tmp_path / "run")
    assert run.record["status"] == "complete"
    (file,) = tmp_path.rglob("*.wandb")
    print(file, found.stderr, file=sys.stderr)
    content = file.read_bytes()
    assert content.count(b"train/loss") >= 20
    assert b"eval/accuracy" in content
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and environment["HF_TOKEN"].encode() in p.read_bytes()]
    assert "Traceback" not in found.stderr
