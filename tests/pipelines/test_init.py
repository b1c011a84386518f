"""`potstill init`: what it writes can be run, says what was answered, and replaces nothing by accident."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.errors import PotstillError
from distill.recipe import Recipe, load_recipe
from pipelines.draft import check_draft, draft_recipe, teacher_settings
from tests.pipelines.tiny_world import ENVIRONMENT, potstill, tree_of
from tests.repository import REPOSITORY

PICO = str(REPOSITORY / "teacher/pico")
NEEDED = ("--teacher", f"native:{PICO}", "--student", "qwen2-0.4m")


def write_rows(path: Path, **fields: Any) -> Path:
    """Sixty-four questions; `fields` are further columns, the same in every row."""
    rows = ({"question": f"What is {n} + {n}?", "answer": f"{2 * n}", **fields} for n in range(64))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def init(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return potstill("init", *arguments, cwd=cwd)


def test_a_recipe_is_written_that_doctor_passes(tmp_path: Path) -> None:
    write_rows(tmp_path / "My sums.jsonl")
    written = init("--problems", "My sums.jsonl", *NEEDED, "--limit", "40", cwd=tmp_path)
    assert (written.returncode, written.stderr) == (0, "")
    assert written.stdout.splitlines()[0] == "wrote my-sums.yaml"
    recipe = load_recipe(tmp_path / "my-sums.yaml")
    (source,) = recipe.problems
    assert (source.path, source.prompt_field, source.answer_field) == ("My sums.jsonl", "question", "answer")
    assert (source.grader, source.split, source.limit) == ("math", "train", 40)
    assert recipe.eval.held_out == source.model_copy(update={"split": "held_out", "limit": 16})
    assert recipe.distill.students == ("qwen2-0.4m",)
    examined = potstill("doctor", "my-sums.yaml", cwd=tmp_path)
    assert examined.returncode == 0, examined.stdout
    assert [line for line in examined.stdout.splitlines() if line.split()[0] == "error"] == []


def test_the_folder_names_the_recipe(tmp_path: Path) -> None:
    written = init("My first", "--problems", "pico", *NEEDED, cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert load_recipe(tmp_path / "My first/my-first.yaml").name == "my-first"


def test_nothing_is_replaced_unless_told_to(tmp_path: Path) -> None:
    arguments = ("--name", "mine", "--problems", "pico", *NEEDED)
    (tmp_path / "mine.yaml").write_text("precious", encoding="utf-8")
    before = tree_of(tmp_path)
    refused = init(*arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "potstill: mine.yaml: is there already; --force replaces it\n"
    assert tree_of(tmp_path) == before
    assert init(*arguments, "--force", cwd=tmp_path).returncode == 0
    assert load_recipe(tmp_path / "mine.yaml").name == "mine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "init: needed where nobody can be asked: --problems, --teacher, --student"),
        (("--problems", "pico", "--student", "qwen2-0.4m"), "init: needed where nobody can be asked: --teacher"),
        (("--problems", "none.jsonl", *NEEDED), "none.jsonl: problems.path: no such file"),
        (("--problems", "odd.jsonl", *NEEDED), "prompt_field: no field looks like the prompt; it has frage, antwort"),
        (
            ("--problems", "odd.jsonl", *NEEDED, "--prompt-field", "frage", "--answer-field", "solution"),
            "solution: m",
        ),
        (("--problems", "pico", "--teacher", "natve:x", "--student", "qwen2-0.4m"), "did you mean 'native'?"),
        (("--problems", "pico", "--teacher", "gpt", "--student", "qwen2-0.4m"), "'gpt' is no teacher; write native:F"),
        (("--problems", "pico", "--teacher", "native:none", "--student", "qwen2-0.4m"), "no such checkpoint folder"),
        (("--problems", "pico", *NEEDED[:3], "qwen2-0.5m"), "no student 'qwen2-0.5m' in the zoo; did you mean"),
        (("--problems", "sums.jsonl", *NEEDED, "--grader", "maths"), "'maths' is not known; did you mean 'math'?"),
        (("--problems", "sums.jsonl", *NEEDED, "--grader", "code"), "tests_field: programs need tests"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_nothing_is_written(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    write_rows(tmp_path / "sums.jsonl")
    (tmp_path / "odd.jsonl").write_text('{"frage": "1 + 1?", "antwort": "2"}\n', encoding="utf-8")
    before = tree_of(tmp_path)
    refused = init(*arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert says in refused.stderr
    assert refused.stdout == ""
    assert tree_of(tmp_path) == before


def test_a_person_is_asked_until_every_answer_can_be_used(tmp_path: Path) -> None:
    """Five questions in a terminal, the third and the fourth answered wrongly at first."""
    write_rows(tmp_path / "sums.jsonl")
    answers = ["sums.jsonl", "", "natve:x", f"native:{PICO}", "qwen2-0.5m", "qwen2-0.2m", "32"]
    terminal, program = pty.openpty()
    command = [sys.executable, "-m", "potstill", "init"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdin=program, stdout=program, stderr=program, start_new_session=True
    )
    os.close(program)
    said = b""
    try:
        for answer in answers:
            while not said.endswith((b"]: ", b"]: \x1b[0m")):
                said += os.read(terminal, 4_096)
            os.write(terminal, answer.encode() + b"\n")
            said += b"\n"
        while chunk := _rest_of(terminal):
            said += chunk
        assert process.wait(60) == 0, said.decode()
    finally:
        process.kill()
        os.close(terminal)
    text = said.decode()
    assert [number for number in "12345" if f"{number}. " in text] == list("12345")
    assert "did you mean 'native'?" in text
    assert "no student 'qwen2-0.5m'" in text
    recipe = load_recipe(tmp_path / "sums.yaml")
    assert (recipe.problems[0].limit, recipe.distill.students) == (32, ("qwen2-0.2m",))


def _rest_of(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4_096)
    except OSError:  # the other end is closed
        return b""


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("native:teacher/pico", {"backend": "native", "model": "teacher/pico"}),
        ("vllm:Qwen/Qwen3-8B", {"backend": "vllm", "model": "Qwen/Qwen3-8B"}),
        ("openai:deepseek-ai/DeepSeek-R1", {"backend": "openai", "model": "deepseek-ai/DeepSeek-R1"}),
        (
            "openai:a@b:c@https://api.example.com/v1",
            {"backend": "openai", "model": "a@b:c", "base_url": "https://api.example.com/v1"},
        ),
        (
            "ollama:deepseek-r1:7b",
            {"backend": "openai", "model": "deepseek-r1:7b", "base_url": "http://127.0.0.1:11434/v1"},
        ),
    ],
)
def test_a_teacher_is_one_string(text: str, settings: dict[str, Any]) -> None:
    assert teacher_settings(text) == settings


CHOICES = {"choices": ["1", "2"], "answer": "A"}
TESTS = {"test": "def check(f): assert f(1) == 2", "entry_point": "f", "canonical_solution": "    return 2"}
PROSE = {"answer": "Because the sum of two odd numbers is even."}


@pytest.mark.parametrize(
    ("fields", "grader", "others"),
    [
        ({}, "math", {}),
        ({"answer": r"\frac{3}{4}"}, "math", {}),
        ({"answer": "She has three apples and four pears.\n#### 7"}, "math", {}),
        (CHOICES, "choice", {"choices_field": "choices"}),
        (TESTS, "code", {"tests_field": "test", "entry_point_field": "entry_point"}),
        (PROSE, "judge", {}),
    ],
    ids=["numbers", "latex", "worked", "choices", "programs", "prose"],
)
@pytest.mark.parametrize("teacher", ["native:" + PICO, "openai:m@http://127.0.0.1:1/v1"], ids=["native", "endpoint"])
def test_a_file_is_graded_as_it_looks(
    tmp_path: Path, fields: dict[str, Any], grader: str, others: dict[str, str], teacher: str
) -> None:
    write_rows(tmp_path / "rows.jsonl", **fields)
    draft = draft_recipe(problems="rows.jsonl", teacher=teacher, student="qwen2-0.2m", base_dir=tmp_path)
    recipe = check_draft(draft.text(), where="rows.yaml", base_dir=tmp_path)
    (source,) = recipe.problems
    assert source.model_dump(include={"grader", *others}) == {"grader": grader, **others}
    assert (recipe.verify.judge is not None) == (grader == "judge")
    boxed = "boxed" in (getattr(recipe.teacher, "system_prompt", None) or "")
    assert boxed == (teacher.startswith("openai") and grader != "code")


@pytest.mark.parametrize("awkward", ["a: b", "- x", "yes", "7", "#hash", "quote'\"s", "тест", "{braces}", "'"])
def test_any_name_survives_the_page(tmp_path: Path, awkward: str) -> None:
    """What an answer holds is a value in the recipe, never part of its syntax."""
    write_rows(tmp_path / "rows.jsonl", **{awkward: "asked"})
    draft = draft_recipe(
        problems="rows.jsonl",
        teacher=f"openai:{awkward}",
        student="qwen2-0.2m",
        prompt_field=awkward,
        system_prompt=awkward,
        base_dir=tmp_path,
    )
    recipe = Recipe.model_validate(yaml.safe_load(draft.text()))
    assert recipe.problems[0].prompt_field == awkward
    assert (recipe.teacher.model, recipe.teacher.system_prompt) == (awkward, awkward)


@pytest.mark.parametrize("teacher", ["native:teacher/pico", "openai:m"])
def test_a_system_prompt_that_is_given_reaches_every_teacher(tmp_path: Path, teacher: str) -> None:
    asked = {"problems": "pico", "teacher": teacher, "student": "qwen2-0.2m", "base_dir": tmp_path}
    recipe = Recipe.model_validate(yaml.safe_load(draft_recipe(**asked, system_prompt="Be brief.").text()))
    assert recipe.teacher.system_prompt == "Be brief."
    recipe = Recipe.model_validate(yaml.safe_load(draft_recipe(**asked, system_prompt="").text()))
    assert recipe.teacher.system_prompt is None


def test_a_student_that_is_not_there_is_named(tmp_path: Path) -> None:
    draft = draft_recipe(problems="pico", teacher="native:x", student="qwen2-0.3m", base_dir=tmp_path)
    with pytest.raises(PotstillError, match=r"no student 'qwen2-0\.3m'"):
        draft.text()
