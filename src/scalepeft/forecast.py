"""The plan of a recipe: what it takes on a layout and a device."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from scalepeft import hardware
from scalepeft.console import quiet_upstream
from scalepeft.fetch import offline_if_unreachable
from scalepeft.hardware import GIB, Device
from scalepeft.recipe import Recipe
from scalepeft.sharding import Layout

if TYPE_CHECKING:
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

    @property
    def needed(self) -> tuple[int, int, int]:
        """Bytes of a device: at least, likely, at most."""
        peak, (less, more) = self.found.peak, self.found.uncertain
        peaks = (peak - less, peak, peak + more)
        shares, beside = ((0.0, 0.0, 0.0), PROCESS) if self.layout.on_cpus else (FRAGMENTS, CONTEXT)
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
        whole = math.floor if kinds.option(self.recipe, "dataloader_drop_last") else math.ceil
        batches = whole(self.rows.rows / (len(self.rows.longest) * self.layout.processes))
        return math.ceil(float(kinds.option(self.recipe, "num_train_epochs")) * math.ceil(batches / self.accumulation))

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


def plan(recipe: Recipe, layout: Layout, device: Device | None = None, *, rows: int | None = None) -> Plan:
    """What a recipe takes. `rows`: those of an epoch, where they are not at hand. Raises UserError as training would."""
    return next(plans(recipe, [layout], [device], rows=rows))


def plans(
    recipe: Recipe, layouts: Sequence[Layout], devices: Sequence[Device | None], *, rows: int | None = None
) -> Iterator[Plan]:
    """The same for several layouts and devices, whose model is built once. The layouts are all on CPUs or all not."""
    quiet_upstream()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    offline_if_unreachable(recipe)

    from scalepeft import prediction, workload

    known = workload.rows(recipe)
    if rows is not None and known.rows is None:
        known = replace(known, rows=rows)
    drawn = prediction.sketch(recipe, known, layouts)
    for layout in layouts:
        found = prediction.predict(drawn, layout)
        for device in devices:
            yield Plan(recipe=recipe, layout=layout, device=device, rows=known, found=found)


class Needs(Protocol):
    """What a verdict is about: a plan, or what is kept of one."""

    @property
    def needed(self) -> tuple[int, int, int]:
        """Bytes of a device: at least, likely, at most."""

    @property
    def device(self) -> Device | None:
        """The device, where it is known."""

    @property
    def layout(self) -> Layout:
        """How many of them."""


def verdict(found: Needs) -> str:
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
