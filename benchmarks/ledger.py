"""A million samples: what a resumed `generate` and its export need, in seconds and in memory.

    python -m benchmarks.ledger [--samples 1000000] [--per-problem 4] [--folder DIR]

A ledger is filled with samples of about a kilobyte, all but one in a thousand of those that a recipe wants. Then the
real generate stage runs in a fresh process, over a teacher that answers at once: "resume scan" is the time until the
teacher is asked (problems read, keys made, the ledger opened, checked and searched), "export" that in which the shards
are written. The same two once more for a run in which nothing is missing. Seconds are of the clock, CPU seconds of the
process; memory is the peak resident set. Results go to benchmarks/results/<device>/ledger.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.device import device_name, write_result
from distill.ledger import Ledger
from distill.manifest import MANIFEST
from distill.problems import iterate_problems
from distill.problems.packed import PackedProblems
from distill.progress import Task
from distill.recipe import Recipe
from distill.records import Completion, Sampling, TeacherIdentity, Trace, TraceRequest
from distill.wanted import WantedSamples
from pipelines.context import Context
from pipelines.stages.generate import generate

ROOT = Path(__file__).resolve().parent.parent
IDENTITY = TeacherIdentity(name="instant", weights="w", template="t", backend="benchmark", backend_version="1")
TEXT = "<think>\n" + "\n".join(f"step {step}: {step} + {step} = {2 * step}" for step in range(40)) + "\n</think>\n\n"
MISSING = 1_000
BATCH = 5_000


class InstantTeacher:
    identity = IDENTITY

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        self._clock.mark("resume scan")
        for request in requests:
            yield Completion(
                request=request, text=TEXT + "\\boxed{1}", finish_reason="stop", num_prompt_tokens=9, num_tokens=300
            )

    def close(self) -> None:
        pass


class Clock:
    """A Progress that notes how long the parts of a run take and what memory they needed at the most until then."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}
        self._start()

    def _start(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def mark(self, name: str) -> None:
        if name not in self.parts:
            self.parts[name] = {
                "seconds": round(time.monotonic() - self._wall, 2),
                "cpu_seconds": round(time.process_time() - self._cpu, 2),
                "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            }

    @contextmanager
    def task(self, name: str, total: float, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        if name != "export":
            yield self  # type: ignore[misc]
            return
        self.mark("resume scan")  # of a run that lacks nothing
        self._start()
        yield self  # type: ignore[misc]
        self.mark("export")

    def advance(self, amount: float = 1, **facts: str | float) -> None:
        pass


def recipe_of(folder: Path, per_problem: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "million",
            "problems": [{"kind": "local", "path": str(folder / "problems.jsonl")}],
            "teacher": {"backend": "openai", "model": "instant"},
            "generate": {"num_samples": per_problem, "grade": False},
            "distill": {"students": ["x"]},
            "eval": {"held_out": {"families": {"gcd": {}}, "count": 9, "split": "held_out"}},
        }
    )


def fill(folder: Path, num_samples: int, per_problem: int) -> None:
    """The recipe's questions, and a ledger that lacks one in `MISSING` of its samples."""
    num_problems = num_samples // per_problem
    with (folder / "problems.jsonl").open("w") as file:
        for number in range(num_problems):
            prompt = (
                f"What is the remainder of {number * 7919} times {number + 12345} divided by {number % 97 + 3}? " * 3
            )
            file.write(json.dumps({"prompt": prompt, "answer": number}) + "\n")
    recipe = recipe_of(folder, per_problem)
    problems = PackedProblems(iterate_problems(recipe.problems, base_dir=folder))
    wanted = WantedSamples(problems, IDENTITY, recipe.generate.sampling)
    (folder / "generate").mkdir()
    with Ledger.open(folder / "generate" / "ledger.sqlite") as ledger:
        batch = []
        for number in range(num_problems):
            for index in range(per_problem):
                if (number * per_problem + index) % MISSING:
                    batch.append(
                        Trace(
                            key=wanted.key((number, index)),
                            problem_id=problems.id(number),
                            sample_index=index,
                            text=f"{TEXT}\\boxed{{{number * 31 + index}}}",
                            finish_reason="stop",
                            num_prompt_tokens=60,
                            num_tokens=350,
                            teacher="instant",
                        )
                    )
            if len(batch) >= BATCH:
                ledger.add(batch)
                batch = []
        ledger.add(batch)


def run(folder: Path, per_problem: int) -> None:
    """One run of the stage in this process; prints what it took."""
    clock = Clock()
    context = Context(folder, clock, open_teacher=lambda config: InstantTeacher(clock))
    manifest = generate(recipe_of(folder, per_problem), folder, context)
    print(json.dumps({"parts": clock.parts, "counts": manifest.counts}))


def measured(folder: Path, per_problem: int) -> dict[str, Any]:
    (folder / "generate" / MANIFEST).unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.ledger", "--run", str(folder), "--per-problem", str(per_problem)]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--per-problem", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the ledger is made; none: a temporary folder")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run, arguments.per_problem)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        fill(folder, arguments.samples, arguments.per_problem)
        size = (folder / "generate" / "ledger.sqlite").stat().st_size
        rows = []
        for what in ("one in a thousand missing", "nothing missing"):
            result = measured(folder, arguments.per_problem)
            rows += [{"run": what, "part": part, **numbers} for part, numbers in result["parts"].items()]
        counts = result["counts"]
        assert counts["samples"] == arguments.samples, counts
    result = {
        "device": device_name(),
        "num_samples": arguments.samples,
        "num_problems": counts["problems"],
        "ledger_bytes": size,
        "load_average": round(os.getloadavg()[1], 1),  # of five minutes: what else the machine did
        "rows": rows,
    }
    path = write_result("ledger", result)
    print(f"{result['device']}: {arguments.samples:,} samples of {counts['problems']:,} problems, {size / 1e9:.2f} GB")
    for row in rows:
        numbers = f"{row['seconds']:8.1f} s {row['cpu_seconds']:8.1f} s CPU {row['peak_rss_bytes'] / 2**20:8.0f} MiB"
        print(f"  {row['run']:28}{row['part']:14}{numbers}")
    print(f"\n{path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
