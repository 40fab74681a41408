"""Launching: the layout files of accelerate_configs/, and the `accelerate launch` line that a command stands for."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scalepeft.console import note, quiet_upstream
from scalepeft.errors import UserError, did_you_mean, one_line
from scalepeft.stops import SIGNALS, Stop

_OF_OTHER_LAUNCHERS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which torchrun, accelerate or mpirun tell a process how many there are."""
ON_CPUS = 2
"""Processes of `--cpu` when nothing is said: the least that divides anything."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A launch file of accelerate: how many processes there are, and which engine drives them."""

    path: Path
    engine: str
    """NO, MULTI_GPU (DDP), DEEPSPEED, FSDP, or another word of accelerate's distributed_type."""
    processes: int
    use_cpu: bool


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines of a launch, in the words of `accelerate launch`; each of them is given the same line but for its rank."""

    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """An `accelerate launch` line."""

    environment: Mapping[str, str]
    arguments: Sequence[str]

    def __str__(self) -> str:
        given = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*given, "accelerate launch", *map(shlex.quote, self.arguments)])


def shipped() -> dict[str, Path]:
    """The launch files that come with the package, by their names and, for DeepSpeed's, by what follows `deepspeed_`."""
    here = Path(__file__).parent
    folder = next((f for f in (here / "accelerate_configs", here.parents[1] / "accelerate_configs") if f.is_dir()), here)
    found = {p.stem: p for p in sorted(folder.glob("*.yaml"))}
    return found | {name.removeprefix("deepspeed_"): p for name, p in found.items()}


def layout(name: str) -> Layout:
    """A shipped layout by its name, or that of a launch file. Raises UserError for what is neither."""
    known = shipped()
    path = known.get(name) or Path(name)
    if not path.is_file():
        names = [n for n in known if not n.startswith("deepspeed_")]
        told = did_you_mean(name, names) or f"; there are {', '.join(names)}, and files of `accelerate config`"
        raise UserError(f"command line: --launch: there is no layout {name!r}{told}")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        engine = given["distributed_type"]
        return Layout(
            path=path,
            engine="NO" if engine is False else str(engine).upper(),  # a bare NO is no word to YAML
            processes=int(given.get("num_processes", 1)),
            use_cpu=bool(given.get("use_cpu")),
        )
    except (OSError, ValueError, OverflowError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        told = f"lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{path}: is no launch file of accelerate: {told}") from None


def line(
    chosen: Layout, module: str, arguments: Sequence[str], *, processes: int | None, cpu: bool, machines: Machines
) -> Line:
    """The line that runs a module on a layout.

    `processes` counts those of all machines; when it is None, every GPU of these gets one, or with `cpu` there are two.
    Raises UserError for a launch that would not be what was asked for.
    """
    number, on_cpus = machines.num_machines, cpu or chosen.use_cpu
    devices = 0 if on_cpus else _gpus()
    if not on_cpus and not devices:
        told = "needs GPUs, and none is seen here"
        raise UserError(
            f"command line: --launch {chosen.path.stem}: {told}; {_without_gpus(chosen)}; `scalepeft doctor` says why"
        )
    if on_cpus:
        runs_on_cpus(chosen)
    single = chosen.engine == "NO"
    if processes is None:
        processes = 1 if single else devices * number or (chosen.processes if chosen.use_cpu else ON_CPUS * number)
    if processes < 1 or processes % number:
        told = f"{processes} processes cannot be divided evenly among {number} machines"
        raise UserError(
            f"command line: --num-processes: {told}" if processes > 0 else "command line: --num-processes: is below 1"
        )
    if devices and processes // number > devices:
        told = f"{processes // number} processes a machine, and this one has {devices} GPU{'s' * (devices > 1)}"
        raise UserError(f"command line: --num-processes: {told}")
    if processes > 1 and (single or chosen.engine in ("MULTI_CPU", "MULTI-CPU")):
        named = "multi_cpu" if on_cpus else "multi_gpu"
        told = f"{chosen.path.name} ({chosen.engine}) starts one process, whatever is asked for"
        raise UserError(f"command line: --num-processes {processes}: {told}; --launch {named} starts several")
    if processes == 1 and chosen.engine.startswith("MULTI"):
        told = "starts several processes, and one is asked for"
        raise UserError(
            f"command line: --launch {chosen.path.stem}: {told}; {'cpu' if on_cpus else 'single_gpu'} is the layout of one"
        )
    if number > 1 and None in (machines.main_process_ip, machines.main_process_port):
        told = "several machines need --main-process-ip and --main-process-port, the same on all"
        raise UserError(f"command line: --num-machines: {told}")
    environment = dict(_without_devices(chosen.engine)) if on_cpus else {}
    if on_cpus and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, _cores() * number // processes))
    options = ["--config_file", _shown(chosen.path), "--num_processes", str(processes)]
    if number > 1:
        options += ["--num_machines", str(number), "--machine_rank", str(machines.machine_rank)]
        options += ["--main_process_ip", str(machines.main_process_ip)]
    if processes > 1:  # 0: any free one
        options += ["--main_process_port", str(machines.main_process_port or 0)]
    return Line(environment=environment, arguments=[*options, "-m", module, *arguments])


def runs_on_cpus(chosen: Layout) -> None:
    """Raise UserError for a layout that is another one on CPUs."""
    if chosen.engine == "FSDP":
        raise UserError(f"command line: --cpu: accelerate runs DDP in place of FSDP on CPUs; {_without_gpus(chosen)}")


def start(launched: Line, stop: Stop, ended: Callable[[], bool]) -> int:
    """Run a line in this process, as `accelerate launch` does, and return the exit status of the process that failed first.

    What the launched processes say they have said themselves: only one that was killed is told of here. Signals are passed on
    to them, once each, and they leave when they have saved: torch's launcher would kill them after 30 seconds, and itself
    end of SIGUSR1. `ended` tells whether what they were launched for is done.
    """
    quiet_upstream()
    os.environ |= launched.environment
    if on_cpu():
        os.environ["DS_ACCELERATOR"] = "cpu"  # the launcher imports DeepSpeed, which warns of what it otherwise finds out

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # of each process that ends otherwise than with 0: its command, its status, a traceback of the launcher
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = launch_command_parser().parse_args(list(launched.arguments))
    options.signals_to_handle = "SIGHUP,SIGQUIT"
    try:
        with stop.passed_on(functools.partial(_pass_on, ended)):
            launch_command(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        if stop.requested and -failure.exitcode in SIGNALS:  # it came before that process could hear it
            raise KeyboardInterrupt from None
        name = signal.Signals(-failure.exitcode).name
        hint = "; the system does so when memory runs out" if name == "SIGKILL" else ""
        note(f"process {rank} (pid {failure.pid}) was ended by {name}{hint}")
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    except (ValueError, ConnectionError) as error:
        raise UserError(f"accelerate launch: {one_line(error)}") from error
    return 0


def _pass_on(ended: Callable[[], bool], number: int) -> None:
    """Send a signal to the launched processes, each of which leads a session of its own.

    Without any there is nothing yet, or nothing left: the launcher of one machine waits for those of the others.
    """
    import psutil

    launched = [child for child in psutil.Process().children() if os.getsid(child.pid) == child.pid]
    if not launched and not ended():
        raise KeyboardInterrupt
    for process in launched:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def end_with_the_launcher() -> None:
    """Let a launched process be killed when its launcher is: on its own it would hold its device and the run's lock.

    Linux tells of a parent's end by a signal of the child's choice (prctl(2), PR_SET_PDEATHSIG).
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it ended meanwhile
        os.kill(os.getpid(), signal.SIGKILL)


_PR_SET_PDEATHSIG = 1


def asked() -> Layout | None:
    """What the `accelerate launch` that started this process was asked for; None when none did."""
    import psutil

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    given_at = _after_launch(words)
    if given_at is None:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file")
    given, _ = parser.parse_known_args(words[given_at:])
    cache = os.environ.get("HF_HOME", os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/huggingface")
    default = Path(cache, "accelerate/default_config.yaml").expanduser()  # where `accelerate config` writes it
    file = given.config_file or (default if default.is_file() else None)
    found = layout(str(file)) if file else Layout(path=Path(), engine="NO", processes=1, use_cpu=False)
    return Layout(path=found.path, engine=found.engine, processes=given.num_processes or found.processes, use_cpu=found.use_cpu)


def _after_launch(words: Sequence[str]) -> int | None:
    """Where the options of `accelerate launch` begin in a command line; None in that of any other program."""
    for place, word in enumerate(words[:4]):  # an interpreter and its options may stand before
        name = Path(word).name
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return place + 1
        if name == "accelerate" and words[place + 1 : place + 2] == ["launch"]:
            return place + 2
    return None


def heed_the_launcher() -> None:
    """Train on CPUs when the launch file says so, and raise UserError when fewer processes run than were asked for.

    accelerate starts one process for distributed_type MULTI_CPU and for --cpu, whatever --num_processes says, and tells
    several that it starts nothing of use_cpu.
    """
    found = asked()
    if found is None:
        return
    if found.use_cpu:
        os.environ |= _without_devices(found.engine)
    if found.processes > 1 and not any(name in os.environ for name in _OF_OTHER_LAUNCHERS):
        told = f"was asked for {found.processes} processes and starts one ({found.engine} in {found.path})"
        if found.engine == "NO":
            told = f"was asked for {found.processes} processes and starts one"
        raise UserError(f"accelerate launch {told}; --config_file accelerate_configs/multi_cpu.yaml starts several on CPUs")


def on_cpu() -> bool:
    """Whether the launcher, or --cpu, wants no accelerator to be used."""
    said = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    return said or os.environ.get("DS_ACCELERATOR") == "cpu"


def _without_devices(engine: str) -> dict[str, str]:
    """The variables that keep an engine from the accelerators. accelerate's own would run DDP in the place of DeepSpeed."""
    return {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if engine == "DEEPSPEED" else {"ACCELERATE_USE_CPU": "true"}


def _gpus() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _cores() -> int:
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def _without_gpus(chosen: Layout) -> str:
    other = {"NO": "--launch cpu", "FSDP": "--launch zero3 --cpu divides the weights there"}
    return other.get(chosen.engine, "--cpu runs it on CPUs")


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else str(path)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a verb that can be launched; those of accelerate in its own words, with hyphens or underscores."""
    group = parser.add_argument_group("launching", "several processes, or another engine, by `accelerate launch`")
    add_layout(group)
    group.add_argument(
        "--num-machines", "--num_machines", type=int, default=1, metavar="N", help="each is given this line, with"
    )
    group.add_argument("--machine-rank", "--machine_rank", type=int, default=0, metavar="K", help="its number, from 0,")
    group.add_argument("--main-process-ip", "--main_process_ip", metavar="HOST", help="the address of machine 0,")
    group.add_argument(
        "--main-process-port", "--main_process_port", type=int, metavar="PORT", help="and a port that is free there"
    )


def add_layout(group: argparse._ActionsContainer) -> None:
    """The options that say how to run, wherever that is."""
    group.add_argument(
        "--launch", metavar="LAYOUT", help="a file of accelerate_configs/ by its name (multi_gpu, zero3, ...), or a path"
    )
    group.add_argument(
        "--num-processes", "--num_processes", type=int, metavar="N", help="on all machines together; all GPUs when absent"
    )
    group.add_argument("--cpu", action="store_true", help="use no GPU")


def chosen_line(options: argparse.Namespace, module: str, arguments: Sequence[str]) -> Line | None:
    """The line of parsed options, or None when the command shall run in this process. Raises UserError as `line` does."""
    given: dict[str, Any] = {name: getattr(options, name) for name in ("num_machines", "machine_rank")}
    given |= {name: getattr(options, name) for name in ("main_process_ip", "main_process_port")}
    if options.launch is None:
        if options.num_processes is not None or Machines(**given) != Machines():
            raise UserError("command line: --num-processes and what is said of machines go with --launch")
        if options.cpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        return None
    if "RANK" in os.environ:
        raise UserError("command line: --launch: this process was launched already; give it to `scalepeft train` alone")
    chosen = layout(options.launch)
    found = line(chosen, module, arguments, processes=options.num_processes, cpu=options.cpu, machines=Machines(**given))
    note(str(found))
    if chosen.engine != "NO":
        return found
    os.environ |= found.environment  # one process and no engine: what the launcher would start is this process
    return None
