"""What this machine has for training, and what to do where something is missing: `scalepeft doctor`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scalepeft.console import quiet_upstream, say, table
from scalepeft.errors import UserError, one_line
from scalepeft.fetch import cache_dir, hub_address, through_proxy, told_offline
from scalepeft.hardware import host_memory, shown


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str
    well: bool
    told: str
    mend: str = ""
    """What to do about it, where something is missing."""


def main(arguments: Sequence[str]) -> int:
    """`scalepeft doctor`; status 1 when something that training needs does not work."""
    parser = argparse.ArgumentParser(
        prog="scalepeft doctor", description="Look at what this machine has for training; each line says what to do about it."
    )
    parser.parse_args(arguments)
    quiet_upstream()
    found = list(findings())
    rows = [(("ok" if f.well else "--"), f.what, f.told + (f"; {f.mend}" if f.mend else "")) for f in found]
    say(table(rows, right=False))
    return int(any(f.what in ("torch", "bitsandbytes") and not f.well for f in found))


def findings() -> Iterator[Finding]:
    """All that is looked at, one after the other."""
    yield from (_python(), _machine())
    yield from _devices()
    yield from (_compiler(), _half(), _attention(), _bitsandbytes(), _deepspeed(), _hub(), _token())
    yield from _caches()


def _python() -> Finding:
    from scalepeft import __version__

    return Finding(
        what="scalepeft", well=True, told=f"{__version__}, Python {platform.python_version()}, {platform.platform()}"
    )


def _machine() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = f"{cores} cores for this process, {shown(host_memory())} of memory, {shown(memory.available)} of it free"
    low = memory.available < 4 * 2**30
    return Finding(what="machine", well=not low, told=told, mend="training a small model takes 2 to 4 GiB" if low else "")


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(what="torch", well=False, told=f"cannot be imported: {one_line(error)}", mend="make setup")
        return
    yield Finding(what="torch", well=True, told=torch.__version__)
    driver = _driver()
    if torch.accelerator.is_available():
        for index in range(torch.accelerator.device_count()):
            yield _device(index, driver)
        return
    if driver is None:
        told, mend = "none; training runs on the CPU", "`scalepeft plan RECIPE --gpu h100-80gb` tells what one would need"
        yield Finding(what="GPU", well=False, told=told, mend=mend)
        return
    built = torch.version.cuda
    mend = (
        f"the driver ({driver}) may be too old for CUDA {built}, or CUDA_VISIBLE_DEVICES hides it"
        if built
        else "pip install torch from the index without +cpu"
    )
    yield Finding(what="GPU", well=False, told=f"the driver ({driver}) sees one, torch {torch.__version__} does not", mend=mend)


def _device(index: int, driver: str | None) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index) if torch.cuda.is_available() else None
    if properties is None:
        return Finding(what=f"device {index}", well=True, told=str(torch.accelerator.current_accelerator()))
    free, total = torch.cuda.mem_get_info(index)
    told = (
        f"{properties.name}, {shown(total)}, {shown(free)} of it free, compute capability {properties.major}.{properties.minor}"
    )
    busy = free < total * 0.9
    mend = "another process uses it: nvidia-smi says which" if busy else ""
    return Finding(what=f"GPU {index}", well=not busy, told=f"{told}, driver {driver or 'unknown'}", mend=mend)


def _driver() -> str | None:
    """The version of NVIDIA's driver; None when it is not there or sees no GPU."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _compiler() -> Finding:
    compiler = next(
        (found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))), None
    )
    ninja = shutil.which("ninja") or (str(beside) if (beside := Path(sys.executable).parent / "ninja").exists() else None)
    lacking = [name for name, found in (("a C++ compiler", compiler), ("ninja", ninja)) if not found]
    if not lacking:
        return Finding(what="compiler", well=True, told=f"{compiler}, {ninja}")
    mend = "DeepSpeed compiles extensions with them: apt-get install g++ ninja-build, or the like"
    return Finding(what="compiler", well=False, told=f"without {' and '.join(lacking)}", mend=mend)


def _half() -> Finding:
    try:
        import torch
    except (ImportError, OSError):
        return Finding(what="bf16", well=False, told="not known: there is no torch")
    if torch.cuda.is_available():
        well = torch.cuda.is_bf16_supported(including_emulation=False)
        return Finding(
            what="bf16",
            well=well,
            told="in hardware" if well else "not in this GPU's hardware",
            mend="" if well else "training.fp16=true training.bf16=false is faster there",
        )
    from scalepeft import operators

    well = operators.computes(torch.bfloat16)
    told = "in this CPU's hardware" if well else "not in this CPU's hardware: products are computed in float32 and rounded"
    return Finding(what="bf16", well=well, told=told, mend="" if well else "training.bf16=false is a little faster")


def _attention() -> Finding:
    packages = [name for name in ("flash_attn", "flash_attn_interface", "kernels") if importlib.util.find_spec(name)]
    try:
        import torch

        gpu = torch.cuda.is_available()
    except (ImportError, OSError):
        gpu = False
    if packages:
        return Finding(what="flash attention", well=gpu, told=f"{', '.join(packages)}" + ("" if gpu else ", for GPUs only"))
    told = "no package of it; torch's own attention (sdpa) serves" + (
        ", with flash kernels where there is no mask" if gpu else ""
    )
    mend = "pip install flash-attn, then model.attn_implementation=flash_attention_2, for long packed rows" if gpu else ""
    return Finding(what="flash attention", well=not gpu, told=told, mend=mend)


def _bitsandbytes() -> Finding:
    try:
        import bitsandbytes as bnb
        import torch

        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
        given = torch.ones(2, 64, device=device, requires_grad=True)
        layer(given).sum().backward()
        works = given.grad is not None and bool(torch.isfinite(given.grad).all())
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError, AssertionError) as error:
        told = f"a 4-bit layer does not run: {one_line(error)[:200]}"
        return Finding(what="bitsandbytes", well=False, told=told, mend="pip install --force-reinstall bitsandbytes")
    told = f"{bnb.__version__}: a 4-bit layer runs forward and backward on {device}"
    return Finding(what="bitsandbytes", well=works, told=told)


def _deepspeed() -> Finding:
    try:
        import torch

        if not torch.accelerator.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        mend = "--launch zero1, zero2 and zero3 need it: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
        return Finding(what="DeepSpeed", well=False, told=f"cannot be imported: {one_line(error)[:200]}", mend=mend)
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory("x", verbose=False)).parent
    built = sorted(file.stem for file in folder.glob("*/*.so"))
    told = f"{deepspeed.__version__}; extensions compiled here: {', '.join(built) or 'none yet, a minute or two at first use'}"
    return Finding(what="DeepSpeed", well=True, told=told)


def _hub() -> Finding:
    if told_offline():
        return Finding(what="Hub", well=False, told="HF_HUB_OFFLINE is set: only what is in the cache is found")
    try:
        host, port = hub_address()
    except UserError as error:
        return Finding(what="Hub", well=False, told=str(error), mend="nothing that trains can be imported before")
    if through_proxy():
        return Finding(what="Hub", well=True, told=f"{host} through a proxy, not tried")
    try:
        socket.create_connection((host, port), timeout=5).close()
    except (OSError, UnicodeError) as error:
        mend = "`scalepeft fetch RECIPE` fills the caches where there is a network; `fetched:` names need none"
        return Finding(what="Hub", well=False, told=f"{host} cannot be reached: {one_line(error)}", mend=mend)
    return Finding(what="Hub", well=True, told=f"{host} can be reached")


def _token() -> Finding:
    try:
        from huggingface_hub import get_token
    except ValueError:  # of an HF_ENDPOINT that is no address
        return Finding(what="Hub token", well=False, told="not known", mend="what is told of the Hub comes first")
    there = bool(get_token())
    mend = "" if there else "gated models and `scalepeft push` need one: hf auth login, or HF_TOKEN"
    return Finding(what="Hub token", well=there, told="there" if there else "none", mend=mend)


def _caches() -> Iterator[Finding]:
    caches = [("own cache", cache_dir(), "SCALEPEFT_CACHE")]
    with contextlib.suppress(ValueError):  # of an HF_ENDPOINT that is no address
        from huggingface_hub.constants import HF_HUB_CACHE

        caches.insert(0, ("Hub cache", Path(HF_HUB_CACHE), "HF_HOME"))
    for what, folder, variable in caches:
        taken = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        well = free > 5 * 2**30 and os.access(there, os.W_OK)
        mend = "" if well else f"set {variable} to a folder with room that can be written"
        yield Finding(what=what, well=well, told=f"{folder}: {shown(taken)}, {shown(free)} free on its disk", mend=mend)
