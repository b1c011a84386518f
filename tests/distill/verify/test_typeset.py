"""Typesetting is taken off in whatever order it was put on, in time that grows with the text alone."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings, strategies as st

from distill.records import Problem
from distill.verify.choice import grade_choice
from distill.verify.mathematics.reading import prepare
from distill.verify.typeset import plain

WRAPPINGS = (
    "\\mathbf{@}", "\\boldsymbol{@}", "\\text{$@$}", "$@$", "\\(@\\)", "{@}", "\\underline{@}", "\\fbox{@}",
    "\\textcolor{red}{@}", "\\color{blue}{@}", "{\\bf @}", "\\displaystyle @", "\\,@\\;", "~@~", "**@**",
    "\\begin{aligned}@\\end{aligned}", "\\Large @", " @ ", "\\ensuremath{@}",
)  # fmt: skip


@settings(max_examples=300)
@example("x^{2}+1", ["$@$", "\\text{$@$}"])
@example("2\\pi", ["$@$", "**@**", "\\text{$@$}"])
@given(
    st.sampled_from(["7", "\\frac{1}{2}", "2\\pi", "x^{2}+1", "(1,2)", "\\text{even}"]),
    st.lists(st.sampled_from(WRAPPINGS), max_size=5),
)
def test_any_nesting_of_wrappings_comes_off(answer: str, wrappings: list[str]) -> None:
    written = answer
    for wrapping in wrappings:
        written = wrapping.replace("@", written)
    assert "".join(plain(written).split()) == "".join(plain(answer).split())


@pytest.mark.parametrize(
    ("written", "latex"),
    [
        ("2√3/π", "2\\sqrt{3}/\\pi"),
        ("3.2e5", "3.2\\times 10^{5}"),
        ("x**10", "x^{10}"),
        ("sqrt(x+1)", "\\sqrt{x+1}"),
        ("45°", "45^\\circ"),
        ("1\\,234~567", "1\\,234~567"),
        ("1\\,234\\,567", "1234567"),
        ("\\dfrac 3 8", "\\frac{3}{8}"),
        ("{3 \\over 8}", "\\frac{3}{8}"),
        ("x² ≤ ½", "x^{2} \\le \\frac{1}{2}"),
        ("\\mathrm{km\\,h^{-1}}", "\\text{km h^{-1}}"),
    ],
)
def test_signs_and_typed_mathematics_become_latex(written: str, latex: str) -> None:
    assert "".join(prepare(written).split()) == "".join(prepare(latex).split())


def test_what_is_never_closed_stays_so() -> None:
    assert plain("\\frac{1}{").count("{") == 2
    assert plain("\\textbf{1") == "{1"


HOSTILE = [
    "{" * 9_000 + "1" + "}" * 9_000,
    "\\text{" * 3_000 + "1" + "}" * 3_000,
    "\\mathbf{" * 2_400 + "x" + "}" * 2_400,
    "**" * 4_000 + "x" + "**" * 4_000,
    *(part * (19_000 // len(part)) for part in ("\\frac", "`", ". ", "1 ", "and ", "$", "{", "}", "$**`")),
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda text: text[:8])
def test_the_choice_of_a_hostile_text_takes_no_time(hostile: str) -> None:
    """Choices are graded in the process that asks, where nothing kills what takes too long."""
    problem = Problem(prompt="?", answer="B", grader="choice", source="c", metadata={"choices": ["u", "v", "w"]})
    started = time.process_time()
    assert grade_choice(problem, hostile)[0] == "wrong"
    assert time.process_time() - started < 3
