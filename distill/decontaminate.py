"""Is a training question one of the evaluation's? Four tests, from the strictest on; the first that says so is named.

- *Exact*: the same words and symbols, whatever the case, the spacing, the Unicode form. Always.
- *Contained*: a held-out question of 8 to 12 words occurs whole, word for word, in the training question.
- *13-gram overlap*: a held-out question of 13 words or more shares a run of 13 words (the usual n-gram rule; GPT-3,
  appendix C, arXiv 2005.14165) that is not boilerplate.
- *8-gram containment*: of the held-out question's runs of 8 words, boilerplate left out, the training question holds at
  least a given share (after Llama 3, section 5.1.4, arXiv 2407.21783): what was reworded in places, or given other
  numbers, has no run of 13 left. Needs 13 words, and 3 runs that are no boilerplate.

Boilerplate is a run that two different held-out questions share, or that more than 20 training questions (and 0.1% of
them) contain: "where m and n are relatively prime positive integers". Two held-out questions that are copies of one
another, as suites that overlap have them, make nothing boilerplate.

Procedural questions (reasoning-gym) get the exact test alone: all questions of a family share their template and parts
of their numbers without sharing the answer, and their split is made by construction, from the question's own hash.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from distill.records import Problem
from distill.words import Words, runs, symbols_of, words_of

LeakTest = Literal["exact", "contained", "13-gram", "8-gram"]

LONG, SHORT = 13, 8  # words a run
MIN_RUNS = 3  # of 8 words, that are no boilerplate: fewer are no evidence
COPY_SHARE = 0.8  # of the shorter question's runs of 8 words
BOILERPLATE_QUESTIONS = 20
BOILERPLATE_SHARE = 0.001


class HeldOutQuestion(NamedTuple):
    suite: str
    prompt: str
    words: Words
    grams: frozenset[Words]  # runs of 8 words

    def __str__(self) -> str:
        line = " ".join(self.prompt.split())
        return f"{line if len(line) <= 80 else f'{line[:77]}...'!r} of {self.suite}"


class Leak(NamedTuple):
    """What a text has in common with a held-out question; `words` are folded, `share` is that of 8-word runs."""

    question: HeldOutQuestion
    test: LeakTest
    words: Words
    share: float = 1.0

    def __str__(self) -> str:
        text = " ".join(self.words)
        if self.test == "exact":
            return f"is the held-out question {self.question}"
        if self.test == "8-gram":
            held = f"holds {self.share:.0%} of the runs of 8 words, with {text!r}"
            return f"{held}, of the held-out question {self.question}"
        return f"shares {text!r} with the held-out question {self.question}"


class HeldOutQuestions:
    """The questions of every suite, indexed. `training` is looked through once, for its boilerplate.

    `min_containment` is the share of 8-word runs from which a question counts as contained; None leaves that test out.
    """

    def __init__(
        self, held_out: Mapping[str, Iterable[str]], training: Iterable[Problem], *, min_containment: float | None
    ) -> None:
        self._min_containment = min_containment
        self._exact: dict[Words, tuple[HeldOutQuestion, ...]] = {}
        for suite, prompts in held_out.items():
            for prompt in dict.fromkeys(prompts):
                words, symbols = words_of(prompt), symbols_of(prompt)
                question = HeldOutQuestion(suite, prompt, words, frozenset(runs(words, SHORT)))
                self._exact[symbols] = (*self._exact.get(symbols, ()), question)
        questions = [question for alike in self._exact.values() for question in alike]
        self._runs = _owners((question, _telling_runs(question)) for question in questions)
        self._grams: dict[Words, tuple[HeldOutQuestion, ...]] = {}
        if min_containment is not None:
            self._grams = _owners((question, question.grams) for question in questions if len(question.words) >= LONG)
        self._lengths = sorted({len(run) for run in self._runs})
        boilerplate = self._boilerplate(training)
        for index in (self._runs, self._grams):
            for run in boilerplate & index.keys():
                del index[run]
        self._num_grams = Counter(id(owner) for owners in self._grams.values() for owner in owners)

    def match(self, problem: Problem) -> str | None:
        """Return what the question has in common with a held-out one, in words and with the text, or None."""
        leak = next(self.leaks(problem.prompt, procedural=problem.grader == "reasoning_gym"), None)
        return None if leak is None else str(leak)

    def leaks(self, text: str, *, procedural: bool = False) -> Iterator[Leak]:
        """Yield each held-out question that the text holds once, by the strictest test that says so.

        `procedural`: the exact test alone.
        """
        found: set[int] = set()
        for question in self._exact.get(symbols_of(text), ()):
            found.add(id(question))
            yield Leak(question, "exact", question.words)
        if procedural:
            return
        words = words_of(text)
        for run in self._candidates(words):
            for question in self._runs.get(run, ()):
                if id(question) not in found:
                    found.add(id(question))
                    yield Leak(question, "13-gram" if len(run) == LONG else "contained", run)
        yield from (leak for leak in self._containments(words) if id(leak.question) not in found)

    def _containments(self, words: Words) -> Iterator[Leak]:
        found: dict[int, set[Words]] = defaultdict(set)
        for gram in runs(words, SHORT):
            for owner in self._grams.get(gram, ()):
                found[id(owner)].add(gram)
        for identity, grams in found.items():
            share, of = len(grams) / self._num_grams[identity], self._num_grams[identity]
            assert self._min_containment is not None
            if of >= MIN_RUNS and share >= self._min_containment:
                owner = next(owner for owner in self._grams[next(iter(grams))] if id(owner) == identity)
                yield Leak(owner, "8-gram", _longest(owner.words, grams), share)

    def _boilerplate(self, training: Iterable[Problem]) -> set[Words]:
        """Runs of the index that many training questions have; runs of fewer than 13 words that stand for a whole
        question never are."""
        seen: Counter[Words] = Counter()
        questions = {problem.prompt for problem in training if problem.grader != "reasoning_gym"}
        for prompt in questions:
            words = words_of(prompt)
            seen.update({run for run in self._candidates(words) if len(run) == LONG and run in self._runs})
            seen.update({gram for gram in runs(words, SHORT) if gram in self._grams})
        limit = max(BOILERPLATE_QUESTIONS, BOILERPLATE_SHARE * len(questions))
        return {run for run, count in seen.items() if count > limit and not self._is_whole(run)}

    def _is_whole(self, run: Words) -> bool:
        return run in self._runs and len(run) < LONG

    def _candidates(self, words: Words) -> Iterator[Words]:
        for length in self._lengths:
            yield from runs(words, length)


def _telling_runs(question: HeldOutQuestion) -> frozenset[Words]:
    """Runs any of which gives the question away: 13 words, or all of a question of 8 to 12."""
    if len(question.words) >= LONG:
        return frozenset(runs(question.words, LONG))
    return frozenset([question.words] if len(question.words) >= SHORT else [])


def _owners(
    runs_of: Iterable[tuple[HeldOutQuestion, frozenset[Words]]],
) -> dict[Words, tuple[HeldOutQuestion, ...]]:
    """Each run with the question that has it, and this one's copies; runs of two that are no copies are left out."""
    owners: dict[Words, tuple[HeldOutQuestion, ...]] = {}
    shared: set[Words] = set()
    for question, of_question in runs_of:
        for run in of_question:
            others = owners.get(run, ())
            owners[run] = (*others, question)
            if others and not _copies(others[0], question):
                shared.add(run)
    return {run: of_run for run, of_run in owners.items() if run not in shared}


def _copies(one: HeldOutQuestion, other: HeldOutQuestion) -> bool:
    fewer = min(len(one.grams), len(other.grams))
    return fewer > 0 and len(one.grams & other.grams) >= COPY_SHARE * fewer


def _longest(words: Words, grams: set[Words]) -> Words:
    """The longest stretch of `words` that consists of `grams`."""
    best = range(0)
    start = None
    for place in range(len(words) - SHORT + 2):
        if words[place : place + SHORT] in grams:
            start = place if start is None else start
        elif start is not None:
            best = max(best, range(start, place - 1 + SHORT), key=len)
            start = None
    return words[best.start : best.stop]
