"""The command that writes a first recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, get_args

import typer

from distill.errors import UserInputError

if TYPE_CHECKING:
    from distill.recipe import LocalSource

app = typer.Typer()


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="where to write NAME.yaml")] = Path(),
    problems: Annotated[
        str | None, typer.Option(metavar="FILE", help="questions with answers (.jsonl, .parquet), or pico: bundled")
    ] = None,
    grader: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="how answers are graded: math, choice, code, judge; left out: as they look"),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="native:FOLDER, vllm:NAME, openai:MODEL, openai:MODEL@URL or ollama:NAME")
    ] = None,
    student: Annotated[str | None, typer.Option(help="a name of `potstill zoo list`, or a student file")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="questions at the most; left out: all")] = None,
    name: Annotated[str | None, typer.Option(help="of the recipe; left out: that of folder or file")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="the teacher's answers a question")] = 1,
    prompt_field: Annotated[str | None, typer.Option(help="the file's field with the question")] = None,
    answer_field: Annotated[str | None, typer.Option(help="the file's field with the answer")] = None,
    system_prompt: Annotated[
        str | None,
        typer.Option(help="the teacher's; left out: a served one is told to reason and box its answer, '': it is not"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a recipe that is there")] = False,
) -> None:
    """Write a recipe for your own problems, teacher and student; what is not given is asked for in a terminal."""
    from distill.manifest import write_atomically
    from pipelines.draft import check_draft, draft_recipe, name_of

    here = Path.cwd()
    answers = Answers(problems, grader, teacher, student, limit)
    answers = _ask_the_rest(answers, here, prompt_field, answer_field) if _is_terminal() else _required(answers)
    draft = draft_recipe(
        **answers._asdict(),
        base_dir=here,
        name=name or (None if folder == Path() else name_of(folder)),
        prompt_field=prompt_field,
        answer_field=answer_field,
        num_samples=num_samples,
        system_prompt=system_prompt,
    )
    path = folder / f"{draft.name}.yaml"
    if path.exists() and not force:
        raise UserInputError("is there already; --force replaces it", where=path)
    text = draft.text()
    check_draft(text, where=path, base_dir=here)
    write_atomically(path, text)
    typer.echo(f"wrote {path}")
    typer.echo(f"next: `potstill doctor {path}`, then `potstill run {path}`")


class Answers(NamedTuple):
    """The five that make a recipe; only the first, third and fourth have to be given."""

    problems: str | None
    grader: str | None
    teacher: str | None
    student: str | None
    limit: int | None


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _required(answers: Answers) -> Answers:
    given = answers._asdict()
    missing = [f"--{name}" for name in ("problems", "teacher", "student") if given[name] is None]
    if missing:
        raise UserInputError(f"needed where nobody can be asked: {', '.join(missing)}", where="init")
    return answers


def _ask_the_rest(answers: Answers, here: Path, prompt_field: str | None, answer_field: str | None) -> Answers:
    """Ask for what is not given, each until the answer can be used; how the file looks is the default of its grader."""
    from distill.problems.look import look_at
    from distill.recipe import Grader
    from pipelines.draft import BUNDLED, TEACHERS, teacher_settings
    from students.zoo import find_student

    fields = {"prompt_field": prompt_field, "answer_field": answer_field}

    def look(problems: str, grader: str | None = answers.grader) -> LocalSource | None:
        return None if problems == BUNDLED else look_at(problems, base_dir=here, grader=grader, **fields)

    problems, grader, teacher, student, limit = answers
    problems = problems or _ask(f"1. Problems: a file of questions with answers, or {BUNDLED}", BUNDLED, look)
    if grader is None and (source := look(problems)) is not None:
        question = f"2. How answers are graded: {', '.join(get_args(Grader))}"
        grader = _ask(question, source.grader, lambda text: look(problems, text))
    teacher = teacher or _ask(f"3. Teacher: {TEACHERS}", "native:teacher/pico", teacher_settings)
    student = student or _ask("4. Student: a name of `potstill zoo list`, or its file", "qwen2-0.4m", find_student)
    limit = limit or int(_ask("5. Questions at the most; 0 for all", "0", _count)) or None
    return Answers(problems, grader, teacher, student, limit)


def _ask(question: str, default: str, check: Callable[[str], object]) -> str:
    """The answer, once `check` raises no UserInputError for it."""

    def checked(text: str) -> str:
        try:
            check(text)
        except UserInputError as exc:
            raise typer.BadParameter(str(exc)) from exc
        return text

    answer: str = typer.prompt(question, default=default, value_proc=checked)
    return answer


def _count(text: str) -> None:
    if not text.isdecimal():
        raise UserInputError(f"must be a whole number, got {text!r}")
