"""Dialogues: how the columns of a row tell the turns of a conversation, or a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scalepeft.tables import Bad, shown

MISSING = "field is missing"
NOT_MESSAGES = "conversation is not a list of messages"
ROLE_UNKNOWN = "role is unknown"
NOT_TEXT = "content is not text"
NOT_CALLS = "tool calls are not JSON of names and arguments"
NOT_TOOLS = "tools are not a JSON list of objects"
NOT_FLAG = "train is not true or false, or weight not 0 or 1"
EMPTY = "turn is empty"
ASSISTANT_FIRST = "assistant speaks before any user"

Message = dict[str, Any]


class Refused(Exception):
    """A row that cannot be used."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.bad = Bad(reason=reason, detail=detail)


# --- formats: which columns tell a row -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Form:
    """The columns of a format, in the usual names."""

    needs: tuple[tuple[str, ...], ...]
    """Sets of columns, one of which must be there."""
    takes: tuple[str, ...] = ()
    """Columns that may be there."""

    def missing(self, columns: Sequence[str]) -> list[str]:
        """What lacks of the set of columns that is nearest to being there; empty when one is there."""
        return min(([name for name in needed if name not in columns] for needed in self.needs), key=len)

    def __str__(self) -> str:
        needed = " or ".join(" + ".join(columns) for columns in self.needs)
        return f"{needed} (optional: {', '.join(self.takes)})" if self.takes else needed


FORMS: Mapping[str, Mapping[str, Form]] = {
    "causal-lm": {
        "messages": Form(needs=(("messages",),), takes=("system", "tools")),
        "conversations": Form(needs=(("conversations",),), takes=("system", "tools")),
        "instruction": Form(needs=(("instruction", "output"),), takes=("input", "system", "history", "tools")),
        "prompt-completion": Form(
            needs=(
                ("prompt", "completion"),
                ("question", "answer"),
                ("question", "response"),
                ("query", "response"),
                ("prompt", "response"),
            ),
            takes=("system", "tools"),
        ),
        "text": Form(needs=(("text",),)),
    },
    "preference": {
        "conversations": Form(needs=(("conversations", "chosen", "rejected"),), takes=("system", "tools")),
        "instruction": Form(
            needs=(("instruction", "chosen", "rejected"), ("question", "chosen", "rejected")),
            takes=("input", "system", "history", "tools"),
        ),
        "prompt-completion": Form(needs=(("prompt", "chosen", "rejected"),), takes=("system", "tools")),
        "messages": Form(needs=(("chosen", "rejected"),), takes=("system", "tools")),
    },
}
"""By task, the formats in the order in which they are recognised: one whose columns hold another's stands first."""

COLUMNS = tuple(
    dict.fromkeys(
        name
        for forms in FORMS.values()
        for form in forms.values()
        for name in (*(column for needed in form.needs for column in needed), *form.takes)
    )
)
"""Every column that some format knows."""


def recognise(columns: Sequence[str], task: str) -> str | None:
    """The format of rows with these columns."""
    return next((name for name, form in FORMS[task].items() if not form.missing(columns)), None)


# --- reading: from columns to turns --------------------------------------------------------------------------------

ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")} | {"function": "tool"}
SHAREGPT_ROLES = {
    **ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}

_ALPACA_ASKS = "Write a response that appropriately completes the request.\n\n"
_ALPACA = f"Below is an instruction that describes a task. {_ALPACA_ASKS}"
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. " + _ALPACA_ASKS
)  # the words that models of this kind were trained with


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A row that the chat template writes."""

    messages: list[Message]
    counts: list[bool]
    """Whether each message may be in the loss."""
    tools: list[Any] | None = None
    prompt: int | None = None
    """How many messages are the prompt's, in a row that has a prompt and a completion."""

    def answers(self) -> list[int]:
        """The places of the assistant's turns."""
        return [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]

    def opened(self, system: str | None) -> Dialogue:
        """With this system message, where there is none."""
        if not system or any(message["role"] in ("system", "developer") for message in self.messages):
            return self
        messages = [{"role": "system", "content": system}, *self.messages]
        return replace(self, messages=messages, counts=[False, *self.counts], prompt=self.prompt and self.prompt + 1)


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A row of text as it stands."""

    prompt: str
    """Empty when all of the text is to be learned."""
    completion: str


def from_json(value: Any, reason: str) -> Any:
    """A value that may have come as JSON text, for a column of a csv file holds nothing else."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Refused(reason, shown(value)) from None


def text_of(record: Mapping[str, Any], column: str) -> str:
    """The text of a column that must have some."""
    value = record.get(column)
    if value is None:
        raise Refused(MISSING, f"column {column!r}")
    if not isinstance(value, str):
        raise Refused(NOT_TEXT, f"{shown(value)} in column {column!r}")
    if not value.strip():
        raise Refused(EMPTY, f"column {column!r}")
    return value


def _optional(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    return "" if value is None or (isinstance(value, str) and not value.strip()) else text_of(record, column)


def turns(value: Any, column: str) -> Iterator[tuple[Message, bool]]:
    """The messages of a column, and whether each may be in the loss."""
    if value is None:
        raise Refused(MISSING, f"column {column!r}")
    found = from_json(value, NOT_MESSAGES)
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise Refused(NOT_MESSAGES, f"{shown(found)} in column {column!r}")
    for number, item in enumerate(found, 1):
        yield turn(item, f"turn {number} of {column!r}")


def turn(item: Any, where: str) -> tuple[Message, bool]:
    """One message, in the words of messages or of ShareGPT, and whether it may be in the loss."""
    if not isinstance(item, Mapping):
        raise Refused(NOT_MESSAGES, f"{shown(item)} at {where}")
    given = {key: value for key, value in item.items() if value is not None}  # parquet has every key in every message
    sharegpt = "from" in given and "role" not in given
    role_key, content_key, roles = ("from", "value", SHAREGPT_ROLES) if sharegpt else ("role", "content", ROLES)
    name, content = given.pop(role_key, None), given.pop(content_key, None)
    if name is None:
        raise Refused(MISSING, f"{role_key!r} at {where}")
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise Refused(ROLE_UNKNOWN, f"{shown(name)} at {where}")
    train, weight = given.pop("train", True), given.pop("weight", 1)
    if not isinstance(train, bool) or weight not in (0, 1):
        raise Refused(NOT_FLAG, where)
    if name == "function_call" and sharegpt:
        given["tool_calls"], content = from_json(content, NOT_CALLS), None
    calls = _calls(given.pop("tool_calls", None), where)
    if content is None and not calls:
        raise Refused(MISSING, f"{content_key!r} at {where}")
    text = _content(content, where)
    if role in ("user", "assistant") and not text.strip() and not calls:
        raise Refused(EMPTY, where)
    message = {"role": role, **({"content": text} if content is not None else {}), **given}
    return message | ({"tool_calls": calls} if calls else {}), train and bool(weight)


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, Sequence) else [content]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(parts):
        raise Refused(NOT_TEXT, f"{shown(content)} at {where}")
    return "".join(found)


def _calls(value: Any, where: str) -> list[Message]:
    """Tool calls as chat templates expect them: arguments as an object, where OpenAI's interface has JSON text."""
    found = from_json(value, NOT_CALLS) or []
    calls = []
    for item in found if isinstance(found, Sequence) else [found]:
        call = item if isinstance(item, Mapping) else {}
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Refused(NOT_CALLS, f"{shown(item)} at {where}")
        arguments = from_json(function.get("arguments") or {}, NOT_CALLS)
        rest = {key: value for key, value in call.items() if key in ("id", "type") and value is not None}
        calls.append({"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}})
    return calls


def dialogue(given: Sequence[tuple[Message, bool]], record: Mapping[str, Any], *, prompt: int | None = None) -> Dialogue:
    """Turns, with what the columns system and tools say."""
    messages, counts = [message for message, _ in given], [may for _, may in given]
    roles = [message["role"] for message in messages]
    if "assistant" in roles and "user" not in roles[: roles.index("assistant")]:
        raise Refused(ASSISTANT_FIRST, f"turn {roles.index('assistant') + 1}")
    tools = from_json(record.get("tools") or None, NOT_TOOLS)
    if tools and (not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools)):
        raise Refused(NOT_TOOLS, shown(tools))
    return Dialogue(messages=messages, counts=counts, tools=list(tools) if tools else None, prompt=prompt).opened(
        _optional(record, "system")
    )


def asked(record: Mapping[str, Any], *, chat: bool, column: str = "instruction") -> list[tuple[Message, bool]] | str:
    """The question of an instruction row: turns, or Alpaca's words where there is no chat template."""
    instruction, extra = text_of(record, column), _optional(record, "input")
    pairs = from_json(record.get("history") or [], NOT_MESSAGES)
    if not isinstance(pairs, Sequence) or not all(isinstance(p, Sequence) and list(map(type, p)) == [str, str] for p in pairs):
        raise Refused(NOT_MESSAGES, f"{shown(pairs)} in column 'history', which has pairs of texts")
    if chat:
        said = [("user" if not place else "assistant", text) for pair in pairs for place, text in enumerate(pair)]
        said.append(("user", f"{instruction}\n\n{extra}" if extra else instruction))
        return [turn({"role": role, "content": text}, "column 'history'") for role, text in said]
    before = "".join(f"### Instruction:\n{question}\n\n### Response:\n{answer}\n\n" for question, answer in pairs)
    system = _optional(record, "system")
    head = f"{system}\n\n" if system else _ALPACA_INPUT if extra else _ALPACA
    given = f"### Input:\n{extra}\n\n" if extra else ""
    return f"{head}{before}### Instruction:\n{instruction}\n\n{given}### Response:\n"


def _read_turns(record: Mapping[str, Any], _: bool, *, column: str) -> Dialogue:
    return dialogue(list(turns(record.get(column), column)), record)


def _read_instruction(record: Mapping[str, Any], chat: bool) -> Dialogue | Plain:
    question, answer = asked(record, chat=chat), text_of(record, "output")
    if isinstance(question, str):
        return Plain(prompt=question, completion=answer)
    return dialogue([*question, ({"role": "assistant", "content": answer}, True)], record, prompt=0)


def _read_completion(record: Mapping[str, Any], _: bool) -> Dialogue | Plain:
    pairs = FORMS["causal-lm"]["prompt-completion"].needs
    there = {name for name, value in record.items() if value is not None}
    names = next((pair for pair in pairs if there.issuperset(pair)), None) or min(pairs, key=lambda p: len(set(p) - there))
    prompt, completion = (record.get(name) for name in names)
    if isinstance(prompt, str) or isinstance(completion, str) or prompt is None or completion is None:
        return Plain(prompt=text_of(record, names[0]), completion=text_of(record, names[1]))
    given = list(turns(prompt, names[0]))
    return dialogue([*given, *turns(completion, names[1])], record, prompt=len(given))


def _read_text(record: Mapping[str, Any], _: bool) -> Plain:
    return Plain(prompt="", completion=text_of(record, "text"))


def _read_messages(record: Mapping[str, Any], chat: bool) -> Dialogue:
    return _read_turns(record, chat, column="messages")


def _read_conversations(record: Mapping[str, Any], chat: bool) -> Dialogue:
    return _read_turns(record, chat, column="conversations")


_READERS: Mapping[str, Callable[[Mapping[str, Any], bool], Dialogue | Plain]] = {
    "messages": _read_messages,
    "conversations": _read_conversations,
    "instruction": _read_instruction,
    "prompt-completion": _read_completion,
    "text": _read_text,
}


def read(record: Mapping[str, Any], form: str, *, chat: bool) -> Dialogue | Plain:
    """A row of a format of the task causal-lm; `chat` tells whether there is a chat template."""
    return _READERS[form](record, chat)
