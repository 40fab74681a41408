"""Which module may import which, and that the command line stays light."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_toy

import scalepeft
from scalepeft import recipe
from scalepeft.cli import COMMANDS

LAYERS = (
    ("errors", "upstream", "document", "console", "hardware"),
    ("adapter_rules", "stream_rules", "frozen_rules", "check", "recipe"),
    (
        "stops",
        "assets",
        "fetch",
        "published",
        "records",
        "launch",
        "ranks",
        "run",
        "schema",
        "beside",
        "cluster",
        "sharding",
    ),
    (
        "checkpoint",
        "parts",
        "engines",
        "sampler",
        "tables",
        "sources",
        "labels",
        "dialogues",
        "conversations",
        "preferences",
        "augment",
        "entries",
        "prepared",
        "packing",
        "streams",
        "data",
        "refusals",
        "initialisations",
        "adapters",
        "operators",
        "model",
        "shards",
        "base",
        "folding",
    ),
    (
        "counts",
        "metrics",
        "tasks",
        "callbacks",
        "adalora",
        "resume",
        "prefix",
        "trainer",
        "frozen",
        "heads",
        "attention",
        "language",
        "kinds",
        "session",
        "blueprint",
        "devices",
        "footprint",
        "workload",
        "prediction",
    ),
    (
        "report",
        "panel",
        "card",
        "push",
        "page",
        "compare",
        "grid",
        "submit",
        "sweep",
        "generate",
        "verify",
        "predict",
        "preview",
        "orders",
        "proof",
        "merge",
        "export_source",
        "export_vllm",
        "export_lora",
        "export_onnx",
        "gguf_tokenizer",
        "export_gguf",
        "export",
        "export_proof",
        "forecast",
        "expected",
        "fitting",
        "plan",
        "doctor",
        "recording",
        "train",
    ),
    ("cli", "__main__"),
)
"""From the ground up. A module may import those of the layers below it, and those that stand before it in its own."""

LIGHT = {module for layer in (*LAYERS[:3], *LAYERS[5:]) for module in layer}
HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "accelerate", "evaluate", "bitsandbytes", "deepspeed"}

SOURCES = {path.stem: path for path in Path(scalepeft.__file__).parent.glob("*.py") if path.stem != "__init__"}


def imports(module: str, *, at_head: bool = False) -> Iterator[tuple[str, int]]:
    """Dotted names that a module imports, and the line; everywhere, or only when it is itself imported."""
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    for node in tree.body if at_head else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}.py:{node.lineno}: imports are absolute here"
            names = [f"scalepeft.{alias.name}" for alias in node.names] if node.module == "scalepeft" else [str(node.module)]
            yield from ((name, node.lineno) for name in names)


def ours(module: str) -> Iterator[tuple[str, int]]:
    for name, line in imports(module):
        top, _, rest = name.partition(".")
        if top == "scalepeft" and rest and not rest.startswith("__version__"):
            yield rest.split(".")[0], line


def test_every_module_has_a_layer():
    placed = {module for layer in LAYERS for module in layer}
    strangers = sorted(set(SOURCES) - placed)
    assert not strangers, f"place {', '.join(strangers)} in LAYERS of {__file__}: what may it import, and who may import it?"


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_down(module):
    ordered = [name for layer in LAYERS for name in layer]
    upward = [
        f"{module}.py:{line}: imports {name}, which stands no lower"
        for name, line in ours(module)
        if ordered.index(name) >= ordered.index(module)
    ]
    assert not upward


def test_the_command_line_knows_verbs_by_name_only():
    assert {name for name, _ in ours("cli")} == {"errors"}


@pytest.mark.parametrize("module", sorted(LIGHT & set(SOURCES)))
def test_light_modules_import_nothing_heavy_at_their_head(module):
    assert not [f"{module}.py:{line}: {name}" for name, line in imports(module, at_head=True) if name.split(".")[0] in HEAVY]


@pytest.mark.parametrize("module", [module for layer in LAYERS[:2] for module in layer if module in SOURCES])
def test_the_recipe_needs_only_the_standard_library_and_pyyaml(module):
    foreign = {name.split(".")[0] for name, _ in imports(module)} - set(sys.stdlib_module_names) - {"scalepeft"}
    assert foreign <= ({"yaml"} if module == "document" else set())


LIGHT_COMMANDS = [*([verb, "--help"] for verb in COMMANDS), ["check", "quickstart"], ["schema"]]


@pytest.mark.parametrize("arguments", LIGHT_COMMANDS, ids=" ".join)
def test_the_command_line_is_light(arguments):
    code = (
        "import sys; from scalepeft.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as exit: status = exit.code\n"
        f"print('loaded:', *sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "loaded:\n")
    assert "quickstart: ok" in ended.stdout if arguments[0] == "check" and "--help" not in arguments else ended.stdout


def test_help_needs_neither_argparse_nor_yaml():
    code = (
        "import sys; before = set(sys.modules)\n"
        "from scalepeft.cli import main; main(['--help']); new = set(sys.modules) - before\n"
        "print({'argparse', 'yaml', 'importlib.metadata', 'dataclasses', 'typing', 'ast'} & new, file=sys.stderr)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == "set()\n"


def test_every_verb_has_help_that_names_it():
    assert recipe.main.__doc__
    assert all(what and module.startswith("scalepeft.") and ":" in module for module, what in COMMANDS.values())


FIRST_STEP = """
import json, os, sys
from scalepeft import kinds, recipe, train
made = kinds.trainer
def stopping(*given, **options):
    from transformers import TrainerCallback
    class Stopping(TrainerCallback):
        def on_step_begin(self, *_, **__):
            print("loaded:", json.dumps(sorted(sys.modules)), flush=True)
            os._exit(0)
    trainer = made(*given, **options)
    trainer.add_callback(Stopping())
    return trainer
kinds.trainer = stopping
train.train(recipe.load(sys.argv[1], ["training.eval_on_start=false"]))
"""


@pytest.mark.long
def test_what_a_training_does_not_need_is_not_imported_before_its_first_step(tiny_model, tmp_path):
    command = [sys.executable, "-c", FIRST_STEP, str(write_toy(tmp_path, tiny_model))]
    environment = os.environ | {"SCALEPEFT_CACHE": str(tmp_path / "cache")}  # so that the plan is made, and not found
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.partition("loaded: ")[2]
    loaded = set(json.loads(told.splitlines()[0]))
    assert {"torch", "peft", "scalepeft.trainer", "scalepeft.footprint"} <= loaded
    assert set() == loaded & {"evaluate", "scipy.stats", "sklearn", "matplotlib", "trl", "wandb", "tensorboard", "deepspeed"}
