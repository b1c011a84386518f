"""Which questions of the suites a run's students were trained on, and every score again without them.

`find_leaks` looks through training examples with the tests that curation drops them by (`distill.decontaminate`): the
question for all of them, and what the student learns to write for the word runs. A procedural question counts where it
is the same one. `scores_without` leaves the found questions out, for every model the same ones.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from distill.curate.shown import cut
from distill.decontaminate import HeldOutQuestions, Leak, LeakTest
from distill.errors import DataError
from distill.intervals import wilson
from distill.progress import Progress
from distill.records import Example, Problem, Record
from distill.tables import iterate_records
from distill.words import WORD, fold_case
from eval.scored import Model, read_prompts
from eval.statistics import Estimate, mean_estimate, student_quantile

Questions = Mapping[tuple[str, str], str]  # their texts, by suite and id

MAX_EXAMPLES = 3  # of a question and training set that are kept; the others are counted
MAX_TEXT_CHARACTERS = 2_400  # of a text, around what was found in it


class LeakingExample(Record):
    """One training example that holds a question of a suite: its row (from 1) and what of it matches.

    `before`, `matched` and `after` are the training text, as it is written; it is cut at both ends where it is long.
    """

    row: int
    problem_id: str
    trace_key: str | None
    part: Literal["question", "completion"]
    test: LeakTest
    before: str
    matched: str
    after: str


class LeakedQuestion(Record):
    """One question of a suite that a training set holds, in `num_examples` of its examples."""

    suite: str
    question_id: str
    question: str
    training_set: str
    num_examples: int
    examples: tuple[LeakingExample, ...]


class TrainingSet(Record):
    """Examples that `students` learned from."""

    name: str
    students: tuple[str, ...]
    num_examples: int


class Contamination(Record):
    """What was found, by training set; suites and questions in the order of the scores."""

    training_sets: tuple[TrainingSet, ...]
    leaked: tuple[LeakedQuestion, ...]

    def of_suite(self, suite: str) -> list[LeakedQuestion]:
        return [one for one in self.leaked if one.suite == suite]

    def question_ids(self, suite: str) -> set[str]:
        return {one.question_id for one in self.of_suite(suite)}


@dataclass(frozen=True)
class Change:
    """How a mean moves when some questions are left out: without them minus with them."""

    value: float
    ci95: tuple[float, float]

    @property
    def clear(self) -> bool:
        return not self.ci95[0] <= 0 <= self.ci95[1]


@dataclass(frozen=True)
class CleanScore:
    """One model's pass@1 on a suite without the leaked questions; None where nothing is left."""

    model: str
    role: str
    clean: Estimate | None
    change: Change | None


def questions_of(models: Sequence[Model], progress: Progress) -> Questions:
    """Every question's text by suite and id; models are asked in turn until none is missing. Raises DataError."""
    prompts: dict[tuple[str, str], str] = {}
    asked = {
        model.name: {(suite, name) for suite, of in model.answers.items() for name in of.means} for model in models
    }
    with progress.task("read questions", None, unit="models") as task:
        for model in models:
            if asked[model.name] - prompts.keys():
                prompts |= read_prompts(model.samples)
                task.advance(1)
            if missing := asked[model.name] - prompts.keys():
                suite, name = min(missing)
                raise DataError(f"holds no text of the question {name} of {suite}", where=model.samples, field="prompt")
    return prompts


def find_leaks(
    questions: Questions,
    training_sets: Mapping[str, tuple[Path, Sequence[str]]],
    problems: Path,
    *,
    min_containment: float | None,
    progress: Progress,
) -> Contamination:
    """Look for the questions of all suites in each training set: `training_sets` are its file and its students.

    `problems` are those that the examples were made of; the wording around a question in an example is not its own.
    Raises DataError for a file that is not what it should be.
    """
    known = {problem.id: problem for problem in iterate_records(problems, Problem)} if problems.exists() else {}
    ids: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for (suite, question_id), prompt in questions.items():
        ids[suite][prompt].append(question_id)
    index = HeldOutQuestions(ids, known.values(), min_containment=min_containment)
    found: list[LeakedQuestion] = []
    read: list[TrainingSet] = []
    with progress.task("look for questions of the suites", None, unit="examples") as task:
        for name, (path, students) in training_sets.items():
            scan = _Scan(index, known)
            for example in iterate_records(path, Example):
                scan.add(example)
                task.advance(1)
            read.append(TrainingSet(name=name, students=tuple(students), num_examples=scan.num_examples))
            found += scan.leaked(name, ids)
    place = {where: number for number, where in enumerate(questions)}
    found.sort(key=lambda one: place[one.suite, one.question_id])
    return Contamination(training_sets=tuple(read), leaked=tuple(found))


def scores_without(models: Sequence[Model], suite: str, left_out: set[str]) -> list[CleanScore]:
    """Every model's pass@1 on the questions that are not in `left_out`, and how far that is from its full score."""
    scores = []
    for model in models:
        answers = model.answers[suite]
        kept = {question: mean for question, mean in answers.means.items() if question not in left_out}
        clean = mean_estimate(list(kept.values()), len(kept) * answers.samples_per_question) if kept else None
        change = change_without(answers.means, left_out) if kept else None
        scores.append(CleanScore(model.name, model.role, clean, change))
    return scores


def change_without(means: Mapping[str, float], left_out: set[str]) -> Change:
    """Mean over the questions that stay minus the mean over all of them, with its 95% interval.

    Both means rest on the same questions, so this is one mean over all n of them, in which a question that stays counts
    n/m - 1 and one that is left out -1; its standard error is the linearised one of a ratio (Cochran, Sampling
    Techniques, 3rd ed., section 6.4), with Student-t over questions. Where the questions on either side agree with each
    other it would be zero: there Wilson's intervals of the two groups bound it. Raises ValueError where none stays.
    """
    stays = [mean for question, mean in means.items() if question not in left_out]
    goes = [mean for question, mean in means.items() if question in left_out]
    num, kept = len(means), len(stays)
    if not kept:
        raise ValueError("no question is left")
    if not goes:
        return Change(0.0, (0.0, 0.0))
    clean, full = fmean(stays), fmean(means.values())
    residuals = [(x - clean) * num / kept - (x - full) for x in stays] + [full - x for x in goes]
    stderr = math.sqrt(sum(r * r for r in residuals) / (num * (num - 1)))
    value = clean - full
    if len(set(stays)) > 1 or len(set(goes)) > 1:
        half = student_quantile(num - 1) * stderr
        return Change(value, (max(-1.0, value - half), min(1.0, value + half)))
    share = len(goes) / num
    of_stays, of_goes = (wilson(fmean(group) * len(group), len(group)) for group in (stays, goes))
    return Change(value, (share * (of_stays[0] - of_goes[1]), share * (of_stays[1] - of_goes[0])))


class _Scan:
    """One training set: each question's own text is compared once, however many examples it has."""

    def __init__(self, index: HeldOutQuestions, problems: Mapping[str, Problem]) -> None:
        self._index, self._problems = index, problems
        self._of_problem: dict[str, list[Leak]] = {}
        self._examples: dict[tuple[str, str], list[LeakingExample]] = defaultdict(list)
        self._counts: dict[tuple[str, str], int] = defaultdict(int)
        self.num_examples = 0

    def add(self, example: Example) -> None:
        self.num_examples += 1
        problem = self._problems.get(example.problem_id)
        procedural = problem is not None and problem.grader == "reasoning_gym"
        asked = example.question if problem is None else problem.prompt
        if example.problem_id not in self._of_problem:
            self._of_problem[example.problem_id] = list(self._index.leaks(asked, procedural=procedural))
        in_question = self._of_problem[example.problem_id]
        for leak in in_question:
            self._count(leak, example, "question", asked)
        if not procedural:
            known = {leak.question[:2] for leak in in_question}
            for leak in self._index.leaks(example.completion):
                if leak.question[:2] not in known:
                    self._count(leak, example, "completion", example.completion)

    def _count(self, leak: Leak, example: Example, part: Literal["question", "completion"], text: str) -> None:
        where = leak.question.suite, leak.question.prompt
        self._counts[where] += 1
        if len(self._examples[where]) < MAX_EXAMPLES:
            before, matched, after = _around(text, leak)
            self._examples[where].append(
                LeakingExample(
                    row=self.num_examples,
                    problem_id=example.problem_id,
                    trace_key=example.trace_key,
                    part=part,
                    test=leak.test,
                    before=before,
                    matched=matched,
                    after=after,
                )
            )

    def leaked(self, training_set: str, ids: Mapping[str, Mapping[str, Sequence[str]]]) -> Iterator[LeakedQuestion]:
        for (suite, prompt), count in self._counts.items():
            for question_id in ids[suite][prompt]:
                yield LeakedQuestion(
                    suite=suite,
                    question_id=question_id,
                    question=cut(prompt, MAX_TEXT_CHARACTERS),
                    training_set=training_set,
                    num_examples=count,
                    examples=tuple(self._examples[suite, prompt]),
                )


def _around(text: str, leak: Leak) -> tuple[str, str, str]:
    """The text before, within and after what was found, each cut; what cannot be placed counts as the whole text."""
    start, end = (0, len(text)) if leak.test == "exact" else _span(text, leak) or (0, len(text))
    around = MAX_TEXT_CHARACTERS // 3
    before, after = text[:start], text[end:]
    before = before if len(before) <= around else f"… {before[-around:]}"
    after = after if len(after) <= around else f"{after[:around]} …"
    return before, cut(text[start:end], MAX_TEXT_CHARACTERS), after


def _span(text: str, leak: Leak) -> tuple[int, int] | None:
    """Where the longest part of the found words begins and ends in the text as it is written."""
    places = [match.span() for match in WORD.finditer(text)]
    words = [fold_case(text[start:end]) for start, end in places]
    wanted = list(leak.words)
    for length in range(len(wanted), 0, -1):
        for first in range(len(wanted) - length + 1):
            run = wanted[first : first + length]
            for place in range(len(words) - length + 1):
                if words[place] == run[0] and words[place : place + length] == run:
                    return places[place][0], places[place + length - 1][1]
    return None
