"""The adapter on its way into the base: each module is merged by peft's own code, alone and in float32.

What is held in memory is the adapter and one module, of a large one only a block of rows.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners import adalora, ia3, loha, lora, vera
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError
from transformers.pytorch_utils import Conv1D

from scalepeft.base import Base, Order, dtype
from scalepeft.errors import UserError, one_line
from scalepeft.shards import Slot

_VIRTUAL = "puts virtual tokens before the input and changes no weights"
NOT_FOLDED = {
    "ADAPTION_PROMPT": "adds prompts to the attention of some layers",
    "CARTRIDGE": _VIRTUAL,
    "CPT": _VIRTUAL,
    "MULTITASK_PROMPT_TUNING": _VIRTUAL,
    "P_TUNING": _VIRTUAL,
    "LILY": "shares matrices among layers by what it sees of the input",
    "POLY": "mixes its matrices anew for each task",
    "PREFIX_TUNING": _VIRTUAL,
    "PROMPT_TUNING": _VIRTUAL,
    "SHADOW": "adapts by what it sees of the input",
    "XLORA": "mixes adapters anew for each input",
}
"""Types of peft that are no change of weights, and why."""

_RAISES = (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, NotImplementedError, SafetensorError)
"""What peft raises for an adapter that does not fit."""


BLOCK = 2**19
"""Bytes of float32 that are computed at a time: they stay in the processor's cache, and in memory that the process has.

From 1 MiB on every block costs the system its pages anew: 5.1 ns a weight at 8 MiB, 1.5 here."""


# --- the adapter ------------------------------------------------------------------------------------------------------


def attached(base: Any, order: Order) -> PeftModel:
    """The model with the adapter, or with the one that peft makes of several. Raises UserError for one that does not fit.

    Every tensor of every adapter's file has its place in the model, or this fails.
    """
    model = None
    for number, folder in enumerate(order.adapters):
        name = "default" if number == 0 else f"adapter_{number}"
        config, saved = _readable(folder)
        trained_on = config.base_model_name_or_path
        other = f"{folder}: was trained on {trained_on or 'a base it does not name'} and does not fit {order.base_name}"
        try:
            with warnings.catch_warnings():  # peft warns of what is checked below
                warnings.filterwarnings("ignore", message="Some weights of PeftModel|Found missing adapter keys")
                # DoRA would begin with the norms of all weights, to be overwritten; PiSSA and others change weights then
                plain = getattr(config, "use_dora", False) and isinstance(config.init_lora_weights, bool)
                given = {"adapter_name": name, "torch_device": "cpu", "low_cpu_mem_usage": plain}
                if model is None:
                    model = PeftModel.from_pretrained(base, folder, **given)
                else:
                    model.load_adapter(folder, **given)
            built = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            wide = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=True)  # an option of upstream's
        except _RAISES as error:
            raise UserError(f"{other}: {_short(error)}") from error
        if foreign := [key for key, tensor in saved.items() if key not in wide or wide[key].shape != tensor.shape]:
            raise UserError(f"{other}: {len(foreign)} of its {len(saved)} tensors have no place there ({foreign[0]}, ...)")
        if lacking := [key for key in built if key not in saved and not _made_again(model.peft_config[name], key)]:
            raise UserError(f"{folder}: lacks {len(lacking)} tensors of its adapter ({lacking[0]}, ...); save it anew")
    assert model is not None  # noqa: S101  # an order has an adapter
    if len(order.adapters) > 1:
        _combine(model, order)
    return model


def _readable(folder: str) -> tuple[PeftConfig, Mapping[str, torch.Tensor]]:
    """An adapter's configuration and its tensors."""
    try:
        config, saved = PeftConfig.from_pretrained(folder), load_peft_weights(folder, device="cpu")
    except _RAISES as error:
        raise UserError(f"{folder}: its adapter cannot be read: {_short(error)}") from error
    kind = config.peft_type.value
    if kind in NOT_FOLDED:
        raise UserError(f"{folder}: {kind} {NOT_FOLDED[kind]}; it cannot be merged, load it with peft")
    if getattr(config, "alora_invocation_tokens", None):
        raise UserError(f"{folder}: is an aLoRA, which is at work from some token on only; it cannot be merged")
    if str(getattr(config, "init_lora_weights", "")).startswith("pissa_niter"):
        told = "was saved with the part that fast PiSSA takes from the base, which is another at each drawing"
        raise UserError(f"{folder}: {told}; save it with path_initial_model_for_weight_conversion")
    return config, saved


def _made_again(config: PeftConfig, key: str) -> bool:
    """Whether a tensor that a file lacks is the same whenever the adapter is made: projections from a seed."""
    return not getattr(config, "save_projection", True) and any(
        f"{kind}_A" in key or f"{kind}_B" in key for kind in ("vera", "pvera", "randbasis")
    )


def _combine(model: PeftModel, order: Order) -> None:
    names = list(model.peft_config)
    options: dict[str, Any] = {"adapters": names, "weights": order.weights, "adapter_name": "combined"}
    if model.peft_type.value == "LORA":
        options |= {"combination_type": order.combination, "density": order.density}
    elif order.combination != "linear":
        raise UserError(f"--combination {order.combination}: peft combines {model.peft_type.value} linearly only")
    torch.manual_seed(order.seed)  # of what DARE drops
    try:
        model.base_model.add_weighted_adapter(**options)
        model.base_model.set_adapter("combined")
    except _RAISES as error:
        raise UserError(f"{order.adapters[0]} and others: peft cannot combine them: {_short(error)}") from error


def _short(error: BaseException) -> str:
    text = one_line(error)
    return text if len(text) < 240 else f"{text[:240]}..."


# --- merging ----------------------------------------------------------------------------------------------------------


class Fold:
    """The merged model: what it consists of, and each of its tensors when asked for."""

    def __init__(self, order: Order) -> None:
        """Open the base, attach the adapter and plan what will be written; raises UserError for what does not fit."""
        self.order = order
        self.base = Base(order)
        model = self.base.model
        self._grow()
        state = model.state_dict()
        self._types = {
            key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items() if tensor.device.type != "meta"
        }
        self.model = attached(model, order)
        self.units = list(_units(model))
        """The names of the modules that the adapter changes."""
        self._check_reach()
        self._check_new()
        self._ready: dict[str, dict[str, torch.Tensor]] = {}
        self.untied = self._untied()
        """Whether tensors that the base shares differ after merging."""

    @property
    def config(self) -> Any:
        """The configuration of the merged model."""
        config = self.base.model.config
        if self.untied:
            config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
        config.architectures = [type(self.base.model).__name__]
        config.dtype = self._widest()
        return config

    def slots(self) -> list[list[Slot]]:
        """All tensors of the merged model; those of one module are together."""
        groups: dict[str, list[Slot]] = {}
        for key, (kind, shape) in self._types.items():
            if key in self.base.tied and not self.untied:
                continue
            unit = self._unit(key)
            groups.setdefault(unit or f" {key}", []).append(
                Slot(name=self._name(key), key=key, dtype=self._dtype(kind), shape=shape)
            )
        for name in self.base.claimed:
            tensor = self.base.checkpoint.get(name)
            groups[f" {name}"] = [Slot(name=name, key=name, dtype=self._dtype(tensor.dtype), shape=tuple(tensor.shape))]
        return list(groups.values())

    def tensor(self, slot: Slot) -> torch.Tensor:
        """A merged tensor, whole."""
        return torch.cat([part.reshape(-1) for part in self.parts(slot)]).reshape(slot.shape)

    def parts(self, slot: Slot) -> Iterator[torch.Tensor]:
        """A merged tensor in the dtype that is written, as blocks of its rows; as a whole where it is mapped as it is."""
        if slot.name in self.base.claimed:
            yield from _rounded(self.base.checkpoint.get(slot.name), slot.dtype)
        elif unit := self._unit(slot.key):
            if self._in_blocks(unit):
                yield from self._merged_blocks(unit, slot)
                return
            if unit not in self._ready:
                self._ready[unit] = self._merged(unit)
            yield from _rounded(self._ready[unit].pop(slot.key), slot.dtype)
            if not self._ready[unit]:
                del self._ready[unit]
        else:
            yield from _rounded(self.base.value(slot.key, _held(self.base.model, slot.key)), slot.dtype)

    def _in_blocks(self, unit: str) -> bool:
        """Whether a module is merged row by row: a large layer whose type treats each row of the weight for itself."""
        module = self.base.model.get_submodule(unit)
        base: Any = getattr(module, "base_layer", None)
        variants = getattr(module, "lora_variant", {}).values()
        return (
            (type(module), type(base)) in _ROWS
            and unit not in self._ready
            and base.weight.numel() * 4 > BLOCK
            and not any(getattr(module, "lora_bias", {}).values())
            and all(isinstance(variant, DoraLinearVariant) and type(base) is torch.nn.Linear for variant in variants)
            and (type(module) is not ia3.Linear or base.bias is None)  # which it scales, too
        )

    def _merged_blocks(self, unit: str, slot: Slot) -> Iterator[torch.Tensor]:
        """A weight after peft's own merge of a block of its rows at a time; a bias stays as it is."""
        module = self.base.model.get_submodule(unit)
        base = module.base_layer
        value = self.base.value(slot.key, _held(base, slot.key.removeprefix(f"{unit}.")))
        if slot.key != f"{unit}.weight":
            yield from _rounded(value, slot.dtype)
            return
        whole, parts = base.weight, list(_parts(module, slot.shape[0]))
        step = max(1, BLOCK // (4 * slot.shape[1]))
        with _one_thread():
            for start in range(0, slot.shape[0], step):
                block = value[start : start + step].to(torch.float32, copy=True)
                base.weight = torch.nn.Parameter(block, requires_grad=False)
                for owner, name, tensor, dim in parts:
                    owner[name] = tensor.detach().narrow(dim, start, len(block))
                module.merge()
                module.merged_adapters.clear()
                yield base.weight.detach().to(slot.dtype)
        base.weight = whole
        for owner, name, tensor, _ in parts:
            owner[name] = tensor

    def difference(self, unit: str, written: Mapping[str, torch.Tensor], rows: int) -> float:
        """The largest difference of a module's answers, unmerged, from those by its written tensors, to random inputs.

        Relative to the largest answer (at least 1); infinite where a tensor that the adapter brings whole differs at all.
        """
        module = self.base.model.get_submodule(unit)
        if unit in self._ready or _is_whole(module):
            own = (
                {f"{unit}.{n}": t for n, t in _unloaded(module).state_dict().items()}
                if _is_whole(module)
                else self._ready[unit]
            )
            same = all(torch.equal(own[f"{unit}.{n}"].to(t.dtype), t) for n, t in written.items())
            return 0.0 if same else float("inf")
        self._materialise(unit, module)
        core = _core(module)
        inputs = _inputs(core, rows)
        with torch.no_grad():
            expected = module(inputs)
        found = torch.func.functional_call(core, {n: t.to(torch.float32) for n, t in written.items()}, (inputs,))
        difference = (expected - found).abs().max() / expected.abs().max().clamp(min=1.0)
        return float(difference) if found.isfinite().all() else float("inf")

    def _merged(self, unit: str) -> dict[str, torch.Tensor]:
        """The tensors of a module after peft's own merge, in float32; the module is given up."""
        model = self.base.model
        module = model.get_submodule(unit)
        if not _is_whole(module):
            self._materialise(unit, module)
        try:
            module = _unloaded(module)
        except _RAISES as error:
            kind = self.model.peft_type.value
            raise UserError(f"{self.order.adapters[0]}: {kind} cannot be folded into {unit}: {_short(error)}") from error
        found = {f"{unit}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
        wanted = [key for key in self._types if self._unit(key) == unit]
        if strange := sorted(set(found) ^ set(wanted)):
            told = f"{strange[0]} would {'be lost' if strange[0] in wanted else 'have no place in the model'}"
            raise UserError(f"{self.order.adapters[0]}: {self.model.peft_type.value} cannot be folded into {unit}: {told}")
        owner, _, name = unit.rpartition(".")
        model.get_submodule(owner)._modules[name] = torch.nn.Identity()  # noqa: SLF001  # lets go of adapter and copy
        return found

    def _materialise(self, unit: str, module: torch.nn.Module) -> None:
        """Copies of the module's base weights in float32, which no other module shares."""
        for name, owner, own in _base_parameters(module):
            key = f"{unit}.{name}"
            tensor = owner._parameters[own]  # noqa: SLF001
            if tensor is None:
                continue
            value = self.base.value(key, tensor.detach())
            copy = value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()
            owner._parameters[own] = torch.nn.Parameter(copy, requires_grad=False)  # noqa: SLF001
        module.float()

    def _grow(self) -> None:
        """Make the embedding longer for added tokens, whose rows the adapter brings."""
        model, wanted = self.base.model, self.order.vocabulary
        if wanted and wanted > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(wanted, mean_resizing=False)

    def _check_reach(self) -> None:
        """Raise UserError for a change of what transformers makes of several tensors of the files: these are copied."""
        for unit in self.units:
            for name, owner, own in _base_parameters(self.base.model.get_submodule(unit)):
                tensor = owner._parameters[own]  # noqa: SLF001
                if tensor is not None and tensor.device.type == "meta":
                    told = f"changes {unit}.{name}, which transformers makes of several tensors of the files"
                    raise UserError(f"{self.order.adapters[0]}: {told}; give --in-memory")

    def _check_new(self) -> None:
        """Raise UserError for tensors that neither the base nor the adapter has."""
        for key in self.base.new:
            unit = self._unit(key)
            if unit is None or not _is_whole(self.base.model.get_submodule(unit)):
                told = f"has no {key}, and the adapter does not bring it"
                raise UserError(f"{self.order.base_name}: {told}; {type(self.base.model).__name__} cannot be made of them")

    def _untied(self) -> bool:
        """Whether an adapter has parted what the base shares. Both sides are merged to see it, and kept until written."""
        untied = False
        for key, source in self.base.tied.items():
            units = [self._unit(key), self._unit(source)]
            if units == [None, None]:
                continue
            sides = []
            for name, unit in zip((key, source), units, strict=True):
                if unit and unit not in self._ready:
                    self._ready[unit] = self._merged(unit)
                tensor = self._ready[unit][name] if unit else self.base.value(name, _held(self.base.model, name))
                sides.append(tensor)
            untied |= not torch.equal(sides[0].float(), sides[1].float())
        return untied

    def _unit(self, key: str) -> str | None:
        return next((unit for unit in self.units if key.startswith(f"{unit}.")), None)

    def _name(self, key: str) -> str:
        return self.base.disk[key] if key in self.base.renamed else key

    def _dtype(self, kind: torch.dtype) -> torch.dtype:
        wanted = self.order.output_dtype or self.order.dtype
        return dtype(wanted) if wanted and kind.is_floating_point else kind

    def _widest(self) -> torch.dtype:
        """The dtype of most values."""
        sizes: dict[torch.dtype, int] = {}
        for kind, shape in self._types.values():
            if kind.is_floating_point:
                sizes[self._dtype(kind)] = sizes.get(self._dtype(kind), 0) + torch.Size(shape).numel()
        return max(sizes, key=lambda kind: sizes[kind])


def _units(model: torch.nn.Module) -> Iterator[str]:
    """The outermost modules that an adapter has wrapped."""
    last = None
    for name, module in model.named_modules():
        if last is not None and name.startswith(f"{last}."):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper) or (
            isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer")
        ):
            last = name
            yield name


_ROWS: Mapping[tuple[type, type], Mapping[str, int]] = {
    (lora.Linear, torch.nn.Linear): {"lora_B": 0, "lora_magnitude_vector": 0},
    (lora.Linear, Conv1D): {"lora_A": 1},
    (lora.Embedding, torch.nn.Embedding): {"lora_embedding_A": 1},
    (adalora.SVDLinear, torch.nn.Linear): {"lora_B": 0},
    (ia3.Linear, torch.nn.Linear): {"ia3_l": 0},
    (loha.Linear, torch.nn.Linear): {"hada_w1_a": 0, "hada_w2_a": 0},
    (vera.Linear, torch.nn.Linear): {"vera_B": 0, "vera_lambda_b": 0},
}
"""What belongs to each row of a weight, and along which of its dimensions; everything else of a module, to all rows alike."""


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: a block is too small to be divided, and two took three times the processor's time for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _parts(module: torch.nn.Module, rows: int) -> Iterator[tuple[dict[str, Any], str, torch.Tensor, int]]:
    """The tensors of an adapter that are divided with the rows of the weight: their owners, names and dimensions."""
    for container, dim in _ROWS[type(module), type(module.base_layer)].items():
        for owner in getattr(module, container, torch.nn.Module()).modules():
            for held in (owner._parameters, owner._buffers):  # noqa: SLF001
                for name, tensor in held.items():
                    if tensor is not None and tensor.dim() > dim and tensor.shape[dim] >= rows:  # IA3 may scale columns
                        yield held, name, tensor, dim


def _is_whole(module: torch.nn.Module) -> bool:
    """Whether an adapter brings a module whole."""
    return isinstance(module, ModulesToSaveWrapper) and bool(module.active_adapters)


def _base_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """The base's parameters in a wrapped module: their names without the wrappers', their owners, their names there."""
    for path, owner in _core(module).named_modules():
        for own in owner._parameters:  # noqa: SLF001
            yield (f"{path}.{own}" if path else own).replace("base_layer.", ""), owner, own


def _core(module: torch.nn.Module) -> torch.nn.Module:
    """The base's own module within its wrappers."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer
    return module


def _inputs(core: Any, rows: int) -> torch.Tensor:
    """Random inputs of a layer."""
    if isinstance(core, torch.nn.Embedding):
        return torch.randint(core.num_embeddings, (rows, 64))
    width = core.weight.shape[0 if isinstance(core, Conv1D) else -1]  # of linear layers and norms
    return torch.randn(rows, int(width))


def _unloaded(module: Any) -> torch.nn.Module:
    """A module with its adapter merged and its wrappers taken off, as peft's merge_and_unload does it."""
    if hasattr(module, "unload_and_optionally_merge_module"):
        return _unloaded(module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None))
    if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
        module.merge(safe_merge=False, adapter_names=None)
        return _unloaded(module.get_base_layer())
    for name, child in module.named_children():
        module._modules[name] = _unloaded(child)  # noqa: SLF001
    plain: torch.nn.Module = module
    return plain


def _rounded(tensor: torch.Tensor, kind: torch.dtype) -> Iterator[torch.Tensor]:
    """A tensor in another dtype, in blocks; itself where it has that already."""
    if tensor.dtype == kind:
        yield tensor
        return
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), BLOCK // 4):
        yield flat[start : start + BLOCK // 4].to(kind)


def _held(model: torch.nn.Module, key: str) -> torch.Tensor:
    owner, _, name = key.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(owner), name)
    return found.detach()
