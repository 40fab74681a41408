"""The adapter: a new one as the recipe describes it, or an existing one to continue from, and how it is saved."""

from __future__ import annotations

import copy
import importlib
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import save_file
from transformers import PreTrainedModel

from scalepeft import engines, upstream
from scalepeft.adapter_rules import NESTED, changes_base
from scalepeft.initialisations import AFTER, BEFORE, Examples, needed
from scalepeft.recipe import Recipe
from scalepeft.refusals import upstream_errors
from scalepeft.run import RECORD

_TASK_TYPES = {
    "sequence-classification": TaskType.SEQ_CLS,
    "causal-lm": TaskType.CAUSAL_LM,
    "preference": TaskType.CAUSAL_LM,
}
"""What peft calls the task."""

_VIRTUAL = "comes back from a file to answer with, not to be trained"
_NOT_CONTINUED = {
    "ADALORA": "has given its ranks out by a schedule that is over",
    **dict.fromkeys(("CARTRIDGE", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"), _VIRTUAL),
}
"""Types that cannot be continued from, and why."""


def new(
    recipe: Recipe,
    base: PreTrainedModel,
    *,
    total_steps: int,
    unknown: Sequence[str] = (),
    added: Sequence[int] = (),
    examples: Examples | None = None,
) -> PeftModel:
    """The base with a new adapter as the recipe describes it.

    `total_steps` is the length of AdaLoRA's schedule, `unknown` names the base's parameters that its checkpoint does not have,
    `added` are the ids of model.added_tokens. Raises UserError for options that upstream refuses, modules that are not there,
    and a combination that could not be trained or saved.
    """
    given = _options(recipe, base, total_steps=total_steps, added=added) | _whole(recipe, base, unknown)
    how = given.get("init_lora_weights")
    if how == "loftq":  # peft's own would quantise the base a second time, whenever the adapter is loaded
        given |= {"init_lora_weights": True, "loftq_config": {}}
    with upstream_errors(recipe, "adapter"):
        config = PEFT_TYPE_TO_CONFIG_MAPPING[given.pop("peft_type")](**given)
        if how in BEFORE:
            _maybe_include_all_linear_layers(config, base)
            BEFORE[how](base, config, list(needed(examples)))
        model = get_peft_model(base, config)
        if how in AFTER:
            AFTER[how](recipe, model, examples)
        for module in base.modules() if how in BEFORE else ():
            for name in ("eigens", "_peft_loraga_grad"):  # as large as the layer
                module.__dict__.pop(name, None)
    if changes_base(how):
        if any(hasattr(p, "ds_id") for p in base.parameters()):
            told = f"{how} changes the base's weights, which ZeRO-3 holds in parts; use ZeRO-2, or another initialisation"
            raise recipe.error("adapter.init_lora_weights", told)
        model.initial = {name: t.detach().cpu().clone() for name, t in _factors(model)}
    model.peft_config["default"].revision = recipe.model.revision
    return _usable(recipe, model)


def continued(recipe: Recipe, base: PreTrainedModel, unknown: list[str], added: Sequence[int]) -> tuple[PeftModel, list[str]]:
    """The base with an existing adapter to train on. Its head is new when it was trained on another number of labels.

    `unknown` names the base's parameters that its checkpoint does not have; the second value those that are still new.
    """
    options: Mapping[str, Any] = recipe.adapter or {}
    source = {"revision": options["revision"]} if options.get("revision") else {}
    with upstream_errors(recipe, "adapter.name_or_path"):
        path = adapter_path(str(options["name_or_path"]))
        weights = ["*.safetensors"] if recipe.model.use_safetensors else ["*.safetensors", "*.bin"]
        if not Path(path).is_dir():
            path = snapshot_download(path, allow_patterns=["adapter_config.json", *weights], **source)
        if not Path(path, "adapter_config.json").is_file():
            raise recipe.error("adapter.name_or_path", f"{path} holds no adapter (no adapter_config.json)")
        if recipe.model.use_safetensors and not Path(path, "adapter_model.safetensors").is_file():
            told = f"{path} holds no adapter_model.safetensors; model.use_safetensors: false also admits pickled weights"
            raise recipe.error("adapter.name_or_path", told)
        kind = PeftConfig.from_pretrained(path).peft_type.value
        if reason := _NOT_CONTINUED.get(kind):
            raise recipe.error("adapter.name_or_path", f"{path} is of type {kind}, which {reason}; train a new one")
        saved = load_peft_weights(path, device="cpu")
        with warnings.catch_warnings():  # peft warns of what is checked below
            warnings.filterwarnings("ignore", message="Some weights of PeftModel")
            model = attached(base, path, is_trainable=True, ignore_mismatched_sizes=True)
    built = get_peft_model_state_dict(model, save_embedding_layers=False)
    if any("embed" in name and name not in built for name in saved):  # whole, by upstream's guess: keep saving them
        model.saves_embeddings = True
        built = get_peft_model_state_dict(model, save_embedding_layers=True)
    unused = [name for name in saved if name not in built]
    differing = [name for name in saved if name in built and saved[name].shape != built[name].shape]
    heads = tuple(f".{name}." for name in getattr(model.peft_config["default"], "modules_to_save", None) or ())
    foreign = unused + [name for name in differing if not any(head in name for head in heads)]
    if foreign:
        told = f"{len(foreign)} of its {len(saved)} tensors do not fit {recipe.model.name_or_path} ({foreign[0]}, ...)"
        raise recipe.error("adapter.name_or_path", told)
    if lacking := set(added) - _trained_tokens(base, model.peft_config["default"]):
        told = f"{len(lacking)} of them are not among the tokens that the adapter to continue from trains; give those it has"
        raise recipe.error("model.added_tokens", told)
    head_was_saved = any(head in name for name in saved for head in heads)
    return _usable(recipe, model), differing if head_was_saved else unknown


def attached(base: PreTrainedModel, folder: str, **options: Any) -> PeftModel:
    """The base with a saved adapter."""
    return _mended(PeftModel.from_pretrained(base, folder, **options))


def check_saved(recipe: Recipe, model: PeftModel, unknown: Sequence[str]) -> None:
    """Raise UserError when parameters that the base's checkpoint does not have (a new head) are not saved with the adapter."""
    kept = tuple(get_peft_model_state_dict(model, save_embedding_layers=False))
    lost = [name for name in unknown if not any(f".{saved}".endswith(f".{name}") for saved in kept)]
    if not lost:
        return
    kind, heads = model.peft_type.value, ", ".join(sorted({name.rpartition(".")[0] for name in lost}))
    told = f"{recipe.model.name_or_path} has no {heads}, and {kind} would neither train nor save what is made up for it"
    if hasattr(model.peft_config["default"], "modules_to_save"):
        raise recipe.error("adapter", f"{told}; name it in modules_to_save, too")
    hint = "; LORA with trainable_token_indices does both" if kind == "TRAINABLE_TOKENS" else "; use another type"
    raise recipe.error("adapter", told + hint)


def save(
    model: PeftModel, folder: Path, state_dict: dict[str, torch.Tensor] | None = None, *, final: bool
) -> dict[str, torch.Tensor]:
    """Save the adapter and return its tensors as they are in the file.

    An initialisation that changed the base's weights is taken out of a `final` adapter, which then gives the trained model on
    the plain base for anybody: s (BA - B0 A0) is a LoRA of twice the rank. A checkpoint keeps it: resuming makes the same base.
    """
    # TRL's DPOTrainer keeps a copy of the adapter as `ref`, which is nobody's to load
    # whole embeddings, by upstream's guess, would be saved beside the rows of new tokens
    whole: bool = getattr(model, "saves_embeddings", False)
    model.save_pretrained(folder, state_dict=state_dict, selected_adapters=["default"], save_embedding_layers=whole)
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict, save_embedding_layers=whole)
    initial: Mapping[str, torch.Tensor] | None = getattr(model, "initial", None)
    if initial is None or not final:
        return tensors
    for name, before in initial.items():
        now = tensors[name]
        first = "_A" in name.rpartition("lora")[2]
        tensors[name] = torch.cat([now, (before if first else -before).to(now)], dim=0 if first else 1).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    grown = 2**0.5 if config.use_rslora else 2  # of alpha, so that the scaling stays
    config.init_lora_weights, config.inference_mode = True, True
    config.corda_config = config.lora_ga_config = None
    config.r, config.lora_alpha = 2 * config.r, grown * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: grown * alpha for name, alpha in config.alpha_pattern.items()}
    config.save_pretrained(folder)
    return tensors


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model whose parameters are held in parts by several processes, all of which call this.

    What is saved has its full shape on rank 0: of an adapted model the adapter, else all. The frozen base stays in parts.
    """
    state = model.state_dict()
    saved = state if not isinstance(model, PeftModel) else get_peft_model_state_dict(model, state, save_embedding_layers=True)
    kept = {id(tensor) for tensor in saved.values()}
    return state | engines.whole(model, {name for name, tensor in state.items() if id(tensor) in kept})


def copy_reference(model: Any) -> None:
    """Make `ref`, which TRL's DPOTrainer adds for an adapter to continue from, its frozen copy in all parameters.

    TRL copies those of submodules only: not trained tokens, nor the vectors and matrices that types keep as bare parameters.
    """
    if "ref" not in getattr(model, "peft_config", {}):
        return
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if (found := parameters.get(_of_reference(name))) is not None and found is not parameter:
            found.data.copy_(parameter.data)
            found.requires_grad_(False)


def _of_reference(name: str) -> str:
    return ".".join("ref" if part == "default" else part for part in name.split("."))


def regulariser(model: Any) -> torch.Tensor | float:
    """What KaSA and MonteCLoRA add to the loss, with its weights; 0 for other adapters."""
    config = getattr(model, "peft_config", {}).get("default")
    total: torch.Tensor | float = 0.0
    for name in ("kasa", "monteclora"):
        if getattr(config, f"{name}_config", None) is not None:
            total = total + getattr(model.base_model, f"_get_{name}_loss")()
    return total


def adapter_path(name_or_path: str) -> str:
    """An adapter's folder or Hub id; a run directory stands for the adapter in it."""
    run = Path(name_or_path)
    return str(run / "adapter") if (run / RECORD).is_file() else name_or_path


# --- options -------------------------------------------------------------------------------------------------------------


def _options(recipe: Recipe, base: PreTrainedModel, *, total_steps: int, added: Sequence[int]) -> dict[str, Any]:
    """The options of peft's configuration: the recipe's, nested ones as their classes, and those that follow from the run."""
    given: dict[str, Any] = {"task_type": _TASK_TYPES[recipe.task], **(recipe.adapter or {})}
    for name, reference in NESTED.items():
        if isinstance(given.get(name), dict):
            module, _, kind = reference.partition(":")
            with upstream_errors(recipe, f"adapter.{name}"):
                given[name] = getattr(importlib.import_module(module), kind)(**given[name])
    needs = {"eva": "eva_config", "corda": "corda_config", "lora_ga": "lora_ga_config"}.get(given.get("init_lora_weights"))  # type: ignore[arg-type]
    if needs and given.get(needs) is None:  # upstream warns of it, or fails
        module, _, kind = NESTED[needs].partition(":")
        given[needs] = getattr(importlib.import_module(module), kind)()
    if given["peft_type"] == "ADALORA":
        given.setdefault("total_step", total_steps)
    if given["peft_type"] == "FROD":
        given.setdefault("progressbar", False)
    if not added:
        return given
    whole = given.get("modules_to_save")
    if not _trains(base, base.get_input_embeddings(), whole):
        if not given.get("trainable_token_indices"):
            given["trainable_token_indices"] = _token_rows(base, added)
    elif (head := base.get_output_embeddings()) is not None and not _trains(base, head, whole):
        told = f"{whole} leaves out the head, whose rows of model.added_tokens would not be kept; name it, too"
        raise recipe.error("adapter.modules_to_save", told)
    return given


def _whole(recipe: Recipe, base: PreTrainedModel, unknown: Sequence[str]) -> dict[str, Any]:
    """peft's options by which the head of a classifier is trained and saved whole, whatever the architecture calls it.

    peft itself knows two names. The head is what the model has beside its backbone, and what its checkpoint lacks of that.
    """
    options: Mapping[str, Any] = recipe.adapter or {}
    known = upstream.fields(upstream.peft_types()[options["peft_type"]])
    if recipe.generative or "modules_to_save" not in known:
        return {}
    beside = [
        name
        for name, child in base.named_children()
        if name != base.base_model_prefix and any(p.numel() or getattr(p, "ds_numel", 0) for p in child.parameters())
    ]
    within = [name.rpartition(".")[0] for name in unknown if name.startswith(f"{base.base_model_prefix}.")]
    heads = list(dict.fromkeys([*beside, *within]))
    found: dict[str, Any] = {"modules_to_save": list(dict.fromkeys([*(options.get("modules_to_save") or ()), *heads]))}
    if options.get("target_modules") == "all-linear" and "exclude_modules" in known and heads:
        found["exclude_modules"] = options.get("exclude_modules") or rf"({'|'.join(map(re.escape, heads))})(\..*)?"
    return found


def _token_rows(base: PreTrainedModel, added: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """peft's option for rows of the embedding, and of the head, too, where that has rows of its own."""
    names = {id(module): name for name, module in base.named_modules()}
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or head.weight is embedding.weight:  # tied rows stay tied
        return list(added)
    return {names[id(module)]: list(added) for module in (embedding, head)}


def _trains(base: PreTrainedModel, module: torch.nn.Module, whole: Sequence[str] | None) -> bool:
    """Whether a module is among those that are trained whole."""
    name = next(name for name, found in base.named_modules() if found is module)
    return any(f".{name}".endswith(f".{part}") for part in whole or ())


def _trained_tokens(base: PreTrainedModel, config: PeftConfig) -> set[int]:
    """The tokens whose rows an adapter trains and saves."""
    if _trains(base, base.get_input_embeddings(), getattr(config, "modules_to_save", None)):
        return set(range(base.get_input_embeddings().num_embeddings))
    indices = getattr(config, "trainable_token_indices", None) or ()
    return set().union(*indices.values()) if isinstance(indices, dict) else set(indices)


def _usable(recipe: Recipe, model: PeftModel) -> PeftModel:
    # peft raises an adapter to fp32 and leaves a head in the base's dtype, which loses small updates and which fp16's gradient
    # scaler refuses; autocast lets them meet. DeepSpeed has no autocast: all has the low precision, with fp32 copies of its own
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.precision)
    dtype = low if engines.asked() == "DEEPSPEED" else torch.float32
    for parameter in model.parameters() if low else ():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16, torch.float32):
            parameter.data = parameter.data.to(dtype)
    if recipe.generative and isinstance(model.get_output_embeddings(), BaseTunerLayer):
        kind = model.peft_type.value
        hint = (
            "LORA with trainable_token_indices trains tokens whose rows embedding and head share"
            if kind == "TRAINABLE_TOKENS"
            else "leave it out of target_modules, or name it in modules_to_save"
        )
        told = f"{kind} would wrap the head, whose weight the loss of {recipe.task} reads directly; {hint}"
        raise recipe.error("adapter", told)
    return _mended(model)


def _mended(model: PeftModel) -> PeftModel:
    """What peft's wrappers lack for the fused head that TRL gives a base after it was wrapped."""
    base, kind = model.get_base_model(), model.peft_type.value
    if kind == "ADAPTION_PROMPT":  # calls the forward that the base had when it was wrapped
        model.base_model.forward = lambda *given, **options: base.forward(*given, **options)  # noqa: PLW0108  # looked up late
    head = getattr(base, "get_output_embeddings", lambda: None)()
    if isinstance(head, TrainableTokensWrapper):  # gives no attribute but the weight
        head.__dict__["bias"] = head.original_module.bias
    return model


def _factors(model: PeftModel) -> list[tuple[str, torch.Tensor]]:
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return [(name, tensor) for name, tensor in found.items() if "lora_" in name and "magnitude" not in name]
