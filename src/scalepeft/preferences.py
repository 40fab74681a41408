"""Rows of preferences: one prompt, and the chosen and the rejected answer to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import datasets

from scalepeft.conversations import NO_ASSISTANT, Writer
from scalepeft.dialogues import FORMS, MISSING, Message, Refused, asked, dialogue, from_json, text_of, turn, turns
from scalepeft.tables import Bad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT_TOO_LONG = "prompt fills training.max_length"
SAME = "chosen and rejected are equal"
TWO_PROMPTS = "chosen and rejected are not answers to one prompt"

_Turns = list[tuple[Message, bool]]


class Preferences:
    """Rows of the task preference."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, system_prompt: str | None = None, max_length: int | None = None
    ) -> None:
        self.writer, self.max_length = Writer(tokenizer, system_prompt), max_length

    @property
    def identity(self) -> dict[str, Any]:
        """Equal for encoders that give equal rows, the tokenizer's backend being the same."""
        return {"task": "preference", **self.writer.identity, "max_length": self.max_length}

    @property
    def features(self) -> dict[str, Any]:
        """The columns of encoded rows, in the names of TRL's DPOTrainer; length is that of the prompt and its longer answer."""
        ids = datasets.List(datasets.Value("int32"))
        return {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids, "length": datasets.Value("int32")}

    def encode(self, record: Mapping[str, Any], form: str) -> dict[str, Any] | Bad:
        """A row of a format as prompt_ids, chosen_ids, rejected_ids, length and whether it was truncated."""
        try:
            asks, chosen, rejected = _read(record, form, chat=self.writer.chat)
            if chosen == rejected:
                raise Refused(SAME)  # noqa: TRY301  # as the functions that are called here do
            return self._cut(self._written(asks, chosen, record), self._written(asks, rejected, record))
        except Refused as refused:
            return refused.bad

    def _written(self, asks: _Turns | str, answer: _Turns | str, record: Mapping[str, Any]) -> tuple[list[int], int]:
        """The tokens of a prompt and an answer, and how many of them are the prompt's."""
        if isinstance(asks, str) and isinstance(answer, str):
            return self.writer.plain(asks, answer)
        writer, asks, answer = self.writer, _as_turns(asks, "user"), _as_turns(answer, "assistant")
        if answer[0][0]["role"] != "assistant":
            raise Refused(TWO_PROMPTS, "one is a whole conversation")
        if answer[-1][0]["role"] != "assistant":
            raise Refused(NO_ASSISTANT, "at the end of an answer")
        row = dialogue([*asks, *answer], record).opened(writer.system_prompt)
        text, last = writer.whole(row), len(row.messages) - 1
        start, end = writer.span(row, text, len(row.messages) - len(answer))
        if len(answer) > 1:
            end = writer.span(row, text, last)[1]
        tokens = writer.tokens(text[:end])
        eos = [] if writer.ended(text[:end]) else [writer.tokenizer.eos_token_id]
        return [*tokens.ids, *eos], tokens.within(start, end).start

    def _cut(self, chosen: tuple[list[int], int], rejected: tuple[list[int], int]) -> dict[str, Any]:
        both = chosen[0], rejected[0]
        shared = min(chosen[1], rejected[1])  # less where the first token of an answer holds the end of the prompt
        prompt = next((place for place in range(shared) if both[0][place] != both[1][place]), shared)
        if self.max_length is not None and prompt >= self.max_length:
            raise Refused(PROMPT_TOO_LONG, f"{prompt:,} tokens")
        cut = [ids[prompt : self.max_length] for ids in both]
        if cut[0] == cut[1]:
            raise Refused(SAME, f"in the first {self.max_length:,} tokens" if self.max_length else "")
        length = prompt + max(map(len, cut))
        return {
            "prompt_ids": both[0][:prompt],
            "chosen_ids": cut[0],
            "rejected_ids": cut[1],
            "length": length,
            "truncated": length < max(map(len, both)),
        }


def _as_turns(said: _Turns | str, role: str) -> _Turns:
    return [({"role": role, "content": said}, True)] if isinstance(said, str) else said


def _read(record: Mapping[str, Any], form: str, *, chat: bool) -> tuple[_Turns | str, _Turns | str, _Turns | str]:
    """What is asked, and the chosen and the rejected answer: texts, or turns."""
    chosen, rejected = _answer(record, "chosen", form), _answer(record, "rejected", form)
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen[0][0]["role"] != "assistant":
        return _common(chosen, rejected)  # whole conversations, also where the prompt has a column of its own
    if form == "messages":
        raise Refused(TWO_PROMPTS, "they begin with the assistant")
    if form == "conversations":
        return list(turns(record.get("conversations"), "conversations")), chosen, rejected
    if form == "instruction":
        column = next(
            needed[0]
            for needed in FORMS["preference"][form].needs
            if record.get(needed[0]) is not None or needed[0] == "question"
        )
        return asked(record, chat=chat, column=column), chosen, rejected
    prompt = record.get("prompt")
    if isinstance(prompt, str) or prompt is None:
        return text_of(record, "prompt"), chosen, rejected
    return list(turns(prompt, "prompt")), chosen, rejected


def _answer(record: Mapping[str, Any], column: str, form: str) -> _Turns | str:
    value = record.get(column)
    if value is None:
        raise Refused(MISSING, f"column {column!r}")
    if form == "messages" or (form == "conversations" and isinstance(value, str) and value[:1] in ("{", "[")):
        value = from_json(value, TWO_PROMPTS)
    if isinstance(value, Mapping):
        return [turn(value, f"column {column!r}")]
    return text_of(record, column) if isinstance(value, str) else list(turns(value, column))


def _common(chosen: _Turns, rejected: _Turns) -> tuple[_Turns, _Turns, _Turns]:
    """Two conversations as the turns that they share and the two answers."""
    if chosen == rejected:
        raise Refused(SAME)
    pairs = zip(chosen, rejected, strict=False)  # they may differ in length
    shared = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    rests = chosen[shared:], rejected[shared:]
    if not shared or not all(rest and rest[0][0]["role"] == "assistant" for rest in rests):
        raise Refused(TWO_PROMPTS, f"they share {shared} turns, and no answers follow")
    return chosen[:shared], *rests
