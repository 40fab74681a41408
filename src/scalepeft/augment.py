"""Synonym replacement: copies of training texts in which some words are replaced by synonyms of WordNet.

The method is EDA's (Wei and Zou 2019, arXiv:1901.11196). EDA takes any lemma of any synset of a word, and most of these do
not fit where the word stands. Here fewer words are replaced, each by one that mostly does:

- A word is looked up as it stands, and left alone when it may be an inflected form of another (made, helps, better). What
  replaces it is a base form too, so tense and degree stay as they were. Of inflected forms only the regular plurals of nouns
  are replaced, by regular plurals.
- Of its senses those count that WordNet's tagged corpora hold. It has the first, the most frequent one, and is left alone
  when there are more than two.
- Its part of speech is the one with twice as many senses as all others together. Where it could be a verb, the word before
  decides: after `to`, `will`, `we`, ... stands a verb, after `the`, `of`, `his`, ... none, and elsewhere it is left alone.
- A synonym is a lemma of that synset that has it as its own most frequent sense, in its own prevailing part of speech. That
  of a verb stands in every sentence frame that the verb stands in; that of a word after `a` or `an` leaves the article right.
  Lemmas of two words replace nouns and verbs only; longer ones, names and abbreviations replace nothing.
- Stop words, negations, numbers, names (capitals, unless at a sentence's start and no noun), addresses, hashtags and words
  of one or two letters are left alone, as is every character between words.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from scalepeft.errors import UserError
from scalepeft.fetch import file_sha256
from scalepeft.recipe import Recipe

FORMAT = 1
"""Part of the key of augmented rows: to be raised when a change of this module gives other copies."""

PARTS = ("noun", "verb", "adj", "adv")
"""The parts of speech, as WordNet's files are named."""

FILES = [f"{kind}.{part}" for part in PARTS for kind in ("data", "index")]
"""The files that a folder of WordNet must have. Its lists of irregular forms (verb.exc, ...) are read where they are."""

FOLDERS = ("/usr/share/wordnet", "/usr/local/share/wordnet", "/usr/local/WordNet-3.0/dict", "~/nltk_data/corpora/wordnet")
"""Where WordNet usually lies: of Debian's wordnet-base, of its own installer, of NLTK's downloader."""

MOST_SENSES = 2
"""A word of more tagged senses is left alone: which of them it has cannot be told."""

_BEFORE_VERBS = """
to will would can could may might must shall should do does did don't doesn't didn't won't wouldn't can't cannot couldn't
shouldn't mustn't i you we they let's
"""
_BEFORE_OTHERS = "a an the my your his its our their every each another such of in on at by for with from into about"
_OTHERS = """
he she it me him her us them mine yours hers ours theirs myself yourself himself herself itself ourselves themselves this that
these those what which who whom whose whoever whatever where when why how and or but if because while until unless although
though since so as than before after above below between among through during within under against over again further then once
up down out off only own same too very just even still also ever here there now all both few more most much many any some other
others else next last several certain one two three four five six seven eight nine ten eleven twelve hundred thousand million
first second third is am are was were be been being have has had having doing done get got go goes going gone not no never n't
nor neither either none nobody nothing nowhere without hardly scarcely barely rarely seldom isn't aren't wasn't weren't hasn't
haven't hadn't ain't like well less least rather quite almost perhaps maybe enough upon toward towards onto per via around along
across behind beyond despite except whether ought need dare let whole half lot lots bit way instead plenty sort kind ahead thing
someone anyone everyone somebody anybody everybody something anything everything
"""
VERB_NEXT = frozenset(_BEFORE_VERBS.split())
"""Words that the base form of a verb follows."""
NO_VERB_NEXT = frozenset(_BEFORE_OTHERS.split())
"""Words that no base form of a verb follows."""
STOP_WORDS = VERB_NEXT | NO_VERB_NEXT | frozenset(_OTHERS.split())
"""Words that are never replaced, nor replace others: they carry the grammar, negations and quantities of a sentence."""

_CHUNK = re.compile(r"\S+")
_WORD = re.compile(r"""[("'“\u2018*\[{—\u2013-]*([^\W\d_]+(?:['\u2019-][^\W\d_]+)*)[^\w\s@#/\\<>=&$%+^~|]*""")
_ONE_WORD, _TWO_WORDS = re.compile(r"[a-z][a-z-]+[a-z]"), re.compile(r"[a-z][a-z-]+[a-z](?: [a-z]+)?")
_SYNONYM = {"noun": _TWO_WORDS, "verb": _TWO_WORDS, "adj": _ONE_WORD, "adv": _ONE_WORD}
_AFTER = {"a": re.compile(r"(?!u|h)[^aeio]"), "an": re.compile(r"(?!eu|one)[aeio]")}
"""How a synonym may begin after an article. What is said one way or the other (u-, h-) is left out."""

_SENTENCE_END = re.compile(r"""[.!?:…]["'”\u2019)\]}*]*$""")
_ENDINGS = {  # WordNet's own rules of detachment
    "noun": (("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("ies", "y"), ("men", "man")),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}


def _prevailing(senses: dict[str, int]) -> str | None:
    """The part of speech with at least twice as many tagged senses as all others together."""
    most = max(senses, key=lambda part: senses[part], default=None)
    return most if most and 3 * senses[most] >= 2 * sum(senses.values()) else None


def find(recipe: Recipe) -> WordNet:
    """The WordNet that a recipe names, or that the environment or a usual folder holds."""
    given = recipe.data.augmentation.wordnet if recipe.data.augmentation else None
    home = os.environ.get("WNHOME")
    named = [given] if given else [os.environ.get("WNSEARCHDIR"), home and f"{home}/dict", *FOLDERS]
    folders = [Path(folder).expanduser() for folder in named if folder]
    for folder in folders:
        if all((folder / file).is_file() for file in FILES):
            return WordNet(folder)
    searched = ", ".join(map(str, folders))
    if given:
        lacking = ", ".join(file for file in FILES if not (folders[0] / file).is_file())
        raise recipe.error("data.augmentation.wordnet", f"{searched} is no folder of WordNet 3.x: it has no {lacking}")
    told = "install it (Debian, Ubuntu: apt install wordnet-base), or name a folder with its data.noun, index.noun, ..."
    raise recipe.error("data.augmentation", f"WordNet is in none of {searched}; {told} in data.augmentation.wordnet")


class WordNet:
    """The synonyms in a folder of WordNet's data.* and index.* files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._remembered: dict[tuple[str, str], tuple[str, ...]] = {}

    @cached_property
    def version(self) -> str:
        """The name and number in the files' head, and a sha256 of all that is read."""
        digest = hashlib.sha256()
        for file in [*(self.folder / name for name in FILES), *self._exceptions]:
            with file.open("rb") as stream:
                digest.update(f"{file.name} {file_sha256(stream)}\n".encode())
        with (self.folder / FILES[0]).open("rb") as stream:
            named = re.search(rb"WordNet \d+(\.\d+)*", stream.read(2_000))
        return f"{named[0].decode() if named else 'WordNet'}, sha256 {digest.hexdigest()}"

    def synonyms(self, word: str, context: str = "") -> tuple[str, ...]:
        """What may replace a word in lower case. `context` is "verb" where a verb must stand, "no verb" where none can."""
        key = (word, context)
        if key in self._remembered:
            return self._remembered[key]
        if word in self._known:
            part = self._part(word, context)
            self._remembered[key] = self._of_first_sense(word, part) if part else ()
        elif singular := self._singular(word):
            self._remembered[key] = self._plurals(singular, context)
        return self._remembered.get(key, ())

    def is_noun(self, word: str) -> bool:
        """Whether a word in lower case is, among others, a noun."""
        return word in self._lemmas["noun"] or self._singular(word) is not None

    def _singular(self, word: str) -> str | None:
        """The noun that a word is the regular plural of, if it is no lemma itself."""
        if not word.endswith("s") or word.endswith("ss") or any(word in lemmas for lemmas in self._lemmas.values()):
            return None
        known = (word[: len(word) - len(ending)] + instead for ending, instead in _ENDINGS["noun"] if word.endswith(ending))
        return next((noun for noun in known if noun in self._lemmas["noun"] and _plural(noun) == word), None)

    def _plurals(self, noun: str, context: str) -> tuple[str, ...]:
        verb = noun in self._lemmas["verb"] and context != "no verb"
        if verb or noun in STOP_WORDS or self._lemmas["noun"][noun][0] > MOST_SENSES:
            return ()
        synonyms = [s for s in self._of_first_sense(noun, "noun") if s.rpartition(" ")[2] not in self._irregular_nouns]
        return tuple(plural for plural in map(_plural, synonyms) if plural)

    def _part(self, word: str, context: str) -> str | None:
        """The part of speech that a word has where it stands."""
        senses = self._senses(word)
        if context == "no verb":
            senses.pop("verb", None)
        most = _prevailing(senses)
        if most is None or senses[most] > MOST_SENSES or any(self._inflected(word, part) for part in PARTS):
            return None
        return most if "verb" not in senses or (most, context) == ("verb", "verb") else None

    def _senses(self, lemma: str) -> dict[str, int]:
        return {part: lemmas[lemma][0] for part, lemmas in self._lemmas.items() if lemma in lemmas}

    def _inflected(self, word: str, part: str) -> bool:
        lemmas = self._lemmas[part]
        return word in self._irregular or any(
            word.endswith(ending) and word[: len(word) - len(ending)] + instead in lemmas for ending, instead in _ENDINGS[part]
        )

    def _of_first_sense(self, word: str, part: str) -> tuple[str, ...]:
        offset = self._lemmas[part][word][1]
        frames = self._synset(part, offset)
        if word not in frames:  # China, as china
            return ()
        return tuple(lemma for lemma, its in frames.items() if its >= frames[word] and self._fits(lemma, word, part, offset))

    def _fits(self, lemma: str, word: str, part: str, offset: int) -> bool:
        joined = lemma.replace(" ", "_")
        return (
            lemma != word
            and _SYNONYM[part].fullmatch(lemma) is not None
            and lemma not in STOP_WORDS
            and self._lemmas[part].get(joined, (0, 0))[1] == offset
            and _prevailing(self._senses(joined)) == part
            and not (part == "noun" and (self._inflected(lemma, "noun") or self._inflected(lemma, "verb")))
        )

    def _synset(self, part: str, offset: int) -> dict[str, set[str]]:
        """The lemmas of a synset, each with the sentence frames it stands in, which only verbs have."""
        file = self.folder / f"data.{part}"
        with file.open("rb") as stream:
            stream.seek(offset)
            fields = stream.readline().partition(b"|")[0].decode("utf-8", "replace").split()
        try:
            return _frames(fields, offset)
        except (ValueError, IndexError):
            told = f"there is no synset at byte {offset}: the file is damaged, or belongs to another index"
            raise UserError(f"{file}: {told}") from None

    @cached_property
    def _lemmas(self) -> dict[str, dict[str, tuple[int, int]]]:
        """By part of speech and lemma: the number of tagged senses, and where the synset of the most frequent stands."""
        return {part: dict(self._indexed(part)) for part in PARTS}

    @cached_property
    def _irregular_nouns(self) -> frozenset[str]:
        lines = [file.read_text("utf-8", "replace").splitlines() for file in self._exceptions if file.name == "noun.exc"]
        return frozenset(base for line in chain(*lines) for base in line.split()[1:])

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset().union(*self._lemmas.values()) - STOP_WORDS - self._irregular

    def _indexed(self, part: str) -> Iterator[tuple[str, tuple[int, int]]]:
        file = self.folder / f"index.{part}"
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.startswith(b" "):  # the licence
                    continue
                try:
                    fields = line.decode().split()
                    pointers = int(fields[3])
                    tagged, first = int(fields[5 + pointers]), int(fields[6 + pointers])
                except (ValueError, IndexError):
                    raise UserError(f"{file}:{number}: not a line of WordNet's index") from None
                if tagged:  # 24,000 lemmas of 155,000
                    yield fields[0], (tagged, first)

    @property
    def _exceptions(self) -> list[Path]:
        return [file for part in PARTS if (file := self.folder / f"{part}.exc").is_file()]

    @cached_property
    def _irregular(self) -> frozenset[str]:
        """The forms that WordNet's lists of exceptions lead back to another word."""
        lines = [line.split() for file in self._exceptions for line in file.read_text("utf-8", "replace").splitlines()]
        return frozenset(form for form, *bases in lines if form not in bases)


def _plural(noun: str) -> str | None:
    """The regular plural of a noun; None where the rule is not sure."""
    if noun.endswith(("o", "f", "fe", "man", "ics", "is", "us")):
        return None
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "z", "ch", "sh")) else f"{noun}s"


def _frames(fields: list[str], offset: int) -> dict[str, set[str]]:
    """The lemmas of a synset's line, with their sentence frames."""
    if int(fields[0]) != offset:
        raise ValueError(offset)
    count = int(fields[3], 16)
    lemmas = [lemma.replace("_", " ") for lemma in fields[4 : 4 + 2 * count : 2]]
    pointers = 4 + 2 * count
    rest = fields[pointers + 1 + 4 * int(fields[pointers]) + 1 :]  # after the number of frames, for each: + frame lemma
    frames: dict[str, set[str]] = {lemma: set() for lemma in lemmas}
    for frame, of in zip(rest[1::3], rest[2::3], strict=True):
        for lemma in [lemmas[int(of, 16) - 1]] if int(of, 16) else lemmas:
            frames[lemma].add(frame)
    return frames


def augmenter(recipe: Recipe) -> Augmenter | None:
    """What makes the copies that a recipe asks for."""
    if recipe.data.augmentation is None:
        return None
    asked = recipe.data.augmentation
    return Augmenter(
        wordnet=find(recipe), share=asked.share, copies=asked.copies, seed=asked.seed, keep_unchanged=asked.keep_unchanged
    )


@dataclass(frozen=True, kw_only=True)
class Augmenter:
    """Makes the copies of rows."""

    wordnet: WordNet
    share: float
    copies: int
    seed: int
    keep_unchanged: bool = False

    @property
    def identity(self) -> list[Any]:
        """The same for augmenters that make the same copies."""
        return [FORMAT, self.wordnet.version, self.share, self.copies, self.seed, self.keep_unchanged]

    def copies_of(self, texts: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The copies of a row's texts: those that differ from it and from one another, or all with keep_unchanged."""
        copies = [tuple(self.augmented(text, number) for text in texts) for number in range(self.copies)]
        if self.keep_unchanged:
            return copies
        return [copy for copy in dict.fromkeys(copies) if copy != texts]

    def augmented(self, text: str, number: int) -> str:
        """A text's copy of some number, from text, number and seed alone: the text itself where nothing can be replaced."""
        words, places = self._places(text)
        if not places:
            return text
        draw = Random(f"{self.seed} {number} {text}").random  # noqa: S311  # rows, no secrets
        drawn = sorted(places, key=lambda _: draw())[: max(1, int(self.share * words + 1e-9))]
        pieces, end = list[str](), 0
        for start, word, synonyms in sorted(drawn):
            synonym = synonyms[int(draw() * len(synonyms))]
            pieces += text[end:start], synonym[0].upper() + synonym[1:] if word[0].isupper() else synonym
            end = start + len(word)
        return "".join([*pieces, text[end:]])

    def _places(self, text: str) -> tuple[int, list[tuple[int, str, tuple[str, ...]]]]:
        """The number of words, and where which word has which synonyms."""
        words, before, begins = 0, "", True
        places = []
        for found in _CHUNK.finditer(text):
            chunk = _chunk(found[0])
            words += chunk.counts
            if chunk.word:
                synonyms = self._synonyms(chunk.word, "" if chunk.start else before, begins=begins)
                if synonyms:
                    places.append((found.start() + chunk.start, chunk.word, synonyms))
            if chunk.counts or chunk.ends_sentence:
                begins = chunk.ends_sentence
            before = "" if chunk.ends_clause else chunk.word.lower()
        return words, places

    def _synonyms(self, word: str, before: str, *, begins: bool) -> tuple[str, ...]:
        lower = word.lower()
        if len(word) < 3 or not (word == lower or (begins and word[1:] == lower[1:])):
            return ()
        if word != lower and self.wordnet.is_noun(lower):  # it may be a name
            return ()
        context = "verb" if before in VERB_NEXT else "no verb" if before in NO_VERB_NEXT else ""
        synonyms = self.wordnet.synonyms(lower, context)
        if before in ("a", "an"):
            return tuple(s for s in synonyms if _AFTER[before].match(s))
        return synonyms


@dataclass(frozen=True)
class _Chunk:
    """What stands between two spaces."""

    word: str
    """The one word in it, if it is one with nothing but punctuation around it."""
    start: int
    counts: bool
    """Whether it counts as a word, replaceable or not."""
    ends_sentence: bool
    ends_clause: bool
    """Whether the next word is read without regard to this one."""


@lru_cache(maxsize=50_000)
def _chunk(text: str) -> _Chunk:
    found = _WORD.fullmatch(text)
    return _Chunk(
        word=found[1] if found else "",
        start=found.start(1) if found else 0,
        counts=any(map(str.isalnum, text)),
        ends_sentence=bool(_SENTENCE_END.search(text)),
        ends_clause=not found or found.end(1) < len(text),
    )
