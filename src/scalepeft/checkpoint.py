"""Training state without pickles: nested values as one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save_state(state: object, path: Path) -> None:
    """Save nested dicts, lists, tuples, numbers, strings, tensors and arrays (an optimizer's state_dict, say)."""
    tensors: dict[str, torch.Tensor] = {}
    packed = json.dumps(_pack(state, tensors))
    save_file(tensors, path, metadata={"state": packed})


def load_state(path: Path) -> Any:
    """What `save_state` saved; tensors on the CPU. Loading runs no code."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict: it has only keys()
        return _unpack(json.loads(file.metadata()["state"]), tensors)


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON: [kind, content], for JSON alone knows neither tuples nor keys that are numbers."""
    if isinstance(value, torch.Tensor | np.ndarray):
        name = str(len(tensors))
        tensor = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value.detach().cpu().clone()
        tensors[name] = tensor.contiguous()
        return ["tensor" if isinstance(value, torch.Tensor) else "array", name]
    if isinstance(value, dict):
        return ["dict", [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]]
    if isinstance(value, tuple | list):
        return ["tuple" if isinstance(value, tuple) else "list", [_pack(v, tensors) for v in value]]
    if value is None or isinstance(value, bool | int | float | str):
        return ["value", value]
    if isinstance(value, np.generic):
        return ["value", value.item()]
    raise TypeError(f"a training state holds a {type(value).__name__}, which has no safe form")


def _unpack(packed: Any, tensors: dict[str, torch.Tensor]) -> Any:
    kind, content = packed
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
    if kind in ("tuple", "list"):
        items = [_unpack(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
