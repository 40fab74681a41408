"""A YAML file whose values know where they stand."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from scalepeft.errors import UserError, did_you_mean, one_line

Key = tuple[str, ...]
"""The path of a value: keys of mappings and indices of lists, all as written in a dotted key."""

MOST_VALUES = 20_000
"""Aliases of aliases can make a short file expand without end; no recipe comes near this."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A parsed YAML mapping that knows where each of its values stands."""

    path: Path
    """The file, as it was named."""
    text: str
    """The file as it was read, without overrides."""
    values: dict[str, Any]
    """Plain values, overrides applied."""
    lines: Mapping[Key, str]
    """`file:line` of each key, or the override it comes from."""

    def where(self, key: Sequence[str | int]) -> str:
        """`file:line` of a key or of the nearest section around it, or the override it comes from."""
        path = tuple(map(str, key))
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, str(self.path))


def read(path: Path, *, extended_by: tuple[Path, ...] = ()) -> Document:
    """A file as a Document, with what it `extends` merged in. Raises UserError with all problems found."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    values, lines = _plain(text, str(path))
    if not lines:
        raise UserError(f"{path}: is empty; a recipe has at least task, model and data")
    if not isinstance(values, dict):
        kind = "list" if isinstance(values, list) else "single value"
        raise UserError(f"{lines[()]}: a recipe is a mapping of sections, this is a {kind}")
    document = Document(path=path, text=text, values=values, lines=lines)
    if "extends" not in values:
        return document
    where, name = document.where(("extends",)), values["extends"]
    if not isinstance(name, str):
        raise UserError(f"{where}: extends names one recipe, as a path from this one")
    base, family = path.parent / name, (*extended_by, path)
    if not base.is_file():
        raise UserError(
            f"{where}: extends: {base} does not exist{did_you_mean(str(base), map(str, base.parent.glob('*.yaml')))}"
        )
    if any(base.samefile(member) for member in family):
        raise UserError(f"{where}: extends: {base} extends this recipe in turn")
    return _merged(read(base, extended_by=family), document)


def _merged(base: Document, document: Document) -> Document:
    """A document over the one it extends: mappings are merged, everything else is replaced, and null removes a key."""
    lines = dict(base.lines)

    def over(below: dict[str, Any], above: dict[str, Any], key: Key) -> dict[str, Any]:
        result = dict(below)
        for name, value in above.items():
            inner, both = (*key, name), isinstance(value, dict) and isinstance(below.get(name), dict)
            if not both:
                for replaced in [k for k in lines if k[: len(inner)] == inner]:
                    del lines[replaced]
            result[name] = over(below[name], value, inner) if both else value
            if value is None and name in below:
                del result[name]
        return result

    values = over(base.values, {k: v for k, v in document.values.items() if k != "extends"}, ())
    own = {k: v for k, v in document.lines.items() if k[:1] != ("extends",)}
    return Document(path=document.path, text=document.text, values=values, lines=lines | own)


def override(document: Document, overrides: Sequence[str]) -> Document:
    """A Document with `section.key=value` applied; the value is YAML, and an empty one is null."""
    values, lines = copy.deepcopy(document.values), dict(document.lines)
    for text in overrides:
        where = f"command line ({text})"
        dotted, equals, given = text.partition("=")
        key = tuple(part.strip() for part in dotted.split("."))
        if not equals or not all(key):
            raise UserError(f"command line: {text!r} is not an override; its form is section.key=value")
        value, inner = _plain(given, where, numbered=False)
        *parents, last = key
        holder: Any = values
        for depth, part in enumerate(parents, 1):
            place = _place(holder, part, key[:depth], where)
            if isinstance(holder, dict) and holder.get(part) is None:
                holder[part] = {}
                lines[key[:depth]] = where
            holder = holder[place]
        holder[_place(holder, last, key, where)] = value
        lines = {k: v for k, v in lines.items() if k[: len(key)] != key}
        lines |= {(*key, *k): where for k in inner} | {key: where}
    return Document(path=document.path, text=document.text, values=values, lines=lines)


def dump(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that `read` reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def annotated(document: Document) -> str:
    """The values as YAML, each with the place it comes from as a comment."""

    def lines(values: Mapping[str, Any], key: Key) -> Iterator[tuple[str, str]]:
        for name, value in values.items():
            inner, indent = (*key, name), "  " * len(key)
            if isinstance(value, dict) and value:
                yield f"{indent}{_flow(name)}:", ""
                yield from lines(value, inner)
            else:
                yield f"{indent}{_flow(name)}: {_flow(value)}", document.where(inner)

    written = list(lines(document.values, ()))
    width = min(60, max((len(text) for text, where in written if where), default=0))
    return "".join(f"{text:<{width}}  # {where}\n" if where else f"{text}\n" for text, where in written)


def _flow(value: object) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def flatten(values: object, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with dotted keys."""
    if not isinstance(values, dict | list) or not values:
        return {prefix: values}
    pairs: Any = values.items() if isinstance(values, dict) else enumerate(values)
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _place(holder: Any, part: str, key: Key, where: str) -> Any:
    """What indexes `part` in a mapping or a list."""
    around = ".".join(key[:-1])
    if isinstance(holder, dict):
        return part
    if not isinstance(holder, list):
        raise UserError(f"{where}: {around} is {holder!r}, which holds no keys")
    if not part.isdecimal() or int(part) >= len(holder):
        raise UserError(f"{where}: {around} is a list of {len(holder)}; its items are counted from 0")
    return int(part)


# --- YAML 1.2 ------------------------------------------------------------------------------------------------------

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}
"""The core schema of YAML 1.2: what a plain scalar must look like, and the characters it may begin with."""


class _Loader(yaml.SafeLoader):
    """Version 1.2 of YAML (2e-4 is a number, `no` is a string), without explicit tags."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML keeps them on the class

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if tag := getattr(event, "tag", None):
            raise ComposerError(None, None, f"the tag {tag!r} has no meaning in a recipe", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would not read back as a string."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML keeps them on the class

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002  # PyYAML's signature
        return True


for _name, (_pattern, _first) in _SCALARS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


def _plain(text: str, place: str, *, numbered: bool = True) -> tuple[Any, dict[Key, str]]:
    """The values of a YAML text and where each stands; no places when the text is empty."""
    reading = _Reading(place=place, numbered=numbered, lines={}, problems=[])
    try:
        node = yaml.compose(text, _Loader)
        if node is None:
            return None, {}
        values = reading.value(node, (), ())
    except yaml.MarkedYAMLError as error:
        reason = one_line(Exception(error.problem or error.context or error))
        if r"'\t'" in reason:
            reason = "a tab where YAML wants spaces; indent with spaces"
        kind = "" if isinstance(error, ComposerError) else "not YAML: "
        raise UserError(f"{reading.at(error.problem_mark or error.context_mark)}: {kind}{reason}") from None
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise UserError(f"{place}: not YAML: {one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{place}: is nested too deeply") from None
    if reading.problems:
        raise UserError(*reading.problems)
    return values, reading.lines


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """The way from YAML nodes to plain values, and what was met on it."""

    place: str
    numbered: bool
    """Whether a line number means something: not on the command line."""
    lines: dict[Key, str]
    problems: list[str]

    def at(self, mark: yaml.Mark | None) -> str:
        return f"{self.place}:{mark.line + 1}" if mark and self.numbered else self.place

    def value(self, node: yaml.Node, key: Key, around: tuple[yaml.Node, ...]) -> Any:
        where = self.at(node.start_mark)
        if any(node is outer for outer in around):
            self.problems.append(f"{self.lines.get(key, where)}: {'.'.join(key)} is an alias of what it stands in")
            return None
        self.lines.setdefault(key, where)
        if len(self.lines) > MOST_VALUES:
            raise UserError(f"{where}: more than {MOST_VALUES} values; are aliases nested in aliases?")
        if isinstance(node, yaml.MappingNode):
            return dict(self.items(node, key, (*around, node)))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, str(i)), (*around, node)) for i, item in enumerate(node.value)]
        try:
            return _scalar(node)
        except ValueError as error:  # Python refuses to read integers of thousands of digits
            self.problems.append(f"{where}: {one_line(error)}")
            return None

    def items(self, node: yaml.MappingNode, key: Key, around: tuple[yaml.Node, ...]) -> Iterator[tuple[str, Any]]:
        seen: dict[str, str] = {}
        for name, value in node.value:
            where = self.at(name.start_mark)
            if not isinstance(name, yaml.ScalarNode):
                self.problems.append(f"{where}: a key must be a plain word")
            elif name.value == "<<" and name.style is None:
                self.problems.append(f"{where}: merge keys (<<) are not part of YAML 1.2; write the keys out")
            elif name.value in seen:
                self.problems.append(f"{where}: duplicate key {name.value!r}; it stands already at {seen[name.value]}")
            else:
                at = (*key, name.value)
                seen[name.value] = self.lines[at] = where
                yield name.value, self.value(value, at, around)


def _scalar(node: yaml.Node) -> Any:
    text, kind = node.value, node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":  # base 0 reads 0x and 0o, but not 010
        return int(text, base=0 if text[1:2] in ("x", "o") else 10)
    if kind == "float":  # Python writes .inf and .nan without the dot
        return float(text.replace(".", "") if text[-1].isalpha() else text)
    return text


def mapping(value: object) -> Mapping[str, Any]:
    """A value if it is a mapping; what else stands there is reported by its type."""
    return value if isinstance(value, dict) else {}
