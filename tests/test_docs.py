"""The documentation: every command of README.md runs, every recipe in it is valid, and what it links to exists."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scalepeft import cli, document
from scalepeft import recipe as recipes

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "recipes/README.md", "slurm/README.md"),
    *("docs/language-models.md", "docs/adapters.md", "docs/layouts.md", "docs/cluster.md", "docs/plan.md"),
    "docs/performance.md",
]
TINY = "data.train.sample_rows=64 data.evaluation.test.sample_rows=32 training.max_steps=2"
TINY_SFT = "data.train.sample_rows=8 data.evaluation.test.first_rows=4 training.max_steps=1"
TINY_FILE = "training.max_steps=2"
TWO_CPUS = ("multi_gpu.yaml --num_processes 8", "multi_cpu.yaml --num_processes 2")
REPLACED = {".venv/bin/activate": f"{sys.prefix}/bin/activate"}

LAUNCH = "accelerate launch --config_file accelerate_configs"
QUICKSTART = "-m scalepeft.train recipes/quickstart.yaml"
LIGHT = {
    "make setup": "dry run",
    "make quickstart": "dry run",
    "make test": "dry run",
    "make test-all": "dry run",
    "make test-cluster": "dry run",
    "make lint": "dry run",
    "source .venv/bin/activate": "",
    "scalepeft check quickstart": "",
    "scalepeft check recipes": "",
    "scalepeft check quickstart training.learning_rat=1e-4": "fails",
    "scalepeft check reviews.yaml": "",
    "scalepeft schema > schema.json": "",
    "scalepeft schema --run > run_schema.json": "",
    "scalepeft fetch quickstart": "",
    "scalepeft preview quickstart --set test": "",
    "scalepeft plan quickstart --gpu h100-80gb": "",
}
"""Commands of the documents that take a moment: what is appended to them; the make targets are run by .ci/run."""
LONG = {
    "scalepeft train quickstart": TINY,
    "scalepeft train quickstart training.learning_rate=5e-4 training.output_dir=runs/slower": TINY,
    "scalepeft train quickstart --fresh": TINY,
    "scalepeft train reviews.yaml": TINY_FILE,
    f"accelerate launch {QUICKSTART} training.output_dir=runs/launched": TINY,
    "scalepeft train quickstart training.output_dir=runs/two --launch multi_cpu --num-processes 2": TINY,
    "scalepeft train quickstart training.output_dir=runs/zero --launch zero3 --num-processes 2 --cpu": TINY,
    "scalepeft train RECIPE --launch zero3 --num-processes 2": f"--cpu training.output_dir=runs/page {TINY}",
    f"{LAUNCH}/multi_gpu.yaml --num_processes 8 {QUICKSTART} training.output_dir=runs/eight": TINY,
    "scalepeft evaluate runs/quickstart": "",
    "scalepeft evaluate runs/quickstart data.evaluation.mine.path=reviews.csv --output figures.json": "",
    "scalepeft predict runs/quickstart --data new.csv --output predictions.csv": "",
    "scalepeft fetch quickstart_sft": "",
    "scalepeft preview quickstart_sft -n 1": TINY_SFT,
    "scalepeft preview quickstart_sft -n 2": TINY_SFT,
    "scalepeft train quickstart_sft": TINY_SFT,
    "scalepeft predict runs/quickstart_sft --data questions.jsonl --output completions.jsonl --max-new-tokens 32": "",
    'echo "Name three fruits." | scalepeft chat runs/quickstart_sft --max-new-tokens 32': "",
    "scalepeft compare runs/quickstart runs/slower --html comparison.html": "",
    "scalepeft push runs/quickstart --repo-id alice/film-reviews --base sentence-transformers/all-MiniLM-L6-v2 --dry-run": "",
    "scalepeft push runs/quickstart --repo-id alice/film-reviews --base sentence-transformers/all-MiniLM-L6-v2": "",
    "scalepeft sweep quickstart 'adapter.r=[4,8]' 'training.learning_rate=[1e-3,3e-4]'": TINY,
    "scalepeft plan quickstart --launch zero3 --num-processes 8 --memory 24GiB --json": "",
    "scalepeft doctor": "",
    "scalepeft merge runs/quickstart --output merged": "",
    "scalepeft merge runs/quickstart --output merged-bf16 --dtype bfloat16 --verify reviews.csv": "",
    "scalepeft export runs/quickstart --format onnx --output exported-onnx": "",
    "scalepeft export runs/quickstart_sft --format gguf --outtype q8_0 --output exported-gguf": "",
}
"""Commands that train or load a model, with what makes them tiny. Those of GPUs run as processes on the CPU."""
ON_A_CLUSTER = [
    "sbatch slurm/train.sh",
    "sbatch --nodes=2 --gpus-per-node=8 --time=4:00:00 slurm/train.sh recipes/sft_lora.yaml --launch zero3",
    "sbatch --nodes=2 slurm/train.sh quickstart training.output_dir=runs/two",
    "sbatch --nodes=2 slurm/train.sh quickstart training.output_dir=runs/zero --launch zero3 --cpu",
    "scalepeft submit quickstart training.output_dir=runs/first --nodes 2 -- --time=4:00:00",
    "scalepeft submit quickstart training.output_dir=runs/first --nodes 2 --dry-run -- --time=4:00:00",
    "scalepeft submit quickstart training.output_dir=runs/chain --then evaluate --then merge",
    "REPO_ID=alice/film-reviews slurm/pipeline.sh quickstart training.output_dir=runs/chain --dry-run",
    "scalepeft sweep quickstart 'adapter.r=[4,8]' --slurm -- --time=1:00:00",
    "SCALEPEFT_CACHE=$PWD/cache HF_HOME=$PWD/hub scalepeft fetch quickstart",
    "SCALEPEFT_CACHE=$PWD/cache HF_HOME=$PWD/hub sbatch slurm/train.sh quickstart training.output_dir=runs/offline",
]
"""Commands that tests/test_cluster.py runs, on a cluster of its own."""


def blocks(file: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language in languages]


def commands(file: str) -> list[str]:
    """The commands of a document: the lines after `$` of a console block, all lines of a bash block."""
    lines = [line[2:] for block in blocks(file, "console") for line in block.splitlines() if line.startswith("$ ")]
    lines += [line for block in blocks(file, "bash", "sh", "shell") for line in block.splitlines()]
    return [stripped for line in lines if (stripped := re.sub(r"\s+#.*|^#.*", "", line).strip())]


ALL_COMMANDS = list(dict.fromkeys(command for file in DOCUMENTS for command in commands(file)))
RECIPES = [block for block in blocks("README.md", "yaml") if block.count("\ntask:") and "\ndata:" in block]
FAMILY = [block for block in blocks("README.md", "yaml") if block.startswith("extends: ")]
FRAGMENTS = [block for block in blocks("README.md", "yaml") if block not in (*RECIPES, *FAMILY)]


def values(block: str, folder: Path) -> dict[str, Any]:
    """A block as a recipe would be read: YAML 1.2, where 1e-3 is a number. One of comments only is empty."""
    if not re.search(r"^[^#\s]", block, re.MULTILINE):
        return {}
    (folder / "block.yaml").write_text(block, encoding="utf-8")
    return document.read(folder / "block.yaml").values


def bash(command: str, folder: Path, *, status: int = 0) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "WANDB_MODE": "disabled",
    }
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def newcomer(assets, tmp_path_factory) -> Path:  # noqa: ARG001  # the assets must be there
    """A folder as a reader has it: the checkout's recipes and launch files, and the files that README.md speaks of."""
    folder = tmp_path_factory.mktemp("newcomer")
    for name in ("recipes", "accelerate_configs"):
        shutil.copytree(ROOT / name, folder / name)
    with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as stream:
        rows = [
            (f"{text} {i}", label)
            for i in range(20)
            for text, label in (("a good film", "positive"), ("a bad film", "negative"))
        ]
        csv.writer(stream).writerows([("text", "label"), *rows])
    (folder / "new.csv").write_text("text\nA clever and moving film.\nTwo hours of my life that I will not get back.\n")
    for block in RECIPES:
        if named := re.match(r"# (\S+\.yaml)\n", block):
            (folder / named[1]).write_text(block, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(newcomer) -> Path:
    """The folder with a complete, tiny runs/quickstart."""
    bash(f"scalepeft train quickstart {TINY}", newcomer)
    return newcomer


@pytest.fixture(scope="module")
def talker(newcomer, smollm2) -> Path:  # noqa: ARG001  # the weights must be there
    """The folder with a complete, tiny runs/quickstart_sft."""
    rows = [
        {"prompt": [{"role": "user", "content": text}]} for text in ("What is the capital of France?", "Name three fruits.")
    ]
    (newcomer / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    bash(f"scalepeft train quickstart_sft {TINY_SFT}", newcomer)
    return newcomer


def test_every_command_is_run_by_a_test():
    assert sorted({*LIGHT, *LONG, *ON_A_CLUSTER}) == sorted(ALL_COMMANDS)


@pytest.mark.parametrize("command", LIGHT)
def test_light_commands_run(command, newcomer):
    how = LIGHT[command]
    if how == "dry run":
        bash(f"{command} --dry-run", ROOT)
        return
    for old, new in REPLACED.items():
        command = command.replace(old, shlex.quote(new))
    bash(command, newcomer, status=2 if how == "fails" else 0)


@pytest.mark.long
@pytest.mark.parametrize("command", LONG)
def test_long_commands_run(command, request, monkeypatch, tmp_path):
    trained = request.getfixturevalue("talker" if "quickstart_sft" in command else "trained")
    for name in ("figures.json", "predictions.csv", "completions.jsonl"):
        (trained / name).unlink(missing_ok=True)
    if " push " in command:
        for name, value in request.getfixturevalue("hub").environment(tmp_path).items():
            monkeypatch.setenv(name, value)
    tiny = command.replace(*TWO_CPUS).replace("RECIPE", "recipes/quickstart.yaml")
    said = bash(f"{tiny} {LONG[command]}", trained)
    if ".train" in command or " train " in command:
        assert "reloaded in a fresh process" in said or "is complete already" in said


@pytest.mark.parametrize("command", [c for c in LIGHT if c.startswith("scalepeft check")])
def test_readme_shows_what_is_printed(command, newcomer):
    block = next(b for b in blocks("README.md", "console") if f"$ {command}\n" in b)
    shown = block.partition(f"$ {command}\n")[2].partition("$ ")[0]
    printed = bash(command, newcomer, status=2 if LIGHT[command] == "fails" else 0)
    parts = [re.escape(part) for part in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)]
    assert not shown or re.fullmatch("(?s:.*)".join(parts), printed)


def test_readme_shows_every_verb_and_no_other():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### (\w+)$", text, re.MULTILINE)) == set(cli.COMMANDS)
    assert set(re.findall(r"scalepeft (\w+) ", "\n".join(ALL_COMMANDS))) <= set(cli.COMMANDS)


@pytest.mark.parametrize("file", DOCUMENTS)
def test_links_lead_somewhere(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    here = (ROOT / file).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        assert not path or (here / path).exists(), target
        if anchor:
            headings = re.findall(
                r"^#+ (.*)$", (here / path if path else ROOT / file).read_text(encoding="utf-8"), re.MULTILINE
            )
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target
    for named in re.findall(r"`((?:recipes|accelerate_configs|benchmarks|tests|src|docs|slurm)/[^`\s*]*)`", text):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_whole_recipes_are_valid(number, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPES[number], encoding="utf-8")
    recipes.load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("number", range(len(FAMILY)))
def test_extending_recipes_are_valid_beside_what_they_extend(number, newcomer):
    (newcomer / "extending.yaml").write_text(FAMILY[number], encoding="utf-8")
    recipes.load(newcomer / "extending.yaml")


@pytest.mark.parametrize("number", range(len(FRAGMENTS)))
def test_fragments_fit_into_the_quickstart(number, tmp_path):
    whole = dict(document.read(ROOT / "recipes/quickstart.yaml").values)
    for section, value in values(FRAGMENTS[number], tmp_path).items():
        adds = section in ("model", "data", "training")  # an adapter or a quantisation is replaced as a whole
        whole[section] = {**whole[section], **value} if adds else value
    (tmp_path / "recipe.yaml").write_text(recipes.dump(whole), encoding="utf-8")
    recipes.load(tmp_path / "recipe.yaml")


def test_sections_of_the_quickstart_are_shown_as_they_are(tmp_path):
    whole = document.read(ROOT / "recipes/quickstart.yaml").values
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    explained = text.partition("section by section\n")[2].partition("\n## ")[0]
    shown: dict[str, object] = {}
    for block in re.findall(r"^```yaml\n(.*?)^```$", explained, re.MULTILINE | re.DOTALL):
        shown |= values(block, tmp_path)
    assert shown.keys() == whole.keys()
    assert all(shown[name] == whole[name] for name in whole if name != "training")
    assert shown["training"].items() <= whole["training"].items()


@pytest.mark.parametrize("verb", cli.COMMANDS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert f"scalepeft {verb}" in capsys.readouterr().out
