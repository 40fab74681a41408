"""What a training writes into its run directory: how it began, how it went, its last evaluation and its weights."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft import ranks
from scalepeft.errors import Interrupted
from scalepeft.fetch import asset_path, is_local
from scalepeft.recipe import Recipe
from scalepeft.run import Run

if TYPE_CHECKING:
    from scalepeft.data import Corpus
    from scalepeft.trainer import RecipeTraining


def begun(
    recipe: Recipe,
    run: Run,
    corpus: Corpus,
    trainer: RecipeTraining,
    *,
    parameters: Mapping[str, int],
    seen: Sequence[Mapping[str, Any]],
) -> None:
    """Record the layout, the parameters, the steps, the revisions and who prepared the rows that the processes have seen."""
    import torch

    from scalepeft import engines
    from scalepeft.trainer import total_steps

    args, batches = trainer.args, trainer.step_batches()
    dtype = str(next(p.dtype for p in trainer.model.parameters() if p.is_floating_point())).removeprefix("torch.")
    if engines.asked() == "DEEPSPEED":  # which turns the weights into those of its mixed precision
        dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(args.mixed_precision, dtype)
    layout = {
        "processes": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "global_batch_size": batches.global_batch,
        "engine": trainer.accelerator.distributed_type.value,
        "device": args.device.type,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "precision": dtype if args.mixed_precision == "no" else f"{args.mixed_precision} over {dtype}",
    }
    if args.process_index == 0:
        revisions = {**corpus.revisions, **_revision(recipe)}
        data = run.record["data"] | {"preparation": _preparation(seen)}
        run.update(layout=layout, parameters=parameters, max_steps=total_steps(args, batches), revisions=revisions, data=data)


def _preparation(seen: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The machines that prepared each set, from what the processes have seen: one where they share a cache."""
    found: dict[str, dict[str, str]] = {}
    for facts in seen:
        for name, written in facts["_written"].items():
            if written:
                found.setdefault(name, {})[written["id"]] = written["host"]
    return {name: sorted(hosts.values()) for name, hosts in found.items()}


def _revision(recipe: Recipe) -> dict[str, str]:
    """The base's commit: transformers keeps none, but loads from a folder of the cache that is named by it."""
    from huggingface_hub import try_to_load_from_cache

    name = recipe.model.name_or_path
    if name.startswith("fetched:"):
        return {name: asset_path(name).name}  # the name with the pinned version
    if is_local(name, ()) or Path(name).exists():
        return {}
    file = try_to_load_from_cache(name, "config.json", revision=recipe.model.revision)
    found = Path(file).parent.name if isinstance(file, str) else recipe.model.revision
    return {name: found} if found else {}


def trained(run: Run, corpus: Corpus, trainer: RecipeTraining, seconds: float) -> None:
    import resource

    import torch

    from scalepeft import adalora

    # of a stream, each process has met its own rows alone
    dropped = Counter(dict(corpus.sets["train"].dropped))
    if corpus.streaming:
        dropped = sum((Counter(facts["_dropped"]) for facts in ranks.agree({"_dropped": dropped})), Counter())
    if trainer.args.process_index != 0:
        return
    state = trainer.state
    seconds += run.record["seconds"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    if trainer.args.device.type != "cpu":
        peak = torch.accelerator.max_memory_allocated()
    adalora_ranks = adalora.ranks(trainer.model) if adalora.allocates_ranks(trainer.model) else None
    best = {"step": state.best_global_step, "metric": trainer.args.metric_for_best_model, "value": state.best_metric}
    run.update(
        step=state.global_step,
        seconds=round(seconds, 3),
        samples_per_second=round(trainer.step_batches().rows_after(state.global_step) / seconds, 3),
        peak_memory_bytes=peak,
        best=best if state.best_global_step else None,
        ranks=adalora_ranks,
        data=run.record["data"] | {"dropped": run.record["data"]["dropped"] | {"train": dropped}},
    )


def evaluated(run: Run, trainer: RecipeTraining) -> None:
    """Evaluate the weights that will be saved, unless that was just done in training, and draw the curves."""
    from scalepeft import report
    from scalepeft.callbacks import MetricsLog

    state = trainer.state
    reloaded = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    saved_step = state.best_global_step if reloaded else state.global_step
    if trainer.eval_dataset and saved_step not in trainer.evaluations:
        if reloaded or trainer.evaluated():
            trainer.pop_callback(MetricsLog)  # these are an earlier step's figures, or were logged by an earlier session
        try:
            trainer.evaluate()
        except Interrupted:
            if not reloaded:  # else the weights are no longer those that were trained last
                trainer.keep()
            raise
        saved_step = state.global_step
    if trainer.args.process_index != 0:
        return
    before = {name: found.get("before") for name, found in run.record["evaluation"].items()}
    after = trainer.evaluations.get(saved_step, {})
    run.update(evaluation={name: {"before": before.get(name), "after": found} for name, found in after.items()})
    if after:
        main = next(iter(after))
        figures = report.figures(after[main])
        pair = {when: run.record["evaluation"][main][when] for when in ("before", "after")}
        run.update(metrics={when: {f: found[f] for f in figures} for when, found in pair.items() if found})
    report.curves(run)


def saved(recipe: Recipe, run: Run, corpus: Corpus, trainer: RecipeTraining) -> None:
    """Save the weights beside and rename them into place, then what the verification needs; written in that order."""
    import numpy as np

    from scalepeft.verify import write_reference

    name = "adapter" if recipe.adapter is not None else "model"
    beside = run.path / f"{name}.part"
    trainer.save_model(str(beside), _internal_call=True)
    main = next(iter(corpus.evaluation), None)
    rows = trainer.eval_dataset[main] if main else trainer.train_dataset
    last = len(rows) - 1 if main or not corpus.streaming else min(31, len(rows) - 1)  # a stream is read from its beginning
    indices = np.unique(np.linspace(0, last, num=32, dtype=np.int64))
    reference = trainer.reference(rows, indices)
    if trainer.args.process_index != 0:
        return
    # The label names, for loaders of the adapter. Not inside adapter/: with a config.json there, transformers takes the folder
    # for a whole model and no longer finds its base.
    backbone = trainer.model.get_base_model() if recipe.adapter is not None else trainer.model
    backbone.config.save_pretrained(run.path)
    if (run.path / name).exists():
        shutil.rmtree(run.path / name)
    beside.rename(run.path / name)
    write_reference(run, reference, trainer, trainer.task.sample(rows[0]))
