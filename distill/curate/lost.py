"""Samples of a run of which none became an example: what is wrong with them, in words, and what to set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from distill.curate.candidates import Candidate, DroppedTrace
from distill.recipe import Reasoning
from distill.verify.extract import CLOSE, OPEN, answer_of, has_tags

# What the samples have in common, after "20 of 20 samples", and what helps.
CUT_OFF = ("were cut off at the token limit", "raise generate.sampling.max_tokens")
ASK = "ask for one in the problems, in teacher.prompt_suffix or in teacher.system_prompt"
NO_BOX = ("have no \\boxed{} after the reasoning", ASK)
NO_PROGRAM = ("have no ```python block after the reasoning", ASK)
NO_REASONING = ("have no closed reasoning", "curate.complete_reasoning=false learns from them as they are")
UNTAGGED = ("have no closed reasoning", "teacher.reasoning=plain takes the whole text for it")
TAGGED = ("have reasoning tags", "set teacher.reasoning=tagged")
OTHER_ANSWER = ("have another answer than the reference", "see audit.json, or set curate.correct_only=false")
UNGRADED = ("could not be graded in time", "raise verify.timeout_s and verify.memory_mib")
UNVERIFIABLE = ("have no answer that rules can decide", "give the problems references, or set verify.judge")
OF_FILTER = {
    "hint_leak": ("speak of the hint that they had", "raise generate.hints.num_samples"),
    "length": ("are too long", "raise curate.max_tokens"),
    "language": ("are in another language", "see curate.language"),
    "repetition": ("repeat themselves", "raise curate.max_repetition"),
    "loop": ("are loops", "curate.drop_loops=false keeps them"),
    "decontaminate": ("have a question of an evaluation suite", "take other problems, or see curate.decontaminate"),
    "difficulty": ("are of problems outside the bounds", "widen curate.difficulty"),
    "best_of_n": ("are not correct", "set curate.best_of_n=null"),
    "mix": ("are of sources without a share", "see curate.mix"),
}
SHOWN = 4


class LostSamples:
    """Counts what is wrong with each; a sample may have several faults."""

    def __init__(self, reasoning: Reasoning) -> None:
        self._reasoning: Reasoning = reasoning
        self._num_samples = 0
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, candidate: Candidate, dropped: DroppedTrace) -> None:
        self._num_samples += 1
        self._counts.update(_faults(candidate, dropped, self._reasoning))

    def summary(self) -> str:
        r"""Say it in one line, the most frequent first.

        `20 of 20 samples have no \boxed{} after the reasoning (ask for ...), 3 were cut off at the token limit (...)`
        """
        parts = [f"{count} {what} ({remedy})" for (what, remedy), count in self._counts.most_common(SHOWN)]
        if not parts:
            return "generation left none"
        number, _, rest = parts[0].partition(" ")
        return ", ".join([f"{number} of {self._num_samples} samples {rest}", *parts[1:]])


def _faults(candidate: Candidate, dropped: DroppedTrace, reasoning: Reasoning) -> Iterator[tuple[str, str]]:
    problem, trace, verdict = candidate
    if dropped.filter not in ("verdict", "complete_reasoning"):
        yield OF_FILTER.get(dropped.filter, (f"went with the filter {dropped.filter!r}", "see dropped.parquet"))
        return
    if answer_of(trace.text, problem.grader) is None:
        yield NO_PROGRAM if problem.grader == "code" else NO_BOX
    if trace.finish_reason == "length":
        yield CUT_OFF
    tagged = has_tags(trace.text)
    if reasoning == "plain":
        if tagged:
            yield TAGGED
    elif not tagged:
        yield UNTAGGED
    elif not trace.text.startswith(OPEN) or CLOSE not in trace.text:
        yield NO_REASONING
    if verdict.state == "wrong" and verdict.extracted is not None:
        yield OTHER_ANSWER
    elif verdict.state == "unverifiable":
        yield UNVERIFIABLE
    elif verdict.state in ("timeout", "infra_error"):
        yield UNGRADED
