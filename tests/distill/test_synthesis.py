"""Written questions: what is asked for, what is read, what is new, which answers agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, strategies as st

from distill.protocols import Verifier
from distill.recipe import LocalSource, SynthesisedSource, VerifyConfig
from distill.records import FinishReason, Problem
from distill.synthesis import Screen, WritingPlan, agreements, hinted, read_question
from distill.verify import open_verifier

QUESTION = "A shop sells 12 pens in the morning and 7 pens in the afternoon. How many pens does it sell in all?"


def problem(prompt: str, answer: str | None = None) -> Problem:
    return Problem(prompt=prompt, answer=answer, grader="math", source="t")


SEEDS = [problem(QUESTION.replace("12", str(n)), str(n + 7)) for n in range(20, 45)]


def plan(**changed: Any) -> WritingPlan:
    source = SynthesisedSource(seeds=(LocalSource(path="s.jsonl"),), count=9, **changed)
    return WritingPlan(source, SEEDS)


def test_every_seed_has_its_turn_in_every_pass_and_modes_come_by_their_weights() -> None:
    attempts = list(plan(modes={"rephrased": 3, "new": 1, "numbers_varied": 0}).attempts(0, 500))
    assert {(one.seed.id, one.turn) for one in attempts} == {(seed.id, turn) for seed in SEEDS for turn in range(20)}
    modes = Counter(one.mode for one in attempts)
    assert set(modes) == {"rephrased", "new"}
    assert 330 < modes["rephrased"] < 420  # 375 are expected, with a standard deviation of 10


def test_neither_the_order_of_seeds_nor_the_number_wanted_changes_what_is_asked_for() -> None:
    source = SynthesisedSource(seeds=(LocalSource(path="s.jsonl"),), count=700)
    other = WritingPlan(source, reversed(SEEDS))
    assert list(other.attempts(30, 60)) == list(plan().attempts(0, 100))[30:60]


def test_words_of_a_seed_are_no_slots() -> None:
    spelled = problem("What does {answer} mean, and {question}, in a template?", "7")
    assert spelled.id  # known before
    assert "What does {answer} mean, and {question}, in" in hinted(spelled).prompt
    assert hinted(spelled).prompt.count("7") == 1
    assert hinted(spelled).id != spelled.id


@pytest.mark.parametrize(
    ("text", "finish_reason", "found"),
    [
        (f"Sure, here it is:\n<question>\n{QUESTION}\n</question>\nDone.", "stop", QUESTION),
        (f"<think>\n<question>no</question>\n</think>\n\n<question>{QUESTION}</question>", "stop", QUESTION),
        (f"<question>{QUESTION}</question> and so on", "length", QUESTION),
        ("<question>Find the value of x if 3x = 12.</question>", "stop", "Find the value of x if 3x = 12."),
        ("<think>\nwhile true", "length", "reasoning that never ends"),
        (f"<question>{QUESTION}", "length", "cut off at the token limit"),
        (QUESTION, "stop", "no <question> with </question>"),
        (f"<question>{QUESTION}</question><question>{QUESTION}</question>", "stop", "several questions"),
        ("<question>How many?</question>", "stop", "fewer than 4 words"),
        (f"<question>{QUESTION * 50}</question>", "stop", "more than 4,000 characters"),
        (f"<question>{QUESTION}\nAnswer: 19</question>", "stop", "holds an answer or its working"),
        (f"<question>{QUESTION} \\boxed{{19}}</question>", "stop", "holds an answer or its working"),
        ("<question>How many [items] does [name] have now?</question>", "stop", "has blanks to fill in"),
        ("<question>A shop sells twelve pens in all.</question>", "stop", "asks nothing"),
    ],
)
def test_a_question_is_read_strictly(text: str, finish_reason: FinishReason, found: str) -> None:
    question, why = read_question(text, finish_reason)
    assert (question or why) == found
    assert (question is None) == bool(why)


def test_the_screen_drops_what_is_not_new() -> None:
    held_out = (
        "Each of the 9 girls on a netball team scores 4 goals in every one of the 6 matches. How many goals is that?"
    )
    screen = Screen({"gsm8k": [held_out]}, SEEDS, min_containment=0.3)
    rephrased, varied, *_ = (
        next(one for one in plan().attempts(0, 99) if one.mode == mode) for mode in ("rephrased", "numbers_varied")
    )
    fresh = problem("Ann has 3 cats and Bob has 4 dogs. How many animals have they?")
    same_numbers = problem(f"On one day a store sold {' and '.join(varied.seed.prompt.split()[3:4])} then 7. How many?")
    assert screen.drop(same_numbers, rephrased) is None, (
        "numbers must change where they are to be varied, not elsewhere"
    )
    assert screen.drop(same_numbers, varied) == ("numbers_varied", "its numbers are those of the seed")
    assert screen.drop(fresh, varied) is None
    again = problem("  ann has 3 cats and Bob has 4 dogs.  How many animals have they?")
    assert screen.drop(again, rephrased) == ("deduplicate", "the same as a seed or an earlier question")
    assert screen.drop(SEEDS[3], rephrased) == ("deduplicate", "the same as a seed or an earlier question")
    copied = problem(rephrased.seed.prompt.replace("A shop", "One shop"))
    assert screen.drop(copied, rephrased) == ("deduplicate", "holds 93% of the seed's runs of 8 words")
    assert screen.drop(problem(copied.prompt.replace("7", "9")), varied) is None, "which keeps the words"
    name, why = screen.drop(problem(held_out.replace("9 girls", "8 girls")), rephrased) or ("", "")
    assert name == "decontaminate"
    assert "of gsm8k" in why


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with open_verifier(VerifyConfig(num_workers=1)) as running:
        yield running


@pytest.mark.parametrize(
    ("votes", "answer", "agreeing"),
    [
        (["7", "7", "8", "7", None], "7", 3),
        (["1/2", "0.5", "\\frac{2}{4}", "1", "2"], "1/2", 3),  # one normal form
        (["x+1", "1 + x", "x + 1", "2", None], "x+1", 3),  # two of them: only the grader finds them equal
        (["\\sqrt{8}", "2\\sqrt{2}", "2.83", "4", "2\\sqrt{2}"], "2\\sqrt{2}", 3),
        (["3", "4", "5", "6", "7"], "3", 1),
        (["$1,000", "1000", "\\$1000", "999", ""], "$1,000", 3),
        ([None] * 5, "", 0),
    ],
)
def test_answers_agree_by_what_they_are(
    verifier: Verifier, votes: list[str | None], answer: str, agreeing: int
) -> None:
    (one,) = agreements([(problem("What is it, in all?"), votes)], 0.6, verifier)
    assert (one.answer, one.num_agreeing, one.num_votes) == (answer, agreeing, 5)


@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=2, max_size=9), st.floats(0.51, 1))
def test_no_minority_wins_whatever_the_share(votes: list[str | None], share: float) -> None:
    class Strict:
        """Numbers that differ in their normal form are different."""

        def verify(self, answers: Any) -> Iterator[Any]:
            from distill.records import Verdict

            return (Verdict(state="wrong") for _ in answers)

    from distill.synthesis.agreement import enough

    (one,) = agreements([(problem("What is it, in all?"), votes)], share, Strict())  # type: ignore[arg-type]
    counts = Counter(vote for vote in votes if vote is not None)
    assert one.num_agreeing == max(counts.values(), default=0)
    if one.num_agreeing >= enough(len(votes), share):
        assert 2 * counts[one.answer] > len(votes)
        assert counts[one.answer] / len(votes) >= share - 1e-9


def test_a_voted_reference_leaves_the_question_its_samples() -> None:
    asked = problem(QUESTION)
    kept = asked.model_copy(update={"answer": "19", "metadata": {"votes": {"agreeing": 4, "of": 5}}})
    assert kept.id == asked.id != problem(QUESTION, "19").id
