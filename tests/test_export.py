"""Claims about export: what is written for another program is read by that program's own reader, and answers as the model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalepeft import beside, export, export_onnx, export_proof, gguf_tokenizer, proof
from scalepeft.console import quiet_upstream
from scalepeft.errors import program

quiet_upstream()

import transformers  # noqa: E402  # after it was silenced
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def talker(tiny_lm, tmp_path_factory) -> Any:
    """A complete run of the small language model."""
    from conftest import train_here, write_chat

    return train_here(write_chat(tmp_path_factory.mktemp("talker"), tiny_lm))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The proofs in this process, on a machine with so much memory."""

    def run(memory: int = 2**40) -> None:
        import psutil

        def in_this_process(module: str, *arguments: str) -> dict[str, Any]:
            part = Path(arguments[-1])
            if module == "scalepeft.export_proof":
                return export_proof.prove(part, json.loads((part / export.PLAN).read_bytes()))
            return {"prove": proof.prove, "measure": proof.measure}[arguments[0]](
                part, json.loads((part / proof.PLAN).read_bytes())
            )

        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
        monkeypatch.setattr(beside, "in_fresh_process", in_this_process)

    run()
    return run


def run_export(source: Any, form: str, output: Path, *arguments: Any, status: int = 0) -> dict[str, Any]:
    assert program(export.main, [str(a) for a in (source, "--format", form, "--output", output, *arguments)]) == status
    return json.loads((output / "export.json").read_bytes()) if status == 0 else {}


def whole(base: Path, folder: Path) -> Path:
    """A classifier of two labels on the small encoder."""
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(base).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


# --- through the command ----------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("form", ["vllm", "vllm-lora", "onnx"])
def test_a_run_is_exported_and_proved_in_a_process_without_peft(form, complete, talker, command, tmp_path):
    run = complete if form == "onnx" else talker
    done = command("export", run.path, "--format", form, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "proved    in a fresh process without peft: largest difference of" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    record = json.loads((tmp_path / "out/export.json").read_bytes())
    assert record["proof"]["max_difference"] <= record["proof"]["bound"]
    assert record["proof"]["method"] == "logits"


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_folder_for_servers_is_read_by_transformers_of_either_age(talker, tiny_lm, tmp_path, capsys):
    run_export(talker.path, "vllm", tmp_path / "out")
    assert f"vllm serve {tmp_path / 'out'}" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_bytes())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert "quantization_config" not in config
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_bytes())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert {"model.safetensors", "generation_config.json", "chat_template.jinja"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert not list((tmp_path / "out").glob("adapter*"))
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm), talker.path / "adapter")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("which word is first: river", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(model.eval()(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_classifier_keeps_its_labels(complete, tmp_path):
    run_export(complete.path, "vllm", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_bytes())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}


def test_an_adapter_alone_is_proved_by_what_a_server_computes_of_it(talker, tmp_path, capsys):
    run_export(talker.path, "vllm-lora", tmp_path / "out")
    said = capsys.readouterr().out
    assert "--enable-lora --max-lora-rank 8 --lora-modules out=" in said
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_a_graph_answers_in_batches_of_any_size_and_length(complete, tmp_path):
    import onnxruntime

    run_export(complete.path, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    assert {i.name for i in session.get_inputs()} == {"input_ids", "token_type_ids", "attention_mask"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for texts in (["good"], ["a bad film", "good " * 30, "the end"]):
        rows = dict(tokenizer(texts, padding=True, return_tensors="np"))
        assert session.run(["logits"], rows)[0].shape == (len(texts), 2)
    reference = load_file(complete.path / "verification.safetensors")
    expected = reference.pop("logits")
    found = session.run(["logits"], {name: tensor.numpy() for name, tensor in reference.items()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_a_gguf_file_says_what_the_model_is(talker, tmp_path):
    import gguf

    run_export(talker.path, "gguf", tmp_path / "out")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out/model-f32.gguf").fields.items()}
    tokenizer = AutoTokenizer.from_pretrained(talker.path / "adapter")
    told = {
        "general.architecture": "llama",
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": len(tokenizer),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {name: fields[name] for name in told} == told
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == gguf.TokenType.CONTROL]
    assert special == sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def tiny(kind: str, base: Path, folder: Path, **changes: Any) -> Path:
    """A language model of this type with random weights and the small model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": None}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=len(tokenizer) + 3, eos_token_id=tokenizer.eos_token_id, **sizes | rest | changes
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "heads of their own size": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": 128}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 128}),
}


@pytest.mark.parametrize("decoder", DECODERS)
def test_each_type_of_decoder_is_read_back(decoder, tiny_lm, here, tmp_path):
    kind, changes = DECODERS[decoder]
    source = tiny(kind, tiny_lm, tmp_path / "model", **changes)
    record = run_export(source, "gguf", tmp_path / "out")
    assert record["context_length"] == changes.get("sliding_window", 256)
    here(memory=0)
    tensors = run_export(source, "gguf", tmp_path / "again")
    assert tensors["proof"]["method"] == "tensors"
    assert tensors["proof"]["max_difference"] == 0


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_each_type_of_weights_is_within_its_bound(outtype, tiny_lm, here, tmp_path):
    source = tiny("llama", tiny_lm, tmp_path / "model")
    record = run_export(source, "gguf", tmp_path / "out", "--outtype", outtype)
    assert 0 < record["proof"]["max_difference"] <= record["proof"]["bound"]
    here(memory=0)
    tensors = run_export(source, "gguf", tmp_path / "again", "--outtype", outtype)["proof"]
    assert 0 < tensors["max_difference"] <= tensors["bound"]


def tokenizer_of(rule: str, folder: Path) -> Path:
    """A tokenizer trained on a few texts that splits them by this rule."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    split = {"type": "Split", "behavior": "isolated", "invert": False}
    steps, whole_words = gguf_tokenizer.PRE[rule]
    made = {
        "Digits": lambda _: pre_tokenizers.Digits(individual_digits=True),
        "ByteLevel": lambda step: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"]),
        "Split": lambda step: pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), behavior=split["behavior"]),
    }
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    parts = [made[step["type"]](step) for step in steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*gguf_tokenizer.TEXTS, *proof.SENTENCES] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")  # noqa: S106
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rule", gguf_tokenizer.PRE)
def test_the_rule_of_a_tokenizer_is_recognised_and_read_back(rule, tmp_path):
    source = tiny("llama", tokenizer_of(rule, tmp_path / "tokenizer"), tmp_path / "model")
    assert run_export(source, "gguf", tmp_path / "out")["pre"] == rule


def test_another_rule_has_to_be_named(tmp_path, capsys):
    from tokenizers import pre_tokenizers

    source = tiny("llama", tokenizer_of("gpt-2", tmp_path / "tokenizer"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), words])
    tokenizer.save_pretrained(source)
    assert "by a rule that llama.cpp is not known to have" in refused(capsys, tmp_path, source, "gguf", tmp_path / "out")
    assert run_export(source, "gguf", tmp_path / "out", "--pre", "mine")["pre"] == "mine"
    assert "text split as mine, by --pre and not proved" in capsys.readouterr().out


ENCODERS: dict[str, dict[str, Any]] = {kind: {} for kind in export_onnx.ENCODERS} | {
    "bert for regression": {"num_labels": 1, "problem_type": "regression"},
    "deberta-v2": {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
}


@pytest.mark.long
@pytest.mark.parametrize("kind", ENCODERS)
def test_each_type_of_encoder_is_exported(kind, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 3}
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "num_labels": 3}
    config = transformers.AutoConfig.for_model(
        kind.split()[0], vocab_size=len(tokenizer), initializer_range=0.2, pad_token_id=0, **sizes | ENCODERS[kind]
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    run_export(tmp_path / "model", "onnx", tmp_path / "out")


def test_a_run_that_was_trained_whole_is_exported(toy, train, tmp_path):
    run = train(toy(adapter=None, training={"num_train_epochs": 1}))
    found = run_export(run.path, "onnx", tmp_path / "out")["proof"]
    assert found["rows"] == 30
    assert found["max_difference"] < 1e-4


def test_where_the_model_does_not_fit_its_tensors_are_compared(talker, complete, here, tmp_path, capsys):
    here(memory=0)
    for form in ("vllm", "vllm-lora"):
        found = run_export(talker.path, form, tmp_path / form)["proof"]
        assert (found["method"], found["max_difference"]) == ("tensors", 0)
    assert "does not fit into the memory" in refused(capsys, tmp_path, complete.path, "onnx", tmp_path / "onnx")


def test_a_model_that_push_has_merged_is_taken(talker, tmp_path, capsys):
    from scalepeft import merge

    shutil.copytree(talker.path, tmp_path / "run")
    assert program(merge.main, [str(tmp_path / "run"), "--output", str(tmp_path / "run/merged")]) == 0
    capsys.readouterr()
    run_export(tmp_path / "run", "vllm", tmp_path / "out")
    assert "merged" not in capsys.readouterr().out
    weights = [tmp_path / folder / "model.safetensors" for folder in ("run/merged", "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not weights[0].samefile(weights[1])


# --- proof ------------------------------------------------------------------------------------------------------------


def weight_of_safetensors(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in tensors if "q_proj" in n and not n.endswith("lora_B.weight"))
    file.unlink()  # it may be a link to the model's
    save_file(tensors | {name: tensors[name] * 1.1}, file, metadata={"format": "pt"})


def weight_of_onnx(folder: Path) -> None:
    import numpy as np
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(folder / "model.onnx")
    weight = max(graph.graph.initializer, key=lambda i: np.prod(i.dims))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.1), weight.name))
    onnx.save_model(graph, folder / "model.onnx")


def weight_of_gguf(folder: Path) -> None:
    import gguf

    file = next(folder.glob("*.gguf"))
    tensor = next(t for t in gguf.GGUFReader(file).tensors if "attn_q" in t.name)
    tensor = next(t for t in gguf.GGUFReader(file, "r+").tensors if t.name == tensor.name)
    tensor.data[:] = tensor.data * 1.1


def template_of_vllm(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def head_of_vllm(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def rank_of_lora(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))


OTHERWISE = "does not answer as the model does"
SPOILT = [
    ("vllm", weight_of_safetensors, OTHERWISE),
    ("vllm", template_of_vllm, "its tokenizer reads otherwise than the model's: chat"),
    ("vllm", head_of_vllm, "it has no head of its own"),
    ("vllm-lora", weight_of_safetensors, OTHERWISE),
    ("vllm-lora", rank_of_lora, OTHERWISE),
    ("onnx", weight_of_onnx, OTHERWISE),
    ("gguf", weight_of_gguf, OTHERWISE),
]


@pytest.mark.parametrize(("form", "spoil", "told"), SPOILT, ids=lambda v: getattr(v, "__name__", ""))
def test_what_answers_otherwise_is_not_kept(form, spoil, told, talker, complete, tmp_path, monkeypatch, capsys):  # noqa: PLR0917
    module = importlib.import_module(export.FORMATS[form])
    write = module.write

    def spoilt(source: Any, folder: Path, options: Any) -> dict[str, Any]:
        written = write(source, folder, options)
        spoil(folder)
        return written

    monkeypatch.setattr(module, "write", spoilt)
    run_export((complete if form == "onnx" else talker).path, form, tmp_path / "out", status=1)
    error = capsys.readouterr().err
    assert told in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_wrong_rule_is_seen(tmp_path, capsys, monkeypatch):
    source = tiny("llama", tokenizer_of("gpt-2", tmp_path / "tokenizer"), tmp_path / "model")
    monkeypatch.setattr(gguf_tokenizer, "pre", lambda *_: "qwen2")
    run_export(source, "gguf", tmp_path / "out", status=1)
    assert "its tokenizer reads otherwise than the model's: \"I'll say" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"model", "tokenizer"}


# --- mistakes ---------------------------------------------------------------------------------------------------------


def refused(capsys, folder: Path, source: Any, form: str, *arguments: Any) -> str:
    """One line on stderr, exit status 2, and nothing written."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    run_export(source, form, *arguments, status=2)
    told = capsys.readouterr().err
    assert told.count("\n") == 1, told
    assert sorted(folder.rglob("*")) == before
    return told


def test_what_a_format_has_no_place_for_is_refused(complete, talker, tiny_gpt2, tmp_path, capsys):
    out = tmp_path / "out"
    encoder = refused(capsys, tmp_path, complete.path, "gguf", out)
    assert "for language models of type llama, mistral, qwen2, qwen3, not for AutoModelForSequenceClassification" in encoder
    decoder = refused(capsys, tmp_path, talker.path, "onnx", out)
    assert "for classifiers on albert, bert," in decoder
    assert "not for AutoModelForCausalLM of type llama" in decoder
    assert "not for GPT2LMHeadModel of type gpt2" in refused(capsys, tmp_path, tiny_gpt2, "gguf", out)
    assert "language models, not of classifiers" in refused(capsys, tmp_path, complete.path, "vllm-lora", out)
    assert "--pre goes with --format gguf" in refused(capsys, tmp_path, talker.path, "vllm", out, "--pre", "qwen2")
    assert "splits text as gpt-2 does" in refused(capsys, tmp_path, talker.path, "gguf", out, "--pre", "qwen2")


@pytest.fixture(scope="module")
def tiny_gpt2(tiny_lm, tmp_path_factory) -> Path:
    """A GPT-2, which is no Llama."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(folder)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=330, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        folder
    )
    return folder


def adapter(base: Path, folder: Path, kind: str, **options: Any) -> Path:
    given = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), given).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("LORA", {"use_dora": True}, "vLLM does not compute DoRA"),
        ("LORA", {"modules_to_save": ["lm_head"]}, "vLLM serves no modules trained whole"),
        ("LORA", {"rank_pattern": {"v_proj": 2}}, "vLLM scales all layers by one rank"),
        ("LORA", {"target_modules": ["embed_tokens"]}, "vLLM serves the matrices of linear layers only"),
        ("LORA", {"r": 1024}, "more than vLLM's largest --max-lora-rank"),
        ("IA3", {"target_modules": ["k_proj"], "feedforward_modules": []}, "vLLM serves adapters of LORA only, not of IA3"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_what_vllm_refuses_or_passes_over_is_refused(kind, options, told, tiny_lm, tmp_path, capsys):  # noqa: PLR0917
    folder = adapter(tiny_lm, tmp_path / "adapter", kind, **{"target_modules": ["q_proj", "v_proj"]} | options)
    error = refused(capsys, tmp_path, folder, "vllm-lora", tmp_path / "out")
    assert told in error
    assert "--format vllm exports the merged model" in error


def test_an_adapter_that_does_not_fold_is_refused(tiny_lm, tmp_path, capsys):
    folder = adapter(tiny_lm, tmp_path / "adapter", "PREFIX_TUNING", num_virtual_tokens=4)
    told = refused(capsys, tmp_path, folder, "vllm", tmp_path / "out")
    assert "PREFIX_TUNING puts virtual tokens before the input and changes no weights; it cannot be merged" in told


def test_quantised_weights_are_refused(tiny_lm, tmp_path, capsys):
    from transformers import BitsAndBytesConfig

    given = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(tiny_lm, quantization_config=given).save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path / "packed")
    for form in ("vllm", "gguf"):
        told = refused(capsys, tmp_path, tmp_path / "packed", form, tmp_path / "out")
        assert "packed: holds weights quantised by bitsandbytes; export the unquantised model" in told


def test_what_is_no_model_is_refused(complete, tmp_path, capsys):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    assert "there is no such run or folder" in refused(capsys, tmp_path, tmp_path / "emty", "vllm", out)
    assert "is neither a run (run.json), nor an adapter" in refused(capsys, tmp_path, empty, "vllm", out)
    (empty / "config.json").write_text('{"model_type": "nothing"}')
    assert "is not of a model that transformers knows" in refused(capsys, tmp_path, empty, "vllm", out)
    shutil.copytree(complete.path, tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    assert "the run is interrupted" in refused(capsys, tmp_path, tmp_path / "run", "vllm", out)


def test_a_folder_with_something_in_it_is_left_alone(talker, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    assert "is not empty; give another --output" in refused(capsys, tmp_path, talker.path, "vllm", tmp_path / "out")
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part/mine").write_text("x")
    assert "is in the way and of something else" in refused(capsys, tmp_path, talker.path, "vllm", tmp_path / "new")


def test_a_missing_package_is_named(complete, tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else real(name, *a))
    told = refused(capsys, tmp_path, complete.path, "onnx", tmp_path / "out")
    assert "needs onnxruntime: pip install 'scalepeft[export]'" in told


def test_a_full_disk_leaves_nothing(tiny_lm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "are needed and 0.00 GB free" in refused(capsys, tmp_path, tiny_lm, "gguf", tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tiny_lm, tmp_path, capsys, monkeypatch):
    import gguf

    monkeypatch.setattr(gguf.GGUFWriter, "open_output_file", opened_on_a_full_disk)
    assert "the disk is full; free space" in refused(capsys, tmp_path, tiny_lm, "gguf", tmp_path / "out")


def opened_on_a_full_disk(writer: Any, _path: Path | None = None) -> None:
    from gguf.gguf_writer import WriterState

    writer.fout, writer.state = [Path("/dev/full").open("wb", buffering=0)], WriterState.EMPTY  # noqa: SIM115


def test_what_a_killed_export_left_is_begun_anew(tiny_lm, tmp_path):
    part = tmp_path / "out.part"
    (part / "export").mkdir(parents=True)
    (part / "export/model-f32.gguf").write_bytes(b"torn")
    (part / export.PLAN).write_text("{}")
    run_export(tiny_lm, "gguf", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


# --- the programs themselves ------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_real_chat_model_becomes_a_gguf_file(smollm2, command, tmp_path):
    done = command("export", smollm2, "--format", "gguf", "--outtype", "q8_0", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/export.json").read_bytes())
    assert (record["pre"], record["outtype"]) == ("smollm", "q8_0")
    assert record["proof"]["max_difference"] <= record["proof"]["bound"]
    assert record["files"]["model-q8_0.gguf"] < 150e6


@pytest.mark.long
def test_llama_cpp_itself_splits_text_and_answers_as_the_model(tiny_lm, tmp_path):
    native = pytest.importorskip("xllamacpp", reason="llama.cpp itself is not there: pip install xllamacpp")
    sources = {"llama 3's RoPE": tiny("llama", tiny_lm, tmp_path / "rope", rope_parameters=LLAMA3)}
    sources |= {kind: tiny(kind, tiny_lm, tmp_path / kind, **DECODERS[kind][1]) for kind in ("mistral", "qwen2", "qwen3")}
    for rule in gguf_tokenizer.PRE:
        sources[rule] = tiny("llama", tokenizer_of(rule, tmp_path / "tokenizer" / rule), tmp_path / rule)
    for name, source in sources.items():
        output = tmp_path / f"gguf-{name}"
        run_export(source, "gguf", output)
        compared_with_llama_cpp(native, output / "model-f32.gguf", source)


def compared_with_llama_cpp(native: Any, file: Path, source: Path) -> None:
    """Its server's tokens of some texts, and its probabilities of the token after each, beside those of transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    asked = native.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_gpu_layers, asked.port, asked.warmup = str(file), 256, 0, 0, False
    asked.cpuparams.n_threads = 1
    server = native.Server(asked)

    def post(path: str, **body: Any) -> Any:
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())  # noqa: S310  # loopback
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return json.loads(answer.read())

    for text in (*gguf_tokenizer.TEXTS, *proof.SENTENCES, "<|im_start|>user\nHello 12<|im_end|>\n"):
        ids = tokenizer(text)["input_ids"]
        assert post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] == ids, text
        # the token after is a letter whatever the model says: of half a character the server tells no probabilities
        letter = [[tokenizer.convert_tokens_to_ids("a"), 1000.0]]
        answer = post("/completion", prompt=ids[:100], n_predict=1, n_probs=20, cache_prompt=False, logit_bias=letter)
        with torch.no_grad():
            expected = model(torch.tensor([ids[:100]])).logits[0, -1].log_softmax(dim=-1)
        found = {given["id"]: given["logprob"] for given in answer["completion_probabilities"][0]["top_logprobs"]}
        assert len(found) == 20
        for token, probability in found.items():  # its cache of keys and values is of 16 bits
            assert probability == pytest.approx(expected[token].item(), abs=0.05)
