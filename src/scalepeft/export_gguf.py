"""A Llama-like language model as GGUF, for llama.cpp and what is built on it: weights, metadata and tokenizer in one file."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft import beside, export_vllm, gguf_tokenizer
from scalepeft.errors import RunFailed, UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from scalepeft.export_source import Source

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture for a type of model."""
_ROPES = ("default", "llama3")


def check(source: Source, options: argparse.Namespace) -> None:
    """A model whose computation llama.cpp has, and a tokenizer whose rule it knows."""
    from transformers import AutoTokenizer

    config = source.config
    if not source.kind.endswith("ForCausalLM") or config.model_type not in ARCHITECTURES:
        what = f"{source.kind} of type {config.model_type}"
        raise UserError(
            f"{source.path}: --format gguf is for language models of type {', '.join(ARCHITECTURES)}, not for {what}"
        )
    if source.tokenizer is None:
        raise UserError(f"{source.path}: has no tokenizer, which is a part of the file; save it beside the model")
    rope = _rope(config).get("rope_type", "default")
    wrong = {
        f"hidden_act {config.hidden_act!r}; llama.cpp computes silu": config.hidden_act != "silu",
        f"rope_type {rope!r}; written are {', '.join(_ROPES)}": rope not in _ROPES,
        "biases in its attention or MLP": getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False),
        "a window in some of its layers": bool(getattr(config, "use_sliding_window", False)),
        f"heads of {_head(config)}; transformers reads those of 128 back": config.model_type == "qwen3"
        and _head(config) != 128,
    }
    if problems := [what for what, is_so in wrong.items() if is_so]:
        raise UserError(*(f"{source.path}: cannot be written as GGUF: it has {what}" for what in problems))
    gguf_tokenizer.pre(AutoTokenizer.from_pretrained(source.tokenizer), options.pre)


def _rope(config: Any) -> dict[str, Any]:
    return dict(config.rope_parameters)


def _head(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# --- the weights ------------------------------------------------------------------------------------------------------


def write(source: Source, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The file, tensor by tensor."""
    import gguf
    import numpy as np

    from scalepeft.shards import Checkpoint

    model, tokenizer = source.folders
    config, checkpoint = source.config, Checkpoint(model)
    kept = checkpoint.widest()
    own = {"float16": "f16", "bfloat16": "bf16"}.get(kept, "f32")
    outtype = own if options.outtype in (None, "auto") else options.outtype
    file = folder / f"model-{outtype}.gguf"
    writer = gguf.GGUFWriter(file, ARCHITECTURES[config.model_type])
    generation = model / "generation_config.json"
    given = json.loads(generation.read_bytes()) if generation.is_file() else {}
    rows = checkpoint.get("model.embed_tokens.weight").shape[0]
    _add_metadata(writer, source, rows, outtype)
    name = gguf_tokenizer.add(writer, tokenizer, rows, options.pre, given)
    tensors = _planned(config, checkpoint, outtype)
    beside.check_space(folder, sum(size for _, _, size, _ in tensors.values()))
    for target, (shape, kind, size, _) in tensors.items():
        writer.add_tensor_info(target, shape, np.dtype(np.float32), size, raw_dtype=kind)  # the shape is one of values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, kind, _, values in tensors.values():
        writer.write_tensor_data(gguf.quantize(values(), kind))
    writer.close()
    return {
        "file": file.name,
        "dtypes": [kept, {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(outtype, outtype)],
        "tokenizer": str(tokenizer),
        "chat": export_vllm.reading(tokenizer)["chat"],
        "told": {"outtype": outtype, "pre": name, "recognised": name in gguf_tokenizer.PRE, "context_length": _context(config)},
    }


def _context(config: Any) -> int:
    """The longest text: within the window of a model that has one, llama.cpp computes the same."""
    longest = int(config.max_position_embeddings)
    return min(longest, getattr(config, "sliding_window", None) or longest)


def _add_metadata(writer: Any, source: Source, rows: int, outtype: str) -> None:
    import gguf

    config = source.config
    writer.add_type(gguf.GGUFType.MODEL)
    name = source.path.absolute().name
    writer.add_name("Mistral" if name == "mistral" else name)  # transformers 5.23 takes that name for an architecture
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(outtype, f"MOSTLY_{outtype.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head(config))
    writer.add_value_length(_head(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head(config))
    writer.add_rope_freq_base(float(_rope(config)["rope_theta"]))


_Tensor = tuple[Sequence[int], Any, int, "Callable[[], np.ndarray[Any, Any]]"]


def _planned(config: Any, checkpoint: Any, outtype: str) -> dict[str, _Tensor]:
    """For each tensor of the file: its shape, type, size in bytes, and its values when they are wanted."""
    import gguf

    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == ARCHITECTURES[config.model_type])
    places = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    wanted = gguf.GGMLQuantizationType[outtype.upper()]
    planned: dict[str, _Tensor] = {}
    for name in checkpoint.names:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = places.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UserError(f"{checkpoint.folder}: {name} has no place in a GGUF file of this architecture")
        shape = tuple(checkpoint.get(name).shape)
        block, bytes_a_block = gguf.GGML_QUANT_SIZES[wanted]
        kind = wanted
        if len(shape) == 1:  # llama.cpp computes with norms and biases in float32
            kind = gguf.GGMLQuantizationType.F32
        elif shape[-1] % block:
            kind = gguf.GGMLQuantizationType.F16
        block, bytes_a_block = gguf.GGML_QUANT_SIZES[kind]
        planned[target] = (shape, kind, math.prod(shape) // block * bytes_a_block, _values(config, checkpoint, name))
    if _rope(config).get("rope_type") == "llama3":
        factors = _llama3_factors(config)
        planned["rope_freqs.weight"] = (factors.shape, gguf.GGMLQuantizationType.F32, factors.nbytes, lambda: factors)
    return planned


def _values(config: Any, checkpoint: Any, name: str) -> Callable[[], np.ndarray[Any, Any]]:
    def values() -> np.ndarray[Any, Any]:
        tensor = checkpoint.get(name).float()
        if ARCHITECTURES[config.model_type] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # transformers rotates the halves of a head, llama.cpp's llama its neighbours
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        found: np.ndarray[Any, Any] = tensor.contiguous().numpy()
        return found

    return values


def _llama3_factors(config: Any) -> np.ndarray[Any, Any]:
    """By how much llama.cpp divides each frequency: as transformers' own computation of them has it."""
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    steps = np.arange(0, _head(config), 2, dtype=np.float32) / _head(config)
    plain = 1.0 / (float(_rope(config)["rope_theta"]) ** steps)
    found: np.ndarray[Any, Any] = (plain / scaled.numpy()).astype(np.float32)
    return found


# --- in the proof's process -------------------------------------------------------------------------------------------


def inspect(folder: Path, plan: Mapping[str, Any]) -> None:
    """The tokenizer of the file, read by transformers, splits texts as the model's own."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(plan["tokenizer"])
    read = AutoTokenizer.from_pretrained(folder, gguf_file=plan["file"])
    rule = plan["told"]["pre"]
    if rule == "smollm":  # transformers 5.23 passes over this one, by which digits stand alone
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        read.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    elif rule not in gguf_tokenizer.PRE:  # taken on the user's word; all else of the tokenizer is compared
        read.backend_tokenizer.pre_tokenizer = own.backend_tokenizer.pre_tokenizer
    for text in (*gguf_tokenizer.TEXTS, *filter(None, [plan["chat"]])):
        ids = [reader(text, add_special_tokens=False)["input_ids"] for reader in (own, read)]
        if ids[0] != ids[1]:
            raise RunFailed(f"{folder / plan['file']}: its tokenizer reads otherwise than the model's: {text[:40]!r}")
    if own.chat_template != read.chat_template:
        raise RunFailed(f"{folder / plan['file']}: has another chat template than the model")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(own, name) is not None and getattr(own, name) != getattr(read, name):
            raise RunFailed(f"{folder / plan['file']}: has another {name} than the model's tokenizer")


def answers(folder: Path, plan: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """By transformers, from the file alone."""
    from transformers import GgufConfig

    from scalepeft import proof

    model = proof.opened(
        "AutoModelForCausalLM", folder, gguf_file=plan["file"], quantization_config=GgufConfig(dequantize=True)
    )
    factors = [t for t in _tensors(folder, plan) if t.name == "rope_freqs.weight"]
    for tensor in factors:  # which transformers passes over
        import torch

        model.model.rotary_emb.inv_freq /= torch.from_numpy(tensor.data.copy())
    return proof.answers(model, inputs)


def _tensors(folder: Path, plan: Mapping[str, Any]) -> Sequence[Any]:
    import gguf

    found: Sequence[Any] = gguf.GGUFReader(folder / plan["file"]).tensors
    return found


def same_tensors(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Each tensor of the file, as transformers unpacks it, beside the model's: within half a step of its type."""
    import gguf
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    from scalepeft.shards import Checkpoint

    config = AutoConfig.from_pretrained(folder, gguf_file=plan["file"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(config.model_type, TensorProcessor)(config=config.to_dict())
    names, checkpoint = get_gguf_hf_weights_map(model, processor), Checkpoint(Path(plan["model"]))
    tensors = [tensor for tensor in _tensors(folder, plan) if tensor.name != "rope_freqs.weight"]
    unwritten = set(checkpoint.names) - {names.get(t.name) for t in tensors} - {"lm_head.weight"}
    if unwritten:
        raise RunFailed(f"{folder / plan['file']}: lacks {sorted(unwritten)[:3]}")
    worst = 0.0
    for tensor in tensors:
        values = processor.process(weights=gguf.dequantize(tensor.data, tensor.tensor_type), name=tensor.name).weights
        expected = checkpoint.get(names[tensor.name]).float().numpy()
        block = gguf.GGML_QUANT_SIZES[tensor.tensor_type][0]
        largest = np.abs(expected.reshape(-1, block)).max(axis=1, keepdims=True)
        away = np.abs(values - expected).reshape(-1, block) / np.maximum(largest, _SMALLEST)
        worst = max(worst, float(away.max()) / max(_STEPS[tensor.tensor_type.name], _SMALLEST))
    return {
        "method": "tensors",
        "reason": "the model does not fit into memory",
        "tensors": len(tensors),
        "max_difference": worst,
        "bound": 1.0,
        "passed": worst <= 1.0,
    }


_STEPS = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.5 / 127 + 2**-11}
"""How far a value may be moved, relative to the largest of its block; of 8 bits half a step and the rounding of the step."""
_SMALLEST = 2.0**-14
"""The smallest normal value of float16: what is smaller is rounded to a step of its own."""


def closing(output: Path, record: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """The line that runs it."""
    file = next(name for name in record["files"] if name.endswith(".gguf"))
    rule = record["pre"] if record["recognised"] else f"{record['pre']}, by --pre and not proved"
    return [
        ("as", f"{record['outtype']}, context {record['context_length']:,}, text split as {rule}"),
        ("serve", f"llama-server --model {output / file}"),
    ]
