"""Claims about training on a CUDA device: mixed precision, layouts, going on, NF4, packing, and the model at work.

`make` leaves these out; on a machine with a GPU: `pytest -m gpu`. SCALEPEFT_GPU_TESTS_ON=cpu runs all but those of what only a
GPU has on a CPU, to try the tests themselves.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import shutil

import pytest
import torch
from test_layout import LAYOUTS, figures, launched_on_gpus, weights

from scalepeft import predict
from scalepeft.run import Run

DEVICE = os.environ.get("SCALEPEFT_GPU_TESTS_ON", "cuda")
ON = {"use_cpu": DEVICE == "cpu"}
"""For the training section: the fixtures' recipes say use_cpu."""
CLOSE = 1e-4
"""Relative: a GPU sums batches of other sizes in another order."""
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
only_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has it not")


def check_trained(run: Run) -> None:
    """Complete means verified: a fresh reload on the device gave the answers of the trained model."""
    assert run.record["status"] == "complete"
    assert run.record["verification"]["method"] == "logits"
    assert run.record["layout"]["device"] == DEVICE
    assert all(math.isfinite(line["loss"]) for line in run.lines() if "loss" in line)
    assert run.record["metrics"]["after"]["loss"] < run.record["metrics"]["before"]["loss"]


def check_evaluated_again(run: Run, within: float) -> None:
    """The saved weights, loaded anew, measure as the trained ones did at the end."""
    found = next(iter(predict.evaluate(run).values()))
    after = run.record["metrics"]["after"]
    assert {name: found[name] for name in after} == pytest.approx(after, rel=within, abs=within)


def died_after(run: Run, step: int) -> None:
    """Take away what a run left after the checkpoint of a step, as if it had died before the next one."""
    assert (run.path / f"checkpoint-{step}").is_dir()
    shutil.rmtree(run.path / "adapter")
    (run.path / "verification.safetensors").unlink()
    for checkpoint in run.path.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    run.update(status="running")


def check_goes_on(train, recipe, step: int) -> None:
    """A run that died and went on is, to the bit, the one that did not."""
    straight = train(recipe)
    expected, trained = figures(straight, "loss", "grad_norm"), weights(straight)
    died_after(straight, step)
    published = (straight.path / f"checkpoint-{step}/checkpoint.json").stat().st_mtime_ns
    again = train(recipe)
    assert (again.path / f"checkpoint-{step}/checkpoint.json").stat().st_mtime_ns == published, "it began anew"
    assert again.record["status"] == "complete"
    # fp16 skips steps whose gradients overflow: their norm is no number
    torch.testing.assert_close(figures(again, "loss", "grad_norm"), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(weights(again), trained)


# --- classification ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=only_gpu)])
def test_mixed_precision_learns_and_is_verified(toy, train, precision):
    run = train(toy(training={**ON, precision: True}))
    check_trained(run)
    assert run.record["layout"]["precision"] == f"{precision} over float32"
    assert run.record["metrics"]["after"]["accuracy"] > 0.8
    check_evaluated_again(run, within=0.05)


def test_a_base_in_half_precision_is_verified(toy, train):
    check_trained(train(toy(model={"dtype": "bfloat16"}, training={**ON, "bf16": True})))


@only_gpu
def test_peak_memory_is_that_of_the_device(toy, train):
    torch.cuda.reset_peak_memory_stats()
    run = train(toy(training={**ON, "num_train_epochs": 1}))
    # weights of some 100 KB and the library's workspaces, not this process's gigabytes
    assert 2**17 < run.record["peak_memory_bytes"] < 2**28


EXACT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def check_same_numbers(run: Run, other: Run) -> None:
    assert run.record["layout"]["global_batch_size"] == other.record["layout"]["global_batch_size"] == 16
    torch.testing.assert_close(figures(run, "loss", "grad_norm"), figures(other, "loss", "grad_norm"), rtol=CLOSE, atol=1e-5)
    torch.testing.assert_close(figures(run, "eval_loss"), figures(other, "eval_loss"), rtol=CLOSE, atol=1e-5)


def test_accumulation_changes_no_number(toy, train):
    found = {
        name: train(
            toy(
                name,
                model={"config": EXACT},
                adapter={"lora_dropout": 0.0},
                training={**ON, **LAYOUTS[name].training, "learning_rate": 1e-3, "num_train_epochs": 2},
            )
        )
        for name in ("1x16", "1x4x4")
    }
    check_same_numbers(found["1x4x4"], found["1x16"])


@pytest.mark.parametrize("task", ["causal-lm", "preference"])
def test_accumulation_changes_no_number_of_a_language_model(chat, train, task):
    found = {
        name: train(chat(name, task=task, training={**ON, **LAYOUTS[name].training, "learning_rate": 1e-3}))
        for name in ("1x16", "1x4x4")
    }
    check_same_numbers(found["1x4x4"], found["1x16"])


ENGINES = {"multi_gpu": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "zero3_offload": "DEEPSPEED", "fsdp2": "FSDP"}


@only_gpu
@pytest.mark.parametrize("file", [*ENGINES, "fsdp2_qlora"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_no_engine_changes_a_number(toy, chat, train, file, kind):
    """One process a GPU; with one GPU the engines still divide the model, among one."""
    devices = torch.cuda.device_count()
    if file == "multi_gpu" and devices < 2:
        pytest.skip("DDP needs two GPUs")
    if file == "fsdp2_qlora" and kind == "encoder":
        pytest.skip("decoders are quantised")
    four_bits = {**NF4, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "float32"}
    shared = {"quantization": four_bits} if file == "fsdp2_qlora" else {}
    write = toy if kind == "encoder" else chat
    if kind == "encoder":
        shared |= {"model": {"config": EXACT}, "adapter": {"lora_dropout": 0.0}}
    training = {**ON, "learning_rate": 1e-3, "num_train_epochs": 2, "save_strategy": "no"}
    alone = train(write("alone", training={**training, "per_device_train_batch_size": 16}, **shared))
    divided = write("divided", training={**training, "per_device_train_batch_size": 16 // devices}, **shared)
    launched_on_gpus([divided], file)
    run = Run(divided.with_suffix(""))
    assert run.record["layout"]["engine"] == ENGINES.get(file, "FSDP")
    assert run.record["layout"]["device"] == "cuda"
    check_same_numbers(run, alone)
    assert (weights(run) - weights(alone)).norm() < 1e-3 * weights(alone).norm()


@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=only_gpu)])
def test_going_on_changes_no_bit(toy, train, precision):
    """Random masks included: the device's generator is saved, too. Eager attention, for sdpa's backward may be unordered."""
    mixed = {} if precision == "no" else {precision: True}
    check_goes_on(train, toy(model={"attn_implementation": "eager"}, training={**ON, **mixed}), step=10)


def test_prediction_labels_the_rows(toy, train, tmp_path):
    run = train(toy(training=ON))
    check_evaluated_again(run, within=1e-4)
    predict.predict(run, tmp_path / "test.csv", tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open(encoding="utf-8") as stream:
        predicted = [row["name"] for row in csv.DictReader(stream)]
    with (tmp_path / "test.csv").open(encoding="utf-8") as stream:
        truth = [row["label"] for row in csv.DictReader(stream)]
    right = sum(a == b for a, b in zip(predicted, truth, strict=True)) / len(truth)
    assert right == pytest.approx(run.record["metrics"]["after"]["accuracy"])


# --- language models -----------------------------------------------------------------------------------------------


@pytest.fixture
def wide_lm(tiny_lm, tmp_path):
    """The tiny language model with one layer so wide that its adapter's states are 8-bit and paged: from 100,000 numbers on."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "wide"
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(folder)
    config = LlamaConfig.from_pretrained(tiny_lm)
    config.num_hidden_layers, config.intermediate_size = 1, 2048
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def qlora(chat, wide_lm):
    """Write a QLoRA recipe as they are for large models, with an attention implementation."""

    def write(attention):
        return chat(
            model={"name_or_path": str(wide_lm), "dtype": "bfloat16", "attn_implementation": attention},
            quantization=NF4,
            adapter={"r": 64, "lora_alpha": 64},
            training={
                **ON,
                "bf16": True,
                "optim": "paged_adamw_8bit",
                "packing": True,
                "activation_checkpointing": True,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-3,
                "num_train_epochs": 2,
                "save_strategy": "steps",
                "save_steps": 4,
            },
        )

    return write


paged = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")


@paged
def test_qlora_trains_and_is_verified(qlora, train):
    run = train(qlora("sdpa"))
    check_trained(run)
    assert run.record["data"]["documents"] == {"train": 44}
    check_evaluated_again(run, within=0.03)


@paged
def test_a_paged_optimizer_goes_on_and_changes_no_bit(qlora, train):
    check_goes_on(train, qlora("eager"), step=4)


@pytest.fixture
def gaps(monkeypatch):
    """Of each packed document in training, the largest difference of its logits from those it has alone, relative to these."""
    from scalepeft.language import SupervisedTrainer

    found: list[float] = []
    step = SupervisedTrainer.training_step

    def comparing(self, model, inputs, *rest):
        batch, ids = {k: v for k, v in inputs.items() if k != "labels"}, inputs["input_ids"][0]
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            together = model(**batch, use_cache=False).logits[0].float()
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                alone = model(input_ids=ids[None, start:end], use_cache=False).logits[0].float()
                found.append(((together[start:end] - alone).abs().max() / alone.abs().max()).item())
        model.train()
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(SupervisedTrainer, "training_step", comparing)
    return found


flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash_attn is not installed")


@pytest.mark.parametrize(
    ("attention", "dtype", "allowed"),
    [
        ("eager", "float32", 1e-4),
        ("sdpa", "float32", 1e-4),
        ("sdpa", "bfloat16", 5e-2),
        pytest.param("flash_attention_2", "bfloat16", 5e-2, marks=[only_gpu, flash]),
    ],
)
def test_packed_documents_do_not_see_each_other(chat, train, gaps, attention, dtype, allowed):  # noqa: PLR0917  # fixtures
    training = {**ON, "bf16": dtype == "bfloat16", "packing": True, "per_device_train_batch_size": 2}
    run = train(chat(model={"attn_implementation": attention, "dtype": dtype}, training=training))
    assert run.record["data"]["rows"]["train"] < 22
    assert len(gaps) == 44
    assert max(gaps) < allowed


def test_one_that_sees_the_other_would_be_found(chat, train, gaps, monkeypatch):
    """The control: without positions that begin anew, the rows of a batch are one text."""
    from scalepeft.language import Isolation, SupervisedTrainer

    comparing = SupervisedTrainer.training_step

    def blurring(self, model, inputs, *rest):
        forward = model.forward

        def one_text(**batch):
            positions = batch.pop("position_ids", None)
            return forward(
                position_ids=None if positions is None else torch.arange(positions.numel(), device=DEVICE)[None], **batch
            )

        model.forward = one_text
        return comparing(self, model, inputs, *rest)

    monkeypatch.setattr(Isolation, "on_train_begin", lambda *_, **__: None)
    monkeypatch.setattr(SupervisedTrainer, "training_step", blurring)
    train(chat(training={**ON, "packing": True, "per_device_train_batch_size": 2, "max_steps": 1}))
    assert max(gaps) > 0.1


@pytest.mark.parametrize("task", ["causal-lm", "preference"])
@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=only_gpu)])
def test_a_language_model_is_trained_verified_and_evaluated(chat, train, task, precision):
    mixed = {"bf16": False} if precision == "no" else {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    run = train(chat(task=task, training={**ON, **mixed, "num_train_epochs": 2, "learning_rate": 1e-3}))
    check_trained(run)
    check_evaluated_again(run, within=1e-4 if precision == "no" else 0.03)


@pytest.mark.parametrize("task", ["causal-lm", "preference"])
def test_a_language_model_goes_on_and_changes_no_bit(chat, train, task):
    training = {**ON, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    recipe = chat(task=task, model={"attn_implementation": "eager"}, adapter={"lora_dropout": 0.1}, training=training)
    check_goes_on(train, recipe, step=3)


def test_the_command_trains_on_the_device(chat, command, tmp_path):
    found = command("train", chat(training=ON))
    assert found.returncode == 0, found.stderr
    check_trained(Run(tmp_path / "run"))
    assert f"· {DEVICE} ·" in found.stdout
