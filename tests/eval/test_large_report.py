"""A report of a large run: three suites of 1,000 questions, 16 samples of each from a teacher and four sizes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.manifest import run_stage
from distill.records import ScoreCard
from eval.harness import SAMPLES, SCORES
from eval.statistics import pass_at_1
from tests.pipelines.tiny_world import ENVIRONMENT

SUITES, QUESTIONS, SAMPLES_EACH = ("gsm8k", "math500", "held_out"), 1_000, 16
SIZES = {"a-135m": 135_000_000, "b-500m": 500_000_000, "c-1.5b": 1_500_000_000, "d-7b": 7_000_000_000}
TEXTS = 1_000
MAX_SECONDS, MAX_BYTES = 20, 10**9
REPORT = """
    import json, re, sys, time
    from pathlib import Path
    from pipelines.context import Context
    from pipelines.stages.compare import compare
    from tests.pipelines.test_stage_compare import RECIPE
    started = time.monotonic()
    compare(RECIPE, Path(sys.argv[1]), Context(base_dir=Path()))
    # Not getrusage's ru_maxrss: that of a new process begins with its parent's.
    peak_kib = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    wall_s = time.monotonic() - started
    print(json.dumps({"wall_s": wall_s, "cpu_s": time.process_time(), "peak_bytes": 1024 * peak_kib}))
"""


def write_large_run(run: Path) -> None:
    rng = random.Random(0)
    words = ["so", "we", "add", "the", "number", "of", "apples", "to", "47", "=", "$12", "and", "halve", "it.", "\n"]
    texts = [" ".join(rng.choices(words, k=rng.randint(60, 400))) for _ in range(TEXTS)]
    models = [("teacher", "teacher", 7_000_000_000, 0.9)]
    for place, (student, size) in enumerate(SIZES.items()):
        for role, skill in (("base", 0.1), ("direct", 0.2), ("distilled", 0.5)):
            models.append((f"{student}-{role}", role, size, skill + 0.05 * place))
    for name, role, size, skill in models:
        rows = [(suite, q, s) for suite in SUITES for q in range(QUESTIONS) for s in range(SAMPLES_EACH)]
        right = [rng.random() < skill for _ in rows]
        columns = {
            "suite": [suite for suite, _, _ in rows],
            "problem_id": [f"{suite}-{q}" for suite, q, _ in rows],
            "family": [f"level {q % 5}" if suite == "math500" else suite for suite, q, _ in rows],
            "sample_index": [s for _, _, s in rows],
            "prompt": [f"How many apples are {q} apples and some more, if {suite} is right?" for suite, q, _ in rows],
            "answer": [str(q) for _, q, _ in rows],
            "text": rng.choices(texts, k=len(rows)),
            "num_tokens": [300] * len(rows),
            "verdict": ["correct" if one else "wrong" for one in right],
            "extracted": [str(q if one else q + 1) for (_, q, _), one in zip(rows, right, strict=True)],
        }
        folder = run / "eval" / name
        folder.mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / SAMPLES)
        cards = []
        for number, suite in enumerate(SUITES):
            of_suite = right[number * QUESTIONS * SAMPLES_EACH :][: QUESTIONS * SAMPLES_EACH]
            score = pass_at_1([of_suite[q : q + SAMPLES_EACH] for q in range(0, len(of_suite), SAMPLES_EACH)])
            facts = {"name": name, "role": role, "architecture": "qwen2", "num_parameters": size}
            facts |= {"num_active_parameters": size, "suite": suite, "metric": "pass@1"}
            cards.append(ScoreCard(**facts, **vars(score)).model_dump(mode="json"))
        (folder / SCORES).write_text(json.dumps(cards))
    run_stage("eval", {}, {}, run / "eval", lambda: {}, [])


@pytest.mark.slow
def test_a_large_report_takes_seconds_and_less_than_a_gigabyte(tmp_path):
    """Seconds of the processor: how long others keep it is not the report's doing."""
    run = tmp_path / "large"
    write_large_run(run)
    command = [sys.executable, "-c", textwrap.dedent(REPORT), str(run)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=True)
    used = json.loads(done.stdout)
    assert used["cpu_s"] < MAX_SECONDS, used
    assert used["peak_bytes"] < MAX_BYTES, used
    report = run / "report"
    assert (report / "index.html").stat().st_size < 3_000_000
    assert len(list((report / "traces").iterdir())) == 3 * 44, "13 models, 23 questions a page"
    assert [suite["num_questions"] for suite in json.loads((report / "summary.json").read_text())["suites"]] == [
        1_000
    ] * 3
