"""What differs per task: collation, loss, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from scalepeft.labels import UNLABELLED
from scalepeft.run import Run

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
        self.metric: evaluate.Metric = Classification()

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

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], *, label_smoothing: float = 0.0) -> None:
        super().__init__(tokenizer, labels, label_smoothing=label_smoothing)
        self.metric = Correlation()

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


class Counts:
    """How often each class is true, is predicted, and both: all that the figures of a classification are made of.

    scikit-learn's definitions. Its own functions make a matrix of classes x classes: 800 MB for 10,000 classes.
    """

    def __init__(self, truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> None:
        self.truth = np.bincount(truth, minlength=classes)
        self.predicted = np.bincount(predicted, minlength=classes)
        self.right = np.bincount(truth[truth == predicted], minlength=classes)

    @property
    def precision(self) -> NDArray[np.float64]:
        """Of each class; 0 where it is never predicted."""
        return self._over(self.right, self.predicted)

    @property
    def recall(self) -> NDArray[np.float64]:
        """Of each class; 0 where it is never true."""
        return self._over(self.right, self.truth)

    @property
    def f1(self) -> NDArray[np.float64]:
        """Of each class; 0 where it neither occurs nor is predicted."""
        return self._over(2 * self.right, self.truth + self.predicted)

    def figures(self) -> dict[str, float]:
        """Accuracy, Matthews' correlation, and the means over the classes that occur and over the rows."""
        occurs = self.truth + self.predicted > 0
        rows, right = int(self.truth.sum()), int(self.right.sum())
        found = {"accuracy": right / rows, "matthews_correlation": self._matthews(rows, right)}
        for average, weights in (("macro", None), ("weighted", self.truth[occurs])):
            for name in ("precision", "recall", "f1"):
                found[f"{name}_{average}"] = float(np.average(getattr(self, name)[occurs], weights=weights))
        return found

    def _matthews(self, rows: int, right: int) -> float:
        """Gorodkin's correlation of several classes; 0 where truth or prediction has one class only."""
        truth, predicted = self.truth.astype(np.float64), self.predicted.astype(np.float64)
        variances = (rows**2 - truth @ truth) * (rows**2 - predicted @ predicted)
        return float((right * rows - truth @ predicted) / np.sqrt(variances)) if variances else 0.0

    @staticmethod
    def _over(counts: NDArray[np.int64], of: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.divide(counts, of, out=np.zeros(len(of)), where=of > 0)


class Correlation(evaluate.Metric):  # type: ignore[misc]
    """Pearson's and Spearman's correlation as one `evaluate` metric that needs no script from the Hub."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Pearson's and Spearman's correlation (SciPy's definitions); 0 where the predictions are all the same.",
            citation="",
            inputs_description="predictions and references: numbers",
            features=datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        from scipy.stats import pearsonr, spearmanr

        if np.ptp(predictions) == 0 or np.ptp(references) == 0:
            return {"pearson": 0.0, "spearman": 0.0}
        return {
            "pearson": float(pearsonr(predictions, references)[0]),
            "spearman": float(spearmanr(predictions, references)[0]),
        }


class Classification(evaluate.Metric):  # type: ignore[misc]
    """Accuracy, F1, precision and recall as one `evaluate` metric that needs no script from the Hub."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, and F1, precision and recall as macro and weighted means (scikit-learn's definitions).",
            citation="",
            inputs_description="predictions and references: label numbers",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        truth, predicted = np.asarray(references, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
        return Counts(truth, predicted, int(max(truth.max(), predicted.max())) + 1).figures()
