"""The benchmark of expert parallelism at toy sizes: what it prints and writes, also where a section fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import parallel, parallel_timing
from tests.repository import REPOSITORY

LAYER = {"FP8 layer, prefill", "FP8 layer, decode"}
PLACES = {"fixed places, dispatch", "fixed places, combine", *LAYER}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("only", "whats"),
    [
        ("throughput", {"throughput, dispatch", "throughput, combine"}),
        ("places", PLACES),
        pytest.param(
            "", {"all-to-all", "low latency, exchange", "throughput, dispatch", "throughput, combine", *PLACES},
            marks=pytest.mark.torture,
        ),
    ],
)  # fmt: skip
def test_the_program_prints_a_table_and_writes_it(tmp_path: Path, only: str, whats: set[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.parallel", "--dry-run", "--only", only, "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout[-2_000:] + result.stderr[-2_000:]
    written = json.loads((tmp_path / ("parallel-part.json" if only else "parallel.json")).read_text())
    assert {row["what"] for row in written["rows"]} == whats
    for row in written["rows"]:
        assert row["us"] > 0
        assert f"{row['what']} " in result.stdout
        if row["what"] in LAYER:
            assert row["peers"]["one rank"] > 0
        elif row["what"] != "all-to-all":
            assert row["floor_us"] > 0
            assert row["peers"]["all-to-all"] > 0
        if row["what"] != "all-to-all":
            assert 0 <= row["error"] <= parallel_timing.ERROR


def rows_of(program: str, name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{program}", "--dry-run", "--out", str(folder)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout[-2_000:] + result.stderr[-2_000:]
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
def test_serving_over_ranks_is_timed_beside_one(tmp_path: Path) -> None:
    rows = rows_of("parallel_serving", "parallel-serving", tmp_path)["rows"]
    assert {(row["scenario"], row["ranks"]) for row in rows} == {(s, n) for s in ("decode", "prefill") for n in (1, 2)}
    assert all(row["times_one"] == 1 for row in rows if row["ranks"] == 1)
    assert all(row["tokens_per_s"] > 0 and row["times_one"] > 0 for row in rows)


@pytest.mark.slow
def test_whole_steps_are_timed_beside_halves(tmp_path: Path) -> None:
    result = rows_of("overlap", "overlap", tmp_path)
    assert all(result[kind]["tokens_per_s"] > 0 for kind in ("whole", "in halves"))
    assert not (tmp_path / "overlap.svg").exists()  # nothing overlaps on a CPU


@pytest.mark.slow
def test_placements_by_recorded_loads_even_them_out(tmp_path: Path) -> None:
    result = rows_of("placement", "placement", tmp_path)
    assert len(result["rows"]) == 2 * 3 * 4  # over all ranks and by nodes, windows, layers
    for row in result["rows"]:
        assert 1 <= row["anew"] <= row["carried_over"]
        assert row["anew"] < row["in_order"]
    assert {sum(loads_E) % 8 for window in result["loads"].values() for loads_E in window} == {0}


@pytest.mark.slow
def test_a_pipeline_is_timed_beside_its_simulation(tmp_path: Path) -> None:
    rows = rows_of("pipeline", "pipeline-bubble", tmp_path)["rows"]
    assert [row["schedule"] for row in rows] == ["1f1b", "dualpipev"]
    for row in rows:
        assert 0 < row["simulated_bubble_ms"] < row["simulated_step_ms"]
        assert 0 < row["bubble_ms"] < row["step_ms"]
    curves = json.loads((tmp_path / "pipeline-curve.json").read_text())
    assert len(curves["dualpipev"]) == 50
    assert curves["dualpipev"][-1] < 0.05 * curves["dualpipev"][0]
    assert curves["apart"] < 1e-3  # FP32 sums in another order


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    command = [sys.executable, "-m", "benchmarks.parallel", "--dry-run", "--only", "no such section"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "no section matches" in result.stderr


def test_a_section_that_fails_is_a_row_that_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    (row,) = parallel.section_rows("no such section", 1, toy=True)
    assert row.us is None
    assert "KeyError" in row.failed
    parallel.print_table({"device": "x", "torch": "y", "nccl": None, "sizes": "toy"}, [row])
    assert "FAILED: " in capfd.readouterr().out


def test_a_wrong_result_has_no_time() -> None:
    x, weights = torch.ones(2, 128, dtype=torch.bfloat16), torch.full((2, 2), 0.5)
    assert parallel_timing.wrong_by(x, weights, x.float()) == 0
    with pytest.raises(RuntimeError, match="the result is wrong"):
        parallel_timing.wrong_by(x, weights, 1.02 * x.float())
