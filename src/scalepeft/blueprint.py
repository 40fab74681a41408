"""The model of a recipe without its weights: parameters, dtypes and layers as training would have them, in no memory at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft import PeftConfig, PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.auto.auto_factory import _get_model_class
from transformers.quantizers.auto import AutoHfQuantizer

from scalepeft import adapters, model
from scalepeft.recipe import Recipe
from scalepeft.refusals import upstream_errors

_NESTED_BLOCK = 256
"""Constants of 4-bit blocks that share one constant of their own under double quantisation: bitsandbytes' own number."""

_STEPS = 10**9
"""Of a run whose length is not known: enough for any schedule of AdaLoRA's, on which no memory depends."""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A model on fake tensors: it runs forward and backward, and computes nothing."""

    model: Any
    """The model that is trained, with its adapter."""
    base: Any
    """The same without peft's wrapper."""
    mode: FakeTensorMode
    layers: torch.nn.ModuleList | None
    """Its blocks, where there is one list of them that are all alike."""
    notes: tuple[str, ...]
    """What was assumed, for lack of weights or data."""


class Quantised(torch.nn.Module):
    """A linear layer as bitsandbytes stores it, on tensors of which only sizes matter; its arithmetic is bitsandbytes' own."""

    def __init__(self, layer: Any, make: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.bias, self.eight = layer.bias, isinstance(layer, bnb.nn.Linear8bitLt)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype  # what the weights had; the backward pass dequantises 4 bits to it
        if self.eight:
            self.register_buffer("packed", make((layer.out_features, layer.in_features), dtype=torch.int8))
            self.register_buffer("constants", make((layer.out_features,), dtype=torch.float32))
            return
        weight, storage, count = layer.weight, layer.quant_storage, self.count
        self.register_buffer("packed", make((-(-count // (2 * storage.itemsize)), 1), dtype=storage))
        self.compute_dtype, self.block, self.kind = layer.compute_dtype, weight.blocksize, weight.quant_type
        blocks = -(-count // self.block)
        self.nested = bool(weight.compress_statistics)
        self.register_buffer("constants", make((blocks,), dtype=torch.uint8 if self.nested else torch.float32))
        self.register_buffer("outer", make((-(-blocks // _NESTED_BLOCK) if self.nested else 0,), dtype=torch.float32))
        self.register_buffer("code", make((256,), dtype=torch.float32))
        self.register_buffer("offset", make((), dtype=torch.float32))

    @property
    def count(self) -> int:
        """The weights that the packed numbers stand for."""
        return int(self.in_features * self.out_features)

    @property
    def state(self) -> QuantState:
        """What bitsandbytes needs to know of the packed numbers."""
        outer = QuantState(absmax=self.outer, blocksize=_NESTED_BLOCK, code=self.code, dtype=torch.float32)
        return QuantState(
            absmax=self.constants,
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=self.block,
            quant_type=self.kind,
            dtype=self.dtype,
            code=self.code,
            offset=self.offset if self.nested else None,
            state2=outer if self.nested else None,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As Linear4bit and Linear8bitLt have it."""
        bias = self.bias
        if self.eight:
            state = bnb.MatmulLtState()
            state.CB, state.SCB, state.has_fp16_weights, state.is_training = self.packed, self.constants, False, self.training
            return bnb.autograd._functions.MatMul8bitLt.apply(x, self.packed, None, bias, state)  # type: ignore[no-any-return] # noqa: SLF001
        dtype = self.compute_dtype or x.dtype
        given = x.to(dtype)
        found = bnb.matmul_4bit(given, self.packed, bias=None if bias is None else bias.to(dtype), quant_state=self.state)
        return found.to(x.dtype)  # type: ignore[no-any-return]


def build(recipe: Recipe, *, labels: list[str], checkpointing: bool = False) -> Blueprint:
    """The model of a recipe from its configuration alone. Raises UserError as `model.build` does."""
    notes: list[str] = []
    how = (recipe.adapter or {}).get("init_lora_weights")
    if isinstance(how, str) and how != "gaussian":  # made from weights, which are not there; it takes no memory in training
        kept = {name: value for name, value in (recipe.adapter or {}).items() if name != f"{how}_config"}
        recipe = replace(recipe, adapter={**kept, "init_lora_weights": True})
    config = model.configuration(recipe, labels)
    config.dtype = _dtype(recipe, config, notes)  # which upstream prefers to the default dtype
    with torch.device("meta"), _default_dtype(config.dtype):
        with upstream_errors(recipe, "model.name_or_path"):
            base = _skeleton(recipe, config, notes)
        if recipe.quantization is not None:
            _replace_linears(recipe, config, base)
        if recipe.model.added_tokens:
            size = base.get_input_embeddings().num_embeddings + len(recipe.model.added_tokens)
            base.resize_token_embeddings(size, mean_resizing=False)  # the mean of no numbers is not to be had
    if checkpointing:
        base.enable_input_require_grads()
    with torch.device("meta"):
        built = _adapted(recipe, base)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _store_quantised(built, mode)
        _give_storage(built)
    return Blueprint(model=built, base=base, mode=mode, layers=_alike(base), notes=tuple(notes))


def _skeleton(recipe: Recipe, config: Any, notes: list[str]) -> Any:
    auto, attention = model.AUTO[recipe.task], recipe.model.attn_implementation
    if attention and attention.startswith("flash"):  # which need a GPU to be loaded
        notes.append(
            f"model.attn_implementation {attention} is counted as torch's own kernel, which keeps the same, without a mask"
        )
        attention = "sdpa"
    if attention:
        config._attn_implementation = attention  # noqa: SLF001  # as from_pretrained does
    if type(config) in auto._model_mapping:  # noqa: SLF001
        kind = _get_model_class(config, auto._model_mapping)  # noqa: SLF001
        return kind._from_config(config)  # noqa: SLF001  # which chooses the attention, as from_pretrained does
    return auto.from_config(config, trust_remote_code=recipe.model.trust_remote_code)


def _dtype(recipe: Recipe, config: Any, notes: list[str]) -> torch.dtype:
    """The dtype of the weights: the recipe's, or that which the configuration says the checkpoint has."""
    if recipe.model.dtype != "auto":
        found: torch.dtype = getattr(torch, recipe.model.dtype)
        return found
    told = config.dtype
    if told is None:
        notes.append("the configuration does not say the dtype of the weights: float32 is assumed; model.dtype says it")
        return torch.float32
    return told if isinstance(told, torch.dtype) else getattr(torch, str(told))


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _replace_linears(recipe: Recipe, config: Any, base: Any) -> None:
    """Put bitsandbytes' layers where loading would, and give the model the marks by which peft knows them."""
    given = model.quantization(recipe, config)
    quantizer = AutoHfQuantizer.from_config(given, pre_quantized=False)
    skipped = quantizer.get_modules_to_not_convert(base, given.llm_int8_skip_modules, base._keep_in_fp32_modules)  # noqa: SLF001
    replace_with_bnb_linear(base, skipped, given)
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = bool(given.load_in_4bit), bool(given.load_in_8bit)
    base.is_quantized, base.hf_quantizer = True, quantizer
    base.config.quantization_config = given


def _adapted(recipe: Recipe, base: Any) -> Any:
    options = recipe.adapter
    if options is None:
        return base
    if "name_or_path" not in options:
        added = list(range(base.get_input_embeddings().num_embeddings))[-len(recipe.model.added_tokens) :]
        return adapters.new(recipe, base, total_steps=_STEPS, added=added if recipe.model.added_tokens else ())
    with upstream_errors(recipe, "adapter.name_or_path"):
        config = PeftConfig.from_pretrained(adapters.adapter_path(str(options["name_or_path"])))
        config.inference_mode = False
        return get_peft_model(base, config)


def _store_quantised(built: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Give each quantised layer the storage that it has after loading."""

    def make(shape: Any, *, dtype: torch.dtype) -> torch.Tensor:
        with mode:
            return torch.empty(shape, dtype=dtype)

    found = [
        (name, module) for name, module in built.named_modules() if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    ]
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(built.get_submodule(parent), child, Quantised(module, make))


def _give_storage(built: torch.nn.Module) -> None:
    """Put a fake tensor where each parameter and buffer is: one for those that are one, as tied embeddings are."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the old one, too, whose id is nobody else's while it lives
    for module in built.modules():
        held: Any = (module._parameters, module._buffers)  # noqa: SLF001
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, FakeTensor):
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu", requires_grad=False)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    new = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
                    made[id(tensor)] = tensor, new
                tensors[name] = made[id(tensor)][1]
    prompts: dict[str, torch.Tensor] = getattr(built, "prompt_tokens", {})  # in no module
    for name, tokens in prompts.items():
        prompts[name] = torch.arange(len(tokens))


def _alike(base: Any) -> torch.nn.ModuleList | None:
    """The longest list of modules whose parameters, sizes and settings are all the same."""
    lists = [m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1]
    found = max(lists, key=len, default=None)
    if found is None or len({_shape(layer) for layer in found}) > 1:
        return None
    types = getattr(base.config.get_text_config(), "layer_types", None)
    return None if types and len(set(types)) > 1 else found


def _shape(layer: torch.nn.Module) -> tuple[Any, ...]:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    kinds = tuple(type(module).__name__ for module in layer.modules())
    return kinds, tuple((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors)


def parameters(found: Blueprint) -> dict[str, int]:
    """Trainable and total parameters, as `model.parameters` counts them of a loaded model."""
    quantised = sum(module.count for module in found.model.modules() if isinstance(module, Quantised))
    counts = model.parameters(found.model)
    return {"trainable": counts["trainable"], "total": counts["total"] + quantised}


def is_adapted(found: Blueprint) -> bool:
    """Whether an adapter is trained, and not the model itself."""
    return isinstance(found.model, PeftModel)
