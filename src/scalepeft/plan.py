"""What a recipe will take before it is run: `scalepeft plan`."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scalepeft import fitting, hardware, sharding
from scalepeft import recipe as recipes
from scalepeft.console import say, table
from scalepeft.errors import UserError
from scalepeft.forecast import CONTEXT, FRAGMENTS, PROCESS, Plan, plan, verdict

UTILISATION = 0.4
"""The share of a device's published speed that is taken when --mfu says nothing."""


def main(arguments: Sequence[str]) -> int:
    """`scalepeft plan RECIPE [section.key=value ...] [--launch LAYOUT] [--gpu NAME | --memory SIZE] [--json]`."""
    parser = argparse.ArgumentParser(
        prog="scalepeft plan",
        description="Predict memory, work and cost of a recipe from its configuration; loads no weights and needs no GPU.",
    )
    parser.add_argument("recipe", nargs="?", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values to change, in YAML")
    parser.add_argument("--all", metavar="FOLDER", help="the recipes of a folder against common devices, as a table")
    about = "configurations for --all where the Hub is not: FOLDER/OWNER--NAME/config.json stands for OWNER/NAME"
    parser.add_argument("--configs", metavar="FOLDER", type=Path, help=about)
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
    _check(options, parser)
    if options.all is not None:
        say(fitting.overview(options.all, options.configs))
        return 0
    device = hardware.device(options.gpu) if options.gpu is not None else None
    device = hardware.of_memory(options.memory) if options.memory is not None else device
    recipe = recipes.load(options.recipe, options.overrides)
    layout = sharding.read(options.launch, options.num_processes, cpu=options.cpu)
    if layout.on_cpus and options.gpu is not None:
        raise UserError(f"command line: --gpu {options.gpu}: the plan is one for CPUs; --memory says what a process may take")
    found = plan(recipe, layout, device, rows=options.rows)
    if options.json:
        say(json.dumps(_figures(found, options), indent=2))
        return 0
    say("\n\n".join(_blocks(found, options)))
    if found.fits is False:
        say("\n" + fitting.told(found, options.recipe, options.overrides))
    return 0


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if (options.recipe is None) == (options.all is None):
        raise UserError("command line: give a recipe, or --all and a folder")
    if options.all is not None:
        given = [name for name, value in vars(options).items() if value not in (parser.get_default(name), [])]
        if idle := [f"--{name.replace('_', '-')}" for name in given if name not in ("all", "configs")]:
            raise UserError(f"command line: {', '.join(idle)} would do nothing with --all; give it with a recipe")
    elif options.configs is not None:
        raise UserError("command line: --configs goes with --all; model.name_or_path=FOLDER stands for the base of a recipe")
    if options.gpu is not None and options.memory is not None:
        raise UserError("command line: give --gpu or --memory, not both")
    if not 0 < options.mfu <= 1:
        raise UserError(f"command line: --mfu is {options.mfu}; it is a share above 0 and at most 1")
    for name in ("rows", "price"):
        if (value := getattr(options, name)) is not None and not 0 < value < math.inf:
            raise UserError(f"command line: --{name} is {value}; it is above 0 and finite")


# --- what is told ------------------------------------------------------------------------------------------------------


def _blocks(found: Plan, options: argparse.Namespace) -> Iterator[str]:
    counts, prediction = found.found.parameters, found.found
    on = f"{found.layout.processes} x {found.device.name if found.device else 'a device'}"
    longest = max(map(sum, found.rows.longest))
    yield table(
        [
            (f"{found.recipe.name} on {on} ({found.layout.name})",),
            ("  model", found.recipe.model.name_or_path),
            ("  trains", f"{counts['trainable']:,} of {counts['total']:,} parameters"),
            ("  batch", f"{_some(len(found.rows.longest), 'row')} of {_some(longest, 'token')} ({found.rows.told})"),
        ],
        right=False,
    )
    rows: list[tuple[str, ...]] = [(f"each device at the worst moment, {prediction.moment}",)]
    rows += [(f"  {name}", hardware.shown(size)) for name, size in _sorted(prediction.items) if size >= 2**10]
    rows.append(("  allocated", hardware.shown(prediction.peak)))
    if found.layout.on_cpus:
        rows.append(("  Python and libraries (estimate)", hardware.shown(PROCESS[1])))
    else:
        rows.append(("  fragmentation (estimate)", hardware.shown(prediction.peak * FRAGMENTS[1])))
        rows.append(("  context and libraries (estimate)", hardware.shown(CONTEXT[1])))
    yield f"{table(rows)}\n{verdict(found)}"
    yield table([("beside it",), *((f"  {name}", hardware.shown(size)) for name, size in _beside(found).items())])
    yield table(_work(found, options), right=False)
    if prediction.notes:
        yield "\n".join(f"note: {note}" for note in prediction.notes)


def _sorted(items: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(items.items(), key=lambda pair: -pair[1])


def _beside(found: Plan) -> dict[str, int]:
    """Bytes of the host and of the disk."""
    from scalepeft import kinds

    prediction, layout = found.found, found.layout
    held = Counter(prediction.host) + Counter(prediction.standing)
    states = held["optimizer states"] + held["master weights"]
    every = states * (layout.processes if layout.engine == "FSDP" or layout.stage else 1)
    training = sum(prediction.host.values())
    beside = {"host, each process, in training": int(training + PROCESS[2])}
    beside["host, each process, while loading (estimate)"] = int(max(training, prediction.largest * 2) + PROCESS[2])
    beside["host, each process, while saving (estimate)"] = int(training + prediction.saved + states + PROCESS[2])
    if found.recipe.adapter is not None:
        beside["host, merging: the largest tensors (estimate)"] = int(4 * prediction.largest + PROCESS[2])
        beside["disk, merged model"] = prediction.unquantised - prediction.saved
    beside["disk, what was trained"] = prediction.saved
    if kinds.option(found.recipe, "save_strategy") != "no":
        limit = int(kinds.option(found.recipe, "save_total_limit") or 0)
        kept = max(limit, 2) if limit and kinds.option(found.recipe, "load_best_model_at_end") else limit  # last and best
        which = f"disk, {_some(kept, 'checkpoint')}" if kept else "disk, each checkpoint, of which all are kept"
        beside[which] = max(kept, 1) * (prediction.saved + every)
    if found.recipe.cache_frozen_layers is not None:
        beside["disk, states of the frozen layers (at most)"] = hardware.size(found.recipe.cache_frozen_layers)
    return beside


def _work(found: Plan, options: argparse.Namespace) -> list[tuple[str, ...]]:
    prediction, steps = found.found, found.steps
    rows: list[tuple[str, ...]] = [("work",)]
    parts = f"{len(found.rows.longest)} x {found.accumulation} accumulated x {found.layout.processes}"
    flops = _count(prediction.flops * found.accumulation * found.layout.processes)
    rows.append(("  a step", f"{_some(found.global_batch, 'row')} ({parts}), {flops}FLOP"))
    if steps is None:
        return [*rows, ("  the run", "unknown: the rows are not at hand to be counted; --rows N says how many there are")]
    tokens = found.rows.tokens
    told = _some(steps, "step") + (f", {_some(found.rows.rows, 'row')} an epoch" if found.rows.rows else "")
    told += f", {_some(tokens, 'token')} an epoch" if tokens else ""
    assert found.flops is not None  # noqa: S101  # the steps are known
    rows.append(("  the run", f"{told}, {'' if tokens else 'at most '}{_count(found.flops)}FLOP"))
    if (hours := found.hours(options.mfu)) is not None:
        cost = (
            f", {hours * found.layout.processes * options.price:,.2f} at {options.price:g} a device-hour"
            if options.price
            else ""
        )
        rows.append(
            ("  time", f"{_time(hours)} at {options.mfu:.0%} of the published speed in 16 bits{cost}; evaluation not counted")
        )
    return rows


def _some(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _count(number: float) -> str:
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.0f} "


def _time(hours: float) -> str:
    for size, unit in ((1, "h"), (1 / 60, "min")):
        if hours >= size:
            return f"{hours / size:.1f} {unit}"
    return f"{hours * 3600:.2g} s"


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
