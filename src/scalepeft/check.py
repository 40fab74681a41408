"""Every problem of a recipe, each with its line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from scalepeft import adapter_rules, frozen_rules, stream_rules, upstream
from scalepeft.document import Document, Key, mapping
from scalepeft.errors import did_you_mean
from scalepeft.upstream import Field, Type

RECIPE = "scalepeft.recipe:Recipe"
SOURCE = "scalepeft.recipe:Source"
HOLDOUT = "scalepeft.recipe:Holdout"
AUGMENTATION = "scalepeft.recipe:Augmentation"
EXISTING_ADAPTER = "scalepeft.recipe:ExistingAdapter"

REFUSED = {
    "hub_token": "is a secret and recipes are copied into run directories; set HF_TOKEN or use `hf auth login`",
    "hub_strategy": "is not needed: a run is pushed once, when it is complete and verified",
    "hub_always_push": "is not needed: a run is pushed once, when it is complete and verified",
    "resume_from_checkpoint": "is not needed: a run resumes by itself, and adapter.name_or_path continues from an adapter",
    "local_rank": "is the launcher's to say",
    "deepspeed": "is the launcher's to say: --launch zero3, or a launch file with deepspeed_config_file",
    "fsdp": "is the launcher's to say: --launch fsdp2",
    "fsdp_config": "is the launcher's to say: --launch fsdp2, or a launch file with fsdp_config",
    "model_init_kwargs": "is the section model",
    "trust_remote_code": "stands in the section model",
    "dataset_text_field": "is data.columns: {text: NAME}",
    "dataset_kwargs": "is not needed: rows are prepared before the trainer sees them",
    "dataset_num_proc": "is not needed: rows are prepared once and cached",
    "shuffle_dataset": "is not needed: the order of rows is drawn anew in each epoch, from training.seed",
    "pad_token": "is on its way out upstream; the tokenizer's own is taken, or its EOS where it has none",
    "eval_packing": "is not needed: evaluation rows are never packed, and their figures are the same",
    "precompute_ref_log_probs": "is not there: the reference answers in each step",
    "precompute_ref_batch_size": "is not there: the reference answers in each step",
}
"""Fields of upstream's training arguments that a recipe must not set, and why."""

_REFUSED_VALUES: Mapping[str, tuple[object, str]] = {
    "auto_find_batch_size": (True, "would change the global batch in silence; give a smaller per_device_train_batch_size"),
    "average_tokens_across_devices": (False, "would make the loss depend on the number of processes"),
    "train_sampling_strategy": (
        "batch_rebalance",
        "would make the order of rows depend on the number of processes; use group_by_length",
    ),
    "packing_strategy": ("wrapped", "would let documents see each other; use bfd, or bfd_split to lose no token"),
    "truncation_mode": ("keep_end", "is on its way out upstream; shorten the rows before, or raise max_length"),
    "loss_type": ("chunked_nll", "is nll under an older name; use nll"),
    "sync_ref_model": (True, "would move the reference, which no checkpoint keeps: a resumed run would train another model"),
}

_OF_CLASSIFICATION = ("text_columns", "label_column", "label_names", "max_length", "augmentation")
_OF_LANGUAGE = ("format", "columns", "system_prompt")
"""Keys of data (and of its sources) that mean something to one kind of task only."""

_ABOVE_ZERO = (
    "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
"""Numbers that upstream takes at any value, to divide by zero or to train nothing."""

_NOT_NEGATIVE = ("seed", "data_seed", "dataloader_num_workers", "neftune_noise_alpha")
"""Numbers that upstream takes at any value, to fail on a negative one with a traceback."""

EVALUATION_NAME = r"^[A-Za-z0-9_-]+$"
"""What an evaluation set may be called: its name becomes part of metric names and file names."""

_NAMES = {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "mapping", type(None): "null"}


def problems(document: Document) -> list[str]:
    """All that is wrong with a recipe, one line each, in the order of the file; empty when nothing is."""
    values = {name: value for name, value in document.values.items() if value is not None}  # null removes a section
    forwarded = forwarded_sections(values)
    checking = _Checking(document=document, homes=_homes(forwarded))
    found = [*checking.section(values, recipe_fields(), (), "a recipe")]
    for name, reference in forwarded.items():
        section = values.get(name)
        if not isinstance(section, dict):
            continue
        if reference is None:
            found += _peft_type(document, section)
        else:
            found += checking.section(section, upstream.fields(reference), (name,), f"{name} ({_class(reference)})")
    adapter = mapping(values.get("adapter"))
    for name in [name for name in adapter_rules.NESTED if isinstance(adapter.get(name), dict)]:
        reference = adapter_rules.NESTED[name]
        title = f"adapter.{name} ({_class(reference)})"
        found += checking.section(adapter[name], upstream.fields(reference), ("adapter", name), title)
    found += _across(document, values, complete=not checking.unknown)
    return sorted(dict.fromkeys(found), key=_line)


def _line(problem: str) -> tuple[str, int]:
    """Where a problem stands: file and line; what has none, an override, by its text."""
    place = re.match(r"(.+?):(\d+): ", problem)
    return (place[1], int(place[2])) if place else (problem, 0)


@cache
def recipe_fields() -> Mapping[str, Field]:
    """The top-level keys of a recipe."""
    return {name: field for name, field in upstream.fields(RECIPE).items() if name != "document"}


def forwarded_sections(values: Mapping[str, Any]) -> dict[str, str | None]:
    """The class each pass-through section is forwarded to; None for an adapter whose type is not known."""
    task, adapter = values.get("task"), values.get("adapter")
    default = next(iter(upstream.TASK_ARGUMENTS.values()))
    kind: str | None = upstream.peft_types()["LORA"]  # without an adapter: to know where a mis-nested key would belong
    if isinstance(adapter, dict):
        named = adapter.get("peft_type")
        kind = upstream.peft_types().get(named) if isinstance(named, str) else None
        kind = EXISTING_ADAPTER if "name_or_path" in adapter else kind
    return {
        "training": upstream.TASK_ARGUMENTS.get(task, default) if isinstance(task, str) else default,
        "quantization": upstream.QUANTIZATION,
        "early_stopping": upstream.EARLY_STOPPING,
        "adapter": kind,
    }


def _homes(forwarded: Mapping[str, str | None]) -> dict[str, Mapping[str, Field]]:
    """Which keys each section has, to say of a mis-nested key where it belongs."""
    top = recipe_fields()
    homes = {name: upstream.fields(reference) for name, reference in forwarded.items() if reference}
    homes |= {name: upstream.fields(section) for name in ("model", "data") if (section := top[name].type.section)}
    homes |= {"data.train": upstream.fields(SOURCE), "data.holdout": upstream.fields(HOLDOUT)}
    return homes | {"data.augmentation": upstream.fields(AUGMENTATION), "the top level": top}


def _class(reference: str) -> str:
    return reference.rpartition(":")[2]


@dataclass(kw_only=True)
class _Checking:
    """Unknown, missing and wrongly typed keys of sections."""

    document: Document
    homes: Mapping[str, Mapping[str, Field]]
    unknown: bool = False
    """Whether an unknown key was met: then the absence of another means little."""

    def section(self, section: Mapping[str, Any], known: Mapping[str, Field], key: Key, title: str) -> Iterator[str]:
        meant = ""
        for name, value in section.items():
            if name in known:
                yield from self.value(value, known[name].type, (*key, name))
                continue
            self.unknown = True
            suggestion = self.suggestion(name, known, key)
            meant += suggestion
            yield f"{self.document.where((*key, name))}: {title} has no {name!r}{suggestion}"
        for name, field in known.items():
            if field.required and name not in section and repr(name) not in meant:
                yield f"{self.document.where(key)}: {title} needs {name!r}: {field.help or 'it has no default'}"

    def suggestion(self, name: str, known: Mapping[str, Field], key: Key) -> str:
        """What an unknown key may have been meant as."""
        here = ".".join(key) or "the top level"
        elsewhere = [home for home, names in self.homes.items() if name in names and home != here]
        if not elsewhere and name in upstream.REMOVED:
            return f"; it is now {upstream.REMOVED[name]}"
        belongs = f"; it belongs to {' or '.join(elsewhere)}" if elsewhere else ""
        return belongs + did_you_mean(name, known)

    def value(self, value: Any, kind: Type, key: Key) -> Iterator[str]:
        where, title = self.document.where(key), ".".join(key)
        if isinstance(value, dict) and kind.section:
            yield from self.section(value, upstream.fields(kind.section), key, f"{title} ({_class(kind.section)})")
        elif not _fits(value, kind):
            wanted = " or ".join(sorted(kind.kinds - {"null"})).replace("dict", "mapping") or "null"
            shown = f"{value!r} ({_NAMES[type(value)]})" if isinstance(value, bool | int | float | str) else _NAMES[type(value)]
            yield f"{where}: {title} is {shown}; it takes {wanted}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{where}: {title} is {value}; it takes a finite number"
        elif isinstance(value, str) and kind.values and value not in kind.values:
            some = ", ".join(kind.values[:12]) + (", ..." if len(kind.values) > 12 else "")
            yield f"{where}: {title} has no value {value!r}{did_you_mean(value, kind.values) or f'; it is one of {some}'}"
        elif kind.items and isinstance(value, list | dict):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for name, item in pairs:
                yield from self.value(item, kind.items, (*key, str(name)))


def _fits(value: object, kind: Type) -> bool:
    if "any" in kind.kinds:
        return True
    name = _NAMES[type(value)].replace("mapping", "dict")
    return name in kind.kinds or (name == "int" and "float" in kind.kinds)


def _peft_type(document: Document, adapter: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with an adapter section that selects no class."""
    types = upstream.peft_types()
    if "peft_type" in adapter:
        named = adapter["peft_type"]
        suggestion = did_you_mean(str(named).upper(), types) or f"; it is one of {', '.join(types)}"
        yield f"{document.where(('adapter', 'peft_type'))}: adapter: peft has no type {named!r}{suggestion}"
        return
    mistyped = {name: near for name in adapter if (near := did_you_mean(name, ("peft_type", "name_or_path")))}
    for name, near in mistyped.items():
        yield f"{document.where(('adapter', name))}: adapter has no {name!r}{near}"
    if not mistyped:
        yield f"{document.where(('adapter',))}: adapter: needs peft_type (LORA, IA3, ...), or name_or_path to continue from one"


def _across(document: Document, values: Mapping[str, Any], *, complete: bool) -> Iterator[str]:
    """What no single key shows: contradictions between keys, and values that have a type but no meaning.

    What hangs on a key's absence is left out when the recipe is not `complete`, for it may be there with a typo.
    """
    training, data = mapping(values.get("training")), mapping(values.get("data"))
    yield from _model(document, mapping(values.get("model")))
    yield from _training(document, training, upstream.fields(str(forwarded_sections(values)["training"])))
    yield from _batch(document, values, training)
    yield from _data(document, data)
    yield from stream_rules.problems(document, values)
    yield from frozen_rules.problems(document, values)
    yield from _task(document, values.get("task"), data)
    yield from _preference(document, values)
    yield from adapter_rules.problems(document, values, complete=complete)
    if not complete:
        return
    evaluates = bool(data.get("evaluation") or data.get("holdout"))
    for name in ("eval_strategy", "eval_on_start", "load_best_model_at_end"):
        if training.get(name) not in (None, "no", False) and not evaluates:
            yield f"{document.where(('training', name))}: training.{name} needs data.evaluation or data.holdout"
    best = training.get("load_best_model_at_end") is True
    when, saves = training.get("eval_strategy", "no"), training.get("save_strategy", "steps")
    if best and saves not in ("best", when):
        where = document.where(("training", "load_best_model_at_end"))
        yield (
            f"{where}: training.load_best_model_at_end needs the same eval_strategy ({when}) and save_strategy ({saves}),"
            " or save_strategy: best"
        )
    if values.get("early_stopping") is not None and not best:
        yield f"{document.where(('early_stopping',))}: early_stopping needs training.load_best_model_at_end: true"
    patience = mapping(values.get("early_stopping")).get("early_stopping_patience")
    if isinstance(patience, int) and patience < 1:
        where = document.where(("early_stopping", "early_stopping_patience"))
        yield f"{where}: early_stopping.early_stopping_patience must be at least 1"


def _model(document: Document, model: Mapping[str, Any]) -> Iterator[str]:
    named = mapping(model.get("config")).get("problem_type")
    if named not in (None, "regression", "single_label_classification"):
        place = document.where(("model", "config", "problem_type"))
        known = "single_label_classification and regression"
        yield f"{place}: model.config.problem_type: {named!r} is not supported; there are {known}"


def _task(document: Document, task: object, data: Mapping[str, Any]) -> Iterator[str]:
    """Keys of data that belong to another kind of task."""
    language = task in upstream.LANGUAGE_TASKS
    if task not in upstream.TASK_ARGUMENTS:
        return
    instead = (
        {"text_columns": "; here it is data.columns", "max_length": "; here it is training.max_length"} if language else {}
    )
    for key, section in [(("data",), data), *_sources(data)]:
        for name in section:
            if name in (_OF_CLASSIFICATION if language else _OF_LANGUAGE):
                kind = "sequence-classification" if language else " and ".join(upstream.LANGUAGE_TASKS)
                told = f"{'.'.join((*key, name))} belongs to the task {kind}, not to {task}{instead.get(name, '')}"
                yield f"{document.where((*key, name))}: {told}"


def _preference(document: Document, values: Mapping[str, Any]) -> Iterator[str]:
    """What only the task preference cannot do."""
    if values.get("task") != "preference":
        return
    if mapping(values.get("training")).get("padding_free"):
        yield f"{document.where(('training', 'padding_free'))}: training.padding_free: TRL has turned it off for preferences"
    if mapping(values.get("model")).get("added_tokens") and values.get("adapter") is None:
        told = (
            "the reference would begin with other rows for them than the trained model; give an adapter, or train them before"
        )
        yield f"{document.where(('model', 'added_tokens'))}: model.added_tokens: {told}"


def _training(document: Document, training: Mapping[str, Any], known: Mapping[str, Field]) -> Iterator[str]:
    for name, value in training.items():
        where = document.where(("training", name))
        if name in REFUSED and name in known:
            yield f"{where}: training.{name} {REFUSED[name]}"
        refused, reason = _REFUSED_VALUES.get(name, (None, ""))
        if reason and value == refused:
            yield f"{where}: training.{name}: {str(value).lower()} {reason}"
        if name in _ABOVE_ZERO and isinstance(value, int | float) and not value > 0:
            yield f"{where}: training.{name} must be above 0"
        if name in _NOT_NEGATIVE and isinstance(value, int | float) and not value >= 0:
            yield f"{where}: training.{name} must not be negative"
    smoothing = training.get("label_smoothing_factor")
    if isinstance(smoothing, int | float) and not 0 <= smoothing <= 1:
        where = document.where(("training", "label_smoothing_factor"))
        yield f"{where}: training.label_smoothing_factor must be from 0 to 1"


def _batch(document: Document, values: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[str]:
    total, batch = values.get("global_batch_size"), training.get("per_device_train_batch_size", 8)
    where = document.where(("global_batch_size",))
    if not isinstance(total, int) or not isinstance(batch, int):
        return
    if total < 1 or batch < 1:
        yield f"{where}: global_batch_size and training.per_device_train_batch_size must be at least 1"
    elif total % batch:
        yield f"{where}: global_batch_size {total} is not a multiple of training.per_device_train_batch_size {batch}"
    if "gradient_accumulation_steps" in training:
        yield f"{where}: global_batch_size derives training.gradient_accumulation_steps; give only one of them"


def _data(document: Document, data: Mapping[str, Any]) -> Iterator[str]:
    train, sets, holdout = data.get("train"), mapping(data.get("evaluation")), data.get("holdout")
    for name in sets:
        where = document.where(("data", "evaluation", name))
        if not re.match(EVALUATION_NAME, name):
            yield f"{where}: data.evaluation: the name {name!r} may only hold letters, digits, - and _"
        if name == "holdout" and holdout is not None:
            yield f"{where}: data.evaluation: the name 'holdout' is taken by data.holdout"
    for key, source in _sources(data):
        title = ".".join(key)
        if source.get("first_rows") is not None and source.get("sample_rows") is not None:
            yield f"{document.where((*key, 'sample_rows'))}: {title}: give first_rows or sample_rows, not both"
        for name in ("first_rows", "sample_rows", "weight"):
            if isinstance(source.get(name), int | float) and not source[name] > 0:
                yield f"{document.where((*key, name))}: {title}.{name} must be above 0"
        yield from _seed(document, (*key, "sample_seed"), source)
        yield from _text_columns(document, (*key, "text_columns"), source)
    if isinstance(train, list):
        weighted = [mapping(source).get("weight") is not None for source in train]
        if not train:
            yield f"{document.where(('data', 'train'))}: data.train is an empty list"
        if any(weighted) and not all(weighted):
            yield f"{document.where(('data', 'train'))}: data.train: give every source a weight, or none"
    yield from _text_columns(document, ("data", "text_columns"), data)
    yield from _seed(document, ("data", "holdout", "seed"), mapping(holdout))
    names = data.get("label_names")
    if isinstance(names, list) and len(set(map(str, names))) < len(names):
        yield f"{document.where(('data', 'label_names'))}: data.label_names names a label twice"
    size = mapping(holdout).get("size")
    if isinstance(size, int | float) and not size > 0:
        yield f"{document.where(('data', 'holdout', 'size'))}: data.holdout.size must be above 0"
    share, copies = (mapping(data.get("augmentation")).get(name) for name in ("share", "copies"))
    if isinstance(share, int | float) and not 0 < share <= 1:
        where = document.where(("data", "augmentation", "share"))
        yield f"{where}: data.augmentation.share must be above 0 and at most 1"
    if isinstance(copies, int) and copies < 1:
        yield f"{document.where(('data', 'augmentation', 'copies'))}: data.augmentation.copies must be at least 1"


def _text_columns(document: Document, key: Key, section: Mapping[str, Any]) -> Iterator[str]:
    columns = section.get("text_columns")
    if isinstance(columns, list) and not 1 <= len(columns) <= 2:
        yield f"{document.where(key)}: {'.'.join(key)} takes one column or a pair, not {len(columns)}"


def _seed(document: Document, key: Key, section: Mapping[str, Any]) -> Iterator[str]:
    seed = section.get(key[-1])
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        yield f"{document.where(key)}: {'.'.join(key)} must be from 0 to 2^32 - 1"


def _sources(data: Mapping[str, Any]) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    train = data.get("train")
    if isinstance(train, dict):
        yield ("data", "train"), train
    for index, source in enumerate(train if isinstance(train, list) else ()):
        yield ("data", "train", str(index)), mapping(source)
    for name, source in mapping(data.get("evaluation")).items():
        yield ("data", "evaluation", name), mapping(source)
