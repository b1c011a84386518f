"""The benchmark of the engine at toy sizes: all scenarios, what is printed and written, and an engine that fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serve import floor, pico, real, students, v3
from tests.repository import REPOSITORY


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_program_prints_a_table_and_writes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.serve", "--dry-run", "--engines", "ours,absent", "--out", tmp_path]
    # In the place of a published model: what is measured is not looked at here.
    shutil.copytree(pico.MODELS["student"], tmp_path / "models" / real.NAMES[0])
    environment = {**os.environ, "POTSTILL_MODELS": str(tmp_path / "models")}
    told = {"capture_output": True, "text": True, "env": environment}
    result = subprocess.run(command, cwd=REPOSITORY, timeout=840, check=False, **told)
    assert result.returncode == 0, result.stdout[-2_000:] + result.stderr[-2_000:]
    written = json.loads((tmp_path / "serve.json").read_text())
    published = [f"{real.NAMES[0]} in {dtype}" for dtype in real.DTYPES]
    assert written["left_out"] == [f"{name}: absent" for name in ("v3", "pico", "student", *published)]
    found = [(row["engine"], row["scenario"], row["batch"]) for row in written["rows"]]
    assert found == [
        ("ours", "decode", 1),
        ("ours", "decode", 2),
        ("ours", "prefill", v3.PREFILL),
        ("ours", "pico, requests at once", 4),
        ("ours", "student, requests at once", 4),
        *(("ours", scenario, 1) for scenario in published),
    ]
    of_students = json.loads((tmp_path / "serve-students.json").read_text())
    assert of_students["left_out"] == ["Qwen2.5-Coder-1.5B-Instruct: not in models/ or $POTSTILL_MODELS"]
    found = [(row["engine"], row["model"], row["scenario"], row["batch"]) for row in of_students["rows"]]
    assert found == [("ours", real.NAMES[0], kind, number) for number in (1, 2) for kind in students.KINDS]
    for row in of_students["rows"]:
        assert row["tokens_per_s"] > 0
        assert 0 < sum(row["tokens"]) <= row["prompts"] * (4 if row["scenario"] == students.STEADY else 8)
    for row in written["rows"]:
        assert row["tokens_per_s"] > 0
        assert f"{row['tokens_per_s']:.0f}/s" in result.stdout
        if row["scenario"] not in ("prefill", *published):
            assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["step_ms"])


def test_the_floor_of_a_step_counts_what_must_be_read() -> None:
    """By hand for one sequence: attention, a dense layer, nine experts of each MoE layer, latents, the head."""
    scale = v3.scale(moe_layers=2, batches=[1], toy=False)
    attention = 7168 * (1536 + 576) + 1536 * 128 * 192 + 128 * 128 * 7168 + 2 * 128 * 512 * 256
    expert = 3 * 7168 * 2048
    moe = expert * 9 + 2 * 7168 * 256
    cache = (1024 + 36) * 576 * 2
    wanted = 3 * (attention + cache) + 3 * 7168 * 18432 + 2 * moe + 2 * 129280 * 7168
    assert v3.step_bytes(scale, 1) == pytest.approx(wanted, rel=1e-9)
    # Many sequences meet nearly every expert, and never more than there are.
    assert v3.step_bytes(scale, 256) < v3.step_bytes(scale, 1) + 2 * 248 * expert + 3 * 255 * cache


def test_the_floor_of_a_student_counts_what_a_step_multiplies_and_reads() -> None:
    """qwen2-0.8m by hand: its head is its embedding, so all of its parameters count."""
    given = pico.MODELS["student"], 64, 100.0
    entry, live = 4 * 2 * 2 * 32, 64 * 100.0
    flop = 2 * 862_336 * 64 + live * 4 * 4 * 4 * 32
    assert floor.step_seconds(*given, flop_per_s=1.0, bytes_per_s=1e12) == pytest.approx(flop)
    traffic = 4 * (862_336 + live * entry)
    assert floor.step_seconds(*given, flop_per_s=1e15, bytes_per_s=1.0) == pytest.approx(traffic)
