"""The fault campaign: runs that are killed again and again arrive where the run arrives that nothing killed, to the byte.

    python benchmarks/faults.py [--layout one ddp zero3] [--kills 30] [--seed N]    until there are so many kills a layout
    python benchmarks/faults.py --cost [--pairs 8]         what agreeing on a stop at each step and a checkpoint a minute cost

A trial is one run of the toy of the tests, 150 steps with a checkpoint every 10, killed (SIGKILL) one to five times at random
before it is left to end: a worker, the launcher, or everything, at a random moment of its training or while a checkpoint is
written. What a kill left is looked at before the run goes on. Each trial that ends is added to
benchmarks/results/faults.json: the campaign may be stopped, and goes on when it is called again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from scalepeft import published
from scalepeft.run import Run, packages

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "faults.json"
LAYOUTS = {"one": None, "ddp": "multi_cpu", "zero3": "zero3"}
TARGETS = {"one": ("everything",), "ddp": ("worker", "launcher", "everything"), "zero3": ("worker", "launcher", "everything")}
STEPS, EVERY = 150, 10
TRAINING = {
    "num_train_epochs": STEPS // 5,
    "train_sampling_strategy": "group_by_length",
    "neftune_noise_alpha": 5,
    "eval_strategy": "steps",
    "eval_steps": 25,
    "save_strategy": "steps",
    "save_steps": EVERY,
    "save_total_limit": 2,
}
BOUND = 0.02
"""The share of training that agreements, and a checkpoint a minute, may take."""
PATIENCE = 600
"""Seconds a session may take: one that takes more hangs, and that is a finding."""


class Session:
    """`scalepeft train` as a group of processes of its own."""

    def __init__(self, recipe: Path, layout: str, number: int = 0) -> None:
        self.run = Run(recipe.with_suffix(""))
        self.log = recipe.with_suffix(f".{number}.log")
        words = ["--launch", LAYOUTS[layout], "--num-processes", "2", "--cpu"] if LAYOUTS[layout] else []
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scalepeft", "train", str(recipe), *words],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self.started = time.monotonic()

    def steps(self) -> list[int]:
        """The training steps that this session has logged."""
        return [int(step) for step in re.findall(r"^step (\d+)/\d+  loss", self.log.read_text(), re.MULTILINE)]

    def wait(self, condition: Callable[[], bool] = lambda: False) -> bool:
        """Wait until something is so, or the session has ended; whether it is so."""
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() - self.started > PATIENCE:
                raise TimeoutError(self.log.read_text()[-3000:])
            time.sleep(0.0005)
        return True

    def kill(self, target: str, draw: random.Random) -> None:
        """SIGKILL a worker, the launcher or everything, and wait until all processes are gone."""
        launcher = psutil.Process(self.process.pid)
        everything = [launcher, *launcher.children(recursive=True)]
        workers = [process for process in everything[1:] if os.getsid(process.pid) == process.pid]
        chosen = {"worker": [draw.choice(workers or everything)], "launcher": [launcher]}.get(target, everything)
        for process in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(timeout=PATIENCE)
        _, alive = psutil.wait_procs(everything, timeout=PATIENCE)
        if alive:
            raise TimeoutError(f"{target} killed, and {len(alive)} processes live on")


def campaign(layout: str, wanted: int, seed: int) -> Iterator[dict[str, Any]]:
    """Trials of a layout until so many kills are done; the first run is the straight one."""
    with toys(16 if layout == "one" else 8) as write:
        straight = Session(write("straight"), layout)
        if straight.wait() or straight.process.returncode:
            raise RuntimeError(straight.log.read_text())
        number = 0
        while wanted > 0:
            number += 1
            found = trial(layout, write(f"trial{number}"), straight.run, random.Random(f"{layout} {seed} {number}"))  # noqa: S311  # moments, no secrets
            wanted -= len(found["kills"])
            yield found


def trial(layout: str, recipe: Path, straight: Run, draw: random.Random) -> dict[str, Any]:
    """Kill a run one to five times, let it end, and tell what was seen."""
    kills: list[dict[str, Any]] = []
    for number in range(draw.randint(1, 5)):
        session = Session(recipe, layout, number)
        done = published.step_of(last) if (last := session.run.last_checkpoint()) else 0
        target, where = draw.choice(TARGETS[layout]), draw.choice(("training", "save"))
        ready = session.wait(moment(session, where, done, draw))
        if not ready:  # it has ended
            break
        time.sleep(draw.uniform(0, 0.02))
        session.kill(target, draw)
        check_resumed(session, kills)
        kills.append({"target": target, "in_save": bool(published.leftovers(session.run.path)), **left(session.run)})
    session = Session(recipe, layout, 9)
    session.wait()
    check_resumed(session, kills)
    status = session.process.returncode
    same = status == 0 and all(
        (session.run.path / file).read_bytes() == (straight.path / file).read_bytes()
        for file in ("metrics.jsonl", "adapter/adapter_model.safetensors")
    )
    said = "" if status == 0 else session.log.read_text()[-2000:]
    return {"layout": layout, "kills": kills, "identical": same, "status": status, "said": said}


def moment(session: Session, where: str, done: int, draw: random.Random) -> Callable[[], bool]:
    """When to kill a session that begins after a step: while it writes a checkpoint, or after some step."""
    if where == "save":
        step = min(done + EVERY * draw.randint(1, 5), STEPS)
        return published.beside(session.run.path, step).exists
    step = min(done + draw.randint(1, 5 * EVERY), STEPS)
    return lambda: any(logged >= step for logged in session.steps())


def left(run: Run) -> dict[str, Any]:
    """What a kill left: the last checkpoint that has its name, and those among such that are not whole."""
    named = published.named(run.path)
    torn = [published.step_of(path) for path in named if published.flaw(path, contents=True)]
    return {"published": published.step_of(named[-1]) if named else 0, "torn": torn}


def check_resumed(session: Session, kills: list[dict[str, Any]]) -> None:
    """Add to the last kill where the session after it went on; of a session that took no step there is nothing to add."""
    if kills and (steps := session.steps()):
        kills[-1]["resumed_from"] = steps[0] - 1


def totals(trials: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """What is claimed, of each layout."""
    found = {}
    for layout in LAYOUTS:
        own = [each for each in trials if each["layout"] == layout]
        kills = [kill for each in own for kill in each["kills"]]
        went_on = [kill for kill in kills if "resumed_from" in kill]
        found[layout] = {
            "runs": len(own),
            "identical": sum(each["identical"] for each in own),
            "kills": len(kills),
            **{f"of {target}": sum(kill["target"] == target for kill in kills) for target in TARGETS[layout]},
            "in a save": sum(kill["in_save"] for kill in kills),
            "torn checkpoints used": sum(kill["resumed_from"] in kill["torn"] for kill in went_on),
            "steps lost": sum(max(kill["published"] - kill["resumed_from"], 0) for kill in went_on),
            "steps skipped": sum(max(kill["resumed_from"] - kill["published"], 0) for kill in went_on),
        }
    return found


@contextlib.contextmanager
def toys(batch: int) -> Iterator[Callable[[str], Path]]:
    """A function that writes the toy of the tests, under a name, into a folder that goes with the campaign."""
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest

    with tempfile.TemporaryDirectory(prefix="scalepeft-faults-") as name:
        folder = Path(name)
        makes = SimpleNamespace(mktemp=lambda made: (folder / made).mkdir() or folder / made)
        base = conftest.tiny_model.__wrapped__(conftest.tiny_tokenizer.__wrapped__(), makes)
        yield lambda run: conftest.write_toy(folder, base, run, training={**TRAINING, "per_device_train_batch_size": batch})


# --- what it costs ----------------------------------------------------------------------------------------------------------


def cost() -> dict[str, Any]:
    """The seconds of a step with and without the agreement, in turn within one run of two processes, and of a checkpoint."""
    recipe = ["quickstart", "training.bf16=false", "training.max_steps=120", "training.eval_on_start=false"]
    recipe += ["training.eval_strategy=no", "training.save_strategy=steps", "training.save_steps=30"]
    recipe += ["data.train.sample_rows=2000", "data.evaluation.test.sample_rows=32", "training.per_device_train_batch_size=8"]
    with tempfile.TemporaryDirectory(prefix="scalepeft-faults-") as name:
        file = Path(name) / "figures.json"
        words = [
            "--config_file",
            ROOT / "accelerate_configs/multi_cpu.yaml",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
        ]
        words += [__file__, "--measured", file, *recipe, f"training.output_dir={name}/run"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    agreement = statistics.mean(figures["agreement"])
    figures["agreement_seconds"] = agreement
    figures["step_seconds"] = {name: statistics.median(figures["steps"][name]) for name in figures["steps"]}
    figures["share"] = {
        "agreement": figures["step_seconds"]["with"] / figures["step_seconds"]["without"] - 1,
        "in its call, waiting for the slower process": agreement / figures["step_seconds"]["without"],
        "checkpoint a minute": statistics.median(figures["checkpoint"]) / 60,
        "of that hashing, flushing and publishing": statistics.median(figures["publishing"]) / 60,
    }
    return figures


def measured(file: Path, arguments: list[str]) -> int:
    """Train with every other step not agreed on, and write down how long steps, agreements and checkpoints took."""
    from scalepeft import published, ranks, recipe, resume, train
    from scalepeft.callbacks import StopRequest
    from scalepeft.console import quiet_upstream

    quiet_upstream()
    figures: dict[str, Any] = {"steps": {"with": [], "without": []}, "agreement": [], "checkpoint": [], "publishing": []}
    last, agreed, saved = [time.perf_counter()], [False], [True]
    asked, save = StopRequest._asked, resume.Resumable._save_checkpoint  # noqa: SLF001  # what is measured
    digests, publish = published.digests, published.publish

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG001  # upstream's
        agreed[0] = state.global_step % 2 == 0
        before = time.perf_counter()
        if agreed[0] and asked(self, args):
            raise RuntimeError("asked to stop")
        now = time.perf_counter()
        if agreed[0]:
            figures["agreement"].append(now - before)
        if not saved[0]:  # the step after a checkpoint is not like others
            figures["steps"]["with" if agreed[0] else "without"].append(now - last[0])
        last[0], saved[0] = now, False

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **options: Any) -> Any:
            before = time.perf_counter()
            found = function(*given, **options)
            figures[name].append(time.perf_counter() - before)
            saved[0] = True
            return found

        return called

    StopRequest.on_step_end = on_step_end  # type: ignore[method-assign]
    StopRequest.on_save = lambda *_, **__: None  # type: ignore[method-assign]
    resume.Resumable._save_checkpoint = timed("checkpoint", save)  # type: ignore[method-assign]  # noqa: SLF001
    published.digests, published.publish = timed("publishing", digests), timed("publishing", publish)
    train.train(recipe.load(arguments[0], arguments[1:]))
    if ranks.rank() == 0:
        # hashing and publishing are two parts of one checkpoint
        parts = figures["publishing"]
        figures["publishing"] = [sum(parts[at : at + 2]) for at in range(0, len(parts), 2)]
        file.write_text(json.dumps(figures), encoding="utf-8")
    return 0


def main() -> int:
    """Carry on the campaign, or measure the cost; fails when a claim does not hold."""
    if sys.argv[1:2] == ["--measured"]:
        return measured(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument(
        "--kills", type=int, default=30, help="that there shall be of each layout, those that are recorded counted"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the moments; another one each time when absent")
    parser.add_argument("--cost", action="store_true", help="measure what agreements and checkpoints cost")
    options = parser.parse_args()
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {"trials": []}
    if options.cost:
        kept["cost"] = cost() | {"versions": packages()}
        write(kept)
        print(json.dumps(kept["cost"]["share"], indent=1))
        return int(kept["cost"]["share"]["agreement"] + kept["cost"]["share"]["checkpoint a minute"] > BOUND)
    for layout in options.layout:
        done = totals(kept["trials"])[layout]["kills"]
        for found in campaign(layout, options.kills - done, time.time_ns() if options.seed is None else options.seed):
            kept["trials"].append(found | {"date": time.strftime("%Y-%m-%d"), "versions": packages()})
            write(kept)
            print(json.dumps(found), flush=True)
    print(json.dumps(kept["totals"], indent=1))
    return int(not holds(kept["totals"]))


def holds(found: dict[str, dict[str, int]]) -> bool:
    """Whether every run arrived where the straight one did, from whole checkpoints, the last ones."""
    bad = ("torn checkpoints used", "steps lost", "steps skipped")
    return all(of["identical"] == of["runs"] and not any(of[name] for name in bad) for of in found.values())


def write(kept: dict[str, Any]) -> None:
    """Keep the trials with their totals; a campaign that is stopped meanwhile leaves the old file or the new one."""
    kept["totals"] = totals(kept["trials"])
    beside = KEPT.with_suffix(".part")
    beside.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    beside.replace(KEPT)


if __name__ == "__main__":
    sys.exit(main())
