"""Upstream's trainers with this project's order of rows, its evaluation and its checkpoints."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from numpy.typing import NDArray
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, EvalPrediction, PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from scalepeft import adapters, engines
from scalepeft.adalora import RankAllocation, allocates_ranks, load_ranks_state, orthogonality, ranks_may_be_zero, ranks_state
from scalepeft.callbacks import SPEED, Progress
from scalepeft.checkpoint import load_state, publish, save_state
from scalepeft.data import Corpus
from scalepeft.model import answers
from scalepeft.recipe import Recipe
from scalepeft.run import Run
from scalepeft.sampler import NO_ROW, StepBatches
from scalepeft.tasks import IGNORED, SequenceClassification, Task


class Rows(Dataset[dict[str, Any]]):
    """Prepared rows by number; NO_ROW gives a row that counts nowhere."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows.select_columns([c for c in rows.column_names if c not in ("length", "row", "origin")])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        columns = self.rows[[max(i, 0) for i in indices]]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for row, index in zip(rows, indices, strict=True):
            if index == NO_ROW:
                tokens = row.get("labels")
                row["labels"] = [IGNORED] * len(tokens) if isinstance(tokens, list) else IGNORED
        return rows


def step_batches(args: TrainingArguments, lengths: NDArray[np.integer]) -> StepBatches:
    """The micro-batches of this process in training; `lengths` has one entry a row."""
    return StepBatches(
        lengths,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size,
        process=args.process_index,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        strategy=args.train_sampling_strategy,
        drop_last=args.dataloader_drop_last,
    )


def steps_per_epoch(args: TrainingArguments, batches: StepBatches) -> int:
    """Optimizer steps of an epoch; the last may hold fewer rows."""
    accumulation: int = args.gradient_accumulation_steps
    return math.ceil(len(batches) / accumulation)


def total_steps(args: TrainingArguments, batches: StepBatches) -> int:
    """Optimizer steps of the whole run."""
    return int(args.max_steps) if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch(args, batches))


class RecipeTraining(Trainer):  # type: ignore[misc]
    """What this project's trainers share: they train the same whatever the layout, evaluate every named set, leave no pickle.

    Among the bases of a class it stands before the upstream trainer that it changes; the class calls `adopt` once that is made.
    `evaluations` holds, by step and set, the metrics and their details; `saved`, after training and on the process that
    writes, the weights as they were saved.
    """

    def adopt(self, recipe: Recipe, task: Task, run: Run, corpus: Corpus) -> None:
        """Take the recipe's rows and callbacks."""
        for upstream in (PrinterCallback, ProgressCallback):
            self.remove_callback(upstream)
        if recipe.early_stopping is not None:
            self.add_callback(EarlyStoppingCallback(**recipe.early_stopping))
        self.add_callback(Progress())
        if allocates_ranks(self.model):
            self.add_callback(RankAllocation())
        self.recipe, self.task, self.run = recipe, task, run
        # DPOTrainer may have added columns; of a stream upstream has seen the first row alone
        train, evaluation = corpus.sets["train"].rows if corpus.streaming else self.train_dataset, self.eval_dataset or {}
        self.train_dataset: Rows = Rows(train)
        self.eval_dataset: dict[str, Rows] = {name: Rows(rows) for name, rows in evaluation.items()}
        self.lengths = {name: prepared.lengths for name, prepared in corpus.sets.items()}
        self.evaluations: dict[int, dict[str, dict[str, Any]]] = {}
        self.saved: dict[str, torch.Tensor] = {}
        self._details: dict[str, Any] = {}

    def make_optimizer(self) -> None:
        """Make the optimizer, and a scheduler to try its options: what upstream refuses it refuses before the run is opened."""
        engines.before_fsdp(self.accelerator, self.model)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # theirs come with the engine
            return
        self.create_optimizer()
        self.create_scheduler(num_training_steps=100, optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0))
        self.lr_scheduler, self._created_lr_scheduler = None, False

    def step_batches(self) -> StepBatches:
        """The micro-batches of this process in training."""
        return step_batches(self.args, self.lengths["train"])

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches of this process, in the project's own order."""
        return self._loader(self.train_dataset, self.step_batches(), self.data_collator)

    def get_eval_dataloader(self, eval_dataset: str | Dataset[Any] | None = None) -> DataLoader[Any]:
        """The batches of a named set, longest rows first: metrics do not depend on the order, padding does."""
        assert isinstance(eval_dataset, str)
        lengths = self.lengths[eval_dataset]
        batches = StepBatches(
            lengths,
            batch_size=self.args.eval_batch_size,
            processes=self.args.world_size,
            process=self.args.process_index,
            strategy="longest_first",
            fill=self.args.world_size > 1,
        )
        return self._loader(self.eval_dataset[eval_dataset], batches, self.task.collate)

    def _loader(self, rows: Dataset[Any], batches: StepBatches, collate: Any) -> DataLoader[Any]:
        args = self.args
        loader = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor,
            # of its own: a loader draws from its generator at each start, and the global one seeds the dropout masks, which
            # must not depend on how often a run is evaluated
            generator=torch.Generator(),
        )
        # the batches are this process's own already: as a single process, accelerate only moves them to the device
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, device=self.accelerator.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
        )
        return prepared

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate every named set: the main one under eval_*, the others under eval_NAME_*."""
        assert eval_dataset is None, "the sets of the recipe are evaluated"
        figures: dict[str, float] = {}
        measured = self.evaluations[self.state.global_step] = {}
        for index, name in enumerate(self.eval_dataset):
            prefix = f"{metric_key_prefix}_{name}" if index else metric_key_prefix
            found = super().evaluate(name, ignore_keys, prefix)
            own = {k.removeprefix(f"{prefix}_"): v for k, v in found.items() if k.startswith(f"{prefix}_")}
            measured[name] = {k: v for k, v in own.items() if not k.endswith(SPEED)} | self._details
            figures |= found
        if self.state.global_step == 0 and self.args.process_index == 0:  # kept: a resumed run does not measure it again
            self.run.update(evaluation={name: {"before": found} for name, found in measured.items()})
        return figures

    def regularisation(self, share: torch.Tensor | float) -> torch.Tensor | float:
        """What an adapter adds to the loss of a micro-batch that holds a share of the step's items.

        Upstream adds it to the model's own loss, which none of the trainers here takes.
        """
        if not self.model.training:
            return 0.0
        own = orthogonality(self.model) if allocates_ranks(self.model) else adapters.regulariser(self.model)
        return own * share

    def _compute_metrics(self, predicted: EvalPrediction) -> dict[str, float]:
        self._details = self.task.details(predicted.predictions, predicted.label_ids)
        figures: dict[str, float] = self.task.metrics(predicted.predictions, predicted.label_ids)
        return figures

    # --- checkpoints: no pickles, published last ----------------------------------------------------------------------

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

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # rotate after publishing, not before
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint = self.run.path / f"checkpoint-{self.state.global_step}"
            if allocates_ranks(self.model):
                save_state(ranks_state(self.model), checkpoint / "ranks.safetensors")
            publish(checkpoint, self.state.global_step)
            rotate_checkpoints(str(self.run.path), limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if allocates_ranks(self.model):  # the adapter file beside holds only the ranks that are left
            load_ranks_state(self.model, load_state(Path(resume_from_checkpoint, "ranks.safetensors")))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if allocates_ranks(self.model):
            load_ranks_state(self.model, load_state(Path(self.state.best_model_checkpoint, "ranks.safetensors")))
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # sharded states have formats of their own
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            assert self.optimizer is not None
            assert self.lr_scheduler is not None
            save_state(self.optimizer.state_dict(), Path(output_dir, "optimizer.safetensors"))
            save_state(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.safetensors"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        self.optimizer.load_state_dict(load_state(Path(checkpoint, "optimizer.safetensors")))
        self.lr_scheduler.load_state_dict(load_state(Path(checkpoint, "scheduler.safetensors")))

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            save_state(self.accelerator.scaler.state_dict(), Path(output_dir, "scaler.safetensors"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None and checkpoint is not None:
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint, "scaler.safetensors")))

    def _save_rng_state(self, output_dir: str) -> None:
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),  # noqa: NPY002  # the global generator that upstream draws from
            "torch": torch.random.get_rng_state(),
        }
        if self.args.device.type != "cpu":
            state["device"] = torch.get_device_module(self.args.device).get_rng_state()
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # another process may arrive before rank 0 made it
        save_state(state, Path(output_dir, f"rng_state_{self.args.process_index}.safetensors"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        file = Path(checkpoint or "", f"rng_state_{self.args.process_index}.safetensors")
        if not file.is_file():  # resumed on more processes than it was saved by: the new ones keep their seeds
            return
        state = load_state(file)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        torch.random.set_rng_state(state["torch"])
        if "device" in state and self.args.device.type != "cpu":
            torch.get_device_module(self.args.device).set_rng_state(state["device"])

    def reference(self, rows: Rows, indices: NDArray[np.integer]) -> dict[str, torch.Tensor]:
        """The inputs of a few rows and the trained model's answers to them, on the CPU."""
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False).eval()
        inputs = self.task.probe(rows.__getitems__([int(i) for i in indices]))
        on_device = {k: v.to(self.args.device) for k, v in inputs.items()}
        return {**inputs, "logits": answers(self.recipe, model, on_device)}


class ClassificationTrainer(RecipeTraining):
    """transformers' Trainer for classification and regression."""

    def __init__(self, recipe: Recipe, *, task: SequenceClassification, run: Run, corpus: Corpus, **options: Any) -> None:
        super().__init__(
            data_collator=task.collate,
            processing_class=task.tokenizer,
            train_dataset=corpus.first_seen,
            eval_dataset={name: prepared.rows for name, prepared in corpus.evaluation.items()} or None,
            compute_loss_func=self._loss,
            compute_metrics=self._compute_metrics,
            preprocess_logits_for_metrics=task.reduce,
            **options,
        )
        self.adopt(recipe, task, run, corpus)
        self.classification = task

    def _loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        loss = self.classification.loss(outputs, labels, num_items_in_batch)
        if num_items_in_batch is None:
            return loss
        # each micro-batch bears its rows' share, so that processes and accumulation add up to it once
        return loss + self.regularisation((labels != IGNORED).sum() / num_items_in_batch)
