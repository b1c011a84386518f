"""Is a written question a new one, and nobody's of the evaluation? Decided before an answer to it is paid for.

The screen sees the questions in the order of the attempts and remembers those that it let through, so that what it says
of the first thousand does not depend on how many follow.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from distill.decontaminate import SHORT, HeldOutQuestions
from distill.records import Problem
from distill.synthesis.plan import Attempt
from distill.words import runs, symbols_of, words_of

COPY_SHARE = 0.5
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


class Screen:
    """`held_out` maps a suite to its questions. `seeds` is gone through twice."""

    def __init__(
        self, held_out: Mapping[str, Iterable[str]], seeds: Iterable[Problem], *, min_containment: float | None
    ) -> None:
        seeds = list(seeds)
        self._questions = HeldOutQuestions(held_out, seeds, min_containment=min_containment)
        self._seen = {_digest(seed.prompt) for seed in seeds}

    def of_evaluation(self, problem: Problem) -> str | None:
        """What the question has in common with one of the evaluation, or None."""
        return self._questions.match(problem)

    def drop(self, question: Problem, attempt: Attempt) -> tuple[str, str] | None:
        """The filter that drops the question, with its reason; None where it stays, which is remembered."""
        if attempt.mode == "numbers_varied" and _numbers(question.prompt) == _numbers(attempt.seed.prompt):
            return "numbers_varied", "its numbers are those of the seed"
        if (found := self.of_evaluation(question)) is not None:
            return "decontaminate", found
        digest = _digest(question.prompt)
        if digest in self._seen:
            return "deduplicate", "the same as a seed or an earlier question"
        if attempt.mode != "numbers_varied" and (share := _copied(question.prompt, attempt.seed.prompt)) >= COPY_SHARE:
            return "deduplicate", f"holds {share:.0%} of the seed's runs of {SHORT} words"
        self._seen.add(digest)
        return None


def _copied(question: str, seed: str) -> float:
    """Share of the seed's runs of words that the question repeats: small models write off where they should write."""
    of_seed = set(runs(words_of(seed), SHORT))
    return len(of_seed & set(runs(words_of(question), SHORT))) / max(len(of_seed), 1)


def _digest(text: str) -> bytes:
    return hashlib.blake2b("\0".join(symbols_of(text)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _numbers(text: str) -> Counter[str]:
    return Counter(NUMBER.findall(text))
