"""Time and memory of `scalepeft merge`, beside cp, a bare loop and peft's own merge_and_unload.

    python benchmarks/merge.py --folder DIR       writes benchmarks/results/merge.json (20 GB of disk; tens of minutes)

A model of at least 4 GB in bf16, its largest tensor below 100 MB, is built from a configuration with random weights, and a LoRA
of rank 16 on all its linear layers. Each way writes the merged shards, in a process of its own, in turns. Counted is what a way
does after its imports; the proof is left out. Memory is anonymous memory at its highest over what the interpreter with its
imports holds: pages of mapped files are the system's to drop. Then the memory alone of merging each type whose rows are
merged one after the other, in a small model whose largest layers have 100 MB. Exits with status 1 when a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "merge.json"

SHAPE = {
    "hidden_size": 2560,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "vocab_size": 16384,
}
SHARD = 10**9
RANK, ALPHA = 16, 8

WIDE = SHAPE | {"intermediate_size": 19456, "num_hidden_layers": 2}
"""Its MLP's matrices have 99.6 MB each in bf16."""
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LORA", {"r": 16}),
    "DoRA": ("LORA", {"r": 16, "use_dora": True}),
    "LoRA of the embedding": ("LORA", {"r": 16, "target_modules": ["q_proj", "embed_tokens"]}),
    "AdaLoRA": ("ADALORA", {"total_step": 10}),
    "IA3": ("IA3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LoHa": ("LOHA", {}),
    "VeRA": ("VERA", {}),
}
"""Types, and what they are given beside all linear layers as their targets."""

MOST_MEMORY = 400e6
MOST_TIME = 2.0
"""Of the bare loop's."""
MOST_OF_PEFT = {"time": 1 / 3, "memory": 1 / 5}


def main() -> int:
    """Build, measure in turns, write, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the model and what is written from it go")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--types", action="store_true", help="only the memory of each type, beside the figures that are there")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measured(WAYS[options.way], options.folder)))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    result = json.loads(RESULT.read_bytes()) if options.types else ways(options.folder, options.repetitions)
    result["types"] = types(options.folder)
    result["claims"] = judged(result["ways"], result["types"])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["claims"], indent=2))
    return 0 if all(claim["holds"] for claim in result["claims"].values()) else 1


def ways(folder: Path, repetitions: int) -> dict[str, Any]:
    """Each way in turns, on the large model."""
    built("build", folder, folder / "adapter")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(repetitions):
        for way in WAYS:
            found[way].append(one(way, folder))
            print(way, found[way][-1], flush=True)
    summary = {
        way: {name: statistics.median(run[name] for run in runs) for name in runs[0]} | {"runs": runs}
        for way, runs in found.items()
    }
    return {"model": model(folder), "machine": machine(), "ways": summary}


def types(folder: Path) -> dict[str, float]:
    """The memory of merging each type, in bytes."""
    found = {}
    for name in TYPES:
        place = folder / name.replace(" ", "-")
        built("build_type", place, place / "adapter", name)
        found[name] = one("merge", place)["memory"]
        print(name, found[name], flush=True)
        shutil.rmtree(place)
    return found


def built(function: str, folder: Path, result: Path, *given: str) -> None:
    """Let a process of its own build what is not there yet."""
    if (result / "adapter_model.safetensors").is_file():
        return
    told = ", ".join([f"pathlib.Path({str(folder)!r})", *map(repr, given)])
    code = f"import merge, pathlib; merge.{function}({told})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", check=True)


def judged(ways: dict[str, Any], types: dict[str, float]) -> dict[str, Any]:
    """The claims and whether they hold."""
    ours, bare, peft = (ways[way] for way in ("merge", "bare", "peft"))
    values = {
        "anonymous memory, bytes": (ours["memory"], MOST_MEMORY),
        "time against the bare loop": (ours["seconds"] / bare["seconds"], MOST_TIME),
        "time against peft": (ours["seconds"] / peft["seconds"], MOST_OF_PEFT["time"]),
        "memory against peft": (ours["memory"] / peft["memory"], MOST_OF_PEFT["memory"]),
        "anonymous memory of any type, bytes": (max(types.values()), MOST_MEMORY),
    }
    return {name: {"found": found, "at_most": most, "holds": found <= most} for name, (found, most) in values.items()}


def build(folder: Path) -> None:
    """The base of at least 4 GB, its tokenizer and a LoRA."""
    made(folder, SHAPE, "LORA", {"r": RANK, "lora_alpha": ALPHA})


def build_type(folder: Path, name: str) -> None:
    """The base with large layers, its tokenizer and an adapter of a type."""
    made(folder, WIDE, *TYPES[name])


def made(folder: Path, shape: dict[str, Any], kind: str, options: dict[str, Any]) -> None:
    """A base with random weights in bf16 with its tokenizer, and an adapter for it."""
    import peft
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    base = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=20, max_position_embeddings=512, dtype="bfloat16"))
    base.save_pretrained(folder / "base", max_shard_size=SHARD)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))  # noqa: S106  # no password
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder / "base")  # noqa: S106
    given = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    adapted = peft.get_peft_model(base, peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**given))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)


def model(folder: Path) -> dict[str, Any]:
    """What was merged."""
    from scalepeft.shards import Checkpoint

    base = Checkpoint(folder / "base")
    sizes = [base.get(name).numel() * base.get(name).element_size() for name in base.names]
    files = len(list((folder / "base").glob("*.safetensors")))
    return {"bytes": sum(sizes), "largest_tensor": max(sizes), "tensors": len(sizes), "files": files, "dtype": "bfloat16"}


def machine() -> dict[str, Any]:
    """Where."""
    from scalepeft.run import packages

    return {"platform": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "versions": packages()}


def one(way: str, folder: Path) -> dict[str, float]:
    """One way, once, in a process of its own."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, __file__, "--folder", str(folder), "--way", way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- the ways ---------------------------------------------------------------------------------------------------------


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def measured(way: Callable[[Path], None], folder: Path) -> dict[str, float]:
    """Seconds, processor seconds and anonymous memory of a way, after its imports."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from scalepeft import folding, merge, proof  # noqa: F401

    before = peak = anonymous()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, busy = time.monotonic(), time.process_time()
    way(folder)
    found = {"seconds": time.monotonic() - start, "processor_seconds": time.process_time() - busy}
    ended.set()
    watcher.join()
    return found | {"memory": peak - before}


def copied(folder: Path) -> None:
    """The system's copy."""
    subprocess.run(["cp", "-r", folder / "base", folder / "out"], check=True)
    os.sync()


def bare(folder: Path) -> None:
    """Read, add in float32, write: what no merge can do without."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    (folder / "out").mkdir()
    for file in sorted((folder / "base").glob("*.safetensors")):
        tensors = {}
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118  # not a dict
                tensor, layer = stream.get_tensor(name), f"base_model.model.{name.removesuffix('.weight')}"
                if f"{layer}.lora_A.weight" in adapter:
                    a, b = (adapter[f"{layer}.lora_{side}.weight"].float() for side in "AB")
                    tensor = (tensor.float() + b @ a * (ALPHA / RANK)).to(tensor.dtype)
                tensors[name] = tensor
        save_file(tensors, folder / "out" / file.name, metadata={"format": "pt"})
    os.sync()


def ours(folder: Path) -> None:
    """`scalepeft merge` without its proof."""
    from scalepeft import merge

    merge.main([str(folder / "adapter"), "--output", str(folder / "out"), "--shard-size", "1GB", "--no-proof"])


def by_peft(folder: Path) -> None:
    """Load, merge_and_unload, save."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(
        folder / "out", max_shard_size=SHARD
    )
    os.sync()


WAYS: dict[str, Callable[[Path], None]] = {"cp": copied, "bare": bare, "merge": ours, "peft": by_peft}


if __name__ == "__main__":
    sys.exit(main())
