"""What a training leaves behind to go on from, and how it goes on: upstream's trainer without pickles, and to the bit."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from peft import PeftModel
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import DefaultFlowCallback, ExportableState

from scalepeft import adapters, engines, parts, published, ranks
from scalepeft.adalora import allocates_ranks, load_ranks_state, ranks_may_be_zero, ranks_state
from scalepeft.callbacks import StopRequest
from scalepeft.checkpoint import load_state, save_state
from scalepeft.errors import Interrupted, UserError
from scalepeft.run import METRICS, Run, packages


class Resumable(Trainer):  # type: ignore[misc]
    """Checkpoints that are published when they are whole, and a training that goes on from one as if it had never left."""

    run: Run
    facts: dict[str, Any]
    """What a checkpoint says of the training it belongs to: layout, recipe and data."""
    stop_request: StopRequest
    saved: dict[str, torch.Tensor]
    _resumed_from: Path | None = None
    _step_saved = 0

    # --- saving ---------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As upstream's, which gathers the frozen base, too (FSDP), or copies all of the model (ZeRO-1 and ZeRO-2)."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._save(output_dir, state_dict=adapters.whole(model) if engines.in_parts(model) else None)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # as upstream, without training_args.bin: a pickle of all arguments, which nothing here reads
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        final = not self.is_in_train
        with ranks_may_be_zero(model):
            if isinstance(model, PeftModel):
                saved = adapters.save(model, folder, state_dict, final=final)
            else:
                model.save_pretrained(folder, state_dict=state_dict)
                saved = model.state_dict() if state_dict is None else state_dict
            if final:  # the weights of the result, for the verification: gathered ones exist only here
                self.saved = saved
        self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:  # noqa: ARG002  # as upstream calls it
        step, first = self.state.global_step, self.args.process_index == 0
        folder = published.beside(self.run.path, step)
        folder.mkdir(parents=True, exist_ok=True)
        self.store_flos()
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        self._know_the_best()
        if first:
            if allocates_ranks(self.model):
                save_state(ranks_state(self.model), folder / "ranks.safetensors")
            stateful = [c for c in (*self.callback_handler.callbacks, self.control) if isinstance(c, ExportableState)]
            self.state.stateful_callbacks |= {type(each).__name__: each.state() for each in stateful}
            self.state.save_to_json(str(folder / "trainer_state.json"))
        ranks.agree({"checkpoint": step})  # safetensors writes under another name first, which is no file to be listed
        written = ranks.agree({"_files": published.digests(folder, self.args.process_index)})
        if first:
            files = {name: digest for facts in written for name, digest in facts["_files"].items()}
            metrics = self.run.flushed(METRICS)
            known = {"files": files, "metrics": metrics, "versions": packages(), **self.facts}
            published.publish(self.run.path, step, known)
            published.rotate(self.run.path, self.args.save_total_limit, self.state.best_model_checkpoint)
        self._step_saved = step

    def _know_the_best(self) -> None:
        """The best checkpoint's path, wherever the run directory lies now."""
        step = self.state.best_global_step
        best = self.run.path / f"checkpoint-{step}"
        if step and (step == self.state.global_step or best.is_dir()):
            self.state.best_model_checkpoint = str(best)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        if self.is_deepspeed_enabled:  # by parts.deepspeed_without_pickles
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=isinstance(self.model, PeftModel))
        elif self.is_fsdp_enabled:
            save_state(parts.of_fsdp(self.model, self.optimizer), folder / self._own_part())
        elif self.args.should_save:
            save_state(self.optimizer.state_dict(), folder / "optimizer.safetensors")
        if self.args.should_save and not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            save_state(self.lr_scheduler.state_dict(), folder / "scheduler.safetensors")

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            save_state(self.accelerator.scaler.state_dict(), Path(output_dir, "scaler.safetensors"))

    def _save_rng_state(self, output_dir: str) -> None:
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),  # noqa: NPY002  # the global generator that upstream draws from
            "torch": torch.random.get_rng_state(),
            "loss": self._tr_loss,  # of this process since the last log
            "logged": self._globalstep_last_logged,
        }
        if self.args.device.type != "cpu":
            state["device"] = torch.get_device_module(self.args.device).get_rng_state()
        save_state(state, Path(output_dir, f"process_{self.args.process_index}.safetensors"))

    # --- going on -------------------------------------------------------------------------------------------------------

    def _init_training_state(self, *args: Any, **options: Any) -> Any:
        found = super()._init_training_state(*args, **options)
        self._know_the_best()
        return found

    def train(self, resume_from_checkpoint: str | None = None, **options: Any) -> Any:
        """As upstream's; `resume_from_checkpoint` is a path or None."""
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._step_saved = published.step_of(self._resumed_from) if self._resumed_from else 0
        self.add_callback(_TakingUp(self))
        return super().train(resume_from_checkpoint, **options)

    def take_up(self) -> None:
        """What upstream forgets of a training: the loss since the last log, and an evaluation that was left out."""
        if self._resumed_from is None:
            return
        states = [load_state(path) for path in sorted(self._resumed_from.glob("process_*.safetensors"), key=_number)]
        losses = [state["loss"] for state in states]
        # of another number of processes each is given the mean, which is what they are reduced to when they are logged
        loss = losses[self.args.process_index] if len(losses) == self.args.world_size else torch.stack(losses).mean()
        self._tr_loss = loss.to(self.args.device)
        self._globalstep_last_logged = states[0]["logged"]
        if self._evaluation_is_due():
            figures = self._evaluate(None, None)
            self._determine_best_metric(metrics=figures, trial=None)
            self._know_the_best()

    def _evaluation_is_due(self) -> bool:
        """Whether the step that was saved last should have been evaluated, and was not."""
        flow, due, step = DefaultFlowCallback(), TrainerControl(), self.state.global_step
        flow.on_step_end(self.args, self.state, due)
        if step % self._steps_per_epoch() == 0 or step >= self.state.max_steps:
            flow.on_epoch_end(self.args, self.state, due)
        return bool(due.should_evaluate) and not self.evaluated()

    def evaluated(self) -> bool:
        """Whether the figures of the last step are in the log, be it by an earlier session."""
        return any(entry["step"] == self.state.global_step and "eval_loss" in entry for entry in self.state.log_history)

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take back what was logged of an evaluation that is left: the whole of it will be done again."""
        logged, first = len(self.state.log_history), self.args.process_index == 0
        size = (self.run.path / METRICS).stat().st_size if first else 0
        try:
            yield
        except Interrupted:
            del self.state.log_history[logged:]
            if first:
                os.truncate(self.run.path / METRICS, size)
            raise

    def _steps_per_epoch(self) -> int:
        raise NotImplementedError

    def _run_epoch(self, **options: Any) -> None:
        patient = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        stopped_early = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in patient)
        if self.state.global_step >= self.state.max_steps or stopped_early:  # it left between its last step and its end
            self.control.should_training_stop = True
            return
        super()._run_epoch(**options)
        self._leave_if_stopped()

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **options)
        except Interrupted:  # in an evaluation, which is left out and done when the run goes on
            self.control.should_training_stop = True

    def keep(self) -> None:
        """Save what was trained unless that is done."""
        if self._step_saved != self.state.global_step:
            self._save_checkpoint(self.model, None)

    def _leave_if_stopped(self) -> None:
        if self.stop_request.stopped:
            self.keep()
            raise Interrupted(self.stop_request.told(self.state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            return  # with the optimizer's parts, when there is one
        if allocates_ranks(self.model):  # the adapter file beside holds only the ranks that are left
            load_ranks_state(self.model, load_state(Path(resume_from_checkpoint, "ranks.safetensors")))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if (found := published.flaw(best, contents=True)) is not None:
            raise UserError(f"{best}: {found}, and it is the best checkpoint; train anew with --fresh")
        if allocates_ranks(self.model):
            load_ranks_state(self.model, load_state(best / "ranks.safetensors"))
        elif self.is_fsdp_enabled:
            parts.weights_into_fsdp(self.model, load_state(best / self._own_part()))
        else:
            super()._load_best_model()

    def _own_part(self) -> str:
        return f"engine_{self.args.process_index}.safetensors"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        if self.is_fsdp_enabled:
            saved = load_state(Path(checkpoint, self._own_part()))
            parts.weights_into_fsdp(self.model, saved)
            parts.states_into_fsdp(self.optimizer, saved)
        elif not self.is_deepspeed_enabled:  # which loads its own with the model
            self.optimizer.load_state_dict(load_state(Path(checkpoint, "optimizer.safetensors")))
        if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint, "scheduler.safetensors")))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None and checkpoint is not None:
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint, "scaler.safetensors")))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        file = Path(checkpoint or "", f"process_{self.args.process_index}.safetensors")
        if not file.is_file():  # resumed on more processes than it was saved by: the new ones keep their seeds
            return
        state = load_state(file)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        torch.random.set_rng_state(state["torch"])
        if "device" in state and self.args.device.type != "cpu":
            torch.get_device_module(self.args.device).set_rng_state(state["device"])


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


class _TakingUp(TrainerCallback):  # type: ignore[misc]
    """Calls `take_up` where upstream has set to nought what it does not know."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Before the first step of the session."""
        self.trainer.take_up()
