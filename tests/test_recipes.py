"""The shipped recipes hold the documented numbers: built from published configurations alone, without weights or a Hub."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from scalepeft import console, model, recipe, sampler

UNCASED, CASED = DistilBertConfig(vocab_size=30522), DistilBertConfig(vocab_size=28996)
ROBERTA = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)

DOCUMENTED = {
    "mnli_lora": (UNCASED, 3, 986_115, 67_941_894),
    "mnli_lora_early_stopping": (UNCASED, 3, 986_115, 67_941_894),
    "mnli_lora_fast": (UNCASED, 3, 986_115, 67_941_894),
    "mnli_lora_cached": (UNCASED, 3, 986_115, 67_941_894),
    "imdb_lora_attention": (CASED, 2, 2_951_426, 68_734_468),
    "imdb_lora_attention_ffn": (CASED, 2, 5_900_546, 71_683_588),
    "imdb_lora_r32": (CASED, 2, 1_771_778, 67_554_820),
    "imdb_ia3": (CASED, 2, 633_602, 66_416_644),
    "ag_news_lora": (ROBERTA, 4, 999_172, 125_647_880),
    "financial_tweets_lora": (UNCASED, 3, 629_763, 67_585_542),
    "financial_tweets_lora_5_epochs": (UNCASED, 3, 629_763, 67_585_542),
    "rotten_tomatoes_lora": (UNCASED, 2, 739_586, 67_694_596),
    "rotten_tomatoes_lora_full": (UNCASED, 2, 739_586, 67_694_596),
}

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROBERTA_LARGE = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **LARGE)
BERT_LARGE = BertConfig(vocab_size=30522, **LARGE)


def decoder(kind, hidden, layers, heads, intermediate, **more):
    """A language model's configuration as it was published; `heads` are those of queries, and of keys and values."""
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate}
    attention = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    return kind(tie_word_embeddings=False, **shape, **attention, **more)


QWEN_7B = decoder(Qwen2Config, 3584, 28, (28, 4), 18944, vocab_size=152_064)
QWEN_72B = decoder(Qwen2Config, 8192, 80, (64, 8), 29568, vocab_size=152_064)
QWEN3_8B = decoder(Qwen3Config, 4096, 36, (32, 8), 12288, vocab_size=151_936, head_dim=128)

TOLD = {
    "mnli_qlora": (ROBERTA_LARGE, 3),
    "mnli_qlora_llm": (QWEN3_8B, 3),
    "sft_lora": (QWEN_7B, 0),
    "sft_qlora": (QWEN_7B, 0),
    "sft_dora": (QWEN_7B, 0),
    "sft_qlora_70b": (QWEN_72B, 0),
    "dpo_lora": (QWEN_7B, 0),
}
"""The recipes that tell their own counts, which no document does."""


def head(hidden: int, labels: int, *, dense: bool) -> int:
    """Parameters of a classification head, of one layer or with a dense one before it."""
    return labels * (hidden + 1) + (hidden * (hidden + 1) if dense else 0)


OTHERS = {
    "mnli_adalora": (UNCASED, 3, 6 * 4 * (2 * 12 * 768 + 12) + head(768, 3, dense=True)),
    "mnli_roberta_base_lora": (ROBERTA, 3, 12 * 2 * 8 * 2 * 768 + head(768, 3, dense=True)),
    "mnli_roberta_large_lora": (ROBERTA_LARGE, 3, 24 * 2 * 8 * 2 * 1024 + head(1024, 3, dense=True)),
    "mnli_bert_large_lora": (BERT_LARGE, 3, 24 * 2 * 8 * 2 * 1024 + head(1024, 3, dense=False)),
    "sft_neftune": (
        QWEN_7B,
        0,
        28 * 16 * sum((7168, 4096, 4096, 7168, 22528, 22528, 22528)),
    ),  # inputs + outputs of its modules
    **{f"glue/{n}": (ROBERTA, 2, 12 * 2 * 8 * 2 * 768 + head(768, 2, dense=True)) for n in ("sst2", "cola", "qnli", "qqp")},
}
"""The recipes without documented counts: what layers, ranks and the head come to."""

ELSEWHERE = {"quickstart", "quickstart_sft", "glue/mrpc", "glue/rte", "glue/stsb"}
"""Trained in other tests: the quickstarts on their own weights, the others from the adapter of another recipe."""

STEPS = {
    "mnli_lora": (50_000, 75_000),
    "mnli_lora_fast": (50_000, 75_000),
    "imdb_lora_attention": (128, 80),
    "imdb_ia3": (128, 80),
    "ag_news_lora": ((120_000 - 640) * (1 + 3), 29_840),  # the original rows and three copies of each, all kept
}
"""Training rows, and the optimizer steps they make on one process."""


def counts(name, config, labels):
    """The parameters of a recipe's model, built without storage."""
    console.quiet_upstream()
    read = recipe.load(name)
    if labels:
        config.num_labels = labels
    with torch.device("meta"):
        base = (AutoModelForCausalLM if read.generative else AutoModelForSequenceClassification).from_config(config)
        return model.parameters(model.adapted(read, base, total_steps=75_000))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_trainable_and_total_parameters_are_the_documented_ones(name):
    config, labels, trainable, total = DOCUMENTED[name]
    assert counts(name, config, labels) == {"trainable": trainable, "total": total}


@pytest.mark.parametrize("name", TOLD)
def test_a_recipe_tells_the_parameters_that_it_trains(name):
    found = counts(name, *TOLD[name])
    text = re.sub(r"\n# ", " ", recipe.shipped_recipes()[name].read_text(encoding="utf-8"))
    assert f" {found['trainable']:,} of {found['total']:,} parameters are trained." in text


@pytest.mark.parametrize("name", OTHERS)
def test_trainable_parameters_are_those_of_layers_ranks_and_head(name):
    config, labels, trainable = OTHERS[name]
    assert counts(name, config, labels)["trainable"] == trainable


def test_every_recipe_is_held_to_its_parameters():
    assert {*DOCUMENTED, *TOLD, *OTHERS, *ELSEWHERE} == set(recipe.shipped_recipes())


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_the_documented_ones(name):
    rows, steps = STEPS[name]
    training = recipe.load(name).training
    batches = sampler.StepBatches(torch.zeros(rows).long().numpy(), batch_size=training["per_device_train_batch_size"])
    assert len(batches) * training["num_train_epochs"] == steps
