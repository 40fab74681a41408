"""What happens at each step besides training: the log, the progress bar, the request to stop."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalepeft.console import note
from scalepeft.run import Run
from scalepeft.sampler import StepBatches

SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""Endings of what upstream measures beside the metrics of an evaluation."""


class MetricsLog(TrainerCallback):  # type: ignore[misc]
    """Appends what is measured to metrics.jsonl."""

    def __init__(self, run: Run, batches: StepBatches) -> None:
        self.run, self.batches = run, batches

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Keep the documented keys: no times, so that the same training writes the same bytes."""
        measured = {
            k: v
            for k, v in logs.items()
            if k in ("loss", "grad_norm", "learning_rate") or (k.startswith("eval_") and not k.endswith(SPEED))
        }
        if measured and state.is_world_process_zero:
            # by rows: upstream's epoch counts micro-batches, and differs between layouts within an epoch whose end is uneven
            epoch = self.batches.rows_after(state.global_step) / self.batches.rows_per_epoch
            self.run.log({"step": state.global_step, "epoch": round(epoch, 6), **measured})


class Progress(TrainerCallback):  # type: ignore[misc]
    """A bar with the newest figures in a terminal; a line per log entry in a log file."""

    def __init__(self) -> None:
        self.training_bar: tqdm[Any] | None = None
        self.prediction_bar: tqdm[Any] | None = None
        self.latest: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the bar at the step the run resumes from."""
        if state.is_world_process_zero and sys.stderr.isatty():
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, desc="train")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.training_bar.n)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **_: Any
    ) -> None:
        """Show evaluation in a terminal only, and leave no bar behind."""
        if state.is_world_process_zero and sys.stderr.isatty():
            if self.prediction_bar is None:
                self.prediction_bar = tqdm(total=len(eval_dataloader), leave=False, dynamic_ncols=True, desc="evaluate")
            self.prediction_bar.update(1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the evaluation's bar away."""
        if self.prediction_bar is not None:
            self.prediction_bar.close()
        self.prediction_bar = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Show loss and metrics beside the bar, or on a line of their own where there is no terminal."""
        shown = {
            k: f"{v:.4g}" for k, v in (logs or {}).items() if k in _SHOWN or (k.startswith("eval_") and k.endswith(_SCORES))
        }
        if not state.is_world_process_zero or not shown:
            return
        if self.training_bar is not None:
            self.latest |= {k: v for k, v in shown.items() if k in _BESIDE_BAR}
            self.training_bar.set_postfix(self.latest)
        elif not sys.stderr.isatty():
            note(f"step {state.global_step}/{state.max_steps}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))


_SCORES = ("_loss", "_accuracy", "_f1_macro", "_pearson", "_rewards_accuracies")
_BESIDE_BAR = ("loss", "eval_loss", "eval_accuracy", "eval_pearson", "eval_rewards_accuracies")
_SHOWN = ("loss", "learning_rate", "grad_norm")


class StopRequest(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C or SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once.

    All processes stop at the same step: the request is reduced over them after each.
    """

    def __init__(self, at_once: Callable[[], None]) -> None:
        """`at_once` is called before leaving at once, to record that."""
        self.requested = self.stopped = False
        self.interrupts = 0
        self.at_once = at_once

    def __enter__(self) -> None:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number != signal.SIGINT:
            return
        self.interrupts += 1
        if self.interrupts > 1:
            self.at_once()
            os._exit(130)
        note("\nfinishing this step, then saving; Ctrl-C again leaves at once")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop all processes after this step when any of them was asked to."""
        requested = self.requested
        if args.world_size > 1:
            flag = torch.tensor(int(requested), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            requested = bool(flag.item())
        if requested and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An epoch that was broken off is not evaluated, logged or saved a second time."""
        if self.stopped:
            control.should_save = control.should_evaluate = control.should_log = False
