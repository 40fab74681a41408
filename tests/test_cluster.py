"""Claims about jobs on a real cluster: they train as one process does, and go on after whatever befalls them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cluster as slurm
import pytest
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
    "num_train_epochs": 40,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "steps",
    "save_steps": 20,
    "save_total_limit": 2,
}
STEPS = 200
TWO = "--nodes=2"


class Jobs:
    """A folder of a user of the cluster, from which jobs are queued."""

    def __init__(self, made: Cluster, folder: Path, base: Path) -> None:
        self.cluster, self.folder, self.base = made, folder, base

    def recipe(self, name: str, **changes) -> str:
        """A recipe of 16 rows a step, whatever the number of processes; its file."""
        training = {**LONG, **changes.pop("training", {})}
        changes = {"model": STILL, "adapter": {"lora_dropout": 0.0}, "global_batch_size": 16, **changes}
        return str(write_toy(self.folder, self.base, name, training=training, **changes).relative_to(self.folder))

    def train(self, *words: str, options: tuple[str, ...] = (), **environment: str) -> int:
        """Queue a training by `sbatch OPTIONS slurm/train.sh WORDS`."""
        return self.cluster.sbatch(*options, TRAIN, *words, cwd=self.folder, **environment)

    def run(self, name: str) -> Run:
        return Run(self.folder / name)

    def log(self, job: int | str) -> str:
        return next(iter(self.folder.rglob(f"*-{job}.log"))).read_text()

    def complete(self, job: int | str, timeout: float = 400) -> dict[str, str]:
        """Wait for a job, which must end COMPLETED."""
        state = self.cluster.ended(job, timeout)
        assert state == "COMPLETED", f"{state}\n{self.log(job)}"
        assert "Traceback" not in self.log(job)
        return self.cluster.job(job)

    def failed(self, job: int | str, told: str, timeout: float = 200) -> None:
        """Wait for a job, which must end FAILED and say in one line why."""
        assert self.cluster.ended(job, timeout) == "FAILED", self.log(job)
        said = self.log(job)
        assert len([line for line in said.splitlines() if told in line]) == 1, said
        assert "Traceback" not in said

    def at_step(self, job: int | str, name: str, step: int) -> None:
        """Wait until a job that is training has done a step."""

        def there() -> bool:
            assert self.cluster.state(job) not in slurm.ENDED, self.log(job)
            return any(line["step"] >= step for line in self.run(name).lines())

        self.cluster.until(there, 300, lambda: self.log(job))

    def restarted(self, job: int | str, times: int) -> None:
        """Wait until Slurm has started a job anew so many times."""
        self.cluster.until(
            lambda: self.cluster.state(job) == "RUNNING" and int(self.cluster.job(job)["Restarts"]) == times,
            120,
            lambda: f"{self.cluster.job(job)}\n{self.log(job)}",
        )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, tiny_model) -> Iterator[Jobs]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm"), nodes=3, cpus=2, grace=60) as made:
        yield Jobs(made, tmp_path_factory.mktemp("user"), tiny_model)


@pytest.fixture(scope="module")
def queued(jobs) -> dict[str, int]:
    """What needs nobody's hand, queued together: the machine is never idle, and two jobs share their first node."""
    pair = [TWO, "--nodelist=node1,node2"]
    chain = ["--then", "evaluate data.evaluation.more.path=gone.csv", "--then", "merge"]
    told = jobs.cluster.run("scalepeft", "submit", jobs.recipe("straight"), *chain, cwd=jobs.folder)
    numbers = {name: int(number) for number, name in re.findall(r"^job (\d+): (\w+)", told, re.MULTILINE)}
    return numbers | {
        "ddp": jobs.train(jobs.recipe("ddp"), options=(*pair,)),
        "zero3": jobs.train(jobs.recipe("zero3"), "--launch", "zero3", "--cpu", options=(*pair,)),
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


@pytest.mark.usefixtures("queued")
def test_what_cannot_begin_fails_at_once_with_a_line(jobs):
    typo = jobs.recipe("typo", training={"learning_rat": 1e-3})
    locked = jobs.folder / "locked"
    locked.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", locked], check=True)
    try:
        found = {
            jobs.train("gone.yaml"): "gone.yaml: no such recipe",
            jobs.train(typo): "training (TrainingArguments) has no 'learning_rat'; did you mean 'learning_rate'?",
            jobs.train(jobs.recipe("locked_out"), "training.output_dir=locked/run"): "cannot be written",
            jobs.train(jobs.recipe("layout"), "--launch", "zero33"): "did you mean 'zero3'?",
            jobs.train(
                jobs.recipe("single"), "--launch", "cpu", options=(TWO,)
            ): "is the layout of one process, and the job has 2",
        }
        for job, told in found.items():
            jobs.failed(job, told)
    finally:
        subprocess.run(["umount", locked], check=True)


def test_stopped_by_signal_and_by_hand_it_goes_on(jobs, queued):
    job = jobs.train(jobs.recipe("signals"))
    jobs.at_step(job, "signals", 10)
    jobs.cluster.run("scancel", "--signal=TERM", job)
    jobs.restarted(job, 1)
    before = jobs.run("signals").last_checkpoint().name
    jobs.at_step(job, "signals", int(before.rpartition("-")[2]) + 10)
    jobs.cluster.run("scontrol", "requeue", job)
    jobs.restarted(job, 2)
    jobs.complete(job)
    assert "asked to stop; queued again" in jobs.log(job)
    jobs.complete(queued["train"])
    check_as_if_nothing_had_happened(jobs.run("signals"), jobs.run("straight"))


def test_a_time_limit_is_survived(jobs, queued):
    job = jobs.train(jobs.recipe("limit"), options=("--time=1", "--signal=B:USR1@50"))
    found = jobs.complete(job)
    assert int(found["Restarts"]) > 0
    assert jobs.log(job).count("its time was nearly up; queued again") == int(found["Restarts"])
    jobs.complete(queued["train"])
    check_as_if_nothing_had_happened(jobs.run("limit"), jobs.run("straight"))


def test_restarts_have_a_cap(jobs):
    job = jobs.train(jobs.recipe("capped"), SCALEPEFT_MAX_RESTARTS="0")
    jobs.at_step(job, "capped", 1)
    jobs.cluster.run("scancel", "--signal=TERM", job)
    jobs.failed(job, "SCALEPEFT_MAX_RESTARTS allows no more than 0 restarts; the same command goes on")
    assert jobs.run("capped").record["status"] == "interrupted"


def test_a_full_disk_fails_and_keeps_what_was_saved(jobs, queued):
    small = jobs.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", small], check=True)
    try:
        job = jobs.train(jobs.recipe("full"), "training.output_dir=small/run", "training.save_total_limit=null")
        jobs.failed(job, "the disk is full; kept: small/run/checkpoint-")
        kept = jobs.run("small/run").last_checkpoint()
        subprocess.run(["mount", "-o", "remount,size=100m", small], check=True)
        job = jobs.train("full.yaml", "training.output_dir=small/run", "training.save_total_limit=null")
        jobs.complete(job)
        assert kept is not None
        jobs.complete(queued["train"])
        check_as_if_nothing_had_happened(jobs.run("small/run"), jobs.run("straight"))
    finally:
        subprocess.run(["umount", small], check=True)


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
    assert len(pairs) == STEPS
    for one, other in pairs:
        assert (one["step"], one["learning_rate"]) == (other["step"], other["learning_rate"])
        assert max(relative(one[figure], other[figure]) for figure in ("loss", "grad_norm")) < CLOSE, one["step"]
    weights = [load_file(of.path / "adapter/adapter_model.safetensors") for of in (straight, run)]
    assert max(float((weights[1][k] - v).norm() / v.norm()) for k, v in weights[0].items()) < CLOSE


def test_two_jobs_on_one_first_node_meet_at_ports_of_their_own(jobs, queued):
    ports = []
    for name in ("ddp", "zero3"):
        found = jobs.complete(queued[name])
        assert found["BatchHost"] == "node1"
        ports += {int(port) for port in re.findall(r"--main_process_port (\d+)", jobs.log(queued[name]))}
    starts = [jobs.cluster.job(queued[name]) for name in ("ddp", "zero3")]
    assert max(x["StartTime"] for x in starts) < min(x["EndTime"] for x in starts)  # they ran at once
    assert len(set(ports)) == 2


def test_preempted_and_then_without_a_node_it_goes_on(jobs, queued):
    job = jobs.train(jobs.recipe("hard"), options=(TWO, "--nodelist=node1,node3", "--exclusive"))
    jobs.at_step(job, "hard", 10)
    urgent = jobs.cluster.sbatch("--partition=high", "--exclusive", "--nodelist=node3", "--wrap=sleep 1", cwd=jobs.folder)
    assert jobs.cluster.ended(urgent) == "COMPLETED"
    jobs.restarted(job, 1)
    assert "it was pre-empted; queued again" in jobs.log(job)
    assert jobs.run("hard").last_checkpoint() is not None
    at = int(jobs.run("hard").last_checkpoint().name.rpartition("-")[2])
    jobs.at_step(job, "hard", at + 30)
    jobs.cluster.crash("node3")
    jobs.cluster.until(lambda: jobs.cluster.state(job) == "PENDING", 120, lambda: jobs.log(job))
    jobs.cluster.boot("node3")
    jobs.complete(job)
    jobs.complete(queued["ddp"])
    check_as_if_nothing_had_happened(jobs.run("hard"), jobs.run("ddp"))


def test_a_sweep_is_an_array_and_ends_in_a_comparison(jobs):
    words = [jobs.recipe("swept", training={"num_train_epochs": 1}), "adapter.r=[2,4]", "training.learning_rate=1e-3"]
    told = jobs.cluster.run("scalepeft", "sweep", *words, "--slurm", "--", "--job-name=grid", cwd=jobs.folder)
    numbers = {name: number for number, name in re.findall(r"^job (\d+): (\w+)", told, re.MULTILINE)}
    jobs.complete(numbers["compare"])
    folder = jobs.folder / "runs/swept-sweep"
    points = json.loads((folder / "sweep.json").read_text())["points"]
    assert [point["status"] for point in points] == ["complete", "complete"]
    assert (folder / "compare.html").is_file()
    assert {Run(folder / point["name"]).record["status"] for point in points} == {"complete"}
    again = jobs.cluster.run("scalepeft", "sweep", *words, "--slurm", "--dry-run", cwd=jobs.folder)
    assert "--array" not in again


def test_a_recipe_that_cannot_be_is_not_queued(jobs):
    before = jobs.cluster.run("squeue", "--noheader", "--format=%i").split()
    assert "did you mean 'learning_rate'" in jobs.cluster.run(
        "scalepeft", "submit", jobs.recipe("typo", training={"learning_rat": 1}), cwd=jobs.folder, check=False
    )
    assert not set(jobs.cluster.run("squeue", "--noheader", "--format=%i").split()) - set(before)
    refused = jobs.cluster.run(
        "scalepeft", "submit", jobs.recipe("nowhere"), "--", "--partition=gone", cwd=jobs.folder, check=False
    )
    assert "invalid partition specified: gone" in refused
    assert shutil.which("sbatch", path=jobs.cluster.environment["PATH"])
