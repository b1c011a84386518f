"""Cost of curation: seconds and memory of the filters over synthetic traces, by settings.

    python -m benchmarks.curation [--traces 100000] [--words 300] [--only defaults]

Four samples a problem; every tenth sample is another one with a hundredth of its words changed. Each row runs in a
process of its own, over the same Parquet file: the pass of the filters, the pass that measures near-duplicates where
they are looked for, and the pass that writes. Grading is not part of it. Peak memory is the process's own, with the
questions, which curation does hold. Results go to benchmarks/results/<device>/curation.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device import RESULTS, device_name, write_result
from distill.curate import DroppedTrace, ExampleForm, filter_traces, outcomes
from distill.recipe import UNINSTRUCTED, BestOfN, CurateConfig, Difficulty, NearDuplicates
from distill.records import Example, Problem, Trace, Verdict
from distill.tables import iterate_records, read_records, record_writer, write_records

SAMPLES = 4
VOCABULARY = 20_000
WRONG_SHARE = 0.2
NUM_HELD_OUT = 2_000
CONFIGS = {
    "defaults": CurateConfig(),
    "without loops": CurateConfig(drop_loops=False),
    "near-duplicate completions": CurateConfig(near_duplicates=NearDuplicates(of="completions")),
    "every filter": CurateConfig(
        language="en",
        difficulty=Difficulty(max_pass_rate=0.99),
        near_duplicates=NearDuplicates(of="both"),
        best_of_n=BestOfN(keep=2),
        max_per_problem=2,
    ),
}


def main() -> None:
    arguments = parse_arguments()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_traces(folder, arguments.traces, arguments.words)
        size = (folder / "traces.parquet").stat().st_size
        print(f"{arguments.traces:,} traces of {arguments.words} words, {size / 1e6:,.0f} MB of Parquet")
        for name in arguments.only or CONFIGS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measured, (name, folder)))
            print(json.dumps(rows[-1]))
    path = RESULTS / device_name() / "curation.json"
    kept = json.loads(path.read_text())["rows"] if path.is_file() else []
    shape = {"num_traces": arguments.traces, "words": arguments.words}
    made = [{**shape, **row} for row in rows]
    others = [row for row in kept if not any(same(row, new) for new in made)]
    table = sorted([*others, *made], key=lambda row: (row["num_traces"], row["name"]))
    print(write_result("curation", {"device": device_name(), "rows": table}))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[field] == other[field] for field in ("name", "num_traces", "words"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=list(CONFIGS))
    return parser.parse_args()


def write_traces(folder: Path, num_traces: int, num_words: int) -> None:
    random = np.random.default_rng(1)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lengths = random.integers(2, 9, VOCABULARY)
    vocabulary = np.array(["".join(random.choice(letters, length)) for length in lengths], dtype=object)
    problems = [
        Problem(prompt=" ".join(random.choice(vocabulary, 20)) + "?", answer="1", grader="math", source="synthetic")
        for _ in range(num_traces // SAMPLES)
    ]
    write_records(folder / "problems.parquet", problems, Problem)
    held_out = [" ".join(random.choice(vocabulary, 30)) for _ in range(NUM_HELD_OUT)]
    (folder / "held_out.txt").write_text("\n".join(held_out))
    with record_writer(folder / "traces.parquet", Trace) as writer:
        words = random.choice(vocabulary, num_words)
        for number in range(num_traces):
            if number % 10 == 9:
                words = words.copy()
                places = random.integers(0, num_words, max(1, num_words // 100))
                words[places] = random.choice(vocabulary, len(places))
            else:
                words = vocabulary[random.integers(0, VOCABULARY, num_words)]
            lines = "\n".join(" ".join(words[start : start + 12]) for start in range(0, num_words, 12))
            problem = problems[number // SAMPLES]
            writer.write(
                Trace(
                    key=f"{problem.id}{number % SAMPLES}",
                    problem_id=problem.id,
                    sample_index=number % SAMPLES,
                    text=f"<think>\n{lines}\n</think>\n\n\\boxed{{1}}",
                    finish_reason="stop",
                    num_prompt_tokens=30,
                    num_tokens=num_words,
                    teacher="synthetic",
                )
            )


def measured(name: str, folder: Path) -> dict[str, Any]:
    """One row, in a fresh process."""
    config = CONFIGS[name]
    problems = {problem.id: problem for problem in read_records(folder / "problems.parquet", Problem)}
    states = np.random.default_rng(2)

    def graded() -> Iterator[tuple[Trace, Verdict]]:
        nonlocal states
        states = np.random.default_rng(2)
        correct, wrong = Verdict(state="correct", extracted="1"), Verdict(state="wrong")
        for trace in iterate_records(folder / "traces.parquet", Trace):
            yield trace, wrong if states.random() < WRONG_SHARE else correct

    started, cpu = time.perf_counter(), time.process_time()
    held_out = {"held out": (folder / "held_out.txt").read_text().splitlines()}
    filtered = filter_traces(problems, graded, config, held_out, "tagged")
    sifting = time.perf_counter() - started
    with (
        record_writer(folder / "examples.parquet", Example) as examples,
        record_writer(folder / "dropped.parquet", DroppedTrace) as dropped,
    ):
        for _, one in outcomes(problems, graded(), filtered.dropped, ExampleForm("tagged", UNINSTRUCTED)):
            if isinstance(one, DroppedTrace):
                dropped.write(one)
            else:
                examples.write(one)
    return {
        "name": name,
        "seconds": round(time.perf_counter() - started, 1),
        "filter_seconds": round(sifting, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "num_kept": filtered.num_kept,
        "funnel": {step["filter"]: step["in"] - step["out"] for step in filtered.funnel},
    }


if __name__ == "__main__":
    main()
