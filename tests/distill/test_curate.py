"""Each filter alone, and what holds of all of them together: purity, order, counts, idempotence."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from distill.curate import repetition
from distill.errors import DataError, RecipeError
from distill.recipe import BestOfN, CurateConfig, Difficulty, Mix, NearDuplicates
from distill.records import Problem, Trace, Verdict
from tests.distill.curated import curate

OFF = CurateConfig(
    correct_only=False,
    complete_reasoning=False,
    max_repetition=None,
    drop_loops=False,
    decontaminate=False,
    deduplicate=False,
)
CORRECT = Verdict(state="correct", extracted="2")


def problem(prompt: str = "1 + 1?", answer: str | None = "2", grader: Any = "math", source: str = "t") -> Problem:
    return Problem(prompt=prompt, answer=answer, grader=grader, source=source)


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
        (
            on(language="en"),
            {"text": "Wir rechnen die Summe aus, und dann ist es schon gut."},
            CORRECT,
            "language",
        ),
        (on(max_repetition=0.5), {"text": "a\n" * 9}, CORRECT, "repetition"),
        (on(drop_loops=True), {"text": "Wait, let me check that once more. " * 30}, CORRECT, "loop"),
    ],
)
def test_each_filter_drops_what_it_names_and_only_when_on(
    config: CurateConfig, changed: dict[str, Any], verdict: Verdict, name: str
) -> None:
    p = problem()
    traces = [trace(p, 0), trace(p, 1, **changed)]
    examples, direct, funnel, dropped = curate([p], traces, [CORRECT, verdict], config, {})
    assert [example.trace_key for example in examples] == [traces[0].key]
    assert [(d.question, d.completion, d.trace_key) for d in direct] == [(p.prompt, "\\boxed{2}", None)]
    assert funnel == [{"filter": name, "in": 2, "out": 1}]
    assert [(one.key, one.filter) for one in dropped] == [(traces[1].key, name)]
    assert len(curate([p], traces, [CORRECT, verdict], OFF, {})[0]) == 2


def test_deduplicate_keeps_the_first_and_max_per_problem_counts_what_is_left() -> None:
    p, q = problem(), problem(" 1  + 1? ")
    traces = [trace(p, 0), trace(p, 1, trace(p, 0).text), trace(p, 2), trace(p, 3), trace(q, 0, trace(p, 0).text)]
    curated = curate([p, q], traces, [CORRECT] * 5, on(deduplicate=True, max_per_problem=2), {})
    assert [example.trace_key for example in curated.examples] == [traces[0].key, traces[2].key]
    assert curated.funnel == [
        {"filter": "deduplicate", "in": 5, "out": 3},
        {"filter": "max_per_problem", "in": 3, "out": 2},
    ]
    assert [(d.key, d.filter) for d in curated.dropped] == [
        (traces[1].key, "deduplicate"),
        (traces[3].key, "max_per_problem"),
        (traces[4].key, "deduplicate"),
    ]
    assert curated.dropped[0].detail == f"the same as sample {traces[0].key}"


def test_a_question_without_a_reference_teaches_the_answer_that_was_graded() -> None:
    p = problem(answer=None)
    curated = curate([p], [trace(p)], [Verdict(state="correct", extracted="x=2")], OFF, {})
    assert curated.direct_examples[0].completion == "\\boxed{x=2}"


def test_a_trace_without_its_problem_is_a_data_error() -> None:
    with pytest.raises(DataError, match="belongs to no problem"):
        curate([], [trace(problem())], [CORRECT], OFF, {})


SHARE = {"a": 2.0, "b": 1.0, "c": 0.0}
EVERYTHING = CurateConfig(
    max_tokens=28,
    language="en",
    difficulty=Difficulty(min_pass_rate=0.2, max_pass_rate=0.9),
    near_duplicates=NearDuplicates(of="both", threshold=0.6),
    best_of_n=BestOfN(keep=3),
    max_per_problem=2,
    mix=Mix(shares=SHARE, num_examples=9),
)
NAMES = [
    *("verdict", "complete_reasoning", "length", "language", "repetition", "loop", "decontaminate", "difficulty"),
    *("deduplicate", "near_duplicate_questions", "near_duplicate_completions", "best_of_n", "max_per_problem", "mix"),
]
WORDS = [
    "add",
    "the",
    "numbers",
    "then",
    "carry",
    "one",
    "more",
    "over",
    "to",
    "the",
    "left",
    "and",
    "write",
    "it",
    "down",
    "at",
    "once",
]
PROBLEMS = [
    problem(f"{n} + 1?", source=source) if n < 4 else problem(f"{' '.join(WORDS)} {n}?", source=source)
    for n, source in enumerate("aabbcab")
]


@st.composite
def graded(draw: st.DrawFn) -> tuple[list[Trace], list[Verdict]]:
    """Traces of seven problems, two of which ask nearly the same; their texts repeat and resemble one another."""
    traces, verdicts, next_index = [], [], dict.fromkeys(range(len(PROBLEMS)), 0)
    for _ in range(draw(st.integers(0, 25))):
        of = draw(st.integers(0, len(PROBLEMS) - 1))
        words = list(WORDS)
        for place in draw(st.lists(st.integers(0, len(WORDS) - 1), max_size=2)):
            words[place] = draw(st.sampled_from(["x", "y"]))
        text = f"<think>\n{' '.join(words)}\n</think>\n\n\\boxed{{2}}"
        traces.append(trace(PROBLEMS[of], next_index[of], text, num_tokens=draw(st.integers(1, 30))))
        verdicts.append(Verdict(state=draw(st.sampled_from(STATES))))
        next_index[of] += 1
    return traces, verdicts


STATES: list[Any] = ["correct", "correct", "correct", "wrong", "truncated", "timeout"]
HELD_OUT = {"s": ["0 + 1?"]}


@settings(max_examples=60, deadline=None)
@given(graded())
def test_counts_add_up_and_every_sample_has_one_fate(made: tuple[list[Trace], list[Verdict]]) -> None:
    traces, verdicts = made
    curated = curate(PROBLEMS, traces, verdicts, EVERYTHING, HELD_OUT)
    assert [step["filter"] for step in curated.funnel] == NAMES
    assert [step["in"] for step in curated.funnel] == [len(traces), *(step["out"] for step in curated.funnel[:-1])]
    assert curated.funnel[-1]["out"] == len(curated.examples)
    named = Counter(one.filter for one in curated.dropped)
    assert [named[step["filter"]] for step in curated.funnel] == [step["in"] - step["out"] for step in curated.funnel]
    kept = [str(example.trace_key) for example in curated.examples]
    order = [t.key for t in traces]
    assert kept == [key for key in order if key in set(kept)]
    assert [one.key for one in curated.dropped] == [key for key in order if key not in set(kept)]
    assert {e.question for e in curated.examples} == {d.question for d in curated.direct_examples}
    assert all(one.detail for one in curated.dropped)


@settings(max_examples=60, deadline=None)
@given(graded(), st.randoms(use_true_random=False))
def test_the_order_of_the_traces_decides_nothing(made: tuple[list[Trace], list[Verdict]], random: Random) -> None:
    traces, verdicts = made
    straight = curate(PROBLEMS, traces, verdicts, EVERYTHING, HELD_OUT)
    assert curate(PROBLEMS, traces, verdicts, EVERYTHING, HELD_OUT) == straight
    order = list(range(len(traces)))
    random.shuffle(order)
    problems = random.sample(PROBLEMS, len(PROBLEMS))
    shuffled = curate(problems, [traces[i] for i in order], [verdicts[i] for i in order], EVERYTHING, HELD_OUT)
    assert {e.trace_key for e in shuffled.examples} == {e.trace_key for e in straight.examples}
    assert {(d.key, d.filter) for d in shuffled.dropped} == {(d.key, d.filter) for d in straight.dropped}
    assert shuffled.funnel == straight.funnel


@settings(max_examples=60, deadline=None)
@given(graded())
def test_what_is_left_passes_again(made: tuple[list[Trace], list[Verdict]]) -> None:
    """But for difficulty, which is about samples that are no longer there."""
    traces, verdicts = made
    config = EVERYTHING.model_copy(update={"difficulty": None})
    left = {e.trace_key for e in curate(PROBLEMS, traces, verdicts, config, HELD_OUT).examples}
    again = curate(PROBLEMS, [t for t in traces if t.key in left], [CORRECT] * len(left), config, HELD_OUT)
    assert {e.trace_key for e in again.examples} == left


def test_difficulty_counts_samples_that_other_filters_drop_and_no_failure_of_ours() -> None:
    easy, half, never, lost = (problem(f"{n}?") for n in range(4))
    wrong, late = Verdict(state="wrong"), Verdict(state="timeout")
    rows = [(easy, CORRECT), (easy, CORRECT), (half, CORRECT), (half, wrong), (half, late), (never, wrong)]
    traces = [trace(of, index, num_tokens=index + 1) for index, (of, _) in enumerate(rows)]
    bounds = Difficulty(min_pass_rate=0.1, max_pass_rate=0.9)
    verdicts = [verdict for _, verdict in rows]
    curated = curate([easy, half, never, lost], traces, verdicts, on(correct_only=True, difficulty=bounds), {})
    assert [e.question for e in curated.examples] == ["1?"]
    assert [(d.filter, d.detail) for d in curated.dropped][:2] == [("difficulty", "2 of 2 samples are correct")] * 2
    alone = curate([lost], [trace(lost)], [late], on(difficulty=bounds), {})
    assert alone.dropped[0].detail == "no sample of the problem could be graded"


@pytest.mark.parametrize(("by", "left"), [("shortest", [3, 1]), ("longest", [0, 2])])
def test_best_of_n_ranks_the_correct_samples_of_a_problem_by_length(by: Any, left: list[int]) -> None:
    p = problem()
    traces = [trace(p, index, num_tokens=tokens) for index, tokens in enumerate([9, 5, 7, 2, 1])]
    verdicts = [*[CORRECT] * 4, Verdict(state="wrong")]
    curated = curate([p], traces, verdicts, on(best_of_n=BestOfN(keep=2, by=by)), {})
    assert {e.trace_key for e in curated.examples} == {traces[index].key for index in left}
    assert curated.dropped[-1].detail == "not correct"


def test_a_mix_is_reached_by_leaving_out_and_says_what_it_lacks() -> None:
    sources = {"a": 60, "b": 40, "c": 10}
    problems = [problem(f"{source}{n}?", source=source) for source, count in sources.items() for n in range(count)]
    traces = [trace(p) for p in problems]

    def left(**mix: Any) -> Counter[str]:
        config = on(mix=Mix.model_validate(mix))
        return Counter(e.source for e in curate(problems, traces, [CORRECT] * 110, config, {}).examples)

    assert left(shares={"a": 0.5, "b": 0.3, "c": 0.2}) == {"a": 25, "b": 15, "c": 10}, "c gives all it has"
    assert left(shares={"a": 1, "b": 1, "c": 0}) == {"a": 40, "b": 40}
    assert left(shares={"a": 1, "b": 1, "c": 2}, num_examples=80) == {"a": 20, "b": 20, "c": 10}, "none twice"
    with pytest.raises(RecipeError, match=r"curate\.mix\.shares: 'd' is no source of the problems; allowed: a, b, c"):
        left(shares={"a": 1, "b": 1, "c": 1, "d": 1})
    with pytest.raises(RecipeError, match=r"curate\.mix\.shares: says nothing of source 'c'"):
        left(shares={"a": 1, "b": 1})
    few = on(mix=Mix(shares={"a": 1, "b": 1}))
    with pytest.raises(DataError, match=r"curate\.mix: b: has a share in the mix, and no example is left of it"):
        curate([problems[0], problems[70]], traces[:1], [CORRECT], few, {})


def test_repetition_is_the_share_of_lines_seen_before() -> None:
    assert repetition("a\nb\n\nc") == 0
    assert repetition("a\na\n a \nb") == 0.5
    assert repetition("") == 0
