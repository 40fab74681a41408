"""What differs per task: collation, loss, metrics."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from scalepeft.counts import Counts
from scalepeft.labels import UNLABELLED
from scalepeft.run import Run

if TYPE_CHECKING:
    import evaluate

IGNORED = UNLABELLED
"""The label of a row that counts neither in the loss nor in a metric (torch's ignore_index)."""


MATRIX_CLASSES = 200
"""Classes of the largest confusion matrix that is recorded: its numbers grow with their square."""


class Task(Protocol):
    """What trainers, evaluation and prediction ask of a task."""

    tokenizer: PreTrainedTokenizerBase
    figures: tuple[str, ...]
    """What `metrics` gives, as records.SetMetrics documents it."""

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows as tensors, padded to the longest, with labels that are IGNORED where nothing counts."""

    def ready(self, model: Any, run: Run) -> None:
        """Prepare the loaded model of a run for `measure`."""

    def measure(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The numbers that `metrics` needs of each row: all that an evaluation gathers, whatever classes or vocabulary."""

    def metrics(self, measured: NDArray[np.floating], references: NDArray[Any]) -> dict[str, float]:
        """The figures from `measure`d rows and their labels."""

    def details(self, measured: NDArray[np.floating], references: NDArray[Any]) -> dict[str, Any]:
        """What is recorded beside the figures."""

    def sample(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """The tokens of a row's prompt, empty where it has none, and of the answer to it that the data give."""

    def probe(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The inputs to which a reloaded model must give the trained model's answers."""


class SequenceClassification:
    """One label a row."""

    figures: tuple[str, ...] = (
        *("accuracy", "f1_macro", "f1_weighted", "precision_macro", "precision_weighted", "recall_macro", "recall_weighted"),
        *("matthews_correlation", "loss"),
    )

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], *, label_smoothing: float = 0.0) -> None:
        self.tokenizer, self.labels, self.label_smoothing = tokenizer, list(labels), label_smoothing

    @functools.cached_property
    def metric(self) -> evaluate.Metric:
        """What computes the figures; imported when rows have been measured, for that takes seconds."""
        from scalepeft.metrics import Classification

        return Classification()

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of token ids as tensors (rows x longest row), padded with the tokenizer's own padding token."""
        inputs = {k: [row[k] for row in rows] for k in ("input_ids", "token_type_ids") if k in rows[0]}
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    def sample(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:  # noqa: ARG002  # of language models
        """None: a class is no text."""
        return [], []

    def probe(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The rows themselves."""
        return {name: tensor for name, tensor in self.collate(rows).items() if name != "labels"}

    def ready(self, model: Any, run: Run) -> None:
        """Nothing."""

    def measure(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Each row `reduce`d."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return self.reduce(model(**inputs).logits, batch["labels"])

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        """Summed cross-entropy over the rows of the whole global batch.

        The Trainer passes `num_items_in_batch`, the rows of all processes and accumulated micro-batches. The models' own
        losses ignore it, so that upstream's loss and gradient grow with processes and accumulation.
        """
        loss = torch.nn.functional.cross_entropy(
            outputs["logits"].float(), labels, ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing
        )
        return loss / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum())

    @staticmethod
    def reduce(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """Each row's predicted label and cross-entropy (rows x 2): all that an evaluation gathers, whatever the classes."""
        scores = (logits[0] if isinstance(logits, tuple) else logits).float()
        losses = torch.nn.functional.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none")
        return torch.stack([scores.argmax(-1).float(), losses], dim=-1)

    def metrics(self, reduced: NDArray[np.floating], references: NDArray[np.integer]) -> dict[str, float]:
        """The figures of run.json from `reduce`d rows and their labels; rows labelled IGNORED do not count."""
        counted = references != IGNORED
        predicted = reduced[counted, 0].astype(np.int64)
        figures: dict[str, float] = self.metric.compute(predictions=predicted, references=references[counted])
        return figures | {"loss": float(reduced[counted, 1].mean(dtype=np.float64))}

    @property
    def columns(self) -> list[str]:
        """The columns of a file of predictions."""
        return ["label", "name", *(f"probability_{name}" for name in self.labels)]

    def answers(self, logits: torch.Tensor) -> list[list[str]]:
        """The `columns` of each row, from its logits (rows x classes)."""
        best = logits.argmax(-1).tolist()
        return [
            [str(b), self.labels[b], *(f"{p:.6f}" for p in of)] for b, of in zip(best, logits.softmax(-1).tolist(), strict=True)
        ]

    def details(self, reduced: NDArray[np.floating], references: NDArray[np.integer]) -> dict[str, Any]:
        """The per-class table and, of at most MATRIX_CLASSES, the confusion matrix (rows: truth, columns: prediction)."""
        counted, classes = references != IGNORED, len(self.labels)
        truth, predicted = references[counted].astype(np.int64), reduced[counted, 0].astype(np.int64)
        counts = Counts(truth, predicted, classes)
        columns = (counts.precision.tolist(), counts.recall.tolist(), counts.f1.tolist(), counts.truth.tolist())
        per_class = {
            name: {"precision": p, "recall": r, "f1": f, "rows": n}
            for name, p, r, f, n in zip(self.labels, *columns, strict=True)
        }
        if classes > MATRIX_CLASSES:
            return {"per_class": per_class}
        matrix = np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)
        return {"per_class": per_class, "confusion": matrix.tolist()}


class SequenceRegression(SequenceClassification):
    """One number a row: model.config.problem_type is regression."""

    figures = ("pearson", "spearman", "loss")

    @functools.cached_property
    def metric(self) -> evaluate.Metric:
        """As that of classification."""
        from scalepeft.metrics import Correlation

        return Correlation()

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        """Summed squared error over the rows of the whole global batch."""
        counted = labels != IGNORED
        loss: torch.Tensor = ((outputs["logits"].float().squeeze(-1) - labels) ** 2 * counted).sum()
        return loss / (num_items_in_batch if num_items_in_batch is not None else counted.sum())

    @staticmethod
    def reduce(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """Each row's predicted number and squared error (rows x 2)."""
        scores = (logits[0] if isinstance(logits, tuple) else logits).float().squeeze(-1)
        return torch.stack([scores, (scores - labels) ** 2], dim=-1)

    def metrics(self, reduced: NDArray[np.floating], references: NDArray[np.number]) -> dict[str, float]:
        """Pearson's and Spearman's correlation and the mean squared error."""
        counted = references != IGNORED
        figures: dict[str, float] = self.metric.compute(predictions=reduced[counted, 0], references=references[counted])
        return figures | {"loss": float(reduced[counted, 1].mean(dtype=np.float64))}

    def details(self, reduced: NDArray[np.floating], references: NDArray[np.number]) -> dict[str, Any]:  # noqa: ARG002  # of classes
        """Nothing: there are no classes."""
        return {}

    @property
    def columns(self) -> list[str]:
        """The column of a file of predictions."""
        return ["score"]

    def answers(self, logits: torch.Tensor) -> list[list[str]]:
        """The predicted number of each row."""
        return [[f"{score:.6f}"] for score in logits.squeeze(-1).tolist()]
