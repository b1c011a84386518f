"""A second opinion on verdicts, and references that nobody's answer agrees with.

The second grader goes another way than the first: answers are brought into a normal form as text, numbers as exact
fractions, and compared. It decides less (two different terms may still be equal) and evaluates nothing, so it needs no
worker. Where both have decided and differ, one of the two is wrong: the rate, with its interval, and examples are what
a person reads before trusting either.

Where a teacher's answers agree with each other and never with the reference, the reference is usually the wrong one.
Such problems are always listed; `verify.relabel` takes the majority's answer for the reference, and says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Literal, NamedTuple

from distill.intervals import wilson
from distill.recipe import VerifyConfig
from distill.records import Problem, Record, VerdictState

MAX_EXAMPLES = 20
MAX_SHOWN = 200  # characters of a question or an answer
MAX_DIGITS = 1_000
AUDITED = ("math", "choice", "reasoning_gym", "judge")
RELABELLED = ("math", "choice", "judge")  # a procedural reference is made together with its question

SPACE = re.compile(r"\\\$|\\left|\\right|\\displaystyle|\\[,;:! ]|\\q?quad|[\s$~]")
SET_AS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|boldsymbol)\{([^{}]*)\}")
SHORT_FRACTION = re.compile(r"\\[dt]?frac(?:\{([^{}]*)\}|(\w))(?:\{([^{}]*)\}|(\w))")
ASSIGNED = re.compile(r"[A-Za-z](?:_\w)?=(?=[^=]+$)")
GROUPED = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))(?:/(\d+))?")
FRACTION = re.compile(r"([-+]?)\(([-+]?\d+)\)/\((\d+)\)")
IGNORED = re.compile(
    r"\^\\circ$|\^\{\\circ\}$|\\%$|%$|^\\\$|(?<=\d)(?:cm|km|mm|m|kg|g|units?|degrees|dollars|cents|hours|minutes)$"
)


class Suspect(NamedTuple):
    """A problem whose answers agree with each other and not with the reference."""

    problem_id: str
    majority: str
    num_agreeing: int
    num_answers: int
    relabelled: bool


class Disagreement(Record):
    """An answer on which both graders have decided, differently. Texts are cut."""

    key: str
    question: str
    reference: str
    answer: str
    first: Literal["correct", "wrong"]
    second: Literal["correct", "wrong"]


class SuspectedReference(Record):
    """A `Suspect` with what a person needs to see of it. Texts are cut."""

    problem_id: str
    question: str
    reference: str
    majority: str
    num_agreeing: int
    num_answers: int
    relabelled: bool


class AuditSummary(Record):
    """The content of audit.json. `answers` were looked at; a share of those `decided_by_both` is `rate`.

    `relabel` is what the recipe asked for: only "majority" lets a suspected reference be replaced.
    """

    second_grader: str = "normal form of the text, numbers as exact fractions"
    answers: int
    decided_by_both: int
    disagreements: int
    accepted_by_the_first_alone: int
    accepted_by_the_second_alone: int
    rate: float | None
    ci95: tuple[float, float] | None
    relabel: Literal["never", "majority"] = "never"
    examples: tuple[Disagreement, ...]
    suspected_references: tuple[SuspectedReference, ...]

    @property
    def relabelled(self) -> tuple[SuspectedReference, ...]:
        return tuple(one for one in self.suspected_references if one.relabelled)

    @property
    def num_relabelled_samples(self) -> int:
        """Answers that count as correct because their question's reference was replaced."""
        return sum(one.num_agreeing for one in self.relabelled)


class Audit:
    """`add` every verdict once, in any order; some hundred bytes are kept for each question without a right answer."""

    def __init__(self, problems: Mapping[str, Problem], config: VerifyConfig) -> None:
        self._problems = problems
        self._config = config
        self._decided = self._seen = 0
        self._disagreements = Counter[str]()
        self._examples: list[Disagreement] = []
        self._answers: dict[str, Counter[str] | None] = {}  # None: somebody was right
        self._spelled: dict[tuple[str, str], str] = {}

    def add(self, problem_id: str, key: str, state: VerdictState, extracted: str | None) -> None:
        problem = self._problems[problem_id]
        if state not in ("correct", "wrong") or extracted is None or not problem.answer:
            return
        if problem.grader not in AUDITED:
            return
        self._seen += 1
        self._count(problem_id, state, extracted)
        second = second_opinion(problem.answer, extracted)
        if second is None:
            return
        self._decided += 1
        if second != (state == "correct"):
            self._disagreements[state] += 1
            if len(self._examples) < MAX_EXAMPLES:
                shown = {"question": problem.prompt, "reference": problem.answer, "answer": extracted}
                cut = {name: text[:MAX_SHOWN] for name, text in shown.items()}
                opinion: Literal["correct", "wrong"] = "correct" if second else "wrong"
                self._examples.append(Disagreement(key=key, **cut, first=state, second=opinion))

    def suspects(self) -> Iterator[Suspect]:
        """Problems with enough answers, none right, most of them the same."""
        config = self._config
        for problem_id, answers in self._answers.items():
            if answers is None or answers.total() < config.suspect_min_samples:
                continue
            ((form, count),) = answers.most_common(1)
            if count < 2 or count < config.suspect_min_share * answers.total():
                continue
            relabelled = config.relabel == "majority" and self._problems[problem_id].grader in RELABELLED
            yield Suspect(problem_id, self._spelled[problem_id, form], count, answers.total(), relabelled)

    def summary(self) -> AuditSummary:
        disagreements = self._disagreements.total()
        return AuditSummary(
            answers=self._seen,
            decided_by_both=self._decided,
            disagreements=disagreements,
            accepted_by_the_first_alone=self._disagreements["correct"],
            accepted_by_the_second_alone=self._disagreements["wrong"],
            rate=disagreements / self._decided if self._decided else None,
            ci95=wilson(disagreements, self._decided) if self._decided else None,
            relabel=self._config.relabel,
            examples=tuple(self._examples),
            suspected_references=tuple(map(self._suspected_reference, self.suspects())),
        )

    def _suspected_reference(self, suspect: Suspect) -> SuspectedReference:
        problem = self._problems[suspect.problem_id]
        texts = {"question": problem.prompt, "reference": problem.answer or "", "majority": suspect.majority}
        return SuspectedReference(**suspect._asdict() | {name: text[:MAX_SHOWN] for name, text in texts.items()})

    def _count(self, problem_id: str, state: VerdictState, extracted: str) -> None:
        answers = self._answers.setdefault(problem_id, Counter())
        if answers is None:
            return
        if state == "correct":
            self._answers[problem_id] = None
            for form in answers:
                del self._spelled[problem_id, form]
            return
        form = normal_form(extracted)
        answers[form] += 1
        self._spelled.setdefault((problem_id, form), extracted)


def second_opinion(reference: str, answer: str) -> bool | None:
    """Tell whether the two are equal, as text in its normal form or as numbers; None where that does not settle it.

    >>> second_opinion("\\\\frac{1}{2}", "0.5"), second_opinion("7", "8"), second_opinion("x+1", "1+x")
    (True, False, None)
    """
    one, other = normal_form(reference), normal_form(answer)
    if one == other:
        return True
    return False if _is_number(one) and _is_number(other) else None


def normal_form(text: str) -> str:
    r"""The text without what typesetting adds; a number as an exact fraction in lowest terms.

    >>> normal_form("$x = \\dfrac{2}{4}$"), normal_form("1,000.50"), normal_form("\\text{ Yes }.")
    ('1/2', '2001/2', 'yes')
    """
    text = SET_AS.sub(r"\1", SPACE.sub("", text)).removesuffix(".")
    text = SHORT_FRACTION.sub(lambda m: f"({m[1] or m[2]})/({m[3] or m[4]})", text)
    text = IGNORED.sub("", ASSIGNED.sub("", text, count=1) if ASSIGNED.match(text) else text)
    if GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if match := FRACTION.fullmatch(text):
        text = f"{'-' if (match[1] == '-') != match[2].startswith('-') else ''}{match[2].lstrip('+-')}/{match[3]}"
    match = NUMBER.fullmatch(text)
    if match and _is_number(text):
        return str(Fraction(match[1]) / int(match[2] or 1))
    return text.casefold()


def _is_number(text: str) -> bool:
    match = NUMBER.fullmatch(text) if len(text) <= MAX_DIGITS else None
    return match is not None and (match[2] is None or int(match[2]) != 0)
