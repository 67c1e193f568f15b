"""The record of tests/matrix.py, and the tables that docs/compatibility.md and its Chinese page have of it."""

from __future__ import annotations

import platform
import re
import sys

import compatibility_page
import matrix
import pytest
import torch
from compatibility_page import COLUMNS, Row
from conftest import ROOT

NO_FLEX, NO_BATCHING = "has no flex_attention", "has no continuous batching"
NOT_ON_CPUS, NO_SEARCH = f"{NO_BATCHING} on a CPU", "has no contrastive search of its own"


def row(run="releases", transformers="", passed="9", failed="0", lacks="", here=("3.11.7", "2.13.0")):
    return Row(run, "2026-11-01", *here, transformers, passed, failed, lacks)


RECORD = [
    row(transformers="4.47.0", passed="7", lacks=f"{NO_FLEX}; {NO_BATCHING}"),
    row(transformers="4.47.1", passed="8", lacks=f"{NO_FLEX}; {NO_BATCHING}"),
    row(transformers="4.48.3", passed="8", lacks=f"{NO_FLEX}; {NO_BATCHING}; {NO_SEARCH}"),
    row(transformers="4.57.6", lacks=f"{NOT_ON_CPUS}; {NO_SEARCH}"),
    row(transformers="5.0.0"),
    row(transformers="5.1.0", lacks=NOT_ON_CPUS),
    row(transformers="5.2.0", failed="2: test_a, test_b"),
    row("suite", transformers="5.3.0", passed="all", lacks="?"),
    row("others", transformers="4.47.1", passed="3", lacks=f"{NO_FLEX}; has no server", here=("3.8", "2.4.1")),
    row("newest", transformers="6.0.0", lacks="does less"),
]
FLEX, BATCHING = ([name for name, *_ in COLUMNS].index(name) for name in ("flex_attention", "continuous batching"))


def cells(table: str) -> list[list[str]]:
    return [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("language", compatibility_page.PAGES)
def test_the_page_has_the_tables_of_the_record(language):
    page = compatibility_page.PAGES[language].read_text(encoding="utf-8")
    for section, made in compatibility_page.sections(compatibility_page.read(), language).items():
        assert f"<!-- {section} begins -->\n{made}<!-- {section} ends -->" in page


def test_the_chinese_page_says_the_same_in_chinese():
    """All that the tables say is translated, and nothing is translated that they don't say."""
    english, chinese = (compatibility_page.sections(compatibility_page.read(), language) for language in ("", "zh"))
    for section, made in english.items():
        assert re.findall(r"\d[\d.]*\d|\d|[✓–·]", chinese[section]) == re.findall(r"\d[\d.]*\d|\d|[✓–·]", made)
    whole = "".join(chinese.values())
    assert not re.findall(r"\b(?:has|have|takes|lacks|makes|breaks|does|can)\b", whole)
    assert not [reason for row in compatibility_page.read() for reason in row.reasons if reason in whole]
    assert not re.findall(r"[\w.][,;:] ", whole)  # punctuation is full-width


def test_the_record_has_every_release_once():
    """Each that is listed in matrix.py was run by it, or runs in CI and is marked so."""
    record = compatibility_page.read()
    runs = {run: [row.transformers for row in record if row.run == run] for run in compatibility_page.RUNS}
    assert (*runs["releases"], *runs["suite"]) == matrix.RELEASES
    assert [(row.python, row.torch, row.transformers) for row in record if row.run == "others"] == list(matrix.OTHERS)
    assert all(row.lacks == "?" and row.passed == "all" for row in record if row.run == "suite")
    assert all(row.passed.isdigit() for row in record if row.run != "suite")


def test_releases_with_the_same_marks_are_one_row():
    made = compatibility_page.sections(RECORD)["releases"]
    heads, _, *rows = cells(made)
    assert [row[:2] for row in rows] == [
        ["4.47 to 4.48", "7 to 8"],
        ["4.57 to 5.1", "9"],
        ["5.2", "9; failed: 5.2.0: 2: test_a, test_b"],
        ["5.3", "the whole suite, in CI"],
    ]
    for found, lacking in zip((row[2:] for row in rows), ({FLEX, BATCHING}, set(), set())):
        assert found == ["–" if i in lacking else "✓" for i in range(len(COLUMNS))]
    assert rows[3][2:] == ["·"] * len(COLUMNS)
    assert heads[2 + BATCHING] == "continuous batching [1]"
    assert f"\n[1] 4.57, 5.1: {NOT_ON_CPUS}\n" in made
    assert made.endswith(f"\n- 4.48 to 4.57: {NO_SEARCH}\n")
    assert made.startswith("Python 3.11.7, torch 2.13.0. ")


def test_other_sections():
    made = compatibility_page.sections(RECORD)
    assert cells(made["others"])[2:] == [["3.8", "2.4.1", "4.47.1", "3", "0"]]
    assert made["others"].endswith("\n- 4.47.1: has no server\n")
    assert "flex" not in made["others"]
    assert made["newest"].startswith("Of 2026-11-01:\n")
    assert cells(made["newest"])[2:] == [["3.11.7", "2.13.0", "6.0.0", "9", "0", "does less"]]
    assert made["newest-torch"] == ""


def test_reasons_of_columns_are_reasons_of_skips():
    """A reason that was renamed in a test would otherwise be a mark that nothing takes away."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    said = set(re.findall(r'\blacks\(\s*"([^"]+)"', tests))
    assert {reason for _, *lists in COLUMNS for reasons in lists for reason in reasons} <= said
    assert not [reason for reason in said if ";" in reason]  # it separates them in the record


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A record, and pages to write to."""
    page = "".join(f"{s}\n<!-- {s} begins -->\nold\n<!-- {s} ends -->\n" for s in compatibility_page.sections([]))
    record, pages = tmp_path / "record.tsv", {"": tmp_path / "page.md", "zh": tmp_path / "page_zh.md"}
    for file in pages.values():
        file.write_text(page, encoding="utf-8")
    compatibility_page.write(RECORD, record)
    monkeypatch.setattr(compatibility_page.record, "__defaults__", (record, pages))
    return record, pages


def test_a_record_is_read_as_it_was_written(files):
    assert compatibility_page.read(files[0]) == RECORD
    text = files[0].read_text(encoding="utf-8")
    for broken in (text.replace("others", "other"), text + "releases\t1\n", text.replace("date", "day")):
        files[0].write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match=r"record\.tsv"):
            compatibility_page.read(files[0])


@pytest.mark.parametrize(
    ("arguments", "run", "releases"),
    [([], "releases", matrix.RELEASES), (["newest"], "newest", ("7.0.0",)), (["4.32.0", "--core", "4.37.2"], None, ())],
)
def test_a_run_replaces_its_own_rows(files, monkeypatch, arguments, run, releases):
    """`matrix.py` without, and with, arguments, the tests themselves left out."""

    tests = {}

    def results(name, files, jobs):
        tests[name] = files
        return matrix.Result(name, 5, ["test_x"] if name == ("4.33.3",) else [], ["has no a", "has no b"], "output")

    monkeypatch.setattr(matrix, "test", results)
    monkeypatch.setattr(matrix, "newest", lambda package: "7.0.0")
    monkeypatch.setattr(sys, "argv", ["matrix.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        matrix.main()
    assert bool(ended.value.code) == ("4.33.3" in releases)
    if run is None:
        assert tests == {("4.32.0",): matrix.LEFT_OUT, ("4.37.2",): matrix.CORE}
    found = compatibility_page.read(files[0])
    replaced = {(run, row.transformers) for row in RECORD if row.run == run} | {("suite", r) for r in releases}
    kept = [row for row in RECORD if (row.run, row.transformers) not in replaced]
    assert [row for row in found if row.run != run] == kept
    assert len(kept) == len(RECORD) - {None: 0, "releases": 8, "newest": 1}[run]
    written = [row for row in found if row.run == run]
    assert tuple(row.transformers for row in written) == releases
    for row in written:
        assert (row.passed, row.lacks) == ("5", "has no a; has no b")
        assert row.failed == ("1: test_x" if row.transformers == "4.33.3" else "0")
        assert (row.python, row.torch) == (platform.python_version(), torch.__version__.split("+")[0])
    for language, file in files[1].items():
        page = file.read_text(encoding="utf-8")
        assert ("old" in page) == (run is None)
        for section, made in compatibility_page.sections(found, language).items():
            assert run is None or f"{section}\n<!-- {section} begins -->\n{made}<!-- {section} ends -->\n" in page
