"""docs/performance.md is what the script makes of the recorded results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MACHINE = {"date": "2026-01-02", "commit": "0123456+", "processor": "A (avx2)", "cores": 2, "load": 0.1}
MACHINE |= {"accelerator": None, "versions": {"python": "3.11.7", "torch": "2.13.0"}}
RATIO = {"claim": "A is faster", "ours": "a", "other": "b", "median": 3.0, "lowest": 2.5, "highest": 1234.5}


@pytest.fixture
def script(monkeypatch):
    """The script as a module, beside those that it uses."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "recipes_table", raising=False)
    import performance_page

    return performance_page


def written(folder, **results):
    """A folder of results."""
    for name, of in results.items():
        (folder / f"{name}.json").write_text(json.dumps(of), encoding="utf-8")
    return folder


def kept(**more):
    """A result as `ratios.keep` writes it."""
    return {"what": "Something.", "unit": "rows/s", "found": {}, "ratios": [], "machine": MACHINE, **more}


def test_the_page_is_what_the_script_writes(script):
    found = script.results(script.RESULTS)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(found), "stale: run `make performance`"
    drawn = {"performance_ratios.svg", *(file for name, of in found.items() for file, _ in script.curves(name, of))}
    assert {path.name for path in script.PAGE.parent.glob("performance_*.svg")} == drawn


def test_a_missed_target_is_said_to_be_missed(script, tmp_path):
    missed = RATIO | {"median": 1.2, "least": 1.5, "kept": False}
    found = script.results(written(tmp_path, own=kept(ratios=[RATIO | {"least": 2.0, "kept": True}, missed])))
    lines = script.page(found).splitlines()
    assert "| [A is faster](#own) | a / b | **3** | 2.5 to 1,234 | at least 2 | kept |" in lines
    assert "| [A is faster](#own) | a / b | **1.2** | 2.5 to 1,234 | at least 1.5 | **MISSED** |" in lines
    assert (
        "On 2026-01-02, commit 0123456 with changes, A (avx2), 2 cores, load 0.1 at the end; python 3.11.7, torch 2.13.0."
        in lines
    )


def test_only_what_has_the_form_of_a_measured_ratio_comes_onto_the_page(script, tmp_path):
    folder = written(tmp_path, runs=[1], older={"ratios": [0.9], "median": 0.9}, startup=kept(), encoder=kept(), zoo=kept())
    assert list(script.results(folder)) == ["encoder", "startup", "zoo"]


def test_notes_tables_and_curves_have_their_places(script, tmp_path):
    curve = {"title": "Rows", "x": "rows", "y": "seconds", "series": {"cold": [[10, 1.0], [100, 9.0]], "warm": [[10, 0.0]]}}
    table = {"heads": ["part", "share"], "rows": [["forward", "60 %"]]}
    found = script.results(written(tmp_path, growth=kept(notes=["Nothing helped."], curves=[curve], table=table)))
    text = script.page(found)
    assert "| forward | 60 % |" in text
    assert "- Nothing helped.\n" in text
    assert "![Rows](performance_growth_1.svg)" in text
    (tmp_path / "performance_gone_1.svg").touch()
    assert [file.name for file in script.draw(found, tmp_path)] == ["performance_ratios.svg", "performance_growth_1.svg"]
    assert not (tmp_path / "performance_gone_1.svg").exists()
    assert "<svg" in (tmp_path / "performance_growth_1.svg").read_text(encoding="utf-8")
