"""What a recipe will take before it is run: `scalepeft plan`."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scalepeft import hardware, sharding
from scalepeft import recipe as recipes
from scalepeft.console import note, quiet_upstream, say, speaks, table
from scalepeft.errors import UserError, one_line
from scalepeft.fetch import offline_if_unreachable
from scalepeft.hardware import GIB, Device
from scalepeft.recipe import Recipe
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
UTILISATION = 0.4
"""The share of a device's published speed that is taken when --mfu says nothing."""


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
        if not self.accelerator:
            return peaks
        low, mid, high = (int(p * (1 + share) + context) for p, share, context in zip(peaks, FRAGMENTS, CONTEXT, strict=True))
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


def main(arguments: Sequence[str]) -> int:
    """`scalepeft plan RECIPE [section.key=value ...] [--launch LAYOUT] [--gpu NAME | --memory SIZE] [--json]`."""
    parser = argparse.ArgumentParser(
        prog="scalepeft plan",
        description="Predict memory, work and cost of a recipe from its configuration; loads no weights and needs no GPU.",
    )
    parser.add_argument("recipe", nargs="?", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values to change, in YAML")
    parser.add_argument("--all", metavar="FOLDER", help="the recipes of a folder against common devices, as a table")
    parser.add_argument("--launch", metavar="LAYOUT", help="a file of accelerate_configs/ by its name (zero3, ...), or a path")
    parser.add_argument("--num-processes", "--num_processes", type=int, metavar="N", help="devices, one process each")
    parser.add_argument("--gpu", metavar="NAME", help="a device by name, e.g. h100-80gb")
    parser.add_argument("--memory", metavar="SIZE", help="or its memory alone, e.g. 80GiB")
    parser.add_argument("--cpu", action="store_true", help="on CPUs")
    parser.add_argument("--rows", type=int, metavar="N", help="training rows, where they are not at hand to be counted")
    parser.add_argument(
        "--mfu", type=float, default=UTILISATION, metavar="SHARE", help=f"of the published speed ({UTILISATION})"
    )
    parser.add_argument("--price", type=float, metavar="AMOUNT", help="of a device-hour")
    parser.add_argument("--json", action="store_true", help="print figures for machines")
    options = parser.parse_intermixed_args(arguments)
    _check(options)
    device = hardware.device(options.gpu) if options.gpu else hardware.of_memory(options.memory) if options.memory else None
    if options.all:
        from scalepeft import fitting

        say(fitting.overview(options.all))
        return 0
    recipe = recipes.load(options.recipe, options.overrides)
    layout = sharding.read(options.launch, options.num_processes)
    found = plan(recipe, layout, device, rows=options.rows, accelerator=not options.cpu)
    if options.json:
        say(json.dumps(_figures(found, options), indent=2))
        return 0
    say("\n\n".join(_blocks(found, options)))
    if found.fits is False:
        from scalepeft import fitting

        say("\n" + fitting.told(found, options.recipe, options.overrides))
    return 0


def _check(options: argparse.Namespace) -> None:
    if (options.recipe is None) == (options.all is None):
        raise UserError("command line: give a recipe, or --all and a folder")
    if options.gpu and options.memory:
        raise UserError("command line: give --gpu or --memory, not both")
    if not 0 < options.mfu <= 1:
        raise UserError(f"command line: --mfu is {options.mfu}; it is a share above 0 and at most 1")
    for name in ("rows", "price"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise UserError(f"command line: --{name} is {value}; it is above 0")


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

    from dataclasses import replace

    from scalepeft import prediction, workload

    known = workload.rows(recipe)
    if rows is not None and known.rows is None:
        known = replace(known, rows=rows)
    drawn = prediction.sketch(recipe, known.longest, known.labels, layouts, accelerator=accelerator)
    for layout in layouts:
        found = prediction.predict(drawn, layout)
        for device in devices:
            yield Plan(recipe=recipe, layout=layout, device=device, rows=known, found=found, accelerator=accelerator)


def of_training(recipe: Recipe, corpus: Corpus) -> Plan | None:
    """The plan of a run that is about to begin on an accelerator, on its own rows; None where there is none, or no plan.

    It takes a second or a few, too long for what a CPU trains, and it leaves the random numbers as they are. What goes wrong
    with it is told, and stops nothing.
    """
    import torch

    from scalepeft import model, prediction, workload

    if model.device().type == "cpu" or not speaks():
        return None
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    device = Device(name="this device", memory=memory, flops=None) if memory else None
    layout = sharding.launched()
    try:
        with torch.random.fork_rng():
            rows = workload.of(recipe, corpus)
            drawn = prediction.sketch(recipe, rows.longest, rows.labels, [layout], accelerator=True)
    except (UserError, *_FAILS) as error:
        note(f"no plan of this run: {one_line(error)[:200]}")
        return None
    found = prediction.predict(drawn, layout)
    return Plan(recipe=recipe, layout=layout, device=device, rows=rows, found=found, accelerator=True)


_FAILS = (RuntimeError, NotImplementedError, AssertionError, TypeError, AttributeError, ValueError, KeyError, OSError)
"""What a model may raise that is built and run without numbers."""


# --- what is told ------------------------------------------------------------------------------------------------------


def verdict(found: Plan) -> str:
    """Whether it fits, and by how much, in a line."""
    low, likely, high = found.needed
    about = hardware.shown(likely) + (f" ({hardware.shown(low)} to {hardware.shown(high)})" if low != high else "")
    if found.device is None:
        return f"takes about {about} {'of each device' if found.layout.processes > 1 else 'of the device'}"
    spare = found.device.memory - likely
    of = f"{about} of {hardware.shown(found.device.memory)}"
    if not found.fits:
        return f"does not fit: {of}, {hardware.shown(-spare)} too much"
    return f"fits: {of}, {hardware.shown(spare)} to spare" + (", but not surely" if high > found.device.memory else "")


def _blocks(found: Plan, options: argparse.Namespace) -> Iterator[str]:
    counts, prediction = found.found.parameters, found.found
    on = f"{found.layout.processes} x {found.device.name if found.device else 'a device'}"
    longest = max(map(sum, found.rows.longest))
    yield table(
        [
            (f"{found.recipe.name} on {on} ({found.layout.name})",),
            ("  model", found.recipe.model.name_or_path),
            ("  trains", f"{counts['trainable']:,} of {counts['total']:,} parameters"),
            ("  batch", f"{len(found.rows.longest)} rows of {longest:,} tokens ({found.rows.told})"),
        ],
        right=False,
    )
    rows: list[tuple[str, ...]] = [(f"each device, in the {prediction.moment}",)]
    rows += [(f"  {name}", hardware.shown(size)) for name, size in _sorted(prediction.items)]
    rows.append(("  allocated", hardware.shown(prediction.peak)))
    if found.accelerator:
        rows.append(("  fragmentation (estimate)", hardware.shown(prediction.peak * FRAGMENTS[1])))
        rows.append(("  context and libraries (estimate)", hardware.shown(CONTEXT[1])))
    yield f"{table(rows)}\n{verdict(found)}"
    yield table([("beside it",), *((f"  {name}", hardware.shown(size)) for name, size in _beside(found).items())])
    yield table(_work(found, options), right=False)
    if prediction.notes:
        yield "\n".join(f"note: {note}" for note in prediction.notes)


def _sorted(items: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(items.items(), key=lambda pair: -pair[1])


IMPORTS = 1.2 * GIB
"""What Python with torch, transformers, peft and their kin takes of the host in each process."""


def _beside(found: Plan) -> dict[str, int]:
    """Bytes of the host and of the disk."""
    from scalepeft import kinds

    prediction, processes = found.found, found.layout.processes
    checkpoints = kinds.option(found.recipe, "save_total_limit")
    kept = int(checkpoints) if checkpoints else 1
    states = prediction.items.get("optimizer states", 0) + prediction.host.get("optimizer states", 0)
    states *= processes if found.layout.engine in ("DEEPSPEED", "FSDP") else 1
    training = sum(prediction.host.values())
    beside = {"host, each process, in training": int(training + IMPORTS)}
    beside["host, each process, while loading (estimate)"] = int(max(training, prediction.largest * 2) + IMPORTS)
    if found.recipe.adapter is not None:
        beside["host, merging: the largest tensors (estimate)"] = int(4 * prediction.largest + IMPORTS)
        beside["disk, merged model"] = prediction.unquantised
    beside[f"disk, {kept} checkpoint{'s' if kept > 1 else ''}"] = kept * (prediction.saved + states)
    return beside


def _work(found: Plan, options: argparse.Namespace) -> list[tuple[str, ...]]:
    prediction, steps = found.found, found.steps
    rows: list[tuple[str, ...]] = [("work",)]
    batch = (
        f"{found.global_batch} rows ({len(found.rows.longest)} x {found.accumulation} accumulated x {found.layout.processes})"
    )
    rows.append(("  a step", f"{batch}, {_count(prediction.flops * found.accumulation * found.layout.processes)}FLOP"))
    if steps is None:
        return [*rows, ("  the run", "unknown: the rows are not at hand to be counted; --rows N says how many there are")]
    tokens = found.rows.tokens
    told = f"{steps:,} steps" + (f", {found.rows.rows:,} rows an epoch" if found.rows.rows else "")
    told += f", {tokens:,} tokens an epoch" if tokens else ""
    assert found.flops is not None  # noqa: S101  # the steps are known
    rows.append(("  the run", f"{told}, {'' if tokens else 'at most '}{_count(found.flops)}FLOP"))
    if (hours := found.hours(options.mfu)) is not None:
        cost = (
            f", {hours * found.layout.processes * options.price:,.2f} at {options.price:g} a device-hour"
            if options.price
            else ""
        )
        rows.append(("  time", f"{_time(hours)} at {options.mfu:.0%} of the published speed{cost}; evaluation not counted"))
    return rows


def _count(number: float) -> str:
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.0f} "


def _time(hours: float) -> str:
    return f"{hours * 60:.1f} min" if hours < 1 else f"{hours:.1f} h"


def _figures(found: Plan, options: argparse.Namespace) -> dict[str, Any]:
    low, likely, high = found.needed
    hours = found.hours(options.mfu)
    return {
        "recipe": found.recipe.name,
        "parameters": dict(found.found.parameters),
        "layout": {"name": found.layout.name, "engine": found.layout.engine, "processes": found.layout.processes},
        "batch": {"rows": len(found.rows.longest), "tokens": max(map(sum, found.rows.longest)), "from": found.rows.told},
        "moment": found.found.moment,
        "device_bytes": dict(_sorted(found.found.items)),
        "peak_bytes": found.found.peak,
        "needed_bytes": {"least": low, "likely": likely, "most": high},
        "device": None if found.device is None else {"name": found.device.name, "memory_bytes": found.device.memory},
        "fits": found.fits,
        "beside_bytes": _beside(found),
        "steps": found.steps,
        "global_batch_size": found.global_batch,
        "flops": found.flops,
        "hours": hours,
        "cost": hours * found.layout.processes * options.price if hours is not None and options.price else None,
        "notes": list(found.found.notes),
    }
