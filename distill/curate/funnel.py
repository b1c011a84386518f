"""The funnel: all filters in their one order, what each lets through, and why each sample that is not there is not.

    of one sample    verdict, complete_reasoning, hint_leak, length, language, repetition, loop, decontaminate
    of the set       difficulty, deduplicate, near_duplicate_questions, near_duplicate_completions, best_of_n,
                     max_per_problem, mix

Pure: the same problems, traces, verdicts and settings give the same result, whatever order the traces come in. Nothing
holds all texts: the traces are read once for the filters, once more where near-duplicates are to be measured, and once
by who writes the result; between these readings a sample is some hundred bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from distill.curate.candidates import Candidate, DroppedTrace, Sample, sample_of
from distill.curate.filters import single_filters
from distill.curate.form import ExampleForm
from distill.curate.mix import check_sources, outside_mix
from distill.curate.near_duplicates import Signatures, near_duplicates, reasons
from distill.curate.selection import PassRates, Reasons, beyond, duplicates, not_best, outside_difficulty
from distill.errors import DataError
from distill.recipe import CurateConfig, NearDuplicates, Reasoning
from distill.records import Example, Problem, Trace, Verdict

Graded = Callable[[], Iterable[tuple[Trace, Verdict]]]  # the traces from the first one on, at every call
HeldOut = Mapping[str, Iterable[str]]  # suite -> questions


class FilterResult(NamedTuple):
    """`funnel` is `[{"filter", "in", "out"}]`, `dropped` maps a trace's position to the filter and its reason."""

    funnel: list[dict[str, Any]]
    dropped: dict[int, tuple[str, str]]
    num_kept: int


def filter_traces(
    problems: Mapping[str, Problem],
    graded: Graded,
    config: CurateConfig,
    held_out: HeldOut,
    reasoning: Reasoning,
    *,
    hints: bool = False,
) -> FilterResult:
    """Run every filter that is on, over texts whose reasoning is marked so. `hints`: some were asked with one.

    Raises DataError for a trace whose problem is not there and for a mix that cannot be made, RecipeError for shares
    of sources that there are not.
    """
    if config.mix is not None:
        check_sources(config.mix, {problem.source for problem in problems.values()})
    filters = list(single_filters(config, problems, held_out, reasoning, hints=hints))
    passed = [0] * (len(filters) + 1)
    dropped: dict[int, tuple[str, str]] = {}
    samples: list[Sample] = []
    rates = PassRates()
    completions = _signatures(config.near_duplicates, "completions")
    for position, candidate in enumerate(_candidates(problems, graded())):
        passed[0] += 1
        if not candidate.trace.hinted:  # which says nothing of how hard the problem is
            rates.add(candidate.trace.problem_id, candidate.verdict)
        for number, (name, reason_to_drop) in enumerate(filters, start=1):
            reason = reason_to_drop(candidate)
            if reason is not None:
                dropped[position] = name, reason
                break
            passed[number] += 1
        else:
            samples.append(sample_of(candidate, position))
            if completions is not None:
                completions.add(position, candidate.trace.text)
    funnel = [
        {"filter": name, "in": passed[number], "out": passed[number + 1]} for number, (name, _) in enumerate(filters)
    ]
    for name, filter_ in _set_filters(config, problems, graded, rates, completions):
        found = filter_(samples)
        dropped.update((position, (name, reason)) for position, reason in found.items())
        left = [sample for sample in samples if sample.position not in found]
        funnel.append({"filter": name, "in": len(samples), "out": len(left)})
        samples = left
    return FilterResult(funnel, dropped, len(samples))


def outcomes(
    problems: Mapping[str, Problem],
    graded: Iterable[tuple[Trace, Verdict]],
    dropped: Mapping[int, tuple[str, str]],
    form: ExampleForm,
) -> Iterator[tuple[Candidate, Example | DroppedTrace]]:
    """Tell what became of each trace, in their order: an Example or a DroppedTrace.

    The first example of a question is followed by its twin with the bare answer (`trace_key` None): the reference,
    or, where a question has none of its own, the answer that was graded.
    """
    answered: set[str] = set()
    for position, candidate in enumerate(_candidates(problems, graded)):
        problem, trace, verdict = candidate
        if position in dropped:
            name, reason = dropped[position]
            yield candidate, DroppedTrace(key=trace.key, problem_id=trace.problem_id, filter=name, detail=reason)
            continue
        yield candidate, form.reasoned(problem, trace, verdict)
        answer = problem.answer if problem.answer is not None else verdict.extracted
        if answer is not None and trace.problem_id not in answered:
            answered.add(trace.problem_id)
            yield candidate, form.bare(problem, answer, verdict)


def _set_filters(
    config: CurateConfig,
    problems: Mapping[str, Problem],
    graded: Graded,
    rates: PassRates,
    completions: Signatures | None,
) -> Iterator[tuple[str, Callable[[Sequence[Sample]], Reasons]]]:
    if config.difficulty is not None:
        yield "difficulty", outside_difficulty(config.difficulty, rates)
    if config.deduplicate:
        yield "deduplicate", duplicates
    questions = _signatures(config.near_duplicates, "questions")
    if questions is not None:
        yield "near_duplicate_questions", lambda samples: _like_questions(samples, problems, questions)
    if completions is not None:
        yield (
            "near_duplicate_completions",
            lambda samples: _like_completions(samples, problems, graded, completions),
        )
    if config.best_of_n is not None:
        yield "best_of_n", not_best(config.best_of_n)
    if config.max_per_problem is not None:
        yield "max_per_problem", beyond(config.max_per_problem)
    if config.mix is not None:
        yield "mix", outside_mix(config.mix)


def _signatures(config: NearDuplicates | None, what: str) -> Signatures | None:
    return Signatures(config) if config is not None and config.of in (what, "both") else None


def _like_questions(samples: Sequence[Sample], problems: Mapping[str, Problem], signatures: Signatures) -> Reasons:
    """Drop questions that are nearly the same as another; the one with the lowest id stays, with all its samples.

    Procedural questions take no part: those of a family are alike by construction, and differ in what counts.
    """
    names = sorted({s.problem_id for s in samples if problems[s.problem_id].grader != "reasoning_gym"})
    for name in names:
        signatures.add(name, problems[name].prompt)
    gone = near_duplicates(signatures, names, lambda wanted: ((name, problems[name].prompt) for name in wanted))
    found = reasons(gone, "the question")
    return {sample.position: found[sample.problem_id] for sample in samples if sample.problem_id in found}


def _like_completions(
    samples: Sequence[Sample], problems: Mapping[str, Problem], graded: Graded, signatures: Signatures
) -> Reasons:
    """Drop completions that are nearly the same as another; the one with precedence stays.

    Completions of procedural problems are compared within one problem alone, for the reason above.
    """
    by_position = {sample.position: sample for sample in samples}

    def comparable(one: int, other: int) -> bool:
        problem_id = by_position[one].problem_id
        return problem_id == by_position[other].problem_id or "reasoning_gym" not in (
            problems[problem_id].grader,
            problems[by_position[other].problem_id].grader,
        )

    def texts(wanted: frozenset[int]) -> Iterator[tuple[int, str]]:
        return ((position, trace.text) for position, (trace, _) in enumerate(graded()) if position in wanted)

    names = [sample.position for sample in sorted(samples, key=lambda sample: sample.precedence)]
    gone = near_duplicates(signatures, names, texts, comparable=comparable)
    named = {name: (by_position[other].key, similarity) for name, (other, similarity) in gone.items()}
    return reasons(named, "sample")


def _candidates(problems: Mapping[str, Problem], graded: Iterable[tuple[Trace, Verdict]]) -> Iterator[Candidate]:
    for trace, verdict in graded:
        problem = problems.get(trace.problem_id)
        if problem is None:
            raise DataError("belongs to no problem that is here", where="traces", field=trace.key)
        yield Candidate(problem, trace, verdict)
