"""The schema for editors says what the checker says."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from jsonschema import Draft7Validator

from scalepeft import check, document, recipe, records, run, schema, upstream

SCHEMA = schema.recipe()
VALIDATOR = Draft7Validator(SCHEMA)
RECIPES = recipe.shipped_recipes()


def changed(key, value):
    """The quickstart with one value set."""
    values = copy.deepcopy(recipe.load("quickstart").resolved())
    *parents, last = key.split(".")
    holder = values
    for part in parents:
        holder = holder.setdefault(part, {})
    holder[last] = value
    return values


def accepted_by_checker(values):
    return not check.problems(document.Document(path=recipe.find("quickstart"), text="", values=values, lines={}))


def test_the_schemas_are_schemas():
    Draft7Validator.check_schema(SCHEMA)
    Draft7Validator.check_schema(schema.run())


def test_the_shipped_copy_is_fresh():
    """Write it anew with: scalepeft schema > recipes/schema.json."""
    shipped = next(iter(RECIPES.values())).with_name("schema.json").read_text(encoding="utf-8")
    assert shipped == schema.text(SCHEMA) + "\n", test_the_shipped_copy_is_fresh.__doc__
    assert len(shipped.encode()) < 600_000


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_valid(name):
    assert [error.message for error in VALIDATOR.iter_errors(recipe.load(name).resolved())] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training", None), ("adapter", None), ("early_stopping", None), ("quantization", None), ("global_batch_size", None),
        ("adapter", {"name_or_path": "first", "revision": None}), ("adapter", {"peft_type": "IA3", "target_modules": ["q"]}),
        ("training.learning_rate", 1), ("training.report_to", ["wandb"]), ("training.save_total_limit", None),
        ("training.optim_args", "a=1"), ("adapter.target_modules", ["q"]), ("adapter.init_lora_weights", "pissa_niter_4"),
        ("adapter.init_lora_weights", False), ("adapter.trainable_token_indices", {"embed": [1, 2]}),
        ("quantization", {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}), ("model.config", {"dropout": [1, {}]}),
        ("data.train", [{"path": "a"}, {"path": "b", "first_rows": 3}]), ("data.label_names", ["a", 1]),
        ("data.holdout", {"size": 0.1}), ("data.evaluation", {"a-b_1": {"path": "x"}}), ("data.evaluation", {}),
    ],
)  # fmt: skip
def test_what_the_checker_accepts_is_valid(key, value):
    values = changed(key, value)
    values["training"] = values["training"] and {**values["training"], "eval_strategy": "no", "eval_on_start": False}
    assert accepted_by_checker(values)
    assert [error.message for error in VALIDATOR.iter_errors(values)] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainin", {}), ("model", None), ("model.name", "x"), ("adapter", 3), ("adapter.rr", 3),
        ("adapter.r", "8"), ("adapter", {"peft_type": "IA3", "r": 8}), ("adapter.peft_type", "lora"),
        ("adapter", {"name_or_path": "x", "r": 8}),
        ("adapter", {"name_or_path": "x", "peft_type": "LORA"}), ("training.learning_rat", 1),
        ("training.learning_rate", "1e-3"), ("training.bf16", 1), ("training.eval_strategy", "epochs"),
        ("training.hub_token", "x"),
        ("training.local_rank", 0),
        ("early_stopping", {"patience": 3}), ("quantization", {"load_in_4bits": True}), ("task", "classify"),
        ("data.train", [{"path": "a"}, {"pat": "b"}]), ("data.train", {"spli": "train"}),
        ("data.evaluation", {"a b": {"path": "x"}}), ("data.evaluation", {"a": {"paths": "x"}}),
        ("data.holdout", {"sise": 1}), ("global_batch_size", "8"),
    ],
)  # fmt: skip
def test_what_the_checker_refuses_is_invalid(key, value):
    values = changed(key, value)
    assert not accepted_by_checker(values)
    assert not VALIDATOR.is_valid(values)


def test_every_key_of_every_class_is_known():
    """With its help, for that is what an editor shows."""
    arguments = SCHEMA["definitions"]["TrainingArguments"]["properties"]
    assert set(arguments) == set(upstream.fields(upstream.TASK_ARGUMENTS["sequence-classification"])) - set(check.REFUSED)
    assert all(entry["description"] for entry in arguments.values())
    assert arguments["learning_rate"]["default"] == 5e-5
    for name, reference in upstream.peft_types().items():
        section = SCHEMA["definitions"][reference.rpartition(":")[2]]
        assert set(section["properties"]) == set(upstream.fields(reference)), name
        values = changed("adapter", {"peft_type": name, "nonsense": 1})
        unknown = [e for e in VALIDATOR.iter_errors(values) if "nonsense" in e.message]
        assert unknown, name


def test_defaults_are_valid_themselves():
    for definition in SCHEMA["definitions"].values():
        for name, entry in definition["properties"].items():
            if "default" in entry:
                errors = Draft7Validator({**entry, "definitions": SCHEMA["definitions"]}).iter_errors(entry["default"])
                assert not [error.message for error in errors], name


def test_run_directories_are_described():
    files = Draft7Validator(schema.run())
    definitions = schema.run()["definitions"]
    for kind in (records.RunRecord, records.MetricsLine):
        assert set(definitions[kind.__name__]["properties"]) == {field.name for field in dataclasses.fields(kind)}
        assert all(entry.get("description") for entry in definitions[kind.__name__]["properties"].values())
    record = records.RunRecord(status="running", name="x", command=["scalepeft"], started=run.now(), versions=run.versions())
    before = {"step": 0, "epoch": 0.0, "eval_loss": 1.5, "eval_accuracy": 0.5, "eval_other_loss": 1.0}
    lines = [before, {"step": 1, "epoch": 0.5, "loss": 2.0}]
    good = {"run.json": json.loads(json.dumps(dataclasses.asdict(record))), "metrics.jsonl": lines}
    assert [error.message for error in files.iter_errors(good)] == []
    for wrong in ({"run.json": {**good["run.json"], "status": "done"}}, {"run.json": {}}, {"metrics.jsonl": [{"epoch": 1.0}]}):
        assert not files.is_valid({**good, **wrong})
