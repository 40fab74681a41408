"""Claims about synonym replacement."""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from scalepeft import augment, data, prepared, recipe
from scalepeft.augment import Augmenter, WordNet
from scalepeft.errors import UserError

# Synsets in the order of each lemma's frequency. A lemma with ? was not met in the tagged corpora in that sense; a verb's
# sentence frames stand after it.
SYNSETS = {
    "noun": [
        "movie film motion_picture flick?", "film plastic_film", "help assistance", "start beginning", "car automobile",
        "effort attempt", "idea thought", "China", "apple Malus", "star sun", "star lead", "star principal",
        "number figure", "film_maker producer", "hour 60_minutes", "tale story", "story floor", "laughter laugh", "person one",
    ],
    "verb": [
        "help,8,9 assist,8,9", "help,8 aid,8", "start,1,8 begin,1,8 commence,1", "recommend,8,26 commend,8 praise,8,26",
        "laugh,2 chuckle,2", "laugh,8 mock,8", "film,8 shoot,8", "film,8 record,8",
    ],
    "adj": ["big large", "slow unhurried", "slow dull", "glad happy(p) cheerful", "dim faint"],
    "adv": ["quickly rapidly", "slowly slow", "never ne'er", "quietly softly"],
}  # fmt: skip


def write_wordnet(folder: Path, licence: str = "WordNet 3.0 Copyright") -> Path:
    """WordNet's own files with a few synsets: data.* with the byte offsets that index.* tells, and a list of exceptions."""
    folder.mkdir(exist_ok=True)
    for part, synsets in SYNSETS.items():
        head = f"  1 {licence} 2006 by Princeton University.  \n"
        lines, senses = [head], {}
        for synset in synsets:
            offset = sum(map(len, lines))
            words = [word.split(",") for word in synset.split()]
            for word, *_ in words:
                tagged, lemma = not word.endswith("?"), re.sub(r"\(.*|\?", "", word).lower()
                senses.setdefault(lemma, []).append((tagged, offset))
            frames = [f"+ {int(f):02} {n:02x}" for n, (_, *numbers) in enumerate(words, 1) for f in numbers]
            text = " ".join(f"{word.rstrip('?')} 0" for word, *_ in words)
            ends = f" {len(frames):02} {' '.join(frames)}" if part == "verb" else ""
            lines.append(
                f"{offset:08} 03 {part[0]} {len(words):02x} {text} 001 @ 00000001 n 0000{ends} | a gloss; 'an example'  \n"
            )
        (folder / f"data.{part}").write_text("".join(lines))
        entries = [
            f"{lemma} {part[0]} {len(found)} 2 @ ~ {len(found)} {sum(tagged for tagged, _ in found)}"
            f" {' '.join(f'{offset:08}' for _, offset in sorted(found, key=lambda s: not s[0]))}  \n"
            for lemma, found in sorted(senses.items())
        ]
        (folder / f"index.{part}").write_text("".join([head, *entries]))
    (folder / "verb.exc").write_text("shot shoot\nbegan begin\n")
    return folder


@pytest.fixture(scope="session")
def wordnet(tmp_path_factory) -> WordNet:
    return WordNet(write_wordnet(tmp_path_factory.mktemp("wordnet")))


@pytest.fixture(scope="session")
def real() -> WordNet:
    folder = next((Path(f).expanduser() for f in augment.FOLDERS if (Path(f).expanduser() / "data.noun").is_file()), None)
    if not folder:
        pytest.skip(f"WordNet is in none of {', '.join(augment.FOLDERS)}; apt install wordnet-base brings it")
    return WordNet(folder)


def every(wordnet: WordNet, text: str, **changes) -> str:
    """The text with each word replaced that can be."""
    return Augmenter(**({"wordnet": wordnet, "share": 1.0, "copies": 1, "seed": 1} | changes)).augmented(text, 0)


# --- which words, by which synonyms --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "replaced"),
    [
        ("he moved quickly", "he moved rapidly"),
        ("a big tree, the apple", "a large tree, the apple"),
        ("we help them", "we assist them"),
        ("the help came", "the assistance came"),
        ("films help people", "films help people"),
        ("they recommend it", "they praise it"),
        ("you start it", "you start it"),
        ("my start", "my beginning"),
        ("the star", "the star"),
        ("the floor", "the floor"),
        ("two cars and stories, ideas", "two automobiles and tales, thoughts"),
        ("stars, hours, he helps, my helps", "stars, hours, he helps, my assistances"),
        ("the laughter", "the laughter"),
        ("one person", "one person"),
        ("slowly", "slowly"),
        ("glad to", "cheerful to"),
        ("in china", "in china"),
        ("the hour", "the hour"),
        ("an effort, a car", "an attempt, a car"),
        ("an idea; the car", "an idea; the automobile"),
    ],
)
def test_a_synonym_keeps_part_of_speech_and_sense(wordnet, text, replaced):
    """In order: the first sense; two parts of speech, by the word before; a verb's frames; a noun and a verb of equal rank;
    too many senses; not the synonym's first sense; regular plurals; a synonym that is mostly something else; stop words;
    positions and names; numbers; articles.
    """
    assert every(wordnet, text) == replaced


@pytest.mark.parametrize(
    "text",
    [
        "never not no nor without n't isn't hardly",
        "2024 60 3.5% 1st one two hundred",
        "he saw Film and BIG and Quickly iPhone",
        "films helped bigger film's shot began helps starting quicker",
        "#film @film big@film.com http://big.com/film film/big big_film <big> film.big",
        "",
        " \t ",
        "日本語 каждый",
    ],
)
def test_what_is_left_alone(wordnet, text):
    assert every(wordnet, text) == text


def test_capitals_spaces_and_punctuation_stay(wordnet):
    text = "  Big films.\tQuickly, he   said:  'Big'\r\n(the film-maker) -- quickly!!  The Film? Big...\n“big”; big's\u00a0big "
    replaced = text
    for word, synonym in (("big", "large"), ("Big", "Large"), ("quickly", "rapidly"), ("Quickly", "Rapidly")):
        replaced = re.sub(rf"\b{word}\b(?!'s)", synonym, replaced)
    assert every(wordnet, text) == replaced


def test_lemmas_of_two_words_become_words(wordnet):
    assert wordnet.synonyms("movie", "no verb") == ("motion picture",), "film is a verb as often as a noun here"
    assert every(wordnet, "the movie") == "the motion picture"


def test_a_share_of_the_words_is_replaced_and_at_least_one(wordnet):
    text = "big " * 20 + "tree " * 20
    for share, expected in ((0.01, 1), (0.1, 4), (0.25, 10), (0.49, 19), (1.0, 20)):
        assert Counter(every(wordnet, text, share=share).split())["large"] == expected


def test_a_copy_depends_on_text_number_and_seed_alone(wordnet):
    text = "big dim " * 10
    first = every(wordnet, text, share=0.3)
    assert first == every(WordNet(wordnet.folder), text, share=0.3)
    others = Augmenter(wordnet=wordnet, share=0.3, copies=3, seed=1).copies_of((text,))
    assert len(others) == 3
    assert others[0] == (first,)
    assert every(wordnet, text, share=0.3, seed=2) not in {t for (t,) in others}
    code = (
        "import sys, pathlib; from scalepeft.augment import *\n"
        "wordnet = WordNet(pathlib.Path(sys.argv[1]))\n"
        "print(Augmenter(wordnet=wordnet, share=0.3, copies=1, seed=1).augmented(sys.argv[2], 0))"
    )
    for seed in "12":
        command = [sys.executable, "-c", code, str(wordnet.folder), text]
        done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True, check=True)
        assert done.stdout == first + "\n"


def test_copies_that_do_not_differ_are_left_out(wordnet):
    both = Augmenter(wordnet=wordnet, share=1, copies=3, seed=1)
    assert both.copies_of(("nothing",)) == []
    assert both.copies_of(("quickly", "nothing")) == [("rapidly", "nothing")]


# --- finding WordNet -----------------------------------------------------------------------------------------------


def test_unchanged_copies_are_kept_on_request(wordnet):
    kept = Augmenter(wordnet=wordnet, share=1.0, copies=2, seed=1, keep_unchanged=True)
    assert kept.copies_of(("nothing",)) == [("nothing",), ("nothing",)]
    assert kept.copies_of(("quickly",)) == [("rapidly",), ("rapidly",)]
    assert kept.identity != Augmenter(wordnet=wordnet, share=1.0, copies=2, seed=1).identity


@pytest.fixture
def nowhere(monkeypatch, tmp_path) -> Path:
    """No WordNet in the usual places, which are this folder's."""
    monkeypatch.setattr(augment, "FOLDERS", (str(tmp_path / "usual"),))
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.delenv("WNHOME", raising=False)
    return tmp_path


def test_where_wordnet_is_looked_for(nowhere, monkeypatch):
    loaded = recipe.load("quickstart", ["data.augmentation={}"])
    with pytest.raises(UserError, match=r"^.*: data\.augmentation: WordNet is in none of .*usual; install it") as e:
        augment.find(loaded)
    assert "apt install wordnet-base" in str(e.value)
    assert len(e.value.problems) == 1
    for name in ("usual", "home/dict", "searched", "given"):
        (nowhere / name).parent.mkdir(exist_ok=True)
        write_wordnet(nowhere / name)
    assert augment.find(loaded).folder == nowhere / "usual"
    monkeypatch.setenv("WNHOME", str(nowhere / "home"))
    assert augment.find(loaded).folder == nowhere / "home" / "dict"
    monkeypatch.setenv("WNSEARCHDIR", str(nowhere / "searched"))
    assert augment.find(loaded).folder == nowhere / "searched"
    named = recipe.load("quickstart", [f"data.augmentation.wordnet={nowhere / 'given'}"])
    assert augment.find(named).folder == nowhere / "given"
    (nowhere / "given" / "index.adv").unlink()
    with pytest.raises(
        UserError, match=r"data\.augmentation\.wordnet: .*given is no folder of WordNet 3\.x: it has no index\.adv$"
    ):
        augment.find(named)


def test_the_version_follows_the_content(tmp_path):
    first, same, other = (write_wordnet(tmp_path / name) for name in "abc")
    with (other / "verb.exc").open("a") as stream:
        stream.write("went go\n")
    assert re.fullmatch(r"WordNet 3\.0, sha256 [0-9a-f]{64}", WordNet(first).version)
    assert WordNet(first).version == WordNet(same).version != WordNet(other).version
    assert WordNet(write_wordnet(tmp_path / "d", "Copyright")).version.startswith("WordNet, sha256 ")


def test_damaged_files_are_named(tmp_path):
    folder = write_wordnet(tmp_path / "w")
    shifted = folder / "data.adj"
    shifted.write_text(" \n" + shifted.read_text())
    with pytest.raises(UserError, match=r"data\.adj: there is no synset at byte \d+: the file is damaged, or belongs to"):
        every(WordNet(folder), "big")
    (folder / "index.adv").write_text("  1 licence\nquickly r x\n")
    with pytest.raises(UserError, match=r"index\.adv:2: not a line of WordNet's index"):
        every(WordNet(folder), "big")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("share=0", "data.augmentation.share must be above 0 and at most 1"),
        ("share=1.5", "data.augmentation.share must be above 0 and at most 1"),
        ("share=.nan", "data.augmentation.share must be above 0 and at most 1"),
        ("share=ten", "data.augmentation.share is 'ten' (str); it takes float"),
        ("copies=0", "data.augmentation.copies must be at least 1"),
        ("copies=1.5", "data.augmentation.copies is 1.5 (float); it takes int"),
        ("sharr=0.1", "data.augmentation (Augmentation) has no 'sharr'; did you mean 'share'?"),
    ],
)
def test_the_recipe_is_checked(override, problem):
    with pytest.raises(UserError) as caught:
        recipe.load("quickstart", [f"data.augmentation.{override}"])
    assert str(caught.value).endswith(problem)


def test_the_recipes_defaults():
    assert recipe.load("quickstart").data.augmentation is None
    assert recipe.load("quickstart", ["data.augmentation={}"]).data.augmentation == recipe.Augmentation()
    assert recipe.load("quickstart", ["data.augmentation={share: 1}"]).data.augmentation.share == 1


# --- the rows ------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepare(tmp_path, tiny_tokenizer, wordnet, monkeypatch):
    """Prepare rows of a csv file, augmented as given."""
    monkeypatch.setenv("SCALEPEFT_CACHE", str(tmp_path / "cache"))

    def source(rows):
        header = ("text", "other", "label") if len(rows[0]) == 3 else ("text", "label")
        file = tmp_path / f"{len(list(tmp_path.glob('*.csv')))}.csv"
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])
        return {"path": str(file)}

    def prepare(rows, augmentation=None, *, tokenizer=tiny_tokenizer, need_train=True, evaluation=(), **section):
        if augmentation is not None:
            section["augmentation"] = {"wordnet": str(wordnet.folder)} | augmentation
        section["train"] = [source(part) for part in rows] if isinstance(rows[0], list) else source(rows)
        section["evaluation"] = {"e": source(evaluation)} if evaluation else {}
        values = {"task": "sequence-classification", "model": {"name_or_path": "m"}, "data": section}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
        return data.prepare(recipe.load(tmp_path / "r.yaml"), tokenizer, limit=32, need_train=need_train)

    return prepare


ROWS = [("a big film", "pos"), ("bad plot", "neg"), ("good, quickly", "pos"), ("the end is dim", "neg")]


def test_copies_stand_beside_their_originals(prepare, tiny_tokenizer, wordnet):
    corpus = prepare(ROWS, {"share": 1.0, "copies": 2})
    texts = [*(text for text, _ in ROWS), "a large film", "good, rapidly", "the end is faint"]
    assert corpus.train.rows["input_ids"][:] == tiny_tokenizer(texts)["input_ids"]
    assert corpus.train.labels.tolist() == [1, 0, 1, 0, 1, 1, 0]
    assert corpus.train.rows["origin"][:] == [0, 1, 2, 3, 0, 2, 3]
    assert corpus.train.rows["row"][:] == [0, 1, 2, 3, 0, 2, 3]
    assert corpus.train.originals.tolist() == [0, 1, 2, 3]
    assert corpus.train.augmented == {"added": 3, "left_out": 5}
    assert corpus.revisions[str(wordnet.folder)] == wordnet.version


def test_evaluation_rows_and_plain_recipes_are_untouched(prepare, tiny_tokenizer):
    corpus = prepare(ROWS, {"share": 1.0}, evaluation=ROWS)
    evaluated = corpus.evaluation["e"]
    assert evaluated.rows["input_ids"][:] == tiny_tokenizer([text for text, _ in ROWS])["input_ids"]
    assert evaluated.augmented == {}
    plain = prepare(ROWS, evaluation=ROWS)
    assert (plain.train.augmented, "origin" in plain.train.rows.column_names) == ({}, False)
    assert plain.evaluation["e"].key == evaluated.key


def test_both_texts_of_a_pair(prepare, tiny_tokenizer):
    rows = [("big", "quickly", "pos"), ("bad", "dim", "neg"), ("bad", "bad", "neg")]
    train = prepare(rows, {"share": 1.0}, text_columns=["text", "other"]).train
    texts = [["big", "bad", "bad", "large", "bad"], ["quickly", "dim", "bad", "rapidly", "faint"]]
    assert train.rows["input_ids"][:] == tiny_tokenizer(*texts)["input_ids"]


def test_neither_held_out_rows_nor_their_copies_are_trained_on(prepare, tiny_tokenizer):
    parts = [[(f"big w{i:04}", "ab"[i % 2]) for i in range(first, first + 1200)] for first in (0, 1200)]
    parts[1][7] = ("nothing w1207", "b")
    knowing = copy.deepcopy(tiny_tokenizer)
    knowing.add_tokens([f"w{i:04}" for i in range(2400)])
    holdout = {"size": 0.25}
    corpus = prepare(parts, {"copies": 2, "share": 0.5}, tokenizer=knowing, holdout=holdout)
    held, train = corpus.evaluation["holdout"], corpus.train
    plain = prepare(parts, tokenizer=knowing, holdout=holdout)
    assert held.rows["input_ids"][:] == plain.evaluation["holdout"].rows["input_ids"][:], "the same rows, and originals"
    assert len(held.rows) == 600
    assert held.augmented == {}
    assert not set(train.rows["origin"][:]) & set(held.rows["origin"][:])
    assert len(set(train.rows["origin"][:])) == len(train.originals) == 1800
    originals = train.rows.select(train.originals)
    assert originals["input_ids"][:] == plain.train.rows["input_ids"][:]
    # `big` is the one word that can be replaced: both copies are the same, so one stays
    assert train.augmented["added"] + train.augmented["left_out"] == 3600
    assert train.augmented["added"] == len(train.rows) - 1800
    assert train.augmented["added"] in (1799, 1800)
    trained, evaluated = ({ids[-2] for ids in part.rows["input_ids"]} for part in (train, held))
    assert (len(trained), len(evaluated), trained & evaluated) == (1800, 600, set()), "the last words tell the rows apart"
    assert Counter(held.labels.tolist()) == {0: 300, 1: 300}


def test_to_evaluate_a_holdout_needs_no_wordnet(prepare, tmp_path):
    rows = [(f"big {i}", "ab"[i % 2]) for i in range(40)]
    first = prepare(rows, {}, holdout={"size": 8}).evaluation["holdout"]
    again = prepare(rows, {"wordnet": str(tmp_path / "gone")}, holdout={"size": 8}, need_train=False).evaluation["holdout"]
    assert again.rows["input_ids"][:] == first.rows["input_ids"][:]


def test_dropped_rows_leave_no_copies(prepare, tiny_tokenizer):
    from tokenizers import processors

    bare = copy.deepcopy(tiny_tokenizer)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    rows = [("\x01", "pos"), *ROWS[:1], ("", "neg"), *ROWS[1:]]
    train = prepare(rows, {"share": 1.0}, tokenizer=bare, on_bad_rows="drop").train
    assert train.dropped == {prepared.NO_TOKENS: 1, prepared.TEXT_EMPTY: 1}
    assert train.rows["row"][:] == [1, 3, 4, 5, 1, 4, 5]
    assert train.rows["origin"][:] == [0, 1, 2, 3, 0, 2, 3]
    with pytest.raises(UserError, match="cannot be used"):
        prepare(rows, {"share": 1.0}, tokenizer=bare)


def test_the_key_follows_the_augmentation(prepare, tmp_path):
    other = write_wordnet(tmp_path / "other")
    with (other / "verb.exc").open("a") as stream:
        stream.write("went go\n")
    first = prepare(ROWS, {}).train
    changes = ({"share": 0.2}, {"copies": 2}, {"seed": 1}, {"wordnet": str(other)})
    keys = [first.key, prepare(ROWS).train.key, *(prepare(ROWS, change).train.key for change in changes)]
    assert len(set(keys)) == 6
    again = prepare(ROWS, {"wordnet": str(write_wordnet(tmp_path / "elsewhere"))}).train
    assert (again.key, again.reused, again.augmented) == (first.key, True, first.augmented)


def test_a_row_is_augmented_alike_in_another_order(prepare):
    def by_origin(rows):
        train = prepare(rows, {"share": 0.5, "copies": 3}).train
        found = {}
        for row, ids in zip(train.rows["row"], train.rows["input_ids"], strict=True):
            found.setdefault(rows[row][0], []).append(ids)
        return found

    rows = [(f"big dim end quickly {word}", "ab"[n % 2]) for n, word in enumerate("film plot end good".split())]  # noqa: SIM905
    assert by_origin(rows) == by_origin(rows[::-1])


# --- WordNet itself ------------------------------------------------------------------------------------------------


def test_the_real_wordnet(real):
    assert re.match(r"WordNet 3\.\d", real.version)
    assert set(real.synonyms("movie")) == {"film", "motion picture"}
    assert real.synonyms("quickly") == ("rapidly", "speedily")
    assert "begin" not in real.synonyms("start"), "a noun too, with nothing before it"
    for word in ("good", "not", "never", "films", "better", "china", "director", "run"):
        assert real.synonyms(word) == (), word
    replaced = every(real, "It's not a movie by Film Movie in 2001, n't never")
    assert re.fullmatch(r"It's not a (film|motion picture) by Film Movie in 2001, n't never", replaced)


def test_real_synonyms_share_a_synset_and_a_part_of_speech(real):
    parts = [json.dumps(sorted(real._lemmas[part])[::50]) for part in augment.PARTS]
    for part, lemmas in zip(augment.PARTS, map(json.loads, parts), strict=True):
        for lemma in lemmas:
            for synonym in real._of_first_sense(lemma, part):
                offsets = {real._lemmas[part][word.replace(" ", "_")][1] for word in (lemma, synonym)}
                assert len(offsets) == 1, (part, lemma, synonym)


def test_the_fetched_reviews_augmented(real, assets):
    with (assets / "movie-review-snippets-3.3.2" / "train.csv").open(newline="") as stream:
        texts = [row["text"] for row in csv.DictReader(stream)][:2000]
    light, heavy = (Augmenter(wordnet=real, share=share, copies=1, seed=42) for share in (0.1, 1.0))
    pairs = [(text, light.augmented(text, 0)) for text in texts]
    changed = [(text, copied) for text, copied in pairs if text != copied]
    assert 0.4 < len(changed) / len(texts) < 0.9
    untouched = re.compile(r"\d\S*|\b(?:not|no|never|n't|nor|without|\w+n't|[A-Z]{2,})\b", re.ASCII)
    for text, copied in changed + [(text, heavy.augmented(text, 0)) for text in texts]:
        assert untouched.findall(text) == untouched.findall(copied)
        assert re.sub(r"[\w '-]", "", text) == re.sub(r"[\w '-]", "", copied)
    for text, copied in changed:
        gone = Counter(text.split()) - Counter(copied.split())
        assert gone.total() <= max(1, 0.1 * len(text.split()))
