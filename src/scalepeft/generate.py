"""Answers of a language model: of a batch of prompts, of a file of them, and turn by turn in a conversation.

A row draws its tokens by a generator of its own, seeded by seed and row number, so that a batch decides over nothing but the
rounding of logits: in float32 that changes hardly an answer, in bfloat16 some. The same command gives the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft.console import note, quiet_upstream
from scalepeft.errors import UserError
from scalepeft.fetch import offline_if_unreachable
from scalepeft.recipe import Recipe, Source
from scalepeft.run import Run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from scalepeft.prepared import Chosen, Prepared
    from scalepeft.tables import Bad

NO_ROOM = "prompt leaves no room for an answer"

_ANSWERS = ("output", "completion", "answer", "response", "chosen", "rejected")
"""Columns of answers: what stands in them is no part of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of an answer are chosen, in the words of transformers' GenerationConfig."""

    max_new_tokens: int = 256
    """The longest answer in tokens."""
    temperature: float = 0.0
    """What logits are divided by before a token is drawn; 0 takes the likeliest."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum up to this."""
    seed: int = 42
    """With a row's number, the seed of that row's draws."""

    def __post_init__(self) -> None:
        refused = {
            "max-new-tokens": (self.max_new_tokens < 1, "at least 1"),
            "temperature": (not (0 <= self.temperature < math.inf), "0 (the likeliest token) or more"),
            "top-p": (not 0 < self.top_p <= 1, "above 0 and at most 1"),
            "seed": (self.seed < 0, "0 or more"),
        }
        for name, (wrong, allowed) in refused.items():
            if wrong:
                raise UserError(f"command line: --{name} is {getattr(self, name.replace('-', '_'))}; it is {allowed}")
        if self.top_p < 1 and not self.temperature:
            raise UserError("command line: --top-p has no effect without a --temperature above 0")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote after a prompt."""

    completion: str
    """The text, without special tokens."""
    tokens: int
    """Its tokens, the one that ends it included."""
    finished: bool
    """Whether the model ended it, and not the limit."""


# --- a batch -------------------------------------------------------------------------------------------------------


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, max_new_tokens: int) -> str:
    """The model's likeliest continuation of a prompt's tokens, under the autocast that the caller has chosen."""
    return completions(model, tokenizer, [ids], Sampling(max_new_tokens=max_new_tokens))[0].completion


def completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    rows: Sequence[int] = (0,),
    streamer: Any = None,
) -> list[Completion]:
    """The completions of prompts of any lengths, padded on the left. `rows` are their numbers, which seed the draws."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    width, ends = max(map(len, prompts)), end_tokens(model, tokenizer)
    pads = [width - len(ids) for ids in prompts]
    padded = [[tokenizer.pad_token_id] * pad + list(ids) for pad, ids in zip(pads, prompts, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in pads]
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # Draws leaves one token to choose
        repetition_penalty=1.0,  # some models bring another: likeliest then is not what they find likeliest
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            # virtual tokens come with positions of their own: `_batches` then leaves nothing to pad
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            written = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([Draws(sampling, rows)] if sampling.temperature else []),
                streamer=streamer,
            )
    finally:
        model.train(training)
    return [_completion(tokenizer, ids, ends) for ids in written[:, width:].tolist()]


def _completion(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: Sequence[int]) -> Completion:
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    own = ids if end is None else ids[: end + 1]  # what follows pads the row to the longest of its batch
    text = tokenizer.decode(own, skip_special_tokens=True)
    return Completion(completion=text, tokens=len(own), finished=end is not None)


def precision(recipe: Recipe, trained: Any) -> contextlib.AbstractContextManager[object]:
    """The autocast to write under: the recipe's, unless all weights are float32.

    It would cast each of them anew for every token: 12 times as long for the 134.5 M parameters of SmolLM2 on two CPU cores.
    """
    import torch

    from scalepeft import model

    whole = all(parameter.dtype == torch.float32 for parameter in trained.parameters())
    return contextlib.nullcontext() if whole else model.precision(recipe)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the model's EOS tokens, the tokenizer's, and the one by which the chat template closes a turn."""
    named = model.generation_config.eos_token_id
    found = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id, _turn_end(tokenizer)]
    return sorted({token for token in found if token is not None})


def _turn_end(tokenizer: Any) -> int | None:
    """The special token behind an answer, which a model of this template learns to write there, be it EOS or not."""
    from scalepeft.conversations import Writer
    from scalepeft.dialogues import Refused

    if not tokenizer.chat_template:
        return None
    writer, said = Writer(tokenizer, None), "so be it"
    try:
        text = writer.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": said}], None)
    except Refused:
        return None
    behind = text.partition(said)[2].lstrip()
    closer = max((token for token in writer.closers if behind.startswith(token)), key=len, default=None)
    return None if closer is None else int(tokenizer.convert_tokens_to_ids(closer))


class Draws:
    """A logits processor that leaves each row one token: the one on which the row's own next random number falls."""

    def __init__(self, sampling: Sampling, rows: Sequence[int]) -> None:
        import numpy as np

        generators = [np.random.Generator(np.random.PCG64([sampling.seed, row])) for row in rows]
        self.numbers = np.stack([generator.random(sampling.max_new_tokens) for generator in generators])
        self.sampling, self.step = sampling, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002  # as upstream calls it
        """The logits (rows x vocabulary), -inf for all tokens but the drawn ones."""
        import torch

        logits = scores.double()  # sums over a vocabulary in another order then fall on the same token
        shares = torch.softmax((logits - logits.amax(-1, keepdim=True)) / self.sampling.temperature, dim=-1)
        if self.sampling.top_p < 1:
            ordered, tokens = shares.sort(dim=-1, descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.sampling.top_p
            shares = shares.masked_fill(torch.zeros_like(beyond).scatter(-1, tokens, beyond), 0)
        upto = shares.cumsum(-1)
        numbers = torch.from_numpy(self.numbers[:, self.step, None]).to(upto.device)
        self.step += 1
        drawn = torch.searchsorted(upto, numbers * upto[:, -1:], right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


# --- a file --------------------------------------------------------------------------------------------------------


def complete(run: Run, file: Path, output: Path, sampling: Sampling, *, batch_size: int = 8) -> int:
    """Write the completion of each row of a file as a line of JSON, in the file's order. Returns the number of rows."""
    recipe = run.recipe()
    offline_if_unreachable(recipe)
    quiet_upstream()
    from scalepeft import model

    tokenizer = model.tokenizer_of(run)
    limit = model.longest_input(recipe, tokenizer)
    prepared = _prepared(recipe, tokenizer, file, limit)
    trained, found = model.load(run, folded=True), dict[int, Completion]()
    for places, room in _batches(prepared, recipe, limit, sampling.max_new_tokens, batch_size):
        taken = prepared.rows.select(places)
        how = Sampling(**{**asdict(sampling), "max_new_tokens": room})
        with precision(recipe, trained):
            made = completions(trained, tokenizer, taken["input_ids"][:], how, rows=taken["row"][:])
        found |= zip(places, made, strict=True)
    beside = output.with_name(f"{output.name}.part")
    try:
        with beside.open("w", encoding="utf-8") as stream:
            for place, (row, prompt) in enumerate(zip(prepared.rows["row"], prepared.rows["prompt"], strict=True)):
                line = {"row": row, "prompt": json.loads(prompt), **asdict(found[place])}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        beside.replace(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    return len(prepared.rows)


def _batches(prepared: Prepared, recipe: Recipe, limit: int, longest: int, batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Rows to complete together, the longest prompts first, and the tokens that each of them may still be given.

    Those whose window ends earlier are not put among others, which would go on beyond it.
    """
    from scalepeft.sampler import epoch_order

    lengths = prepared.lengths
    alike = bool((recipe.adapter or {}).get("num_virtual_tokens"))  # peft then numbers padding as positions, too

    def kind(place: int) -> tuple[int, int]:
        length = int(lengths[place])
        return min(longest, limit - length), length if alike else 0

    order = epoch_order(lengths, seed=0, epoch=0, strategy="longest_first").tolist()
    for (room, _), places in groupby(order, key=kind):
        together = list(places)
        for start in range(0, len(together), batch_size):
            yield together[start : start + batch_size], room


def _prepared(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, file: Path, limit: int) -> Prepared:
    """The prompts of a file, by the columns that the recipe names or any format knows."""
    from scalepeft import labels
    from scalepeft.dialogues import COLUMNS
    from scalepeft.prepared import Part, Preparation
    from scalepeft.sources import open_source
    from scalepeft.tables import Records

    source, train = Source(path=str(file)), recipe.data.train
    renamed = {**recipe.data.columns, **(train.columns if isinstance(train, Source) else {})}

    def fail(_: str, problem: str) -> UserError:
        return UserError(problem if source.path in problem else f"{source.path}: {problem}")

    wanted = Records(fail=fail, names={name: renamed.get(name, name) for name in COLUMNS})
    part = Part(source=source, wanted=wanted, opened=open_source(source, wanted))
    prepared, _ = Preparation(recipe, _Prompts(recipe, tokenizer, limit))(source.path, [part], labels.NoLabels())
    return prepared


class _Prompts:
    """The encoder of what is asked, whatever is answered in the file."""

    threads = 1

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
        self.tokenizer, self.limit, self.system_prompt = tokenizer, limit, recipe.data.system_prompt

    @property
    def identity(self) -> Any:
        from scalepeft.conversations import Writer
        from scalepeft.prepared import tokenizer_digest

        return ["prompts", tokenizer_digest(self.tokenizer), Writer(self.tokenizer, self.system_prompt).identity, self.limit]

    @property
    def features(self) -> Mapping[str, Any]:
        import datasets

        text, number = datasets.Value("large_string"), datasets.Value("int32")
        return {"input_ids": datasets.List(number), "prompt": text, "length": number}

    def encode(self, rows: Mapping[str, list[Any]], source: Chosen) -> tuple[dict[str, list[Any]], list[Bad | None]]:
        from scalepeft.prepared import kept
        from scalepeft.tables import Bad

        asked = [name for name in source.table.columns if name not in _ANSWERS]
        columns: dict[str, list[Any]] = {"input_ids": [], "prompt": [], "length": []}
        problems: list[Bad | None] = []
        for record in map(json.loads, rows["0"]):
            ids = self._ids(record)
            problems.append(ids if isinstance(ids, Bad) else None)
            prompt = record.get(asked[0]) if len(asked) == 1 else {name: record.get(name) for name in asked}
            columns["prompt"].append(json.dumps(prompt, ensure_ascii=False))
            columns["input_ids"].append(ids)
            columns["length"].append(0 if isinstance(ids, Bad) else len(ids))
        return kept(columns, problems), problems

    def _ids(self, record: Mapping[str, Any]) -> list[int] | Bad:
        from scalepeft.conversations import prompt_ids
        from scalepeft.tables import Bad

        ids = prompt_ids(self.tokenizer, record, self.system_prompt)
        if isinstance(ids, Bad) or len(ids) < self.limit:
            return ids
        return Bad(reason=NO_ROOM, detail=f"{len(ids):,} tokens of the model's {self.limit:,}")


# --- a conversation ------------------------------------------------------------------------------------------------


class Chat:
    """A conversation with the model of a run: what was said so far, and how the next answer is written."""

    def __init__(self, run: Run, sampling: Sampling, *, system_prompt: str | None = None) -> None:
        self.recipe, self.sampling = run.recipe(), sampling
        offline_if_unreachable(self.recipe)
        quiet_upstream()
        from scalepeft import model

        self.system_prompt = self.recipe.data.system_prompt if system_prompt is None else system_prompt
        self.tokenizer = model.tokenizer_of(run)
        if not self.tokenizer.chat_template:
            told = "the tokenizer has no chat template, without which there are no turns; `scalepeft predict` completes texts"
            raise UserError(f"{run.path}: {told}")
        self.limit = model.longest_input(self.recipe, self.tokenizer)
        self.model = model.load(run, folded=True)
        self.messages: list[dict[str, str]] = []
        self.answered = 0

    def reset(self) -> None:
        """Forget what was said."""
        self.messages, self.answered = [], 0

    def say(self, text: str) -> str:
        """The answer to a turn, written on stdout as it comes; empty when the turn cannot be answered. Ctrl-C ends it."""
        asked = {"role": "user", "content": text}
        ids = self._prompt(asked)
        if ids is None:
            return ""
        room = min(self.sampling.max_new_tokens, self.limit - len(ids))
        how = Sampling(**{**asdict(self.sampling), "max_new_tokens": room})
        streamer = _streamer(self.tokenizer)
        finished = True
        try:
            with precision(self.recipe, self.model):
                found = completions(self.model, self.tokenizer, [ids], how, rows=[self.answered], streamer=streamer)
            finished = found[0].finished
        except KeyboardInterrupt:
            streamer.end()
        self.answered += 1
        if not finished:
            note(f"(stopped at {room:,} tokens)")
        said = "".join(streamer.said)
        if said.strip():  # a template has no place for an empty turn
            self.messages = [*self.messages, asked, {"role": "assistant", "content": said}]
        else:
            note("(no answer; the question is forgotten)")
        return said

    def _prompt(self, asked: dict[str, str]) -> list[int] | None:
        """The tokens of the conversation so far, without its oldest turns where the window has no room for them."""
        from scalepeft.conversations import prompt_ids
        from scalepeft.tables import Bad

        forgotten = 0
        while True:
            ids = prompt_ids(self.tokenizer, [*self.messages, asked], self.system_prompt)
            if isinstance(ids, Bad):
                note(str(ids))
                return None
            if len(ids) + self.sampling.max_new_tokens <= self.limit or not self.messages:
                break
            self.messages = self.messages[2:]
            forgotten += 1
        if forgotten:
            note(f"(the oldest {forgotten} turns are forgotten: the model's window has {self.limit:,} tokens)")
        if len(ids) >= self.limit:
            note(f"{NO_ROOM} ({len(ids):,} tokens of the model's {self.limit:,})")
            return None
        return ids


def _streamer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A TextStreamer that also keeps what it prints."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.said: list[str] = []

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.said.append(text)
            super().on_finalized_text(text, stream_end=stream_end)

    return Streamer()
