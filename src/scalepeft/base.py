"""The base of a merge: its files mapped into memory, never loaded, and what each of their tensors is in the model."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from scalepeft.errors import UserError
from scalepeft.shards import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be merged, in values that JSON keeps: an interrupted merge goes on only with the same order."""

    base: str
    """The folder of the base's files."""
    base_name: str
    """The base as the user knows it."""
    config: str
    """The folder whose config.json describes the model: the base's, or a run's, which knows its labels."""
    labels: int | None = None
    """The number of labels where the configuration does not say it."""
    kind: str
    """The class of transformers that makes the model."""
    adapters: list[str]
    """Adapter folders."""
    weights: list[float] = field(default_factory=list)
    """The weight of each of several adapters."""
    combination: str = "linear"
    """How peft combines several adapters."""
    density: float | None = None
    """The share of values that TIES and DARE keep."""
    seed: int = 42
    """The seed of what DARE drops."""
    dtype: str | None = None
    """The dtype in which training held the base; absent: that of the files."""
    output_dtype: str | None = None
    """The dtype to write; absent: the one before."""
    quantization: dict[str, Any] | None = None
    """BitsAndBytesConfig as training quantised the base."""
    dequantized: bool = False
    """Merge into what the quantised weights stand for, not into those of the files."""
    packed: bool = False
    """Whether the files themselves hold quantised weights."""
    vocabulary: int = 0
    """The rows of the embedding when tokens were added."""
    tokenizer: str | None = None
    """The folder of the tokenizer."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def dump(self) -> dict[str, Any]:
        """Plain values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def dtype(name: str) -> torch.dtype:
    """A dtype by its name."""
    found: torch.dtype = getattr(torch, name)
    return found


def configuration(order: Order) -> Any:
    """The configuration of the merged model, as far as it is known before the adapter is."""
    config = AutoConfig.from_pretrained(order.config, trust_remote_code=order.trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if order.labels is not None:
        config.num_labels = order.labels
    if order.vocabulary:  # a run's configuration is of the longer embedding, which the files do not have yet
        before = AutoConfig.from_pretrained(order.base, trust_remote_code=order.trust_remote_code)
        config.get_text_config().vocab_size = before.get_text_config().vocab_size
    return config


def skeleton(order: Order) -> Any:
    """The model without storage."""
    config = configuration(order)
    kind = getattr(transformers, order.kind)
    with torch.device("meta"):
        if order.kind.startswith("Auto"):
            return kind.from_config(config, trust_remote_code=order.trust_remote_code)
        return kind(config)


class Base:
    """The base's model over its mapped files."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.checkpoint = Checkpoint(Path(order.base))
        self.packed: dict[str, dict[str, str]] = {}
        """For each weight that the files hold quantised: its parts by the end of their names."""
        self.model = skeleton(order)
        self.disk: dict[str, str] = {}
        """The name in the files of each of the model's tensors that they hold."""
        self.claimed: list[str] = []
        """Tensors that transformers converts when it loads them: copied as they are, out of an adapter's reach."""
        self.renamed: set[str] = set()
        """Tensors that transformers renames by more than a prefix: they keep the files' names."""
        self._match()
        self._fill()
        self.quantised = _quantised(order) if order.quantization and not order.packed else set()
        """The weights that training held quantised."""

    def value(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the base as training saw it, or as the files have it: by the order."""
        if key in self.packed:
            return self._unpacked(key)
        if self.order.dtype and tensor.is_floating_point():
            tensor = tensor.to(dtype(self.order.dtype))
        if key in self.quantised and self.order.dequantized:
            tensor = _through_quantisation(tensor, self.order.quantization or {})
        return tensor

    def _match(self) -> None:
        """Find the model's name of each tensor of the files, by transformers' own mapping."""
        state = self.model.state_dict()
        mapping = get_model_conversion_mapping(self.model)
        plain = get_model_conversion_mapping(self.model, add_legacy=False)
        kinds = [[m for m in mapping if isinstance(m, kind)] for kind in (WeightRenaming, WeightConverter)]
        today = [m for m in plain if isinstance(m, WeightRenaming)]
        names = self.checkpoint.names
        for name in names:
            part = _PARTS.fullmatch(name)
            owner = part and (part["owner"] if part["owner"].endswith(".weight") else f"{part['owner']}.weight")
            key, converter = rename_source_key(owner or name, *kinds, self.model.base_model_prefix, state)
            if part and owner:
                self.packed.setdefault(key, {"": owner})[part["part"]] = name
            elif converter is not None:
                self.claimed.append(name)
            elif key in state:
                self.disk[key] = name
                if rename_source_key(name, today, [])[0] != name:
                    self.renamed.add(key)

    def _fill(self) -> None:
        """Give the model the files' tensors; those that no file has get zeros, for the adapter to overwrite."""
        state = self.model.state_dict()
        for key, name in self.disk.items():
            if key in self.packed:
                kept = self._unpacked(key)
                tensor = torch.zeros((), dtype=kept.dtype).expand(kept.shape)  # a shape without memory
            else:
                tensor = self.checkpoint.get(name)
            if tensor.shape != state[key].shape:
                told = (
                    f"{name} has the shape {list(tensor.shape)}, and {type(self.model).__name__} wants {list(state[key].shape)}"
                )
                raise UserError(f"{self.order.base_name}: {told}; is its config.json of these weights?")
            _place(self.model, key, tensor)
        self.tied = dict(self.model.all_tied_weights_keys)
        missing = [key for key in state if key not in self.disk]
        with warnings.catch_warnings():
            self.model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
        self.tied = {key: source for key, source in self.model.all_tied_weights_keys.items() if key not in self.disk}
        swapped = {source: key for key, source in self.model.all_tied_weights_keys.items() if source not in self.disk}
        self.tied |= {source: key for source, key in swapped.items() if key in self.disk}
        unreached = self._converted(state) if self.claimed else set()
        self.new = [key for key in missing if key not in self.tied and key not in unreached]
        """Tensors that the files do not have."""
        for key in self.new:
            _place(self.model, key, torch.zeros(state[key].shape))

    def _converted(self, state: Mapping[str, torch.Tensor]) -> set[str]:
        """The model's tensors that transformers makes of claimed ones."""
        converters = [m for m in get_model_conversion_mapping(self.model) if isinstance(m, WeightConverter)]
        targets = {target.replace("*", "") for converter in converters for target in converter.target_patterns}
        return {key for key in state if key not in self.disk and any(target in key for target in targets)}

    def _unpacked(self, key: str) -> torch.Tensor:
        """What a weight that the files hold quantised stands for."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

        parts = {end: self.checkpoint.get(name) for end, name in self.packed[key].items()}
        weight = parts.pop("")
        if "SCB" in parts:
            found: torch.Tensor = int8_vectorwise_dequant(weight, parts["SCB"])
            return found
        found = dequantize_4bit(weight, QuantState.from_dict(parts, device=torch.device("cpu")))
        return found  # noqa: RET504  # typed


_PARTS = re.compile(
    r"(?P<owner>.*)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|weight_format)"
)
"""The names of the parts by which bitsandbytes keeps a weight in 4 or 8 bits: they follow its name, or its module's."""


def _place(model: torch.nn.Module, key: str, tensor: torch.Tensor) -> None:
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    if name in module._parameters:  # noqa: SLF001  # setattr would want the meta tensor's dtype
        module._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)  # noqa: SLF001
    else:
        module._buffers[name] = tensor  # noqa: SLF001


def _quantised(order: Order) -> set[str]:
    """The weights that transformers quantises, seen on a model without storage."""
    from transformers.quantizers import AutoHfQuantizer

    config = BitsAndBytesConfig.from_dict(order.quantization)
    model = skeleton(order)
    AutoHfQuantizer.from_config(config, pre_quantized=False).preprocess_model(model=model, device_map=None)
    return {
        f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    }


def _through_quantisation(weight: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """A weight as its quantised form stands for it."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant
    from bitsandbytes.nn import Params4bit

    if options.get("load_in_8bit"):
        rows, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
        found: torch.Tensor = int8_vectorwise_dequant(rows, scales).to(weight.dtype)
        return found
    packed = Params4bit(
        weight.contiguous(),
        requires_grad=False,
        compress_statistics=bool(options.get("bnb_4bit_use_double_quant")),
        quant_type=options.get("bnb_4bit_quant_type", "fp4"),
    ).to("cpu")
    plain: torch.Tensor = dequantize_4bit(packed.data, packed.quant_state)
    return plain
