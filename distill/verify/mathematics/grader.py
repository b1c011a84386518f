"""One mathematical answer to a verdict."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from distill.records import VerdictState
from distill.verify.evasion import repeats_the_question
from distill.verify.mathematics.comparison import same
from distill.verify.mathematics.reading import prepare, read
from distill.verify.mathematics.values import UnreadableError, Value, Words
from distill.verify.mathematics.words import same_words
from distill.verify.typeset import words_of

Result = tuple[VerdictState, str]
# A choice as contests write it, `(B) 15`: its letter, where no other letter follows.
LETTERED = re.compile(r"(?:\\text\{\s*)?\(?([A-Z])\)\s*\}?\s*(?P<rest>(?:(?![A-Z]).)+)", re.DOTALL)
TEXTS = re.compile(r"\\text\{([^{}]*)\}")
ORDERED = re.compile(r"order|arrang|rank|sequence|first|last|smallest|largest", re.IGNORECASE)
LETTER = re.compile(r"\\text\{\s*\(?([A-Z])\)?\s*\}")


class MathGrader:
    """Holds math-verify for references that we cannot read.

    Its time-outs are SIGALRM: off. Its expression mode goes through sympy.parse_expr, which is eval: LaTeX alone.
    """

    def __init__(self) -> None:
        import logging

        from math_verify import LatexExtractionConfig, parse, verify

        logging.disable(logging.CRITICAL)
        self._config = [LatexExtractionConfig(boxed_match_priority=0)]
        self._parse, self._verify = parse, verify
        # An exception inside the comparison reads as "not equal": what is imported late must be here before the fence
        # is up, and a sympy that is broken must not pass for a wrong answer.
        for reference, answer in (("x^2-1", "(x-1)(x+1)"), ("\\sqrt{8}", "2.8284271"), ("x^2+y^2=1", "1-x^2=y^2")):
            if not same(read(prepare(reference)), read(prepare(answer))):
                raise RuntimeError(f"sympy does not find {reference} equal to {answer}")
        if not self._equal(self._parsed("x^2-1"), self._parsed("(x-1)(x+1)")):
            raise RuntimeError("math-verify does not find x^2-1 equal to (x-1)(x+1)")

    def grade(self, reference: str, answer: str, question: str = "") -> Result:
        if _close_up(reference) == _close_up(answer):
            return "correct", ""
        wanted, value = "", None
        try:
            wanted = _prepared(reference)
            value = _read_reference(wanted, question)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001  sympy raises anything at all on text that it cannot read
            value = None
        try:
            given = prepare(answer)
            if wanted and _close_up(wanted) == _close_up(given):
                return "correct", ""
            if value is None:
                return self._by_math_verify(reference, answer)
            if not _answers(value, wanted, given, question):
                return "wrong", ""
        except UnreadableError:
            return "wrong", "the answer cannot be read"
        except MemoryError:
            raise
        except Exception as exc:  # noqa: BLE001  sympy raises anything at all on hostile text
            return "wrong", f"the answer cannot be read ({type(exc).__name__})"
        repeated = any(repeats_the_question(question, wanted, text) for text in (answer, given))
        return ("wrong", "repeats the question") if repeated else ("correct", "")

    def _by_math_verify(self, reference: str, answer: str) -> Result:
        try:
            gold = self._parsed(reference)
        except (RecursionError, ValueError, TypeError, AttributeError, ArithmeticError) as exc:
            return "unverifiable", f"the reference cannot be read ({type(exc).__name__})"
        if not gold or getattr(gold[0], "is_Symbol", False):
            return "unverifiable", "the reference is not mathematics"
        try:
            given = self._parsed(answer)
            return ("correct", "") if given and self._equal(gold, given) else ("wrong", "")
        except MemoryError:
            raise
        except Exception as exc:  # noqa: BLE001
            return "wrong", f"the answer cannot be read ({type(exc).__name__})"

    def _parsed(self, latex: str) -> list[Any]:
        found: list[Any] = self._parse(f"\\boxed{{{latex}}}", self._config, parsing_timeout=None)
        return [item for item in found if not isinstance(item, str)]

    def _equal(self, reference: list[Any], answer: list[Any]) -> bool:
        return bool(self._verify(reference, answer, timeout_seconds=None))


def _answers(value: Value, wanted: str, given: str, question: str) -> bool:
    if isinstance(value, Words):
        if (letter := LETTER.fullmatch(wanted)) is not None and (choice := LETTERED.fullmatch(given)) is not None:
            return letter[1] == choice[1]
        said = words_of(given)
        if said == value.key or _same_labels(value.key, said, question):
            return True
        read_answer = read(given, question)
        return isinstance(read_answer, Words) and same_words(value.key, read_answer.key)
    # A bare `h` is a unit where the question, or the reference, speaks of hours.
    answer = read(given, " ".join((question, *TEXTS.findall(wanted))))
    if isinstance(answer, Words):
        return answer.key == words_of(wanted)
    return same(value, answer, question)


def _same_labels(wanted: str, given: str, question: str) -> bool:
    """`C, A` for `A, C`, where no order was asked for."""
    labels = [sorted(text.split(",")) for text in (wanted, given)]
    return labels[0] == labels[1] and all(len(label) == 1 for label in labels[0]) and not ORDERED.search(question)


@lru_cache(maxsize=256)
def _prepared(reference: str) -> str:
    return prepare(reference)


@lru_cache(maxsize=256)
def _read_reference(text: str, question: str) -> Value:
    return read(text, question)


def _close_up(text: str) -> str:
    return "".join(text.split())
