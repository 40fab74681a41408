"""Supervised fine-tuning on a CPU, side by side with TRL: target tokens per second of the training loop.

    python benchmarks/sft.py [--qlora] [--short] [--steps N]

SmolLM2-135M-Instruct with LoRA r=16 on all linear layers, on instructions of their natural lengths, four rows a step, cut at
256 tokens (both fetched by `scalepeft fetch quickstart_sft`). Each way of training is a process of its own, with the trainer
that a user of it gets: `scalepeft train`'s, TRL's SFTTrainer as `trl sft` makes it, transformers' Trainer, and a bare loop that
computes logits at target positions alone. They take turns, step by step, on the same rows in the same order; while one steps,
the others wait. What a step takes lasts from one logged loss to the next: fetching and collating rows, forward, backward,
optimizer, callbacks, logging. Imports, loading, preparing rows and saving stand outside; the first step is not counted. Close
other programs first: a core that is taken away stops the threads of both.

The losses of the ways that train alike are compared, too: beyond rounding, the script ends with status 1.

The ways, of which the first three have equal settings (float32, activations kept, padded batches in the order of the file):
    scalepeft, trl, bare
    scalepeft padding_free   the same rows without their padding (`training.padding_free: true`)
    scalepeft packing        packed to 1,024 tokens, one such row a step
    trl defaults             activations computed again, as `trl sft` does unless told otherwise
With --qlora, the base in NF4 with double quantisation and paged_adamw_8bit: scalepeft, and peft + bitsandbytes + Trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from ratios import Ratio, interleaved, keep

RECIPE: dict[str, Any] = {
    "task": "causal-lm",
    "model": {"name_or_path": "fetched:SmolLM2-135M-Instruct", "dtype": "float32"},
    "adapter": {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
    "data": {"train": {"path": "fetched:instructions/train.json"}},
    "training": {
        "learning_rate": 5e-4,
        "train_sampling_strategy": "sequential",
        "max_length": 256,
        "activation_checkpointing": False,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    },
}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}
SFT: dict[str, tuple[str, dict[str, Any]]] = {
    "scalepeft": ("by_scalepeft", {}),
    "trl": ("by_trl", {}),
    "bare": ("by_hand", {}),
    "scalepeft padding_free": ("by_scalepeft", {"padding_free": True}),
    "scalepeft packing": ("by_scalepeft", {"packing": True, "max_length": 1024, "per_device_train_batch_size": 1}),
    "trl defaults": ("by_trl", {"activation_checkpointing": True}),
}
"""What a way is called: the function of this file that trains so, and the options of training that differ."""
QLORA: dict[str, tuple[str, dict[str, Any]]] = {"scalepeft": ("by_scalepeft", {}), "trainer": ("by_trainer", {})}
ALIKE = ("scalepeft", "trl", "bare", "scalepeft padding_free", "trainer")
"""The ways whose losses must agree."""
CLOSE = 2e-4
"""The largest relative difference of two losses: AdamW's first steps go by the gradients' signs, rounding decides over some."""


def main() -> int:
    """Train in turns, compare, keep; the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--qlora", action="store_true", help="the 4-bit base")
    parser.add_argument("--short", action="store_true", help="two steps of two rows, what a target names; writes nothing")
    parser.add_argument("--steps", type=int, help="steps that are measured")
    options = parser.parse_args()
    steps, rows = options.steps or (2 if options.short else 8), 2 if options.short else 4
    ways = QLORA if options.qlora else {k: SFT[k] for k in (("scalepeft", "trl", "bare") if options.short else SFT)}
    with tempfile.TemporaryDirectory() as work:
        made = {
            name: Way(Path(work), name, *way, steps=steps + 1, qlora=options.qlora, rows=rows) for name, way in ways.items()
        }
        try:
            for name, way in made.items():
                way.ready()
                print(f"{name}: ready", flush=True)
            found = interleaved({name: way.step for name, way in made.items()}, repetitions=steps)
        finally:
            for way in made.values():
                way.end()
    losses = {name: way.losses for name, way in made.items()}
    apart = max(apart_of(losses))
    print(f"losses of the ways that train alike: at most {apart:.1e} apart, relative")
    for name, of in losses.items():
        print(f"  {name}: {' '.join(f'{loss:.6f}' for loss in of)}")
    kept = keep(
        "qlora" if options.qlora else "sft",
        what="QLoRA steps of SmolLM2-135M on a CPU." if options.qlora else "Supervised fine-tuning of SmolLM2-135M on a CPU.",
        unit="target tokens/s",
        found=found,
        ratios=[ratio for ratio in (QLORA_RATIOS if options.qlora else SFT_RATIOS) if {ratio.ours, ratio.other} <= set(found)],
        short=options.short,
        losses=losses,
        losses_apart=apart,
        dtype="float32",
        notes=[" ".join(note.split()) for note in (QLORA_NOTES if options.qlora else SFT_NOTES).split("\n\n")],
    )
    return kept or int(apart > CLOSE)


def apart_of(losses: dict[str, list[float]]) -> Iterator[float]:
    """Relative differences of the losses of ways that train alike to scalepeft's, step by step."""
    for name in set(losses) & set(ALIKE):
        yield from (abs(a - b) / b for a, b in zip(losses[name], losses["scalepeft"], strict=True))


class Way:
    """A process that trains, a step each time it is told to."""

    def __init__(
        self, work: Path, name: str, function: str, changes: dict[str, Any], *, steps: int, rows: int, qlora: bool
    ) -> None:
        folder = work / name.replace(" ", "_")
        training = {**RECIPE["training"], "max_steps": steps, "output_dir": str(folder / "run")}
        training |= {"per_device_train_batch_size": rows, **changes}
        recipe = {**RECIPE, "training": training}
        if qlora:
            recipe["quantization"], training["optim"] = NF4, "paged_adamw_8bit"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        self.log, self.losses = folder / "log", []
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, function, folder / "recipe.yaml"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=environment,
            text=True,
        )

    def ready(self) -> None:
        """Wait until the first step can begin."""
        self._answer()

    def step(self) -> float:
        """Target tokens per second of the next step."""
        print("go", file=self.process.stdin, flush=True)
        found = self._answer()
        self.losses.append(found["loss"])
        return float(found["targets"] / found["seconds"])

    def end(self) -> None:
        """Let the process end."""
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout or ():
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return found
        sys.exit(f"{self.log.read_text(encoding='utf-8')[-2000:]}\n{' '.join(map(str, self.process.args))}: ended early")  # type: ignore[arg-type]


# --- the processes -----------------------------------------------------------------------------------------------------

MARK = "@benchmark "


class Turns:
    """What a training process says of its steps, and waits for."""

    def __init__(self) -> None:
        self.targets, self.loss = 0, 0.0

    def begin(self, **said: float) -> None:
        """Say what the last step took, wait for the next turn, start the clock."""
        print(MARK + json.dumps(said), flush=True)
        sys.stdin.readline()
        self.targets, self.started = 0, time.perf_counter()

    def end(self, loss: float) -> None:
        """Stop the clock, and begin again."""
        self.begin(seconds=time.perf_counter() - self.started, targets=self.targets, loss=loss)


def take_turns() -> None:
    """Give every trainer of this process its turns, and count the targets of the batches that it collates."""
    import torch
    from transformers import Trainer, TrainerCallback, trainer

    turns = Turns()

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                turns.end(turns.loss)

    fetch = Trainer.get_batch_samples

    def counting(self: Any, *given: Any) -> Any:
        batches, items = fetch(self, *given)
        turns.targets += sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        return batches, items

    step = Trainer.training_step

    def remembering(self: Any, *given: Any, **named: Any) -> torch.Tensor:
        loss: torch.Tensor = step(self, *given, **named)
        turns.loss = float(loss)  # the log rounds it to four digits
        return loss

    Trainer.get_batch_samples, Trainer.training_step = counting, remembering
    trainer.DEFAULT_CALLBACKS.append(Callback)


def by_scalepeft(recipe: str) -> None:
    """`scalepeft train`."""
    take_turns()
    from scalepeft import cli

    sys.exit(cli.main(["train", recipe]))


def prepared(recipe: str) -> tuple[Any, Any, Any, Any]:
    """The recipe, the rows that `scalepeft train` makes of it, its task with the collator, and the folder of the base."""
    from scalepeft import data, kinds, model
    from scalepeft import recipe as recipes
    from scalepeft.console import quiet_upstream

    quiet_upstream()
    read = recipes.load(recipe)
    tokenizer = model.tokenizer(read)
    corpus = data.prepare(read, tokenizer, limit=model.longest_input(read, tokenizer))
    return read, corpus, kinds.task(read, tokenizer, corpus.label_names), tokenizer


def base(read: Any) -> tuple[Any, Any]:
    """The base model as from_pretrained gives it, and the configuration of the adapter."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

    from scalepeft.fetch import asset_path

    set_seed(42)
    quantization = BitsAndBytesConfig(**NF4) if read.quantization else None
    folder = asset_path(read.model.name_or_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=read.model.dtype, quantization_config=quantization)
    return model, LoraConfig(task_type="CAUSAL_LM", **{k: v for k, v in read.adapter.items() if k != "peft_type"})


def by_trl(recipe: str) -> None:
    """SFTTrainer as `trl sft` makes it, on the same rows."""
    take_turns()
    from trl import SFTConfig, SFTTrainer

    read, corpus, _, tokenizer = prepared(recipe)
    model, adapter = base(read)
    rows = corpus.sets["train"].rows.select_columns(["input_ids", "labels"])
    args = SFTConfig(**read.training, dataset_kwargs={"skip_prepare_dataset": True})
    SFTTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=rows, peft_config=adapter).train()


def by_trainer(recipe: str) -> None:
    """Plain peft + bitsandbytes + transformers' Trainer, with the model's own loss."""
    take_turns()
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments

    read, corpus, task, _ = prepared(recipe)
    model, adapter = base(read)
    if read.quantization:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    rows = corpus.sets["train"].rows.select_columns(["input_ids", "labels"])
    args = TrainingArguments(**{k: v for k, v in read.training.items() if k != "max_length"})
    model = get_peft_model(model, adapter)
    Trainer(model=model, args=args, train_dataset=rows, data_collator=task.collate).train()


def by_hand(recipe: str) -> None:
    """A bare loop: logits at target positions alone."""
    import torch
    from peft import get_peft_model

    from scalepeft.trainer import Rows

    read, corpus, task, _ = prepared(recipe)
    model, adapter = base(read)
    model = get_peft_model(model, adapter).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    steps, size = read.training["max_steps"], read.training["per_device_train_batch_size"]
    optimizer = torch.optim.AdamW(trained, lr=read.training["learning_rate"], weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (steps - step) / steps)
    rows, turns, causal = Rows(corpus.sets["train"].rows), Turns(), model.get_base_model()
    turns.begin()
    for step in range(steps):
        batch = task.collate(rows.__getitems__(range(step * size, (step + 1) * size)))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        states = causal.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        labels = batch["labels"][:, 1:]
        counts = labels != -100
        turns.targets = int(counts.sum())
        loss = torch.nn.functional.cross_entropy(causal.lm_head(states[counts]), labels[counts])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        turns.end(float(loss))


# --- what is claimed ---------------------------------------------------------------------------------------------------

SFT_RATIOS = (
    Ratio(claim="SFT, the same settings as `trl sft`, equal losses", ours="scalepeft", other="trl", least=1.5),
    Ratio(claim="SFT against a bare loop that computes logits at targets alone", ours="scalepeft", other="bare", least=0.9),
    Ratio(claim="SFT without padding against `trl sft`, equal losses", ours="scalepeft padding_free", other="trl", least=1.5),
    Ratio(claim="SFT without padding against `trl sft` as it comes", ours="scalepeft padding_free", other="trl defaults"),
    Ratio(claim="Packed rows against rows without padding", ours="scalepeft packing", other="scalepeft padding_free"),
)
SFT_NOTES = """
Where a step goes (CPU time of one thread): of the body, 77 % are products of matrices, 10 % attention, 7 % LoRA's scalings and
sums. In `trl sft` the head comes on top, with 40 % of the whole where a padded batch of 1,024 positions has 240 to 520 that
count. AdamW takes 0.3 %.

The head alone, forward and backward, for 400 tokens of 49,152 words: TRL's 1.30 s, logits with cross-entropy 0.83 s,
scalepeft's 0.73 s, of which two products with the weight take 0.61 s.

Did not help: oneDNN's products of matrices in place of MKL's (50 and 54 GFLOP/s against 45 and 53, forward and backward);
leaving the entropy out (5 % of TRL's head; here it follows from the gradient for nothing); other tiles of the head (64 rows of
logits 0.84 s, 128 rows 0.74 s, 340 rows 0.72 s).

torch's softmax and cross_entropy sum 49,152 words in float32 with an error of 1e-5; the head sums in a cascade, as TRL's does.
The bare loop's losses lie that far from the others.

In float32 the products of the body bound the gain. A processor with bf16 computes them faster, and the head's other work not.
""".strip()
QLORA_NOTES = """
The Trainer's side keeps all logits and takes their cross-entropy, as transformers' models do. 4-bit weights are dequantised in
each step on both sides, by bitsandbytes.
""".strip()
QLORA_RATIOS = (
    Ratio(
        claim="A QLoRA step against plain peft + bitsandbytes + Trainer, equal losses",
        ours="scalepeft",
        other="trainer",
        least=1.0,
    ),
)
if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("by_"):
        globals()[sys.argv[1]](sys.argv[2])
    else:
        sys.exit(main())
