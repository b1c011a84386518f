"""Is a training question one of the evaluation's? Three tests, the strictest that fits the question.

- *Exact*: the same words and symbols, whatever the case, the spacing, the Unicode form. Always.
- *Contained*: a held-out question of 8 to 12 words occurs whole, word for word, in the training question.
- *Overlap*: a held-out question of 13 words or more shares a run of 13 words (the usual n-gram rule; GPT-3, appendix C,
  arXiv 2005.14165) that is not boilerplate. Boilerplate is a run that two held-out questions share, or that more than
  20 training questions (and 0.1% of them) contain: "where m and n are relatively prime positive integers".

Procedural questions (reasoning-gym) get the exact test alone: all questions of a family share their template and parts
of their numbers without sharing the answer, and their split is made by construction, from the question's own hash.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from distill.records import Problem

NUM_WORDS = 13
MIN_WORDS = 8
BOILERPLATE_QUESTIONS = 20
BOILERPLATE_SHARE = 0.001
WORD = re.compile(r"\w+")
SYMBOL_OR_WORD = re.compile(r"\w+|[^\w\s]")

Words = tuple[str, ...]


class HeldOutQuestions:
    """The evaluation's questions, indexed. `training` is looked through once, for its boilerplate."""

    def __init__(self, prompts: Iterable[str], training: Iterable[Problem]) -> None:
        prompts = list(prompts)
        self._exact = {_symbols(prompt): prompt for prompt in prompts}
        self._runs: dict[Words, str] = {}
        shared: set[Words] = set()
        for prompt in self._exact.values():
            words = _words(prompt)
            runs = (
                set(_runs(words, NUM_WORDS)) if len(words) >= NUM_WORDS else {words} if len(words) >= MIN_WORDS else ()
            )
            for run in runs:
                if run in self._runs:
                    shared.add(run)
                self._runs[run] = prompt
        self._lengths = sorted({len(run) for run in self._runs})
        for run in shared | self._boilerplate(training):
            del self._runs[run]

    def match(self, problem: Problem) -> str | None:
        """What the question has in common with a held-out one, or None."""
        if (same := self._exact.get(_symbols(problem.prompt))) is not None:
            return f"is the held-out question {_short(same)}"
        if problem.grader == "reasoning_gym":
            return None
        for run in self._candidates(problem):
            if run in self._runs:
                return f"shares {' '.join(run)!r} with the held-out question {_short(self._runs[run])}"
        return None

    def _boilerplate(self, training: Iterable[Problem]) -> set[Words]:
        seen: Counter[Words] = Counter()
        questions = {problem.prompt: problem for problem in training if problem.grader != "reasoning_gym"}
        for problem in questions.values():
            seen.update({run for run in self._candidates(problem) if run in self._runs and len(run) == NUM_WORDS})
        limit = max(BOILERPLATE_QUESTIONS, BOILERPLATE_SHARE * len(questions))
        return {run for run, count in seen.items() if count > limit}

    def _candidates(self, problem: Problem) -> Iterator[Words]:
        words = _words(problem.prompt)
        for length in self._lengths:
            yield from _runs(words, length)


def _words(text: str) -> Words:
    return tuple(WORD.findall(_folded(text)))


def _symbols(text: str) -> Words:
    return tuple(SYMBOL_OR_WORD.findall(_folded(text)))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _runs(words: Words, length: int) -> Iterator[Words]:
    return (words[start : start + length] for start in range(len(words) - length + 1))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 80 else f"{line[:77]}...")
