"""The adapters that cannot be served, and what a type of adapter needs that its class does not ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from scalepeft import upstream
from scalepeft.document import Document, mapping
from scalepeft.errors import did_you_mean

_LORA = "peft.tuners.lora.config"
NESTED = {
    "loftq_config": f"{_LORA}:LoftQConfig",
    "eva_config": f"{_LORA}:EvaConfig",
    "corda_config": f"{_LORA}:CordaConfig",
    "lora_ga_config": f"{_LORA}:LoraGAConfig",
    "velora_config": f"{_LORA}:VeloraConfig",
    "monteclora_config": f"{_LORA}:MontecloraConfig",
    "runtime_config": f"{_LORA}:LoraRuntimeConfig",
    "use_bdlora": f"{_LORA}:BdLoraConfig",
    "arrow_config": f"{_LORA}:ArrowConfig",
    "kasa_config": f"{_LORA}:KasaConfig",
}
"""Options of LORA that are a mapping in the recipe and a class of peft's, by name."""

INITIALISATIONS = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica", "lora_ga")
"""What init_lora_weights may be beside true, false and pissa_niter_N."""

_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")

NO_TYPE = {
    "CPT": "computes its loss from whole logits, which are never made here; PROMPT_TUNING trains virtual tokens, too",
    "MULTITASK_PROMPT_TUNING": "needs the number of a task in every row, which rows have none of here; use PROMPT_TUNING",
    "POLY": "needs the number of a task in every row, which rows have none of here; use LORA",
    "XLORA": "mixes adapters that are trained already; train one, or continue from one with adapter.name_or_path",
}
"""Types of peft that no task here can serve, and why."""

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "ADAPTION_PROMPT": ("adapter_len", "adapter_layers"),
    "CARTRIDGE": ("num_virtual_tokens",),
    "P_TUNING": ("num_virtual_tokens",),
    "PREFIX_TUNING": ("num_virtual_tokens",),
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "TRAINABLE_TOKENS": ("token_indices",),
}
"""Options that a type cannot do without and that upstream has a default for."""

_NOT_SERVED: Mapping[tuple[str, str], str] = {
    ("ADAMSS", "use_asa"): "prunes by a state that no checkpoint would hold; leave it out",
    ("LORA", "arrow_config"): "routes among adapters that are trained already; leave it out",
    ("LORA", "megatron_config"): "needs Megatron, which does not train here; leave it out",
    ("LORA", "layer_replication"): "would need a base with those layers wherever the adapter is loaded; leave it out",
}
"""Options of a type that cannot be served here, and why."""


def changes_base(initialisation: object) -> bool:
    """Whether an initialisation of LoRA takes its part out of the base's weights."""
    return isinstance(initialisation, str) and initialisation.startswith(_CHANGES_BASE)


def problems(document: Document, values: Mapping[str, Any], *, complete: bool) -> Iterator[str]:
    """Types and options that cannot be served, and what a type needs when the recipe is `complete`."""
    adapter = mapping(values.get("adapter"))
    kind = str(adapter.get("peft_type"))
    if kind not in upstream.peft_types() or "name_or_path" in adapter:
        return
    if kind in NO_TYPE:
        yield f"{document.where(('adapter', 'peft_type'))}: adapter: {kind} {NO_TYPE[kind]}"
        return
    for name in _NEEDED.get(kind, ()) if complete else ():
        if not adapter.get(name):
            yield f"{document.where(('adapter',))}: adapter: {kind} needs {name}"
    for name, value in adapter.items():
        where = document.where(("adapter", name))
        if (reason := _NOT_SERVED.get((kind, name))) and value:
            yield f"{where}: adapter.{name} {reason}"
    if kind == "SHADOW" and complete and adapter.get("auxiliary_loss_weight") != 0:
        told = "adapter: SHADOW adds a loss of its own to the model's, which is not the one trained here"
        yield f"{document.where(('adapter',))}: {told}; give auxiliary_loss_weight: 0"
    known = upstream.fields(upstream.peft_types()[kind])
    training = mapping(values.get("training"))
    for name in ("packing", "padding_free"):
        if "num_virtual_tokens" in known and training.get(name):
            told = f"training.{name}: {kind} puts its virtual tokens before a row, and packed documents would see each other"
            yield f"{document.where(('training', name))}: {told}; set it false"
    if kind == "ADALORA":
        first, target = (adapter.get(name, known[name].default) for name in ("init_r", "target_r"))
        if isinstance(first, int) and isinstance(target, int) and target > first:
            place = document.where(("adapter", "target_r" if "target_r" in adapter else "init_r"))
            yield f"{place}: adapter: target_r ({target}) is above init_r ({first}), and ranks are only taken away"
    trains_tokens = "trainable_token_indices" in known or adapter.get("modules_to_save")
    if mapping(values.get("model")).get("added_tokens") and not trains_tokens:
        told = f"{kind} would not train the rows of new tokens; use LORA, or name the embedding in adapter.modules_to_save"
        yield f"{document.where(('model', 'added_tokens'))}: model.added_tokens: {told}"
    yield from _initialisation(document, values, adapter)


def _initialisation(document: Document, values: Mapping[str, Any], adapter: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with init_lora_weights."""
    how = adapter.get("init_lora_weights")
    if not isinstance(how, str):
        return
    where = f"{document.where(('adapter', 'init_lora_weights'))}: adapter.init_lora_weights:"
    if how not in INITIALISATIONS and not re.fullmatch(r"pissa_niter_\d+", how):
        known = (
            did_you_mean(how, INITIALISATIONS) or f"; it is true, false, pissa_niter_N or one of {', '.join(INITIALISATIONS)}"
        )
        yield f"{where} peft has no {how!r}{known}"
        return
    quantization = mapping(values.get("quantization"))
    if how == "loftq":
        if quantization.get("load_in_4bit") is not True:
            yield f"{where} loftq makes up for a 4-bit base; add quantization.load_in_4bit: true, or use another"
        nested, only = mapping(adapter.get("loftq_config")), {"loftq_bits": 4, "loftq_iter": 1}
        for name in (name for name in only if nested.get(name) not in (None, only[name])):
            key = ("adapter", "loftq_config", name)
            yield f"{document.where(key)}: {'.'.join(key)} is {only[name]} with a base in 4 bits"
    elif changes_base(how) and quantization:
        yield f"{where} {how} changes the base's weights, which quantised ones do not allow; use loftq, eva or true"
    if values.get("task") == "preference" and (changes_base(how) or how == "loftq"):
        told = f"{how} gives the base a part in the adapter, and preferences are learned against the base without it"
        yield f"{where} {told}; use true, or continue from an adapter made with it"
