"""Claims about sweeps: which overrides are lists to try, what is refused, and that a sweep goes on where it stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from scalepeft import cli, document, grid, sweep
from scalepeft.errors import UserError
from scalepeft.run import Run

RECIPE = """\
task: sequence-classification
model: {name_or_path: base}
quantization: {load_in_4bit: true}
adapter: {peft_type: LORA}
data: {train: {path: a.csv}, evaluation: {test: {path: b.csv}}}
"""


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base.yaml").write_text(RECIPE)
    return document.read(tmp_path / "base.yaml")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("adapter.r=[4,8]", [4, 8]),
        ("training.learning_rate=[1e-3, 1e-4]", [1e-3, 1e-4]),
        ("training.bf16=[true,false]", [True, False]),
        ("model.name_or_path=[a/b,c]", ["a/b", "c"]),
        ("data.evaluation.test.sample_rows=[1,null]", [1, None]),
        ("data.train.sample_rows=[1,2]", [1, 2]),
        ("adapter=[{peft_type: LORA, r: 2},{peft_type: IA3}]", [{"peft_type": "LORA", "r": 2}, {"peft_type": "IA3"}]),
        ("adapter.target_modules=[[q_lin],[q_lin,v_lin]]", [["q_lin"], ["q_lin", "v_lin"]]),
        ("adapter.target_modules=[[q_lin],all-linear]", [["q_lin"], "all-linear"]),
        ("adapter.layer_replication=[[[0,4]],[[2,5]]]", [[[0, 4]], [[2, 5]]]),
        ("quantization.llm_int8_skip_modules=[[a,b],[c]]", [["a", "b"], ["c"]]),
        ("training.seed=[1]", [1]),
    ],
)
def test_a_list_of_values_is_swept(base, text, values):
    key = text.partition("=")[0]
    assert grid.read(base, [text, "training.run_name=x"]).swept == {key: values}


@pytest.mark.parametrize(
    "text",
    [
        "adapter.target_modules=[q_lin,v_lin]",
        "adapter.target_modules=[]",
        "adapter.layers_to_transform=[1,2]",
        "adapter.layer_replication=[[0,4],[2,5]]",
        "data.text_columns=[premise,hypothesis]",
        "data.train=[{path: a.csv},{path: b.csv}]",
        "quantization.llm_int8_skip_modules=[a,b]",
        "training.report_to=[wandb,tensorboard]",
        "training.seed=3",
        "nosuch.key=[1,2]",
    ],
)
def test_a_value_that_is_a_list_is_not_swept(base, text):
    assert grid.read(base, [text, "adapter.r=[4,8]"]).common == [text]
    with pytest.raises(UserError, match="nothing is swept"):
        grid.read(base, [text])


def test_combinations_come_in_the_order_given(base):
    found = grid.read(base, ["adapter.r=[4,8]", "training.seed=7", "training.learning_rate=[0.001,1e-5]"]).points()
    assert list(found) == ["r=4,lr=0.001", "r=4,lr=1e-05", "r=8,lr=0.001", "r=8,lr=1e-05"]
    assert found["r=8,lr=1e-05"] == ("adapter.r=8", "training.seed=7", "training.learning_rate=1e-05")


def test_an_override_holds_over_those_before_it(base):
    found = grid.read(base, ["adapter=[{peft_type: LORA},{peft_type: IA3}]", "adapter.target_modules=[key]"]).points()
    told = ("adapter={peft_type: IA3}", "adapter.target_modules=[key]")
    assert found["adapter=peft_type-IA3"] == told


def test_names_are_clean_and_of_their_own(base):
    texts = ["model.name_or_path=[a/b,a b,-c,'../d',null]", "adapter.target_modules=[[q],[q,v]]"]
    names = list(grid.read(base, texts).points())
    assert names[:6] == [
        "base=a-b,modules=q",
        "base=a-b,modules=q+v",
        "base=a-b,modules=q-2",
        "base=a-b,modules=q+v-2",
        "base=c,modules=q",
        "base=c,modules=q+v",
    ]
    assert len(set(names)) == 10
    assert not [name for name in names if "/" in name or " " in name]
    ambiguous = grid.read(base, ["data.train.sample_rows=[1,2]", "data.evaluation.test.sample_rows=[-3]"])
    assert list(ambiguous.points()) == ["train.sample_rows=1,test.sample_rows=-3", "train.sample_rows=2,test.sample_rows=-3"]
    long = list(grid.read(base, [f"model.name_or_path=[{'x' * 300}1,{'x' * 300}2]"]).points())
    assert len(set(long)) == 2
    assert max(map(len, long)) < 120


@pytest.mark.parametrize(
    "value", ["1", "1e-3", "a: b", "[1, 2]", "null", "", "#", "'", "é\n", 1, 1.5, True, None, ["1", 1], {"a": []}]
)
def test_values_are_written_as_they_are_read(base, value):
    text = f"training.run_name={grid.written(value)}"
    found = document.override(base, [text]).values["training"]["run_name"]
    assert (repr(found), "\n" in text) == (repr(value), False)


def test_all_problems_are_told_before_anything_starts(toy, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    toy()
    assert cli.main(["sweep", "run.yaml", "adapter.r=[4,x]", "training.sed=1", "data.train.path=[train.csv,no.csv]"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "command line (training.sed=1): training (TrainingArguments) has no 'sed'; did you mean 'seed'?",
        "command line (adapter.r=x): adapter.r is 'x' (str); it takes int",
    ]
    assert cli.main(["sweep", "run.yaml", "adapter.r=[4,8]", "data.train.path=[train.csv,no.csv]"]) == 2
    assert capsys.readouterr().err.startswith("command line (data.train.path=no.csv): data.train.path: no.csv")
    asked = ["adapter.r=[4,4]", "training.seed=[]", "training.output_dir=x", "training.max_steps=1", "training.max_steps=[2]"]
    assert cli.main(["sweep", "run.yaml", *asked]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "command line: 'adapter.r=[4,4]' names a value twice",
        "command line: 'training.seed=[]' names no value",
        "command line: training.output_dir is the sweep's to choose; give --output-dir",
        "command line: training.max_steps is given twice",
    ]
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_something_else_is_refused(toy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = str(toy())
    (tmp_path / "runs" / "run-sweep").mkdir(parents=True)
    first = sweep.plan(recipe, ["adapter.r=[4,8]", "training.seed=[1,2]"])
    first._write({p.name: {"status": "pending"} for p in first.points})
    assert sweep.plan("run.yaml", ["adapter.r=[4,8]", "training.seed=[1,2]"]).folder == first.folder
    with pytest.raises(UserError) as refused:
        sweep.plan(recipe, ["adapter.r=[4,16]", "training.seed=[1,2]", "training.max_steps=3"])
    told = "adapter.r: [4, 8] -> [4, 16]; training.max_steps: null -> 3"
    assert str(refused.value) == f"{first.folder}: holds another sweep ({told}); give another --output-dir"
    with pytest.raises(UserError, match="the order of keys"):
        sweep.plan(recipe, ["training.seed=[1,2]", "adapter.r=[4,8]"])
    with pytest.raises(UserError, match="is not a sweep"):
        sweep.plan(recipe, ["adapter.r=[4,8]"], tmp_path)
    with pytest.raises(UserError, match="is a file"):
        sweep.plan(recipe, ["adapter.r=[4,8]"], tmp_path / "run.yaml")


@pytest.mark.long
def test_a_sweep_keeps_its_failures_and_goes_on(toy, command, tmp_path):
    recipe = toy(training={"num_train_epochs": 1})
    asked = ["sweep", recipe, "adapter.target_modules=[[query],[nosuch]]", "--output-dir", "swept"]
    found = command(*asked)
    assert found.returncode == 1, found.stderr
    reason = "adapter: target_modules ['nosuch'] match no module"
    assert found.stderr.splitlines()[-1].startswith("swept: 1 of 2 runs failed (modules=nosuch)")
    assert reason in found.stderr
    assert "[1/2] modules=query" in found.stdout
    assert [line for line in found.stdout.splitlines() if line.startswith("modules=nosuch: failed: ") and reason in line]
    swept = tmp_path / "swept"
    record = json.loads((swept / "sweep.json").read_text())
    assert record["grid"] == {"adapter.target_modules": [["query"], ["nosuch"]]}
    assert [point["status"] for point in record["points"]] == ["complete", "failed"]
    assert reason in record["points"][1]["reason"]
    page = (swept / "compare.html").read_text()
    assert "modules=nosuch" in page

    ended = Run(swept / "modules=query").record["ended"]
    again = command(*asked)
    assert again.returncode == 1
    assert "[1/2] modules=query: is complete already" in again.stdout
    assert "\n[2/2] modules=nosuch\n" in again.stdout
    assert Run(swept / "modules=query").record["ended"] == ended
    assert (swept / "compare.html").read_text() == page


@pytest.mark.long
def test_one_request_stops_the_run_and_the_sweep(toy, tmp_path):
    recipe = toy(training={"num_train_epochs": 40, "eval_strategy": "no", "save_strategy": "no"})
    command = [sys.executable, "-m", "scalepeft", "sweep", recipe, "training.seed=[1,2]", "--output-dir", tmp_path / "swept"]
    first, second = Run(tmp_path / "swept" / "seed=1"), Run(tmp_path / "swept" / "seed=2")
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + 120
        while not any(line["step"] > 3 for line in first.lines()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors.splitlines()[-1].endswith("stopped at run 1 of 2 (seed=1); the same command goes on")
    assert "Traceback" not in errors
    assert first.record["status"] == "interrupted"
    assert first.last_checkpoint() is not None
    assert not second.path.exists()
    states = [p["status"] for p in json.loads((tmp_path / "swept" / "sweep.json").read_text())["points"]]
    assert states == ["interrupted", "pending"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert [run.record["status"] for run in (first, second)] == ["complete", "complete"]
    assert len([line for line in first.lines() if "loss" in line]) == 200, "it was resumed, not trained anew"
