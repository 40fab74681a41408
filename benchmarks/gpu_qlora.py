"""QLoRA by a recipe against plain TRL on one GPU: tokens per second, peak memory and model FLOP utilisation.

    python benchmarks/gpu_qlora.py [--shape 8b] [--rounds 3] [--steps N] [--liger off on] [--attention sdpa] [--work DIR]

Both sides train the same model on the same rows with the same options: NF4 with double quantisation, bf16, LoRA r=16 on all
linear layers, packing, activation checkpointing, paged_adamw_8bit. One is `scalepeft train` on a recipe, as a user gives it;
the other hands the sections of that recipe to SFTTrainer. They differ by intent in one thing: TRL rounds the adapter of a
4-bit model to bf16, scalepeft keeps it in float32. Every run is a process of its own; the sides take turns, so that a busy or
hot moment of the machine falls on both, and the ratio is taken within each round.

How a run is measured, the same on both sides: transformers gives every trainer of a process its DEFAULT_CALLBACKS, and here
one more, which reads the clock, after the device has done its work, at the end of the last warm-up step and of the last step.
Loading, quantising, preparing rows, compiling kernels, saving and verifying stand outside. The logged losses of both sides are
compared step by step. Where both settings of use_liger_kernel are run, one more comparison is recorded, "kernels": scalepeft
with the kernels against TRL without them. Tokens are upstream's count of
those in the batches that are not padding. Peak memory is that of torch's allocator in the training process from its start,
loading included (on a CPU: resident memory); the pages of a paged optimizer are managed by CUDA and not counted.

mfu is model FLOP utilisation: tokens/s x FLOPs per token / the device's peak dense bf16 FLOP/s, null for an unknown device.
With N the weights that multiply (all linear layers and the head, not the embedding), A those of the adapter and C the mean
number of tokens that a token sees (itself and those before it in its document):
    needed    4N + 6A + 12 layers x hidden x C    forward 2N, backward 2N: frozen weights get activations' gradients alone;
                                                  the adapter's own gradients 2A more; attention forward 4, backward 8
    executed  needed + 2(N - head) + 2A + 4 layers x hidden x C    the blocks once more, for activation checkpointing
mfu counts what is needed, as is usual; hfu what is executed. Dequantising NF4 counts in neither.

Needs, for 8b: 17 GB of disk and 17 GB of memory to make the model once (random weights, some minutes), then a GPU with an
estimated 24 GB; 1b: 3 GB, 3.3 GB and an estimated 8 GB. tiny runs on a CPU (give it OMP_NUM_THREADS=1) and only shows that
the script works. liger_kernel must be installed for `--liger on`. Writes benchmarks/results/gpu/qlora-SHAPE.json, where a
setting that was not run keeps its figures, prints a table and, on a GPU, exits 1 when scalepeft is slower or takes more
memory than LIMITS and WITH_KERNELS allow, or learns otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_callback import TrainerCallback

from scalepeft import run as runs
from scalepeft.console import table

RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
SIDES = ("scalepeft", "trl")
LIMITS = {"tokens_per_second": 0.95, "peak_memory_bytes": 1.05}
"""Of scalepeft's figure to TRL's, the median over the rounds: at least for speed, at most for memory."""
WITH_KERNELS = 1.2
"""At least scalepeft's speed with fused kernels to that of TRL without."""
LOSS = 0.02
"""The largest relative difference of two logged losses: TRL's adapter is in bf16, ours in float32, and kernels round, too."""
RANK = 16
WORDS = (  # noqa: SIM905  # a list would take a line a word
    "after again all also and because between but can come could day down even every find first for from give good have "
    "here home house into just know large last leave life light line little long look made make many may mean more most "
    "mountain move much name near never new next night now number of often old only open other our over own paper part "
    "people place plant point read right river road same say school sea second see sentence small sound spell still stop "
    "story study such take tell than that the their them there these thing think this three through time tree turn under "
    "until use very walk want watch water way well what when where which while white who why will with word work world year"
).split()
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 FLOP/s by a part of the device's name; the first that fits."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's size and how it is trained."""

    config: Mapping[str, Any]
    """LlamaConfig's options."""
    length: int
    """Tokens of a packed row."""
    batch: int
    """Packed rows of a step."""
    warmup: int
    """Steps before the clock starts."""
    steps: int
    """Steps that are measured."""
    liger: list[str] = field(default_factory=lambda: ["off", "on"])
    """Settings of use_liger_kernel that are measured unless told otherwise; its kernels need a GPU."""


def llama(*, hidden: int, layers: int, heads: int, keys: int, wide: int, vocabulary: int = 128_256) -> dict[str, Any]:
    """LlamaConfig's options for a shape; `keys` is the number of heads of keys and values."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": wide,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    }


SHAPES = {
    "8b": Shape(config=llama(hidden=4096, layers=32, heads=32, keys=8, wide=14_336), length=2048, batch=4, warmup=10, steps=30),
    "1b": Shape(config=llama(hidden=2048, layers=16, heads=32, keys=8, wide=8192), length=2048, batch=4, warmup=10, steps=50),
    "tiny": Shape(
        config=llama(hidden=64, layers=2, heads=4, keys=2, wide=128, vocabulary=1024),
        length=128,
        batch=2,
        warmup=5,
        steps=40,
        liger=["off"],
    ),
}


def main() -> int:
    """Make model and rows, run the sides in turns, record, judge."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="the size of the model")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side and setting")
    parser.add_argument("--steps", type=int, help="steps that are measured in a run; the shape's own when absent")
    parser.add_argument("--liger", nargs="+", choices=("off", "on"), help="settings of use_liger_kernel; all that can run")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_qlora"), help="where model, rows and runs go")
    parser.add_argument("--output", type=Path, help="write the result here instead")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    liger, steps = options.liger or shape.liger, options.steps or shape.steps
    if "on" in liger and importlib.util.find_spec("liger_kernel") is None:
        sys.exit("--liger on: liger_kernel is not installed; pip install liger-kernel, or give --liger off")
    work = options.work.absolute() / options.shape
    if not (work / "model").is_dir():
        child("build", work / "model.part", options.shape)
        (work / "model.part").rename(work / "model")
    seen = write_rows(work, shape, tokens=(shape.warmup + steps) * shape.batch * shape.length)
    measured: dict[str, list[dict[str, Any]]] = {f"liger {setting}": [] for setting in liger}
    for number in range(options.rounds):
        for setting, found in measured.items():
            for side in SIDES:
                file = write_recipe(work, side, shape, steps, liger=setting == "liger on", attention=options.attention)
                found.append({"round": number, "side": side, **measure(file, side, shape, seen)})
                print(f"round {number + 1}, {setting}, {side}: {found[-1]['tokens_per_second']:,.1f} tokens/s", flush=True)
    output = options.output or RESULTS / f"qlora-{options.shape}.json"
    known = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    entries = {name: entry(options, steps, found) for name, found in measured.items()}
    if len(measured) > 1:
        entries["kernels"] = entry(options, steps, kernels(measured["liger on"], measured["liger off"]), least=WITH_KERNELS)
    output.parent.mkdir(parents=True, exist_ok=True)
    runs.write(output, json.dumps(dict(sorted({**known, **entries}.items())), indent=2) + "\n")
    print(f"\n{summary(entries)}\n\n{output}")
    return int(any(misses(of) for of in entries.values()))


# --- model, rows and recipe --------------------------------------------------------------------------------------------


def build(folder: str, shape: str) -> None:
    """Save a model with random bf16 weights and the shape's vocabulary, and a small tokenizer for the words of the rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<|pad|>", "<|end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS), *(f" {word}" for word in WORDS)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")  # noqa: S106  # no password
    fast.save_pretrained(folder)
    ends = {"pad_token_id": fast.pad_token_id, "eos_token_id": fast.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape].config, **ends)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="4GB")


def write_rows(work: Path, shape: Shape, tokens: int) -> float:
    """Write rows.jsonl, prompts with completions of at least so many tokens; return how many tokens a token sees on average.

    The rows' lengths are log-normal with a median of a sixth of a packed row, and none is longer than that.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "model" / "tokenizer.json"))
    draw = random.Random(0)  # noqa: S311  # rows, no secrets
    rows, lengths = [], []
    while sum(lengths) < tokens:
        words = draw.choices(WORDS, k=max(4, int(draw.lognormvariate(0, 0.8) * shape.length / 6)))
        row = {"prompt": " ".join(words[: len(words) // 4]), "completion": " " + " ".join(words[len(words) // 4 :])}
        length = len(tokenizer.encode(row["prompt"] + row["completion"]).ids) + 1  # EOS
        if length <= shape.length:
            rows.append(row)
            lengths.append(length)
    runs.write(work / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return sum(length * (length + 1) / 2 for length in lengths) / sum(lengths)


def write_recipe(work: Path, side: str, shape: Shape, steps: int, *, liger: bool, attention: str) -> Path:
    """The recipe of a run; plain TRL takes its sections, too."""
    import torch

    values = {
        "task": "causal-lm",
        "model": {"name_or_path": str(work / "model"), "dtype": "bfloat16", "attn_implementation": attention},
        "quantization": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        },
        "adapter": {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"},
        "data": {"train": {"path": str(work / "rows.jsonl")}},
        "training": {
            "output_dir": str(work / side),
            "max_steps": shape.warmup + steps,
            "per_device_train_batch_size": shape.batch,
            "max_length": shape.length,
            "packing": True,
            "train_sampling_strategy": "sequential",  # the same rows in each step of both sides
            "activation_checkpointing": True,
            "bf16": True,
            "optim": "paged_adamw_8bit",
            "learning_rate": 0.0002,
            "use_liger_kernel": liger,
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": "none",
            "include_num_input_tokens_seen": "non_padding",
            "use_cpu": not torch.cuda.is_available(),
        },
    }
    file = work / f"{side}.yaml"
    runs.write(file, yaml.safe_dump(values, sort_keys=False))
    return file


# --- one run -----------------------------------------------------------------------------------------------------------


class Stopwatch(TrainerCallback):
    """Clock and token count at the end of the last warm-up step, and what a run took at the end of its last step."""

    def __init__(self, output: Path, warmup: int) -> None:
        self.output, self.warmup = output, warmup

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002  # upstream's signature
        """Read the clock when the device has done all its work."""
        if state.global_step not in (self.warmup, state.max_steps):
            return
        import torch

        cuda = args.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        if state.global_step == self.warmup:
            self.started, self.tokens = time.perf_counter(), state.num_input_tokens_seen
            return
        seconds = time.perf_counter() - self.started
        found = {
            "seconds": seconds,
            "steps": state.max_steps - self.warmup,
            "tokens": state.num_input_tokens_seen - self.tokens,
            "losses": [logged["loss"] for logged in state.log_history if "loss" in logged],
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else resident(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
        }
        runs.write(self.output, json.dumps(found))


def resident() -> int:
    """The peak of this process's resident memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def by_scalepeft(recipe: str, output: str, warmup: str) -> None:
    """`scalepeft train RECIPE`, with a stopwatch."""
    watch(output, warmup)
    from scalepeft import cli

    sys.exit(cli.main(["train", recipe]))


def by_trl(recipe: str, output: str, warmup: str) -> None:
    """SFTTrainer with what the recipe says, with a stopwatch."""
    watch(output, warmup)
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    values = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    name, options = values["model"].pop("name_or_path"), values["adapter"]
    quantization = BitsAndBytesConfig(**values["quantization"])
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization, **values["model"]),
        args=SFTConfig(**values["training"]),
        train_dataset=load_dataset("json", data_files=values["data"]["train"]["path"], split="train"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **{k: v for k, v in options.items() if k != "peft_type"}),
    ).train()


def watch(output: str, warmup: str) -> None:
    """Give every trainer of this process a stopwatch."""
    from transformers import trainer

    trainer.DEFAULT_CALLBACKS.append(Stopwatch(Path(output), int(warmup)))


CHILDREN: dict[str, Callable[..., None]] = {"build": build, "scalepeft": by_scalepeft, "trl": by_trl}
"""What this file does as a process of its own, by its first argument."""


def child(*arguments: object) -> None:
    """Run one of CHILDREN on its arguments, a path first. Ends the program with the last of what it said when it fails."""
    log = Path(str(arguments[1])).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with log.open("w", encoding="utf-8") as stream:
        command = [sys.executable, str(Path(__file__).resolve()), *map(str, arguments)]
        status = subprocess.run(command, check=False, env=environment, stdout=stream, stderr=subprocess.STDOUT).returncode
    if status:
        sys.exit(f"{log.read_text(encoding='utf-8')[-2000:]}\n{' '.join(command[2:])}: exit status {status}; {log} has it all")


def measure(recipe: Path, side: str, shape: Shape, seen: float) -> dict[str, Any]:
    """A run's figures."""
    output = recipe.with_suffix(".json")
    output.unlink(missing_ok=True)
    shutil.rmtree(recipe.with_suffix(""), ignore_errors=True)  # the run of the round before
    child(side, recipe, output, shape.warmup)
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    speed = found["tokens"] / found["seconds"]
    peak = next((value for name, value in PEAK.items() if name in found["device"] and "MIG" not in found["device"]), None)
    return {
        "tokens_per_second": round(speed, 3),
        **{use: peak and round(speed * count / peak, 4) for use, count in zip(("mfu", "hfu"), flops(shape, seen), strict=True)},
        **found,
    }


def flops(shape: Shape, seen: float) -> tuple[float, float]:
    """FLOPs per token that a step needs and that it executes; `seen` is how many tokens a token sees on average."""
    config = shape.config
    hidden, layers, wide = (config[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    linear = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden), *[(hidden, wide)] * 3]
    blocks = layers * sum(a * b for a, b in linear)
    adapter = layers * sum(RANK * (a + b) for a, b in linear)
    attention = 4 * layers * hidden * seen
    needed = 4 * (blocks + hidden * config["vocab_size"]) + 6 * adapter + 3 * attention
    return needed, needed + 2 * blocks + 2 * adapter + attention


# --- the result --------------------------------------------------------------------------------------------------------


def kernels(fused: list[dict[str, Any]], plain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of scalepeft with fused kernels and those of TRL without."""
    return [run for run in fused if run["side"] == "scalepeft"] + [run for run in plain if run["side"] == "trl"]


def entry(
    options: argparse.Namespace, steps: int, found: list[dict[str, Any]], *, least: float = LIMITS["tokens_per_second"]
) -> dict[str, Any]:
    """What is recorded of a setting; `least` is the target of its ratio of speeds."""
    versions = runs.versions()
    if importlib.util.find_spec("liger_kernel"):
        versions["liger-kernel"] = metadata.version("liger-kernel")
    shape = SHAPES[options.shape]
    return {
        "shape": options.shape,
        "attention": options.attention,
        "tokens_per_step": shape.batch * shape.length,
        "warmup_steps": shape.warmup,
        "steps": steps,
        "device": found[0]["device"],
        **{side: {key: spread([run[key] for run in found if run["side"] == side]) for key in LIMITS} for side in SIDES},
        "ratio": {key: spread(ratios(found, key)) for key in LIMITS},
        "least": least,
        "losses_apart": max(apart(found), default=0.0),
        "runs": [{k: v for k, v in run.items() if k != "device"} for run in found],
        "date": runs.now()[:10],
        "commit": runs.commit(),
        "versions": versions,
    }


def ratios(found: list[dict[str, Any]], key: str) -> list[float]:
    """scalepeft's figure to TRL's in each round."""
    of = {(run["round"], run["side"]): run[key] for run in found}
    return [of[number, "scalepeft"] / of[number, "trl"] for number, side in of if side == "trl"]


def apart(found: list[dict[str, Any]]) -> list[float]:
    """The relative differences of the two sides' logged losses, of all rounds."""
    of = {(run["round"], run["side"]): run["losses"] for run in found}
    pairs = [zip(of[number, "scalepeft"], losses, strict=True) for (number, side), losses in of.items() if side == "trl"]
    return [abs(ours - theirs) / theirs for pair in pairs for ours, theirs in pair]


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def misses(of: dict[str, Any]) -> list[str]:
    """The limits that a setting misses; a CPU is not judged."""
    ratio = {key: of["ratio"][key]["median"] for key in LIMITS}
    missed = {
        "tokens_per_second": ratio["tokens_per_second"] < of["least"],
        "peak_memory_bytes": ratio["peak_memory_bytes"] > LIMITS["peak_memory_bytes"],
        "losses": of["losses_apart"] > LOSS,
    }
    return [key for key, late in missed.items() if late and of["device"] != "cpu"]


def summary(entries: dict[str, dict[str, Any]]) -> str:
    """The results as a table."""
    rows = [("", "tokens/s", "TRL's", "ratio", "least", "largest", "GiB", "TRL's", "ratio", "mfu", "hfu", "")]
    for name, of in entries.items():
        speed, memory = (of["ratio"][key] for key in LIMITS)
        used = next(run for run in of["runs"] if run["side"] == "scalepeft")
        rows.append(
            (
                name,
                *(f"{of[side]['tokens_per_second']['median']:,.1f}" for side in SIDES),
                *(f"{speed[key]:.3f}" for key in ("median", "min", "max")),
                *(f"{of[side]['peak_memory_bytes']['median'] / 2**30:.2f}" for side in SIDES),
                f"{memory['median']:.3f}",
                *("-" if used[key] is None else f"{used[key]:.1%}" for key in ("mfu", "hfu")),
                "OVER" if misses(of) else "",
            )
        )
    return table(rows)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        CHILDREN[sys.argv[1]](*sys.argv[2:])
    else:
        sys.exit(main())
