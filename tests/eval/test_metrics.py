"""pass@k against drawing by hand, votes that count meanings, scripts that an answer leaves."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import pytest

from distill.recipe import VerifyConfig
from distill.records import Problem, Trace
from distill.verify import open_verifier
from eval.answers import Answer
from eval.harness import score_rows
from eval.metrics import ks, mixes_scripts, pass_at_k
from eval.votes import votes
from tests.eval.scripted import SUBJECT


@pytest.mark.parametrize(("n", "c"), [(1, 0), (4, 1), (6, 2), (8, 0), (8, 8), (9, 5)])
def test_pass_at_k_is_the_mean_over_all_draws(n, c):
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        assert pass_at_k(n, c, k) == pytest.approx(fmean(any(draw) for draw in combinations(samples, k)))
    with pytest.raises(ValueError, match="no pass@"):
        pass_at_k(n, c, n + 1)


def test_k_are_powers_of_two():
    assert [ks(n) for n in (1, 2, 5, 64)] == [[], [2], [2, 4], [2, 4, 8, 16, 32, 64]]


def test_pass_at_k_leaves_out_questions_with_fewer_graded_samples():
    def rows(question: str, *states: str) -> list[dict]:
        return [{"problem_id": question, "family": "f", "verdict": state, "vote": None} for state in states]

    whole = [row for n in range(60) for row in rows(f"q{n}", "correct", "wrong")]
    cards = score_rows([*whole, *rows("short", "wrong", "infra_error")], SUBJECT, "s")
    assert {card.metric: (card.value, card.num_questions) for card in cards} == {
        "pass@1": (30 / 61, 61),
        "pass@2": (1.0, 60),
    }


def answers_of(verifier, reference: str, *written: str, grader="math") -> list[Answer]:
    problem = Problem(prompt=f"What is it? {reference}", answer=reference, grader=grader, source="s")
    texts = [f"\\boxed{{{text}}}" if text else "I do not know." for text in written]
    how = {"finish_reason": "stop", "num_prompt_tokens": 1, "num_tokens": 1, "teacher": "t", "problem_id": problem.id}
    traces = [Trace(key=f"{n}", sample_index=n, text=text, **how) for n, text in enumerate(texts)]
    verdicts = list(verifier.verify([(problem, text, "stop") for text in texts]))
    return [Answer(problem, trace, verdict) for trace, verdict in zip(traces, verdicts, strict=True)]


def test_votes_count_meanings():
    """`x+1` and `1+x` are one wrong answer: two votes, as many as the right ones in two spellings have."""
    with open_verifier(VerifyConfig(num_workers=1)) as verifier:
        first = answers_of(verifier, "\\frac{1}{2}", "1/2", "0.5", "x+1", "1+x", "7", "")
        second = answers_of(verifier, "3", "3", "4", "4.0", "5")
        named = votes([*first, *second], verifier)
    right, also, one, other, seven, none, *rest = named
    assert right == also
    assert one == other
    assert len({right, one, seven}) == 3
    assert none is None
    assert rest[1] == rest[2]
    assert len(set(rest)) == 3
    programs = [Answer(a.problem.model_copy(update={"grader": "code"}), a.trace, a.verdict) for a in first]
    assert votes(programs, verifier) == [None] * 6


def test_an_answer_that_leaves_its_question_s_script():
    english, chinese = "What is the sum of $2$ and $3$?", "两个数的和是多少？"
    assert mixes_scripts(english, "The sum of 2 and 3 is 所以 5.")
    assert not mixes_scripts(english, "The sum is $\\alpha + \\beta$, so $x = 5$.")
    assert mixes_scripts(chinese, "两个数的和 is the sum of them")
    assert not mixes_scripts(chinese, "两个数的和是五。")
    assert not mixes_scripts("Translate 你好.", "你好 means hello.")
    assert mixes_scripts("$2 + 3$", "The sum is five.") is None
