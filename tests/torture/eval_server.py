"""Runs the eval stage in forked children that may be killed: `python -m tests.torture.eval_server`.

As `tests.torture.chain_server`, with two more fields in a job: `url` of the endpoint at which the teacher answers, and
`models`, the folder of a base and its student file. Keys that the ledger was given though it had them, because a model
was asked again for what it had answered, go to `folder/doubled`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from distill.ledger import Ledger
from distill.recipe import Recipe
from distill.records import Trace
from pipelines.context import Context
from pipelines.stages.eval import evaluate
from tests.torture.chain_server import Announcing, serve

NUM_QUESTIONS = 40
# What the stage imports when it comes to it: once here, instead of in every child.
LATE = ("lm_eval.evaluator", "lm_eval.tasks", "eval.adapter", "datasets", "teacher.backends.native.backend", "httpx")
LATE += ("teacher.backends.openai", "students.zoo")


def recipe_of(folder: Path, job: dict[str, Any]) -> Recipe:
    rows = [{"prompt": f"{n} + {n + 1}?", "answer": str(2 * n + 1)} for n in range(NUM_QUESTIONS)]
    (folder / "held_out.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1 + n % 2}"} for n in range(NUM_QUESTIONS)]
    (folder / "gsm8k_test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tree: dict[str, Any] = {
        "name": "t",
        "problems": [{"kind": "local", "path": "none.jsonl"}],
        "teacher": {"backend": "openai", "model": "pico", "base_url": job["url"], "max_concurrency": 4},
        "distill": {"students": [str(Path(job["models"]) / "mini.yaml")]},
        "eval": {
            "suites": ["held_out", "gsm8k"],
            "held_out": {"kind": "local", "path": str(folder / "held_out.jsonl"), "split": "all"},
            "num_samples": job["num_samples"],
            "sampling": {"max_tokens": 12, "temperature": 1.0, "top_p": 1.0},
            "roles": ["teacher", "base"],
        },
        "bench_data": str(folder),
    }
    return Recipe.model_validate(tree)


def refuse_doubles(folder: Path) -> None:
    """Write down each key that is stored a second time."""
    log = os.open(folder / "doubled", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    add = Ledger.add

    def added(self: Ledger, traces: Iterable[Trace]) -> int:
        traces = list(traces)
        for key in self.present(trace.key for trace in traces):
            os.write(log, f"{key}\n".encode())
        return add(self, traces)

    Ledger.add = added  # type: ignore[method-assign]


def work(folder: Path, job: dict[str, Any]) -> None:
    refuse_doubles(folder)
    evaluate(recipe_of(folder, job), folder, Context(folder, Announcing(), num_workers=1))


if __name__ == "__main__":
    for name in LATE:
        import_module(name)
    serve(work)
