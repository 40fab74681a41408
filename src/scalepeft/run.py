"""The run directory: everything one training leaves behind."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from scalepeft import recipe as recipes
from scalepeft import upstream
from scalepeft.errors import UserError
from scalepeft.recipe import Recipe

RECORD = "run.json"
METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"
RESOLVED = "resolved.yaml"
VERIFICATION = "verification.safetensors"
PUBLISHED = "checkpoint.json"
LOCK = ".lock"


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
    """On an accelerator, what `scalepeft plan` predicts of rank 0: peak_bytes of the allocator, needed_bytes with the rest."""
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


_OBSERVES = (
    "logging_",
    "log_",
    "eval_",
    "per_device_eval_batch_size",
    "save_",
    "report_to",
    "run_name",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "hub_",
    "push_to_hub",
)
"""Beginnings of training keys that change what is seen of a run, not the run."""
_LENGTHENS = ("training.num_train_epochs", "training.max_steps")
_PACKAGES = (
    "scalepeft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "evaluate", "tokenizers", "safetensors",
    "bitsandbytes", "deepspeed", "numpy", "scikit-learn",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run directory, new or existing."""

    path: Path

    @property
    def record(self) -> dict[str, Any]:
        """run.json as it stands; empty when there is none. Raises UserError when it is not JSON."""
        try:
            found = json.loads((self.path / RECORD).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self.path / RECORD}: is damaged; move the directory aside, or train with --fresh")
        return found

    @property
    def weights(self) -> Path:
        """Where the trained weights are: adapter/, or model/ after full fine-tuning."""
        return next((p for p in (self.path / "adapter", self.path / "model") if p.is_dir()), self.path / "adapter")

    def update(self, **changes: Any) -> None:
        """Replace fields of run.json, atomically."""
        write(self.path / RECORD, json.dumps(self.record | changes, indent=2, ensure_ascii=False) + "\n")

    def create(self, recipe: Recipe) -> None:
        """Make the directory with the recipe verbatim, the resolved recipe and run.json with status `running`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write(self.path / RECIPE, recipe.document.text)
            write(self.path / RESOLVED, recipes.dump(recipe.resolved()))
            write(self.path / METRICS, "")
            record = RunRecord(
                status="running",
                name=recipe.name,
                command=[Path(sys.argv[0]).name, *sys.argv[1:]],
                started=now(),
                versions=versions(),
                commit=commit(),
            )
            self.update(**asdict(record))
        except OSError as error:
            raise UserError(f"{self.path}: the run directory cannot be written: {error.strerror}") from None

    def end(self, status: Literal["complete", "failed", "interrupted"], reason: str | None = None, **changes: Any) -> None:
        """Record how the run ended."""
        self.update(status=status, reason=reason, ended=now(), **changes)

    def recipe(self, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
        """The resolved recipe of the run. Raises UserError when the directory is not a run."""
        if not (self.path / RECORD).is_file():
            raise UserError(f"{self.path}: is not a run directory: it has no {RECORD}")
        return recipes.load(self.path / RESOLVED, overrides)

    def last_checkpoint(self) -> Path | None:
        """The published checkpoint with the highest step; one that was not published does not exist."""
        found = [p for p in self.path.glob("checkpoint-*") if (p / PUBLISHED).is_file()]
        return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)

    def unpublished(self) -> list[Path]:
        """What a crash left of checkpoints: their files would mix with those of the next one at that step."""
        return [p for p in self.path.glob("checkpoint-*") if not (p / PUBLISHED).is_file()]

    def forget_after(self, step: int) -> None:
        """Drop the lines of metrics.jsonl beyond a step: they will be measured again."""
        kept = [line for line in self.lines() if line["step"] <= step]
        write(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line torn by a crash is left out."""
        if not (self.path / METRICS).is_file():
            return []
        text = (self.path / METRICS).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def move_aside(self) -> Path:
        """Rename the directory to the first free NAME.1, NAME.2, ... and return that."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(aside)
        return aside


def inspect(recipe: Recipe, *, fresh: bool = False) -> Literal["new", "unfinished", "trained", "complete"]:
    """What is at the recipe's output directory; reads only. `trained` lacks only the verification.

    A run that is to be moved aside (`fresh`) counts as new. Raises UserError when it is not a run, or, unless `fresh`, a run
    of another recipe.
    """
    run = Run(recipe.output_dir)
    if run.path.exists() and not run.path.is_dir():
        raise recipe.error("training.output_dir", f"{run.path} is a file")
    parent = next(p for p in (run.path, *run.path.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise recipe.error("training.output_dir", f"{parent} cannot be written")
    if not run.path.exists() or not any(p for p in run.path.iterdir() if p.name != LOCK):
        return "new"
    if not (run.path / RECORD).is_file():
        raise recipe.error("training.output_dir", f"{run.path} exists and is not a run (no {RECORD}); choose another directory")
    if fresh:
        return "new"
    status = run.record.get("status")  # a damaged record is told before anything else
    differences = _differences(run, recipe)
    refused = {k: pair for k, pair in differences.items() if not _may_change(recipe, k, *pair)}
    if refused:
        told = "; ".join(f"{k}: {was!r} -> {now!r}" for k, (was, now) in refused.items())
        hint = "give another training.output_dir, or move it aside with --fresh"
        raise UserError(f"{run.path}: holds a run of another recipe ({told}); {hint}")
    if any(k in _LENGTHENS for k in differences):
        if run.last_checkpoint() is None:
            raise UserError(
                f"{run.path}: holds no checkpoint to lengthen the run from; move it aside with --fresh to train anew"
            )
        return "unfinished"
    if status == "complete":
        return "complete"
    return "trained" if (run.path / VERIFICATION).is_file() else "unfinished"


def _differences(run: Run, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    was, now = (recipes.flatten(values) for values in (run.recipe().resolved(), recipe.resolved()))
    keys = [k for k in {**was, **now} if was.get(k) != now.get(k) and k != "training.output_dir"]
    return {k: (was.get(k), now.get(k)) for k in keys}


def _may_change(recipe: Recipe, key: str, was: Any, now: Any) -> bool:
    section, _, name = key.partition(".")
    if key in _LENGTHENS:
        default = upstream.fields(upstream.TASK_ARGUMENTS[recipe.task])[name].default
        was, now = (default if value is None else value for value in (was, now))
        return isinstance(was, int | float) and isinstance(now, int | float) and 0 < was < now
    chooses = recipe.training.get("load_best_model_at_end") and name.startswith(("eval_", "save_"))
    return section == "training" and name.startswith(_OBSERVES) and not chooses


def write(path: Path, text: str) -> None:
    """Write a file beside and rename it over: a reader sees the old text or the new one, never half of it."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def now() -> str:
    """The time, ISO 8601 with time zone, to the second."""
    return dt.datetime.now().astimezone().isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Python, platform and the installed versions of the packages that shape a result."""
    return {"platform": platform.platform(), **packages()}


def packages() -> dict[str, str]:
    """Python and the installed versions of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of the working directory, with `-dirty` when tracked files differ from it; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
