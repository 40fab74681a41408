"""4-bit bases: the backbone is quantised, the head that is trained is not, whatever the architecture calls it."""

from __future__ import annotations

import pytest
import torch
import yaml

from scalepeft import model
from scalepeft import recipe as recipes
from scalepeft.console import quiet_upstream
from scalepeft.errors import UserError

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SIZES = {
    "distilbert": {"vocab_size": 64, "dim": 64, "n_layers": 1, "n_heads": 2, "hidden_dim": 64},
    "gpt2": {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 2, "pad_token_id": 0},
    "xlnet": {"vocab_size": 64, "d_model": 64, "n_layer": 1, "n_head": 2, "d_inner": 64},
    "bart": {"vocab_size": 64, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    | {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "eos_token_id": 2},
}
ARCHITECTURES = ["bert", "roberta", "electra", "deberta-v2", "mpnet", "llama", "qwen2", "qwen3", "mistral", "gemma2", *SIZES]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture
def loaded(tmp_path):
    """A tiny model of an architecture, loaded by a recipe in 4 bits."""
    quiet_upstream()
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    def load(architecture: str, task: str, **quantization):
        config = AutoConfig.for_model(architecture, **SIZES.get(architecture, SMALL))
        kind = AutoModelForCausalLM if task == "causal-lm" else AutoModel
        kind.from_config(config).save_pretrained(tmp_path / "base")
        recipe = {
            "task": task,
            "model": {"name_or_path": str(tmp_path / "base")},
            "quantization": NF4 | quantization,
            "adapter": {"peft_type": "LORA", "target_modules": "all-linear"},
            "data": {"train": {"path": "rows.csv"}},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return model.build(recipes.load(tmp_path / "recipe.yaml"), ["a", "b"], total_steps=1)[0]

    return load


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_stays_unquantised(loaded, architecture):
    from bitsandbytes.nn import Linear4bit

    built = loaded(architecture, "sequence-classification").get_base_model()
    backbone = built.base_model
    inside = {id(module) for module in backbone.modules()}
    quantised = [name for name, module in built.named_modules() if isinstance(module, Linear4bit)]
    outside = [name for name, module in built.named_modules() if isinstance(module, Linear4bit) and id(module) not in inside]
    assert quantised
    assert not outside
    heads = [name for name, p in built.named_parameters() if p.requires_grad and "lora_" not in name]
    assert heads, "no head is trained"
    assert all(p.is_floating_point() for name, p in built.named_parameters() if name in heads)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_language_model_keeps_embeddings_and_output_layer(loaded, architecture):
    from bitsandbytes.nn import Linear4bit

    built = loaded(architecture, "causal-lm").get_base_model()
    assert not isinstance(built.get_output_embeddings(), Linear4bit)
    assert built.get_input_embeddings().weight.is_floating_point()
    plain = [
        name for name, module in built.base_model.named_modules() if type(module) is torch.nn.Linear and "lora" not in name
    ]
    assert not plain, "unquantised in the backbone"


def test_a_quantised_base_is_not_quantised_again(loaded, tmp_path):
    import json

    loaded("llama", "causal-lm")
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    with pytest.raises(UserError, match=r"quantization: .* is quantised already \(awq\); leave the section out"):
        model.build(recipes.load(tmp_path / "recipe.yaml"), [], total_steps=1)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_a_head_over_a_half_precision_base_is_trained_in_float32_under_autocast(toy, train, precision):
    run = train(toy(model={"dtype": "bfloat16"}, training={"bf16": precision == "bf16", "num_train_epochs": 1}))
    assert run.record["verification"]["dtype"] == "bfloat16"
    from safetensors.torch import load_file

    saved = load_file(run.path / "adapter/adapter_model.safetensors")
    dtypes = {tensor.dtype for name, tensor in saved.items() if "classifier" in name and "lora" not in name}
    assert dtypes == {torch.float32 if precision == "bf16" else torch.bfloat16}
