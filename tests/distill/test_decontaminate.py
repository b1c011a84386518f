"""What counts as an evaluation question that leaked into training, and what does not."""

from __future__ import annotations

from typing import Any

from distill.decontaminate import HeldOutQuestions
from distill.problems.stream import pico_families, stream
from distill.records import Problem

AIME = (
    "Every morning Aya goes for a nine kilometer long walk and stops at a coffee shop afterwards. When she walks at a "
    "constant speed of s kilometers per hour, the walk takes her 4 hours, including t minutes spent in the coffee shop."
)
SHORT = "How many positive divisors does the number 2024 have?"


def problem(prompt: str, grader: Any = "math") -> Problem:
    return Problem(prompt=prompt, answer="2", grader=grader, source="t")


def match(prompt: str, held_out: list[str], training: list[Problem] | None = None, grader: Any = "math") -> str | None:
    return HeldOutQuestions({"suite": held_out}, training or [], min_containment=0.3).match(
        problem(prompt, grader=grader)
    )


def test_the_same_question_is_found_in_any_dress() -> None:
    for dressed in (SHORT, SHORT.upper(), SHORT.replace(" ", "\n "), SHORT.replace("2024", "２０２４")):
        for grader in ("math", "reasoning_gym"):
            assert match(dressed, [SHORT], grader=grader) == f"is the held-out question {SHORT!r} of suite"
    assert match("1 + 2", ["1 - 2"]) is None


def test_a_long_question_inside_another_is_found_with_the_words() -> None:
    found = match(f"Solve this. {AIME[10:150]} Hint: algebra.", [AIME])
    assert found is not None
    assert "shares 'aya goes for a nine kilometer long walk and stops at a coffee'" in found
    assert match(" ".join(AIME.split()[:12]) + " and then sings.", [AIME]) is None


def test_a_medium_question_counts_whole_alone() -> None:
    assert match(f"Please answer: {SHORT} Think first.", [SHORT]) is not None
    assert match(SHORT.replace("2024", "2025"), [SHORT]) is None
    assert match("What is 2 + 2? Think.", ["What is 2 + 2?"]) is None


def test_boilerplate_is_no_leak() -> None:
    ending = "The answer can be written as m over n where m and n are relatively prime positive integers find m plus n."
    held_out = [f"{AIME} {ending}", f"Alice has {SHORT} {ending}"]
    assert match(f"A new question about dice. {ending}", held_out) is None
    assert match(f"{AIME} {ending}", held_out) is not None
    one = [f"{AIME} {ending}"]
    assert match(f"A new question about dice. {ending}", one) is not None, "nothing says that it is boilerplate"
    training = [problem(f"Question {n} about dice. {ending}") for n in range(30)]
    assert match(f"A new question about dice. {ending}", one, training) is None
    assert match(f"So {AIME}", one, training) is not None


def test_a_question_with_changed_words_is_found_by_what_it_still_holds() -> None:
    words = AIME.split()
    reworded = " ".join("thing" if place % 12 == 11 else word for place, word in enumerate(words))
    found = match(f"Solve: {reworded}", [AIME])
    assert found is not None
    assert found.startswith("holds 33% of the runs of 8 words, with 'every morning aya goes for a nine kilometer")
    assert found.endswith("of suite")
    strict = HeldOutQuestions({"s": [AIME]}, [], min_containment=0.5)
    assert strict.match(problem(reworded)) is None
    assert HeldOutQuestions({"s": [AIME]}, [], min_containment=None).match(problem(reworded)) is None
    assert match(" ".join(words[:10]) + " and then sings.", [AIME]) is None, "3 of 33 runs"


def test_suites_that_share_a_question_hide_nothing() -> None:
    copy = AIME.replace("Every morning", "Each morning")
    held_out = HeldOutQuestions({"one": [AIME], "two": [copy]}, [], min_containment=0.3)
    assert held_out.match(problem(f"Here: {AIME[20:]}")) is not None


def test_no_procedural_question_falls_to_its_template() -> None:
    """Every pico family: training and held-out questions share words and numbers, and none is dropped."""
    for family, parameters in pico_families().items():
        train, held_out = (
            [
                next_problem
                for _, next_problem in zip(range(60), stream(family, parameters, seed=3, split=side), strict=False)
            ]
            for side in ("train", "held_out")
        )
        index = HeldOutQuestions({"pico": [p.prompt for p in held_out]}, train, min_containment=0.3)
        assert not [found for p in train if (found := index.match(p))]
        assert all(index.match(p) for p in held_out)
