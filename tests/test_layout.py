"""The layout contract: the same recipe gives the same numbers on whatever processes, batches and engine its rows are divided.

With SCALEPEFT_RECORD_LAYOUTS=FILE each comparison appends what it measured to FILE, from which docs/layouts.md is made.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import write_chat, write_toy
from safetensors.torch import load_file

from scalepeft import engines, launch, predict
from scalepeft import recipe as recipes
from scalepeft.console import quiet_upstream
from scalepeft.errors import UserError
from scalepeft.run import Run

SEVERAL = Path(__file__).with_name("several.py")
CLOSE = 1e-5
"""The contract in fp32: the largest relative difference of losses, gradient norms and of the adapter."""


@dataclass(frozen=True)
class Layout:
    """Processes x batch x accumulation x engine; each with a global batch of 16."""

    file: str | None
    batch: int
    accumulation: int
    engine: str

    @property
    def training(self) -> dict:
        """What a recipe says for it."""
        return {"per_device_train_batch_size": self.batch, "gradient_accumulation_steps": self.accumulation}


LAYOUTS = {
    "1x16": Layout(None, 16, 1, "NO"),
    "1x4x4": Layout(None, 4, 4, "NO"),
    "2x8": Layout("multi_cpu", 8, 1, "MULTI_CPU"),
    "2x4x2": Layout("multi_cpu", 4, 2, "MULTI_CPU"),
    "2x4x2 ZeRO-1": Layout("zero1", 4, 2, "DEEPSPEED"),
    "2x8 ZeRO-2": Layout("zero2", 8, 1, "DEEPSPEED"),
    "2x4x2 ZeRO-2": Layout("zero2", 4, 2, "DEEPSPEED"),
    "2x8 ZeRO-3": Layout("zero3", 8, 1, "DEEPSPEED"),
    "2x4x2 ZeRO-3": Layout("zero3", 4, 2, "DEEPSPEED"),
    "2x4x2 ZeRO-3, offload": Layout("zero3_offload", 4, 2, "DEEPSPEED"),
    "2x8 FSDP2": Layout("fsdp2", 8, 1, "FSDP"),
    "2x4x2 FSDP2": Layout("fsdp2", 4, 2, "FSDP"),
    "2x8 FSDP2, 4-bit": Layout("fsdp2_qlora", 8, 1, "FSDP"),
}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "float32",  # that of the rest of the model, as FSDP needs it
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHORT = {"num_train_epochs": 2, "save_strategy": "no", "eval_strategy": "no"}
RECIPES = {
    "encoder, LoRA": partial(write_toy, model={"config": STILL}, adapter={"lora_dropout": 0.0}),
    "encoder, QLoRA": partial(write_toy, model={"config": STILL}, adapter={"lora_dropout": 0.0}, quantization=NF4),
    "encoder, LoRA, dropout": write_toy,
    "encoder, full": partial(write_toy, model={"config": STILL}, adapter=None),
    "decoder, LoRA": write_chat,
    "decoder, LoRA, checkpointing": partial(write_chat, training={"activation_checkpointing": True}),
    "decoder, QLoRA": partial(write_chat, quantization=NF4),
    "decoder, LoRA, adagrad": partial(write_chat, training={"optim": "adagrad"}),
    "decoder, DPO": partial(write_chat, task="preference"),
}
"""70 rows for the encoders: four steps of 16 and one of 6, which neither 1x4x4 nor 2x8 divides evenly. 44 for the decoders."""

OFFLOADED = ("1x16", "2x4x2 ZeRO-3, offload")
"""Where adagrad is trained: the recipe's own optimizer steps on the host, and none that upstream puts in its place."""
IN_FOUR_BITS = ("1x16", "1x4x4", "2x8", "2x4x2", "2x8 ZeRO-2", "2x8 ZeRO-3", "2x8 FSDP2, 4-bit")
QUICK = {
    "1x4x4": ("encoder, LoRA", "encoder, LoRA, dropout", "decoder, LoRA", "decoder, DPO"),
    "2x8": ("encoder, LoRA", "encoder, LoRA, dropout", "decoder, LoRA", "decoder, DPO"),
}


def recipes_of(layout: str) -> list[str]:
    """What is trained on a layout."""
    if layout == "2x8 FSDP2, 4-bit":
        return ["decoder, QLoRA"]
    only = {"QLoRA": IN_FOUR_BITS, "adagrad": OFFLOADED}
    return [name for name in RECIPES if all(layout in layouts for word, layouts in only.items() if word in name)]


COMPARED = [
    pytest.param(layout, recipe, marks=() if recipe in QUICK.get(layout, ()) else pytest.mark.long)
    for layout in LAYOUTS
    for recipe in recipes_of(layout)
    if layout != "1x16"
]


class Matrix:
    """The runs of all layouts, each launch made when its first run is asked for."""

    def __init__(self, folder: Path, bases: dict[str, Path]) -> None:
        self.folder, self.bases = folder, bases

    def run(self, layout: str, recipe: str, *, quick: bool) -> Run:
        """The run of a recipe on a layout; with it come those that the same launch makes."""
        folder = self.folder / ("quick" if quick else "long")
        run = Run(folder / self._name(layout, recipe))
        if not run.record:
            file = LAYOUTS[layout].file
            together = [name for name in LAYOUTS if LAYOUTS[name].file == file]
            chosen = [(name, r) for name in together for r in recipes_of(name)]
            if quick:
                chosen = [(name, r) for name, r in chosen if name == "1x16" or r in QUICK.get(name, ())]
            folder.mkdir(exist_ok=True)
            launched([self._write(folder, name, r) for name, r in chosen], file)
        return run

    def _write(self, folder: Path, layout: str, recipe: str) -> Path:
        base = self.bases[recipe.partition(",")[0]]
        written = RECIPES[recipe]
        own = written.keywords.get("training", {}) if isinstance(written, partial) else {}
        rate = 1e-3 if "DPO" in recipe or "full" in recipe else 1e-2
        training = {**SHORT, **own, **LAYOUTS[layout].training, "learning_rate": rate}
        if "QLoRA" in recipe and "FSDP" not in layout:  # whose parts bitsandbytes' optimizers do not know
            training["optim"] = "paged_adamw_32bit"
        return written(folder, base, self._name(layout, recipe), training=training)

    @staticmethod
    def _name(layout: str, recipe: str) -> str:
        return f"{layout} {recipe}".replace(" ", "_").replace(",", "")


def launched_on_gpus(written: list[Path], file: str) -> None:
    """Train recipes one after the other in the processes of one launch, one for each GPU."""
    chosen = launch.layout(file)
    found = launch.line(chosen, "x", [], processes=None, cpu=False, machines=launch.Machines())
    options = [word for word in found.arguments if word not in ("-m", "x")]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(SEVERAL), *map(str, written)]
    ended = subprocess.run(command, cwd=written[0].parent, capture_output=True, text=True, check=False, timeout=900)
    assert ended.returncode == 0, ended.stderr[-6000:]


def launched(written: list[Path], file: str | None) -> None:
    """Train recipes one after the other in the processes of one launch on CPUs."""
    command, environment = [sys.executable, str(SEVERAL), *map(str, written)], {}
    if file is not None:
        fsdp = file.startswith("fsdp")
        chosen = launch.layout(file)
        line = launch.line(
            launch.layout("multi_cpu") if fsdp else chosen, "x", [], processes=2, cpu=True, machines=launch.Machines()
        )
        environment = dict(line.environment) if not fsdp else {"SCALEPEFT_TESTS_FSDP_ON_CPU": "1", "DS_ACCELERATOR": "cpu"}
        options = ["--config_file", str(chosen.path), "--num_processes", "2", "--main_process_port", "0"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(SEVERAL), *map(str, written)]
    found = subprocess.run(
        command, cwd=written[0].parent, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert found.returncode == 0, found.stderr[-6000:]


@pytest.fixture(scope="session")
def matrix(tmp_path_factory, tiny_model, tiny_lm) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("layouts"), {"encoder": tiny_model, "decoder": tiny_lm})


# --- what is compared -----------------------------------------------------------------------------------------------


def figures(run: Run, *names: str) -> torch.Tensor:
    """The named figures of every line of metrics.jsonl that has them."""
    lines = [[line["step"], *(line[n] for n in names)] for line in run.lines() if names[0] in line]
    assert lines
    return torch.tensor(lines, dtype=torch.float64)


def weights(run: Run) -> torch.Tensor:
    """All trained weights, in one vector, but the biases of attention's keys.

    These change no answer of a softmax: their gradient is nought but rounding, of which AdamW makes steps of full length.
    """
    (file,) = run.weights.glob("*.safetensors")
    saved = load_file(file)
    return torch.cat([saved[name].flatten().double() for name in sorted(saved) if not name.endswith("key.bias")])


def steps(run: Run) -> list[set[int]]:
    """The rows of every optimizer step, of all processes."""
    record = run.record["layout"]
    taken = [json.loads(p.read_text()) for p in sorted(run.path.parent.glob(f"{run.path.name}.rows.*.json"))]
    assert len(taken) == record["processes"]
    accumulation = record["gradient_accumulation_steps"]
    share = record["per_device_train_batch_size"] * record["processes"]
    micro = -(-run.record["data"]["rows"]["train"] // share)  # an epoch's
    epochs = [[batches[i : i + micro] for i in range(0, len(batches), micro)] for batches in taken]
    found = []
    for of_ranks in zip(*epochs, strict=True):
        for start in range(0, micro, accumulation):
            rows = [row for batches in of_ranks for batch in batches[start : start + accumulation] for row in batch]
            present = [row for row in rows if row >= 0]
            assert len(present) == len(set(present)), "a row was taken twice"
            found.append(set(present))
    return found


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest relative difference."""
    return float(((found - wanted).abs() / wanted.abs().clamp_min(1e-12)).max())


def measured(run: Run, other: Run) -> dict[str, float]:
    """How far two runs lie apart."""
    return {
        "loss": distance(figures(run, "loss"), figures(other, "loss")),
        "grad_norm": distance(figures(run, "grad_norm"), figures(other, "grad_norm")),
        "eval_loss": distance(figures(run, "eval_loss"), figures(other, "eval_loss")),
        "weights": float((weights(run) - weights(other)).norm() / weights(other).norm()),
    }


def check_same_numbers(run: Run, other: Run) -> dict[str, float]:
    assert run.record["layout"]["global_batch_size"] == other.record["layout"]["global_batch_size"] == 16
    assert torch.equal(figures(run, "learning_rate"), figures(other, "learning_rate"))
    apart = measured(run, other)
    assert max(apart.values()) < CLOSE, apart
    confusions = [each.record["evaluation"]["test"]["after"].get("confusion") for each in (run, other)]
    assert confusions[0] == confusions[1]
    return apart


def record(layout: str, recipe: str, run: Run, apart: dict[str, float]) -> None:
    """Keep what was measured, when that is asked for."""
    if file := os.environ.get("SCALEPEFT_RECORD_LAYOUTS"):
        kept = {"layout": layout, "recipe": recipe, "apart": apart, "steps": run.record["step"]}
        kept |= {"device": run.record["layout"]["device"], "engine": run.record["layout"]["engine"]}
        with Path(file).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(kept | {"versions": run.record["versions"], "date": run.record["started"]}) + "\n")


@pytest.mark.parametrize(("layout", "recipe"), COMPARED)
def test_no_layout_changes_a_number(matrix, layout, recipe):
    quick = recipe in QUICK.get(layout, ())
    run, alone = matrix.run(layout, recipe, quick=quick), matrix.run("1x16", recipe, quick=quick)
    assert run.record["layout"]["engine"] == LAYOUTS[layout].engine
    assert run.record["layout"]["processes"] == int(layout[0])
    assert steps(run) == steps(alone)
    if "dropout" in recipe:  # random masks, which no two layouts share: rows and rates are the same, and the losses are not
        assert torch.equal(figures(run, "learning_rate"), figures(alone, "learning_rate"))
        assert not torch.equal(figures(run, "loss"), figures(alone, "loss")), "there was no dropout"
        record(layout, recipe, run, {})
        return
    record(layout, recipe, run, check_same_numbers(run, alone))


def test_the_steps_hold_the_rows_of_an_epoch_once(matrix):
    found = steps(matrix.run("2x8", "encoder, LoRA", quick=True))
    assert [len(rows) for rows in found] == [16, 16, 16, 16, 6] * 2
    assert set().union(*found[:5]) == set().union(*found[5:]) == set(range(70))
    assert found[:5] != found[5:]


def test_evaluation_over_ranks_counts_every_row_once(matrix):
    run = matrix.run("2x8", "encoder, LoRA", quick=True)  # 30 rows in batches of 32 on two processes
    assert sum(map(sum, run.record["evaluation"]["test"]["after"]["confusion"])) == 30
    assert predict.evaluate(run)["test"]["loss"] == pytest.approx(run.record["metrics"]["after"]["loss"], rel=CLOSE)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["2x4x2 ZeRO-3", "2x8 FSDP2"])
@pytest.mark.parametrize("recipe", ["encoder, LoRA", "decoder, LoRA"])
def test_what_was_trained_in_parts_is_verified_whole_in_a_fresh_process(matrix, layout, recipe, tmp_path):
    from scalepeft.verify import verify

    run = Run(tmp_path / "run")
    shutil.copytree(matrix.run(layout, recipe, quick=False).path, run.path)
    verify(run)
    assert run.record["status"] == "complete"
    assert run.record["verification"]["max_difference"] < CLOSE


REFUSED = {
    "adalora": ({"adapter": {"peft_type": "ADALORA", "total_step": 4}}, "ADALORA reads gradients, which ZeRO-3 holds in parts"),
    "prefix": (
        {"adapter": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}},
        "PREFIX_TUNING does not train the same under",
    ),
    "pissa": ({"adapter": {"init_lora_weights": "pissa"}}, "pissa changes the base's weights, which ZeRO-3 holds in parts"),
    "tokens": ({"adapter": {"trainable_token_indices": [5]}}, "peft does not train single tokens under ZeRO-3 here"),
    "adafactor": ({"training": {"optim": "adafactor"}}, "adafactor under ZeRO-3: it does not treat each number"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", REFUSED)
def test_what_zero_3_cannot_serve_is_refused_once_before_training(chat, command, name):
    changes, told = REFUSED[name]
    recipe = chat("run", **changes)
    found = command("train", recipe, "--launch", "zero3", "--cpu")
    assert found.returncode == 2
    line, *problems = found.stderr.splitlines()
    assert "accelerate launch --config_file" in line
    assert len(problems) == 1, found.stderr
    assert told in problems[0]
    assert problems[0].startswith(f"{recipe}:")
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("optim", "offloads", "told"),
    [
        ("paged_adamw_32bit", True, "ZeRO-3 with offload: its states are on the host already; it serves adamw_torch,"),
        ("adafactor", True, "ZeRO-3 with offload: it does not treat each number"),
        ("adagrad", True, None),
        ("paged_adamw_32bit", False, None),
    ],
)
def test_with_offload_an_optimizer_of_torch_is_asked_for(toy, optim, offloads, told):
    with pytest.raises(UserError, match=told) if told else contextlib.nullcontext():
        engines.refuse(recipes.load(toy()), {"engine": "ZeRO-3", "offloads": offloads}, optim=optim, cpu=True)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_accumulation_changes_no_number(toy, train, strategy):
    changes = {"model": {"config": STILL}, "adapter": {"lora_dropout": 0.0}}
    runs = [
        train(toy(name, training={**LAYOUTS[name].training, "train_sampling_strategy": strategy}, **changes))
        for name in ("1x4x4", "1x16")
    ]
    check_same_numbers(*runs)


def test_upstreams_own_loss_grows_with_accumulation(toy):
    """Why the loss is our own: a control that fails when upstream has mended it."""
    from transformers import Trainer, TrainingArguments, set_seed

    from scalepeft import data, model
    from scalepeft.tasks import SequenceClassification
    from scalepeft.trainer import Rows

    quiet_upstream()
    recipe = recipes.load(toy(model={"config": STILL}, adapter={"lora_dropout": 0.0}))
    tokenizer = model.tokenizer(recipe)
    corpus = data.prepare(recipe, tokenizer, limit=64)
    first = {}
    for name in ("1x16", "1x4x4"):
        set_seed(42)
        built, _ = model.build(recipe, corpus.label_names, total_steps=1)
        given = {"max_steps": 1, "logging_steps": 1, "train_sampling_strategy": "sequential", "use_cpu": True}
        given |= LAYOUTS[name].training
        args = TrainingArguments(output_dir=str(recipe.output_dir), disable_tqdm=True, dataloader_pin_memory=False, **given)
        collate = SequenceClassification(tokenizer, corpus.label_names).collate
        upstream = Trainer(model=built, args=args, train_dataset=Rows(corpus.train.rows), data_collator=collate)
        upstream.train()
        first[name] = upstream.state.log_history[0]
    for figure in ("loss", "grad_norm"):
        assert first["1x4x4"][figure] == pytest.approx(4 * first["1x16"][figure], rel=1e-4)


def test_the_page_is_what_was_measured_and_lacks_nothing(monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root / "benchmarks")
    import layouts_table

    kept = json.loads(layouts_table.KEPT.read_text(encoding="utf-8"))
    assert layouts_table.PAGE.read_text(encoding="utf-8") == layouts_table.page(kept)
    assert [(row["layout"], row["recipe"]) for row in kept] == [param.values for param in COMPARED]
    assert all(max(row["apart"].values(), default=0) < CLOSE for row in kept)
