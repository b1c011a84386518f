"""Each filter alone, all of them in order, and what counts as an evaluation question that leaked into training."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.curate import curate, repetition, sift
from distill.decontaminate import HeldOutQuestions
from distill.errors import DataError
from distill.problems.stream import pico_families, stream
from distill.recipe import CurateConfig
from distill.records import Problem, Trace, Verdict

OFF = CurateConfig(
    correct_only=False, complete_reasoning=False, max_repetition=None, decontaminate=False, deduplicate=False
)
CORRECT = Verdict(state="correct", extracted="2")


def problem(prompt: str = "1 + 1?", answer: str | None = "2", grader: Any = "math") -> Problem:
    return Problem(prompt=prompt, answer=answer, grader=grader, source="t")


def trace(of: Problem, index: int = 0, text: str = "", **more: Any) -> Trace:
    fields = {
        "key": f"{of.id}{index}",
        "problem_id": of.id,
        "sample_index": index,
        "text": text or f"<think>\nstep {index}\n</think>\n\n\\boxed{{2}}",
        "finish_reason": "stop",
        "num_prompt_tokens": 3,
        "num_tokens": 10,
        "teacher": "t",
    }
    return Trace.model_validate({**fields, **more})


def on(**switches: Any) -> CurateConfig:
    return OFF.model_copy(update=switches)


@pytest.mark.parametrize(
    ("config", "changed", "verdict", "name"),
    [
        (on(correct_only=True), {}, Verdict(state="wrong"), "verdict"),
        (on(correct_only=True), {}, Verdict(state="timeout"), "verdict"),
        (on(complete_reasoning=True), {"text": "<think>\nx"}, CORRECT, "complete_reasoning"),
        (on(complete_reasoning=True), {"finish_reason": "length"}, CORRECT, "complete_reasoning"),
        (on(max_tokens=10), {"num_tokens": 11}, CORRECT, "length"),
        (on(max_repetition=0.5), {"text": "a\n" * 9}, CORRECT, "repetition"),
    ],
)
def test_each_filter_drops_what_it_names_and_only_when_on(
    config: CurateConfig, changed: dict[str, Any], verdict: Verdict, name: str
) -> None:
    p = problem()
    traces = [trace(p, 0), trace(p, 1, **changed)]
    examples, direct, funnel = curate([p], traces, [CORRECT, verdict], config, [])
    assert [example.trace_key for example in examples] == [traces[0].key]
    assert [(d.question, d.completion, d.trace_key) for d in direct] == [(p.prompt, "\\boxed{2}", None)]
    assert funnel == [{"filter": name, "in": 2, "out": 1}]
    assert len(curate([p], traces, [CORRECT, verdict], OFF, [])[0]) == 2


def test_deduplicate_keeps_the_first_and_max_per_problem_counts_what_is_left() -> None:
    p, q = problem(), problem(" 1  + 1? ")
    traces = [trace(p, 0), trace(p, 1, trace(p, 0).text), trace(p, 2), trace(p, 3), trace(q, 0, trace(p, 0).text)]
    curated = sift([p, q], traces, [CORRECT] * 5, on(deduplicate=True, max_per_problem=2), [])
    assert [example.trace_key for example in curated.examples] == [traces[0].key, traces[2].key]
    assert curated.funnel == [
        {"filter": "deduplicate", "in": 5, "out": 3},
        {"filter": "max_per_problem", "in": 3, "out": 2},
    ]
    assert [(d.key, d.filter) for d in curated.dropped] == [
        (traces[1].key, "deduplicate"),
        (traces[4].key, "deduplicate"),
        (traces[3].key, "max_per_problem"),
    ]
    assert curated.dropped[0].detail == f"the same as sample {traces[0].key}"


def test_a_question_without_a_reference_teaches_the_answer_that_was_graded() -> None:
    p = problem(answer=None)
    _, direct, _ = curate([p], [trace(p)], [Verdict(state="correct", extracted="x=2")], OFF, [])
    assert direct[0].completion == "\\boxed{x=2}"


def test_a_trace_without_its_problem_is_a_data_error() -> None:
    with pytest.raises(DataError, match="belongs to no problem"):
        curate([], [trace(problem())], [CORRECT], OFF, [])


STATES = st.sampled_from(["correct", "wrong", "truncated", "timeout"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), STATES, st.integers(1, 30), st.integers(0, 3)), max_size=25))
def test_the_funnel_adds_up_and_order_is_that_of_the_traces(rows: list[tuple[int, str, int, int]]) -> None:
    problems = [problem(f"{n} + 1?") for n in range(6)]
    traces = [
        trace(problems[n], index, f"<think>\n{same}\n</think>\n\n\\boxed{{2}}", num_tokens=tokens)
        for index, (n, _, tokens, same) in enumerate(rows)
    ]
    verdicts = [Verdict(state=state) for _, state, _, _ in rows]  # type: ignore[arg-type]
    config = CurateConfig(max_tokens=20, max_per_problem=2)
    curated = sift(problems, traces, verdicts, config, ["0 + 1?"])
    names = ["verdict", "complete_reasoning", "length", "repetition", "decontaminate", "deduplicate", "max_per_problem"]
    assert [step["filter"] for step in curated.funnel] == names
    assert [step["in"] for step in curated.funnel] == [len(rows), *(step["out"] for step in curated.funnel[:-1])]
    assert curated.funnel[-1]["out"] == len(curated.examples) == len(rows) - len(curated.dropped)
    order = [t.key for t in traces]
    assert [order.index(str(e.trace_key)) for e in curated.examples] == sorted(
        order.index(str(e.trace_key)) for e in curated.examples
    )
    assert {e.question for e in curated.examples} == {d.question for d in curated.direct_examples}
    assert "0 + 1?" not in {e.question for e in curated.examples}
    assert sift(problems, traces, verdicts, config, ["0 + 1?"]) == curated
    again = [t for t in traces if t.key in {e.trace_key for e in curated.examples}]
    assert len(curate(problems, again, [CORRECT] * len(again), config, ["0 + 1?"])[0]) == len(again), "idempotent"


def test_repetition_is_the_share_of_lines_seen_before() -> None:
    assert repetition("a\nb\n\nc") == 0
    assert repetition("a\na\n a \nb") == 0.5
    assert repetition("") == 0


# --- decontamination --------------------------------------------------------------------------------------------------

AIME = (
    "Every morning Aya goes for a nine kilometer long walk and stops at a coffee shop afterwards. When she walks at a "
    "constant speed of s kilometers per hour, the walk takes her 4 hours, including t minutes spent in the coffee shop."
)
SHORT = "How many positive divisors does the number 2024 have?"


def match(prompt: str, held_out: list[str], training: list[Problem] | None = None, grader: Any = "math") -> str | None:
    return HeldOutQuestions(held_out, training or []).match(problem(prompt, grader=grader))


def test_the_same_question_is_found_in_any_dress() -> None:
    for dressed in (SHORT, SHORT.upper(), SHORT.replace(" ", "\n "), SHORT.replace("2024", "２０２４")):
        for grader in ("math", "reasoning_gym"):
            assert match(dressed, [SHORT], grader=grader) == f"is the held-out question {SHORT!r}"
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
        index = HeldOutQuestions([p.prompt for p in held_out], train)
        assert not [found for p in train if (found := index.match(p))]
        assert all(index.match(p) for p in held_out)
