"""The engines that divide a model, ZeRO and FSDP2: what they need, what they cannot serve, and what they hold in parts."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from scalepeft import parts, ranks, sharding
from scalepeft.errors import UserError, one_line
from scalepeft.launch import on_cpu
from scalepeft.recipe import Recipe

if TYPE_CHECKING:
    from transformers import TrainingArguments

_STALE = {True: 20.0, False: 600.0}
"""Seconds after which torch's lock of an extension, built or not, is that of a process that died: a build takes one or two
minutes, and to find that nothing is to be built takes one or two seconds."""


def asked() -> str:
    """The engine that the launcher wants: DEEPSPEED, FSDP, or MULTI for DDP, NO for one process."""
    for engine, variable in (("DEEPSPEED", "ACCELERATE_USE_DEEPSPEED"), ("FSDP", "ACCELERATE_USE_FSDP")):
        if os.environ.get(variable, "").lower() == "true":
            return engine
    return "MULTI" if ranks.processes() > 1 else "NO"


def make_ready() -> None:
    """What the launcher's engine needs before the first process of it starts.

    DeepSpeed compiles its extensions when they are first used, for a minute and in silence: it is done here, said, and done by
    one process. Raises UserError where the engine cannot run.
    """
    engine = asked()
    # accelerate would import DeepSpeed wherever it is installed, which takes a second, to see whether a model is wrapped by it
    vars(importlib.import_module("accelerate.utils.other"))["is_deepspeed_available"] = lambda: asked() == "DEEPSPEED"
    if engine == "FSDP" and (on_cpu() or not torch.accelerator.is_available()):
        told = "FSDP needs GPUs: on CPUs accelerate runs DDP in its place; zero3 divides the weights there, too"
        raise UserError(f"accelerate launch: {told}")
    if engine == "DEEPSPEED":
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"DeepSpeed cannot be imported: {one_line(error)}; pip install deepspeed (`scalepeft doctor` says more)"
            ) from error
        parts.deepspeed_without_pickles()
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


def before_deepspeed(accelerator: Any, model: Any) -> None:
    """Say of DeepSpeed what the launch file leaves open; without DeepSpeed there is nothing to do.

    Its bucket for gradients holds no more than all that is trained, for its own holds 500 million numbers, 1 GB in bf16,
    whatever is trained. With offload the recipe's own optimizer steps on the host: DeepSpeedCPUAdam, which would take the
    place of any other, must be compiled and corrects its bias in float32, which makes its steps up to 7e-6 too long or too
    short; torch's fused AdamW is as fast on a CPU (benchmarks/host_optimizer.py).
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        plugin.deepspeed_config.setdefault("zero_force_ds_cpu_optimizer", False)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        plugin.deepspeed_config["zero_optimization"].setdefault("reduce_bucket_size", min(trained, sharding.BUCKET))


IN_PARTS = {
    "ZeRO-3": (
        "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LOKR", "LORA", "MISS",
        "OFT", "PEANUT", "ROAD", "SHIRA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
    ),
    "FSDP2": (
        "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
        "LORA", "MISS", "OFT", "PEANUT", "PSOFT", "ROAD", "SHIRA", "WAVEFT",
    ),
}  # fmt: skip
"""The adapter types of peft 0.21 whose losses under these engines were those of one process, a small decoder trained for
three steps. Of the others some fail there, some wait without end, some train something else."""

_NOT_IN_PARTS = {
    "ZeRO-3": ("kasa_config", "monteclora_config", "velora_config"),
    "FSDP2": ("kasa_config", "monteclora_config", "velora_config", "trainable_token_indices"),
}
"""Options of LORA by which it was not."""

OF_TORCH = ("adamw_torch", "adamw_torch_fused", "adagrad", "sgd", "rmsprop")
_OF_BITSANDBYTES = (
    "adamw_bnb_8bit", "adamw_8bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "paged_lion_32bit", "paged_lion_8bit",
)  # fmt: skip
"""Optimizers that treat each number by itself, or in blocks of numbers: it is no matter to them that ZeRO makes one vector of
all parameters and gives each process a part of it."""


DIVIDE = ("ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
"""Engines that divide at least the optimizer's states among the processes."""


def layout(args: TrainingArguments) -> dict[str, Any]:
    """What must be known of a layout to read what its processes saved: how many there are, the engine, whether it offloads."""
    engine = asked()
    stage = args.deepspeed_plugin.zero_stage if engine == "DEEPSPEED" else 0
    offloads = engine == "DEEPSPEED" and args.deepspeed_plugin.offload_optimizer_device not in (None, "none")
    return {"processes": args.world_size, "engine": called(engine, stage, args.world_size), "offloads": offloads}


def called(engine: str, stage: int, processes: int) -> str:
    """What an engine is called in records and messages."""
    return {"DEEPSPEED": f"ZeRO-{stage}", "FSDP": "FSDP2"}.get(engine, "DDP" if processes > 1 else "no engine")


def accumulation(recipe: Recipe, processes: int) -> int:
    """Micro-batches of an optimizer step. Raises UserError where the recipe's rows of a step cannot be divided so."""
    rows, batch = recipe.global_batch_size, int(recipe.training.get("per_device_train_batch_size", 8))  # upstream's default
    if rows is None:
        return int(recipe.training.get("gradient_accumulation_steps", 1))
    if rows % (batch * processes):
        told = f"{rows} is not a multiple of {batch * processes} ({batch} rows x {processes} processes)"
        raise recipe.error("global_batch_size", told)
    return rows // (batch * processes)


def shown(of: Mapping[str, Any]) -> str:
    """A layout in words."""
    processes = f"{of['processes']} process{'es' if of['processes'] > 1 else ''}"
    engine = "" if of["engine"] == "no engine" else f" of {of['engine']}{' with offload' if of['offloads'] else ''}"
    return processes + engine


def refuse(recipe: Recipe, on: Mapping[str, Any], *, optim: str, cpu: bool) -> None:
    """Raise UserError for what an engine would train otherwise than one process, or not at all. `on` is a layout's record."""
    name, offloads = on["engine"], on["offloads"]
    if name not in DIVIDE:
        return
    if recipe.cache_frozen_layers is not None:
        raise recipe.error("cache_frozen_layers", f"is not served under {name}; use --launch multi_gpu, or leave it out")
    adapter = recipe.adapter or {}
    kind = adapter.get("peft_type")
    if kind in ("ADALORA", "ADAMSS"):
        raise recipe.error("adapter.peft_type", f"{kind} reads gradients, which {name} holds in parts; use --launch multi_gpu")
    if kind is not None and kind not in IN_PARTS.get(name, (kind,)):
        told = f"{kind} does not train the same under {name}; what does: {', '.join(sorted(IN_PARTS[name]))}"
        raise recipe.error("adapter.peft_type", f"{told}; --launch multi_gpu and zero2 serve the others")
    for option in _NOT_IN_PARTS.get(name, ()):
        if adapter.get(option) is not None:
            raise recipe.error(f"adapter.{option}", f"looks at whole weights, which {name} holds in parts; use --launch zero2")
    tokens = recipe.model.added_tokens or adapter.get("trainable_token_indices")
    if tokens and (name == "FSDP2" or (name == "ZeRO-3" and cpu)):
        raise recipe.error("adapter", f"peft does not train single tokens under {name} here; use --launch zero2")
    if name == "FSDP2" and recipe.generative and adapter.get("modules_to_save"):
        raise recipe.error("adapter.modules_to_save", "is not trained the same under FSDP2; use --launch zero3")
    of_torch = name == "FSDP2" or offloads
    served: tuple[str, ...] = OF_TORCH if of_torch else (*OF_TORCH, *_OF_BITSANDBYTES)
    if optim not in served:
        told = "it does not treat each number of a parameter by itself"
        if optim in _OF_BITSANDBYTES:
            told = "its states are on the host already" if offloads else "bitsandbytes has no step for parameters in parts"
        told = f"{optim} under {name}{' with offload' if offloads else ''}: {told}; it serves {', '.join(served[:4])}"
        raise recipe.error("training.optim", told)


def check(recipe: Recipe, engine: str) -> None:
    """Raise UserError when not the engine runs that was asked for. `engine` is accelerate's distributed_type."""
    wanted = asked()
    if wanted != "NO" and not engine.startswith(wanted):  # torchrun's launch of one process is a MULTI of one
        raise recipe.error("training", f"{wanted} was asked for and accelerate runs {engine}: see its launch file")


# --- DeepSpeed's extensions -------------------------------------------------------------------------------------------


def _builders() -> list[Any]:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return []
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    return [] if builder is None or type(builder).__name__ == "NotImplementedBuilder" else [builder]


def _compile(builder: Any) -> None:
    """Build an extension unless that is done; one process does it, the others of this machine wait."""
    from torch.utils.cpp_extension import _get_build_directory

    _own_ninja()
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with FileLock(folder.with_name(f".{builder.name}.scalepeft.lock")):
        built = (folder / f"{builder.name}.so").is_file()
        baton = folder / "lock"  # torch's own: left behind by a process that was killed, it is waited for without end
        with contextlib.suppress(FileNotFoundError):
            while time.time() - baton.stat().st_mtime < _STALE[built]:
                time.sleep(0.1)
            baton.unlink()
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


def _own_ninja() -> None:
    """Let torch find the ninja of this environment, activated or not.

    What another version has built counts as stale and is built anew, for minutes: 1.11 and 1.13 hash commands differently.
    """
    beside = Path(sys.executable).parent
    if (beside / "ninja").exists():
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # by whichever process has the lock


# --- what is held in parts ----------------------------------------------------------------------------------------------


def whole(model: torch.nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The named parameters in their full shapes, on the CPU of rank 0, one gathered after the other; called by all ranks.

    The other ranks are given empty tensors in their places. No more than one parameter is whole on a device at a time.
    """
    found: dict[str, torch.Tensor] = {}
    first = ranks.rank() == 0
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
