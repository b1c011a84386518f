"""Share of what is known to be right that the graders accept: the gold solutions of public benchmarks.

    python -m benchmarks.graders [--data DIR] [--workers 2]

Two questions of each set of mathematics. First, the gold solution as if a model had written it: the answer is
extracted from its text and graded against the reference. Second, the same answer written otherwise: each form of
FORMS is the same value in other LaTeX, and must be accepted too. A text that ends in no box (GSM8K marks its answer
with `####`, AIME25 has no solutions) gets one, from its own answer. Every rejection is listed with what was said of it.
A grader that accepts everything would pass as well, so each question is also given the next question's answer.
Of the two sets of programs (`code_sets.py`), the canonical solutions are graded, and spoiled ones.
The files come from --data or POTSTILL_BENCH_DATA; results go to benchmarks/results/<device>/graders.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.code_sets import CODE_SETS, code_rows
from benchmarks.device import RESULTS, device_name, write_result
from distill.benchmarks import bench_folder
from distill.problems.benchmark import benchmark_file, read_benchmark
from distill.protocols import Verifier
from distill.recipe import CodeLimits, VerifyConfig
from distill.records import Problem
from distill.verify import open_verifier
from distill.verify.extract import extract_answer

SUITES = ("gsm8k", "math500", "aime24", "aime25")
SOLUTIONS = {"gsm8k": "answer", "math500": "solution", "aime24": "reference_solution", "aime25": "solution"}
ORDER = (*SUITES, *CODE_SETS)
MAX_REJECTED = 0.005
SHOWN = 10  # rejections a row; all are in the file
NUMBER = r"-?\d+"
FRACTION = r"-?\\d?frac\{\d+\}\{\d+\}"

# The same value in other words; None where a form says nothing of an answer.
Form = Callable[[str], str | None]
FORMS: dict[str, Form] = {
    "in dollars": lambda a: f"${a}$",
    "displaystyle": lambda a: f"\\displaystyle {a}",
    "bold": lambda a: f"\\mathbf{{{a}}}" if re.fullmatch(NUMBER, a) else None,
    "boldsymbol": lambda a: f"\\boldsymbol{{{a}}}",
    "full stop": lambda a: f"{a}.",
    "dfrac": lambda a: a.replace("\\frac", "\\dfrac") if "\\frac" in a else None,
    "tfrac": lambda a: a.replace("\\frac", "\\tfrac") if "\\frac" in a else None,
    "slash": lambda a: re.sub(r"\\d?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", a) if re.fullmatch(FRACTION, a) else None,
    "left and right": lambda a: a.replace("(", "\\left(").replace(")", "\\right)") if _bare(a) else None,
    "spaces": lambda a: a.replace("+", " + ").replace("\\frac", " \\frac ") if "+" in a or "\\frac" in a else None,
    "equation": lambda a: f"x = {a}" if re.fullmatch(f"{NUMBER}|{FRACTION}", a) else None,
    "decimal": lambda a: f"{a}.0" if re.fullmatch(NUMBER, a) else None,
    "thousands": lambda a: f"{int(a):,}" if re.fullmatch(r"-?\d{4,}", a) else None,
    "thousands in braces": lambda a: f"{int(a):,}".replace(",", "{,}") if re.fullmatch(r"-?\d{4,}", a) else None,
    "thousands with a space": lambda a: f"{int(a):,}".replace(",", ",\\!") if re.fullmatch(r"-?\d{4,}", a) else None,
    "unit": lambda a: f"{a} \\text{{ cm}}" if re.fullmatch(NUMBER, a) else None,
    "dollars of money": lambda a: f"\\${a}" if re.fullmatch(NUMBER, a) else None,
    "degrees": lambda a: f"{a}^\\circ" if re.fullmatch(NUMBER, a) else None,
    "mathrm": lambda a: a.replace("\\text", "\\mathrm") if "\\text" in a else None,
}


class Gold(NamedTuple):
    problem: Problem
    text: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=("mathematics", "programs"), help="leave the other rows as they were")
    arguments = parser.parse_args()
    folder = bench_folder(arguments.data)
    if folder is None:
        parser.error("needs the files: --data, or POTSTILL_BENCH_DATA")
    with open_verifier(
        VerifyConfig(num_workers=arguments.workers, timeout_s=30, code=CodeLimits(timeout_s=30))
    ) as verifier:
        rows = []
        if arguments.only != "programs":
            rows += [row for suite in SUITES for row in measure(verifier, suite, read_gold(suite, folder))]
        if arguments.only != "mathematics":
            rows += code_rows(verifier, folder)
    versions = {name: importlib.metadata.version(name) for name in ("math-verify", "sympy")}
    path = RESULTS / device_name() / "graders.json"
    measured = {row["set"] for row in rows}
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if arguments.only else []
    rows = sorted(
        [*rows, *(row for row in before if row["set"] not in measured)], key=lambda row: ORDER.index(row["set"])
    )
    write_result("graders", {"device": device_name(), "versions": versions, "rows": rows})
    for row in rows:
        print(f"{row['set']:12}{row['what']:32}{row['accepted']:6} of {row['count']:6}{row['share']:10.2%}")
        for one in (row.get("rejections") or row.get("acceptances") or [])[:SHOWN]:
            print("    " + ", ".join(f"{one[name]!r}" for name in ("reference", "extracted", "state", "why")))
    print(path)


def read_gold(suite: str, folder: Path) -> list[Gold]:
    """A set's problems, each with its gold solution as a completion that ends in a box."""
    with benchmark_file(suite, "test", folder).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [
        Gold(problem, _completion(suite, str(row.get(SOLUTIONS[suite]) or ""), problem.answer or ""))
        for problem, row in zip(read_benchmark(suite, "test", folder), rows, strict=True)
    ]


def _completion(suite: str, solution: str, answer: str) -> str:
    if suite == "gsm8k":
        solution, _, answer = solution.rpartition("####")
        solution = re.sub(r"<<.*?>>", "", solution)
    elif solution:
        return f"<think>\n{solution}\n</think>\n\n{solution}"
    return f"<think>\n{solution.strip()}\n</think>\n\nThe answer is \\boxed{{{answer.strip()}}}."


def measure(verifier: Verifier, suite: str, gold: Sequence[Gold]) -> list[dict[str, Any]]:
    """Rows for the solutions as they are, their answers in every form that says something of them, and wrong ones."""
    written = [(one.problem, one.text, "") for one in gold]
    return [
        agreement(verifier, suite, "gold solutions", written),
        agreement(verifier, suite, "gold answers in other forms", in_other_forms(gold)),
        agreement(verifier, suite, "answers of other questions", of_other_questions(gold)),
    ]


def of_other_questions(gold: Sequence[Gold]) -> list[tuple[Problem, str, str]]:
    """Each question with the answer of the next one that has another."""
    answers = [one.problem.answer or "" for one in gold]
    others = (
        next((other for other in answers[place + 1 :] + answers if other != answer), "")
        for place, answer in enumerate(answers)
    )
    return [(one.problem, f"\\boxed{{{other}}}", "") for one, other in zip(gold, others, strict=True)]


def in_other_forms(gold: Iterable[Gold], *, sample: int | None = None, seed: int = 0) -> list[tuple[Problem, str, str]]:
    """(problem, completion, form), all of them or a seeded sample."""
    rewritten = [
        (one.problem, f"<think>\n</think>\n\\boxed{{{other}}}", form)
        for one in gold
        for form, rewrite in FORMS.items()
        if (other := rewrite(one.problem.answer or "")) is not None
    ]
    return rewritten if sample is None else random.Random(seed).sample(rewritten, min(sample, len(rewritten)))


def agreement(verifier: Verifier, suite: str, what: str, answers: Sequence[tuple[Problem, str, str]]) -> dict[str, Any]:
    verdicts = verifier.verify([(problem, text, "stop") for problem, text, _ in answers])
    outcomes: dict[bool, list[dict[str, str | None]]] = {True: [], False: []}
    for (problem, text, form), verdict in zip(answers, verdicts, strict=True):
        outcomes[verdict.correct].append(
            {
                "question": problem.prompt[:80],
                "reference": problem.answer,
                "extracted": verdict.extracted,
                "state": verdict.state,
                "why": verdict.detail or ("" if verdict.correct else "the two are not found equal"),
                "form": form,
                "ends": text[-80:] if extract_answer(text) is None else "",
            }
        )
    accepted = len(outcomes[True])
    rarer = accepted < len(outcomes[False])
    return {
        "set": suite,
        "what": what,
        "count": len(answers),
        "accepted": accepted,
        "share": accepted / len(answers),
        "acceptances" if rarer else "rejections": outcomes[rarer],
    }


def _bare(answer: str) -> bool:
    return "(" in answer and "\\left" not in answer and "\\big" not in answer.lower()


if __name__ == "__main__":
    main()
