"""From rows to tokens: what of a conversation is learned, with the templates of the public models and a real tokenizer."""

from __future__ import annotations

import json

import pytest

from scalepeft import conversations, dialogues, preferences
from scalepeft.conversations import IGNORED, Conversations, prompt_ids, segments
from scalepeft.dialogues import recognise
from scalepeft.errors import UserError
from scalepeft.preferences import Preferences
from scalepeft.sources import BAD_BYTES
from scalepeft.tables import Bad

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for t in tools %}{{ t | tojson }}{% endfor %}{{- '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set content = m.content or '' %}
    {%- set reasoning = m.reasoning_content or '' %}
    {%- if '</think>' in content %}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
      {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content }}
    {%- for call in m.tool_calls or [] %}
      {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
      {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
  {%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
THINKS = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
ENDS_ALL = MISTRAL.replace("' ' + m.content + eos_token", "'<|im_start|>' + m.content + '<|im_end|>\n'") + (
    "{{ '<|im_start|>' if add_generation_prompt else eos_token }}"
)
NO_END = (
    "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|im_end|>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}INSIDE{% endgeneration %}OUTSIDE{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace("INSIDE", "").replace("OUTSIDE", "<|im_end|>")
MARKED_WITH_END = MARKED.replace("INSIDE", "<|im_end|>").replace("OUTSIDE", "")
HEADS_ALWAYS = "{% for m in messages %}{{ 'A' if m.role == 'assistant' else 'Q' }}: {{ m.content }}\n{% endfor %}"

SPECIAL = [
    *(
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ),
    *("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
]
QUESTION, ANSWER = {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am fine."}
AGAIN, MORE = {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Still fine, and you?"}
TWO_TURNS = [QUESTION, ANSWER, AGAIN, MORE]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TWO_TURNS]
HISTORY = [QUESTION["content"], ANSWER["content"]]


def tokenizer_with(template=None, *, bos="<s>", eos="</s>", before=(), behind=()):
    """A byte-level tokenizer with a template, and with the tokens that its post-processor adds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=len(SPECIAL) + 256 + 40,
        show_progress=False,
    )
    backend.train_from_iterator(["How are you? I am fine. Still fine, and you? And now? assistant user system"] * 3, trainer)
    ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
    template_processing = processors.TemplateProcessing(single=" ".join([*before, "$A", *behind]), special_tokens=ids)
    # Llama 3's: the byte-level step takes the spaces out of the tokens' offsets
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template_processing])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatml():
    return tokenizer_with(CHATML, bos="<|im_start|>", eos="<|im_end|>")


@pytest.fixture(scope="module")
def plain():
    return tokenizer_with(before=["<s>"])


def learned(tokenizer, row):
    assert not isinstance(row, Bad), row
    return [text for text, counts in segments(tokenizer, row["input_ids"], row["labels"]) if counts]


def text(tokenizer, row):
    assert not isinstance(row, Bad), row
    assert len(row["labels"]) == len(row["input_ids"]) == row["length"]
    return tokenizer.decode(row["input_ids"])


def of_messages(tokenizer, messages, **more):
    return Conversations(tokenizer).encode({"messages": messages, **more}, "messages")


# --- templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "bos", "eos", "expected"),
    [
        (CHATML, "<|im_start|>", "<|im_end|>", ["I am fine.<|im_end|>", "Still fine, and you?<|im_end|>"]),
        (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", ["I am fine.<|eot_id|>", "Still fine, and you?<|eot_id|>"]),
        (MISTRAL, "<s>", "</s>", [" I am fine.</s>", " Still fine, and you?</s>"]),
        (GEMMA, "<bos>", "<eos>", ["I am fine.<end_of_turn>", "Still fine, and you?<end_of_turn>"]),
        (QWEN3, None, "<|im_end|>", ["I am fine.<|im_end|>", "<think>\n\n</think>\n\nStill fine, and you?<|im_end|>"]),
        (THINKS, None, "<|im_end|>", ["I am fine.<|im_end|>", "Still fine, and you?<|im_end|>"]),
        (MARKED_WITHOUT_END, None, "<|im_end|>", ["I am fine.<|im_end|>", "Still fine, and you?<|im_end|>"]),
        (MARKED_WITH_END, None, "<|im_end|>", ["I am fine.<|im_end|>", "Still fine, and you?<|im_end|>"]),
        (ENDS_ALL, None, "</s>", ["I am fine.<|im_end|>", "Still fine, and you?<|im_end|>\n</s>"]),
        (NO_END, None, "</s>", ["I am fine.", "Still fine, and you?</s>"]),
        (HEADS_ALWAYS, None, "</s>", [" I am fine.\n", " Still fine, and you?\n</s>"]),
    ],
    ids=[
        "chatml",
        "llama3",
        "mistral",
        "gemma",
        "qwen3",
        "thinks",
        "marked",
        "marked-end",
        "ends-all",
        "no-end",
        "heads-always",
    ],
)
def test_the_answers_and_the_tokens_that_end_them_are_learned(template, bos, eos, expected):
    tokenizer = tokenizer_with(template, bos=bos, eos=eos, before=[bos] if bos else [])
    row = of_messages(tokenizer, TWO_TURNS)
    assert learned(tokenizer, row) == expected
    written = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert text(tokenizer, row) == written + ("</s>" if template in (NO_END, HEADS_ALWAYS) else "")  # no second BOS


def test_marked_turns_are_those_of_transformers_own_mask():
    tokenizer = tokenizer_with(MARKED_WITH_END, bos=None, eos="<|im_end|>")
    found = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    row = of_messages(tokenizer, TWO_TURNS)
    assert row["input_ids"] == found["input_ids"]
    assert [label != IGNORED for label in row["labels"]] == [bool(mask) for mask in found["assistant_masks"]]


def test_reasoning_is_learned_where_the_template_keeps_it():
    tokenizer = tokenizer_with(QWEN3, bos=None, eos="<|im_end|>")
    said = [QUESTION, {**ANSWER, "content": "<think>\nso\n</think>\n\nfine"}, AGAIN, {**MORE, "reasoning_content": "hm"}]
    assert learned(tokenizer, of_messages(tokenizer, said)) == [
        "fine<|im_end|>",
        "<think>\nhm\n</think>\n\nStill fine, and you?<|im_end|>",
    ]


def test_turns_marked_in_several_stretches_are_learned_unless_some_are_left_out():
    twice = MARKED_WITH_END.replace("{{ m.content }}", "{{ m.content }}{% endgeneration %}{{ '' }}{% generation %}")
    tokenizer = tokenizer_with(twice, bos=None, eos="<|im_end|>")
    assert learned(tokenizer, of_messages(tokenizer, TWO_TURNS)) == ["I am fine.<|im_end|>", "Still fine, and you?<|im_end|>"]
    bad = of_messages(tokenizer, [QUESTION, {**ANSWER, "train": False}, AGAIN, MORE])
    assert bad.reason == conversations.TEMPLATE_REWRITES
    assert "4 stretches for 2 turns" in bad.detail


def test_tool_calls_are_learned_where_answers_have_no_head():
    calls = MISTRAL.replace(
        "{% if m.role == 'user' %}", "{% if m.tool_calls %}{{ m.tool_calls | tojson }}</s>{% elif m.role == 'user' %}"
    ).replace("(loop.index0 % 2 == 0)", "(m.role == 'user')")
    tokenizer = tokenizer_with(calls)
    call = {"type": "function", "function": {"name": "time", "arguments": {}}}
    row = of_messages(tokenizer, [QUESTION, {"role": "assistant", "tool_calls": [call]}])
    assert learned(tokenizer, row) == [f"{json.dumps([call])}</s>"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("+", Bad(reason=conversations.TEMPLATE_LACKS, detail="content of the role user")),
        ("+ message['content'][0]['text'] +", None),  # as templates of models that also see have it
    ],
)
def test_a_template_that_leaves_out_what_is_said_is_refused(written, expected):
    bad = of_messages(tokenizer_with(CHATML.replace("+ message['content'] +", written)), TWO_TURNS)
    assert bad == expected if expected else bad.reason == conversations.TEMPLATE_REFUSES


def test_a_template_that_hides_where_a_turn_stands_is_refused():
    twice = CHATML.replace("message['content']", "message['content'] + message['content']")
    hidden = twice.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>model\n' }}")
    bad = of_messages(tokenizer_with(hidden, bos=None, eos="<|im_end|>"), TWO_TURNS)
    assert bad.reason == conversations.TEMPLATE_REWRITES
    assert "turn 1 of the assistant" in bad.detail
    assert "training.chat_template_path" in bad.detail


def test_tool_calls_are_learned_and_their_results_are_not():
    tokenizer = tokenizer_with(QWEN3, bos=None, eos="<|im_end|>")
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC"}'}}
    said = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "function", "content": "noon"},
        ANSWER,
    ]
    row = of_messages(tokenizer, said, tools=json.dumps([{"name": "time"}]))
    called = '<tool_call>\n{"name": "time", "arguments": {"zone": "UTC"}}\n</tool_call><|im_end|>'
    assert learned(tokenizer, row) == [called, "<think>\n\n</think>\n\nI am fine.<|im_end|>"]
    assert '# Tools\n{"name": "time"}' in text(tokenizer, row)
    sharegpt = [
        {"from": "human", "value": "How are you?"},
        {"from": "function_call", "value": '{"name": "time", "arguments": {"zone": "UTC"}}'},
        {"from": "observation", "value": "noon"},
        {"from": "gpt", "value": "I am fine."},
    ]
    same = Conversations(tokenizer).encode({"conversations": sharegpt, "tools": '[{"name": "time"}]'}, "conversations")
    assert same == row


@pytest.mark.parametrize("part", ["tools", "tool_calls"])
def test_a_template_without_a_place_for_tools_is_not_used_without_them(chatml, part):
    call = {"function": {"name": "time", "arguments": {}}}
    answer = {**ANSWER, "tool_calls": [call]} if part == "tool_calls" else ANSWER
    more = {"tools": [{"name": "time"}]} if part == "tools" else {}
    assert of_messages(chatml, [QUESTION, answer], **more) == Bad(reason=conversations.TEMPLATE_LACKS, detail=part)


def test_the_spaces_of_a_sentencepiece_tokenizer_stand_with_their_words():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], vocab_size=60, show_progress=False)
    backend.train_from_iterator(["[INST] How are you? And now? [/INST] I am fine. Still fine, and you?"], trainer)
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = MISTRAL
    row = of_messages(tokenizer, TWO_TURNS)
    tokens = [tokenizer.convert_ids_to_tokens(label) for label in row["labels"] if label != IGNORED]
    assert "".join(tokens) == "▁I▁am▁fine.</s>▁Still▁fine,▁and▁you?</s>"


# --- what counts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED_WITH_END, QWEN3])
@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}])
def test_a_turn_can_be_left_out_of_the_loss(template, flag):
    tokenizer = tokenizer_with(template, bos=None, eos="<|im_end|>")
    row = of_messages(tokenizer, [QUESTION, ANSWER, AGAIN, {**MORE, **flag}])
    assert learned(tokenizer, row) == ["I am fine.<|im_end|>"]
    everything = Conversations(tokenizer, assistant_only_loss=False).encode(
        {"messages": [QUESTION, {**ANSWER, **flag}, AGAIN, MORE]}, "messages"
    )
    assert "I am fine." not in "".join(learned(tokenizer, everything))
    assert "And now?" in "".join(learned(tokenizer, everything))


def test_all_but_the_first_token_is_learned_on_request(chatml):
    row = Conversations(chatml, assistant_only_loss=False).encode({"messages": TWO_TURNS}, "messages")
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["Still fine, and you?<|im_end|>"]),
        (
            {"assistant_only_loss": True, "completion_only_loss": False},
            ["I am fine.<|im_end|>", "Still fine, and you?<|im_end|>"],
        ),
        ({"assistant_only_loss": False}, ["Still fine, and you?<|im_end|>\n"]),
    ],
)
def test_the_answers_of_a_prompt_are_no_completion(chatml, settings, expected):
    record = {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}
    encoder = Conversations(chatml, system_prompt="Be brief", **settings)
    row = encoder.encode(record, "prompt-completion")
    assert learned(chatml, row) == expected
    whole = Conversations(chatml, completion_only_loss=False).encode(record, "prompt-completion")
    assert whole["labels"] == [IGNORED, *whole["input_ids"][1:]]


def test_the_recipes_system_prompt_is_for_conversations_without_one(chatml):
    encoder = Conversations(chatml, system_prompt="Be brief")
    assert text(chatml, encoder.encode({"messages": TWO_TURNS}, "messages")).startswith(
        "<|im_start|>system\nBe brief<|im_end|>"
    )
    own = [{"role": "system", "content": "Be long"}, *TWO_TURNS]
    for record in ({"messages": own}, {"messages": TWO_TURNS, "system": "Be long"}):
        row = encoder.encode(record, "messages")
        assert text(chatml, row).startswith("<|im_start|>system\nBe long<|im_end|>\n<|im_start|>user")


# --- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "task", "expected"),
    [
        (["id", "messages", "prompt"], "causal-lm", "messages"),
        (["conversations", "tools"], "causal-lm", "conversations"),
        (["instruction", "input", "output", "text"], "causal-lm", "instruction"),
        (["question", "response"], "causal-lm", "prompt-completion"),
        (["text"], "causal-lm", "text"),
        (["prompt"], "causal-lm", None),
        (["conversations", "chosen", "rejected"], "preference", "conversations"),
        (["system", "question", "chosen", "rejected"], "preference", "instruction"),
        (["prompt", "chosen", "rejected", "messages"], "preference", "prompt-completion"),
        (["chosen", "rejected"], "preference", "messages"),
        (["messages"], "preference", None),
    ],
)
def test_formats_are_recognised_by_their_columns(columns, task, expected):
    assert recognise(columns, task) == expected


def test_a_format_tells_its_columns():
    form = dialogues.FORMS["causal-lm"]["prompt-completion"]
    assert form.missing(["answer", "id"]) == ["question"]
    assert form.missing(["prompt", "response"]) == []
    assert str(dialogues.FORMS["causal-lm"]["messages"]) == "messages (optional: system, tools)"
    assert {"messages", "tools", "rejected", "history"} < set(dialogues.COLUMNS)


@pytest.mark.parametrize(
    ("form", "record"),
    [
        ("messages", {"messages": json.dumps(TWO_TURNS)}),
        ("messages", {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TWO_TURNS]}),
        ("messages", {"messages": [{**m, "name": None, "tool_calls": None} for m in TWO_TURNS]}),
        ("conversations", {"conversations": SHAREGPT}),
        ("conversations", {"conversations": TWO_TURNS, "tools": ""}),
        ("instruction", {"instruction": "And now?", "input": "", "output": MORE["content"], "history": [HISTORY]}),
    ],
    ids=["csv", "parts", "parquet", "sharegpt", "roles", "instruction"],
)
def test_all_formats_of_a_conversation_give_the_same_tokens(chatml, form, record):
    assert Conversations(chatml).encode(record, form) == of_messages(chatml, TWO_TURNS)


def test_an_instruction_and_its_input_are_one_question(chatml):
    row = Conversations(chatml).encode({"instruction": "Translate", "input": "now", "output": "jetzt"}, "instruction")
    assert "<|im_start|>user\nTranslate\n\nnow<|im_end|>" in text(chatml, row)
    assert learned(chatml, row) == ["jetzt<|im_end|>"]


def test_without_a_template_an_instruction_is_alpacas_prompt(plain):
    row = Conversations(plain).encode({"instruction": "Translate", "input": "now", "output": "jetzt"}, "instruction")
    assert learned(plain, row) == ["jetzt</s>"]
    assert text(plain, row).startswith("<s>Below is an instruction that describes a task, paired with an input")
    assert "### Instruction:\nTranslate\n\n### Input:\nnow\n\n### Response:\njetzt" in text(plain, row)


@pytest.mark.parametrize("names", [("prompt", "completion"), ("question", "answer"), ("query", "response")])
def test_a_prompt_of_text_stays_text(chatml, names):
    row = Conversations(chatml).encode(dict(zip(names, ("How are", " you?"), strict=True)), "prompt-completion")
    assert text(chatml, row) == "How are you?<|im_end|>"
    assert learned(chatml, row) == [" you?<|im_end|>"]


def test_a_token_over_the_boundary_is_the_completions(plain):
    record = {"prompt": "And yo", "completion": "u?"}
    joined = plain.tokenize("And you?")
    assert "Ġyou" in joined
    row = Conversations(plain).encode(record, "prompt-completion")
    assert learned(plain, row) == [" you?</s>"]
    assert row["input_ids"][1:-1] == plain.convert_tokens_to_ids(joined)


# --- BOS and EOS ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [(), ("</s>",)])
@pytest.mark.parametrize("given", ["fine", "<s>fine", "fine</s>", "<s>fine</s>"])
def test_plain_text_has_one_beginning_and_one_end(given, behind):
    tokenizer = tokenizer_with(before=["<s>"], behind=behind)
    row = Conversations(tokenizer).encode({"text": given}, "text")
    assert text(tokenizer, row) == "<s>fine</s>"
    assert learned(tokenizer, row) == ["fine</s>"]
    row = Conversations(tokenizer).encode({"prompt": given.removesuffix("</s>"), "completion": " you"}, "prompt-completion")
    assert text(tokenizer, row) == "<s>fine you</s>"
    assert learned(tokenizer, row) == [" you</s>"]


def test_a_tokenizer_that_adds_no_beginning_gets_none():
    tokenizer = tokenizer_with()
    assert text(tokenizer, Conversations(tokenizer).encode({"text": "fine"}, "text")) == "fine</s>"


def test_an_end_is_added_to_a_last_answer_without_one_only():
    tokenizer = tokenizer_with(HEADS_ALWAYS)
    assert text(tokenizer, of_messages(tokenizer, TWO_TURNS[:3])).endswith("And now?\n")
    untrained = of_messages(tokenizer, [*TWO_TURNS[:3], {**MORE, "train": False}])
    assert untrained["input_ids"][-1] == tokenizer.eos_token_id
    assert untrained["labels"][-1] == IGNORED


# --- length --------------------------------------------------------------------------------------------------------


def test_a_long_row_keeps_its_start(chatml):
    whole = of_messages(chatml, TWO_TURNS)
    cut = Conversations(chatml, max_length=whole["length"] - 5).encode({"messages": TWO_TURNS}, "messages")
    assert cut["input_ids"] == whole["input_ids"][:-5]
    assert cut["labels"] == whole["labels"][:-5]
    assert (cut["truncated"], whole["truncated"]) == (True, False)
    exact = Conversations(chatml, max_length=whole["length"]).encode({"messages": TWO_TURNS}, "messages")
    assert exact == whole


def test_a_row_whose_answer_is_cut_off_is_bad(chatml):
    first = next(place for place, label in enumerate(of_messages(chatml, TWO_TURNS)["labels"]) if label != IGNORED)
    bad = Conversations(chatml, max_length=first).encode({"messages": TWO_TURNS}, "messages")
    assert bad.reason == conversations.TOO_LONG
    assert f"the first of the loss is number {first + 1}" in bad.detail
    assert not isinstance(Conversations(chatml, max_length=first + 1).encode({"messages": TWO_TURNS}, "messages"), Bad)


# --- bad rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "record", "reason"),
    [
        ("messages", {"messages": [{"role": "judge", "content": "x"}]}, dialogues.ROLE_UNKNOWN),
        ("messages", {"messages": [ANSWER, QUESTION]}, dialogues.ASSISTANT_FIRST),
        ("messages", {"messages": [{"role": "system", "content": "x"}, ANSWER]}, dialogues.ASSISTANT_FIRST),
        ("messages", {"messages": [QUESTION, {**ANSWER, "content": " \n"}]}, dialogues.EMPTY),
        ("messages", {"messages": [{**QUESTION, "content": ""}, ANSWER]}, dialogues.EMPTY),
        ("messages", {"messages": [QUESTION]}, conversations.NO_ASSISTANT),
        ("messages", {"messages": [QUESTION, {**ANSWER, "train": False}]}, conversations.NONE_COUNTS),
        ("messages", {"messages": [QUESTION, {**ANSWER, "train": "no"}]}, dialogues.NOT_FLAG),
        ("messages", {"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}, dialogues.NOT_FLAG),
        ("messages", {"messages": "How are you?"}, dialogues.NOT_MESSAGES),
        ("messages", {"messages": 3}, dialogues.NOT_MESSAGES),
        ("messages", {"messages": ["How are you?"]}, dialogues.NOT_MESSAGES),
        ("messages", {"messages": []}, dialogues.NOT_MESSAGES),
        ("messages", {"messages": None}, dialogues.MISSING),
        ("messages", {"messages": [QUESTION, {"role": "assistant"}]}, dialogues.MISSING),
        ("messages", {"messages": [{"content": "x"}]}, dialogues.MISSING),
        ("messages", {"messages": [QUESTION, {**ANSWER, "content": 3}]}, dialogues.NOT_TEXT),
        ("messages", {"messages": [{**QUESTION, "content": [{"type": "image"}]}, ANSWER]}, dialogues.NOT_TEXT),
        ("messages", {"messages": [QUESTION, {"role": "assistant", "tool_calls": "time"}]}, dialogues.NOT_CALLS),
        ("messages", {"messages": [QUESTION, {"role": "assistant", "tool_calls": [3]}]}, dialogues.NOT_CALLS),
        ("messages", {"messages": TWO_TURNS, "tools": "time"}, dialogues.NOT_TOOLS),
        ("messages", {"messages": TWO_TURNS, "tools": ["time"]}, dialogues.NOT_TOOLS),
        ("conversations", {"conversations": [{"from": "human", "value": None}]}, dialogues.MISSING),
        ("instruction", {"instruction": "x", "output": ""}, dialogues.EMPTY),
        ("instruction", {"instruction": 3, "output": "x"}, dialogues.NOT_TEXT),
        ("instruction", {"instruction": "x", "output": "x", "history": [["x"]]}, dialogues.NOT_MESSAGES),
        ("prompt-completion", {"prompt": "x", "completion": None}, dialogues.MISSING),
        ("prompt-completion", {"prompt": "x", "completion": [ANSWER]}, dialogues.NOT_TEXT),
        ("prompt-completion", {"prompt": [QUESTION, ANSWER], "completion": [AGAIN]}, conversations.NO_ASSISTANT),
        ("text", {"text": "\n"}, dialogues.EMPTY),
        ("text", {"text": "half \ud83d"}, BAD_BYTES),
        ("messages", {"messages": [QUESTION, {**ANSWER, "content": "half \ud83d"}]}, BAD_BYTES),
        ("messages", {"messages": [QUESTION, {"role": "assistant", "tool_calls": 3}]}, dialogues.NOT_CALLS),
    ],
)
def test_a_row_that_cannot_be_used_says_why(chatml, form, record, reason):
    bad = Conversations(chatml).encode(record, form)
    assert isinstance(bad, Bad)
    assert bad.reason == reason


def test_what_a_template_raises_is_told():
    bad = of_messages(tokenizer_with(MISTRAL), [QUESTION, AGAIN, MORE])
    assert bad == Bad(reason=conversations.TEMPLATE_REFUSES, detail="roles must alternate user/assistant")
    bad = Conversations(tokenizer_with(GEMMA), system_prompt="Be brief").encode({"messages": TWO_TURNS}, "messages")
    assert bad == Bad(reason=conversations.TEMPLATE_REFUSES, detail="System role not supported")


def test_two_questions_in_a_row_are_allowed(chatml):
    assert learned(chatml, of_messages(chatml, [QUESTION, AGAIN, MORE])) == ["Still fine, and you?<|im_end|>"]


# --- tokenizers ----------------------------------------------------------------------------------------------------


def test_conversations_need_a_chat_template(plain):
    with pytest.raises(UserError, match=r"no chat template.*training\.chat_template_path") as raised:
        of_messages(plain, TWO_TURNS)
    assert "\n" not in str(raised.value)


def test_a_broken_chat_template_is_no_matter_of_rows():
    with pytest.raises(UserError, match="chat template, line 1"):
        of_messages(tokenizer_with("{% if %}"), TWO_TURNS)


@pytest.mark.parametrize("encoder", [Conversations, Preferences])
def test_a_tokenizer_needs_an_end(encoder):
    with pytest.raises(UserError, match="no EOS token"):
        encoder(tokenizer_with(eos=None))


def test_the_identity_tells_apart_what_gives_other_rows(chatml):
    encoders = [
        Conversations(chatml),
        Conversations(chatml, max_length=8),
        Conversations(chatml, system_prompt="x"),
        Conversations(chatml, assistant_only_loss=False),
        Conversations(chatml, completion_only_loss=False),
        Conversations(tokenizer_with(LLAMA3, bos="<|im_start|>", eos="<|im_end|>")),
        Conversations(tokenizer_with(CHATML, bos=None, eos="<|im_end|>")),
        Preferences(chatml),
        Preferences(chatml, max_length=8),
    ]
    assert len({json.dumps(encoder.identity) for encoder in encoders}) == len(encoders)
    assert Conversations(chatml).identity == encoders[0].identity


def test_rows_fit_their_features(chatml):
    import datasets

    for encoder, record in (
        (Conversations(chatml), {"messages": TWO_TURNS}),
        (Preferences(chatml), {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, MORE]}),
    ):
        row = encoder.encode(record, "messages")
        found = datasets.Dataset.from_list(
            [{name: row[name] for name in encoder.features}], datasets.Features(encoder.features)
        )
        assert found[0] == {name: row[name] for name in encoder.features}


# --- preview and prompts -------------------------------------------------------------------------------------------


def test_a_character_of_several_tokens_is_shown_whole(plain):
    row = Conversations(plain).encode({"prompt": "fine 🦙", "completion": "🦙é!"}, "prompt-completion")
    assert len(plain.tokenize("🦙")) > 1
    assert segments(plain, row["input_ids"], row["labels"]) == [("<s>fine 🦙", False), ("🦙é!</s>", True)]
    ids = row["input_ids"]
    middle = ids.index(plain.convert_tokens_to_ids(plain.tokenize("🦙"))[1])
    halved = [IGNORED] * middle + ids[middle:]
    assert segments(plain, ids, halved) == [("<s>fine ", False), ("🦙🦙é!</s>", True)]
    assert segments(plain, [], []) == []


@pytest.mark.parametrize(
    "given",
    [
        [QUESTION],
        [QUESTION, ANSWER],
        {"messages": [QUESTION, ANSWER]},
        {"conversations": [{"from": "human", "value": "How are you?"}], "chosen": "x", "rejected": "y"},
        {"instruction": "How are you?", "input": ""},
        {"question": "How are you?", "chosen": "x", "rejected": "y"},
        {"prompt": [QUESTION]},
    ],
)
def test_a_prompt_ends_where_the_answer_begins(chatml, given):
    found = prompt_ids(chatml, given, "Be brief")
    assert chatml.decode(found) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    )
    row = Conversations(chatml, system_prompt="Be brief").encode({"messages": [QUESTION, ANSWER]}, "messages")
    assert row["labels"][: len(found) + 1] == [*[IGNORED] * len(found), row["input_ids"][len(found)]]


@pytest.mark.parametrize("given", [{"prompt": "fine"}, {"text": "<s>fine"}, {"question": "fine"}])
def test_a_prompt_of_text_has_a_beginning_and_no_end(given):
    tokenizer = tokenizer_with(CHATML, before=["<s>"], behind=["</s>"])
    assert tokenizer.decode(prompt_ids(tokenizer, given)) == "<s>fine"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"id": 1}, dialogues.MISSING),
        ([ANSWER], dialogues.ASSISTANT_FIRST),
        ([{"role": "judge", "content": "x"}], dialogues.ROLE_UNKNOWN),
        ({"prompt": " "}, dialogues.EMPTY),
    ],
)
def test_a_prompt_that_cannot_be_used_says_why(chatml, given, reason):
    assert prompt_ids(chatml, given).reason == reason


# --- preferences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "record"),
    [
        ("messages", {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, MORE]}),
        ("messages", {"chosen": json.dumps([QUESTION, ANSWER]), "rejected": json.dumps([QUESTION, MORE])}),
        ("prompt-completion", {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [MORE]}),
        ("prompt-completion", {"prompt": [QUESTION], "chosen": ANSWER["content"], "rejected": MORE["content"]}),
        ("prompt-completion", {"prompt": "How are you?", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, MORE]}),
        ("prompt-completion", {"prompt": "How are you?", "chosen": [ANSWER], "rejected": [MORE]}),
        (
            "conversations",
            {
                "conversations": [{"from": "human", "value": "How are you?"}],
                "chosen": {"from": "gpt", "value": ANSWER["content"]},
                "rejected": json.dumps({"from": "gpt", "value": MORE["content"]}),
            },
        ),
        ("instruction", {"instruction": "How are", "input": "you?", "chosen": ANSWER["content"], "rejected": MORE["content"]}),
        ("instruction", {"question": "How are you?", "chosen": ANSWER["content"], "rejected": MORE["content"]}),
    ],
)
def test_the_formats_of_preferences(chatml, form, record):
    row = Preferences(chatml, system_prompt="Be brief").encode(record, form)
    asked = "How are\n\nyou?" if "input" in record else "How are you?"
    assert [chatml.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == [
        f"<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n",
        "I am fine.<|im_end|>",
        "Still fine, and you?<|im_end|>",
    ]
    assert row["length"] == len(row["prompt_ids"]) + len(row["rejected_ids"])
    assert not row["truncated"]


@pytest.mark.parametrize("template", [LLAMA3, MISTRAL, GEMMA, QWEN3, MARKED_WITHOUT_END])
def test_preferences_share_their_prompt_with_prediction(template):
    tokenizer = tokenizer_with(template)
    row = Preferences(tokenizer).encode({"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [MORE]}, "prompt-completion")
    assert row["prompt_ids"] == prompt_ids(tokenizer, [QUESTION])


def test_preferences_of_plain_text(plain):
    row = Preferences(plain).encode({"prompt": "And yo", "chosen": "u?", "rejected": "!"}, "prompt-completion")
    parts = [plain.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert parts == ["<s>And", " you?</s>", " yo!</s>"]  # what both begin with


def test_long_preferences_keep_their_start(chatml):
    record = {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, MORE]}
    whole = Preferences(chatml).encode(record, "messages")
    prompt = len(whole["prompt_ids"])
    cut = Preferences(chatml, max_length=prompt + 3).encode(record, "messages")
    assert cut["truncated"]
    assert cut["chosen_ids"] == whole["chosen_ids"][:3]
    bad = Preferences(chatml, max_length=prompt).encode(record, "messages")
    assert bad == Bad(reason=preferences.PROMPT_TOO_LONG, detail=f"{prompt} tokens")
    alike = {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, {**ANSWER, "content": "I am fine. And now?"}]}
    assert Preferences(chatml, max_length=prompt + 3).encode(alike, "messages").reason == preferences.SAME


@pytest.mark.parametrize(
    ("form", "record", "reason"),
    [
        ("messages", {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]}, preferences.SAME),
        ("messages", {"chosen": [QUESTION, ANSWER], "rejected": [AGAIN, MORE]}, preferences.TWO_PROMPTS),
        ("messages", {"chosen": TWO_TURNS, "rejected": TWO_TURNS[:2]}, preferences.TWO_PROMPTS),
        ("messages", {"chosen": [ANSWER], "rejected": [MORE]}, preferences.TWO_PROMPTS),
        ("messages", {"chosen": [QUESTION, ANSWER], "rejected": None}, dialogues.MISSING),
        ("prompt-completion", {"prompt": "x", "chosen": "y", "rejected": [QUESTION, ANSWER]}, preferences.TWO_PROMPTS),
        ("prompt-completion", {"prompt": "x", "chosen": "y", "rejected": "y"}, preferences.SAME),
        ("prompt-completion", {"prompt": "x", "chosen": "y", "rejected": " "}, dialogues.EMPTY),
        ("prompt-completion", {"prompt": None, "chosen": "x", "rejected": "y"}, dialogues.MISSING),
        ("prompt-completion", {"prompt": [QUESTION], "chosen": [ANSWER, AGAIN], "rejected": "y"}, conversations.NO_ASSISTANT),
        ("instruction", {"question": None, "chosen": "x", "rejected": "y"}, dialogues.MISSING),
        ("conversations", {"conversations": [{"from": "x"}], "chosen": "x", "rejected": "y"}, dialogues.ROLE_UNKNOWN),
        ("conversations", {"conversations": SHAREGPT[:1], "chosen": "[", "rejected": "y"}, preferences.TWO_PROMPTS),
    ],
)
def test_a_preference_that_cannot_be_used_says_why(chatml, form, record, reason):
    bad = Preferences(chatml).encode(record, form)
    assert isinstance(bad, Bad)
    assert bad.reason == reason
