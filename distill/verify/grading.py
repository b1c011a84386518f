"""The graders, as they run in a worker process: one answer to one state and a detail."""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from distill.records import VerdictState
from distill.verify.evasion import evasion
from distill.verify.guards import Fence, guard_scorers

Result = tuple[VerdictState, str]
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{(.*)\}", re.DOTALL)
BOLD = re.compile(r"\\(?:boldsymbol|bm|pmb)\s*\{")
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # digits and signs as Chinese text sets them
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


class Graders:
    """Imports what a grader needs when it is first needed, outside of any answer's time."""

    def __init__(self) -> None:
        warnings.simplefilter("ignore")
        self._fence = Fence()
        self._datasets: dict[str, Any] = {}
        self._math: Any = None

    def prepare(self, tasks: Sequence[dict[str, Any]]) -> None:
        for task in tasks:
            # What fails here fails again in `grade`, where it becomes the answer's own infra_error.
            with contextlib.suppress(Exception):
                self._math_verify() if task["grader"] == "math" else self._dataset(task["metadata"])

    def grade(self, task: dict[str, Any]) -> Result:
        """Never raises for what the model wrote, apart from MemoryError."""
        try:
            needed = self._math_verify() if task["grader"] == "math" else self._dataset(task["metadata"])
        except Exception as exc:  # noqa: BLE001  ours, whatever it is: never the model's wrong answer
            return "infra_error", f"{type(exc).__name__}: {exc}"[:200]
        with self._fence.raised(), contextlib.redirect_stdout(io.StringIO()):
            if task["grader"] == "math":
                return _grade_math(needed, task["reference"], task["answer"], task.get("question", ""))
            return _grade_reasoning_gym(needed, task)

    def _math_verify(self) -> Any:
        if self._math is None:
            self._math = MathVerify()
        return self._math

    def _dataset(self, metadata: dict[str, Any]) -> Any:
        name, params = metadata["dataset"], metadata.get("params", {})
        key = json.dumps([name, params], sort_keys=True)
        if key not in self._datasets:
            from distill.problems.reasoning_gym import from_json, make_dataset

            guard_scorers()
            self._datasets[key] = make_dataset(name, from_json(params), seed=0, size=10, where=name, field="params")
        return self._datasets[key]


class MathVerify:
    """math-verify on LaTeX alone: its expression mode goes through sympy.parse_expr. Its time-outs are SIGALRM: off."""

    def __init__(self) -> None:
        import logging

        from math_verify import LatexExtractionConfig, parse, verify

        logging.disable(logging.CRITICAL)
        self._config = [LatexExtractionConfig(boxed_match_priority=0)]
        self._parse, self._verify = parse, verify
        # math-verify takes an exception inside it for "not equal": what it imports late must be here before the fence
        # is up, and a sympy that is broken must not pass for a wrong answer.
        if not self.equal(self.parse("x^2-1"), self.parse("(x-1)(x+1)")):
            raise RuntimeError("math-verify does not find x^2-1 equal to (x-1)(x+1)")

    def parse(self, latex: str) -> list[Any]:
        found: list[Any] = self._parse(f"\\boxed{{{latex}}}", self._config, parsing_timeout=None)
        return [item for item in found if not isinstance(item, str)]

    def equal(self, reference: list[Any], answer: list[Any]) -> bool:
        return bool(self._verify(reference, answer, timeout_seconds=None)) and _same_equations(reference, answer)


def _same_equations(reference: list[Any], answer: list[Any]) -> bool:
    """Tell whether one equation is a multiple of the other; math-verify takes all without real solutions for one."""
    from sympy import Eq, Symbol, simplify

    one, other = reference[0], answer[0]
    if not (isinstance(one, Eq) and isinstance(other, Eq)) or isinstance(one.lhs, Symbol):
        return True
    ratio = simplify((one.lhs - one.rhs) / (other.lhs - other.rhs))
    return bool(ratio.is_number and ratio.is_finite and not ratio.is_zero)


def _grade_math(math: MathVerify, reference: str, answer: str, question: str = "") -> Result:
    if _same(reference, answer):
        return "correct", ""
    answer = _plainly_set(answer)
    try:
        gold = math.parse(reference)
    except (RecursionError, ValueError, TypeError, AttributeError, ArithmeticError) as exc:
        return "unverifiable", f"the reference cannot be read ({type(exc).__name__})"
    if not gold:
        return "unverifiable", "the reference is not mathematics"
    try:
        given = math.parse(answer)
        if not given:
            return "wrong", "the answer is not mathematics"
        if not math.equal(gold, given):
            return "wrong", ""
        why_not = evasion(question, reference, answer)
        return ("correct", "") if why_not is None else ("wrong", why_not)
    except MemoryError:
        raise
    except Exception as exc:  # noqa: BLE001  sympy raises anything at all on hostile text
        return "wrong", f"the answer cannot be read ({type(exc).__name__})"


def _grade_reasoning_gym(dataset: Any, task: dict[str, Any]) -> Result:
    from distill.problems.reasoning_gym import from_json

    entry = from_json(task["metadata"]["entry"])
    answer: str = task["answer"]
    best = 0.0
    fault = ""
    for text in dict.fromkeys((answer, _unwrap(answer))):
        try:
            best = max(best, float(dataset.score_answer(text, entry)))
        except MemoryError:
            raise
        except Exception as exc:  # noqa: BLE001  scorers raise anything at all on text that they did not expect
            fault = f"the scorer raised {type(exc).__name__}"
    if best == 1.0:
        return "correct", ""
    if fault and not _scores_its_own(dataset, entry):
        return "infra_error", f"{fault}, on its own answer too"
    return "wrong", fault or f"score {best:g}"


def _scores_its_own(dataset: Any, entry: dict[str, Any]) -> bool:
    """Tell whether the scorer can do its work at all on this entry."""
    try:
        dataset.score_answer(entry["answer"], entry)
    except Exception:  # noqa: BLE001
        return False
    return True


def _unwrap(answer: str) -> str:
    """The answer without the typesetting that a box invites: `$7$`, `\\text{yes}`."""
    text = answer.strip().strip("$").strip()
    match = WRAPPED.fullmatch(text)
    return match[1].strip() if match else text


def _plainly_set(answer: str) -> str:
    r"""The answer without what only changes its looks and math-verify stumbles over: `\boldsymbol{5}`, `5.`

    >>> _plainly_set("\\boldsymbol{\\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    answer = answer.translate(FULL_WIDTH).strip().removeprefix("\\displaystyle").strip()
    if answer.endswith(".") and not answer.endswith(("..", "\\.")):
        answer = answer[:-1].rstrip()
    while (bold := BOLD.match(answer)) and _closes_last(answer, bold.end()):
        answer = answer[bold.end() : -1].strip()
    return answer


def _closes_last(text: str, start: int) -> bool:
    """Tell whether the group that is open at `start` is closed by the text's last character, and no earlier."""
    depth = 1
    for match in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.end() == len(text)
    return False


def _same(reference: str, answer: str) -> bool:
    return "".join(reference.split()) == "".join(answer.split())
