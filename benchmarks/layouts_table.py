"""docs/layouts.md, written from what the tests of the layout contract measured.

python benchmarks/layouts_table.py            run the tests, keep what they measured, write the page (ten minutes on two cores)
python benchmarks/layouts_table.py --page     write the page from the figures that are kept
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "layouts.md"
KEPT = ROOT / "benchmarks" / "results" / "layouts.json"
OVERHEAD = KEPT.with_name("layout_overhead.json")
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes")
FIGURES = {"loss": "loss", "grad_norm": "gradient norm", "eval_loss": "evaluation loss", "weights": "adapter"}


def main() -> int:
    """Run the tests unless only the page is asked for, and write it."""
    if sys.argv[1:] != ["--page"]:
        KEPT.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(KEPT.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


def measure() -> list[dict[str, Any]]:
    """What each comparison of the layout contract measured; fails when one of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layouts.jsonl"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/test_layout.py", "-k", "no_layout_changes_a_number"],
            cwd=ROOT,
            env=os.environ | {"SCALEPEFT_RECORD_LAYOUTS": str(file)},
            check=True,
        )
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


PROSE = """\
<!-- Written by benchmarks/layouts_table.py from what tests/test_layout.py measured: run it, change no row by hand. -->
# Layouts

A layout is processes x batch per process x accumulation x engine. The recipe says what is trained, a file of
[accelerate_configs/](../accelerate_configs) on what:

{files}

```console
$ scalepeft train RECIPE --launch zero3 --num-processes 2
accelerate launch --config_file accelerate_configs/deepspeed_zero3.yaml --num_processes 2 ... -m scalepeft.train RECIPE
```

The line that is printed is the one that is run, and may be given by itself. Without `--num-processes` every GPU gets a
process. `--cpu` runs the files of DDP and ZeRO on CPUs, unedited. On several machines, each is given the same line but for its
rank; `--num-processes` counts all processes:

```text
scalepeft train RECIPE --launch zero3 --num-processes 16 --num-machines 2 --machine-rank 0 \\
    --main-process-ip node0 --main-process-port 29500
```

## The contract

With the same rows per optimizer step (`global_batch_size`) a recipe takes the same rows at the same rate in every step,
whatever the layout. With dropout and noise off, losses, gradient norms and the trained weights are those of one process within
{close:.0e} (relative, in fp32). Random masks differ between layouts. Evaluation counts every row once, whatever remains of the
division.

Measured on {device}, {date}, with {versions}:
small models with random weights, {encoder} steps of an encoder over texts of 2 to 60 words and {decoder} steps of a decoder,
the last step of an epoch one that does not divide. Each row is the largest relative difference from one process with a
batch of 16.
FSDP2 was run by accelerate's own code, told that its processes on CPUs were ones on GPUs; no GPU has run it yet.

{table}

`(rows and rates)`: with dropout, compared were the rows of every step and the learning rates, which were the same.

Of peft's types DEFT, LILY, PVERA and SHADOW, and LORA with `velora_config`, are outside the contract: what they give for a row
depends on the rows beside it, or on chance, and so on how a step is divided.

## What is refused

- A launch of several processes that would start one, FSDP on CPUs (accelerate runs DDP in its place), fewer GPUs than
  processes.
- Processes that see another recipe, other rows, other versions of packages, or another run directory: one message, and all
  end.
- What an engine does not train as one process does: ADALORA and ADAMSS under ZeRO and FSDP2; under ZeRO-3 types other than
  {zero3}; under FSDP2 other than
  {fsdp2}; initialisations of LORA that change the base's weights under ZeRO-3.
- Optimizers that look at the shape of a parameter (adafactor, galore, ...) under ZeRO; those of bitsandbytes under FSDP2, so
  that QLoRA there needs `training.optim: adamw_torch_fused`, and where ZeRO offloads states, which torch's own step on the
  host. DeepSpeedCPUAdam, which upstream would put in their place, is not used: its steps are up to 7e-6 off, and no faster
  (`benchmarks/host_optimizer.py`).

One process that dies ends all others, within 30 seconds on its machine, and its error is told once. Where a whole machine is
lost, its peers end with their next exchange, or after `training.ddp_timeout` seconds.

## Resuming

On the layout that it was broken off on, a run goes on to the byte (fp32 on CPUs: one process, DDP, ZeRO-2 and ZeRO-3, with
dropout, NEFTune and length grouping: `tests/test_resume.py`). One process and DDP go on from each other's checkpoints, with
the same rows in each step and the numbers of the contract, random masks aside. What ZeRO and FSDP2 keep in parts is resumed by
as many processes of the same engine; elsewhere it is refused in a line.

## What is where

| | whole on each process | divided | saved |
|---|---|---|---|
| DDP | weights, gradients, optimizer | - | by process 0 |
| ZeRO-1 | weights, gradients | optimizer | by process 0 |
| ZeRO-2 | weights | gradients, optimizer | by process 0 |
| ZeRO-3, FSDP2 | a layer at a time | weights, gradients, optimizer | the adapter, gathered tensor by tensor |

Two processes of one thread trained {overhead:.2f} times as many rows per second as one process of two threads ({range}; a small
encoder in fp32, two cores, in turn: `benchmarks/layout_overhead.py`).

Rows are prepared once where processes share a cache (`SCALEPEFT_CACHE`), and once on each machine where they do not; the start
panel and `run.json` say which. The run directory must be one that all machines share.

DeepSpeed compiles extensions when it is first used on a machine, for one or two minutes; one process does it, and says so.

Under mixed precision DeepSpeed holds the weights in bf16, where DDP holds them as they were loaded and computes under autocast:
the contract is one of fp32, and with `bf16` the losses of ZeRO differ from those of DDP by the rounding of bf16.
"""


def page(kept: Sequence[Mapping[str, Any]]) -> str:
    """The text of docs/layouts.md."""
    from scalepeft.engines import IN_PARTS

    versions = kept[0]["versions"]
    overhead = json.loads(OVERHEAD.read_text(encoding="utf-8"))
    steps = {kind: {row["steps"] for row in kept if row["recipe"].startswith(kind)} for kind in ("encoder", "decoder")}
    return PROSE.format(
        files="\n".join(files()),
        close=1e-5,
        overhead=overhead["median"],
        range=f"{min(overhead['ratios']):.2f} to {max(overhead['ratios']):.2f}",
        device={"cpu": "CPUs", "cuda": "GPUs"}[kept[0]["device"]],
        date=max(row["date"] for row in kept)[:10],
        versions=", ".join(f"{name} {versions[name]}" for name in PACKAGES),
        table="\n".join(table(kept)),
        **{kind: " or ".join(map(str, sorted(found))) for kind, found in steps.items()},
        zero3=", ".join(IN_PARTS["ZeRO-3"]),
        fsdp2=", ".join(IN_PARTS["FSDP2"]),
    )


def files() -> Iterable[str]:
    """The launch files, with the first sentence of each."""
    yield "| `--launch` | |"
    yield "|---|---|"
    for path in sorted((ROOT / "accelerate_configs").glob("*.yaml")):
        head = " ".join(line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
        said = head.split("   scalepeft train", 1)[0].split("  scalepeft train", 1)[0].strip().removesuffix("#").strip()
        yield f"| [`{path.stem.removeprefix('deepspeed_')}`](../accelerate_configs/{path.name}) | {said} |"


def table(kept: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """A line for each comparison."""
    yield f"| layout | recipe | {' | '.join(FIGURES.values())} |"
    yield f"|---|---|{'---|' * len(FIGURES)}"
    for row in kept:
        found = [f"{row['apart'][name]:.1e}" if row["apart"] else "(rows and rates)" for name in FIGURES]
        yield f"| {row['layout']} | {row['recipe']} | {' | '.join(found)} |"


if __name__ == "__main__":
    sys.exit(main())
