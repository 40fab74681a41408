"""What each process of a layout holds: weights, gradients, optimizer states and buffers, whole or divided by the engine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from scalepeft import launch, ranks
from scalepeft.errors import UserError, one_line

# DeepSpeed 0.19's defaults, in elements: the launch files leave them as they are
BUCKET = 500_000_000
"""Where less is trained than that, engines.before_deepspeed makes it as large as what is trained."""
_PREFETCH = 50_000_000
_REUSED = 1_000_000_000
_PERSISTENT = 100_000
"""ZeRO-3: parameters below it stay whole on each process."""


BUFFERS, CONSTANTS = "buffers", "quantisation constants"
"""Tensors that are no parameters: every engine leaves them whole on each process."""
_PACKED = ("weights, 4-bit", "weights, 8-bit")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many processes there are and what divides the model among them."""

    name: str = "single_gpu"
    engine: str = "NO"
    """NO, MULTI (DDP), DEEPSPEED or FSDP."""
    stage: int = 0
    processes: int = 1
    optimizer_on_host: bool = False
    parameters_on_host: bool = False
    on_cpus: bool = False


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A parameter or a part of the storage of a quantised one, as far as its size goes."""

    kind: str
    """What it is called in the table."""
    elements: int
    itemsize: int
    trained: bool = False
    layer: int | None = None
    """The number of the block that it belongs to."""
    shape: Sequence[int] = ()

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * self.itemsize


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What an optimizer keeps of each parameter."""

    states: int
    bits: int | None = None
    """Of a state's number; None: those of the parameter."""
    paged: bool = False
    """Kept in memory that the driver moves to the host when the device's runs short."""
    known: bool = True

    def size(self, trained: Sequence[tuple[int, int]]) -> int:
        """Bytes for parameters given as their elements and itemsizes."""
        return sum(self._of(elements, itemsize) for elements, itemsize in trained)

    def _of(self, elements: int, itemsize: int) -> int:
        if self.bits == 8 and elements >= 4096:  # smaller ones are kept in 32 bits
            return self.states * (elements + 4 * -(-elements // 256))  # with a constant for each block of 256
        return self.states * elements * (itemsize if self.bits is None else 4)


OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "stable_adamw"), Optimizer(states=2)),
    **dict.fromkeys(("adagrad", "rmsprop"), Optimizer(states=1)),
    **dict.fromkeys(("sgd", "adafactor"), Optimizer(states=0)),  # adafactor: a number for each row and column of a matrix
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), Optimizer(states=2, bits=8)),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), Optimizer(states=2, bits=32, paged=True)),
    "paged_adamw_8bit": Optimizer(states=2, bits=8, paged=True),
    "lion_8bit": Optimizer(states=1, bits=8),
    "lion": Optimizer(states=1, bits=32),
    "lion_32bit": Optimizer(states=1, bits=32),
    "paged_lion_8bit": Optimizer(states=1, bits=8, paged=True),
    **dict.fromkeys(("paged_lion", "paged_lion_32bit"), Optimizer(states=1, bits=32, paged=True)),
    "rmsprop_bnb": Optimizer(states=1, bits=32),
    "rmsprop_bnb_32bit": Optimizer(states=1, bits=32),
    "rmsprop_bnb_8bit": Optimizer(states=1, bits=8),
    "ademamix": Optimizer(states=3, bits=32),
    "ademamix_8bit": Optimizer(states=3, bits=8),
    "paged_ademamix_32bit": Optimizer(states=3, bits=32, paged=True),
    "paged_ademamix_8bit": Optimizer(states=3, bits=8, paged=True),
}
"""By training.optim. bitsandbytes 0.50, torch 2.13."""

UNKNOWN = Optimizer(states=2, bits=32, known=False)
"""In the place of one that is not in the table: as large as AdamW's states in 32 bits, which none is known to pass."""


@dataclass(kw_only=True)
class Held:
    """What a process holds throughout training, by what it is, and what comes and goes."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    gathered: int = 0
    """Bytes of divided weights that are whole while they are used."""
    in_backward: int = 0
    """Bytes of buffers that stand from the first to the last gradient."""
    in_step: int = 0
    """Bytes that the optimizer's step takes beside what is held, the gradients it reads among them."""
    frees_gradients: bool = False


def read(name: str | None, processes: int | None, *, cpu: bool = False) -> Layout:
    """A layout by the name that `--launch` takes; `cpu`: as `--cpu` has it. Raises UserError for what cannot be launched."""
    if processes is not None and processes < 1:
        raise UserError(f"command line: --num-processes is {processes}; it is 1 or more")
    if name is None:
        one, several = ("cpu", "multi_cpu") if cpu else ("single_gpu", "multi_gpu")
        return read(one if processes in (None, 1) else several, processes)
    found = launch.layout(name)
    if found.engine not in _ENGINES:
        raise UserError(f"{found.path}: distributed_type {found.engine!r} is not served; there are {', '.join(_ENGINES)}")
    if cpu or found.use_cpu:
        launch.runs_on_cpus(found)
    engine = _ENGINES[found.engine]
    written = launch.ON_CPUS if cpu and not found.use_cpu else found.processes  # as the launch line has it
    count = processes if processes is not None else (1 if engine == "NO" else written)
    if count < 1:
        raise UserError(f"{found.path}: num_processes is {count}; it is 1 or more, and --num-processes overrides it")
    if engine == "NO" and count > 1:
        raise UserError(f"command line: --num-processes {count}: --launch {name} is the layout of one; multi_gpu has several")
    layout = Layout(name=Path(name).stem, engine=engine, processes=count, on_cpus=cpu or found.use_cpu)
    return _divided(layout, _section(found.path, engine), str(found.path))


def launched(*, on_cpus: bool) -> Layout:
    """The layout that the launcher of this process has asked for. Raises UserError for a DeepSpeed file that is none."""
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    processes = ranks.processes()
    engine = "DEEPSPEED" if deepspeed else "FSDP" if fsdp else "MULTI" if processes > 1 else "NO"
    layout = Layout(name="launched", engine=engine, processes=processes, on_cpus=on_cpus)
    # accelerate's variables are the keys of its launch files
    named = {f"ACCELERATE_DEEPSPEED_{key.upper()}": key for key in _OF_ZERO}
    named |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": _FILE, "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params"}
    return _divided(layout, {key: os.environ[name] for name, key in named.items() if name in os.environ}, "the launcher")


_ENGINES = {
    "NO": "NO",
    **dict.fromkeys((f"MULTI_{kind}" for kind in ("GPU", "XPU", "NPU", "HPU", "MLU", "MUSA", "SDAA", "NEURON")), "MULTI"),
    "DEEPSPEED": "DEEPSPEED",
    "FSDP": "FSDP",
}
"""Of accelerate's distributed_type those that are served. MULTI_CPU is not: it starts one process, whatever it is asked for."""

_OF_ZERO = {
    "zero_stage": ("stage", "2", ("0", "1", "2", "3")),
    "offload_optimizer_device": ("offload_optimizer.device", "none", ("none", "cpu", "nvme")),
    "offload_param_device": ("offload_param.device", "none", ("none", "cpu", "nvme")),
}
"""Keys of a launch file's deepspeed_config: as DeepSpeed's own file has them, accelerate's default, and what they may be."""
_FILE = "deepspeed_config_file"
_TRUE = ("true", "1", "yes", "y", "t", "on")


def _section(path: Path, engine: str) -> Mapping[str, Any]:
    """What a launch file says of its engine."""
    key = f"{engine.lower()}_config"
    said = yaml.safe_load(path.read_text(encoding="utf-8")).get(key) or {}
    if not isinstance(said, Mapping):
        raise UserError(f"{path}: {key} is a {type(said).__name__}; it takes a mapping")
    beside = [name for name in _OF_ZERO if said.get(name) is not None]
    if said.get(_FILE) is not None and beside:
        raise UserError(f"{path}: {', '.join(beside)} beside {_FILE}: accelerate refuses them; say it in {said[_FILE]}")
    return said


def _divided(layout: Layout, said: Mapping[str, Any], where: str) -> Layout:
    """A layout with what is said of its engine, in the words of accelerate's launch files."""
    if layout.engine == "FSDP":
        offloads = said.get("fsdp_offload_params", said.get("offload_params"))  # accelerate puts fsdp_ before what lacks it
        on_host = str(offloads).lower() in _TRUE
        return replace(layout, optimizer_on_host=on_host, parameters_on_host=on_host)
    if layout.engine != "DEEPSPEED":
        return layout
    file = None if said.get(_FILE) in (None, "none") else str(said[_FILE])
    if file is not None:
        said = {**said, **_of_deepspeed(file, where)}
    found = {}
    for key, (own, default, known) in _OF_ZERO.items():
        found[key] = str(default if said.get(key) is None else said[key]).lower()
        if found[key] not in known:
            place = f"{file}: zero_optimization.{own}" if file else f"{where}: {key}"
            raise UserError(f"{place} is {found[key]!r}; it is one of {', '.join(known)}")
    return replace(
        layout,
        stage=int(found["zero_stage"]),
        optimizer_on_host=found["offload_optimizer_device"] != "none",
        parameters_on_host=found["offload_param_device"] != "none",
    )


def _of_deepspeed(file: str, where: str) -> dict[str, Any]:
    """What DeepSpeed's own file says, in the words of launch files; what it leaves to accelerate (`auto`) left out."""
    try:
        said = json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"]
        own = {"zero_stage": said.get("stage", 0)}  # DeepSpeed's default, where accelerate's is 2
        for part in ("offload_optimizer", "offload_param"):
            own[f"{part}_device"] = (said.get(part) or {}).get("device", "none")
    except FileNotFoundError:
        raise UserError(f"{where}: {_FILE}: {file} is not there; accelerate looks for it from the folder it runs in") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{where}: {_FILE}: {file} is no file of DeepSpeed: {told}") from None
    return {key: value for key, value in own.items() if value != "auto"}


def held(tensors: Sequence[Tensor], layout: Layout, optimizer: Optimizer, *, half: bool) -> Held:
    """What each process of a layout holds. `half`: under mixed precision, where DeepSpeed holds the weights in 16 bits."""
    if layout.engine == "DEEPSPEED":
        return _zero(tensors, layout, optimizer, half=half)
    found = Held()
    share = layout.processes if layout.engine == "FSDP" else 1
    for tensor in tensors:
        whole = tensor.kind in (BUFFERS, CONSTANTS)
        elements = tensor.elements if whole else -(-tensor.elements // share)
        _add(found.host if layout.parameters_on_host and not whole else found.device, tensor.kind, elements * tensor.itemsize)
    trained = [(-(-t.elements // share), t.itemsize) for t in tensors if t.trained]
    gradients = sum(elements * itemsize for elements, itemsize in trained)
    place = found.host if layout.optimizer_on_host else found.device
    _add(place, "optimizer states", optimizer.size(trained))
    if layout.engine == "MULTI":
        _add(found.device, "communication buckets", gradients)  # DDP copies the gradients into them
    if layout.engine == "FSDP":
        # a block while it is computed, the next one that is on its way, and what belongs to no block
        blocks = _by_layer(tensors)
        found.gathered = 2 * max(blocks.values(), default=0) + sum(t.size for t in tensors if t.layer is None)
        found.frees_gradients = True
        _add(found.host if layout.parameters_on_host else found.device, "gradients, divided", gradients)
        found.in_backward = max(_by_layer([t for t in tensors if t.trained]).values(), default=0)
    return found


def _zero(tensors: Sequence[Tensor], layout: Layout, optimizer: Optimizer, *, half: bool) -> Held:
    """As DeepSpeed 0.19 allocates: stage_1_and_2.py and stage3.py."""
    found, share = Held(), layout.processes if layout.stage else 1
    width = 2 if half else 4
    sizes = [(t, t.itemsize if t.kind in (*_PACKED, BUFFERS, CONSTANTS) else width) for t in tensors]
    trained = sum(t.elements for t in tensors if t.trained)
    part = -(-trained // share)
    divided = layout.stage == 3
    for tensor, itemsize in sizes:
        whole = not divided or tensor.kind in (BUFFERS, CONSTANTS)
        elements = tensor.elements if whole else -(-tensor.elements // share)
        _add(found.host if layout.parameters_on_host and not whole else found.device, tensor.kind, elements * itemsize)
    place = found.host if layout.optimizer_on_host else found.device
    _add(place, "master weights", 4 * part)
    _add(place, "optimizer states", optimizer.size([(part, 4)]))
    # what gradients are collected in before they are reduced
    bucket = min(BUCKET, trained) * (4 if layout.stage == 1 else width)
    if not divided:
        found.in_backward, found.frees_gradients = bucket, layout.stage == 2
        found.in_step = 2 * 4 * part
        return found
    found.frees_gradients = True
    _add(found.device, "communication buckets", bucket)
    _add(place, "gradients, divided", width * part)
    weights = [(t, itemsize) for t, itemsize in sizes if t.kind not in (BUFFERS, CONSTANTS)]
    small = sum(t.elements * itemsize for t, itemsize in weights if t.elements < _PERSISTENT)
    large = [(t.elements, t.elements * itemsize) for t, itemsize in weights if t.elements >= _PERSISTENT]
    elements = sum(count for count, _ in large)
    # what will be used again within so many elements is not given back: going forward and back, those of the last half of it
    most = min(elements, _REUSED // 2 + _PREFETCH + max((count for count, _ in large), default=0))
    found.gathered = small + (sum(size for _, size in large) * most // elements if elements else 0)
    found.in_step = 4 * part
    return found


def _add(place: dict[str, int], kind: str, size: int) -> None:
    if size:
        place[kind] = place.get(kind, 0) + size


def _by_layer(tensors: Sequence[Tensor]) -> dict[int, int]:
    found: dict[int, int] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            found[tensor.layer] = found.get(tensor.layer, 0) + tensor.size
    return found
