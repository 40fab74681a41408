"""Which upstream class each recipe choice selects, and which fields it has, read from its source without importing it.

Importing transformers.TrainingArguments costs seconds; parsing the file that defines it costs milliseconds and gives the
same names, types, defaults and help texts (a test compares them with `dataclasses.fields`).
"""

from __future__ import annotations

import ast
import importlib.machinery
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scalepeft.errors import UserError

TASK_ARGUMENTS = {
    "sequence-classification": "transformers.training_args:TrainingArguments",
    "causal-lm": "trl.trainer.sft_config:SFTConfig",
    "preference": "trl.trainer.dpo_config:DPOConfig",
}
"""The class that a task's `training` section is forwarded to."""

LANGUAGE_TASKS = ("causal-lm", "preference")
"""The tasks whose rows are conversations and whose model writes text."""

QUANTIZATION = "transformers.utils.quantization_config:BitsAndBytesConfig"
EARLY_STOPPING = "transformers.trainer_callback:EarlyStoppingCallback"

REMOVED = {
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "logging_dir": "report_to (tensorboard writes into the run directory)",
    "overwrite_output_dir": "the option --fresh of `scalepeft train`",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps (a value below 1 is a share of all steps)",
    "save_safetensors": "nothing: safetensors is the only format written",
    "torch_dtype": "dtype",
    "load_in_4bit_use_double_quant": "bnb_4bit_use_double_quant",
}
"""Keys that older recipes of this field hold and the stack has no longer, and what took their place."""


@dataclass(frozen=True, kw_only=True)
class Type:
    """What a field takes. `kinds` are among int, float, str, bool, null, list, dict and any."""

    kinds: frozenset[str]
    values: tuple[str, ...] = ()
    """The only strings allowed; empty when any is."""
    items: Type | None = None
    """The type of a list's items or a mapping's values."""
    section: str | None = None
    """The class of a mapping that is itself a section with fields of its own."""
    enumeration: bool = False
    """Whether `values` are those of an Enum class, to which upstream converts any string it is given."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One settable field of a configuration class."""

    name: str
    type: Type
    required: bool
    help: str
    default: object = None
    """The default where it is a literal; None otherwise."""


ANY = Type(kinds=frozenset({"any"}))
_KINDS = {
    "int": "int",
    "float": "float",
    "str": "str",
    "bool": "bool",
    "None": "null",
    "NoneType": "null",
    "list": "list",
    "List": "list",
    "Sequence": "list",
    "tuple": "list",
    "Tuple": "list",
    "set": "list",
    "dict": "dict",
    "Dict": "dict",
    "Mapping": "dict",
}


def fields(reference: str) -> Mapping[str, Field]:
    """The settable fields of the class `module:Class`, in the order of their definition, bases first.

    A dataclass gives its fields, any other class the parameters of its `__init__`.
    """
    module, _, name = reference.partition(":")
    return _fields(module, name)


@cache
def peft_types() -> Mapping[str, str]:
    """peft's type names (`LORA`, `IA3`, ...) and the configuration class of each, as `module:Class`."""
    found: dict[str, str] = {}
    for init in sorted((_package("peft") / "tuners").glob("*/__init__.py")):
        tree = ast.parse(init.read_text(encoding="utf-8"))
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "register_peft_method":
                given = {k.arg: k.value for k in call.keywords}
                name, config = given.get("name"), given.get("config_cls")
                if isinstance(name, ast.Constant) and isinstance(config, ast.Name):
                    found[str(name.value).upper()] = f"peft.tuners.{init.parent.name}:{config.id}"
    return found


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.machinery.PathFinder.find_spec(package) is not None


@cache
def _package(name: str) -> Path:
    spec = importlib.machinery.PathFinder.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {name} is not installed in {sys.prefix}; install it with: pip install {name}")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _tree(module: str) -> ast.Module:
    top, *rest = module.split(".")
    path = _package(top).joinpath(*rest)
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(source.read_text(encoding="utf-8"))


@cache
def _names(module: str) -> Mapping[str, tuple[str, ast.ClassDef | str | None]]:
    """What each top-level name of a module is: a class defined there, or a name imported from another module."""
    top, *rest = module.split(".")
    is_package = _package(top).joinpath(*rest).is_dir()
    found: dict[str, tuple[str, ast.ClassDef | str | None]] = {}
    for node in _statements(_tree(module).body):
        if isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            base = parents[: len(parents) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                found.setdefault(alias.asname or alias.name, (source, alias.name))
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = (module, node)
    return found


def _statements(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Those that run when a module is imported, within `if` and `try`, too; of functions and classes the heads alone.

    One node in a hundred of upstream's modules: to walk all took an eighth of the time of `scalepeft check`.
    """
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for part in ("body", "orelse", "handlers", "finalbody"):
                yield from _statements(getattr(node, part, ()))


def _find(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """The module and definition of a class, following imports; None for what is not a class of an installed package."""
    for _ in range(8):  # re-exports nest a few levels; a cycle of imports must not hang
        try:
            source, found = _names(module).get(name, (module, None))
        except (OSError, UserError):  # a module of the standard library, a compiled one or an optional package
            return None
        if isinstance(found, ast.ClassDef):
            return source, found
        if found is None or source in ("typing", "collections.abc", "enum", "dataclasses"):
            return None
        module, name = source, found
    return None


@cache
def _fields(module: str, name: str) -> Mapping[str, Field]:
    found = _find(module, name)
    if found is None:
        return {}
    module, node = found
    if not _is_dataclass(node) or any(isinstance(b, ast.FunctionDef) and b.name == "__init__" for b in node.body):
        return {f.name: f for f in _parameters(module, node)}
    collected: dict[str, Field] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name):
            collected |= _fields(module, base.id)
    documented = _documented(ast.get_docstring(node) or "")
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        key, options = statement.target.id, _field_options(statement.value)
        if key.startswith("_") or "ClassVar" in ast.dump(statement.annotation) or options.get("init") is False:
            collected.pop(key, None)
            continue
        collected[key] = Field(
            name=key,
            type=_type(statement.annotation, module),
            required=statement.value is None or ("field" in options and not {"default", "default_factory"} & set(options)),
            help=_below(following) or _tidy(options.get("help", "")) or documented.get(key, ""),
            default=options.get("default"),
        )
    return collected


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(d).split("(")[0] for d in node.decorator_list)


def _field_options(value: ast.expr | None) -> dict[str, Any]:
    """The literal options of `= field(...)`, or {"default": literal} of a plain default."""
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field":
        options: dict[str, Any] = {"field": True}
        for keyword in value.keywords:
            options[str(keyword.arg)] = _literal(keyword.value)
        metadata = options.get("metadata")
        options["help"] = metadata.get("help", "") if isinstance(metadata, dict) else ""
        return options
    return {"default": _literal(value)}


def _literal(node: ast.expr | None) -> object:
    """A literal's value; None for an expression. A mapping keeps those of its items that are literals."""
    if isinstance(node, ast.Dict):
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def _parameters(module: str, node: ast.ClassDef) -> Iterator[Field]:
    init = next((b for b in node.body if isinstance(b, ast.FunctionDef) and b.name == "__init__"), None)
    if init is None:
        return
    documented = _documented(f"{ast.get_docstring(node) or ''}\n{ast.get_docstring(init) or ''}")
    positional = init.args.args[1:]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(init.args.defaults))
    pairs = [
        *zip(positional, [*defaults, *init.args.defaults], strict=True),
        *zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True),
    ]
    for argument, default in pairs:
        value = _literal(default)
        kind = _KINDS.get(type(value).__name__, "any")
        by_default = Type(kinds=frozenset({kind} if kind != "null" else {"any"}))
        yield Field(
            name=argument.arg,
            type=_type(argument.annotation, module) if argument.annotation else by_default,
            required=default is None,
            help=documented.get(argument.arg, ""),
            default=value,
        )


def _type(node: ast.expr, module: str) -> Type:
    """An annotation as a Type; what cannot be understood is taken as `any`, for it is upstream's to check."""
    if isinstance(node, ast.Constant):
        if node.value is None:
            return Type(kinds=frozenset({"null"}))
        return _type(ast.parse(node.value, mode="eval").body, module) if isinstance(node.value, str) else ANY
    if isinstance(node, ast.BinOp):
        return _union([_type(node.left, module), _type(node.right, module)])
    if isinstance(node, ast.Attribute):
        return _named(node.attr, module)
    if isinstance(node, ast.Name):
        return _named(node.id, module)
    if isinstance(node, ast.Subscript):
        outer = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer == "Literal":
            return _literals([p.value for p in parts if isinstance(p, ast.Constant)])
        if outer == "Optional":
            return _union([_type(parts[0], module), Type(kinds=frozenset({"null"}))])
        if outer == "Union":
            return _union([_type(p, module) for p in parts])
        if _KINDS.get(outer) in ("list", "dict"):
            return Type(kinds=frozenset({_KINDS[outer]}), items=_type(parts[-1], module) if outer[0] not in "tT" else None)
    return ANY


def _named(name: str, module: str) -> Type:
    if name in _KINDS:
        return Type(kinds=frozenset({_KINDS[name]}))
    found = _find(module, name)
    if found is None:
        return ANY
    source, node = found
    if any("Enum" in ast.unparse(base) for base in node.bases):
        values = [_literal(b.value) for b in node.body if isinstance(b, ast.Assign)]
        return Type(kinds=frozenset({"str"}), values=tuple(v for v in values if isinstance(v, str)), enumeration=True)
    if _is_dataclass(node) and source.startswith("scalepeft."):
        return Type(kinds=frozenset({"dict"}), section=f"{source}:{node.name}")
    return ANY if not _is_dataclass(node) else Type(kinds=frozenset({"dict"}))


def _literals(values: list[object]) -> Type:
    kinds = frozenset(_KINDS[type(v).__name__] for v in values)
    strings = tuple(v for v in values if isinstance(v, str))
    # peft documents a family of values by a placeholder ("pissa_niter_[number of iters]"): then any string may be meant
    return Type(kinds=kinds, values=() if any("[" in s for s in strings) else strings)


def _union(members: list[Type]) -> Type:
    """The union of types. `SomeEnum | str` keeps the enumeration's values; `Literal[...] | str` is any string."""
    open_string = any("str" in m.kinds and not m.values for m in members)
    closed = [m for m in members if m.values and (m.enumeration or not open_string)]
    items = [m.items for m in members if m.items]
    return Type(
        kinds=frozenset().union(*(m.kinds for m in members)),
        values=tuple(dict.fromkeys(v for m in closed for v in m.values)),
        items=_union(items) if items else None,
        section=next((m.section for m in members if m.section), None),
        enumeration=any(m.enumeration for m in closed),
    )


def _below(node: ast.stmt | None) -> str:
    """The string literal under a field: our own way of documenting one."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return _tidy(node.value.value)
    return ""


def _documented(docstring: str) -> dict[str, str]:
    """The descriptions under `name (`type`): text` lines of a docstring as transformers writes them."""
    pattern = r"^ *(\w+) ?\([^)\n]*\)?.*:\n((?: +.+\n?)+?)(?=^ *\w+ ?\(|^\s*$|\Z)"
    return {m[1]: _tidy(m[2]) for m in re.finditer(pattern, docstring, re.MULTILINE)}


def _tidy(text: object) -> str:
    return " ".join(text.split()) if isinstance(text, str) else ""
