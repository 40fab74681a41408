"""Claims about merging: all types and layers equal peft's own merge; what is written is whole and proved, or not there."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalepeft import upstream
from scalepeft.console import quiet_upstream
from scalepeft.errors import RunFailed, UserError, program

quiet_upstream()

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model  # noqa: E402  # after it was silenced
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from scalepeft import folding, merge, orders, proof  # noqa: E402
from scalepeft.adapter_rules import NESTED  # noqa: E402
from scalepeft.base import Order  # noqa: E402
from scalepeft.folding import Fold  # noqa: E402
from scalepeft.shards import Checkpoint  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import adapters_table as table  # noqa: E402

ENCODER, DECODER, CONV = "encoder", "decoder", "conv1d"
CLASSES = {ENCODER: AutoModelForSequenceClassification, DECODER: AutoModelForCausalLM, CONV: AutoModelForCausalLM}

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def tiny_gpt(tiny_lm, tmp_path_factory) -> Path:
    """A GPT-2, whose layers are Conv1D, with random weights."""
    folder = tmp_path_factory.mktemp("tiny-gpt")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.save_pretrained(folder)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tiny_model, tiny_lm, tiny_gpt) -> dict[str, Path]:
    return {ENCODER: tiny_model, DECODER: tiny_lm, CONV: tiny_gpt}


def adapter(base: Path, which: str, folder: Path, kind: str = "LORA", *, grow: int = 0, **options: Any) -> Path:
    """An adapter whose every trained value is something, saved by peft."""
    for name, reference in NESTED.items():
        if isinstance(options.get(name), dict):
            module, _, cls = reference.partition(":")
            options[name] = getattr(importlib.import_module(module), cls)(**options[name])
    task = "SEQ_CLS" if which == ENCODER else "CAUSAL_LM"
    torch.manual_seed(0)
    model = CLASSES[which].from_pretrained(base)
    if grow:
        model.resize_token_embeddings(grow)
    if kind == "ADALORA":
        options |= {"total_step": 10}
    model = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type=task, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape).to(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def order(base: Path, which: str, *adapters: Path, **changes: Any) -> Order:
    given = {"kind": CLASSES[which].__name__, "labels": 2 if which == ENCODER else None, "adapters": list(map(str, adapters))}
    return Order(**{"base": str(base), "base_name": base.name, "config": str(base), **given, **changes})


def folded(of: Order) -> dict[str, torch.Tensor]:
    fold = Fold(of)
    return {slot.name: fold.tensor(slot) for group in fold.slots() for slot in group}


def by_peft(base: Path, which: str, folder: Path, grow: int = 0) -> dict[str, torch.Tensor]:
    model = CLASSES[which].from_pretrained(base)
    if grow:
        model.resize_token_embeddings(grow)
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    # peft leaves the head of LN_TUNING wrapped
    return {n.replace("modules_to_save.default.", ""): t for n, t in merged.items() if "original_module" not in n}


def agree(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, last_places: int = 0) -> None:
    """Bit for bit, or within some units in the last place of the largest value of a row's sums."""
    for name, tensor in ours.items():
        if last_places:
            torch.testing.assert_close(tensor, theirs[name], rtol=last_places * 2**-23, atol=last_places * 2**-26, msg=name)
        else:
            assert torch.equal(tensor, theirs[name]), name
    assert set(theirs) - set(ours) <= {"lm_head.weight"}


# --- every type, layer kind and variant -------------------------------------------------------------------------------

NO_MERGE = {"XLORA", *folding.NOT_FOLDED}
ROUNDS_OTHERWISE = {"GLORA"}
"""Types whose sums are made in another order for a layer alone."""
NO_BIAS = {("BEFT", DECODER), ("biases of LoRA", DECODER)}
"""What changes biases has no place in a layer without one."""

TYPES = [kind for kind in upstream.peft_types() if kind not in NO_MERGE]
VARIANTS = {name: given for name, given in table.LORA.items() if name not in ("fast PiSSA", "CorDA", "LoftQ", "EVA")}
"""Those that peft makes by itself; fast PiSSA, CorDA, EVA and LoftQ are saved as plain LoRA."""


@pytest.mark.parametrize("which", [pytest.param(ENCODER, marks=pytest.mark.long), DECODER])
@pytest.mark.parametrize("kind", TYPES)
def test_each_type_is_merged_as_peft_does(kind, which, bases, tmp_path):
    options = table.given(kind, table.OPTIONS.get(kind), which)
    if (kind, which) == ("TRAINABLE_TOKENS", ENCODER):
        pytest.skip("saves no head")
    folder = adapter(bases[which], which, tmp_path / "adapter", kind, **options)
    if (kind, which) in NO_BIAS:
        with pytest.raises(UserError, match="BEFT cannot be folded into model"):
            folded(order(bases[which], which, folder))
        return
    places = 2 if kind in ROUNDS_OTHERWISE else 0
    agree(folded(order(bases[which], which, folder)), by_peft(bases[which], which, folder), last_places=places)


@pytest.mark.long
@pytest.mark.parametrize("which", [ENCODER, DECODER])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_of_lora_is_merged_as_peft_does(variant, which, bases, tmp_path):
    options = table.EVERYWHERE | {"r": 4} | VARIANTS[variant]
    folder = adapter(bases[which], which, tmp_path / "adapter", **options)
    if (variant, which) in NO_BIAS:
        with pytest.raises(UserError, match="base layer has no bias"):
            folded(order(bases[which], which, folder))
        return
    agree(folded(order(bases[which], which, folder)), by_peft(bases[which], which, folder))


LAYERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Conv1D": (CONV, "LORA", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D, DoRA": (CONV, "LORA", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "Conv1D, IA3": (
        CONV,
        "IA3",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "Conv1D, AdaLoRA": (
        CONV,
        "ADALORA",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1},
    ),
    "positions": (CONV, "LORA", {"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}),
    "embedding": (ENCODER, "LORA", {"target_modules": ["word_embeddings", "query"]}),
    "embedding, DoRA": (ENCODER, "LORA", {"target_modules": ["word_embeddings"], "use_dora": True}),
    "biases trained": (ENCODER, "LORA", {"target_modules": ["query"], "bias": "all"}),
    "norms whole": (DECODER, "LORA", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_each_kind_of_layer_is_merged_as_peft_does(layer, bases, tmp_path):
    which, kind, options = LAYERS[layer]
    folder = adapter(bases[which], which, tmp_path / "adapter", kind, **options)
    agree(folded(order(bases[which], which, folder)), by_peft(bases[which], which, folder))


BY_ROWS = {
    "LoRA": (ENCODER, "LORA", {"target_modules": "all-linear", "r": 4}),
    "DoRA": (DECODER, "LORA", {"target_modules": "all-linear", "r": 4, "use_dora": True}),
    "LoRA of Conv1D": (CONV, "LORA", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "LoRA of an embedding": (ENCODER, "LORA", {"target_modules": ["word_embeddings"]}),
    "AdaLoRA": (DECODER, "ADALORA", {"target_modules": ["q_proj", "down_proj"]}),
    "IA3": (DECODER, "IA3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LoHa": (DECODER, "LOHA", {"target_modules": ["q_proj", "down_proj"]}),
    "VeRA": (DECODER, "VERA", {"target_modules": ["q_proj", "up_proj"]}),
}


@pytest.mark.parametrize("name", BY_ROWS)
def test_row_by_row_is_within_a_unit_in_the_last_place(name, bases, tmp_path, monkeypatch):
    which, kind, options = BY_ROWS[name]
    folder = adapter(bases[which], which, tmp_path / "adapter", kind, **options)
    expected = by_peft(bases[which], which, folder)
    monkeypatch.setattr(folding, "BLOCK", 2048)
    fold = Fold(order(bases[which], which, folder))
    slots = [slot for group in fold.slots() for slot in group]
    parts = {slot.name: list(fold.parts(slot)) for slot in slots}
    adapted = [slot for slot in slots if slot.key in {f"{unit}.weight" for unit in fold.units}]
    assert all(len(parts[slot.name]) > 1 for slot in adapted if slot.bytes > 2048)
    agree({slot.name: torch.cat(parts[slot.name]) for slot in slots}, expected, last_places=1)


def test_a_trained_embedding_parts_from_the_head_that_shares_it(bases, tmp_path):
    """peft adds the delta to both sides of shared weights, and then answers otherwise than before."""
    folder = adapter(bases[DECODER], DECODER, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    base = load_file(bases[DECODER] / "model.safetensors")
    fold = Fold(order(bases[DECODER], DECODER, folder))
    assert fold.untied
    assert not fold.config.tie_word_embeddings
    merged = {slot.name: fold.tensor(slot) for group in fold.slots() for slot in group}
    assert torch.equal(merged["lm_head.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(merged["model.embed_tokens.weight"], merged["lm_head.weight"])


def test_added_tokens_bring_their_rows(bases, tmp_path):
    grown = len(AutoTokenizer.from_pretrained(bases[DECODER])) + 2
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [grown - 2, grown - 1]}
    folder = adapter(bases[DECODER], DECODER, tmp_path / "adapter", grow=grown, **options)
    merged = folded(order(bases[DECODER], DECODER, folder, vocabulary=grown))
    agree(merged, by_peft(bases[DECODER], DECODER, folder, grown))
    assert merged["model.embed_tokens.weight"].shape[0] == grown


@pytest.mark.parametrize(("combination", "density"), [("linear", None), ("ties", 0.5), ("dare_linear", 0.5), ("cat", None)])
def test_several_adapters_are_combined_by_peft(combination, density, bases, tmp_path):
    base = bases[DECODER]
    folders = [adapter(base, DECODER, tmp_path / f"a{r}", target_modules=["q_proj"], r=4, lora_alpha=r) for r in (3, 9)]
    given = order(base, DECODER, *folders, weights=[0.7, 0.4], combination=combination, density=density)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0])
    model.load_adapter(folders[1], "other")
    torch.manual_seed(given.seed)
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "both", combination_type=combination, density=density)
    model.set_adapter("both")
    agree(folded(given), model.merge_and_unload().state_dict())


def test_half_precision_is_rounded_once(bases, tmp_path):
    folder = adapter(bases[DECODER], DECODER, tmp_path / "adapter", target_modules="all-linear", r=4)
    exact = by_peft(bases[DECODER], DECODER, folder)
    merged = folded(order(bases[DECODER], DECODER, folder, output_dtype="bfloat16"))
    agree(merged, {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()})


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "SHADOW", "LILY"])
def test_what_is_no_change_of_weights_is_refused(kind, bases, tmp_path):
    options = table.given(kind, table.OPTIONS.get(kind), DECODER)
    folder = adapter(bases[DECODER], DECODER, tmp_path / "adapter", kind, **options)
    with pytest.raises(UserError, match=f"{kind} .*; it cannot be merged, load it with peft") as told:
        Fold(order(bases[DECODER], DECODER, folder))
    assert len(told.value.problems) == 1


@pytest.fixture(scope="module")
def tiny_moe(tiny_lm, tmp_path_factory) -> Path:
    """A Mixtral, whose experts lie one by one in the files and together in the model."""
    folder = tmp_path_factory.mktemp("tiny-moe")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(folder)
    return folder


def test_experts_are_copied_as_they_lie_in_the_files(tiny_moe, tmp_path, monkeypatch):
    here(monkeypatch, memory=2**40)
    folder = adapter(tiny_moe, DECODER, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    run_merge(folder, "--output", tmp_path / "merged")
    assert sorted(Checkpoint(tmp_path / "merged").names) == sorted(Checkpoint(tiny_moe).names)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    agree(merged, by_peft(tiny_moe, DECODER, folder))


def test_an_adapter_of_experts_is_merged_in_memory_only(tiny_moe, tmp_path, monkeypatch, capsys):
    here(monkeypatch, memory=2**40)
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    folder = adapter(tiny_moe, DECODER, tmp_path / "adapter", **options)
    capsys.readouterr()  # the bars of making it
    assert "give --in-memory" in refused(capsys, tmp_path, folder, "--output", tmp_path / "merged")
    run_merge(folder, "--output", tmp_path / "merged", "--in-memory")
    agree(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict(), by_peft(tiny_moe, DECODER, folder))


# --- every tensor of the adapter --------------------------------------------------------------------------------------


def test_each_tensor_of_the_adapter_makes_a_difference(bases, tmp_path):
    options = {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "modules_to_save": ["input_layernorm"]}
    folder = adapter(bases[DECODER], DECODER, tmp_path / "adapter", **options)
    file = folder / "adapter_model.safetensors"
    tensors, before = load_file(file), folded(order(bases[DECODER], DECODER, folder))
    for name in tensors:
        changed = {n: t * 1.5 + 0.1 if n == name else t for n, t in tensors.items()}
        save_file(changed, file, metadata={"format": "pt"})
        after = folded(order(bases[DECODER], DECODER, folder))
        assert [n for n in after if not torch.equal(after[n], before[n])], name


@pytest.mark.parametrize("damage", ["renamed", "missing", "added"])
def test_a_tensor_without_a_place_or_a_place_without_a_tensor_fails(damage, bases, tmp_path):
    folder = adapter(bases[DECODER], DECODER, tmp_path / "adapter", target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    if damage != "added":
        moved = tensors.pop(first)
    if damage != "missing":
        tensors[first.replace("layers.0", "layers.7")] = tensors[max(tensors)].clone() if damage == "added" else moved
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors of its adapter|1 of its \d tensors have no place there"):
        Fold(order(bases[DECODER], DECODER, folder))


# --- the folder -------------------------------------------------------------------------------------------------------


def run_merge(*arguments: Any, status: int = 0) -> None:
    assert program(merge.main, [str(a) for a in arguments]) == status


@pytest.fixture(scope="module")
def lora(bases, tmp_path_factory) -> Path:
    """An adapter on the small language model."""
    return adapter(bases[DECODER], DECODER, tmp_path_factory.mktemp("lora") / "adapter", target_modules="all-linear", r=4)


def test_a_run_becomes_a_folder_for_from_pretrained(complete, tmp_path, capsys):
    run_merge(complete.path, "--output", tmp_path / "merged")
    said = capsys.readouterr().out
    assert "proved  in a fresh process: largest difference of 30 rows' logits" in said
    model, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values())
    assert model.config.id2label == {0: "negative", 1: "positive"}
    reference = load_file(complete.path / "verification.safetensors")
    expected = reference.pop("logits")
    torch.testing.assert_close(model.eval()(**reference).logits, expected, rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert record["proof"]["max_difference"] <= record["proof"]["bound"] < 1e-2
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size
    assert {p.name for p in tmp_path.iterdir()} == {"merged"}
    run_merge(complete.path, "--output", tmp_path / "merged")
    assert "is complete already" in capsys.readouterr().out


def test_shards_have_a_right_index(lora, tmp_path):
    run_merge(lora, "--output", tmp_path / "merged", "--shard-size", "0.1MB", "--no-proof")
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    tensors = {name: (file.name, tensor) for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 2
    assert index["weight_map"] == {name: file for name, (file, _) in tensors.items()}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for _, t in tensors.values())
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert (tmp_path / "merged/generation_config.json").is_file()
    assert model.config.tie_word_embeddings


def test_peft_merges_in_memory_on_request(lora, tmp_path):
    for name, more in (("ours", ()), ("theirs", ("--in-memory",))):
        run_merge(lora, "--output", tmp_path / name, "--no-proof", *more)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    agree(ours, theirs)


def damaged(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "q_proj" in n)
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("fits", [True, False])
def test_a_model_that_answers_otherwise_is_not_kept(fits, lora, tmp_path, monkeypatch):
    save = merge._save_tokenizer

    def spoilt(given: Order, folder: Path) -> None:
        damaged(folder)
        save(given, folder)

    monkeypatch.setattr(merge, "_save_tokenizer", spoilt)
    here(monkeypatch, memory=2**40 if fits else 0)
    options = orders.asked(merge._parser().parse_args([str(lora), "--output", "-"]))
    with pytest.raises(RunFailed, match="does not answer as base and adapter do"):
        merge.merge(options, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def here(monkeypatch, *, memory: int) -> None:
    """The proof in this process, on a machine with so much memory."""
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    found = {"prove": proof.prove, "measure": proof.measure}
    monkeypatch.setattr(
        merge, "_in_fresh_process", lambda what, part: found[what](part, json.loads((part / proof.PLAN).read_text()))
    )


def test_where_the_model_does_not_fit_it_is_proved_layer_by_layer(complete, tmp_path, monkeypatch):
    here(monkeypatch, memory=0)
    run_merge(complete.path, "--output", tmp_path / "merged")
    found = json.loads((tmp_path / "merged/merge.json").read_text())["proof"]
    assert found["method"] == "tensors"
    assert found["max_difference"] <= found["bound"]
    assert found["layers"] > 10


# --- 4-bit bases ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised(tiny_lm, tmp_path_factory) -> Any:
    """A run trained on 4-bit weights."""
    from conftest import train_here, write_chat

    folder = tmp_path_factory.mktemp("quantised")
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return train_here(write_chat(folder, tiny_lm, quantization=quantization))


def test_the_base_nearer_to_what_was_trained_is_chosen(quantised, tmp_path, capsys, monkeypatch):
    here(monkeypatch, memory=2**40)
    rows = quantised.path.parent / "chat_test.jsonl"
    run_merge(quantised.path, "--output", tmp_path / "merged", "--verify", rows)
    said = capsys.readouterr().out
    assert "merging into the dequantized base: nearer to what was trained" in said
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    found = record["verify"]
    assert record["merged_on"] == "dequantized"
    assert found["merged_on_dequantized"]["mean_difference"] < found["merged_on_original"]["mean_difference"] / 100
    exact = found["adapter_on_base"]["loss"]
    assert abs(found["merged_on_dequantized"]["loss"] - exact) < 1e-4
    assert exact == pytest.approx(quantised.record["metrics"]["after"]["loss"], abs=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())


@pytest.mark.long
def test_preferences_are_verified_by_their_own_loss(tiny_lm, tmp_path, monkeypatch):
    here(monkeypatch, memory=2**40)
    from conftest import train_here, write_chat

    run = train_here(write_chat(tmp_path, tiny_lm, task="preference"))
    run_merge(run.path, "--output", tmp_path / "merged", "--verify", tmp_path / "pairs_test.jsonl")
    found = json.loads((tmp_path / "merged/merge.json").read_text())["verify"]
    assert found["adapter_on_base"]["loss"] == pytest.approx(run.record["metrics"]["after"]["loss"], abs=1e-6)
    assert found["merged_on_original"]["loss"] == pytest.approx(found["adapter_on_base"]["loss"], abs=1e-5)


def test_the_original_base_is_merged_into_when_asked(quantised, bases, tmp_path, monkeypatch):
    here(monkeypatch, memory=2**40)
    run_merge(quantised.path, "--output", tmp_path / "merged", "--base", "original")
    agree(load_file(tmp_path / "merged/model.safetensors"), by_peft(bases[DECODER], DECODER, quantised.path / "adapter"))


def test_a_base_whose_files_are_quantised_is_read_as_what_they_stand_for(quantised, tiny_lm, tmp_path, monkeypatch):
    here(monkeypatch, memory=2**40)
    from transformers import BitsAndBytesConfig

    given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_lm, quantization_config=given)
    model.save_pretrained(tmp_path / "packed")
    shutil.copytree(quantised.path / "adapter", tmp_path / "adapter")
    run_merge(tmp_path / "adapter", "--base-model", tmp_path / "packed", "--output", tmp_path / "merged")
    run_merge(
        *(tmp_path / "adapter", "--base-model", tiny_lm, "--output", tmp_path / "same", "--base", "dequantized"),
        *("--quantization", "load_in_4bit=true", "bnb_4bit_quant_type=nf4", "bnb_4bit_use_double_quant=true", "--no-proof"),
    )
    agree(load_file(tmp_path / "merged/model.safetensors"), load_file(tmp_path / "same/model.safetensors"))


# --- mistakes ---------------------------------------------------------------------------------------------------------


def refused(capsys, folder: Path, *arguments: Any) -> str:
    """One line on stderr, exit status 2, and nothing written."""
    before = sorted(folder.rglob("*"))
    run_merge(*arguments, status=2)
    told = capsys.readouterr().err
    assert told.count("\n") == 1, told
    assert sorted(folder.rglob("*")) == before
    return told


@pytest.fixture
def sharded(bases, tmp_path) -> Callable[[], Path]:
    """A copy of the base in several shards."""

    def make() -> Path:
        model = AutoModelForCausalLM.from_pretrained(bases[DECODER])
        model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
        AutoTokenizer.from_pretrained(bases[DECODER]).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def missing(base: Path) -> None:
    min(base.glob("*.safetensors")).unlink()


def truncated(base: Path) -> None:
    file = min(base.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def header_cut(base: Path) -> None:
    min(base.glob("*.safetensors")).write_bytes(b"\x40")


def index_lies(base: Path) -> None:
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names, files = list(index["weight_map"]), sorted(set(index["weight_map"].values()))
    index["weight_map"][names[0]] = next(f for f in files if f != index["weight_map"][names[0]])
    file.write_text(json.dumps(index))


def index_torn(base: Path) -> None:
    file = base / "model.safetensors.index.json"
    file.write_text(file.read_text()[:50])


def gone(base: Path) -> None:
    shutil.rmtree(base)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (missing, "is missing; fetch the base anew"),
        (truncated, "is truncated: it is "),
        (header_cut, "its header cannot be read"),
        (index_lies, "which does not hold it; fetch the base anew"),
        (index_torn, "is damaged: it is no JSON with a weight_map"),
        (gone, "does not exist; bring it back"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_damaged_base_is_told_in_one_line(damage, told, sharded, lora, tmp_path, capsys):  # noqa: PLR0917  # fixtures
    base = sharded()
    damage(base)
    assert told in refused(capsys, tmp_path, lora, "--base-model", base, "--output", tmp_path / "merged")


def test_an_adapter_of_another_base_is_named(lora, tiny_gpt, tmp_path, capsys):
    told = refused(capsys, tmp_path, lora, "--base-model", tiny_gpt, "--output", tmp_path / "merged")
    assert "tiny-llama" in told
    assert f"does not fit {tiny_gpt}" in told


def test_a_base_that_is_not_in_the_cache_is_named(lora, tmp_path, capsys):
    told = refused(capsys, tmp_path, lora, "--base-model", "nobody/nothing", "--output", tmp_path / "merged")
    assert "nobody/nothing is not in the cache" in told


def test_a_folder_with_something_in_it_is_left_alone(lora, tmp_path, capsys):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/mine").write_text("x")
    assert "is not empty; give another --output" in refused(capsys, tmp_path, lora, "--output", tmp_path / "merged")


def test_a_full_disk_leaves_nothing(lora, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "are needed and 0.00 GB free" in refused(capsys, tmp_path, lora, "--output", tmp_path / "merged")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(lora, tmp_path, capsys, monkeypatch):
    from scalepeft import shards

    real = Path.open
    monkeypatch.setattr(
        shards.Path,
        "open",
        lambda self, *a, **k: real(Path("/dev/full") if self.name.endswith("tensors.part") else self, *a, **k),
    )
    assert "the disk is full; free space" in refused(capsys, tmp_path, lora, "--output", tmp_path / "merged")


def test_a_run_that_is_not_complete_is_refused(complete, tmp_path, capsys):
    shutil.copytree(complete.path, tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    assert "the run is interrupted" in refused(capsys, tmp_path, tmp_path / "run", "--output", tmp_path / "merged")


# --- killed -----------------------------------------------------------------------------------------------------------


def whole(output: Path, expected: dict[str, torch.Tensor]) -> None:
    """A folder that looks finished is finished."""
    assert json.loads((output / "merge.json").read_text())["proof"]["method"] == "logits"
    checkpoint = Checkpoint(output)
    assert sorted(checkpoint.names) == sorted(expected)
    assert all(torch.equal(checkpoint.get(name), tensor) for name, tensor in expected.items())


KILLED = """
import os, signal, sys, time
from scalepeft.console import quiet_upstream
quiet_upstream()
import torch, transformers.models.llama.modeling_llama
import scalepeft.folding
from scalepeft import merge
from scalepeft.errors import program
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if not child:
        os._exit(program(merge.main, sys.argv[1:]))
    if float(line):
        time.sleep(float(line))
        os.kill(child, signal.SIGKILL)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Merges, each in a process that has its imports already, killed after so many seconds; 0 lets it end."""


@pytest.mark.long
def test_killed_at_twenty_points_it_is_never_taken_for_finished(lora, bases, tmp_path):
    expected, output = folded(order(bases[DECODER], DECODER, lora)), tmp_path / "merged"
    command = [sys.executable, "-c", KILLED, str(lora), "--shard-size", "0.02MB", "--output", str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def merged(seconds: float) -> int:
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
            return int(next(line for line in process.stdout if line.startswith("ended")).split()[1])

        merged(0.01)  # the first waits for the imports
        started = time.monotonic()
        assert merged(0) == 0
        length = time.monotonic() - started
        whole(output, expected)
        written = max(p.stat().st_mtime for p in output.glob("*.safetensors")) - time.time() + time.monotonic() - started
        times = [written * (n + 0.5) / 14 for n in range(14)] + [written + (length - written) * n / 6 for n in range(1, 7)]
        left = set()
        for seconds in times:
            shutil.rmtree(output)
            ended = merged(seconds)
            assert ended in (0, -signal.SIGKILL)
            if output.exists():
                whole(output, expected)
            left.add(len(list((tmp_path / "merged.part").rglob("*.safetensors"))))
            assert merged(0) == 0
            whole(output, expected)
            assert {p.name for p in tmp_path.iterdir()} == {"merged"}
        assert len(left) > 2, "killed at the same place each time"
        process.stdin.close()


DYING = """
import os, signal, sys
from scalepeft import merge, shards
from scalepeft.errors import program
real, left = shards.write, [2]
def write(*given):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return real(*given)
shards.write = write
program(merge.main, sys.argv[1:])
"""
"""A merge that is killed at the third shard."""


def test_a_merge_that_was_killed_goes_on_with_its_shards(lora, tmp_path, monkeypatch):
    from scalepeft import shards

    output, written, real = tmp_path / "merged", [], shards.write

    def write(file: Path, *rest: Any) -> str:
        written.append(file.name)
        return real(file, *rest)

    arguments = [str(lora), "--output", str(output), "--shard-size", "0.05MB", "--no-proof"]
    died = subprocess.run([sys.executable, "-c", DYING, *arguments], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL
    assert not output.exists()
    monkeypatch.setattr(shards, "write", write)
    run_merge(*arguments)
    assert written == sorted(p.name for p in output.glob("*.safetensors"))[2:]
    assert {p.name for p in tmp_path.iterdir()} == {"merged"}


def test_a_merge_that_was_killed_before_it_had_a_plan_begins_anew(lora, tmp_path):
    (tmp_path / "merged.part").mkdir()
    (tmp_path / "merged.part" / proof.INPUTS).write_bytes(b"half")
    run_merge(lora, "--output", tmp_path / "merged", "--no-proof")
    assert (tmp_path / "merged" / "merge.json").is_file()
    assert not (tmp_path / "merged.part").exists()


def test_another_order_begins_anew(lora, tmp_path):
    part = tmp_path / "merged.part"
    (part / "model").mkdir(parents=True)
    (part / "model/model.safetensors").write_bytes(b"torn")
    (part / proof.PLAN).write_text(json.dumps({"identity": "other", "shards": {"model.safetensors": "x"}}))
    run_merge(lora, "--output", tmp_path / "merged", "--no-proof", "--dtype", "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "merged/model.safetensors").values()} == {torch.bfloat16}
