"""GGUF files in the places of model folders: a recipe's teacher, a student's base, `serve`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from gguf import GGMLQuantizationType as Kind

from distill.errors import CheckpointError
from distill.gguf import checkpoint_folder
from distill.recipe import NativeTeacher, VllmTeacher, load_recipe, parse
from distill.recipe.students import StudentConfig
from distill.records import Problem, Sampling, TraceRequest
from pipelines.checks import check_weights, recipe_checks
from pipelines.doctor import examine_recipe
from students.preflight import preflight
from students.sft import train_student
from teacher.backends import check_folder, open_student, open_teacher
from teacher.backends.vllm.backend import located
from tests.distill.gguf.tiny_files import make_model, qwen2_tokenizer, write_gguf
from tests.pipelines.tiny_world import COMMAND, ENVIRONMENT, potstill, write_yaml
from tests.repository import REPOSITORY
from tests.students.tiny_bases import make_examples, make_student


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    tokenizer = qwen2_tokenizer()
    model = make_model("qwen2", tokenizer.get_vocab_size())
    return write_gguf(tmp_path / "tiny.gguf", model, tokenizer, pre="qwen2", matrices=Kind.Q8_0)


def write_recipe(folder: Path, model: str) -> Path:
    """A recipe whose teacher and whose student's base are `model`."""
    student = make_student(Path(model)).model_dump(mode="json")
    write_yaml(folder / "student.yaml", student)
    (folder / "problems.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}) + "\n", encoding="utf-8")
    recipe = {
        "name": "files",
        "problems": [{"kind": "local", "path": str(folder / "problems.jsonl")}],
        "teacher": {"backend": "native", "model": model},
        "distill": {"students": [str(folder / "student.yaml")]},
        "eval": {"suites": ["gsm8k"]},
    }
    write_yaml(folder / "recipe.yaml", recipe)
    return folder / "recipe.yaml"


def test_a_teacher_in_a_file_is_the_teacher_in_its_folder(tmp_path: Path, file: Path) -> None:
    requests = [TraceRequest(problem=Problem(prompt=f"{n} + 1?", answer="1", grader="math", source="t"), sample_index=0)
                for n in range(3)]  # fmt: skip
    sampling = Sampling(temperature=0, top_p=1, max_tokens=12)
    of_file = open_teacher(NativeTeacher(model=file.name), base_dir=tmp_path)
    of_folder = open_student(checkpoint_folder(file), engine="transformers", batch_size=3)
    texts = [
        {c.request.problem.prompt: c.text for c in model.generate(requests, sampling)} for model in (of_file, of_folder)
    ]
    assert texts[0] == texts[1]
    assert of_file.identity.name == "tiny"


def test_a_vllm_teacher_is_given_the_folder(tmp_path: Path, file: Path) -> None:
    config = located(VllmTeacher(model="tiny.gguf"), tmp_path)
    assert config.model == str(checkpoint_folder(file).resolve())


def test_a_student_trains_on_a_base_in_a_file(tmp_path: Path, file: Path) -> None:
    student = make_student(file, max_length=200)
    assert [finding for finding in preflight(student, "distilled") if finding.state == "error"] == []
    examples = make_examples(tmp_path / "examples.parquet", 8)
    train_student(student, examples, "distilled", tmp_path / "out")
    check_folder(tmp_path / "out", as_student=True)


def test_a_recipe_of_files_is_checked_before_it_runs(tmp_path: Path, file: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, str(file)))
    said = {name: check() for name, check in recipe_checks(recipe, tmp_path) if name in ("teacher", "students")}
    assert said == {"teacher": str(checkpoint_folder(file)), "students": "tiny"}
    check_weights(recipe, ["generate", "distill"], known=(), base_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-100], r"tiny\.gguf: .*: is truncated"),
        (
            lambda data: data.replace(b"qwen2", b"qwenX"),
            r"tiny\.gguf: general\.architecture: no architecture that is read",
        ),
    ],
)
def test_a_broken_file_is_one_line_at_every_door(tmp_path: Path, file: Path, change, message: str) -> None:
    file.write_bytes(change(file.read_bytes()))
    path = write_recipe(tmp_path, str(file))
    recipe = load_recipe(path)
    for name, check in recipe_checks(recipe, tmp_path):
        if name in ("teacher", "students"):
            with pytest.raises(CheckpointError, match=message):
                check()
    with pytest.raises(CheckpointError, match=message):
        open_teacher(recipe.teacher, base_dir=tmp_path)
    with pytest.raises(CheckpointError, match=message):
        preflight(parse(StudentConfig, make_student(file).model_dump(), where="test"), "distilled")
    found = {finding.check: finding for finding in examine_recipe(path, (), tmp_path, tmp_path / "runs")}
    assert found["teacher"].exit_code == found["students"].exit_code == 2


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    failed = potstill("generate", write_recipe(tmp_path, str(tmp_path / "gone.gguf")), "--out", tmp_path / "runs")
    assert failed.returncode == 2
    assert failed.stderr == f"potstill: {tmp_path / 'gone.gguf'}: no such file\n"
    assert not (tmp_path / "runs").exists()


def test_a_truncated_file_is_not_served(tmp_path: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    failed = potstill("serve", file, "--port", "0", POTSTILL_CACHE=str(tmp_path / "cache"))
    assert (failed.returncode, failed.stdout) == (2, "")
    assert re.fullmatch(rf"potstill: {file}: \S+: is truncated: .* ends 1 bytes later\n", failed.stderr)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.slow
def test_a_file_is_served_under_its_name(tmp_path: Path, file: Path) -> None:
    server = subprocess.Popen(
        [*COMMAND, "serve", str(file), "--port", "0"],
        cwd=REPOSITORY,
        env={**ENVIRONMENT, "POTSTILL_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        announced = server.stdout.readline()
        assert announced.startswith("serving 'tiny' on http://127.0.0.1:"), server.stderr.read()
        body = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "1 + 1?"}]}
        answer = httpx.post(f"{announced.split()[-1]}/chat/completions", json=body, timeout=60).json()
        assert answer["usage"]["completion_tokens"] in range(1, 5)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait(30)
