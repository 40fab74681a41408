"""Claims about runs side by side: what is shown, which figures are the best, and the page in a browser."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scalepeft import cli, page
from scalepeft import recipe as recipes
from scalepeft.compare import Comparison, entries, shortest, shown
from scalepeft.run import Run

RECIPE = """\
task: sequence-classification
model: {name_or_path: base}
adapter: {peft_type: LORA, r: 8, target_modules: [q_lin, v_lin]}
data: {train: {path: a.csv}, evaluation: {test: {path: b.csv}}}
training: {learning_rate: 1e-3}
"""


def figures(accuracy: float, loss: float) -> dict[str, float]:
    return {"accuracy": accuracy, "f1_macro": accuracy - 0.01, "f1_weighted": accuracy + 0.01, "loss": loss}


@pytest.fixture
def make(tmp_path):
    """Write a run as training leaves it."""
    (tmp_path / "toy.yaml").write_text(RECIPE)

    def make(name: str, *overrides: str, after=(0.9, 0.3), status="complete", reason=None) -> Path:
        run = Run(tmp_path / name)
        run.create(recipes.load(tmp_path / "toy.yaml", [*overrides, f"training.output_dir={str(run.path)!r}"]))
        run.update(max_steps=4)
        run.log({"step": 0, "epoch": 0.0, "eval_loss": 0.7, "eval_accuracy": 0.5})
        for step in range(1, 4):
            run.log({"step": step, "epoch": step / 4, "loss": 0.7 - step / 10})
        if after:
            accuracy, loss = after
            run.log({"step": 4, "epoch": 1.0, **{f"eval_{k}": v for k, v in figures(*after).items()}})
            run.update(metrics={"before": figures(0.5, 0.7), "after": figures(accuracy, loss)})
            run.update(parameters={"trainable": 1234, "total": 100_000}, seconds=61.5, samples_per_second=33.3)
            run.update(peak_memory_bytes=3 * 2**29)
        if status != "running":
            run.end(status, reason)
        return run.path

    return make


def compared(*paths: Path) -> Comparison:
    return Comparison(entries(paths))


def cells(comparison: Comparison) -> dict[str, list[str]]:
    return {c.title: [cell.text + "*" * cell.best for cell in c.cells] for c in comparison.columns}


def test_only_what_differs_is_shown(make):
    found = compared(make("a"), make("b", "adapter.r=16"), make("c", "adapter.target_modules=[q_lin]", "training.seed=7"))
    assert found.differing == ["adapter.r", "adapter.target_modules", "training.seed"]
    shown = cells(found)
    assert shown["r"] == ["8", "16", "8"]
    assert shown["target_modules"] == ["[q_lin, v_lin]", "[q_lin, v_lin]", "[q_lin]"]
    assert shown["seed"] == ["-", "-", "7"]
    assert (shown["trainable"][0], shown["share"][0], shown["seconds"][0]) == ("1,234", "1.23%", "61.5")
    assert (shown["rows/s"][0], shown["peak GiB"][0]) == ("33.3", "1.50")


def test_the_best_is_marked_in_the_right_direction_among_complete_runs(make):
    found = compared(
        make("a", after=(0.8, 0.2)),
        make("b", after=(0.9, 0.4)),
        make("c", after=(0.99, 0.01), status="failed", reason="it answers differently"),
        make("d", after=(float("nan"), float("nan"))),
    )
    shown = cells(found)
    assert shown["accuracy"] == ["0.5000 -> 0.8000", "0.5000 -> 0.9000*", "0.5000 -> 0.9900", "0.5000 -> nan"]
    assert [text.endswith("*") for text in shown["loss"]] == [True, False, False, False]
    assert "* the best of the complete runs" in found.text()


def test_equal_runs_and_a_run_alone_are_not_the_best(make):
    a, b = make("a"), make("b")
    assert "*" not in compared(a, b).text()
    assert "*" not in compared(a).text()


def test_what_went_wrong_is_shown_and_not_hidden(make):
    failed = make("bad", after=None, status="failed", reason="out of device memory")
    found = compared(make("good"), failed, make("killed", after=None, status="running"))
    assert cells(found)["status"] == ["complete", "failed", "running"]
    assert cells(found)["accuracy"][1:] == ["-", "-"]
    told = ["bad: failed: out of device memory", "killed: running: at step 3 of 4, or killed"]
    assert found.text().splitlines()[-2:] == told
    assert found.markdown().splitlines()[-2:] == [f"- {line}" for line in told]
    assert all(line.partition(": ")[2].partition(": ")[2] in found.html() for line in told)


def test_runs_without_evaluation_have_no_empty_columns(make):
    assert "accuracy" not in cells(compared(make("a", after=None), make("b", after=None)))


def test_a_narrow_terminal_gets_a_run_a_column(make):
    found = compared(make("a", after=(0.8, 0.2)), make("b", "adapter.r=16"))
    wide, narrow = found.text(500).splitlines(), found.text(60).splitlines()
    assert wide[0].split()[:2] == ["run", "r"]
    assert narrow[0].split() == ["run", "a", "b"]
    assert max(map(len, narrow)) <= 60 < max(map(len, wide))


def test_csv_round_trip(make):
    odd = make("odd", "model.name_or_path='a,\"b\"'", status="failed", reason="one, two")
    rows = list(csv.DictReader(io.StringIO(compared(make("a", after=(1 / 3, 0.2)), odd).csv())))
    assert [row["model.name_or_path"] for row in rows] == ["base", 'a,"b"']
    assert [row["reason"] for row in rows] == ["", "one, two"]
    assert float(rows[0]["accuracy_after"]) == 1 / 3
    assert (rows[0]["peak_memory_bytes"], rows[0]["trainable_parameters"]) == (str(3 * 2**29), "1234")
    assert {row["path"] for row in rows} == {str(odd), str(odd.with_name("a"))}


def test_markdown_is_a_table(make):
    text = compared(make("a|b", after=(0.8, 0.2)), make("c")).markdown()
    lines = text.splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert lines[2].startswith("| a\\|b |")
    assert "**0.5000 -> 0.9000**" in lines[3]


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "html"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(make):
    text = compared(make("a"), make("b", "adapter.r=16")).html()
    found = Page(text)
    assert found.open == []
    assert found.tags.count("tr") == 3
    assert found.tags.count("figure") == 5
    assert found.tags.count("polyline") == 2 * 5
    assert found.tags.count("script") == 1
    assert "http" not in text.replace("http-equiv", "")
    assert not {"src", "href", "action", "srcset"} & {name for name, _ in found.attributes}
    assert "@import" not in text
    assert "url(" not in text


def test_names_and_values_are_escaped(make):
    name = "<script>alert(1)<"
    found = compared(make(name), make("b", "model.name_or_path='\"><img src=x>'", status="failed", reason="<b>&</b>"))
    page = Page(found.html("<i>title</i>"))
    assert page.tags.count("script") == 1
    assert not {"img", "b", "i"} & set(page.tags)
    assert page.open == []
    assert "&lt;script&gt;" in found.html()


def test_names_cannot_steer_a_terminal(make):
    assert "\x1b" not in compared(make("a\x1b[31m\n"), make("b")).text()


@pytest.mark.parametrize("values", [[], [(0, 1.0)], [(0, 0.0), (1, 0.0)], [(1, float("inf")), (2, float("nan"))]])
def test_a_chart_of_little_is_no_error(values):
    svg = page.chart("c", [page.Line(name="a", points=values), page.Line(name="b", points=[])])
    assert "nan" not in svg
    assert "inf" not in svg


def test_a_long_run_makes_no_long_page():
    points = [(i, 1 / (i + 1)) for i in range(100_000)]
    assert len(page.chart("c", [page.Line(name="a", points=points)])) < 10_000


def test_names_are_as_short_as_tells_them_apart():
    assert shortest(["x/a/run", "x/b/run", "x/c"], "/") == ["a/run", "b/run", "c"]
    assert shortest(["r", "adapter.r", "training.seed"], ".") == ["r", "adapter.r", "seed"]
    assert shown([True, None, 1e-3, {"a": "b"}]) == "[true, null, 0.001, {a: b}]"


def test_the_command_writes_what_is_asked_and_overwrites_nothing(make, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    a, b = make("a"), make("b", "adapter.r=16")
    asked = ["--csv", "c.csv", "--html", "c.html", "--markdown", "c.md"]
    assert cli.main(["compare", str(a), "b", f"{b}/", *asked]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-3:] == ["c.csv: written", "c.html: written", "c.md: written"]
    assert err == ""
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 3, "a run that is named twice is compared once"
    before = (tmp_path / "c.md").read_text()
    assert cli.main(["compare", str(a), "b", "--markdown", "c.md", "--csv", "no/c.csv"]) == 2
    assert capsys.readouterr() == ("", f"no/c.csv: there is no folder {tmp_path}/no\nc.md: exists already; give another file\n")
    assert (tmp_path / "c.md").read_text() == before


def test_what_is_no_run_is_said_in_a_line_each(make, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    make("a")
    assert cli.main(["compare", "a", ".", "nosuch"]) == 2
    told = "".join(f"{name}: is not a run directory: it has no run.json\n" for name in (".", "nosuch"))
    assert capsys.readouterr() == ("", told)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")
def test_the_page_in_a_browser(make, tmp_path):
    make("a", after=(0.8, 0.2))
    make("b", "adapter.r=16")
    make("c", "adapter.r=4", after=None, status="failed", reason="out of device memory")
    text = compared(*(tmp_path / name for name in "abc")).html()

    def browse(page: str, *options: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "page.html").write_text(page)
        headless = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'u'}",
        ]
        command = [CHROMIUM, *headless, *options, (tmp_path / "page.html").as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    assert "CONSOLE" in browse(f"{text}<script>nosuch()</script>", "--dump-dom").stderr, "errors would be seen"
    for scheme in (0, 1):  # dark, light
        shot = tmp_path / f"{scheme}.png"
        found = browse(text, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}")
        assert "CONSOLE" not in found.stderr
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()

    def order(clicks: int) -> list[str]:
        """The runs after so many clicks on the head of column r."""
        click = "document.querySelectorAll('thead button')[1].click();" * clicks
        found = browse(f"{text}<script>{click}</script>", "--dump-dom")
        assert "CONSOLE" not in found.stderr
        return re.findall(r'<th scope="row" data-value="(\w)"', found.stdout)

    assert [order(0), order(1), order(2)] == [["a", "b", "c"], ["c", "a", "b"], ["b", "a", "c"]]
