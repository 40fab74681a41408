"""AdaLoRA: the ranks move to the budget at every step, under peft's own regulariser, and survive a resume."""

from __future__ import annotations

import shutil

import pytest
import torch

from scalepeft import adalora, console
from scalepeft.run import Run

ADAPTER = {"peft_type": "ADALORA", "lora_alpha": 8, "target_modules": "all-linear"}
SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 4, "tfinal": 4, "deltaT": 2}


@pytest.fixture
def recipe(toy):
    return toy("run", adapter=ADAPTER | SCHEDULE, training={"save_strategy": "steps", "save_steps": 9})


def test_ranks_end_at_the_budget_and_the_run_records_them(train, recipe):
    ranks = train(recipe).record["ranks"]
    assert {found["initial"] for found in ranks.values()} == {4}
    assert sum(found["final"] for found in ranks.values()) == 2 * len(ranks)
    assert len({found["final"] for found in ranks.values()}) > 1  # moved to where they are needed, not halved everywhere


def test_the_regulariser_is_what_peft_adds_to_a_loss_of_the_model(tiny_model):
    console.quiet_upstream()
    from peft import AdaLoraConfig, get_peft_model
    from transformers import BertForSequenceClassification

    config = AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], total_step=10, orth_reg_weight=0.3)
    model = get_peft_model(BertForSequenceClassification.from_pretrained(tiny_model), config).eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 3]]), "labels": torch.tensor([1])}
    with_regulariser = model(**inputs).loss
    model.peft_config["default"].orth_reg_weight = 0.0
    without = model(**inputs).loss
    model.peft_config["default"].orth_reg_weight = 0.3
    torch.testing.assert_close(adalora.orthogonality(model), with_regulariser - without)


def test_a_resumed_run_allocates_as_the_straight_one(train, recipe, tmp_path):
    straight = train(recipe)
    again = Run(tmp_path / "again")
    shutil.copytree(straight.path, again.path)
    for later in ("checkpoint-18", "checkpoint-20"):
        shutil.rmtree(again.path / later)  # as if killed before: ranks are pruned already, and still move
    shutil.rmtree(again.path / "adapter")
    (again.path / "verification.safetensors").unlink()
    again.update(status="running")
    assert again.last_checkpoint().name == "checkpoint-9"
    train(recipe, f"training.output_dir={again.path}")
    assert again.lines() == straight.lines()
    name = "adapter/adapter_model.safetensors"
    assert (again.path / name).read_bytes() == (straight.path / name).read_bytes()
