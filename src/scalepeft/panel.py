"""What is about to be trained, on a screen: the lines by which a user sees that it is what was meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scalepeft import report
from scalepeft.data import Corpus
from scalepeft.prepared import Prepared
from scalepeft.recipe import Recipe
from scalepeft.run import Run
from scalepeft.streams import Streamed
from scalepeft.trainer import RecipeTraining, steps_per_epoch


def start(recipe: Recipe, run: Run, corpus: Corpus, trainer: RecipeTraining, new: Sequence[str]) -> str:
    """What is about to be trained, from the run's record."""
    batches, record = trainer.step_batches(), run.record
    layout, counts = record["layout"], record["parameters"]
    kind = "full fine-tuning" if recipe.adapter is None else recipe.adapter.get("peft_type", "continued adapter")
    backbone = trainer.model.get_base_model() if recipe.adapter is not None else trainer.model
    heads = sorted({name.rpartition(".")[0] for name in new})
    several = layout["processes"] > 1
    engine = f" ({layout['engine']})" if several else ""
    threads = f"{layout['threads']} thread{'s' if layout['threads'] > 1 else ''}{' each' if several else ''}"
    processes = f"{layout['processes']} process{'es' if several else ''}"
    batch = f"{layout['per_device_train_batch_size']} x {layout['gradient_accumulation_steps']} accumulated x {processes}"
    of_epoch = f"; {steps_per_epoch(trainer.args, batches):,} an epoch"
    padding = "none: rows lie end to end" if getattr(trainer, "padding_free", False) else None
    padding = padding or (
        "known when the rows are read" if corpus.streaming else f"{batches.padding_waste():.1%} of the tokens"
    )
    lines = {
        "model": f"{recipe.model.name_or_path} ({type(backbone).__name__}{'; new: ' if heads else ''}{', '.join(heads)})",
        "trains": f"{kind}: {counts['trainable']:,} of {counts['total']:,} parameters"
        f" ({counts['trainable'] / counts['total']:.4%})",
        "data": " · ".join(_rows(name, prepared) for name, prepared in corpus.sets.items()),
        **({"prepared": _prepared(record["data"]["preparation"])} if several else {}),
        "steps": f"{record['max_steps']:,} of {batches.global_batch} rows ({batch})" + ("" if corpus.streaming else of_epoch),
        "padding": padding,
        "layout": f"{processes}{engine} · {layout['device']} · {layout['precision']} · {threads}",
    }
    return report.panel(f"{recipe.name} -> {run.path}", lines)


def _prepared(preparation: Mapping[str, Sequence[str]]) -> str:
    """How often the rows of several processes were prepared."""
    times = max(map(len, preparation.values()), default=1)
    hosts = sorted({host for hosts in preparation.values() for host in hosts})
    once = f"once, by {', '.join(hosts)}" if hosts else "once"
    return once if times == 1 else f"once on each of {times} machines, which share no cache: {', '.join(hosts)}"


def _rows(name: str, prepared: Prepared | Streamed) -> str:
    if isinstance(prepared, Streamed):
        return f"{name} {len(prepared.rows):,} rows of a stream"
    dropped = f" ({sum(prepared.dropped.values())} dropped)" if prepared.dropped else ""
    augmented = f" ({prepared.augmented['added']:,} of them augmented)" if prepared.augmented else ""
    cut = f" ({prepared.truncated:,} cut)" if prepared.truncated else ""
    packed = f" packed into {len(prepared.rows):,}" if prepared.documents else ""
    rows = prepared.documents or len(prepared.rows)
    return f"{name} {rows:,} rows{packed}{augmented}{cut}{dropped}{', cached' if prepared.reused else ''}"
