"""The frozen layers of an encoder, run once: what each row gives to the first layer that is trained, kept on disk.

An adapter on the last layers leaves all before them as they are, and what these make of a row is the same in each epoch but
for their dropout. It is computed once, without that dropout, and read from memory-mapped files from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from scalepeft import hardware, prefix, ranks
from scalepeft.console import say
from scalepeft.data import Corpus
from scalepeft.errors import Interrupted
from scalepeft.model import Trained, precision
from scalepeft.prefix import Prefix, States
from scalepeft.recipe import Recipe
from scalepeft.run import Run, packages, write
from scalepeft.trainer import RecipeTraining

FOLDER = "frozen"
"""Where the states lie in a run directory until the run is trained."""

FORMAT = 1
"""Part of every key: to be raised when a change of this module or of `prefix` keeps other states for the same rows."""

_INFO = "info.json"


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The frozen layers of a training and the sets whose rows are kept."""

    prefix: Prefix
    run: Run
    keys: Mapping[str, str]
    """By set: what its states depend on."""
    dtype: torch.dtype
    """That of the states on disk: the one that the layers compute in."""
    size: int
    """Bytes of them all."""

    def told(self) -> str:
        """What is done, in a line."""
        layers = f"embeddings and {self.prefix.count} of {len(self.prefix.layers)} layers"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{layers} run once, without dropout; {hardware.shown(self.size)} in {dtype} kept on disk until the run is trained"
        )

    def forget(self) -> None:
        """Take away what was kept: the run is trained."""
        shutil.rmtree(self.run.path / FOLDER, ignore_errors=True)


def planned(recipe: Recipe, model: Trained, args: TrainingArguments, run: Run, corpus: Corpus) -> Frozen | None:
    """What a recipe with cache_frozen_layers keeps, None without. Raises UserError where it cannot be, before it is computed.

    Kept are the training rows and, when they are evaluated before the end, the evaluation sets.
    """
    if recipe.cache_frozen_layers is None:
        return None
    found = prefix.find(recipe, model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.precision, found.dtype)
    kept = ["train", *(corpus.evaluation if args.eval_strategy != "no" or args.eval_on_start else ())]
    tokens = sum(int(corpus.sets[name].lengths.sum(dtype=np.int64)) for name in kept)
    size = tokens * found.width * dtype.itemsize
    told = (
        f"the {tokens:,} tokens of {', '.join(kept)} take {hardware.shown(size)} ({found.width} x {dtype.itemsize} bytes each)"
    )
    if size > hardware.size(recipe.cache_frozen_layers):
        raise recipe.error("cache_frozen_layers", f"{told}, and {recipe.cache_frozen_layers} is the most allowed")
    settings = [FORMAT, found.digest(), found.count, str(dtype), recipe.precision, args.device.type, packages()]
    settings.append(found.backbone.config._attn_implementation)  # noqa: SLF001  # what upstream has chosen has no public name
    keys = {name: hashlib.sha256(json.dumps([*settings, corpus.sets[name].key]).encode()).hexdigest()[:32] for name in kept}
    there = sum(of["bytes"] for name, key in keys.items() if (of := _info(run.path / FOLDER / name, key)))
    place = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if size - there > free:
        raise recipe.error("cache_frozen_layers", f"{told}, and {place} has {hardware.shown(free)} left")
    return Frozen(prefix=found, run=run, keys=keys, dtype=dtype, size=size)


@contextlib.contextmanager
def in_place(of: Frozen | None, trainer: RecipeTraining) -> Iterator[None]:
    """Let a trainer train, and evaluate while it trains, on kept states, which are computed where they are not there yet.

    Called by all processes, each of which computes its share. What was evaluated in between is forgotten, so that the figures
    of the result come from the whole model. Raises Interrupted when asked to stop.
    """
    if of is None:
        yield
        return
    trainer.states = {name: _kept(of, trainer, name, key) for name, key in of.keys.items()}
    try:
        with of.prefix.passed_over():
            yield
    finally:
        trainer.states = {}
        trainer.evaluations.clear()


def _kept(of: Frozen, trainer: RecipeTraining, name: str, key: str) -> States:
    """The states of a set, from the run directory or computed now."""
    folder = of.run.path / FOLDER / name
    info = ranks.agree({"_info": _info(folder, key)})[0]["_info"]  # as process 0 sees it
    rows, parts = trainer.rows(name), info["parts"] if info else ranks.processes()
    labels = type(rows)(rows.rows.select_columns(["labels"]))
    states = States(labels, trainer.lengths[name], folder, width=of.prefix.width, dtype=of.dtype, parts=parts)
    if info:
        return states
    started = time.monotonic()
    if ranks.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of other layers or rows, or torn
        folder.mkdir(parents=True)
    ranks.agree({})
    whole = _compute(of, trainer, name, states)
    if not all(facts["_whole"] for facts in ranks.agree({"_whole": whole})):
        raise Interrupted(f"{of.run.path}: stopped while its frozen layers were run; the same command goes on")
    if ranks.rank() == 0:  # last: what has no info is not whole
        size = sum(map(states.size, range(parts)))
        write(folder / _INFO, json.dumps({"key": key, "parts": parts, "bytes": size}))
    ranks.agree({})
    say(f"frozen layers: {name}, {len(rows):,} rows in {time.monotonic() - started:.1f} s")
    return states


def _info(folder: Path, key: str) -> dict[str, Any] | None:
    """What kept states say of themselves; None when they are not there, not whole, or of something else."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        info: dict[str, Any] = json.loads((folder / _INFO).read_text(encoding="utf-8"))
        sizes = [(folder / f"{part}.bin").stat().st_size for part in range(info["parts"])]
        if info["key"] == key and sum(sizes) == info["bytes"]:
            return info
    return None


def _compute(of: Frozen, trainer: RecipeTraining, name: str, states: States) -> bool:
    """Write the share of this process; whether it was not stopped in between."""
    rows, part, device = trainer.rows(name), ranks.rank(), trainer.args.device
    training, request = trainer.model.training, trainer.stop_request
    trainer.model.eval()
    try:
        with states.file(part).open("wb") as stream, torch.inference_mode(), precision(trainer.recipe):
            for batch in states.batches()[part :: states.parts]:
                if request.asked(first=part == 0):
                    request.file.heeded()
                    return False
                inputs = trainer.task.probe(rows.__getitems__(batch.tolist()))
                found = of.prefix.states({k: v.to(device) for k, v in inputs.items()}).to(of.dtype).cpu()
                for row, length in zip(found, states.lengths[batch], strict=True):
                    stream.write(row[:length].contiguous().view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        trainer.model.train(training)
    return True
