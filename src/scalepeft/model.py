"""The model: base + quantisation + adapter, built for training or loaded from a run."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub import snapshot_download
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
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
from transformers.utils import logging as upstream_logging

from scalepeft.errors import RunFailed, UserError, did_you_mean, one_line
from scalepeft.fetch import asset_path
from scalepeft.recipe import Recipe
from scalepeft.run import RECORD, Run

Trained: TypeAlias = PreTrainedModel | PeftModel

if not sys.stderr.isatty():
    upstream_logging.disable_progress_bar()  # of loading weights: a bar in a log file is noise
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns of what it otherwise finds out by itself


_AUTO = {
    "sequence-classification": (AutoModelForSequenceClassification, TaskType.SEQ_CLS),
    "causal-lm": (AutoModelForCausalLM, TaskType.CAUSAL_LM),
    "preference": (AutoModelForCausalLM, TaskType.CAUSAL_LM),
}
"""The class that loads a task's model, and what peft calls the task."""


def tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with the recipe's added tokens, EOS and chat template; that of an adapter to continue from.

    Raises UserError when it cannot be loaded, or has neither a padding token nor EOS.
    """
    with _upstream_errors(recipe, "model.name_or_path"):
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
    with _upstream_errors(recipe, "training.chat_template_path"):
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
    config = _config(recipe, labels=None)
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):  # their positions start after the padding index
        positions -= config.pad_token_id + 1
    virtual = (recipe.adapter or {}).get("num_virtual_tokens") or 0  # of prompt and prefix tuning: they take positions
    return int(min(positions - virtual, tokenizer.model_max_length))


def build(
    recipe: Recipe, labels: Sequence[str], *, total_steps: int, vocabulary: int = 0, checkpointing: bool = False
) -> tuple[Trained, list[str]]:
    """The model to train and the names of those of its parameters that the checkpoint does not have (the new head).

    `vocabulary` is the tokenizer's size: the embedding grows to it where tokens were added. `total_steps` is the length of the
    run in optimizer steps, which AdaLoRA's schedule needs to know. `checkpointing` says that activations are recomputed.

    Raises UserError for what the recipe got wrong: an unreachable base, a checkpoint without the backbone's weights, a
    configuration key that the model does not have, target modules that match nothing.
    """
    base, new = _load_base(recipe, labels, vocabulary)
    if checkpointing and recipe.adapter is not None:
        base.enable_input_require_grads()  # a checkpointed block whose input needs no gradient gives its parameters none
    if recipe.adapter is not None and "name_or_path" in recipe.adapter:
        return _continued(recipe, base, new)
    return adapted(recipe, base, total_steps=total_steps), new


def adapted(recipe: Recipe, base: PreTrainedModel, *, total_steps: int) -> Trained:
    """The base with a new adapter as the recipe describes it, or as it is when the recipe has none."""
    options = recipe.adapter
    if options is None:
        return base
    given = {"task_type": _AUTO[recipe.task][1], **{k: v for k, v in options.items() if k != "peft_type"}}
    if options["peft_type"] == "ADALORA":
        given.setdefault("total_step", total_steps)
    with _upstream_errors(recipe, "adapter"):
        model = get_peft_model(base, PEFT_TYPE_TO_CONFIG_MAPPING[options["peft_type"]](**given))
    model.peft_config["default"].revision = recipe.model.revision
    return model


def _continued(recipe: Recipe, base: PreTrainedModel, new: list[str]) -> tuple[PeftModel, list[str]]:
    """The base with an existing adapter to train on. Its head is new when it was trained on another number of labels."""
    options: Mapping[str, Any] = recipe.adapter or {}
    source = {"revision": options["revision"]} if options.get("revision") else {}
    with _upstream_errors(recipe, "adapter.name_or_path"):
        path = adapter_path(str(options["name_or_path"]))
        weights = ["*.safetensors"] if recipe.model.use_safetensors else ["*.safetensors", "*.bin"]
        if not Path(path).is_dir():
            path = snapshot_download(path, allow_patterns=["adapter_config.json", *weights], **source)
        if not Path(path, "adapter_config.json").is_file():
            raise recipe.error("adapter.name_or_path", f"{path} holds no adapter (no adapter_config.json)")
        if recipe.model.use_safetensors and not Path(path, "adapter_model.safetensors").is_file():
            told = f"{path} holds no adapter_model.safetensors; model.use_safetensors: false also admits pickled weights"
            raise recipe.error("adapter.name_or_path", told)
        saved = load_peft_weights(path, device="cpu")
        with warnings.catch_warnings():  # peft warns of what is checked below
            warnings.filterwarnings("ignore", message="Some weights of PeftModel")
            model = PeftModel.from_pretrained(base, path, is_trainable=True, ignore_mismatched_sizes=True)
    built = get_peft_model_state_dict(model)
    unused = [name for name in saved if name not in built]
    differing = [name for name in saved if name in built and saved[name].shape != built[name].shape]
    heads = tuple(f".{name}." for name in model.peft_config["default"].modules_to_save or ())
    foreign = unused + [name for name in differing if not any(head in name for head in heads)]
    if foreign:
        told = f"{len(foreign)} of its {len(saved)} tensors do not fit {recipe.model.name_or_path} ({foreign[0]}, ...)"
        raise recipe.error("adapter.name_or_path", told)
    head_was_saved = any(head in name for name in saved for head in heads)
    return model, differing if head_was_saved else new


def load(run: Run) -> Trained:
    """The trained model of a run, in evaluation mode on its device: the base of its recipe and the run's own weights.

    Raises RunFailed when the run's weights are missing or damaged.
    """
    recipe, weights = run.recipe(), str(run.weights)
    vocabulary = len(AutoTokenizer.from_pretrained(weights)) if recipe.model.added_tokens else 0
    base = None if recipe.adapter is None else _load_base(recipe, run.record["labels"], vocabulary)[0]
    try:
        if base is None:
            model = _AUTO[recipe.task][0].from_pretrained(
                weights, dtype=recipe.model.dtype, trust_remote_code=recipe.model.trust_remote_code
            )
        else:
            model = PeftModel.from_pretrained(base, weights)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RunFailed(f"{weights} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    if recipe.quantization is None:
        model = model.to(device())
    return model.eval()


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def precision(recipe: Recipe) -> contextlib.AbstractContextManager[object]:
    """The autocast that the recipe trains under, for use in evaluation and prediction."""
    if recipe.precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device().type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision])


def answers(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], *, generative: bool) -> torch.Tensor:
    """The logits by which a trained model is told from another, on the CPU: of each row (of the next token after it)."""
    with torch.inference_mode():
        logits: torch.Tensor = model(**inputs).logits
    return (logits[:, -1] if generative else logits).float().cpu()


def adapter_path(name_or_path: str) -> str:
    """An adapter's folder or Hub id; a run directory stands for the adapter in it."""
    run = Path(name_or_path)
    return str(run / "adapter") if (run / RECORD).is_file() else name_or_path


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


def _load_base(recipe: Recipe, labels: Sequence[str], vocabulary: int = 0) -> tuple[PreTrainedModel, list[str]]:
    config = _config(recipe, labels)
    options: dict[str, Any] = {"dtype": recipe.model.dtype, "use_safetensors": recipe.model.use_safetensors or None}
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation
    if recipe.quantization is not None:
        options["quantization_config"] = _quantization(recipe, config)
    with _upstream_errors(recipe, "model.name_or_path"):
        model, loading = _AUTO[recipe.task][0].from_pretrained(
            *_base(recipe), config=config, output_loading_info=True, **options, **_source(recipe)
        )
    if recipe.model.added_tokens and vocabulary > model.get_input_embeddings().num_embeddings:
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


def _config(recipe: Recipe, labels: Sequence[str] | None) -> Any:
    with _upstream_errors(recipe, "model.name_or_path"):
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


def _quantization(recipe: Recipe, config: Any) -> BitsAndBytesConfig:
    """BitsAndBytesConfig with the head left unquantised: a 4-bit head cannot be trained.

    The head is what the model has beside its backbone, seen on a model without storage.
    """
    options: Mapping[str, Any] = recipe.quantization or {}
    if method := (getattr(config, "quantization_config", None) or {}).get("quant_method"):
        raise recipe.error(
            "quantization", f"{recipe.model.name_or_path} is quantised already ({method}); leave the section out"
        )
    with torch.device("meta"):
        skeleton = _AUTO[recipe.task][0].from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    heads = [name for name, _ in skeleton.named_children() if name != skeleton.base_model_prefix]
    with _upstream_errors(recipe, "quantization"):
        return BitsAndBytesConfig(**{"llm_int8_skip_modules": heads, **options})


def _base(recipe: Recipe) -> tuple[str]:
    name = recipe.model.name_or_path
    if name.startswith("fetched:"):
        name = str(asset_path(name))
    return (str(Path(name).expanduser()) if name.startswith("~") else name,)


def _source(recipe: Recipe) -> dict[str, Any]:
    given = {"revision": recipe.model.revision} if recipe.model.revision else {}
    return given | {"trust_remote_code": recipe.model.trust_remote_code}


@contextlib.contextmanager
def _upstream_errors(recipe: Recipe, key: str) -> Iterator[None]:
    """What upstream says of a wrong name, an unreachable Hub or a wrong option, as one line that names the recipe's."""
    try:
        yield
    except UserError:
        raise
    except (*_UPSTREAM_RAISES, SafetensorError, re.error) as error:
        raise recipe.error(key, _explained(recipe, key, error)) from error


_UPSTREAM_RAISES = (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError, RuntimeError)


def _explained(recipe: Recipe, key: str, error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    text = one_line(error)
    name = recipe.model.name_or_path if key.startswith("model") else (recipe.adapter or {}).get("name_or_path", "")
    if "couldn't connect" in text or "offline mode" in text.lower() or "outgoing traffic has been disabled" in text:
        return f"{name!r} is not in the cache ({HF_HUB_CACHE}) and the Hub cannot be reached; fetch it where there is a network"
    if "is not a local folder and is not a valid model identifier" in text or text.startswith("Repo id must"):
        return f"{name!r} is neither a folder here nor an id of the Hub that this token may read"
    if ("Target modules" in text and "not found" in text) or "No modules were targeted" in text:
        return f"target_modules {(recipe.adapter or {}).get('target_modules')!r} match no module of {recipe.model.name_or_path}"
    return text if len(text) < 300 else f"{text[:300]}..."
