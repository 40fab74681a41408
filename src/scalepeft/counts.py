"""Counts of classes: all that the figures of a classification are made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Counts:
    """How often each class is true, is predicted, and both.

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
