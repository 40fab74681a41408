"""What is read from upstream's source is what upstream's classes are."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
import warnings
from enum import Enum

import pytest

from scalepeft import check, upstream

SFT, DPO = "trl.trainer.sft_config:SFTConfig", "trl.trainer.dpo_config:DPOConfig"
DATACLASSES = [*upstream.TASK_ARGUMENTS.values(), SFT, DPO, *upstream.peft_types().values()]
OTHERS = [upstream.QUANTIZATION, upstream.EARLY_STOPPING]


@pytest.fixture(scope="module", autouse=True)
def _stack():
    """The whole stack, imported once; its own warnings on import are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in ("transformers", "peft", "trl"):
            importlib.import_module(module)
        yield


def load(reference):
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def settable(cls):
    """The real fields as (required, default), with `...` for a default that no literal says."""
    missing = dataclasses.MISSING
    return {
        f.name: (f.default is missing and f.default_factory is missing, ... if f.default is missing else f.default)
        for f in dataclasses.fields(cls)
        if f.init
    }


def agree(read, real):
    """A default that was read as a literal is the real one; None is also said of what is no literal."""
    real = real.value if isinstance(real, Enum) else real
    return read is None or real is ... or (read == real and type(read) is type(real))


@pytest.mark.parametrize("reference", DATACLASSES)
def test_a_dataclass_has_the_fields_that_are_read(reference):
    read, real = upstream.fields(reference), settable(load(reference))
    assert set(read) == set(real)
    assert {n for n, f in read.items() if f.required} == {n for n, (required, _) in real.items() if required}
    assert not [(n, f.default, real[n][1]) for n, f in read.items() if not agree(f.default, real[n][1])]


@pytest.mark.parametrize("reference", OTHERS)
def test_a_class_has_the_parameters_that_are_read(reference):
    parameters = list(inspect.signature(load(reference).__init__).parameters.values())[1:]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    read = upstream.fields(reference)
    assert list(read) == list(named)
    assert not [n for n, f in read.items() if f.required != (named[n].default is inspect.Parameter.empty)]
    assert not [n for n, f in read.items() if f.default != named[n].default]


def test_literal_defaults_are_read():
    """Agreement alone would hold if nothing were read."""
    fields = upstream.fields(upstream.TASK_ARGUMENTS["sequence-classification"])
    assert (fields["learning_rate"].default, fields["eval_strategy"].default, fields["bf16"].default) == (5e-5, "no", False)
    assert upstream.fields(SFT)["learning_rate"].default == 2e-5
    assert upstream.fields(upstream.peft_types()["LORA"])["r"].default == 8


def test_every_peft_type_is_found():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    real = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    assert {name: load(reference) for name, reference in upstream.peft_types().items()} == real
    assert len(real) >= 45


@pytest.mark.parametrize("reference", [*DATACLASSES, *OTHERS])
def test_upstreams_own_defaults_are_accepted(reference):
    """A type read too narrowly would refuse what upstream itself sets."""
    cls = load(reference)
    for name, field in upstream.fields(reference).items():
        default = settable(cls)[name][1] if dataclasses.is_dataclass(cls) and name in settable(cls) else field.default
        default = default.value if isinstance(default, Enum) else default
        if field.required or default is ... or (default is None and "null" not in field.type.kinds):
            continue  # `int = None` is upstream's slip; null is then left out
        assert check._fits(default, field.type), (name, default, field.type)
        if isinstance(default, str) and field.type.values:
            assert default in field.type.values


def test_help_is_read():
    fields = upstream.fields(upstream.TASK_ARGUMENTS["sequence-classification"])
    assert "AdamW" in fields["learning_rate"].help or "learning rate" in fields["learning_rate"].help
    assert all(field.help for field in fields.values())
    assert all(f.help for f in check.recipe_fields().values())
    assert all(f.help for f in upstream.fields(upstream.QUANTIZATION).values())


def test_removed_keys_are_gone_upstream():
    """A key that comes back must leave the table, or the checker would send people away from it."""
    known = {name for reference in (*DATACLASSES, *OTHERS) for name in upstream.fields(reference)}
    assert not set(upstream.REMOVED) & known


def test_refused_keys_exist_upstream():
    known = {name for reference in upstream.TASK_ARGUMENTS.values() for name in upstream.fields(reference)}
    assert set(check.REFUSED) | set(check._REFUSED_VALUES) <= known


@pytest.mark.parametrize(
    ("annotation", "kinds", "values"),
    [
        ("int | None", {"int", "null"}, ()),
        ("Optional[Union[list[str], str]]", {"list", "str", "null"}, ()),
        ("Literal['a', 'b'] | None", {"str", "null"}, ("a", "b")),
        ("Literal['a'] | str", {"str"}, ()),
        ("'int | str'", {"int", "str"}, ()),
        ("Callable[[int], str]", {"any"}, ()),
        ("torch.dtype", {"any"}, ()),
    ],
)
def test_annotations(annotation, kinds, values):
    read = upstream._type(ast.parse(annotation, mode="eval").body, "scalepeft.upstream")
    assert (read.kinds, read.values) == (kinds, values)


def test_reading_imports_nothing_of_the_stack():
    code = (
        "import sys; from scalepeft import upstream; [upstream.fields(r) for r in upstream.peft_types().values()];"
        "print({'torch', 'transformers', 'peft', 'trl'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
