"""Every single-character typo in every key of the shipped recipes is refused at its line, nearly always with the right key."""

from __future__ import annotations

import copy
import functools
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from scalepeft import check, document, errors, recipe, upstream
from scalepeft.document import Document, Key
from scalepeft.errors import UserError
from scalepeft.upstream import Field

RECIPES = list(recipe.shipped_recipes().values())


@pytest.fixture(scope="module", autouse=True)
def _distances_are_pure():
    """Recipes share most keys: measure each pair of words once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors, "_distance", functools.cache(errors._distance))
        yield


def mutations(word: str) -> set[str]:
    """The word with one character dropped, doubled or replaced, or with two neighbours swapped."""
    spots = range(len(word))
    dropped = {word[:i] + word[i + 1 :] for i in spots}
    doubled = {word[: i + 1] + word[i:] for i in spots}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in spots[:-1]}
    replaced = {word[:i] + c + word[i + 1 :] for i in spots for c in string.ascii_lowercase + "_"}
    return (dropped | doubled | swapped | replaced) - {word}


def keys(source: Document) -> Iterator[tuple[Key, Mapping[str, Field]]]:
    """Each key of a recipe that is one of the language's, with all keys that are valid beside it."""
    sections: dict[Key, Mapping[str, Field]] = {(): check.recipe_fields()}
    for name, reference in check.forwarded_sections(source.values).items():
        if isinstance(source.values.get(name), dict):
            sections[name,] = upstream.fields(reference)
    while sections:
        key, known = sections.popitem()
        for name, value in section_at(source.values, key).items():
            yield (*key, name), known
            kind = known[name].type
            if isinstance(value, dict) and kind.section:
                sections[(*key, name)] = upstream.fields(kind.section)
            elif kind.items and kind.items.section:  # a list of sections, or sections by free names
                names = value if isinstance(value, dict) else map(str, range(len(value)))
                sections |= {(*key, name, free): upstream.fields(kind.items.section) for free in names}


def section_at(values: Any, key: Key) -> Any:
    for part in key:
        values = values[int(part) if isinstance(values, list) else part]
    return values


def renamed(source: Document, key: Key, wrong: str) -> Document:
    """The document as if the last part of a key had been written `wrong`."""
    values = copy.deepcopy(source.values)
    holder = section_at(values, key[:-1])
    items = [(wrong if name == key[-1] else name, value) for name, value in holder.items()]
    holder.clear()
    holder.update(items)
    depth = len(key)
    lines = {(*key[:-1], wrong, *k[depth:]) if k[:depth] == key else k: where for k, where in source.lines.items()}
    return Document(path=source.path, text=source.text, values=values, lines=lines)


QUICK = ("quickstart", "quickstart_sft", "mnli_qlora", "dpo_lora")
"""One of each kind; each recipe takes seconds."""


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=() if p.stem in QUICK else pytest.mark.long) for p in RECIPES]
)
def test_every_typo_is_refused_at_its_line_and_the_key_is_suggested(path):
    source = document.read(path)
    missed, total = [], 0
    for key, known in keys(source):
        where = source.where(key)
        for wrong in sorted(mutations(key[-1]) - set(known)):
            told = [line for line in check.problems(renamed(source, key, wrong)) if line.startswith(f"{where}: ")]
            assert any(f"has no {wrong!r}" in line for line in told), f"{where}: {'.'.join(key)} as {wrong!r}: {told}"
            total += 1
            if not any(f"has no {wrong!r}" in line and repr(key[-1]) in line.partition("did you mean")[2] for line in told):
                missed.append((key[-1], wrong))
    print(f"{path.stem}: {total} typos, {len(missed)} without the right suggestion: {missed[:20]}")
    assert total > 1000
    assert len(missed) <= 0.05 * total, missed


def test_the_line_of_a_typo_is_its_line_in_the_file(tmp_path):
    path = RECIPES[0]
    source = document.read(path)
    lines = source.text.splitlines()
    for key, _ in keys(source):
        number = int(source.where(key).rpartition(":")[2])
        mistyped = lines.copy()
        mistyped[number - 1] = re.sub(rf"\b{key[-1]}(?=:)", f"{key[-1]}_", mistyped[number - 1], count=1)
        file = tmp_path / "mistyped.yaml"
        file.write_text("\n".join(mistyped), encoding="utf-8")
        with pytest.raises(UserError) as refused:
            recipe.load(file)
        assert any(p.startswith(f"{file}:{number}: ") and f"{key[-1] + '_'!r}" in p for p in refused.value.problems), key
