"""Every shipped recipe, end to end for a few steps: a tiny model of its own architecture, a few rows of its own shape."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch
from conftest import chat_rows
from test_augment import write_wordnet
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from scalepeft import recipe

SMALL = {"vocab_size": 200, "pad_token_id": 0}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ARCHITECTURES = {
    "distilbert": lambda: DistilBertModel(DistilBertConfig(dim=32, n_layers=6, n_heads=2, hidden_dim=64, **SMALL)),
    "roberta": lambda: RobertaModel(RobertaConfig(**BERT, **SMALL)),
    "bert": lambda: BertModel(BertConfig(**BERT, **SMALL)),
    "MiniLM": lambda: BertModel(BertConfig(**BERT, **SMALL)),
}
"""By what the base model's name holds; the first that fits. DistilBERT keeps its six layers, for a recipe names the last."""

WORDS = {"vocab_size": 320, "pad_token_id": 0, "eos_token_id": 2, "num_key_value_heads": 1, **BERT}
LANGUAGE = {
    "Qwen2.5": lambda: Qwen2ForCausalLM(Qwen2Config(**WORDS)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=16, **WORDS)),
    "SmolLM2": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **WORDS)),
}
"""Likewise, with the tokenizer that speaks ChatML."""

CLASSES = {"mnli": 3, "ag_news": 4, "financial": 3}
"""By what the recipe's name holds; two elsewhere."""

# the MNLI adapter first: three of the GLUE recipes continue from it
ALL = sorted(recipe.shipped_recipes(), key=lambda name: (name != "mnli_roberta_base_lora", name))


def turns(question, answer):
    """A conversation of two turns."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROWS = {
    "databricks-dolly-15k": lambda q, a: {"instruction": q, "context": "", "response": a, "category": "open_qa"},
    "ultrafeedback_binarized": lambda q, a: {
        "prompt": q,
        "prompt_id": "0",
        "chosen": turns(q, a),
        "rejected": turns(q, f"no {a}"),
        "messages": turns(q, a),
        "score_chosen": 8.0,
        "score_rejected": 5.0,
    },
    "instructions/": lambda q, a: {"instruction": q, "input": "", "output": a},
}
"""By what a source of a language model's rows is called: all its columns, made of a question and an answer."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_tokenizer, tiny_lm):
    """A folder with a model of each architecture, where relative run directories land."""
    folder = tmp_path_factory.mktemp("recipes")
    speaker = AutoTokenizer.from_pretrained(tiny_lm)
    for name, build in {**ARCHITECTURES, **LANGUAGE}.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name)
        (speaker if name in LANGUAGE else tiny_tokenizer).save_pretrained(folder / name)
    write_wordnet(folder / "wordnet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    shutil.rmtree(folder)


def rows_of_its_shape(read, name, folder):
    """A file with the columns of the recipe's rows; of classification a csv file, its labels integers (regression: numbers)."""
    if read.generative:
        shape = next(shape for part, shape in ROWS.items() if part in read.data.train.path)
        file = folder / f"{name}.jsonl"
        lines = [json.dumps(shape(question, answer)) for question, answer in chat_rows(48, seed=0)]
        file.write_text("\n".join(lines), encoding="utf-8")
        return file
    columns = [read.data.text_columns] if isinstance(read.data.text_columns, str) else read.data.text_columns
    classes = next((count for part, count in CLASSES.items() if part in name), 2)
    file = folder / f"{name.replace('/', '-')}.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*columns, read.data.label_column])
        for row in range(48):
            label = row / 10 if read.regression else row % classes
            writer.writerow([f"a big tree, the plot is {'good ' * (row % 5)}but bad"] * len(columns) + [label])
    return file


@pytest.mark.long
@pytest.mark.parametrize("name", ALL)
def test_a_recipe_runs_to_a_complete_run(name, workplace, train):
    read = recipe.load(name)
    architecture = next(a for a in (*ARCHITECTURES, *LANGUAGE) if a in read.model.name_or_path)
    rows = rows_of_its_shape(read, name, workplace)
    overrides = [f"model.name_or_path={workplace / architecture}", "training.dataloader_num_workers=0", "training.use_cpu=true"]
    for key in ("train", *(f"evaluation.{set_name}" for set_name in read.data.evaluation)):
        overrides += [f"data.{key}.path={rows}", f"data.{key}.split=", f"data.{key}.name="]
    if read.data.train.sample_rows:
        overrides.append("data.train.sample_rows=40")
    if read.data.holdout:
        overrides.append("data.holdout.size=8")
    if read.data.augmentation:
        overrides.append(f"data.augmentation.wordnet={workplace / 'wordnet'}")
    if "max_steps" not in read.training:
        overrides.append("training.num_train_epochs=1")
    for steps in ("eval_steps", "save_steps"):
        overrides += [f"training.{steps}=1"] if steps in read.training else []
    if (read.adapter or {}).get("peft_type") == "ADALORA":
        overrides += ["adapter.tinit=1", "adapter.tfinal=2", "adapter.deltaT=1"]
    run = train(name, *overrides)
    record = run.record
    assert record["status"] == "complete"
    assert record["verification"]["method"] == "logits"
    assert record["step"] > 0
    assert list(record["evaluation"]) == (["holdout"] if read.data.holdout else []) + list(read.data.evaluation)
    assert (run.path / "adapter" / "adapter_model.safetensors").is_file()
    if read.early_stopping:
        assert (run.last_checkpoint() / "trainer_state.json").read_text(encoding="utf-8").count("EarlyStoppingCallback")
