"""Files beside the page: text of models is text in them, for spreadsheets, for Markdown, for what draws SVG."""

from __future__ import annotations

import csv
from xml.etree import ElementTree

import pytest

from eval.charts import accuracy_by_family, render
from eval.compare import compare_run
from eval.table import csv_cell, csv_text, markdown_row
from tests.eval import synthetic_run
from tests.eval.synthetic_run import write_synthetic_run

HOSTILE = '=HYPERLINK("http://x","$a$")</style><script>1</script>{{ 7 }}\x00\u202e|'


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "＝1"])
def test_no_cell_is_a_formula(text):
    assert csv_cell(text).startswith("'")


def test_numbers_and_plain_words_stay_as_they_are_and_control_characters_are_seen():
    assert csv_cell("\r=1") == "\\u000d=1"
    assert [csv_cell(value) for value in (-1.5, 3, None, "a-b", "qwen2")] == [-1.5, 3, None, "a-b", "qwen2"]
    rows = list(csv.DictReader(csv_text(("a", "b"), [{"a": HOSTILE, "b": -2}]).splitlines()))
    assert rows == [{"a": "'" + HOSTILE.replace("\x00", "\\u0000").replace("\u202e", "\\u202e"), "b": "-2"}]


def test_a_markdown_cell_is_one_cell_of_text():
    row = markdown_row([HOSTILE, "a\nb"])
    assert "\n" not in row
    assert "\\u202e" in row
    for mark in "|<>`*_":
        inner = row[2:-2].replace(" | ", "")
        assert inner.count(mark) == inner.count(f"\\{mark}")


def test_a_family_is_text_in_a_chart(tmp_path, monkeypatch):
    """In the page's own drawings and in the files; a dollar begins no formula."""
    monkeypatch.setitem(synthetic_run.FAMILIES_OF, "pico", [HOSTILE, "gcd"])
    (suite,) = compare_run(write_synthetic_run(tmp_path / "pico", questions=1, samples=1)).suites
    figure = render("f", accuracy_by_family(suite), 3, HOSTILE.replace("\x00", ""), "about")
    for drawn in (figure.wide, figure.narrow, figure.vector):
        assert "<script" not in drawn
        names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(drawn).iter()}
        assert not names & {"script", "a", "image", "foreignObject"}
        assert "</style><script>1</script>{{ 7 }}" in "".join(ElementTree.fromstring(drawn).itertext())
