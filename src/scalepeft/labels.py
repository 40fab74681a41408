"""The labels: which number each label of the data stands for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scalepeft.recipe import Recipe
from scalepeft.tables import Bad, Opened, Wanted, shown

UNLABELLED = -100
"""The number of a row without label, which the loss ignores."""

LABEL_MISSING = "label is missing"
LABEL_NONE = "label is -1 (unlabelled)"
NOT_A_NUMBER = "label is not a number"
LABEL_OUTSIDE = "label is not among the label names"

_INTEGER = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0+)?")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The label names, in the order of their numbers."""

    names: list[str]
    declared: bool
    """Whether someone chose their order, so that an integer that is no name is a place in it."""
    renamed: bool = False
    """Whether they may be other names than a data set declares."""
    _by_name: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {name: number for number, name in enumerate(self.names)})

    def numbers(self, raw: Sequence[Any], source: Opened, wanted: Wanted) -> list[int | Bad]:
        """Each label of a source as a number, or what is wrong with it."""
        raw = self._named_here(raw, source, wanted)
        known: dict[str, int | Bad] = {}
        numbers: list[int | Bad] = []
        for label in raw:
            key = label if isinstance(label, str) else repr(label)
            if key not in known:
                known[key] = self._number(label)
            numbers.append(known[key])
        outside = [n.detail for n in known.values() if isinstance(n, Bad) and n.reason == LABEL_OUTSIDE]
        if wanted.label_optional:  # a file to predict: whatever stands there, no label is asked for
            return [UNLABELLED if isinstance(n, Bad) else n for n in numbers]
        if outside and not any(isinstance(n, int) for n in known.values()):
            hint = "" if self.declared else "; data.label_names says which label is 0, 1, ..."
            names = _some(map(repr, self.names))
            problem = f"no label of {source.path} is among the label names {names}; it has {_some(outside)}{hint}"
            raise wanted.fail("label_column", problem)
        return numbers

    def _named_here(self, raw: Sequence[Any], source: Opened, wanted: Wanted) -> Sequence[Any]:
        """The labels of a source that declares names, as these names, or as places if the names have been changed."""
        own = source.names
        if not own or wanted.label_optional:
            return raw
        if set(own) <= set(self.names):
            return [own[label] if isinstance(label, int) and 0 <= label < len(own) else label for label in raw]
        if self.renamed and len(own) == len(self.names) and not set(own) & set(self.names):
            return [self.names[label] if isinstance(label, int) and 0 <= label < len(own) else label for label in raw]
        theirs, ours = _some(map(repr, own)), _some(map(repr, self.names))
        raise wanted.fail("path", f"{source.path} declares the labels {theirs}; the label names are {ours}")

    def _number(self, label: object) -> int | Bad:
        if isinstance(label, str) and label in self._by_name:
            return self._by_name[label]
        value = _plain(label)
        if value is None:
            return Bad(reason=LABEL_MISSING)
        if str(value) in self._by_name:
            return self._by_name[str(value)]
        if value == -1:
            return Bad(reason=LABEL_NONE)
        by_place = self.declared and not any(_INTEGER.fullmatch(name) for name in self.names)
        if by_place and isinstance(value, int) and 0 <= value < len(self.names):
            return value
        return Bad(reason=LABEL_OUTSIDE, detail=shown(label))


@dataclass(frozen=True, kw_only=True)
class Scores(Labels):
    """Labels that are numbers to predict: regression."""

    names: list[str] = field(default_factory=lambda: ["score"])
    declared: bool = True

    def numbers(self, raw: Sequence[Any], source: Opened, wanted: Wanted) -> list[float | Bad]:  # type: ignore[override]  # noqa: ARG002  # the signature of Labels
        """Each label of a source as a finite number, or what is wrong with it."""
        found = [self._score(label) for label in raw]
        if wanted.label_optional:
            return [UNLABELLED if isinstance(n, Bad) else n for n in found]
        return found

    @staticmethod
    def _score(label: object) -> float | Bad:
        if label is None or label == "":
            return Bad(reason=LABEL_MISSING)
        try:
            score = float(label)  # type: ignore[arg-type]  # what is no number raises
        except (TypeError, ValueError):
            return Bad(reason=NOT_A_NUMBER, detail=shown(label))
        if not math.isfinite(score) or score == UNLABELLED:
            return Bad(reason=NOT_A_NUMBER, detail=shown(label))
        return score


@dataclass(frozen=True, kw_only=True)
class NoLabels(Labels):
    """Of rows that have none: conversations."""

    names: list[str] = field(default_factory=list)
    declared: bool = True

    def numbers(self, raw: Sequence[Any], source: Opened, wanted: Wanted) -> list[int | Bad]:  # noqa: ARG002  # the signature of Labels
        """A number for each row, which nothing reads."""
        return [UNLABELLED] * len(raw)


def declared(recipe: Recipe, sources: Iterable[Opened], names: Sequence[str] | None) -> Labels | None:
    """The labels by the names that are given or that the training data sets declare; None where the rows must tell."""
    if recipe.generative:
        return NoLabels()
    if recipe.regression:
        return Scores()
    if given := names or recipe.data.label_names:
        return Labels(names=[str(name) for name in given], declared=True, renamed=True)
    own = list(dict.fromkeys(tuple(source.names) for source in sources if source.names))
    if len(own) > 1:
        sets = " and ".join(f"({_some(map(repr, each))})" for each in own)
        raise recipe.error("data.label_names", f"the training sources declare different labels, {sets}; name them here")
    return Labels(names=list(own[0]), declared=True) if own else None


def found(recipe: Recipe, raw: Iterable[Sequence[Any]]) -> Labels:
    """The distinct labels of the training rows, integers before names."""
    rows, values = 0, set[int | str]()
    for labels in raw:
        rows += len(labels)
        values |= {value for value in map(_plain, _distinct(labels)) if value not in (None, -1)}
    if not values:
        raise recipe.error("data.label_column", f"none of the {rows:,} training rows has a label")
    if len(values) > max(100, rows / 2):
        some = _some(map(shown, sorted(values, key=str)), 3)
        raise recipe.error("data.label_column", f"holds {len(values):,} different labels in {rows:,} rows: {some}")
    integers = sorted(value for value in values if isinstance(value, int))
    return Labels(names=[*map(str, integers), *sorted(v for v in values if isinstance(v, str))], declared=False)


def _plain(label: object) -> int | str | None:
    """A label as an integer, also where it stands as 1.0 or "1"; as a text; or None where there is none."""
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if isinstance(label, int):
        return int(label)
    text = "" if label is None or label != label else str(label)  # noqa: PLR0124  # what is not itself is NaN
    if integer := _INTEGER.fullmatch(text):
        return int(integer[1])
    return text if text.strip() else None


def _distinct(labels: Sequence[Any]) -> set[Any]:
    try:
        return set(labels)
    except TypeError:  # of lists and objects, which are no labels
        return {str(label) if isinstance(label, list | dict) else label for label in labels}


def _some(texts: Iterable[str], count: int = 10) -> str:
    first = list(texts)
    return ", ".join(first[:count]) + (", ..." if len(first) > count else "")
