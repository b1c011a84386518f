"""Numbers in README and docs are those of benchmarks/results, written by `make readme`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.keep_run import keep_run
from benchmarks.readme import CHART, REPOSITORY, DocumentError, documents, keep_chart, keep_summary, written
from benchmarks.readme_tables import TABLES
from eval.compare import compare_run
from eval.report import write_report
from tests.eval.synthetic_run import write_synthetic_run

# What only a measurement says. Limits and settings ("20 ms apart", "at most 64 KiB") may stand in prose.
MEASURED = re.compile(r" ± |tokens/s|TFLOP/s|TB/s| us\b|times the mean|pass@1 of \d|\d\.\d(?: percent|%)")
CARDS = [
    ("a", "teacher", 9_400_000, 0.988, 0.005),
    ("small-base", "base", 234_560, 0.065, 0.009),
    ("small-direct", "direct", 234_560, 0.034, 0.006),
    ("small-distilled", "distilled", 234_560, 0.377, 0.021),
]


def card(name: str, role: str, size: int, value: float, stderr: float) -> dict[str, object]:
    counts = {"num_parameters": size, "num_active_parameters": size // 2, "num_questions": 400, "num_samples": 1600}
    return {"name": name, "role": role, "value": value, "stderr": stderr, **counts}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    summary = {
        "stages": [{"name": "generate", "seconds": 130.4, "peak_rss_bytes": 1}, {"name": "eval", "seconds": 99.7}],
        "models": [card(*of) for of in CARDS],
        "funnel": [],
        "audit": None,
    }
    path = tmp_path / "runs/pico/report/summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(summary))
    return tmp_path / "runs/pico"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_documents_hold_what_the_results_say(path: Path) -> None:
    text = path.read_text("utf-8")
    assert written(text, path.name) == text, "make readme"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_measurement_stands_outside_a_block(path: Path) -> None:
    prose = re.sub(r"<!-- results: .*?<!-- end -->", "", path.read_text("utf-8"), flags=re.DOTALL)
    assert [line for line in prose.splitlines() if MEASURED.search(line)] == []


def test_every_table_is_in_a_document() -> None:
    used = {name for path in documents() for name in re.findall(r"<!-- results: ([\w-]+) ", path.read_text("utf-8"))}
    assert used == TABLES.keys()


def test_a_run_becomes_the_table(run: Path, tmp_path: Path) -> None:
    kept = keep_summary(run, tmp_path / "results", "a-machine")
    assert kept == tmp_path / "results/a-machine/pico-summary.json"
    text = "before\n<!-- results: pico-scores a-machine -->\nold\n<!-- end -->\nafter\n"
    now = written(text, "README.md", tmp_path / "results")
    assert "The teacher (9.4M parameters, 4.7M active) scores 98.8 ± 0.5." in now
    assert "| small | 234,560 | 6.5 ± 0.9 | 3.4 ± 0.6 | **37.7 ± 2.1** |" in now
    assert now.startswith("before\n")
    assert now.endswith("<!-- end -->\nafter\n")
    assert "old" not in now
    assert written(now, "README.md", tmp_path / "results") == now
    seconds = written(text.replace("scores", "seconds"), "README.md", tmp_path / "results")
    assert "take 3 min 50 s: generate 130 s, eval 100 s." in seconds


def test_the_chart_is_that_of_the_device_in_the_readme(run: Path, tmp_path: Path) -> None:
    (run / "report" / CHART).write_bytes(b"a chart")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- results: pico-scores a-machine -->\n<!-- end -->\n")
    assert keep_chart(run, "another", tmp_path) is None
    assert keep_chart(run, "a-machine", tmp_path) == tmp_path / "docs/report.png"
    assert (tmp_path / "docs/report.png").read_bytes() == b"a chart"


def test_no_run_keeps_what_is_there(tmp_path: Path) -> None:
    assert keep_summary(tmp_path, tmp_path / "results", "a-machine") is None
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results: nothing amd-epyc -->\n<!-- end -->\n", "no table is called nothing"),
        ("<!-- results: memory nowhere -->\n<!-- end -->\n", "cannot be read"),
        ("<!-- results: memory -->\n<!-- end -->\n", "not `results: NAME DEVICE`"),
        ("<!-- results: memory nvidia-h200 -->\n", "is not closed"),
    ],
)
def test_a_marker_that_means_nothing_is_an_error(text: str, message: str) -> None:
    with pytest.raises(DocumentError, match=re.escape(message)):
        written(text, "README.md")


SMALL = "# potstill\n\n<!-- results: small-scores a-machine -->\n<!-- end -->\n\nmore\n"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run of real models' suites and sizes, reported by the program."""
    run = write_synthetic_run(tmp_path / "runs/small", suites=("gsm8k", "math500"), questions=12)
    cost = {"elapsed_s": lambda: 2.0, "peak_rss_bytes": lambda: 1}
    write_report(compare_run(run), run / "report", device="A Machine", **cost)
    return run


@pytest.mark.slow
def test_a_run_is_kept_as_it_wrote_itself(finished: Path, tmp_path: Path) -> None:
    kept = keep_run(finished, tmp_path / "results")
    assert kept == tmp_path / "results/nvidia-h200/small"
    names = {path.name for path in kept.iterdir()}
    assert {"summary.json", "index.html", "scores.csv", "summary.md", "accuracy_by_parameters-gsm8k.png"} <= names
    assert "traces" not in names
    assert all((kept / name).read_bytes() == (finished / "report" / name).read_bytes() for name in names)
    (kept / "accuracy_by_parameters-aime24.png").write_bytes(b"of an earlier run")
    keep_run(finished, tmp_path / "results")
    assert {path.name for path in kept.iterdir()} == names
    (finished / "report/summary.json").unlink()
    with pytest.raises(OSError, match=r"summary\.json"):
        keep_run(finished, tmp_path / "results")
    assert {path.name for path in kept.iterdir()} == names, "nothing kept is lost"


@pytest.mark.slow
def test_before_the_run_there_is_no_table_and_after_it_every_suite(finished: Path, tmp_path: Path) -> None:
    assert written(SMALL, "README.md", tmp_path / "results") == SMALL
    keep_run(finished, tmp_path / "results")
    now = written(SMALL.replace("a-machine", "nvidia-h200"), "README.md", tmp_path / "results")
    summary = json.loads((finished / "report/summary.json").read_text())
    assert "on one machine (NVIDIA H200): the stages take 5 min 37 s (generate 74 s" in now
    for suite, name in zip(summary["suites"], ("GSM8K, 12 questions", "MATH-500, 60 questions"), strict=True):
        block = now[now.index(name) :]
        for student in summary["students"]:
            of = {model["role"]: model for model in suite["models"] if model["student"] == student["name"]}
            cells = [percent(of[role]["scores"]["pass@1"]) for role in ("base", "direct", "distilled")]
            gained = percent(student["gained"][suite["name"]]["base"], "+")
            size = f"{student['num_parameters']:,}"
            assert f"| {student['name']} | {size} | {cells[0]} | {cells[1]} | **{cells[2]}** | {gained} |" in block
        assert suite["size_verdict"] in block
    assert written(now, "README.md", tmp_path / "results") == now
    assert written(now.replace("nvidia-h200", "a-machine"), "README.md", tmp_path / "results") == SMALL


def percent(score: dict, sign: str = "") -> str:
    value, low, high = (100 * number for number in (score["value"], *score["ci95"]))
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def test_check_exits_with_the_state_of_the_documents() -> None:
    command = [sys.executable, "-m", "benchmarks.readme", "--check"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def anchors(path: Path) -> set[str]:
    """The headings of a page, as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path", [*documents(), REPOSITORY / "LOG.md"], ids=lambda path: path.relative_to(REPOSITORY).as_posix()
)
def test_links_into_a_page_lead_to_its_headings(path: Path) -> None:
    for page, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", path.read_text("utf-8")):
        target = path.parent / page if page else path
        assert anchor in anchors(target), f"{page}#{anchor}"


def test_the_log_is_newest_first_and_its_index_complete() -> None:
    text = (REPOSITORY / "LOG.md").read_text("utf-8")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    dates = [title.partition(":")[0] for title in titles]
    assert dates == sorted(dates, reverse=True)
    assert len(re.findall(r"^\| \d{4}-\d\d-\d\d \| \[", text, re.MULTILINE)) == len(titles)
