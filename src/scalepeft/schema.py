"""The JSON Schema of recipes and run directories, for editors and other programs.

Draft 7, the newest that the YAML language server of editors knows. It is built from the same fields as `scalepeft check`:
what that accepts is valid here, and keys unknown there are unknown here. What no single key shows is checked only there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scalepeft import check, upstream
from scalepeft.errors import program
from scalepeft.upstream import Field, Type

Schema = dict[str, Any]

_DRAFT = "http://json-schema.org/draft-07/schema#"
_TYPES = {
    "int": "integer",
    "float": "number",
    "str": "string",
    "bool": "boolean",
    "null": "null",
    "list": "array",
    "dict": "object",
}


def main(arguments: Sequence[str]) -> int:
    """`scalepeft schema`: print the JSON Schema of recipes."""
    parser = argparse.ArgumentParser(prog="scalepeft schema", description="Print the JSON Schema of recipes, for editors.")
    parser.add_argument("--run", action="store_true", help="describe the files of a run directory instead")
    print(text(run() if parser.parse_args(arguments).run else recipe()))
    return 0


def text(schema: Schema) -> str:
    """A schema with one item a line and no indentation: small, and its changes can be read."""
    return json.dumps(schema, ensure_ascii=False, indent=0, separators=(",", ":"))


def recipe() -> Schema:
    """The schema of a recipe."""
    definitions: Schema = {}
    top = _section(check.recipe_fields(), definitions)
    arguments = {task: _reference(reference, definitions) for task, reference in upstream.TASK_ARGUMENTS.items()}
    sections = {
        "training": {},
        "quantization": _reference(upstream.QUANTIZATION, definitions),
        "adapter": _adapter(definitions),
        "early_stopping": _reference(upstream.EARLY_STOPPING, definitions),
    }
    for name, section in sections.items():
        description = top["properties"][name]["description"]
        top["properties"][name] = {"description": description, "type": ["object", "null"], "allOf": [section]}
    for forwarded in set(definitions) - {"Model", "Source", "Holdout", "Augmentation", "Data"}:
        del definitions[forwarded]["type"]  # its section says it: a mapping, or null to remove it
    for entry in [definitions[ref["$ref"].rpartition("/")[2]] for ref in arguments.values()]:
        entry["properties"] = {name: field for name, field in entry["properties"].items() if name not in check.REFUSED}
    definitions["Data"]["properties"]["evaluation"]["propertyNames"] = {"pattern": check.EVALUATION_NAME}
    for section in (top, *definitions.values()):
        del section["required"]  # an extending recipe may leave any key to the one it extends; only the checker sees both
    return {
        "$schema": _DRAFT,
        "title": "a scalepeft recipe",
        **top,
        "allOf": _chosen("task", {task: {"properties": {"training": options}} for task, options in arguments.items()}),
        "definitions": definitions,
    }


def run() -> Schema:
    """The schema of a run directory's files: its properties are file names, a file of lines is an array."""
    definitions: Schema = {}
    record = _reference("scalepeft.records:RunRecord", definitions)
    line = _reference("scalepeft.records:MetricsLine", definitions)
    definitions["MetricsLine"]["additionalProperties"] = {"type": ["number", "string", "null"]}  # eval_* of each set
    files = {
        "run.json": {**record, "description": "What was run and what came of it."},
        "metrics.jsonl": {"type": "array", "items": line, "description": "One JSON object a line, in the order of steps."},
    }
    return {
        "$schema": _DRAFT,
        "title": "a scalepeft run directory",
        "type": "object",
        "properties": files,
        "definitions": definitions,
    }


def _adapter(definitions: Schema) -> Schema:
    types = {name: _reference(reference, definitions) for name, reference in upstream.peft_types().items()}
    for reference in upstream.peft_types().values():
        definitions[_name(reference)]["properties"]["peft_type"] = {}  # said once, below
    existing = _reference(check.EXISTING_ADAPTER, definitions)
    return {
        "properties": {"peft_type": {"enum": [*types], "description": "The type of adapter."}},
        "allOf": [*_chosen("peft_type", types), {"if": {"required": ["name_or_path"]}, "then": existing}],
    }


def _chosen(key: str, entailed: Mapping[str, Schema]) -> list[Schema]:
    """What each value of a key entails."""
    return [
        {"if": {"properties": {key: {"const": value}}, "required": [key]}, "then": schema} for value, schema in entailed.items()
    ]


def _reference(reference: str, definitions: Schema) -> Schema:
    """A reference to the schema of a class, which is put among the definitions."""
    name = _name(reference)
    if name not in definitions:
        definitions[name] = {}  # a class may hold itself
        definitions[name] = _section(upstream.fields(reference), definitions)
    return {"$ref": f"#/definitions/{name}"}


def _name(reference: str) -> str:
    return reference.rpartition(":")[2]


def _section(fields: Mapping[str, Field], definitions: Schema) -> Schema:
    properties = {name: _field(field, definitions) for name, field in fields.items()}
    required = [name for name, field in fields.items() if field.required]
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def _field(field: Field, definitions: Schema) -> Schema:
    described: Schema = {"description": field.help} if field.help else {}
    if not field.required and field.default is not None:
        described["default"] = field.default
    kind = _type(field.type, definitions)
    if described and "$ref" in kind:  # in draft 7, what stands beside $ref is ignored
        kind = {"allOf": [kind]}
    return {**described, **kind}


def _type(kind: Type, definitions: Schema) -> Schema:
    if "any" in kind.kinds:
        return {}
    options: list[Schema] = []
    kinds = set(kind.kinds)
    if kind.section and "dict" in kinds:
        kinds.discard("dict")
        options.append(_reference(kind.section, definitions))
    if kind.values:
        kinds -= {"str", "null"}
        options.append({"enum": [*kind.values, *([None] if "null" in kind.kinds else [])]})
    if kinds:
        names = sorted(_TYPES[k] for k in kinds)
        plain: Schema = {"type": names[0] if len(names) == 1 else names}
        items = _type(kind.items, definitions) if kind.items else {}
        if items and "list" in kinds:
            plain["items"] = items
        if items and "dict" in kinds:
            plain["additionalProperties"] = items
        options.append(plain)
    return options[0] if len(options) == 1 else {"anyOf": options}


if __name__ == "__main__":
    sys.exit(program(main))
