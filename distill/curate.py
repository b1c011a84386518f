"""Traces to training examples: filters in a fixed order, each a switch of CurateConfig, each counted in the funnel.

Pure: the same traces, verdicts and settings give the same examples in the same order, that of the traces. What is
dropped is dropped by one named filter, with what it saw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from distill.decontaminate import HeldOutQuestions
from distill.errors import DataError
from distill.problems.split import normalised
from distill.recipe import CurateConfig
from distill.records import Example, Problem, Record, Trace, Verdict, VerdictState
from distill.verify.extract import reasoning_is_complete


class GradedTrace(Record):
    """A verdict with the sample that it is about, as `verdicts.parquet` keeps it."""

    key: str
    problem_id: str
    sample_index: int
    state: VerdictState
    extracted: str | None
    detail: str

    @property
    def verdict(self) -> Verdict:
        return Verdict(state=self.state, extracted=self.extracted, detail=self.detail)


class Dropped(Record):
    """A trace that is no example: which filter said so, and why."""

    key: str
    problem_id: str
    filter: str
    detail: str


class Candidate(NamedTuple):
    problem: Problem
    trace: Trace
    verdict: Verdict


class Curated(NamedTuple):
    examples: list[Example]
    direct_examples: list[Example]
    funnel: list[dict[str, Any]]
    dropped: list[Dropped]


Filter = Callable[[Candidate], str | None]  # why the candidate is dropped, or None


def curate(
    problems: Iterable[Problem],
    traces: Sequence[Trace],
    verdicts: Sequence[Verdict],
    config: CurateConfig,
    held_out_prompts: Iterable[str],
) -> tuple[list[Example], list[Example], list[dict[str, Any]]]:
    """Examples, their bare-answer twins (`\\boxed{answer}`, one a question), the funnel (`[{"filter", "in", "out"}]`).

    `verdicts` belong to `traces` one by one. Raises DataError for a trace whose problem is not there.
    """
    curated = sift(problems, traces, verdicts, config, held_out_prompts)
    return curated.examples, curated.direct_examples, curated.funnel


def sift(
    problems: Iterable[Problem],
    traces: Sequence[Trace],
    verdicts: Sequence[Verdict],
    config: CurateConfig,
    held_out_prompts: Iterable[str],
) -> Curated:
    """As `curate`, and with what was dropped and why."""
    by_id = {problem.id: problem for problem in problems}
    kept = [_candidate(by_id, trace, verdict) for trace, verdict in zip(traces, verdicts, strict=True)]
    funnel: list[dict[str, Any]] = []
    dropped: list[Dropped] = []
    for name, reason_to_drop in _filters(config, by_id, held_out_prompts):
        passed = []
        for candidate in kept:
            reason = reason_to_drop(candidate)
            if reason is None:
                passed.append(candidate)
            else:
                key, problem_id = candidate.trace.key, candidate.trace.problem_id
                dropped.append(Dropped(key=key, problem_id=problem_id, filter=name, detail=reason))
        funnel.append({"filter": name, "in": len(kept), "out": len(passed)})
        kept = passed
    return Curated([_example(c) for c in kept], _direct_examples(kept), funnel, dropped)


def _filters(
    config: CurateConfig, problems: Mapping[str, Problem], held_out_prompts: Iterable[str]
) -> Iterable[tuple[str, Filter]]:
    """The filters that are on, in their order. Those that count what passes are made when the ones before have run."""
    if config.correct_only:
        yield "verdict", _not_correct
    if config.complete_reasoning:
        yield "complete_reasoning", _not_complete
    if config.max_tokens is not None:
        yield "length", _longer_than(config.max_tokens)
    if config.max_repetition is not None:
        yield "repetition", _more_repetitive_than(config.max_repetition)
    if config.decontaminate:
        held_out = HeldOutQuestions(held_out_prompts, problems.values())
        found = {problem.id: held_out.match(problem) for problem in problems.values()}
        yield "decontaminate", lambda candidate: found[candidate.trace.problem_id]
    if config.deduplicate:
        yield "deduplicate", _seen_before()
    if config.max_per_problem is not None:
        yield "max_per_problem", _beyond(config.max_per_problem)


def repetition(text: str) -> float:
    """Share of a text's lines (empty ones left out) that repeat an earlier line."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def _not_correct(candidate: Candidate) -> str | None:
    verdict = candidate.verdict
    return None if verdict.correct else f"{verdict.state}: {verdict.detail}".removesuffix(": ")


def _not_complete(candidate: Candidate) -> str | None:
    if candidate.trace.finish_reason != "stop":
        return "cut off at the token limit"
    return None if reasoning_is_complete(candidate.trace.text) else "no closed reasoning with an answer after it"


def _longer_than(max_tokens: int) -> Filter:
    def reason(candidate: Candidate) -> str | None:
        return f"{candidate.trace.num_tokens} tokens" if candidate.trace.num_tokens > max_tokens else None

    return reason


def _more_repetitive_than(max_repetition: float) -> Filter:
    def reason(candidate: Candidate) -> str | None:
        share = repetition(candidate.trace.text)
        return f"{share:.0%} of the lines are repeated" if share > max_repetition else None

    return reason


def _seen_before() -> Filter:
    seen: dict[tuple[str, str], str] = {}

    def reason(candidate: Candidate) -> str | None:
        what = normalised(candidate.problem.prompt), candidate.trace.text.strip()
        first = seen.setdefault(what, candidate.trace.key)
        return None if first == candidate.trace.key else f"the same as sample {first}"

    return reason


def _beyond(max_per_problem: int) -> Filter:
    taken: Counter[str] = Counter()

    def reason(candidate: Candidate) -> str | None:
        taken[candidate.trace.problem_id] += 1
        return f"{max_per_problem} are enough" if taken[candidate.trace.problem_id] > max_per_problem else None

    return reason


def _candidate(problems: Mapping[str, Problem], trace: Trace, verdict: Verdict) -> Candidate:
    problem = problems.get(trace.problem_id)
    if problem is None:
        raise DataError("belongs to no problem that is here", where="traces", field=trace.key)
    return Candidate(problem, trace, verdict)


def _example(candidate: Candidate) -> Example:
    return Example(
        question=candidate.problem.prompt,
        completion=candidate.trace.text,
        problem_id=candidate.trace.problem_id,
        trace_key=candidate.trace.key,
        source=candidate.problem.source,
    )


def _direct_examples(kept: Sequence[Candidate]) -> list[Example]:
    """One a question: the reference answer, or, where a question has none of its own, the answer that was graded."""
    examples: dict[str, Example] = {}
    for problem, trace, verdict in kept:
        answer = problem.answer if problem.answer is not None else verdict.extracted
        if answer is not None and problem.id not in examples:
            examples[problem.id] = Example(
                question=problem.prompt,
                completion=f"\\boxed{{{answer}}}",
                problem_id=trace.problem_id,
                trace_key=None,
                source=problem.source,
            )
    return list(examples.values())
