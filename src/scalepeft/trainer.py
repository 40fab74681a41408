"""Upstream's trainers with this project's order of rows, its evaluation and its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, EvalPrediction, PrinterCallback, ProgressCallback, TrainingArguments

from scalepeft import adapters, engines, prefix, stops
from scalepeft.adalora import RankAllocation, allocates_ranks, orthogonality
from scalepeft.callbacks import SPEED, Progress
from scalepeft.data import Corpus
from scalepeft.model import answers
from scalepeft.recipe import Recipe
from scalepeft.resume import Resumable
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


class RecipeTraining(Resumable):
    """What this project's trainers share: they train the same whatever the layout, and evaluate every named set.

    Among the bases of a class it stands before the upstream trainer that it changes; the class calls `adopt` once that is made.
    `evaluations` holds, by step and set, the metrics and their details; `saved`, after training and on the process that
    writes, the weights as they were saved. `states` holds, while they stand in for rows, those of the frozen layers.
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
        self.states: Mapping[str, prefix.States] = {}
        self.saved = {}
        self._details: dict[str, Any] = {}

    def make_optimizer(self) -> None:
        """Make the optimizer, and a scheduler to try its options: what upstream refuses it refuses before the run is opened."""
        engines.before_fsdp(self.accelerator, self.model)
        engines.before_deepspeed(self.accelerator, self.model)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # theirs come with the engine
            return
        self.create_optimizer()
        self.create_scheduler(num_training_steps=100, optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0))
        self.lr_scheduler, self._created_lr_scheduler = None, False

    def rows(self, name: str) -> Rows:
        """The rows of a set."""
        return self.train_dataset if name == "train" else self.eval_dataset[name]

    def step_batches(self) -> StepBatches:
        """The micro-batches of this process in training."""
        return step_batches(self.args, self.lengths["train"])

    def _steps_per_epoch(self) -> int:
        return steps_per_epoch(self.args, self.step_batches())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches of this process, in the project's own order."""
        if "train" in self.states:
            return self._loader(self.states["train"], self.step_batches(), prefix.collate)
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
        if eval_dataset in self.states:
            return self._loader(self.states[eval_dataset], batches, prefix.collate)
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
            worker_init_fn=stops.left_to_the_parent,
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
        measured: dict[str, dict[str, Any]] = {}
        with self.all_or_nothing():
            for index, name in enumerate(self.eval_dataset):
                prefix = f"{metric_key_prefix}_{name}" if index else metric_key_prefix
                found = super().evaluate(name, ignore_keys, prefix)
                own = {k.removeprefix(f"{prefix}_"): v for k, v in found.items() if k.startswith(f"{prefix}_")}
                measured[name] = {k: v for k, v in own.items() if not k.endswith(SPEED)} | self._details
                figures |= found
        self.evaluations[self.state.global_step] = measured
        if self.state.global_step == 0 and self.args.process_index == 0:  # kept: a resumed run does not measure it again
            self.run.update(evaluation={name: {"before": found} for name, found in measured.items()})
        return figures

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Upstream's, and at least 1: a step whose rows are all left out has a loss of 0, not of 0 / 0."""
        items: torch.Tensor | None = super()._get_num_items_in_batch(batch_samples, device)
        return None if items is None else items.clamp(min=1)

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
