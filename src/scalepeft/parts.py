"""What an engine that divides a model keeps on each process, as files without pickles."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scalepeft.checkpoint import load_state, save_state

_SCALERS = ("LossScaler", "DynamicLossScaler")
"""DeepSpeed's classes of loss scalers, which it saves as objects; their fields are numbers."""
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_UNREAD = ("param_slice_mappings", "ds_config", "param_shapes", "frozen_param_shapes", "shared_params")
"""What DeepSpeed saves, too, for the conversion to a "universal" checkpoint, and does not read when it resumes."""


def deepspeed_without_pickles() -> None:
    """Let DeepSpeed's engines write and read their parts as safetensors, in files of DeepSpeed's own names.

    Its scripts that stand beside them would read pickles only.
    """
    engine: Any = importlib.import_module("deepspeed.runtime.engine")
    interface = importlib.import_module("deepspeed.runtime.checkpoint_engine.checkpoint_engine").CheckpointEngine

    def create(self: Any, info: Any) -> None:  # DeepSpeed's interface
        """Nothing is to be prepared."""

    def commit(self: Any, info: Any) -> bool:  # noqa: ARG001
        """What makes a checkpoint complete is its manifest."""
        return True

    methods = {"create": create, "commit": commit, "save": _save, "load": _load, "preserves_storage_sharing": lambda _: False}
    without_pickles = type("WithoutPickles", (interface,), methods)
    engine.create_checkpoint_engine = lambda **_: without_pickles()
    engine.DeepSpeedEngine._copy_recovery_script = lambda *_: None  # noqa: SLF001  # it has no option for that


def _save(engine: Any, state_dict: Mapping[str, Any], path: str) -> None:  # noqa: ARG001  # DeepSpeed's interface
    state = {key: value for key, value in state_dict.items() if key not in _UNREAD}
    optimizer = state.get("optimizer_state_dict")
    if optimizer is not None:
        optimizer = {key: value for key, value in optimizer.items() if key not in _UNREAD}
        if (scaler := optimizer.get("loss_scaler")) is not None:
            fields = {name: str(v) if isinstance(v, torch.dtype) else v for name, v in vars(scaler).items()}
            optimizer["loss_scaler"] = [type(scaler).__name__, fields]
        state["optimizer_state_dict"] = optimizer
    save_state(state, Path(path))


def _load(engine: Any, path: str, map_location: Any = None) -> dict[str, Any]:  # noqa: ARG001
    state: dict[str, Any] = load_state(Path(path))
    optimizer = state.get("optimizer_state_dict")
    if optimizer is not None and optimizer.get("loss_scaler") is not None:
        name, fields = optimizer["loss_scaler"]
        if name not in _SCALERS:
            raise ValueError(f"{path}: {name!r} is no loss scaler of DeepSpeed's")
        kind = getattr(importlib.import_module("deepspeed.runtime.fp16.loss_scaler"), name)
        scaler = optimizer["loss_scaler"] = kind.__new__(kind)
        vars(scaler).update({key: _DTYPES.get(value, value) for key, value in fields.items()})
    return state


def of_fsdp(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    """The parts of trained weights and of their optimizer's states that FSDP2 keeps on this process."""
    weights = {name: _part(p) for name, p in model.named_parameters() if p.requires_grad}
    state = optimizer.state_dict()
    states = {index: {k: _part(v) for k, v in of.items()} for index, of in state["state"].items()}
    return {"weights": weights, "optimizer": {**state, "state": states}}


def weights_into_fsdp(model: torch.nn.Module, saved: Mapping[str, Any]) -> None:
    """Put back the weights that `of_fsdp` gave, into a model that is divided the same."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in saved["weights"]:
                _part(parameter).copy_(saved["weights"][name])


def states_into_fsdp(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Put back the optimizer's states that `of_fsdp` gave."""
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        index: {key: _like(value, order[index]) for key, value in of.items()}
        for index, of in saved["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**saved["optimizer"], "state": states})


def _part(value: Any) -> Any:
    return value.to_local() if hasattr(value, "to_local") else value


def _like(part: Any, parameter: Any) -> Any:
    """A part as the DTensor that a parameter is; the step's number, and what is no tensor, stays as it is."""
    if not isinstance(part, torch.Tensor) or part.dim() == 0 or not hasattr(parameter, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part.to(parameter.device), parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
