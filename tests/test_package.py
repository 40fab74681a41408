"""The package as users get it: the wheel holds what it needs and nothing else, and works away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import scalepeft

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (built,) = folder.glob("scalepeft-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel, which sees the dependencies of this one but not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    # a folder named in a .pth file is searched last, and .pth files in it (that of the editable checkout) are not read
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def run(installed, assets, tmp_path):  # noqa: ARG001  # the assets must be there
    """Run the installed program in an empty folder and return what it prints."""

    def program(*arguments: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"WANDB_MODE": "disabled"}
        done = subprocess.run(
            [installed / "scalepeft", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return program


def test_the_wheel_holds_the_package_the_recipes_the_launch_files_and_the_job_scripts_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {f"scalepeft/{p.relative_to(ROOT / 'src/scalepeft')}" for p in (ROOT / "src/scalepeft").rglob("*.py")}
    folders = ("recipes", "accelerate_configs", "slurm")
    recipes = {f"scalepeft/{p.relative_to(ROOT)}" for name in folders for p in (ROOT / name).rglob("*") if p.is_file()}
    about = {name for name in names if name.startswith(f"scalepeft-{scalepeft.__version__}.dist-info/")}
    assert set(names) == sources | recipes | about
    assert any(name.endswith("licenses/LICENSE") for name in about)


def test_it_is_the_wheel_that_runs(installed, tmp_path):
    asked = [installed / "python", "-c", "import scalepeft; print(scalepeft.__file__)"]
    found = subprocess.run(asked, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    assert Path(found).is_relative_to(installed.parent)


def test_the_light_verbs_work(run):
    assert run("--version") == f"scalepeft {scalepeft.__version__}\n"
    assert run("check", "quickstart") == "quickstart: ok\n"
    assert run("schema") == (ROOT / "recipes/schema.json").read_text(encoding="utf-8")


def test_the_quickstart_trains_to_the_end(run, tmp_path):
    tiny = ["data.train.sample_rows=64", "data.evaluation.test.sample_rows=32", "training.max_steps=2"]
    assert "reloaded in a fresh process" in run("train", "quickstart", *tiny)
    assert json.loads((tmp_path / "runs/quickstart/run.json").read_text(encoding="utf-8"))["status"] == "complete"
    two = ["training.output_dir=runs/two", "--launch", "multi_cpu", "--num-processes", "2"]
    assert "2 processes (MULTI_CPU)" in run("train", "quickstart", *tiny, *two)
