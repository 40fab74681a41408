"""The engines that divide a model, ZeRO and FSDP2: what they need, what they cannot serve, and what they hold in parts."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from scalepeft.errors import UserError, one_line
from scalepeft.launch import on_cpu
from scalepeft.recipe import Recipe

_STALE = 600
"""Seconds after which torch's lock of an extension is that of a process that died: a build takes one or two minutes."""


def asked() -> str:
    """The engine that the launcher wants: DEEPSPEED, FSDP, or MULTI for DDP, NO for one process."""
    for engine, variable in (("DEEPSPEED", "ACCELERATE_USE_DEEPSPEED"), ("FSDP", "ACCELERATE_USE_FSDP")):
        if os.environ.get(variable, "").lower() == "true":
            return engine
    return "MULTI" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "NO"


def make_ready() -> None:
    """What the launcher's engine needs before the first process of it starts.

    DeepSpeed compiles its extensions when they are first used, for a minute and in silence: it is done here, said, and done by
    one process. Raises UserError where the engine cannot run.
    """
    engine = asked()
    if engine == "FSDP" and (on_cpu() or not torch.accelerator.is_available()):
        told = "FSDP needs GPUs: on CPUs accelerate runs DDP in its place; zero3 divides the weights there, too"
        raise UserError(f"accelerate launch: {told}")
    if engine == "DEEPSPEED":
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise UserError(f"DeepSpeed cannot be imported: {one_line(error)}; pip install deepspeed") from error
        for builder in _builders():
            _compile(builder)
        # it says of every process, among the lines of the run, that an extension was loaded
        vars(importlib.import_module("deepspeed.comm.torch"))["print"] = lambda *_: None


def before_fsdp(accelerator: Any, model: Any) -> None:
    """Mend what accelerate 1.15 gets wrong of encoders under FSDP2; without FSDP there is nothing to do.

    Its units are `_no_split_modules`, among which encoders name their embeddings, whose matrix it then shards a second time:
    here they are the blocks, unless the launch file names others. And it tells parameters by their addresses, which those of a
    new head lack where only rank 0 has loaded the weights: the optimizers of the others would step one of them in the place
    of all.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    for module in model.modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001  # `data` takes no tensor of another device
            if parameter is not None and parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)  # noqa: SLF001
    if plugin.transformer_cls_names_to_wrap is not None:
        return
    embedding, named = model.get_input_embeddings(), set(getattr(model, "_no_split_modules", None) or ())
    units = [module for module in model.modules() if type(module).__name__ in named]
    plugin.transformer_cls_names_to_wrap = sorted({type(u).__name__ for u in units if embedding not in u.modules()})


def check(recipe: Recipe, engine: str) -> None:
    """Raise UserError when not the engine runs that was asked for. `engine` is accelerate's distributed_type."""
    wanted = asked()
    if not engine.startswith(wanted):
        raise recipe.error("training", f"{wanted} was asked for and accelerate runs {engine}: see its launch file")


# --- DeepSpeed's extensions -------------------------------------------------------------------------------------------


def _builders() -> list[Any]:
    from deepspeed.accelerator import get_accelerator

    names = ["ShareMemCommBuilder"] if get_accelerator().device_name() == "cpu" else []
    if os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none":
        names.append("CPUAdamBuilder")
    found = [get_accelerator().create_op_builder(name) for name in names]
    return [builder for builder in found if builder is not None and type(builder).__name__ != "NotImplementedBuilder"]


def _compile(builder: Any) -> None:
    """Build an extension unless that is done; one process does it, the others of this machine wait."""
    from torch.utils.cpp_extension import _get_build_directory

    beside = Path(sys.executable).parent
    if shutil.which("ninja") is None and (beside / "ninja").exists():  # an environment that is used without being activated
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with FileLock(folder.with_name(f".{builder.name}.scalepeft.lock")):
        baton = folder / "lock"  # torch's own: left behind by a process that was killed, it is waited for without end
        with contextlib.suppress(FileNotFoundError):
            if time.time() - baton.stat().st_mtime > _STALE:
                baton.unlink()
        built = (folder / f"{builder.name}.so").is_file()
        started = time.monotonic()
        if not built:
            _tell(f"DeepSpeed's {builder.name} is compiled, once on this machine; that takes a minute or two ...")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            told = "DeepSpeed compiles it when it is first used, and needs a C++ compiler and ninja"
            raise UserError(f"DeepSpeed's {builder.name} cannot be built: {one_line(error)[:300]}; {told}") from error
        if not built:
            _tell(f"DeepSpeed's {builder.name} is compiled: {time.monotonic() - started:.0f} s; kept in {folder}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # by whichever process has the lock


# --- what is held in parts ----------------------------------------------------------------------------------------------


def whole(model: torch.nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The named parameters in their full shapes, on the CPU of rank 0, one gathered after the other; called by all ranks.

    The other ranks are given empty tensors in their places. No more than one parameter is whole on a device at a time.
    """
    found: dict[str, torch.Tensor] = {}
    first = int(os.environ.get("RANK", "0")) == 0
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        with _gathered(parameter) as tensor:
            found[name] = tensor.detach().cpu().clone() if first else torch.empty(0, dtype=tensor.dtype)
    return found


def in_parts(model: torch.nn.Module) -> bool:
    """Whether parameters of a model are divided over the processes."""
    return any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters())


@contextlib.contextmanager
def _gathered(parameter: Any) -> Iterator[torch.Tensor]:
    if hasattr(parameter, "full_tensor"):  # a DTensor, of FSDP2
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter
