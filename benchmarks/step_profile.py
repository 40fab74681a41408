"""Where the time of a training goes: shares of forward, backward, optimizer, rows, log and the rest, around the real trainer.

    python benchmarks/step_profile.py [--short]

Three trainings by `scalepeft.train`, each in a process of its own, for a few steps after the first: the quickstart; our fast
recipe for MultiNLI on DistilBERT's shape with random weights; and the quickstart of language models. The trainer's methods are
timed where they are called (what one calls of another is counted there alone); of the operators of forward and backward,
torch.profiler tells the largest. Writes benchmarks/results/step_profile.json.

Not called profile.py: Python's cProfile imports a module of that name, and would find it beside any script of this folder.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import encoder
from ratios import keep

from scalepeft.console import quiet_upstream

PARTS = ("forward and loss", "backward", "optimizer", "rows", "log and callbacks", "rest")
OPERATORS = 4
"""How many are told."""
NO_EVALUATION = [
    *("training.eval_on_start=false", "training.eval_strategy=no", "training.save_strategy=no", "training.use_cpu=true"),
]
MARK = "profile: "


def main() -> int:
    """Train and tell."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="the quickstart alone; keeps nothing")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        print(f"{MARK}{json.dumps(measured(options.train, options.steps))}", flush=True)
        return 0
    quiet_upstream()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = {"quickstart": (["quickstart", *NO_EVALUATION, "training.bf16=false"], 4 if options.short else 24)}
        if not options.short:
            encoder.write(folder)
            ways["mnli_lora_fast"] = ([str(folder / "recipe.yaml")], 16)
            ways["quickstart_sft"] = (["quickstart_sft", *NO_EVALUATION, "training.bf16=false"], 4)
        found = {name: profiled(folder / name, *way) for name, way in ways.items()}
    rows = [[part, *(f"{of['parts'][part]:.1%}" for of in found.values())] for part in PARTS]
    for row in rows:
        print(*row, sep="\t")
    notes = [f"{name}: {', '.join(f'{op} {share:.0%}' for op, share in of['operators'])}." for name, of in found.items()]
    print(*notes, sep="\n")
    table = {"heads": ["share of the time of a step", *found], "rows": rows}
    shares = {f"{name}: {part}": [of["parts"][part]] for name, of in found.items() for part in PARTS}
    notes.insert(0, "The largest operators, by their share of the operators' own time:")
    return keep("step_profile", what=WHAT, unit="share", found=shares, short=options.short, notes=notes, table=table)


WHAT = (
    "Each step of a training by its parts. `rows` is the loading and padding of the batches, `optimizer` the step with the"
    " clipping of the gradient, `log and callbacks` metrics.jsonl, the progress and the look at requests to stop."
)


def profiled(run: Path, words: list[str], steps: int) -> dict[str, Any]:
    """A training in a process of its own."""
    more = [f"training.max_steps={3 * steps}", f"training.output_dir={run}"]
    command = [sys.executable, __file__, "--steps", str(steps), "--train", *words, *more]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.partition(MARK)[2].splitlines()[0])
    return found


# --- in the process ----------------------------------------------------------------------------------------------------


class Shares:
    """Seconds by part; what is timed within another part is taken from that."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._within: list[float] = []

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what happens here."""
        _wait()
        started = time.perf_counter()
        self._within.append(0.0)
        yield
        _wait()
        seconds = time.perf_counter() - started
        self.seconds[part] += seconds - self._within.pop()
        if self._within:
            self._within[-1] += seconds

    def time(self, owner: Any, name: str, part: str) -> None:
        """Have a method counted as a part."""
        method: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(method)
        def timed(*given: Any, **options: Any) -> Any:
            with self.of(part):
                return method(*given, **options)

        setattr(owner, name, timed)


def _wait() -> None:
    """An accelerator computes while Python goes on."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def measured(words: list[str], steps: int) -> dict[str, Any]:
    """The shares of `steps` steps, after as many that are not counted, and the operators of as many again."""
    from scalepeft import kinds, recipe, train

    made, shares, found = kinds.trainer, Shares(), {}

    def watched(*given: Any, **options: Any) -> Any:
        trainer = made(*given, **options)
        trainer.add_callback(_turns(trainer, shares, found, steps))
        return trainer

    kinds.trainer = watched
    with contextlib.suppress(StopIteration):
        train.train(recipe.load(words[0], words[1:]))
    return found


def _turns(trainer: Any, shares: Shares, found: dict[str, Any], steps: int) -> Any:
    """The callback that begins and ends what is measured."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc]
        started = 0.0
        operators = profile(activities=[ProfilerActivity.CPU])

        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == steps:
                time_parts(trainer, shares)
                self.started = time.perf_counter()
            if state.global_step == 2 * steps:
                whole = time.perf_counter() - self.started
                known = {part: shares.seconds[part] / whole for part in PARTS[:-1]}
                found["parts"] = known | {PARTS[-1]: 1 - sum(known.values())}
                self.operators.start()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == 2 * steps + max(1, steps // 6):
                self.operators.stop()
                events = sorted(self.operators.key_averages(), key=lambda event: -event.self_cpu_time_total)
                total = sum(event.self_cpu_time_total for event in events)
                found["operators"] = [(event.key, event.self_cpu_time_total / total) for event in events[:OPERATORS]]
                print(f"{MARK}{json.dumps(found)}", flush=True)
                os._exit(0)  # what follows is not measured

    return Turns()


def time_parts(trainer: Any, shares: Shares) -> None:
    """Which methods are which part."""
    shares.time(trainer, "compute_loss", "forward and loss")
    shares.time(trainer.accelerator, "backward", "backward")
    shares.time(trainer, "get_batch_samples", "rows")
    shares.time(trainer, "_maybe_log_save_evaluate", "log and callbacks")
    shares.time(trainer.callback_handler, "call_event", "log and callbacks")
    for owner, name in (
        (trainer.optimizer, "step"),
        (trainer.lr_scheduler, "step"),
        (trainer.model, "zero_grad"),
        (trainer.accelerator, "clip_grad_norm_"),
    ):
        shares.time(owner, name, "optimizer")


if __name__ == "__main__":
    sys.exit(main())
