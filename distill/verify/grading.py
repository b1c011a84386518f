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
from distill.verify.extract import in_one_line
from distill.verify.guards import Fence, guard_scorers

Result = tuple[VerdictState, str]
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{(.*)\}", re.DOTALL)


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
                self._mathematics() if task["grader"] == "math" else self._dataset(task["metadata"])

    def grade(self, task: dict[str, Any]) -> Result:
        """Never raises for what the model wrote, apart from MemoryError."""
        try:
            needed = self._mathematics() if task["grader"] == "math" else self._dataset(task["metadata"])
        except Exception as exc:  # noqa: BLE001  ours, whatever it is: never the model's wrong answer
            return "infra_error", f"{type(exc).__name__}: {exc}"[:200]
        with self._fence.raised(), contextlib.redirect_stdout(io.StringIO()):
            if task["grader"] == "math":
                return _grade_math(needed, task)
            return _grade_reasoning_gym(needed, task)

    def _mathematics(self) -> Any:
        if self._math is None:
            from distill.verify.mathematics.grader import MathGrader

            self._math = MathGrader()
        return self._math

    def _dataset(self, metadata: dict[str, Any]) -> Any:
        name, params = metadata["dataset"], metadata.get("params", {})
        key = json.dumps([name, params], sort_keys=True)
        if key not in self._datasets:
            from distill.problems.reasoning_gym import from_json, make_dataset

            guard_scorers()
            self._datasets[key] = make_dataset(name, from_json(params), seed=0, size=10, where=name, field="params")
        return self._datasets[key]


def _grade_math(mathematics: Any, task: dict[str, Any]) -> Result:
    reference, question = task["reference"], task.get("question", "")
    result: Result = mathematics.grade(reference, task["answer"], question)
    if result[0] == "wrong" and (boxes := task.get("boxes")):
        # A box for each part of the reference: `so $a = \\boxed{2}$, and then $b = \\boxed{5}$`.
        parts: Result = mathematics.grade(reference, in_one_line(boxes), question)
        return parts if parts[0] == "correct" else result
    return result


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
    r"""The answer without the typesetting that a box invites: `$7$`, `\\text{yes}`."""
    text = answer.strip().strip("$").strip()
    match = WRAPPED.fullmatch(text)
    return match[1].strip() if match else text
