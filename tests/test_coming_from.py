"""The page for users of other tools: each of our keys in it exists, each recipe is valid, and TRL's keys are TRL's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalepeft import check, recipe, upstream
from scalepeft.upstream import Type

TEXT = (Path(__file__).parents[1] / "docs/coming-from.md").read_text(encoding="utf-8")
REASONS = ("not here", "not needed: ", "elsewhere: ")
"""How the note of a key without a counterpart begins."""

BY_THEMSELVES = ("datasets[].type", "template")
"""Keys of examples that need no word here: rows are recognised by their columns, the template is the tokenizer's."""

SECTIONS = ("model", "quantization", "data.train")
"""Named in the tables as wholes."""

TRL_CLASSES = (
    *(upstream.TASK_ARGUMENTS[task] for task in upstream.LANGUAGE_TASKS),
    "trl.trainer.model_config:ModelConfig",
    "trl.scripts.utils:ScriptArguments",
    "trl.scripts.utils:DatasetMixtureConfig",
)
TRL_SOURCE = "trl.scripts.utils:DatasetConfig"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table."""

    heading: str
    theirs: tuple[str, ...]
    ours: str
    note: str

    @property
    def task(self) -> str:
        """The task whose recipes have our keys."""
        return "preference" if "DPO" in self.heading else "causal-lm"

    def alternatives(self) -> list[dict[str, Any]]:
        """What the line says to write, each with the values it gives, or with `...` where it gives none."""
        found = []
        for text in self.ours.split(" or "):
            keys = ["training." + key for key in self.theirs] if text == "`training.*`" else re.findall(r"`([^`]+)`", text)
            pairs = [key.partition(": ") for key in keys]
            found.append({key: yaml.safe_load(value) if colon else ... for key, colon, value in pairs})
        return found


def rows() -> Iterator[Row]:
    heading = ""
    for line in TEXT.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| `"):
            theirs, ours, note = (cell.strip() for cell in line.strip("|").split("|"))
            yield Row(heading=heading, theirs=tuple(re.findall(r"`([^`]+)`", theirs)), ours=ours, note=note)


def blocks(*, whole: bool) -> list[str]:
    """The YAML blocks that are recipes of ours (`whole`), or configs of the other tools."""
    found = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [block for block in found if ("\ntask: " in block) is whole]


def plausible(kind: Type) -> Any:
    """A value that a field takes."""
    simple = {"bool": True, "int": 64, "float": 0.5, "str": "x", "list": [], "dict": {}, "any": "x"}
    return kind.values[0] if kind.values else next(value for name, value in simple.items() if name in kind.kinds)


def kind(path: str, task: str) -> Type:
    """The type of one of our keys. Raises KeyError for a key that is none."""
    homes = check._homes(check.forwarded_sections({"task": task}))
    homes["adapter"] = homes["adapter"] | upstream.fields(check.EXISTING_ADAPTER)
    homes["data.evaluation.NAME"] = homes["data.train"]
    section, _, name = path.rpartition(".")
    return homes[section or "the top level"][name].type


def recipe_with(given: dict[str, Any], task: str) -> dict[str, Any]:
    """A small valid recipe in which these keys are set, each to its value or to a plausible one."""
    values: dict[str, Any] = {
        "task": task,
        "model": {"name_or_path": "some/model"},
        "data": {"train": {"path": "rows.jsonl"}, "evaluation": {"NAME": {"path": "more.jsonl"}}},
        "training": {"eval_strategy": "steps", "save_strategy": "steps"},
    }
    if any(key.startswith("adapter.") for key in given) and "adapter.name_or_path" not in given:
        values["adapter"] = {"peft_type": "LORA"}
    for path, value in given.items():
        found = kind(path, task)
        if path in SECTIONS:
            continue
        *sections, key = path.split(".")
        inner = values
        for name in sections:
            inner = inner.setdefault(name, {})
        inner[key] = plausible(found) if value is ... else value
    return values


ROWS = list(rows())
OF_TRL = [row for row in ROWS if row.heading.startswith("TRL: ")]


def test_the_tables_are_read():
    assert len(ROWS) > 200
    assert {row.heading.partition(": ")[0] for row in ROWS} == {"axolotl", "LLaMA-Factory", "TRL", "alignment-handbook"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.heading}-{row.theirs[0]}")
def test_our_keys_exist_and_are_taken(row, tmp_path):
    if row.ours == "—":
        assert row.note.startswith(REASONS)
        return
    for given in row.alternatives():
        assert given
        (tmp_path / "recipe.yaml").write_text(recipe.dump(recipe_with(given, row.task)), encoding="utf-8")
        recipe.load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("heading", dict.fromkeys(row.heading for row in ROWS))
def test_no_key_of_theirs_stands_twice_in_a_table(heading):
    keys = [key for row in ROWS if row.heading == heading for key in row.theirs]
    assert sorted(set(keys)) == sorted(keys)


@pytest.mark.parametrize("number", range(4))
def test_recipes_are_valid(number, tmp_path):
    (tmp_path / "recipe.yaml").write_text(blocks(whole=True)[number], encoding="utf-8")
    recipe.load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("number", range(4))
def test_a_recipe_says_what_the_config_beside_it_says(number):
    chapter = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:][number]
    (config,), (ours,) = ([b for b in blocks(whole=whole) if b in chapter] for whole in (False, True))
    known = [row for row in ROWS if f"### {row.heading}\n" in chapter]
    keys = leaves(yaml.safe_load(ours))
    said = {re.sub(r"^data\.evaluation\.\w+", "data.evaluation.NAME", key.replace("[]", "")) for key in keys}
    for key, value in leaves(yaml.safe_load(config)).items():
        about = [row for row in known if key in row.theirs or f"{key}: {value}" in row.theirs]
        assert about, key
        ways = [way for row in about for way in replace(row, theirs=(key,)).alternatives()]
        assert key in BY_THEMSELVES or any(all(in_it(path, said) for path in way) for way in ways), key


def in_it(path: str, said: set[str]) -> bool:
    """Whether a recipe with these dotted keys has this one, or something in it."""
    return any(key == path or key.startswith(f"{path}.") for key in said)


def leaves(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """The dotted keys of a config with their values: `a.b` in a mapping, `a[].b` in a list of mappings."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = value[0] if isinstance(value, list) and isinstance(value[0], dict) else value
        if isinstance(inner, dict):
            found |= leaves(inner, f"{before}{key}{'[]' if inner is not value else ''}.")
        else:
            found[f"{before}{key}"] = value
    return found


@pytest.mark.parametrize("row", OF_TRL, ids=lambda row: f"{row.heading}-{row.theirs[0]}")
def test_keys_of_trl_are_fields_of_its_classes(row):
    references = TRL_CLASSES[1:] if row.task == "preference" else (TRL_CLASSES[0], *TRL_CLASSES[2:])
    known = {name for reference in references for name in upstream.fields(reference)}
    known |= {f"datasets[].{name}" for name in upstream.fields(TRL_SOURCE)}
    assert set(row.theirs) <= known


def test_every_field_of_trl_that_goes_elsewhere_is_named():
    own = [name for reference in TRL_CLASSES[2:] for name in upstream.fields(reference)]
    own += [f"datasets[].{name}" for name in upstream.fields(TRL_SOURCE)]
    refused = [name for reference in TRL_CLASSES[:2] for name in upstream.fields(reference) if name in check.REFUSED]
    assert {*own, *refused} <= {key for row in OF_TRL for key in row.theirs}


def test_links_lead_somewhere():
    headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)}
    for target in re.findall(r"\]\((?!https:)([^)\s]+)\)", TEXT):
        path, _, anchor = target.partition("#")
        assert anchor in headings if anchor else (Path(__file__).parents[1] / "docs" / path).exists(), target
