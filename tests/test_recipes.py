"""The shipped recipes hold the documented numbers: built from published configurations alone, without weights or a Hub."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig, RobertaConfig

from scalepeft import console, model, recipe, sampler

UNCASED, CASED = DistilBertConfig(vocab_size=30522), DistilBertConfig(vocab_size=28996)
ROBERTA = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)

DOCUMENTED = {
    "mnli_lora": (UNCASED, 3, 986_115, 67_941_894),
    "mnli_lora_early_stopping": (UNCASED, 3, 986_115, 67_941_894),
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


def head(hidden: int, labels: int, *, dense: bool) -> int:
    """Parameters of a classification head, of one layer or with a dense one before it."""
    return labels * (hidden + 1) + (hidden * (hidden + 1) if dense else 0)


OTHERS = {
    "mnli_adalora": (UNCASED, 3, 6 * 4 * (2 * 12 * 768 + 12) + head(768, 3, dense=True)),
    "mnli_roberta_base_lora": (ROBERTA, 3, 12 * 2 * 8 * 2 * 768 + head(768, 3, dense=True)),
    "mnli_roberta_large_lora": (ROBERTA_LARGE, 3, 24 * 2 * 8 * 2 * 1024 + head(1024, 3, dense=True)),
    "mnli_bert_large_lora": (BERT_LARGE, 3, 24 * 2 * 8 * 2 * 1024 + head(1024, 3, dense=False)),
    **{f"glue/{n}": (ROBERTA, 2, 12 * 2 * 8 * 2 * 768 + head(768, 2, dense=True)) for n in ("sst2", "cola", "qnli", "qqp")},
}
"""The recipes without documented counts: what layers, ranks and the head come to."""

ELSEWHERE = {"quickstart", "glue/mrpc", "glue/rte", "glue/stsb"}
"""Trained in other tests: the first on its own weights, the others from the adapter of another recipe."""

STEPS = {
    "mnli_lora": (50_000, 75_000),
    "imdb_lora_attention": (128, 80),
    "imdb_ia3": (128, 80),
    "ag_news_lora": ((120_000 - 640) * (1 + 3), 29_840),  # the original rows and three copies of each, all kept
}
"""Training rows, and the optimizer steps they make on one process."""


@pytest.mark.parametrize("name", DOCUMENTED)
def test_trainable_and_total_parameters_are_the_documented_ones(name):
    console.quiet_upstream()
    config, labels, trainable, total = DOCUMENTED[name]
    config.num_labels = labels
    with torch.device("meta"):
        base = AutoModelForSequenceClassification.from_config(config)
        built = model.adapted(recipe.load(name), base, total_steps=75_000)
    assert model.parameters(built) == {"trainable": trainable, "total": total}


@pytest.mark.parametrize("name", OTHERS)
def test_trainable_parameters_are_those_of_layers_ranks_and_head(name):
    console.quiet_upstream()
    config, labels, trainable = OTHERS[name]
    config.num_labels = labels
    with torch.device("meta"):
        base = AutoModelForSequenceClassification.from_config(config)
        built = model.adapted(recipe.load(name), base, total_steps=75_000)
    assert model.parameters(built)["trainable"] == trainable


def test_every_recipe_is_held_to_its_parameters():
    assert {*DOCUMENTED, *OTHERS, *ELSEWHERE} == set(recipe.shipped_recipes())


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_the_documented_ones(name):
    rows, steps = STEPS[name]
    training = recipe.load(name).training
    batches = sampler.StepBatches(torch.zeros(rows).long().numpy(), batch_size=training["per_device_train_batch_size"])
    assert len(batches) * training["num_train_epochs"] == steps
