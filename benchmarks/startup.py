"""How long starting takes: the light verbs against a bare interpreter, a training against the imports that it cannot avoid.

    python benchmarks/startup.py [--short]

`train` is `scalepeft train quickstart` from its command line to the first step, without the baseline's evaluation and the time
in which the weights are loaded, its rows prepared before. `imports` imports torch, transformers' Trainer, peft, datasets and
the model's module, which training needs whoever writes it. `launched` is the same training under `accelerate launch`, and
`verification` what follows a training in a process of its own. The runs are interleaved, each a process. Prints a table, writes
benchmarks/results/startup.json and exits 1 when a verb or the training is over its limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ratios import Ratio, interleaved, keep

SCALEPEFT = str(Path(sys.executable).with_name("scalepeft"))
BARE = "python -c pass"
COMMANDS = {
    BARE: [sys.executable, "-c", "pass"],
    "scalepeft --help": [SCALEPEFT, "--help"],
    "scalepeft check quickstart": [SCALEPEFT, "check", "quickstart"],
}
LIMITS = {"scalepeft --help": (0.060, True), "scalepeft check quickstart": (0.300, False)}
"""Seconds, and whether they are counted above the bare interpreter."""

IMPORTS = """
import torch, datasets, peft
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers.models.bert import modeling_bert
"""
TRAINING = [
    *("quickstart", "training.max_steps=1", "training.eval_on_start=false", "training.eval_strategy=no"),
    *("training.save_strategy=no", "training.bf16=false", "data.evaluation.test.sample_rows=32"),
]
WITHIN = "first step after: "


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="the verbs, and one turn of the training; keeps nothing")
    parser.add_argument("--first-step", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_step is not None:
        return first_step(options.first_step)
    verbs = interleaved({name: _process(command) for name, command in COMMANDS.items()}, repetitions=5 if options.short else 11)
    over, told = judged(verbs)
    with tempfile.TemporaryDirectory() as folder:
        found = interleaved(trainings(Path(folder), short=options.short), repetitions=1 if options.short else 5)
    ratios = [
        Ratio(claim="A training starts as fast as its imports", ours="train", other="imports", most=1.15),
        *([] if options.short else [Ratio(claim=CLAIM_LAUNCHER, ours="launched", other="train", least=1.0)]),
        *([] if options.short else [Ratio(claim=CLAIM_VERIFICATION, ours="verification", other="imports")]),
        Ratio(claim="`--help` loads next to nothing", ours="scalepeft --help", other=BARE),
    ]
    figures = {name: times[: len(found["train"])] for name, times in verbs.items()} | found
    missed = keep("startup", what=WHAT, unit="s", found=figures, ratios=ratios, short=options.short, notes=[*told, *NOTES])
    return 1 if over else missed


CLAIM_LAUNCHER = "A single process does not pay for the launcher, which takes this much longer"
CLAIM_VERIFICATION = "Verifying in a fresh process costs its imports once more"
WHAT = (
    "From the command line to the first step of the quickstart, without the evaluation of the baseline and the loading of the"
    " weights, its rows prepared before; and the verbs that need no model."
)
NOTES = [
    (
        "Left out of the way to the first step: evaluate, with scipy.stats (until rows have been measured), wandb (unless"
        " `report_to` names a tracker), DeepSpeed (unless the launcher asks for it)."
    ),
    (
        "Not ours to leave out: `import peft` imports bitsandbytes where that is installed, which at its import lets"
        " torch.compile load inductor; transformers' losses import scipy.optimize."
    ),
    (
        "The verification is in a process of its own on purpose: the memory of the training is gone before the base is loaded"
        " again, and nothing of it can leak into the answers."
    ),
]


def judged(found: dict[str, list[float]]) -> tuple[int, list[str]]:
    """The table of the light verbs: how many are over their limits, and what is to be said of them."""
    median = {name: statistics.median(times) for name, times in found.items()}
    over, told = 0, []
    print(f"{'command':28}{'median ms':>10}{'above bare':>12}{'limit':>8}")
    for name, value in median.items():
        above = value - median[BARE]
        limit, from_bare = LIMITS.get(name, (float("inf"), False))
        late = (above if from_bare else value) > limit
        over += late
        shown = "" if name == BARE else f"{limit * 1e3:.0f}"
        print(f"{name:28}{value * 1e3:10.1f}{above * 1e3:12.1f}{shown:>8}{'  OVER' if late else ''}")
        if name != BARE:
            above_bare = " above a bare interpreter" if from_bare else ""
            told.append(f"`{name}`, at most {limit * 1e3:.0f} ms{above_bare}: {'**MISSED**' if late else 'kept'}.")
    return over, told


def _process(command: Sequence[str]) -> Callable[[], float]:
    """The wall time of one run, which must succeed."""

    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - started

    return seconds


# --- a training --------------------------------------------------------------------------------------------------------


def trainings(folder: Path, *, short: bool) -> dict[str, Callable[[], float]]:
    """The ways to a first step, and what they are held against."""
    train = [__file__, "--first-step", *TRAINING, f"training.output_dir={folder / 'run'}"]
    # accelerate takes the option of the same meaning from the environment, too, but then starts no launcher
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    ways = {"imports": _process([sys.executable, "-c", IMPORTS]), "train": _first_step([sys.executable, *train])}
    if short:
        return ways
    done = folder / "done"
    command = [sys.executable, "-m", "scalepeft", "train", *TRAINING, f"training.output_dir={done}", "training.use_cpu=true"]
    subprocess.run(command, check=True, capture_output=True)
    verify = [sys.executable, "-m", "scalepeft.verify", str(done)]
    return {**ways, "launched": _first_step([*launch, *train]), "verification": _process(verify)}


def _first_step(command: Sequence[str]) -> Callable[[], float]:
    """Seconds from the command line to the first step."""

    def seconds() -> float:
        started = time.monotonic()
        environment = os.environ | {_STARTED: repr(started)}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return float(done.stdout.partition(WITHIN)[2].splitlines()[0])

    return seconds


_STARTED = "SCALEPEFT_BENCHMARK_STARTED"


def first_step(arguments: Sequence[str]) -> int:
    """In the process: `scalepeft train` up to its first step, which ends it."""
    from scalepeft import kinds, train

    made = kinds.trainer
    loading = 0.0

    def stopping(*given: Any, **options: Any) -> Any:
        from transformers import TrainerCallback

        class Stopping(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                seconds = time.monotonic() - float(os.environ[_STARTED]) - loading  # the clock of all processes of a machine
                print(f"{WITHIN}{seconds}", flush=True)
                os._exit(0)  # at once: what follows is not measured

        trainer = made(*given, **options)
        trainer.add_callback(Stopping())
        return trainer

    def timed(*given: Any, **options: Any) -> Any:
        nonlocal loading
        from transformers.models.bert import modeling_bert  # noqa: F401  # its import is no loading of weights

        started = time.monotonic()
        found = load_base(*given, **options)
        loading = time.monotonic() - started
        return found

    from scalepeft import model

    load_base = model.load_base
    kinds.trainer, model.load_base = stopping, timed
    return train.main([*arguments, "--fresh"])


if __name__ == "__main__":
    sys.exit(main())
