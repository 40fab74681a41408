"""Claims about jobs on a real cluster: they train as one process does, and go on after whatever befalls them.

With SCALEPEFT_RECORD_FAULTS=FILE each fault appends to FILE what was seen; benchmarks/faults_cluster.py makes figures of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cluster as slurm
import pytest
import test_docs
from cluster import Cluster
from conftest import write_toy
from safetensors.torch import load_file

from scalepeft.run import Run

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())]

TRAIN = slurm.ROOT / "slurm/train.sh"
CLOSE = 1e-5
"""The layout contract in fp32, as in test_layout."""
STILL = {"config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
LONG = {
    "per_device_train_batch_size": 1,
    "num_train_epochs": 16,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "steps",
    "save_steps": 10,
    "save_total_limit": 2,
    "learning_rate": 1e-3,
}
STEPS = 80


@dataclass(frozen=True)
class Layout:
    """How a job is queued, and the run that nothing disturbed."""

    straight: str
    options: tuple[str, ...]
    words: tuple[str, ...] = ()


LAYOUTS = {
    "1 process": Layout("straight", ("--nodes=1", "--nodelist=node3")),
    "DDP on 2 nodes": Layout("ddp", ("--nodes=2", "--nodelist=node2,node3")),
    "ZeRO-3 on 2 nodes": Layout("zero3", ("--nodes=2", "--nodelist=node2,node3"), ("--launch", "zero3", "--cpu")),
}
TIME_LIMIT = "time limit"
GRACEFUL = (TIME_LIMIT, "scancel --signal", "scontrol requeue", "pre-emption")
"""Faults before which there is time to save."""
TOGETHER = [
    ("1 process", ("scancel --signal", "scontrol requeue", TIME_LIMIT)),
    ("DDP on 2 nodes", ("pre-emption", "lost node")),
]
"""Layouts and the faults that befall one job after the other: the short form."""
ALONE = [(layout, (fault,)) for layout in LAYOUTS for fault in (*GRACEFUL, "lost node")]
ALONE += [(layout, ("lost first node",)) for layout in LAYOUTS if layout != "1 process"]
CASES = [pytest.param(*case, id=f"{case[0]}, {', '.join(case[1])}") for case in TOGETHER]
CASES += [pytest.param(*case, id=f"{case[0]}, {case[1][0]}, alone", marks=pytest.mark.long) for case in ALONE]


class Jobs:
    """A folder of a user of the cluster, from which jobs are queued."""

    def __init__(self, made: Cluster, folder: Path, base: Path) -> None:
        self.cluster, self.folder, self.base = made, folder, base

    def recipe(self, name: str, **changes) -> str:
        """A recipe of 16 rows a step, whatever the number of processes; its file."""
        training = {**LONG, "output_dir": name, **changes.pop("training", {})}
        changes = {"model": STILL, "adapter": {"lora_dropout": 0.0}, "global_batch_size": 16, **changes}
        return str(write_toy(self.folder, self.base, name, training=training, **changes).relative_to(self.folder))

    def train(self, *words: str, options: tuple[str, ...] = (), **environment: str) -> int:
        """Queue a training by `sbatch OPTIONS slurm/train.sh WORDS`."""
        return self.cluster.sbatch(*options, TRAIN, *words, cwd=self.folder, **environment)

    def submit(self, *words: str) -> dict[str, int]:
        """Run a verb that queues jobs; their numbers by name."""
        told = self.cluster.run("scalepeft", *words, cwd=self.folder)
        return {name: int(number) for number, name in re.findall(r"^job (\d+): (\w+)", told, re.MULTILINE)}

    def run(self, name: str) -> Run:
        return Run(self.folder / name)

    def log(self, job: int) -> str:
        return "".join(path.read_text() for path in self.folder.rglob(f"*-{job}.log"))

    def complete(self, job: int, timeout: float = 900) -> dict[str, str]:
        """Wait for a job, which must end COMPLETED."""
        state = self.cluster.ended(job, timeout)
        assert state == "COMPLETED", f"{state}\n{self.log(job)}"
        assert "Traceback" not in self.log(job)
        return self.cluster.job(job)

    def failed(self, job: int, told: str) -> None:
        """Wait for a job, which must end FAILED and say in one line why."""
        assert self.cluster.ended(job) == "FAILED", self.log(job)
        said = self.log(job)
        assert len([line for line in said.splitlines() if told in line]) == 1, said
        assert "Traceback" not in said

    def at_step(self, job: int, name: str, step: int) -> None:
        """Wait until a job that is training has done a step."""

        def there() -> bool:
            assert self.cluster.state(job) not in slurm.ENDED, self.log(job)
            return self.step(name) >= step

        self.cluster.until(there, 300, lambda: self.log(job))

    def step(self, name: str) -> int:
        """The last step that is logged."""
        return max((line["step"] for line in self.run(name).lines()), default=0)

    def restarts(self, job: int) -> int:
        return int(self.cluster.job(job)["Restarts"])

    def restarted(self, job: int, times: int) -> None:
        """Wait until Slurm has started a job anew so many times."""

        def started() -> bool:
            found = self.cluster.job(job)
            return found["JobState"] == "RUNNING" and int(found["Restarts"]) >= times

        self.cluster.until(started, 200, lambda: f"{self.cluster.job(job)}\n{self.log(job)}")

    def strike(self, job: int, fault: str) -> float:
        """Let something befall a job that runs on node3, and on it alone of those that run there; when that was."""
        made, struck = self.cluster, time.time()
        if fault == TIME_LIMIT:  # which Slurm looks at every 30 s: however fast the machine, the training is not done by then
            made.run("scancel", "--signal=STOP", job)
            hours, minutes, _ = made.job(job)["RunTime"].rpartition("-")[2].split(":")
            made.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
            made.until(lambda: "the time is nearly up" in self.log(job), 120)
            times, struck = self.restarts(job) + 1, time.time()
            made.run("scancel", "--signal=CONT", job)
            self.restarted(job, times)
            made.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
        elif fault == "scancel --signal":
            made.run("scancel", "--signal=TERM", job)
        elif fault == "scontrol requeue":
            made.run("scontrol", "requeue", job)
        elif fault == "pre-emption":
            words = ("--partition=high", "--cpus-per-task=4", "--nodelist=node3", "--output=/dev/null", "--wrap=sleep 1")
            assert made.ended(made.sbatch(*words, cwd=self.folder)) == "COMPLETED"
        elif fault.startswith("lost"):
            node = made.job(job)["BatchHost"] if "first" in fault else "node3"
            made.crash(node)
            made.until(lambda: made.state(job) != "RUNNING", 120, lambda: self.log(job))
            made.boot(node)
        return struck

    def begins(self, job: int, name: str) -> float:
        """Wait until a job trains; the seconds from its start to its first step."""
        self.restarted(job, 0)
        started = time.time()
        self.at_step(job, name, 1)
        return time.time() - started

    def goes_on(self, job: int, name: str, restarts: int, struck: float) -> dict[str, float]:
        """Wait until a job that was struck trains again; steps lost, and seconds to the start and from there to a step."""
        self.restarted(job, restarts)
        started, step, saved = time.time(), self.step(name), _step(self.run(name).last_checkpoint())
        record = self.run(name).path / "run.json"
        self.cluster.until(lambda: record.stat().st_mtime > started and self.step(name) > saved, 300, lambda: self.log(job))
        return {"lost": step - saved, "queued": started - struck, "first step": time.time() - started}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, tiny_model) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("user")
    with contextlib.ExitStack() as stack:
        for name, options in {"locked": "ro", "small": "size=300k"}.items():
            (folder / name).mkdir()
            if os.geteuid() == 0:  # before the nodes see the file systems
                subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder / name], check=True)
                stack.callback(subprocess.run, ["umount", "--lazy", folder / name], check=True)
        made = stack.enter_context(slurm.cluster(tmp_path_factory.mktemp("slurm"), nodes=3, cpus=4, grace=60))
        yield Jobs(made, folder, tiny_model)


@pytest.fixture(scope="module")
def queued(jobs) -> dict[str, int]:
    """What needs nobody's hand, queued together: the machine is never idle, and two jobs share their first node."""
    pair = ("--nodes=2", "--nodelist=node1,node2")
    chain = ("--then", "evaluate data.evaluation.more.path=gone.csv", "--then", "merge")
    return {
        **jobs.submit("submit", jobs.recipe("straight"), *chain, "--", "--nodelist=node1"),
        "ddp": jobs.train(jobs.recipe("ddp"), options=pair),
        "zero3": jobs.train(jobs.recipe("zero3"), "--launch", "zero3", "--cpu", options=pair),
    }


def adapter(run: Run) -> bytes:
    return (run.path / "adapter/adapter_model.safetensors").read_bytes()


def check_as_if_nothing_had_happened(run: Run, straight: Run) -> None:
    def losses(of: Run) -> list[tuple[float, ...]]:
        return [(x["step"], x["loss"], x["grad_norm"], x["learning_rate"]) for x in of.lines() if "loss" in x]

    assert run.record["status"] == "complete"
    assert [step for step, *_ in losses(run)] == list(range(1, STEPS + 1))
    assert losses(run) == losses(straight)
    assert adapter(run) == adapter(straight)


def relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other), 1e-12)


def _step(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


@pytest.mark.usefixtures("queued")
def test_what_cannot_begin_fails_at_once_with_a_line(jobs):
    typo = jobs.recipe("typo", training={"learning_rat": 1e-3})
    alone = jobs.recipe("alone")
    found = {
        jobs.train("gone.yaml"): "gone.yaml: no such recipe",
        jobs.train(typo): "training (TrainingArguments) has no 'learning_rat'; did you mean 'learning_rate'?",
        jobs.train(alone, "--launch", "zero33"): "did you mean 'zero3'?",
        jobs.train(alone, "--launch", "cpu", options=("--nodes=2",)): "is the layout of one process, and the job has 2 nodes",
        jobs.train(alone, options=("--gpus-per-node=4",)): "--launch multi_gpu: needs GPUs, and none is seen here",
        jobs.train(alone, SCALEPEFT_ENVIRONMENT="gone.sh"): "gone.sh: No such file",
    }
    if jobs.cluster.namespaces:
        found[jobs.train(alone, "training.output_dir=locked/run")] = "locked cannot be written"
    for job, told in found.items():
        jobs.failed(job, told)


@pytest.mark.parametrize(("layout", "faults"), CASES)
def test_whatever_befalls_a_job_it_goes_on(jobs, queued, layout, faults):
    chosen = LAYOUTS[layout]
    name = re.sub(r"\W+", "-", f"{layout} {' '.join(faults)}")
    if "lost node" in faults and not jobs.cluster.namespaces:
        pytest.skip("a node that is no namespace cannot be lost whole")
    asked = (*chosen.options, "--cpus-per-task=4", "--time=60", "--signal=B:USR1@100")
    job = jobs.train(jobs.recipe(name), *chosen.words, options=asked)
    fresh, seen = jobs.begins(job, name), []
    for number, fault in enumerate(faults, 1):
        at = jobs.step(name) + 10
        jobs.at_step(job, name, at if fault in GRACEFUL else max(at, LONG["save_steps"] + 3))
        struck = jobs.strike(job, fault)
        seen.append({"fault": fault, **jobs.goes_on(job, name, number, struck), "first step when new": fresh})
        assert seen[-1]["lost"] <= (0 if fault in GRACEFUL else LONG["save_steps"])
    found = jobs.complete(job)
    assert int(found["Restarts"]) == len(faults)
    jobs.complete(queued[{"straight": "train"}.get(chosen.straight, chosen.straight)])
    check_as_if_nothing_had_happened(jobs.run(name), jobs.run(chosen.straight))
    if file := os.environ.get("SCALEPEFT_RECORD_FAULTS"):
        with Path(file).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"layout": layout, "together": len(faults) > 1, **each}) + "\n" for each in seen)


def test_restarts_have_a_cap(jobs):
    job = jobs.train(jobs.recipe("capped"), SCALEPEFT_MAX_RESTARTS="0")
    jobs.at_step(job, "capped", 1)
    jobs.strike(job, "scancel --signal")
    jobs.failed(job, "SCALEPEFT_MAX_RESTARTS allows no more than 0 restarts; the same command goes on")
    assert jobs.run("capped").record["status"] == "interrupted"


def test_the_file_stop_ends_a_job_until_somebody_queues_it_again(jobs):
    job = jobs.train(jobs.recipe("by-hand"))
    jobs.at_step(job, "by-hand", 1)
    (jobs.run("by-hand").path / "STOP").touch()
    jobs.failed(job, "stopped by the file STOP; the same command goes on")
    assert (jobs.restarts(job), jobs.run("by-hand").record["status"]) == (0, "interrupted")


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can be mounted by root alone")
def test_a_full_disk_fails_and_keeps_what_was_saved(jobs, queued):
    jobs.recipe("full", training={"output_dir": "small/run", "save_total_limit": None})
    jobs.failed(jobs.train("full.yaml"), "the disk is full; kept: small/run/checkpoint-")
    assert jobs.run("small/run").last_checkpoint() is not None
    subprocess.run(["mount", "-o", "remount,size=100m", jobs.folder / "small"], check=True)
    jobs.complete(jobs.train("full.yaml"))
    jobs.complete(queued["train"])
    check_as_if_nothing_had_happened(jobs.run("small/run"), jobs.run("straight"))


def test_when_a_job_of_a_chain_fails_those_after_it_are_cancelled(jobs, queued):
    jobs.complete(queued["train"])
    jobs.failed(queued["evaluate"], "gone.csv does not exist")
    assert jobs.cluster.ended(queued["merge"]) == "CANCELLED"
    assert not (jobs.folder / "straight-merged").exists()


@pytest.mark.parametrize(("name", "engine"), [("ddp", "MULTI_CPU"), ("zero3", "DEEPSPEED")])
def test_two_nodes_train_as_one_process_does(jobs, queued, name, engine):
    jobs.complete(queued["train"])
    jobs.complete(queued[name])
    straight, run = jobs.run("straight"), jobs.run(name)
    assert (run.record["layout"]["processes"], run.record["layout"]["engine"]) == (2, engine)
    pairs = list(zip(straight.lines(), run.lines(), strict=True))
    assert [one["step"] for one, _ in pairs] == [*range(1, STEPS + 1), STEPS]  # the last is the evaluation
    for one, other in pairs:
        assert one.get("learning_rate") == other.get("learning_rate")
        figures = [key for key in ("loss", "grad_norm", "eval_loss") if key in one]
        assert max(relative(one[figure], other[figure]) for figure in figures) < CLOSE, (one, other)
    weights = [load_file(of.path / "adapter/adapter_model.safetensors") for of in (straight, run)]
    assert max(float((weights[1][k] - v).norm() / v.norm()) for k, v in weights[0].items()) < CLOSE


def test_two_jobs_on_one_first_node_meet_at_ports_of_their_own(jobs, queued):
    found = [jobs.complete(queued[name]) for name in ("ddp", "zero3")]
    ports = [re.findall(r"--main_process_port (\d+)", jobs.log(queued[name])) for name in ("ddp", "zero3")]
    assert {job["BatchHost"] for job in found} == {"node1"}
    assert max(job["StartTime"] for job in found) < min(job["EndTime"] for job in found)  # they ran at once
    assert [len(set(each)) for each in ports] == [1, 1]
    assert ports[0] != ports[1]


def test_a_sweep_is_an_array_and_ends_in_a_comparison(jobs):
    words = [jobs.recipe("swept", training={"num_train_epochs": 1}), "adapter.r=[2,4]", "training.learning_rate=1e-3"]
    jobs.complete(jobs.submit("sweep", *words, "--slurm", "--", "--time=10")["compare"])
    folder = jobs.folder / "runs/swept-sweep"
    points = json.loads((folder / "sweep.json").read_text())["points"]
    assert [(point["name"], point["status"]) for point in points] == [("r=2", "complete"), ("r=4", "complete")]
    assert (folder / "compare.html").is_file()
    assert {Run(folder / point["name"]).record["status"] for point in points} == {"complete"}
    again = jobs.cluster.run("scalepeft", "sweep", *words, "--slurm", "--dry-run", cwd=jobs.folder)
    assert "--array" not in again


def test_what_slurm_refuses_is_said_in_a_line(jobs):
    words = ("scalepeft", "submit", jobs.recipe("nowhere"), "--", "--partition=gone")
    refused = jobs.cluster.run(*words, cwd=jobs.folder, check=False)
    assert refused.startswith("train: sbatch: error: ")
    assert "invalid partition specified: gone" in refused
    assert refused.count("\n") == 1


@pytest.mark.long
def test_what_the_documentation_says_runs(jobs, assets):
    made, folder = jobs.cluster, jobs.folder / "newcomer"
    for name in ("recipes", "slurm"):
        shutil.copytree(slurm.ROOT / name, folder / name)
    (folder / "cache").mkdir()
    (folder / "cache/assets").symlink_to(assets)  # what the documented `scalepeft fetch` finds
    here = ("--gpus-per-node=8 --time=4:00:00 slurm/train.sh recipes/sft_lora.yaml", "slurm/train.sh quickstart --cpu")
    for command in test_docs.ON_A_CLUSTER:
        tiny = f"{test_docs.TINY} training.bf16=false" + (" training.output_dir=runs/sft" if "sft" in command else "")
        words = command.replace(*here)
        words = words.replace(" quickstart", f" quickstart {tiny}", 1) if " quickstart" in words else f"{words} {tiny}"
        said = made.run("bash", "-c", command if "fetch" in command else words, cwd=folder)
        assert "Traceback" not in said
    made.until(lambda: not made.run("squeue", "--noheader").strip(), 900)
    ended = dict(re.findall(r"JobId=(\d+) .*? JobState=(\w+)", made.run("scontrol", "--oneliner", "show", "jobs")))
    logs = {path.stem.rpartition("-")[2]: path for path in [*folder.glob("*.log"), *folder.glob("logs/*.log")]}
    assert len(logs) >= 10
    for number, path in logs.items():
        assert "Traceback" not in path.read_text()
        assert ended.get(number.partition("_")[0]) == "COMPLETED", path.read_text()
