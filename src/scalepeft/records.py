"""What run.json and metrics.jsonl hold, field by field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The size of the model."""

    trainable: int
    """Parameters that are trained."""
    total: int
    """All parameters, those of the adapter included."""


@dataclass(frozen=True, kw_only=True)
class SetMetrics:
    """What was measured on one evaluation set: of classes, or of numbers (regression)."""

    accuracy: float | None = None
    """Share of rows whose label was predicted."""
    f1_macro: float | None = None
    """F1, the mean over the classes."""
    f1_weighted: float | None = None
    """F1, the mean over the rows."""
    precision_macro: float | None = None
    """Precision, the mean over the classes."""
    precision_weighted: float | None = None
    """Precision, the mean over the rows."""
    recall_macro: float | None = None
    """Recall, the mean over the classes."""
    recall_weighted: float | None = None
    """Recall, the mean over the rows (equal to accuracy)."""
    matthews_correlation: float | None = None
    """Matthews' correlation of truth and prediction."""
    pearson: float | None = None
    """Regression: Pearson's correlation of truth and prediction."""
    spearman: float | None = None
    """Regression: Spearman's correlation of truth and prediction."""
    perplexity: float | None = None
    """causal-lm: e to the power of the loss."""
    mean_token_accuracy: float | None = None
    """causal-lm: share of the tokens in the loss that were the likeliest."""
    rewards_accuracies: float | None = None
    """preference: share of pairs whose chosen answer has the higher reward."""
    rewards_margins: float | None = None
    """preference: mean reward of the chosen answers less that of the rejected ones."""
    rewards_chosen: float | None = None
    """preference: mean reward of the chosen answers, beta times the log-ratio to the reference model."""
    rewards_rejected: float | None = None
    """preference: mean reward of the rejected answers."""
    loss: float
    """Mean cross-entropy in nats, of rows or (causal-lm) tokens in the loss, without label smoothing; regression: mean squared
    error; preference: mean -log sigmoid of the reward margin, which is DPO's loss, whatever loss_type trains."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The main evaluation set, before and after training."""

    before: SetMetrics | None = None
    """Before training, when training.eval_on_start asks for it."""
    after: SetMetrics | None = None
    """After training, with the weights that were saved."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """run.json: written at the start with status `running`, replaced atomically; only `complete` counts."""

    status: Literal["running", "complete", "failed", "interrupted"]
    """complete: trained, saved, reloaded in a fresh process and found the same."""
    reason: str | None = None
    """Why the run failed or was interrupted, and what to do."""
    name: str
    """The recipe's name."""
    command: list[str]
    """The command line of rank 0."""
    started: str
    """When the run was created, ISO 8601 with time zone."""
    ended: str | None = None
    """When the status last left `running`."""
    versions: dict[str, str]
    """Python, platform and the packages that shape the result."""
    commit: str | None = None
    """The git commit of the working directory, with `-dirty` when files differ from it."""
    revisions: dict[str, str] = field(default_factory=dict)
    """The model's and each data source's commit or content hash."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Processes, batch per device, accumulation, global batch, engine, device and precision."""
    data: dict[str, Any] = field(default_factory=dict)
    """Rows of each set, what was dropped and why, and the keys of the prepared rows."""
    labels: list[str] = field(default_factory=list)
    """The names of labels 0, 1, ..."""
    parameters: Parameters | None = None
    """Trainable and total parameters."""
    step: int = 0
    """Optimizer steps done."""
    max_steps: int | None = None
    """Optimizer steps of the whole run."""
    metrics: Metrics = field(default_factory=Metrics)
    """The main evaluation set's metrics."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Every named set's metrics before and after, with the per-class table and the confusion matrix (rows: truth)."""
    best: dict[str, Any] | None = None
    """Step, metric and value of the best checkpoint, when one is tracked."""
    ranks: dict[str, Any] | None = None
    """AdaLoRA: the initial and the final rank of each adapted module."""
    seconds: float = 0.0
    """Seconds of training over all sessions of the run, evaluations included, loading and preparing not."""
    samples_per_second: float | None = None
    """Training rows per second over the same time."""
    peak_memory_bytes: int | None = None
    """Peak of the device allocator of rank 0 on an accelerator, of its resident memory on a CPU."""
    prediction: dict[str, int] | None = None
    """What `scalepeft plan` predicts of rank 0: peak_bytes of the allocator, needed_bytes with the rest."""
    sample: dict[str, str] | None = None
    """Language models: a prompt of the main evaluation set, the answer expected, and those of base and trained model."""
    verification: dict[str, Any] | None = None
    """How the saved weights were reloaded and compared: method, rows, largest difference, tolerance."""


@dataclass(frozen=True, kw_only=True)
class MetricsLine:
    """One line of metrics.jsonl: what was measured at one step."""

    step: int
    """Optimizer step, from 1; 0 is before training."""
    epoch: float
    """Passes over the training rows so far."""
    loss: float | None = None
    """Mean training loss since the previous line that has one."""
    grad_norm: float | None = None
    """Norm of the gradient before clipping, at this step."""
    learning_rate: float | None = None
    """Learning rate of this step."""
    eval_loss: float | None = None
    """Loss on the main evaluation set; other eval_* are its other metrics, eval_NAME_* those of the set NAME."""
