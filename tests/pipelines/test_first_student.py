"""docs/first-student.md, run as it is written but for its size: from an empty folder to a student that answers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from distill.recipe import load_recipe
from tests.pipelines.tiny_world import ENVIRONMENT
from tests.repository import REPOSITORY

PAGE = (REPOSITORY / "docs/first-student.md").read_text(encoding="utf-8")
_, PROBLEMS, INIT, RUN, LOOK, ASK = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """`potstill` and `python` as an installation puts them on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("potstill", " -m potstill"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{module} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    return ENVIRONMENT | {"PATH": f"{programs}:{ENVIRONMENT['PATH']}"}


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_the_page_ends_with_a_student_that_answers(tmp_path: Path, environment: dict[str, str]) -> None:
    here = tmp_path / "here"
    here.mkdir()
    assert PROBLEMS.count("size=512") == 1
    look, serve = LOOK.splitlines()
    script = "\n".join([PROBLEMS.replace("size=512", "size=16"), INIT, RUN, look])
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len((here / "problems.jsonl").read_text(encoding="utf-8").splitlines()) == 64
    assert load_recipe(here / "first-student.yaml").problems[0].grader == "math"
    assert "qwen2-0.4m-distilled" in done.stdout
    assert "potstill-qwen2-0.4m (private)" in done.stdout
    for shown in re.findall(r"`(runs/[^`]+)`", PAGE):
        assert (here / shown).exists(), shown
    assert serve.startswith("potstill serve runs/first-student/distill/")
    server = ["potstill", *shlex.split(serve)[1:-1], "0"]
    with subprocess.Popen(server, cwd=here, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().split()[-1]
            words = shlex.split(ASK)
            answer = httpx.post(
                words[1].replace("http://127.0.0.1:8001/v1", address), json=json.loads(words[-1]), timeout=120
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["content"]
        finally:
            process.terminate()
            process.wait(30)
