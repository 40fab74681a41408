"""Rows of a language model: dialogues and texts become tokens, and which of them are in the loss."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import datasets
from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from scalepeft.dialogues import (
    ASSISTANT_FIRST,
    MISSING,
    Dialogue,
    Message,
    Plain,
    Refused,
    asked,
    dialogue,
    read,
    text_of,
    turns,
)
from scalepeft.errors import UserError, one_line
from scalepeft.sources import BAD_BYTES
from scalepeft.tables import Bad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
"""Part of every identity: to be raised when a change here or in `dialogues` gives other tokens or labels for the same row."""

IGNORED = -100
"""The label of a token that is not in the loss, as torch's cross-entropy has it."""

NO_ASSISTANT = "no turn of the assistant"
NONE_COUNTS = "no turn of the assistant is to count"
TEMPLATE_REFUSES = "chat template refuses the conversation"
TEMPLATE_LACKS = "chat template has no place for a part of the conversation"
TEMPLATE_REWRITES = "chat template does not show where a turn begins and ends"
TOO_LONG = "no token of the loss is left within training.max_length"

# --- writing: from turns to tokens ---------------------------------------------------------------------------------

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OF_TEMPLATES = (TemplateError, TypeError, ValueError, AttributeError, LookupError)  # what one raises that meets odd messages
_PROBE = "\ue000"  # of Unicode's private use: stands in no template and no row


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenised text."""

    ids: list[int]
    starts: Sequence[int]
    """The character at which each token begins."""
    ends: Sequence[int]

    def within(self, start: int, end: int) -> slice:
        """The tokens that hold a character of the span, also those that hold others beside."""
        return slice(bisect_right(self.ends, start), bisect_left(self.starts, end))


class Writer:
    """A tokenizer that writes dialogues and plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, system_prompt: str | None) -> None:
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        self.name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.is_fast:
            raise UserError(f"{self.name}: has no fast tokenizer (tokenizer.json), which tells where tokens stand; convert it")
        if tokenizer.eos_token_id is None:
            raise UserError(f"{self.name}: the tokenizer has no EOS token, and no answer would end; set its eos_token")

    @property
    def identity(self) -> dict[str, Any]:
        """What shapes the tokens beside the tokenizer's backend."""
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        return {
            "format": FORMAT,
            "system_prompt": self.system_prompt,
            "template": self.tokenizer.chat_template,
            "special": special,
        }

    @property
    def chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.tokenizer.chat_template)

    @cached_property
    def closers(self) -> tuple[str, ...]:
        """The special tokens: at the end of a turn, one of them ends it."""
        added = (str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return tuple(dict.fromkeys([*self.tokenizer.all_special_tokens, *added]))

    @cached_property
    def head(self) -> list[int]:
        """The tokens that the tokenizer puts before plain text. What it puts behind, if anything, is EOS."""
        found = self.tokenizer("a", return_special_tokens_mask=True)
        first = found["special_tokens_mask"].index(0)
        ids: list[int] = found["input_ids"][:first]
        return ids

    @cached_property
    def prompts(self) -> bool:
        """Whether an answer begins where add_generation_prompt ends: it adds an answer's head, or there is no such head."""
        question, answer = ({"role": role, "content": _PROBE} for role in ("user", "assistant"))
        try:
            given = self.render([question], None, prompt=True)
            if given != self.render([question], None):
                return True
            answered = self.render([question, answer], None)
        except Refused:
            return True
        return not answered.removeprefix(given).partition(_PROBE)[0].strip()

    def template(self, tools: list[Any] | None) -> str:
        """The text of the chat template."""
        if not self.chat:
            ways = "name one in training.chat_template_path or take an instruct model; text and prompt-completion need none"
            raise UserError(f"{self.name}: the tokenizer has no chat template, which conversations need; {ways}")
        try:
            text: str = self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:
            raise UserError(f"{self.name}: {one_line(error)}") from None
        return text

    def _write(
        self, messages: list[Message], tools: list[Any] | None, *, prompt: bool, marked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        template = self.template(tools)
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateSyntaxError as error:
            raise UserError(f"{self.name}: the chat template, line {error.lineno}: {one_line(error)}") from None
        except _OF_TEMPLATES as error:
            raise Refused(TEMPLATE_REFUSES, one_line(error)) from None
        return texts[0], spans[0] if marked else []

    def render(self, messages: list[Message], tools: list[Any] | None, *, prompt: bool = False) -> str:
        """Messages as the chat template writes them; `prompt` adds the head of the assistant's next turn."""
        return self._write(messages, tools, prompt=prompt, marked=False)[0]

    def whole(self, row: Dialogue) -> str:
        """A dialogue as text, after a check that nothing of it would be lost."""
        template = self.template(row.tools)
        parts = {"tools": bool(row.tools), "tool_calls": any("tool_calls" in message for message in row.messages)}
        for name, there in parts.items():
            if there and name not in template:
                raise Refused(TEMPLATE_LACKS, name)
        text = self.render(row.messages, row.tools)
        for message in row.messages:  # templates of models that also see want lists as content, and leave out a text
            words = message.get("content", "").rpartition("</think>")[2].split()  # many leave out what was thought
            if message["role"] in ("user", "assistant") and words and words[-1] not in text:
                raise Refused(TEMPLATE_LACKS, f"content of the role {message['role']}")
        return text

    def spans(self, row: Dialogue, text: str, places: Sequence[int]) -> list[tuple[int, int]]:
        """Where the assistant's turns of these places stand in the text of the whole row."""
        if not _MARKERS.search(self.template(row.tools)):
            return [self.span(row, text, place) for place in places]
        if not places:
            return []
        _, written = self._write(row.messages, row.tools, prompt=False, marked=True)
        marked = [(start, end) for start, end in written if start < end]
        answers = row.answers()
        if len(places) < len(answers):
            if len(marked) != len(answers):
                found = f"it marks {len(marked)} stretches for {len(answers)} turns, not all of which count"
                raise Refused(TEMPLATE_REWRITES, found)
            marked = [span for place, span in zip(answers, marked, strict=True) if place in places]
        return [(start, end + self._left_out(text, start, end)) for start, end in marked]

    def _left_out(self, text: str, start: int, end: int) -> int:
        """The length of the token that ends a marked turn, where the markers leave it out."""
        return 0 if self.ended(text[start:end]) else len(self._closer(text[end : end + 100]))

    def span(self, row: Dialogue, text: str, place: int) -> tuple[int, int]:
        """The turn is what the text has beyond that of the turns before it, up to the token that ends it."""
        given = self.render(row.messages[:place], row.tools, prompt=True)
        last = place == len(row.messages) - 1
        upto = text if last else self.render(row.messages[: place + 1], row.tools)
        trimmed = upto.rstrip()
        end = len(trimmed if trimmed.endswith(self.closers) else upto)
        if self.prompts and upto.startswith(given) and text.startswith(upto):
            return len(given), end
        # The template writes no head for an answer, another than it then has (an opened <think>), or rewrites the turn when
        # others follow (takes its reasoning away). With one character in place of the turn, what is around it shows.
        before, found, behind = self._around(row, place)
        if not (found and text.startswith(before) and text.endswith(behind) and len(before) + len(behind) < len(text)):
            number = row.answers().index(place) + 1
            way = "a template with {% generation %} markers in training.chat_template_path does"
            raise Refused(TEMPLATE_REWRITES, f"turn {number} of the assistant, with others around it; {way}")
        start = len(given) if self.prompts and before.startswith(given) else len(before)
        if text.startswith(upto):
            return start, end
        _, _, alone = self._around(replace(row, messages=row.messages[: place + 1]), place)
        closed = self._closer(behind) if self._closer(alone) else ""  # a special token may also begin the next turn
        return start, len(text) - len(behind) + len(closed)

    def _around(self, row: Dialogue, place: int) -> tuple[str, str, str]:
        """What is written before and behind a turn, and between them what stands in its place; empty where that is refused."""
        probe = {"role": "assistant", "content": _PROBE}
        try:
            return self.render([*row.messages[:place], probe, *row.messages[place + 1 :]], row.tools).partition(_PROBE)
        except Refused:  # an answer in place of a tool call, say
            return "", "", ""

    def _closer(self, behind: str) -> str:
        """What ends a turn at the beginning of a text: blanks and a special token."""
        blank = len(behind) - len(behind.lstrip())
        closer = max((token for token in self.closers if behind.startswith(token, blank)), key=len, default="")
        return behind[: blank + len(closer)] if closer else ""

    def ended(self, text: str) -> bool:
        """Whether a special token ends the last turn of a text."""
        return text.rstrip().endswith(self.closers)

    def tokens(self, text: str) -> Tokens:
        """The tokens of a text as it stands: what a chat template wrote has its special tokens already."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refused(BAD_BYTES, f"character {error.start + 1:,} is {text[error.start]!a}") from None
        found = self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
        )
        offsets = found["offset_mapping"]
        return Tokens(ids=found["input_ids"], starts=[start for start, _ in offsets], ends=[end for _, end in offsets])

    def plain(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """The tokens of plain text from BOS to EOS, and how many of them are the prompt's.

        The two are tokenised as one text, as a reader of it would. A token that spans the boundary is the completion's: it
        must be learned, for the completion does not begin without it.
        """
        found = self.tokens(prompt + completion)
        ids = self.begun(found.ids)
        boundary = found.within(len(prompt), len(prompt) + 1).start + len(ids) - len(found.ids) if prompt else 0
        return ids if ids[-1] == self.tokenizer.eos_token_id else [*ids, self.tokenizer.eos_token_id], boundary

    def begun(self, ids: list[int]) -> list[int]:
        """The tokens of plain text with BOS in front, where the tokenizer has it so; one, also when the text brings its own."""
        return ids if ids[: len(self.head)] == self.head else [*self.head, *ids]


# --- rows ----------------------------------------------------------------------------------------------------------


class Conversations:
    """Rows of the task causal-lm."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        system_prompt: str | None = None,
        assistant_only_loss: bool | None = None,
        completion_only_loss: bool | None = None,
        max_length: int | None = None,
    ) -> None:
        self.writer = Writer(tokenizer, system_prompt)
        self.assistant_only, self.completion_only, self.max_length = assistant_only_loss, completion_only_loss, max_length

    @property
    def identity(self) -> dict[str, Any]:
        """Equal for encoders that give equal rows, the tokenizer's backend being the same."""
        loss = {"assistant_only_loss": self.assistant_only, "completion_only_loss": self.completion_only}
        return {"task": "causal-lm", **self.writer.identity, **loss, "max_length": self.max_length}

    @property
    def features(self) -> dict[str, Any]:
        """The columns of encoded rows."""
        ids, labels = (datasets.List(datasets.Value(kind)) for kind in ("int32", "int64"))
        return {"input_ids": ids, "labels": labels, "length": datasets.Value("int32")}

    def encode(self, record: Mapping[str, Any], form: str) -> dict[str, Any] | Bad:
        """A row of a format as input_ids, labels, length and whether it was truncated."""
        try:
            row = read(record, form, chat=self.writer.chat)
            ids, labels = self._dialogue(row) if isinstance(row, Dialogue) else self._plain(row)
            return self._cut(ids, labels)
        except Refused as refused:
            return refused.bad

    def _cut(self, ids: list[int], labels: list[int]) -> dict[str, Any]:
        labels[0] = IGNORED  # nothing predicts the first token
        first = next((number for number, label in enumerate(labels) if label != IGNORED), None)
        if first is None:
            raise Refused(NONE_COUNTS, f"{len(ids):,} tokens")
        if self.max_length is not None and first >= self.max_length:
            raise Refused(TOO_LONG, f"of {len(ids):,} tokens, the first of the loss is number {first + 1:,}")
        kept = labels[: self.max_length]
        return {
            "input_ids": ids[: self.max_length],
            "labels": kept,
            "length": len(kept),
            "truncated": len(kept) < len(ids),
        }

    def _plain(self, row: Plain) -> tuple[list[int], list[int]]:
        ids, prompt = self.writer.plain(row.prompt, row.completion)
        ignored = 0 if self.completion_only is False else prompt
        return ids, [IGNORED] * ignored + ids[ignored:]

    def _dialogue(self, row: Dialogue) -> tuple[list[int], list[int]]:
        writer, row = self.writer, row.opened(self.writer.system_prompt)
        hidden = 0 if self.completion_only is False else row.prompt or 0
        answers = [place for place in row.answers() if place >= hidden]
        counted = [place for place in answers if row.counts[place]]
        if not counted:
            raise Refused(NONE_COUNTS if answers else NO_ASSISTANT)
        text = writer.whole(row)
        tokens = writer.tokens(text)
        turns_only = self.assistant_only
        if turns_only is None:
            turns_only = row.prompt is None or self.completion_only is not False
        if turns_only:
            labels = [IGNORED] * len(tokens.ids)
            for start, end in writer.spans(row, text, counted):
                which = tokens.within(start, end)
                labels[which] = tokens.ids[which]
        else:
            start = tokens.within(*writer.spans(row, text, answers[:1])[0]).start if hidden else 0
            labels = [IGNORED] * start + tokens.ids[start:]
            for span in writer.spans(row, text, [place for place in answers if not row.counts[place]]):
                which = tokens.within(*span)
                labels[which] = [IGNORED] * len(labels[which])
        if row.messages[-1]["role"] != "assistant" or writer.ended(text):
            return tokens.ids, labels
        eos = writer.tokenizer.eos_token_id
        return [*tokens.ids, eos], [*labels, eos if row.counts[-1] else IGNORED]


_PROMPTS = ("messages", "conversations", "instruction", "prompt", "question", "query", "text")
"""The columns that hold what is asked, the surest first."""


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast, given: Mapping[str, Any] | Sequence[Any], system_prompt: str | None = None
) -> list[int] | Bad:
    """The tokens after which the model is to answer a row or a list of messages. An answer that is there is taken away."""
    try:
        return _prompt(Writer(tokenizer, system_prompt), given if isinstance(given, Mapping) else {"messages": given})
    except Refused as refused:
        return refused.bad


def _prompt(writer: Writer, record: Mapping[str, Any]) -> list[int]:
    there = {name for name, value in record.items() if value is not None}
    column = next((name for name in _PROMPTS if name in there), None)
    if column is None:
        raise Refused(MISSING, f"one of the columns {', '.join(_PROMPTS)}")
    if column == "instruction" or (column == "question" and "chosen" in there):
        asks = asked(record, chat=writer.chat, column=column)
    elif column in ("messages", "conversations") or not isinstance(record[column], str):
        asks = list(turns(record[column], column))
    else:
        asks = text_of(record, column)
    if isinstance(asks, str):
        return writer.begun(writer.tokens(asks).ids)
    row = dialogue(asks[:-1] if asks[-1][0]["role"] == "assistant" else asks, record).opened(writer.system_prompt)
    if all(message["role"] != "user" for message in row.messages):
        raise Refused(ASSISTANT_FIRST, f"turn {len(asks)} of {column!r}")
    writer.whole(row)
    return writer.tokens(writer.render(row.messages, row.tools, prompt=True)).ids


def segments(tokenizer: PreTrainedTokenizerFast, input_ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
    """A row as text, in pieces that are in the loss or not."""
    counts = [label != IGNORED for label in labels]
    bounds = [place for place in range(1, len(counts)) if counts[place] != counts[place - 1]]
    text, start, pieces = tokenizer.decode(input_ids), 0, []
    for bound in bounds:
        before = tokenizer.decode(input_ids[:bound])
        # A part of a character gives U+FFFD at the end; the character goes to the piece that completes it.
        end = len(before) if text.startswith(before) else len(before.rstrip("\ufffd"))
        pieces.append((text[start:end], counts[bound - 1]))
        start = end
    return [piece for piece in [*pieces, (text[start:], bool(counts) and counts[-1])] if piece[0]]
