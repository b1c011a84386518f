"""Runs generate and curate in forked children that may be killed: `python -m tests.torture.chain_server`.

Importing takes seconds and a run a part of one, so this process imports once and forks for every job, a JSON line on
its standard input: `{"folder", "seed", "num_samples", "failpoint"}`. Every line on its standard output is about the
running child: `pid N`, `stage NAME` when a part of the work begins, `end STATUS` (the signal that killed it, negative).
What the ledger has acknowledged goes to `folder/acknowledged`, what the teacher was asked to `folder/asked`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill import export
from distill.failpoints import VARIABLE
from distill.ledger import Ledger
from distill.progress import Task
from distill.recipe import Recipe
from distill.records import Completion, Sampling, TeacherIdentity, Trace, TraceRequest
from pipelines.context import Context
from pipelines.stages import curate as curate_stage
from pipelines.stages.generate import generate

NUM_PROBLEMS = 150
ADAPTIVE = {"max_samples": 8, "min_correct": 2, "give_up_after": 6}


class ScriptedTeacher:
    """What it writes follows from the request alone; the order in which it comes, from the seed."""

    identity = TeacherIdentity(name="scripted", weights="w", template="t", backend="test", backend_version="1")

    def __init__(self, seed: int, log: Path) -> None:
        self._order = random.Random(seed)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        for place in self._order.sample(range(len(requests)), len(requests)):
            request = requests[place]
            os.write(self._log, f"{request.key(self.identity, sampling)}\n".encode())
            seed = request.seed(sampling)
            number = int(request.problem.prompt.split()[0])
            letter = request.problem.answer if seed % NUM_PROBLEMS < number else "C"
            steps = "\n".join(f"step {step}: {seed >> step}" for step in range(seed % 30))
            text = f"<think>\n{steps}\n</think>\n\n\\boxed{{{letter}}}"
            reason = "length" if seed % 17 == 0 else "stop"
            yield Completion(request=request, text=text, finish_reason=reason, num_prompt_tokens=5, num_tokens=7)

    def close(self) -> None:
        os.close(self._log)


class Announcing:
    """A Progress that says which part of the work begins."""

    @contextmanager
    def task(self, name: str, total: float, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        say(f"stage {name.split(',')[0]}")
        yield self  # type: ignore[misc]

    def advance(self, amount: float = 1, **facts: str | float) -> None:
        pass


def recipe_of(folder: Path, num_samples: int) -> Recipe:
    rows = [
        {"prompt": f"{number} is", "answer": number % 2, "choices": ["even", "odd", "neither"]}
        for number in range(NUM_PROBLEMS)
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "name": "t",
        "problems": [{"kind": "local", "path": "p.jsonl", "choices_field": "choices", "grader": "choice"}],
        "teacher": {"backend": "openai", "model": "scripted"},
        "generate": {"num_samples": num_samples, "adaptive": ADAPTIVE},
        "curate": {"decontaminate": False},
        "distill": {"students": ["x"]},
        "eval": {"held_out": {"families": {"gcd": {}}, "count": 9, "split": "held_out"}},
    }
    return Recipe.model_validate(tree)


def chain(folder: Path, seed: int, num_samples: int) -> None:
    recipe = recipe_of(folder, num_samples)
    teacher = ScriptedTeacher(seed, folder / "asked")
    context = Context(folder, Announcing(), open_teacher=lambda config: teacher)
    generate(recipe, folder, context)
    curate_stage.curate(recipe, folder, context)


def acknowledge(folder: Path) -> None:
    """Write down each key when the ledger has said that it is stored."""
    log = os.open(folder / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    add = Ledger.add

    def added(self: Ledger, traces: Iterable[Trace]) -> int:
        traces = list(traces)
        new = add(self, traces)
        os.write(log, "".join(f"{trace.key}\n" for trace in traces).encode())
        return new

    Ledger.add = added  # type: ignore[method-assign]


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def main() -> None:
    export.ROW_GROUP, export.SHARD_ROWS = 32, 128
    serve(lambda folder, job: chain(folder, job["seed"], job["num_samples"]))


def serve(work: Callable[[Path, dict[str, Any]], None]) -> None:
    """Take jobs from standard input until there are no more, each in a forked child."""
    pa.array([0])  # imports pandas
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            say(f"pid {os.getpid()}")
            os.environ[VARIABLE] = job["failpoint"]
            folder = Path(job["folder"])
            folder.mkdir(exist_ok=True)
            acknowledge(folder)
            work(folder, job)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say(f"end {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
