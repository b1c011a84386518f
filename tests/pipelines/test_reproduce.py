"""`potstill reproduce`: the bundled teacher meets its own score, and with another template it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.pipelines.tiny_world import potstill
from tests.repository import REPOSITORY

LESS = ["--set", "eval.limit=24", "--set", "eval.num_samples=1"]  # of 400 questions x 4


@pytest.mark.slow
def test_a_known_model_is_inside_its_interval_and_with_a_wrong_template_outside(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    right = potstill("reproduce", "pico", *LESS, "--out", str(out), cwd=REPOSITORY)
    assert right.returncode == 0, right.stderr
    assert "inside" in right.stdout
    told = json.loads((out / "reproduce-pico" / "reproduction.json").read_text())
    assert told["inside"] is True
    assert told["reference"] == pytest.approx(0.9881)
    assert told["identity"]["backend"] == "native"

    wrong = shutil.copytree(REPOSITORY / "teacher" / "pico", tmp_path / "wrong")
    (wrong / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")  # neither turns nor <think>
    failed = potstill("reproduce", "pico", *LESS, "--set", f"teacher.model={wrong}", "--out", str(out), cwd=REPOSITORY)
    assert failed.returncode == 1, failed.stderr
    assert "OUTSIDE" in failed.stdout
    told = json.loads((out / "reproduce-pico" / "reproduction.json").read_text())
    assert told["inside"] is False
    assert told["ci95"][1] < 0


def test_an_unknown_name_is_one_line(tmp_path: Path) -> None:
    failed = potstill("reproduce", "pica", "--out", str(tmp_path / "runs"), cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("potstill: pica: no such reference")
    assert not (tmp_path / "runs").exists()
