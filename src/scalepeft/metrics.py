"""The metrics of classification and regression, as `evaluate` metrics that need no script from the Hub."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from scalepeft.counts import Counts


class Correlation(evaluate.Metric):  # type: ignore[misc]
    """Pearson's and Spearman's correlation as one metric."""

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
    """Accuracy, F1, precision and recall as one metric."""

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
