"""Students' folders in the native backend, behind the server and on the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from distill.errors import CheckpointError, UserInputError
from distill.recipe import NativeTeacher
from distill.records import Problem, Sampling, TraceRequest
from teacher.backends import open_teacher
from teacher.backends.native.backend import NativeBackend
from teacher.http.app import build_app
from teacher.models.load import read_facts
from tests.pipelines.tiny_world import COMMAND, ENVIRONMENT
from tests.repository import REPOSITORY

STUDENTS = REPOSITORY / "students" / "pico"
NAMES = ["qwen2-0.2m", "llama-0.4m"]
SAMPLING = Sampling(temperature=0.7, max_tokens=16, seed=3)


def opened(name: str, **settings: object) -> NativeBackend:
    teacher = open_teacher(NativeTeacher(model=name, batch_size=4, **settings), base_dir=STUDENTS)
    assert isinstance(teacher, NativeBackend)
    return teacher


def requests(count: int) -> list[TraceRequest]:
    problems = [Problem(prompt=f"What is {n} + 4?", answer=None, grader="math", source="t") for n in range(count)]
    return [TraceRequest(problem=problem, sample_index=0) for problem in problems]


def texts(teacher: NativeBackend, count: int) -> dict[str, str]:
    return {done.request.problem.id: done.text for done in teacher.generate(requests(count), SAMPLING)}


@pytest.mark.parametrize("name", NAMES)
def test_a_student_writes_the_same_in_this_process_and_in_workers(name: str) -> None:
    teacher = opened(name)
    teacher.max_workers = 1
    here = texts(teacher, 8)
    teacher.max_workers = 2
    assert texts(teacher, 8) == here
    assert len(set(here.values())) > 1
    assert read_facts(STUDENTS / name).num_parameters == {"qwen2-0.2m": 234_560, "llama-0.4m": 461_664}[name]


def test_what_changes_results_changes_the_identity() -> None:
    plain, invariant, other = opened(NAMES[0]), opened(NAMES[0], batch_invariant=True), opened(NAMES[1])
    assert plain.identity.backend_version != invariant.identity.backend_version
    assert plain.identity.weights == invariant.identity.weights != other.identity.weights
    assert invariant._worker_engine.batch_invariant
    assert not plain._worker_engine.batch_invariant


def test_a_student_s_type_on_a_cpu_can_be_chosen() -> None:
    auto, same, half = opened(NAMES[0]), opened(NAMES[0], dtype="float32"), opened(NAMES[0], dtype="bfloat16")
    assert texts(auto, 4) == texts(same, 4)
    assert half.engine.precision == half._worker_engine.dtype == "bfloat16"
    assert half.identity.backend_version != auto.identity.backend_version
    half.max_workers = 1
    here = texts(half, 8)
    half.max_workers = 2
    assert texts(half, 8) == here


def test_a_type_is_refused_where_it_is_not_for() -> None:
    teacher = NativeTeacher(model="teacher/pico", dtype="bfloat16")
    with pytest.raises(UserInputError, match=r"teacher: dtype: .*is for qwen2.* this is deepseek_v3 on a cpu"):
        open_teacher(teacher, base_dir=REPOSITORY)
    with pytest.raises(ValidationError, match="dtype: bfloat16 goes neither with ranks nor with batch_invariant"):
        NativeTeacher(model=NAMES[0], dtype="bfloat16", batch_invariant=True)


def test_the_end_of_a_turn_ends_an_answer_where_only_the_template_says_so(tmp_path: Path) -> None:
    folder = shutil.copytree(STUDENTS / NAMES[0], tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    teacher = open_teacher(NativeTeacher(model=str(folder)), base_dir=Path())
    assert isinstance(teacher, NativeBackend)
    assert teacher.engine.eos_token_ids == {2, 3}


def test_a_base_without_a_chat_template_goes_on_with_texts(tmp_path: Path) -> None:
    folder = shutil.copytree(STUDENTS / NAMES[0], tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        open_teacher(NativeTeacher(model=str(folder)), base_dir=Path())
    teacher: Any = open_teacher(NativeTeacher(model=str(folder)), base_dir=Path(), needs_template=False)
    teacher.max_workers = 1
    with TestClient(build_app(teacher, model="base", sampling=SAMPLING), base_url="http://localhost") as client:
        text = client.post("/v1/completions", json={"model": "base", "prompt": "3 + 4 ="}).json()["choices"][0]
        assert text["finish_reason"] in ("stop", "length")
        messages = [{"role": "user", "content": "3 + 4 ="}]
        for fields in {}, {"tools": [{"type": "function", "function": {"name": "add"}}]}:
            refused = client.post("/v1/chat/completions", json={"model": "base", "messages": messages, **fields})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools" if fields else "messages")
            assert fields or "no chat template" in refused.text


def test_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    folder = shutil.copytree(STUDENTS / NAMES[0], tmp_path / "base")
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"model_type": "qwen4"}))
    with pytest.raises(CheckpointError, match=r"config.json: model_type: .*'qwen4'; did you mean 'qwen[23]'"):
        open_teacher(NativeTeacher(model=str(folder)), base_dir=Path())


@pytest.mark.slow
def test_a_folder_is_served_to_openai_s_client() -> None:
    openai = pytest.importorskip("openai")
    command = [*COMMAND, "serve", str(STUDENTS / NAMES[0]), "--port", "0"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            client = openai.OpenAI(base_url=url, api_key="none")
            message = [{"role": "user", "content": "What is 3 + 4?"}]
            asked = {"model": NAMES[0], "messages": message, "max_tokens": 12, "temperature": 0}
            answer = client.chat.completions.create(**asked)
            assert answer.usage.completion_tokens <= 12
            assert answer.choices[0].message.content
            assert client.chat.completions.create(**asked).choices[0].message == answer.choices[0].message
        finally:
            os.kill(server.pid, signal.SIGTERM)
    assert server.returncode == 0


def test_a_folder_takes_no_overrides() -> None:
    command = [*COMMAND, "serve", str(STUDENTS / NAMES[0]), "--set", "teacher.batch_size=3"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--set" in done.stderr
