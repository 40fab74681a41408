"""The combinations of a sweep: which overrides are lists of values to try, and what each combination is called."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft import check, document, upstream
from scalepeft.compare import shortest, shown
from scalepeft.document import Document
from scalepeft.errors import UserError
from scalepeft.upstream import Type

_SHORT = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "modules",
    "name_or_path": "base",
    "lr_scheduler_type": "schedule",
}
"""Shorter words for directory names."""
_LONGEST_NAME = 100


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Overrides of which some are lists of values to try."""

    swept: Mapping[str, Sequence[Any]]
    """The values of each swept key, in the order given."""
    overrides: Sequence[str]
    """All overrides in the order given, of a swept one the key alone."""

    @property
    def common(self) -> list[str]:
        """The overrides of every combination."""
        return [text for text in self.overrides if text not in self.swept]

    def points(self) -> dict[str, tuple[str, ...]]:
        """The overrides of each combination by its name; the last key changes fastest."""
        combinations = list(itertools.product(*self.swept.values()))
        found = {}
        for name, values in zip(_names(list(self.swept), combinations), combinations, strict=True):
            tried = {key: f"{key}={written(value)}" for key, value in zip(self.swept, values, strict=True)}
            found[name] = tuple(tried.get(text, text) for text in self.overrides)
        return found


def read(base: Document, overrides: Sequence[str]) -> Grid:
    """The grid that overrides of a recipe say. Raises UserError with all problems.

    A list is one value of a key that takes lists, and several values of any other. Of a key of which upstream does not say
    what it takes, it is one value.
    """
    swept: dict[str, list[Any]] = {}
    template: list[str] = []
    problems: list[str] = []
    seen: set[str] = set()
    for text in overrides:
        key, value = _parsed(text)
        dotted, kind = ".".join(key), _type(key, base.values)
        several = isinstance(value, list) and kind is not None and _depth(value) > _list_depth(kind)
        if dotted in seen:
            problems.append(f"command line: {dotted} is given twice")
        elif dotted == "training.output_dir":
            problems.append("command line: training.output_dir is the sweep's to choose; give --output-dir")
        elif several and len(set(map(written, value))) < max(len(value), 1):
            problems.append(f"command line: {text!r} {'names a value twice' if value else 'names no value'}")
        elif several:
            swept[dotted] = value
        seen.add(dotted)
        template.append(dotted if several else text)
        # an adapter's type decides which keys it has: what follows is read with it
        base = document.override(base, [f"{dotted}={written(value[0])}" if several and value else text])
    if not swept and not problems:
        lists = [f"; in {text!r} the list is one value, see --help" for text in overrides if "[" in text][:1]
        problems.append(f"command line: nothing is swept; give key=[a,b,c]{''.join(lists)}")
    if problems:
        raise UserError(*problems)
    return Grid(swept=swept, overrides=template)


def _parsed(text: str) -> tuple[list[str], Any]:
    """The key and the value of an override."""
    holder = document.override(Document(path=Path(), text="", values={}, lines={}), [text]).values
    key = [part.strip() for part in text.partition("=")[0].split(".")]
    for part in key[:-1]:
        holder = holder[part]
    return key, holder[key[-1]]


def _type(key: Sequence[str], values: Mapping[str, Any]) -> Type | None:
    """What a dotted key takes; None where there is no such key, which is the checker's to say."""
    top, *rest = key
    field, forwarded = check.recipe_fields().get(top), check.forwarded_sections(values)
    kind = field.type if field else None
    if rest and top in forwarded:
        reference = forwarded[top]
        kind = Type(kinds=frozenset({"dict"}), section=reference) if reference else None
    for part in rest:
        if kind is None:
            return None
        if kind.section and not part.isdecimal():
            inner = upstream.fields(kind.section).get(part)
            kind = inner.type if inner else None
        else:
            kind = kind.items or (upstream.ANY if kind.kinds & {"any", "dict", "list"} else None)
    return kind


def _depth(value: Any) -> int:
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


def _list_depth(kind: Type) -> int:
    """How many brackets one value of a type may have; one where that is not known."""
    if "any" in kind.kinds:
        return 1
    return 1 + (_list_depth(kind.items) if kind.items else 0) if "list" in kind.kinds else 0


def written(value: Any) -> str:
    """A value as YAML on one line: plain where that reads back as the same, else in JSON's manner."""
    plain = shown(value)
    try:
        same = repr(_parsed(f"value={plain}")[1]) == repr(value)
    except UserError:
        same = False
    return plain if same else json.dumps(value, ensure_ascii=False)


def _names(keys: Sequence[str], combinations: Sequence[Sequence[Any]]) -> list[str]:
    """A directory name for each combination: short, readable and its own."""
    words = shortest(keys, ".")
    short = [_SHORT.get(word, word) for word in words]
    words = short if len(set(short)) == len(short) else words
    names: list[str] = []
    for values in combinations:
        name = ",".join(f"{word}={_word(value)}" for word, value in zip(words, values, strict=True))[:_LONGEST_NAME]
        others = sum(re.fullmatch(re.escape(name) + r"(-\d+)?", taken) is not None for taken in names)
        names.append(f"{name}-{others + 1}" if name in names else name)
    return names


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_word, value))
    word = re.sub(r"[^A-Za-z0-9._+-]+", "-", written(value)).rstrip("-")
    return word if isinstance(value, int | float) else word.lstrip("-")
