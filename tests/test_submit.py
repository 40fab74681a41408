"""Jobs before Slurm has them: what a job runs, what becomes of it, the lines that queue it, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from scalepeft import cluster, stops, submit, sweep
from scalepeft.errors import UserError
from scalepeft.run import Run

HEAD = "NodeName=node1 Arch=x86_64 NodeAddr=10.0.0.11 NodeHostName=node1"


@pytest.fixture(autouse=True)
def job(monkeypatch, tmp_path):
    """A job of two nodes, in the folder it was queued from."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.chdir(tmp_path)


def plan(capsys, *words: object) -> list[str]:
    assert cluster.plan_main(["--head", HEAD, *map(str, words)]) == 0
    *found, last = capsys.readouterr().out.split("\0")
    assert last == ""
    return found


def test_a_job_of_two_nodes_meets_at_the_first_ones_address(capsys, toy, tmp_path):
    run, before, nodes, *arguments = plan(capsys, toy(), "training.max_steps=2", "--launch", "zero3", "--cpu")
    assert (run, before, nodes) == (str(tmp_path / "run"), "none", "2")
    launching = "--launch zero3 --cpu --num-processes 2 --num-machines 2 --main-process-ip 10.0.0.11 --main-process-port"
    assert arguments[:-1] == ["train", str(tmp_path / "run.yaml"), "training.max_steps=2", *launching.split()]
    assert 20000 <= int(arguments[-1]) < 32000


LAYOUTS = {
    (1, 0): "--launch cpu",
    (2, 0): "--launch multi_cpu --num-processes 2",
    (1, 0, "--num-processes", "4"): "--launch multi_cpu --num-processes 4",
    (1, 1): "--launch single_gpu",
    (1, 8): "--launch multi_gpu",
    (2, 1): "--launch multi_gpu",
    (2, 8, "--launch", "zero3"): "--launch zero3",
}


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_without_a_layout_every_gpu_has_a_process_or_every_node(capsys, toy, monkeypatch, case):
    nodes, gpus, *words = case
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", str(gpus))
    found = " ".join(plan(capsys, toy(), *words)[5:])
    assert found.partition(" --num-machines")[0] == LAYOUTS[case]


def test_without_a_recipe_it_is_that_of_the_front_page(capsys, assets):  # noqa: ARG001  # the assets must be there
    for words in ([], ["training.max_steps=2"]):
        run, _, _, *arguments = plan(capsys, *words)
        assert run == "runs/quickstart"
        assert arguments[: len(words) + 3] == ["train", "quickstart", *words, "--launch"]


def test_ports_differ_between_neighbours_and_between_restarts():
    jobs = [(job, restarts) for job in range(100, 140) for restarts in range(5)]
    assert len({cluster.port(*job) for job in jobs}) == len(jobs)


def test_a_port_that_is_taken_is_passed_over():
    first = cluster.port(77, 0)
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert cluster.port(77, 0) != first


def test_a_job_started_anew_does_not_move_its_own_run_aside(capsys, toy, train, monkeypatch):
    recipe = toy(training={"max_steps": 2, "eval_strategy": "no", "eval_on_start": False})
    train(recipe)
    # complete: there is nothing to do, on one node and in one process
    assert plan(capsys, recipe, "--launch", "zero3")[1:] == ["", "1", "train", str(recipe)]
    assert plan(capsys, recipe, "--fresh")[1:3] == ["none", "2"]
    assert recipe.with_name("run.1").is_dir()
    train(recipe)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert plan(capsys, recipe, "--fresh")[2] == "1"
    assert not recipe.with_name("run.2").exists()


def test_a_task_of_an_array_takes_its_words_from_the_file(capsys, toy, monkeypatch, tmp_path):
    (tmp_path / "array.json").write_text(json.dumps([["gone.yaml"], [str(toy()), "adapter.r=2"]]))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert plan(capsys, "--points", "array.json")[3:6] == ["train", str(tmp_path / "run.yaml"), "adapter.r=2"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with pytest.raises(UserError, match=r"array.json: has no task 2"):
        plan(capsys, "--points", "array.json")


def test_a_job_that_was_started_anew_too_often_ends(capsys, toy, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "21")
    with pytest.raises(UserError, match=r"started anew 21 times; SCALEPEFT_MAX_RESTARTS allows 20"):
        plan(capsys, toy())


VERDICTS = {
    "complete": ("complete", "old", "", 0, 0),
    "complete before the job began": ("complete", "", "", 0, 0),
    "complete, and what should lengthen it died": ("complete", "now", "", 0, 1),
    "stopped by a signal": ("interrupted", "old", "", 0, cluster.REQUEUE),
    "stopped in the job before, and dead at its start in this one": ("interrupted", "now", "", 0, 1),
    "stopped, and restarted as often as may be": ("interrupted", "old", "", 3, 1),
    "killed": ("running", "old", "", 0, 1),
    "killed by its time limit before it could save": ("running", "old", "its time was nearly up", 0, cluster.REQUEUE),
    "warned before it had a directory": (None, "none", "its time was nearly up", 0, cluster.REQUEUE),
    "dead before it had a directory": (None, "none", "", 0, 1),
    "failed": ("failed", "old", "", 0, 1),
    "failed while it was pre-empted": ("failed", "old", "it was pre-empted", 0, 1),
    "failed because a node was lost": ("failed", "old", cluster.LOST, 0, cluster.REQUEUE),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_is_by_the_record_of_this_job_and_what_befell_it(case, tmp_path):
    status, before, cause, restarts, expected = VERDICTS[case]
    run = Run(tmp_path)
    if status:
        (tmp_path / "run.json").write_text(json.dumps({"status": status, "reason": "why"}))
    if before == "now":
        before = cluster._stamp(run)
    found, told = cluster.verdict(run, before, cause=cause, restarts=restarts, most=3)
    assert found == expected, told
    assert told.startswith(f"{tmp_path}: ")
    assert "\n" not in told


def test_a_run_that_a_person_stopped_by_the_file_is_not_queued_again(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"status": "interrupted", "reason": "why"}))
    stops.mark(tmp_path, by_file=True)
    told = f"{tmp_path}: stopped by the file STOP; the same command goes on"
    assert cluster.verdict(run, "old", cause="it was pre-empted", restarts=0, most=3) == (1, told)
    stops.mark(tmp_path)
    assert cluster.verdict(run, "old", cause="", restarts=0, most=3)[0] == cluster.REQUEUE


def test_preemption_is_read_from_slurms_own_words():
    shown = "JobId=2 PreemptEligibleTime=2026-11-26T00:03:16 PreemptTime={} SuspendTime=None"
    assert not cluster.preempted(shown.format("None"))
    assert cluster.preempted(shown.format("2026-11-26T00:05:00"))


def test_a_dry_run_is_a_script_that_queues_a_chain(capsys, toy, tmp_path):
    recipe = toy()
    words = ["--launch", "zero3", "--nodes", "2", "--gpus-per-node", "4", "--then", "evaluate", "--then", "merge"]
    assert submit.main([str(recipe), "adapter.r=2", *words, "--dry-run", "--", "--partition=a100"]) == 0
    scripts = submit.scripts()
    assert capsys.readouterr().out.splitlines() == [
        (
            f"train=$(sbatch --parsable --job-name=run --output=logs/%x-%j.log --nodes=2 --gpus-per-node=4 --partition=a100 "
            f"{scripts}/train.sh {recipe} adapter.r=2 --launch zero3)"
        ),
        (
            f"evaluate=$(sbatch --parsable --dependency=afterok:$train --kill-on-invalid-dep=yes --job-name=run-evaluate "
            f"--output=logs/%x-%j.log --gpus-per-node=1 --partition=a100 {scripts}/evaluate.sh {tmp_path}/run)"
        ),
        (
            f"merge=$(sbatch --parsable --dependency=afterok:$evaluate --kill-on-invalid-dep=yes --job-name=run-merge "
            f"--output=logs/%x-%j.log --partition=a100 {scripts}/merge.sh {tmp_path}/run --output {tmp_path}/run-merged)"
        ),
    ]
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["training.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["data.train.path=gone.csv"], "gone.csv does not exist"),
        (["--launch", "zero33"], "did you mean 'zero3'?"),
        (["--launch", "cpu", "--nodes", "2"], "is the layout of one process, and the job has 2 nodes"),
        (["--launch", "zero3"], "needs GPUs: give --gpus-per-node N, or --cpu"),
        (["--launch", "zero3", "--gpus-per-node", "2", "--num-processes", "4"], "4 are more than 1 x 2 GPUs"),
        (["--nodes", "2", "--num-processes", "3"], "3 cannot be divided evenly among 2 nodes"),
        (["--nodes", "0"], "--nodes: is below 1"),
        (["--then", "evalute"], "'evalute' cannot follow a training; did you mean 'evaluate'?"),
        (["--then", "push"], "names no repository"),
        (["--then", "merge", "--then", "merge"], "merge is given twice"),
    ],
)
def test_nonsense_is_refused_before_it_waits_in_a_queue(toy, words, told):
    with pytest.raises(UserError) as error:
        submit.main([str(toy()), *words, "--dry-run"])
    (problem,) = error.value.problems
    assert told in problem
    assert not Path("logs").exists()


def test_gpus_that_sbatch_is_asked_for_count_too(toy, capsys):
    submit.main([str(toy()), "--launch", "zero3", "--then", "merge", "--dry-run", "--", "--gres=gpu:4", "--time=10"])
    training, merging = capsys.readouterr().out.splitlines()
    assert " --gres=gpu:4 --time=10 " in training
    assert "gres" not in merging
    assert " --time=10 " in merging


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
def test_shellcheck_finds_nothing_in_the_scripts():
    names = sorted(path.name for path in submit.scripts().glob("*.sh"))
    told = subprocess.run(["shellcheck", "-x", *names], cwd=submit.scripts(), capture_output=True, text=True, check=False)
    assert told.stdout == ""


def test_without_slurm_it_says_so(toy, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no sbatch here"):
        submit.main([str(toy())])


def test_a_sweep_as_jobs_is_an_array_and_a_comparison(toy, capsys, tmp_path):
    recipe = toy()
    sweep.main([str(recipe), "adapter.r=[2,4]", "--output-dir", "s", "--slurm", "--dry-run", "--", "--time=10"])
    runs, compare = capsys.readouterr().out.splitlines()
    assert "--array=0-1 --job-name=s --output=logs/%x-%A_%a.log --nodes=1 --time=10" in runs
    assert runs.endswith("/train.sh --points s/array.json)")
    assert "--dependency=afterany:$runs" in compare
    assert compare.endswith(f"/compare.sh {recipe} 'adapter.r=[2, 4]' --output-dir s)")
    assert not (tmp_path / "s").exists()


def test_options_of_jobs_go_with_slurm(toy):
    for words in (["--nodes", "2"], ["--launch", "zero3"], ["--", "--time=1"]):
        with pytest.raises(UserError, match="go with --slurm"):
            sweep.main([str(toy()), "adapter.r=[2,4]", *words])
