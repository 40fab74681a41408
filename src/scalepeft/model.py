"""The model: base + quantisation + adapter, built for training or loaded from a run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils import logging as upstream_logging

from scalepeft import adapters, operators
from scalepeft.errors import RunFailed, did_you_mean, one_line
from scalepeft.fetch import asset_path
from scalepeft.initialisations import Examples
from scalepeft.launch import on_cpu
from scalepeft.recipe import Recipe
from scalepeft.refusals import upstream_errors
from scalepeft.run import Run

Trained: TypeAlias = PreTrainedModel | PeftModel
adapter_path = adapters.adapter_path

if not sys.stderr.isatty():
    upstream_logging.disable_progress_bar()  # of loading weights: a bar in a log file is noise
if on_cpu() or not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns of what it otherwise finds out by itself


AUTO = {
    "sequence-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
    "preference": AutoModelForCausalLM,
}
"""The class that loads a task's model."""


def tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with the recipe's added tokens, EOS and chat template; that of an adapter to continue from.

    Raises UserError when it cannot be loaded, or has neither a padding token nor EOS.
    """
    with upstream_errors(recipe, "model.name_or_path"):
        found = AutoTokenizer.from_pretrained(*(_tokenizer_of_adapter(recipe) or _base(recipe)), **_source(recipe))
    if recipe.model.added_tokens:
        found.add_tokens(list(recipe.model.added_tokens), special_tokens=True)
    if (eos := recipe.training.get("eos_token")) is not None:
        if eos not in found.get_vocab():
            raise recipe.error("training.eos_token", f"{eos!r} is no token of {recipe.model.name_or_path}")
        found.eos_token = eos
    if recipe.training.get("chat_template_path"):
        found.chat_template = _chat_template(recipe, found)
    if found.pad_token is None:  # decoders come without one; padding is masked, so that any token serves
        if found.eos_token is None:
            told = "its tokenizer has neither a padding token nor EOS; training.eos_token names one of its tokens"
            raise recipe.error("model.name_or_path", told if recipe.task == "causal-lm" else told.partition(";")[0])
        found.pad_token = found.eos_token
    return found


def tokenizer_of(run: Run) -> PreTrainedTokenizerBase:
    """The tokenizer that a run was trained with: the recipe may name files that have changed since."""
    return AutoTokenizer.from_pretrained(str(run.weights), trust_remote_code=run.recipe().model.trust_remote_code)


def _tokenizer_of_adapter(recipe: Recipe) -> tuple[str] | None:
    """The folder of an adapter to continue from, when its tokenizer lies there: it may know more tokens or another template."""
    named = (recipe.adapter or {}).get("name_or_path")
    folder = Path(adapter_path(str(named))) if named else None
    return (str(folder),) if folder and (folder / "tokenizer_config.json").is_file() else None


def _chat_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of training.chat_template_path: a Jinja file, or a tokenizer whose template is taken."""
    named = str(recipe.training["chat_template_path"])
    path = Path(named).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise recipe.error("training.chat_template_path", f"{path} cannot be read: {one_line(error)}") from None
    if path.suffix in (".jinja", ".j2"):
        raise recipe.error("training.chat_template_path", f"{path} does not exist")
    with upstream_errors(recipe, "training.chat_template_path"):
        other = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else named)
    if not other.chat_template:
        raise recipe.error("training.chat_template_path", f"the tokenizer of {named} has no chat template")
    lacking = [t for t in other.all_special_tokens if t in other.chat_template and t not in tokenizer.get_vocab()]
    if lacking:
        told = f"its template uses {', '.join(lacking)}, which {recipe.model.name_or_path} lacks"
        raise recipe.error("training.chat_template_path", f"{told}; model.added_tokens adds tokens")
    template: str = other.chat_template
    return template


def longest_input(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input in tokens that tokenizer and model take, beside the virtual tokens of an adapter that has some."""
    positions = window(configuration(recipe, labels=None)) or tokenizer.model_max_length
    virtual = (recipe.adapter or {}).get("num_virtual_tokens") or 0  # of prompt and prefix tuning: they take positions
    return int(min(positions - virtual, tokenizer.model_max_length))


def window(config: Any) -> int:
    """The longest input in tokens that a model has positions for; 0 when its configuration does not say."""
    positions = getattr(config, "max_position_embeddings", None) or 0
    if positions and config.model_type in ("roberta", "xlm-roberta", "camembert"):  # theirs start after the padding index
        positions -= config.pad_token_id + 1
    return int(positions)


def build(
    recipe: Recipe,
    labels: Sequence[str],
    *,
    total_steps: int,
    vocabulary: int = 0,
    checkpointing: bool = False,
    examples: Examples | None = None,
) -> tuple[Trained, list[str]]:
    """The model to train and the names of those of its parameters that the checkpoint does not have (the new head).

    `vocabulary` is the tokenizer's size: the embedding grows to it where tokens were added. `total_steps` is the length of the
    run in optimizer steps, which AdaLoRA's schedule needs to know. `checkpointing` says that activations are recomputed.
    `examples` gives training batches to an initialisation that looks at them.

    Raises UserError for what the recipe got wrong: an unreachable base, a checkpoint without the backbone's weights, a
    configuration key that the model does not have, target modules that match nothing.
    """
    base, new = load_base(recipe, labels, vocabulary)
    if recipe.adapter is None:
        return base, new
    if checkpointing:
        base.enable_input_require_grads()  # a checkpointed block whose input needs no gradient gives its parameters none
    added = tokenizer(recipe).convert_tokens_to_ids(list(recipe.model.added_tokens)) if recipe.model.added_tokens else []
    if "name_or_path" in recipe.adapter:
        model, new = adapters.continued(recipe, base, new, added)
    else:
        model = adapters.new(recipe, base, total_steps=total_steps, unknown=new, added=added, examples=examples)
    adapters.check_saved(recipe, model, new)
    return model, new


def adapted(recipe: Recipe, base: PreTrainedModel, *, total_steps: int) -> Trained:
    """The base with a new adapter as the recipe describes it, or as it is when the recipe has none."""
    return base if recipe.adapter is None else adapters.new(recipe, base, total_steps=total_steps)


def load(run: Run, *, folded: bool = False) -> Trained:
    """The trained model of a run, in evaluation mode on its device: the base of its recipe and the run's own weights.

    `folded` puts the adapter into the weights where the answers then differ by rounding alone: it computes less for each row.
    Raises RunFailed when the run's weights are missing or damaged.
    """
    operators.speed_up()
    recipe, weights = run.recipe(), str(run.weights)
    vocabulary = len(AutoTokenizer.from_pretrained(weights)) if grows(recipe) else 0
    base = None if recipe.adapter is None else load_base(recipe, run.record["labels"], vocabulary)[0]
    try:
        if base is None:
            model = AUTO[recipe.task].from_pretrained(
                weights, dtype=recipe.model.dtype, trust_remote_code=recipe.model.trust_remote_code
            )
        else:
            model = adapters.attached(base, weights)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RunFailed(f"{weights} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    if recipe.quantization is None:
        model = model.to(device())
    return (_folded(model) if folded else model).eval()


def _folded(model: Trained) -> Trained:
    """A model without its LoRA, which is in its weights; any other, or one whose weights are not all in float32, as it is.

    In half precision a weight would round away a part of what the adapter adds to it.
    """
    if not isinstance(model, PeftModel) or any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return model
    config = model.active_peft_config
    if config.peft_type != "LORA" or getattr(config, "alora_invocation_tokens", None):
        return model
    merged: PreTrainedModel = model.merge_and_unload()
    return merged


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    usable = torch.accelerator.is_available() and not on_cpu()
    return (torch.accelerator.current_accelerator() if usable else None) or torch.device("cpu")


def precision(recipe: Recipe) -> contextlib.AbstractContextManager[object]:
    """The autocast that the recipe trains under, for use in evaluation and prediction."""
    if recipe.precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device().type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision])


def answers(recipe: Recipe, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits by which a trained model is told from another, on the CPU: of each row (of the next token after it).

    A float32 base answers without the recipe's autocast, so that differences are seen; one of half precision needs it.
    """
    with torch.inference_mode(), precision(recipe) if model.config.dtype != torch.float32 else contextlib.nullcontext():
        logits: torch.Tensor = model(**inputs).logits
    return (logits[:, -1] if recipe.generative else logits).float().cpu()


def parameters(model: Trained) -> dict[str, int]:
    """Trainable and total parameters, counted as peft does: packed 4-bit weights and sharded ones by their real size."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel() or getattr(parameter, "ds_numel", 0)
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return {"trainable": trainable, "total": total}


def load_base(recipe: Recipe, labels: Sequence[str], vocabulary: int = 0) -> tuple[PreTrainedModel, list[str]]:
    """The base without an adapter, and the names of those of its parameters that the checkpoint does not have."""
    operators.speed_up()
    config = configuration(recipe, labels)
    options: dict[str, Any] = {"dtype": recipe.model.dtype, "use_safetensors": recipe.model.use_safetensors or None}
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation
    if recipe.quantization is not None:
        options["quantization_config"] = quantization(recipe, config)
    with upstream_errors(recipe, "model.name_or_path"):
        model, loading = AUTO[recipe.task].from_pretrained(
            *_base(recipe), config=config, output_loading_info=True, **options, **_source(recipe)
        )
    if grows(recipe) and vocabulary > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(vocabulary)
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights at their first evaluation on a CPU with AVX512-BF16: training then crashes or goes
        # on with other weights than were evaluated, and logits become bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    new = sorted(loading["missing_keys"])
    prefix = f"{model.base_model_prefix}."
    # a pooler belongs to the backbone by name and to the task by training: masked language models come without one
    lost = [name for name in new if name.startswith(prefix) and "pooler" not in name]
    if lost:
        shown = ", ".join(lost[:3])
        told = f"the checkpoint lacks {len(lost)} weights of the {config.model_type} backbone ({shown}, ...)"
        raise recipe.error("model.name_or_path", told)
    return model, new


def grows(recipe: Recipe) -> bool:
    """Whether the tokenizer may be longer than the base's embedding: by added tokens, now or in the run that is continued."""
    return bool(recipe.model.added_tokens) or "name_or_path" in (recipe.adapter or {})


def configuration(recipe: Recipe, labels: Sequence[str] | None) -> Any:
    """The model's configuration with the recipe's keys and, of a classifier, its labels. Raises UserError as `build` does."""
    with upstream_errors(recipe, "model.name_or_path"):
        config = AutoConfig.from_pretrained(*_base(recipe), **_source(recipe))
    for key, value in recipe.model.config.items():
        if not hasattr(config, key):
            told = f"{type(config).__name__} has no {key!r}{did_you_mean(key, config.to_dict())}"
            raise recipe.error(f"model.config.{key}", told)
        setattr(config, key, value)
    if labels:
        if config.pad_token_id is None:  # as `tokenizer` does
            config.pad_token_id = config.eos_token_id
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
        config.problem_type = "regression" if recipe.regression else "single_label_classification"
    return config


def quantization(recipe: Recipe, config: Any) -> BitsAndBytesConfig:
    """BitsAndBytesConfig with the head left unquantised: a 4-bit head cannot be trained.

    The head is what the model has beside its backbone, seen on a model without storage.
    """
    options: Mapping[str, Any] = recipe.quantization or {}
    if method := (getattr(config, "quantization_config", None) or {}).get("quant_method"):
        raise recipe.error(
            "quantization", f"{recipe.model.name_or_path} is quantised already ({method}); leave the section out"
        )
    auto = AUTO[recipe.task]
    with torch.device("meta"):
        if type(config) in auto._model_mapping:  # noqa: SLF001  # from_config would shard it under ZeRO-3, and fail
            skeleton = _get_model_class(config, auto._model_mapping)(config)  # noqa: SLF001
        else:
            skeleton = auto.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    heads = [name for name, _ in skeleton.named_children() if name != skeleton.base_model_prefix]
    with upstream_errors(recipe, "quantization"):
        return BitsAndBytesConfig(**{"llm_int8_skip_modules": heads, **options})


def source(recipe: Recipe) -> str:
    """Where from_pretrained finds the base: a folder, or a Hub id."""
    name = recipe.model.name_or_path
    if name.startswith("fetched:"):
        name = str(asset_path(name))
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _base(recipe: Recipe) -> tuple[str]:
    return (source(recipe),)


def _source(recipe: Recipe) -> dict[str, Any]:
    given = {"revision": recipe.model.revision} if recipe.model.revision else {}
    return given | {"trust_remote_code": recipe.model.trust_remote_code}
