"""Filters that judge one sample by itself: verdict, completeness, hints, length, language, repetition, contamination.

Each is a function from a candidate to the reason why it is dropped, or None. They run in the order in which
`single_filters` yields them, before the filters that compare samples with one another (`distill.curate.selection`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from distill.curate.candidates import Candidate
from distill.curate.hint_leaks import hint_leak
from distill.decontaminate import HeldOutQuestions
from distill.recipe import CurateConfig, Reasoning
from distill.records import Problem
from distill.verify.extract import answer_of, has_tags, reasoning_is_complete
from distill.verify.language import share_of_language
from distill.verify.repetition import loop

Filter = Callable[[Candidate], str | None]


def single_filters(
    config: CurateConfig,
    problems: Mapping[str, Problem],
    held_out: Mapping[str, Iterable[str]],
    reasoning: Reasoning,
    *,
    hints: bool,
) -> Iterator[tuple[str, Filter]]:
    """The filters that are on, in their order. `held_out` maps a suite to its questions; `hints`: some had one."""
    if config.correct_only:
        yield "verdict", _not_correct
    if config.complete_reasoning:
        yield "complete_reasoning", _not_complete if reasoning == "tagged" else _not_complete_and_plain
    if hints:
        yield "hint_leak", _speaking_of_hint
    if config.max_tokens is not None:
        yield "length", _longer_than(config.max_tokens)
    if config.language is not None:
        yield "language", _not_in(config.language, config.min_language_share)
    if config.max_repetition is not None:
        yield "repetition", _more_repetitive_than(config.max_repetition)
    if config.drop_loops:
        yield "loop", _looping
    if config.decontaminate:
        questions = HeldOutQuestions(held_out, problems.values(), min_containment=config.min_containment)
        yield "decontaminate", _held_out(questions)


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
    complete = reasoning_is_complete(candidate.trace.text, candidate.problem.grader)
    return None if complete else "no closed reasoning with an answer after it"


def _not_complete_and_plain(candidate: Candidate) -> str | None:
    """A text that is finished and has an answer; tags of its own would nest when it is put between tags."""
    trace, grader = candidate.trace, candidate.problem.grader
    if trace.finish_reason != "stop":
        return "cut off at the token limit"
    if has_tags(trace.text):
        return "has reasoning tags, and teacher.reasoning is plain"
    return "no answer" if answer_of(trace.text, grader) is None else None


def _speaking_of_hint(candidate: Candidate) -> str | None:
    leak = hint_leak(candidate.trace.text) if candidate.trace.hinted else None
    return None if leak is None else f"asked with a hint, and says {shorten(leak)!r}"


def _longer_than(max_tokens: int) -> Filter:
    def reason(candidate: Candidate) -> str | None:
        return f"{candidate.trace.num_tokens} tokens" if candidate.trace.num_tokens > max_tokens else None

    return reason


def _more_repetitive_than(max_repetition: float) -> Filter:
    def reason(candidate: Candidate) -> str | None:
        share = repetition(candidate.trace.text)
        return f"{share:.0%} of the lines are repeated" if share > max_repetition else None

    return reason


def _not_in(language: str, min_share: float) -> Filter:
    def reason(candidate: Candidate) -> str | None:
        share = share_of_language(candidate.trace.text, language)
        return f"{share:.0%} of the words are {language}" if share is not None and share < min_share else None

    return reason


def _looping(candidate: Candidate) -> str | None:
    text = candidate.trace.text
    found = loop(text)
    if found is None:
        return None
    return f"{found.share:.0%} is a loop, {found.repeats:.0f} times {shorten(text[found.start : found.end])!r}"


def shorten(text: str) -> str:
    """One line of at most 80 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}..."


def _held_out(questions: HeldOutQuestions) -> Filter:
    """Each question is compared once, however many samples it has."""
    found: dict[str, str | None] = {}

    def reason(candidate: Candidate) -> str | None:
        name = candidate.trace.problem_id
        if name not in found:
            found[name] = questions.match(candidate.problem)
        return found[name]

    return reason
