"""What happens at each step besides training: the log, the progress bar, the request to stop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalepeft.console import note
from scalepeft.errors import Interrupted
from scalepeft.run import Run
from scalepeft.sampler import StepBatches
from scalepeft.stops import Stop, StopFile

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
    """Heeds a request to stop: after a step, after a checkpoint, or between the batches of an evaluation.

    All processes stop at the same place: whether any of them was asked is reduced over them each time.
    """

    def __init__(self, stop: Stop, run: Path) -> None:
        self.stop, self.run, self.file = stop, run, StopFile(run)
        self.stopped = self.by_file = False

    def asked(self, *, first: bool) -> bool:
        """Whether this process was asked; the `first` one also looks for the file."""
        self.by_file = self.by_file or (first and self.file.there())
        return self.stop.requested or self.by_file

    def _asked(self, args: TrainingArguments) -> bool:
        if self.stopped:
            return True
        first = args.process_index == 0
        asked = self.asked(first=first)
        if args.world_size > 1:
            flag = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            asked = bool(flag.item())
        if asked:
            self.stopped = self.stop.requested = True
            if first:
                self.file.heeded()
        return asked

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the loop; what was trained is logged, and saved at its end."""
        if self._asked(args):
            control.should_training_stop = True
            control.should_save = control.should_evaluate = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave after a checkpoint: another step would have to be saved again."""
        if self._asked(args):
            control.should_training_stop = True

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave an evaluation, which may take longer than a scheduler waits: it is done again when the run goes on."""
        if self._asked(args):
            raise Interrupted(self.told(state))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An epoch that was broken off is not logged; one that was not is, and evaluated when the run goes on."""
        if self.stopped:
            control.should_save = control.should_evaluate = False
            control.should_log = control.should_log and float(state.epoch or 0).is_integer()

    def told(self, state: TrainerState) -> str:
        """Where the run stopped and how it goes on."""
        if not state.global_step:
            return f"{self.run}: stopped before the first step; the same command begins anew"
        saved = self.run / f"checkpoint-{state.global_step}"
        return f"stopped at step {state.global_step} of {state.max_steps}, saved in {saved}; the same command resumes"
