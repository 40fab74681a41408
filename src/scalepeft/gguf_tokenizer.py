"""The tokenizer of a GGUF file: its tokens and merges, and the name of the rule by which llama.cpp splits text as it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalepeft.errors import UserError

_APART = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS, _WORDS = {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}
_BYTES = {"type": "ByteLevel", "use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRE: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_WORDS], False),
    "smollm": ([_DIGITS, _WORDS], False),
    "llama-bpe": ([_split(_APART % "{1,3}"), _BYTES], True),
    "smaug-bpe": ([_split(_APART % "{1,3}"), _BYTES], False),
    "qwen2": ([_split(_APART % ""), _BYTES], False),
    "tekken": ([_split(_TEKKEN), _BYTES], True),
}
"""How a tokenizer splits text, and whether it takes a whole word of its vocabulary without merging, by the name under which
llama.cpp does the same (llama-vocab.cpp). Its own converter knows tokenizers by a hash of the tokens of one text, which another
vocabulary changes; the rule itself stands in the tokenizer's file."""

TEXTS = (
    "I'll say 3,141.59 or 1234567 times: don't! They've said we'd, SHE'LL.",
    "tabs\tand\n\n\nlines  \r\n   and trailing   ",
    "na\u00efve caf\u00e9, Gr\u00f6\u00dfe, \u65e5\u672c\u8a9e, \ud55c\uad6d\uc5b4, \u0420\u0443\u0441, \U0001f642\U0001f44d",
    "def f(x):\n    return x**2 + [1][0]  # a comment\n",
)
"""Texts that tokenizers split in different ways."""


def pre(reader: Any, given: str | None) -> str:
    """llama.cpp's name for how a tokenizer splits text. Raises UserError when it has none, and none was given."""
    described, tokenizer = json.loads(reader.backend_tokenizer.to_str()), reader.name_or_path
    model = described["model"]
    steps = described.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if model["type"] != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
        raise UserError(f"{tokenizer}: its tokenizer is no byte-level BPE, the only kind that is written as GGUF")
    if described.get("normalizer") and described["normalizer"]["type"] != "NFC":  # which llama.cpp leaves to whoever writes
        raise UserError(f"{tokenizer}: its tokenizer changes the text ({described['normalizer']['type']}), llama.cpp does not")
    rule = [{key: step[key] for key in step if key not in ("add_prefix_space", "trim_offsets")} for step in steps]
    prefixed = any(step.get("add_prefix_space") for step in steps)
    found = next((n for n, (known, whole) in PRE.items() if known == rule and whole == bool(model.get("ignore_merges"))), None)
    if given and found and given != found:
        raise UserError(f"--pre {given}: the tokenizer splits text as {found} does; leave out --pre")
    if not given and (found is None or prefixed):
        told = "its tokenizer splits text by a rule that llama.cpp is not known to have"
        raise UserError(f"{tokenizer}: {told} ({', '.join(PRE)} are known); if it has, give its name there with --pre")
    return given or str(found)


def add(writer: Any, tokenizer: Path, rows: int, given: str | None, generation: Mapping[str, Any]) -> str:
    """Tokens, merges, special tokens and chat template; returns the name of the splitting rule."""
    import gguf
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(tokenizer)
    by_id = {i: token for token, i in reader.get_vocab().items()}
    added = reader.added_tokens_decoder
    if max(by_id) >= rows:
        raise UserError(f"{tokenizer}: its tokenizer has {max(by_id) + 1} tokens, and the model {rows} rows for them")
    kinds = gguf.TokenType
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [
        kinds.UNUSED
        if i not in by_id
        else kinds.NORMAL
        if i not in added
        else kinds.CONTROL
        if added[i].special
        else kinds.USER_DEFINED
        for i in range(rows)
    ]
    name = pre(reader, given)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = json.loads(reader.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ends = _listed(generation.get("eos_token_id"))
    special = {
        "bos": reader.bos_token_id,
        "eos": reader.eos_token_id,
        "unk": reader.unk_token_id,
        "pad": reader.pad_token_id,
        "eot": next((i for i in ends if i != reader.eos_token_id), None),  # a second one that ends an answer
    }
    for what, i in special.items():
        if i is not None:
            getattr(writer, f"add_{what}_token_id")(i)
    before, after = _around(reader)
    if before not in ([], [reader.bos_token_id]) or after not in ([], [reader.eos_token_id]):
        raise UserError(f"{tokenizer}: its tokenizer puts other tokens around a text than llama.cpp does, bos and eos")
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    if reader.chat_template:
        writer.add_chat_template(reader.chat_template)
    return name


def _listed(value: Any) -> list[int]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _around(reader: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after every text."""
    bare, ids = reader("a", add_special_tokens=False)["input_ids"], reader("a")["input_ids"]
    start = next(n for n in range(len(ids) + 1) if ids[n : n + len(bare)] == bare)
    return ids[:start], ids[start + len(bare) :]
