"""What a run that begins is going to take: its plan, made once for such runs and kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft import hardware, sharding
from scalepeft.console import speaks
from scalepeft.errors import UserError, one_line
from scalepeft.fetch import cache_dir
from scalepeft.forecast import Plan
from scalepeft.hardware import Device
from scalepeft.recipe import Recipe
from scalepeft.run import packages
from scalepeft.sharding import Layout

if TYPE_CHECKING:
    from scalepeft.data import Corpus
    from scalepeft.workload import Rows


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
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from scalepeft import prediction, workload

    if not speaks():
        return None
    unset_hf_deepspeed_config()  # of an earlier training of this process: under ZeRO-3 it would divide the plan's model, too
    try:
        layout = sharding.launched(on_cpus=not _on_accelerator())
        rows = workload.of(recipe, corpus)
        kept = _kept(recipe, rows, layout)
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # none there, or damaged
            return _expected(json.loads(kept.read_text(encoding="utf-8")), layout)
        with torch.random.fork_rng():
            drawn = prediction.sketch(recipe, rows, [layout])
        found = prediction.predict(drawn, layout)
    except (UserError, *_FAILS) as error:
        return one_line(error)[:200]
    planned = Plan(recipe=recipe, layout=layout, device=None, rows=rows, found=found)
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


FORMAT = 2
"""Part of every key: to be raised when a change of the plan gives another prediction of the same recipe."""
_WITHOUT_EFFECT = (
    *("output_dir", "learning_rate", "seed", "data_seed", "num_train_epochs", "max_steps", "weight_decay", "warmup_", "lr_"),
    *("logging_", "eval_", "save_", "run_name", "report_to", "metric_for_best_model", "push_to_hub", "hub_"),
)
"""Beginnings of the options of training that leave its memory as it is: those of a sweep share a prediction."""


def _kept(recipe: Recipe, rows: Rows, layout: Layout) -> Path:
    """Where the prediction of such a run is kept."""
    from scalepeft import model, operators

    slow = sorted(map(str, operators.slow())) if layout.on_cpus else []  # nodes of other processors share the cache
    said = {name: value for name, value in recipe.resolved().items() if name not in ("data", "training", "extends")}
    said["training"] = {name: v for name, v in recipe.training.items() if not name.startswith(_WITHOUT_EFFECT)}
    parts = [FORMAT, packages(), said, asdict(layout), slow, model.configuration(recipe, rows.labels).to_dict()]
    if from_adapter := (recipe.adapter or {}).get("name_or_path"):
        parts.append((Path(model.adapter_path(str(from_adapter))) / "adapter_config.json").read_text(encoding="utf-8"))
    key = json.dumps([*parts, [[*map(list, rows.longest)], [*map(list, rows.evaluated)]]], sort_keys=True, default=str)
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
