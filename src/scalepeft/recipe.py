"""The YAML file as a frozen, checked value."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from scalepeft import upstream
from scalepeft.errors import UserError, did_you_mean, one_line
from scalepeft.upstream import Field, Type

Key = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model, in the words of `from_pretrained`."""

    name_or_path: str
    """A Hub id, a folder, or `fetched:NAME` for what `scalepeft fetch` brings."""
    revision: str | None = None
    """Branch, tag or commit of the Hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype the weights are loaded in; auto takes the checkpoint's."""
    attn_implementation: str | None = None
    """The attention implementation (sdpa, eager, flash_attention_2, ...); upstream chooses when absent."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless said here."""
    use_safetensors: bool = True
    """Load safetensors only. false also admits pickled weights, which can run code."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the model's own configuration (dropout, problem_type, ...) to set before it is built."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of rows, in the words of `load_dataset`."""

    path: str
    """A Hub id, a csv, tsv, json, jsonl or parquet file, a saved data set folder, or `fetched:NAME/FILE`."""
    name: str | None = None
    """The configuration name of a Hub data set."""
    split: str | None = None
    """The split of a Hub data set or a saved folder of splits; a file has none."""
    revision: str | None = None
    """Branch, tag or commit of the Hub id."""
    text_columns: str | list[str] | None = None
    """Overrides data.text_columns for this source."""
    label_column: str | None = None
    """Overrides data.label_column for this source."""
    first_rows: int | None = None
    """Take only the first N rows."""
    sample_rows: int | None = None
    """Take N rows drawn without replacement with sample_seed, in the order of the source."""
    sample_seed: int = 42
    """The seed of sample_rows."""
    weight: float | None = None
    """The share of this source among several; the largest mixture that repeats no row is drawn."""


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """A part of the training rows that is held out and evaluated under the name `holdout`."""

    size: int | float
    """A number of rows, or a share of them below 1."""
    seed: int = 42
    """The seed of the draw."""
    stratified: bool = True
    """Keep each label's share the same on both sides."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained and evaluated on."""

    train: Source | list[Source]
    """One source of training rows, or several to mix."""
    evaluation: dict[str, Source] = field(default_factory=dict)
    """Evaluation sets by name. The first is the main one: its metrics are eval_*, the others' eval_NAME_*."""
    holdout: Holdout | None = None
    """Cut an evaluation set from the training rows; it then is the main one."""
    text_columns: str | list[str] = "text"
    """The column of the text, or the two columns of a pair."""
    label_column: str = "label"
    """The column of the label: an integer or a name."""
    label_names: list[str | int] | None = None
    """The names of labels 0, 1, ...; found from the data set or the training rows when absent."""
    max_length: int | None = None
    """Longest input in tokens, special tokens included; the model's own limit when absent."""
    on_bad_rows: Literal["error", "drop"] = "error"
    """What to do with a row without usable text or label: stop and name it, or drop, count and record it."""


@dataclass(frozen=True, kw_only=True)
class ExistingAdapter:
    """An adapter to continue from."""

    name_or_path: str
    """A run directory, an adapter folder or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of the Hub id."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe after checking: our own sections as values, upstream's as the options they are forwarded with."""

    task: Literal["sequence-classification"]
    """What is trained."""
    model: Model
    """The base model."""
    quantization: Mapping[str, Any] | None = None
    """Options of transformers' BitsAndBytesConfig; absent: no quantisation."""
    adapter: Mapping[str, Any] | None = None
    """peft_type and the options of peft's configuration for it, or name_or_path of an adapter to continue from; absent: full fine-tuning."""
    data: Data
    """Training and evaluation rows."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Options of transformers' TrainingArguments."""
    early_stopping: Mapping[str, Any] | None = None
    """Options of transformers' EarlyStoppingCallback; absent: no early stopping."""
    global_batch_size: int | None = None
    """Rows per optimizer step over all processes; gradient accumulation is derived from it."""

    document: Document

    @property
    def name(self) -> str:
        """The recipe's file name without its suffix."""
        return self.document.path.stem

    @property
    def output_dir(self) -> Path:
        """The run directory: training.output_dir, or runs/<recipe name>."""
        return Path(self.training.get("output_dir") or Path("runs") / self.name).expanduser()

    @property
    def training_sources(self) -> list[Source]:
        """The sources of the training rows, also when there is one."""
        return self.data.train if isinstance(self.data.train, list) else [self.data.train]

    def error(self, key: str, message: str) -> UserError:
        """A one-line error that points to where a dotted key stands."""
        return UserError(f"{self.document.where(_key(key))}: {key}: {message}")

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values after overrides, without defaults: what another run of it would be given."""
        return self.document.values


@dataclass(frozen=True, kw_only=True)
class Document:
    """A parsed YAML mapping that knows where each of its values stands."""

    path: Path
    text: str
    values: dict[str, Any]
    lines: Mapping[Key, str]

    def where(self, key: Key) -> str:
        """`file:line` of a key or of the nearest section around it, or `command line`."""
        while key not in self.lines and key:
            key = key[:-1]
        return self.lines.get(key, str(self.path))


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    `overrides` have the form `section.key=value`, the value in YAML. Raises UserError with all problems at once.
    """
    document = _override(_read(find(path)), overrides)
    problems = list(_check_recipe(document))
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return _build(upstream.fields("scalepeft.recipe:Recipe"), Recipe, document.values, document=document)


def find(path: str | os.PathLike[str]) -> Path:
    """The file of a recipe: a path, or the bare name of a shipped recipe."""
    if Path(path).exists():
        return Path(path)
    shipped = shipped_recipes()
    if str(path) in shipped:
        return shipped[str(path)]
    beside = [str(p) for p in Path(path).parent.glob("*.y*ml")] if Path(path).suffix else list(shipped)
    raise UserError(f"{path}: no such recipe{did_you_mean(str(path), beside)}")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name: inside an installed wheel, or beside the sources."""
    here = Path(__file__).parent
    folder = next((f for f in (here / "recipes", here.parents[1] / "recipes") if f.is_dir()), here)
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def dump(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that `load` reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flatten(values: object, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with dotted keys."""
    pairs: Any = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if not pairs:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


# --- reading: YAML 1.2 scalars, and the line of each value ---------------------------------------------------------

_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}


class _Loader(yaml.SafeLoader):
    """YAML's core schema, version 1.2: 2e-4 is a number, `no` is a string."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own way to hold them


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would not read back as a string."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True


def _register_scalars() -> None:
    import re

    for tag, (pattern, first) in _SCALARS.items():
        for kind in (_Loader, _Dumper):
            kind.add_implicit_resolver(tag, re.compile(rf"^(?:{pattern})$"), list(first))  # type: ignore[no-untyped-call]


_register_scalars()


def _read(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    lines: dict[Key, str] = {}
    problems: list[str] = []
    node = _compose(text, str(path))
    if node is None:
        raise UserError(f"{path}: is empty; a recipe has at least task, model and data")
    values = _value(node, (), str(path), lines, problems)
    if problems:
        raise UserError(*problems)
    if not isinstance(values, dict):
        kind = "list" if isinstance(values, list) else "single value"
        raise UserError(f"{path}:1: a recipe is a mapping of sections, this is a {kind}")
    return Document(path=path, text=text, values=values, lines=lines)


def _compose(text: str, place: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{place}:{mark.line + 1}" if mark else place
        reason = one_line(Exception(error.problem or error.context or error))
        if "'\\t'" in reason:
            reason = "a tab where YAML wants spaces; indent with spaces"
        raise UserError(f"{line}: not YAML: {reason}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{place}: not YAML: {one_line(error)}") from None


def _value(node: yaml.Node, key: Key, file: str, lines: dict[Key, str], problems: list[str]) -> Any:  # noqa: ANN401
    where = f"{file}:{node.start_mark.line + 1}"
    lines.setdefault(key, where)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for name, value in node.value:
            at = f"{file}:{name.start_mark.line + 1}"
            text = name.value if isinstance(name, yaml.ScalarNode) else None
            if text is None:
                problems.append(f"{at}: a key must be a plain word")
                continue
            if text in result:
                problems.append(f"{at}: duplicate key {text!r}; it stands already at {lines[(*key, text)]}")
                continue
            lines[(*key, text)] = at
            result[text] = _value(value, (*key, text), file, lines, problems)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*key, i), file, lines, problems) for i, item in enumerate(node.value)]
    kind = node.tag.rpartition(":")[2]
    convert = {"null": lambda _: None, "bool": lambda t: t.lower() == "true", "int": partial(int, base=0), "float": _float}
    if kind in convert:
        text = node.value
        if kind == "int" and text.lstrip("+-").isdigit():
            return int(text)
        return convert[kind](text)
    if kind != "str":
        problems.append(f"{where}: the tag {node.tag!r} has no meaning in a recipe")
    return node.value


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").replace(".nan", "nan").replace(".NaN", "nan").replace(".NAN", "nan"))


def _key(dotted: str) -> Key:
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))


def _override(document: Document, overrides: Sequence[str]) -> Document:
    """Apply `section.key=value` to the plain values, before they are checked."""
    import copy

    values, lines = copy.deepcopy(document.values), dict(document.lines)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise UserError(f"command line: {override!r} is not an override; its form is section.key=value")
        where, problems = f"command line ({override})", list[str]()
        node = _compose(text, where)
        inner: dict[Key, str] = {}
        value = None if node is None else _value(node, (), where, inner, problems)
        if problems:
            raise UserError(*problems)
        *parents, last = _key(dotted)
        holder: Any = values
        for part in parents:
            holder = _step(holder, part, where)
        if isinstance(holder, list) and not (isinstance(last, int) and last < len(holder)):
            raise UserError(f"{where}: a list is there; its items are 0 to {len(holder) - 1}")
        if not isinstance(holder, dict | list):
            raise UserError(f"{where}: {'.'.join(map(str, parents))} is {holder!r}, which holds no keys")
        holder[last if isinstance(holder, list) else str(last)] = value
        lines = {k: v for k, v in lines.items() if k[: len(parents) + 1] != (*parents, last)}
        lines |= {(*parents, last, *k): where for k in inner} | {(*parents, last): where}
    return Document(path=document.path, text=document.text, values=values, lines=lines)


def _step(holder: Any, part: str | int, where: str) -> Any:  # noqa: ANN401
    if isinstance(holder, list) and isinstance(part, int) and part < len(holder):
        return holder[part]
    if not isinstance(holder, dict):
        raise UserError(f"{where}: there is no {part!r} to set a key of")
    if holder.get(str(part)) is None:
        holder[str(part)] = {}
    return holder[str(part)]


# --- checking: every problem of the file, each with its line -------------------------------------------------------

_REFUSED = {
    "hub_token": "is a secret and recipes are copied into run directories; set HF_TOKEN or use `hf auth login`",
    "resume_from_checkpoint": "is not needed: a run resumes by itself, and adapter.name_or_path continues from an adapter",
    "local_rank": "is the launcher's to say",
}
_REFUSED_VALUES = {
    ("average_tokens_across_devices", False): "would make the loss depend on the number of processes",
    ("train_sampling_strategy", "batch_rebalance"): "would make the order of rows depend on the number of processes; use group_by_length",
}


def _check_recipe(document: Document) -> Iterator[str]:
    values = {k: v for k, v in document.values.items() if v is not None}
    top = {name: f for name, f in upstream.fields("scalepeft.recipe:Recipe").items() if name != "document"}
    task = values.get("task")
    arguments = upstream.TASK_ARGUMENTS.get(task if isinstance(task, str) else "", next(iter(upstream.TASK_ARGUMENTS.values())))
    forwarded = {
        "training": arguments,
        "quantization": upstream.QUANTIZATION,
        "early_stopping": upstream.EARLY_STOPPING,
        "adapter": _adapter_class(values.get("adapter")),
    }
    homes = {name: _names_in(reference) for name, reference in forwarded.items() if reference}
    homes |= {f: set(upstream.fields(t.section)) for f in ("model", "data") if (t := top[f].type).section}
    homes["data.train"] = set(upstream.fields("scalepeft.recipe:Source"))
    homes["top level"] = set(top)
    check = partial(_check_section, document=document, homes=homes)
    yield from check(values, top, (), "a recipe")
    for name, reference in forwarded.items():
        section = values.get(name)
        if not isinstance(section, dict):
            continue
        if reference is None:
            yield from _check_peft_type(document, section)
            continue
        title = f"{name} ({reference.rpartition(':')[2]})"
        known = upstream.fields(reference)
        options = {k: v for k, v in section.items() if not (name == "adapter" and k == "peft_type")}
        yield from check(options, known, (name,), title)
    if "training" in values and isinstance(values["training"], dict):
        yield from _check_training(document, values["training"])
    yield from _check_across(document, values)


def _names_in(reference: str) -> set[str]:
    return set(upstream.fields(reference)) | ({"peft_type"} if reference.startswith("peft.") else set())


def _adapter_class(adapter: object) -> str | None:
    if not isinstance(adapter, dict):
        return upstream.peft_types()["LORA"]  # only to know where a mis-nested key would belong
    if "name_or_path" in adapter:
        return "scalepeft.recipe:ExistingAdapter"
    named = adapter.get("peft_type")
    return upstream.peft_types().get(named) if isinstance(named, str) else None


def _check_peft_type(document: Document, adapter: dict[str, Any]) -> Iterator[str]:
    types = upstream.peft_types()
    if "peft_type" in adapter:
        named = adapter["peft_type"]
        suggestion = did_you_mean(str(named).upper(), types) or f"; it is one of {', '.join(types)}"
        yield f"{document.where(('adapter', 'peft_type'))}: adapter: peft has no type {named!r}{suggestion}"
        return
    mistyped = [k for k in adapter if did_you_mean(k, ("peft_type", "name_or_path"))]
    for key in mistyped:
        yield f"{document.where(('adapter', key))}: adapter has no {key!r}{did_you_mean(key, ('peft_type', 'name_or_path'))}"
    if not mistyped:
        yield f"{document.where(('adapter',))}: adapter: needs peft_type (LORA, IA3, ...), or name_or_path to continue from one"


def _check_section(
    section: Mapping[str, Any], known: Mapping[str, Field], key: Key, title: str, *, document: Document, homes: Mapping[str, set[str]]
) -> Iterator[str]:
    """Unknown, missing and wrongly typed keys of one section, and of the sections of our own inside it."""
    meant: set[str] = set()
    for name, value in section.items():
        where = document.where((*key, name))
        if name not in known:
            suggestion = did_you_mean(name, known)
            meant |= {k for k in known if repr(k) in suggestion}
            yield f"{where}: {title} has no {name!r}{_elsewhere(name, key, homes) or suggestion}"
            continue
        yield from _check_value(value, known[name].type, (*key, name), document, homes)
    for name, entry in known.items():
        if entry.required and name not in section and name not in meant:
            yield f"{document.where(key)}: {title} needs {name!r}: {entry.help or 'it has no default'}"


def _elsewhere(name: str, key: Key, homes: Mapping[str, set[str]]) -> str:
    here = ".".join(map(str, key)) or "top level"
    found = [home for home, names in homes.items() if name in names and home != here]
    if found:
        return f"; it belongs to {' or '.join(found)}"
    if name in upstream.REMOVED:
        return f"; it is now {upstream.REMOVED[name]}"
    return ""


def _check_value(value: Any, kind: Type, key: Key, document: Document, homes: Mapping[str, set[str]]) -> Iterator[str]:  # noqa: ANN401
    where, title = document.where(key), ".".join(map(str, key))
    if isinstance(value, dict) and kind.section:
        module, _, name = kind.section.rpartition(":")
        yield from _check_section(value, upstream.fields(kind.section), key, f"{title} ({name})", document=document, homes=homes)
        return
    if not _fits(value, kind):
        wanted = " or ".join(sorted(kind.kinds - {"null"})) or "null"
        yield f"{where}: {title} is {_shown(value)}; it takes {wanted}"
        return
    if isinstance(value, str) and kind.values and value not in kind.values and not (kind.enumeration and value.upper() in kind.values):
        near = did_you_mean(value, kind.values) or f"; it is one of {', '.join(kind.values[:12])}{', ...' if len(kind.values) > 12 else ''}"
        yield f"{where}: {title} has no value {value!r}{near}"
    if kind.items and isinstance(value, list):
        items = kind.items
        if kind.section and not items.section:
            items = Type(kinds=frozenset({"dict"}), section=kind.section)
        for index, item in enumerate(value):
            yield from _check_value(item, items, (*key, index), document, homes)
    if kind.items and isinstance(value, dict) and "dict" in kind.kinds:
        for name, item in value.items():
            yield from _check_value(item, kind.items, (*key, name), document, homes)


def _fits(value: object, kind: Type) -> bool:
    if "any" in kind.kinds:
        return True
    if isinstance(value, bool):
        return "bool" in kind.kinds
    if isinstance(value, int):
        return bool({"int", "float"} & kind.kinds)
    name = {float: "float", str: "str", list: "list", dict: "dict", type(None): "null"}[type(value)]
    return name in kind.kinds


def _shown(value: object) -> str:
    name = {bool: "bool", int: "int", float: "float", str: "str", list: "a list", dict: "a mapping", type(None): "null"}[type(value)]
    return f"{value!r} ({name})" if isinstance(value, bool | int | float | str) else name


def _check_training(document: Document, training: Mapping[str, Any]) -> Iterator[str]:
    for name, value in training.items():
        where = document.where(("training", name))
        if name in _REFUSED:
            yield f"{where}: training.{name} {_REFUSED[name]}"
        for (key, refused), reason in _REFUSED_VALUES.items():
            if name == key and value == refused:
                yield f"{where}: training.{name}: {value} {reason}"


def _check_across(document: Document, values: Mapping[str, Any]) -> Iterator[str]:
    """What no single key shows: contradictions between keys."""
    training = values.get("training") if isinstance(values.get("training"), dict) else {}
    data = values.get("data") if isinstance(values.get("data"), dict) else {}
    total, batch = values.get("global_batch_size"), training.get("per_device_train_batch_size", 8)
    if isinstance(total, int) and isinstance(batch, int):
        where = document.where(("global_batch_size",))
        if total < 1 or batch < 1:
            yield f"{where}: global_batch_size and per_device_train_batch_size must be at least 1"
        elif total % batch:
            yield f"{where}: global_batch_size {total} is not a multiple of per_device_train_batch_size {batch}"
        if "gradient_accumulation_steps" in training:
            yield f"{where}: global_batch_size derives gradient_accumulation_steps; give only one of them"
    sets = data.get("evaluation") if isinstance(data.get("evaluation"), dict) else {}
    if data.get("holdout") is not None and "holdout" in sets:
        yield f"{document.where(('data', 'evaluation', 'holdout'))}: data.evaluation: the name 'holdout' is taken by data.holdout"
    has_sets = bool(sets or data.get("holdout"))
    for name in ("eval_strategy", "eval_on_start", "load_best_model_at_end"):
        if training.get(name) not in (None, "no", False) and not has_sets:
            yield f"{document.where(('training', name))}: training.{name} needs data.evaluation or data.holdout"
    if values.get("early_stopping") is not None and not training.get("load_best_model_at_end"):
        yield f"{document.where(('early_stopping',))}: early_stopping needs training.load_best_model_at_end: true"
    for key, source in _sources(data):
        if source.get("first_rows") is not None and source.get("sample_rows") is not None:
            yield f"{document.where((*key, 'sample_rows'))}: {'.'.join(map(str, key))}: give first_rows or sample_rows, not both"
        for name in ("first_rows", "sample_rows", "weight"):
            if isinstance(source.get(name), int | float) and source[name] <= 0:
                yield f"{document.where((*key, name))}: {'.'.join(map(str, key))}.{name} must be above 0"
    train = data.get("train")
    if isinstance(train, list):
        weighted = [isinstance(s, dict) and s.get("weight") is not None for s in train]
        if not train:
            yield f"{document.where(('data', 'train'))}: data.train is an empty list"
        if any(weighted) and not all(weighted):
            yield f"{document.where(('data', 'train'))}: data.train: give every source a weight, or none"
    columns = data.get("text_columns")
    if isinstance(columns, list) and not 1 <= len(columns) <= 2:
        yield f"{document.where(('data', 'text_columns'))}: data.text_columns takes one column or a pair, not {len(columns)}"
    holdout = data.get("holdout")
    if isinstance(holdout, dict) and isinstance(holdout.get("size"), int | float) and holdout["size"] <= 0:
        yield f"{document.where(('data', 'holdout', 'size'))}: data.holdout.size must be above 0"


def _sources(data: Mapping[str, Any]) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    train, sets = data.get("train"), data.get("evaluation")
    if isinstance(train, dict):
        yield ("data", "train"), train
    for index, source in enumerate(train if isinstance(train, list) else ()):
        if isinstance(source, dict):
            yield ("data", "train", index), source
    for name, source in (sets or {}).items() if isinstance(sets, dict) else ():
        if isinstance(source, dict):
            yield ("data", "evaluation", name), source


# --- building ------------------------------------------------------------------------------------------------------


def _build(known: Mapping[str, Field], kind: type, values: Mapping[str, Any], **more: object) -> Any:  # noqa: ANN401
    """An instance of one of our own dataclasses from checked values; null means the default."""
    given = {name: _built(value, known[name].type) for name, value in values.items() if value is not None}
    return kind(**given, **more)


def _built(value: Any, kind: Type) -> Any:  # noqa: ANN401
    if kind.section and isinstance(value, dict):
        return _build(upstream.fields(kind.section), globals()[kind.section.rpartition(":")[2]], value)
    items = kind.items
    if items and items.section and isinstance(value, list):
        return [_built(item, items) for item in value]
    if items and items.section and isinstance(value, dict):
        return {name: _built(item, items) for name, item in value.items()}
    return value
