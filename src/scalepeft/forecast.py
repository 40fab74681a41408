"""The plan of a recipe: what it takes on a layout and a device."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft import hardware, sharding
from scalepeft.console import quiet_upstream, speaks
from scalepeft.errors import UserError, one_line
from scalepeft.fetch import cache_dir, offline_if_unreachable
from scalepeft.hardware import GIB, Device
from scalepeft.recipe import Recipe
from scalepeft.run import packages
from scalepeft.sharding import Layout

if TYPE_CHECKING:
    from scalepeft.data import Corpus
    from scalepeft.prediction import Prediction
    from scalepeft.workload import Rows

CONTEXT = (0.4 * GIB, 0.6 * GIB, 1.0 * GIB)
"""What a process takes of a GPU outside torch's allocator (context, kernels, libraries, NCCL's buffers): least, usual, most.

An estimate: it differs with driver and GPU."""
FRAGMENTS = (0.01, 0.04, 0.08)
"""The share of the allocator's peak that it holds and cannot use, likewise an estimate."""

PROCESS = (0.6 * GIB, 0.8 * GIB, 1.2 * GIB)
"""What Python with torch, transformers, peft and their kin takes of a host beside what torch's allocator gives out.

An estimate, too: of the quickstart it is 0.8 GiB."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe takes on a layout and a device."""

    recipe: Recipe
    layout: Layout
    device: Device | None
    rows: Rows
    found: Prediction
    accelerator: bool

    @property
    def needed(self) -> tuple[int, int, int]:
        """Bytes of a device: at least, likely, at most."""
        peak, unsure = self.found.peak, self.found.uncertain
        peaks = (peak - unsure // 2, peak, peak + unsure)
        shares, beside = (FRAGMENTS, CONTEXT) if self.accelerator else ((0.0, 0.0, 0.0), PROCESS)
        low, mid, high = (int(p * (1 + share) + more) for p, share, more in zip(peaks, shares, beside, strict=True))
        return low, mid, high

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the device; None when no device was named."""
        return None if self.device is None else self.needed[1] <= self.device.memory

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step."""
        from scalepeft import prediction

        return prediction.accumulation(self.recipe, self.layout)

    @property
    def global_batch(self) -> int:
        """Rows of an optimizer step."""
        return len(self.rows.longest) * self.accumulation * self.layout.processes

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; None when the rows are not counted."""
        from scalepeft import kinds

        if (most := int(kinds.option(self.recipe, "max_steps"))) > 0:
            return most
        if self.rows.rows is None:
            return None
        return math.ceil(float(kinds.option(self.recipe, "num_train_epochs")) * math.ceil(self.rows.rows / self.global_batch))

    @property
    def flops(self) -> int | None:
        """Operations of the whole run over all devices: rows of mean length where they are known, else of the longest."""
        if self.steps is None:
            return None
        longest = len(self.rows.longest) * max(map(sum, self.rows.longest))
        share = 1.0
        if self.rows.tokens is not None and self.rows.rows:
            share = self.rows.tokens / self.rows.rows * len(self.rows.longest) / (1 - self.rows.padding) / longest
            share /= 2 if self.recipe.task == "preference" else 1
        return int(self.found.flops * self.accumulation * self.layout.processes * self.steps * min(1.0, share))

    def hours(self, utilisation: float) -> float | None:
        """Hours of the run at a share of the device's published speed."""
        if self.device is None or self.device.flops is None or self.flops is None:
            return None
        return self.flops / (self.layout.processes * self.device.flops * utilisation) / 3600


def plan(
    recipe: Recipe, layout: Layout, device: Device | None = None, *, rows: int | None = None, accelerator: bool = True
) -> Plan:
    """What a recipe takes. `rows`: those of an epoch, where they are not at hand. Raises UserError as training would."""
    return next(plans(recipe, [layout], [device], rows=rows, accelerator=accelerator))


def plans(
    recipe: Recipe,
    layouts: Sequence[Layout],
    devices: Sequence[Device | None],
    *,
    rows: int | None = None,
    accelerator: bool = True,
) -> Iterator[Plan]:
    """The same for several layouts and devices, whose model is built once."""
    quiet_upstream()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    offline_if_unreachable(recipe)

    from scalepeft import prediction, workload

    known = workload.rows(recipe)
    if rows is not None and known.rows is None:
        known = replace(known, rows=rows)
    drawn = prediction.sketch(recipe, known.longest, known.labels, layouts, accelerator=accelerator)
    for layout in layouts:
        found = prediction.predict(drawn, layout)
        for device in devices:
            yield Plan(recipe=recipe, layout=layout, device=device, rows=known, found=found, accelerator=accelerator)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is told and recorded of a run that is about to begin."""

    peak: int
    """Bytes that the allocator of rank 0's device gives out at the most."""
    needed: tuple[int, int, int]
    """Bytes with what comes on top of it: at least, likely, at most."""
    device: Device | None
    layout: Layout


def of_training(recipe: Recipe, corpus: Corpus) -> Expected | str | None:
    """What a run takes that is about to begin, on its own rows and this machine, or why it has no plan; None if nobody is told.

    Found once for a recipe and kept in the cache: to trace a step takes seconds. It leaves the random numbers as they are, and
    what goes wrong with it stops nothing: what the recipe got wrong, training says.
    """
    import torch

    from scalepeft import prediction, workload

    if not speaks():
        return None
    accelerator, layout = _on_accelerator(), sharding.launched()
    try:
        rows = workload.of(recipe, corpus)
        kept = _kept(recipe, rows, layout, accelerator=accelerator)
        with contextlib.suppress(OSError, ValueError, TypeError):
            return _expected(json.loads(kept.read_text(encoding="utf-8")), layout)
        with torch.random.fork_rng():
            drawn = prediction.sketch(recipe, rows.longest, rows.labels, [layout], accelerator=accelerator)
        found = prediction.predict(drawn, layout)
    except (UserError, *_FAILS) as error:
        return one_line(error)[:200]
    planned = Plan(recipe=recipe, layout=layout, device=None, rows=rows, found=found, accelerator=accelerator)
    told = {"peak": found.peak, "needed": planned.needed}
    with contextlib.suppress(OSError):  # what is not kept is found again
        kept.parent.mkdir(parents=True, exist_ok=True)
        beside = kept.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(told), encoding="utf-8")
        beside.replace(kept)
    return _expected(told, layout)


def _expected(told: Mapping[str, Any], layout: Layout) -> Expected:
    low, likely, high = told["needed"]
    return Expected(peak=int(told["peak"]), needed=(low, likely, high), device=_this_machine(), layout=layout)


FORMAT = 1
"""Part of every key: to be raised when a change of the plan gives another prediction of the same recipe."""
_WITHOUT_EFFECT = (
    *("output_dir", "learning_rate", "seed", "data_seed", "num_train_epochs", "max_steps", "weight_decay", "warmup_", "lr_"),
    *("logging_", "eval_", "save_", "run_name", "report_to", "metric_for_best_model", "push_to_hub", "hub_"),
)
"""Beginnings of the options of training that leave its memory as it is: those of a sweep share a prediction."""


def _kept(recipe: Recipe, rows: Rows, layout: Layout, *, accelerator: bool) -> Path:
    """Where the prediction of such a run is kept."""
    from scalepeft import model

    said = {name: value for name, value in recipe.resolved().items() if name not in ("data", "training", "extends")}
    said["training"] = {name: v for name, v in recipe.training.items() if not name.startswith(_WITHOUT_EFFECT)}
    parts = [FORMAT, packages(), said, asdict(layout), accelerator, model.configuration(recipe, rows.labels).to_dict()]
    if from_adapter := (recipe.adapter or {}).get("name_or_path"):
        parts.append((Path(model.adapter_path(str(from_adapter))) / "adapter_config.json").read_text(encoding="utf-8"))
    key = json.dumps([*parts, [list(documents) for documents in rows.longest]], sort_keys=True, default=str)
    return cache_dir() / "plans" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _this_machine() -> Device | None:
    """What this process may take: the memory of its GPU, or its share of the host's; None where it is not known."""
    import torch

    if not _on_accelerator():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return Device(name="this machine", memory=hardware.host_memory() // here, flops=None)
    if not torch.cuda.is_available():
        return None
    return Device(name="this device", memory=torch.cuda.get_device_properties(0).total_memory, flops=None)


def _on_accelerator() -> bool:
    from scalepeft import model

    return model.device().type != "cpu"


_FAILS = (RuntimeError, NotImplementedError, AssertionError, TypeError, AttributeError, ValueError, KeyError, OSError)
"""What a model may raise that is built and run without numbers."""


def verdict(found: Plan | Expected) -> str:
    """Whether it fits, and by how much, in a line."""
    low, likely, high = found.needed
    about = hardware.shown(likely) + (f" ({hardware.shown(low)} to {hardware.shown(high)})" if low != high else "")
    if found.device is None:
        return f"takes about {about} {'of each device' if found.layout.processes > 1 else 'of the device'}"
    spare = found.device.memory - likely
    of = f"{about} of {hardware.shown(found.device.memory)}"
    if spare < 0:
        return f"does not fit: {of}, {hardware.shown(-spare)} too much"
    return f"fits: {of}, {hardware.shown(spare)} to spare" + (", but not surely" if high > found.device.memory else "")
