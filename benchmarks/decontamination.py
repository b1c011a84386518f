"""Findings of decontamination's four tests, by the threshold of 8-gram containment, on public questions.

    python -m benchmarks.decontamination [--data DIR]

Two sides. What has to be found: each suite's own questions with every number raised by one, with each twelfth and with
each ninth word replaced. What has to be left: GSM8K's training questions against all four suites; the first that are
dropped are shown with the text. The questions come from --data or POTSTILL_BENCH_DATA, else from the Hub; results go to
benchmarks/results/<device>/decontamination.json.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable

from benchmarks.device import device_name, write_result
from distill.benchmarks import bench_folder
from distill.decontaminate import HeldOutQuestions
from distill.problems.benchmark import read_benchmark
from distill.records import Problem

SUITES = ("gsm8k", "math500", "aime24", "aime25")
THRESHOLDS = (None, 0.8, 0.5, 0.4, 0.3)
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the benchmark files")
    folder = bench_folder(parser.parse_args().data)
    held_out = {suite: [problem.prompt for problem in read_benchmark(suite, "test", folder)] for suite in SUITES}
    training = read_benchmark("gsm8k", "train", folder)
    rows = []
    for threshold in THRESHOLDS:
        started = time.process_time()
        index = HeldOutQuestions(held_out, training, min_containment=threshold)
        dropped = [found for problem in training if (found := index.match(problem))]
        row = {
            "min_containment": threshold,
            "num_training": len(training),
            "num_dropped": len(dropped),
            "cpu_seconds": round(time.process_time() - started, 2),
            "found": {
                name: {suite: round(share_found(index, change, prompts), 4) for suite, prompts in held_out.items()}
                for name, change in CHANGES.items()
            },
        }
        rows.append(row)
        print(json.dumps(row))
        for found in dropped[:SHOWN]:
            print(f"  a training question {found}")
    print(write_result("decontamination", {"device": device_name(), "rows": rows}))


def question(prompt: str) -> Problem:
    return Problem(prompt=prompt, answer=None, grader="math", source="benchmark")


def share_found(index: HeldOutQuestions, change: Callable[[str], str], prompts: list[str]) -> float:
    return sum(index.match(question(change(prompt))) is not None for prompt in prompts) / len(prompts)


def each(number: int) -> Callable[[str], str]:
    """Replace each word whose place is a multiple of `number`."""

    def change(text: str) -> str:
        return " ".join("thing" if place % number == 0 else word for place, word in enumerate(text.split(), start=1))

    return change


CHANGES: dict[str, Callable[[str], str]] = {
    "numbers raised by one": lambda text: re.sub(r"\d+", lambda match: str(int(match[0]) + 1), text),
    "each twelfth word": each(12),
    "each ninth word": each(9),
}


if __name__ == "__main__":
    main()
