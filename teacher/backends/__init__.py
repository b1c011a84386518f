"""Backends of the teacher: one protocol (`distill.protocols.Teacher`), opened from the recipe's teacher section."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.bundled import locate
from distill.gguf import checkpoint_folder
from distill.recipe import (
    UNINSTRUCTED,
    BatchSize,
    Engine,
    Instruction,
    NativeTeacher,
    RayTeacher,
    TeacherConfig,
    VllmTeacher,
)

if TYPE_CHECKING:
    from distill.progress import Progress
    from distill.protocols import Teacher


# Answers that a student writes together on a CPU, or by transformers.
_STUDENTS_TOGETHER = 128


def open_teacher(
    config: TeacherConfig,
    *,
    base_dir: Path,
    log_dir: Path | None = None,
    progress: Progress | None = None,
    needs_template: bool = True,
) -> Teacher:
    """The teacher that a recipe names. `base_dir` is where relative paths start.

    `log_dir` is where a server that is started keeps its log. A native one that goes on with texts alone does not need
    a chat template. Only the chosen backend's module is imported: an endpoint needs no torch.
    """
    if isinstance(config, NativeTeacher):
        from teacher.backends.native.opening import open_native

        kind: dict[str, Any] = {"speculate": config.speculate, "batch_invariant": config.batch_invariant}
        kind["dtype"] = None if config.dtype == "auto" else config.dtype
        kind |= {"as_student": not needs_template, "instruction": config.instruction}
        if config.num_ranks > 1:
            from teacher.backends.native.fleet import open_fleet

            kind["over_ranks"] = partial(open_fleet, config=config, progress=progress)
        folder = checkpoint_folder(locate(config.model, base_dir), progress=progress)
        return open_native(folder, batch_size=config.batch_size, progress=progress, **kind)
    if isinstance(config, VllmTeacher):
        from teacher.backends.vllm.backend import open_vllm

        return open_vllm(config, base_dir=base_dir, log_dir=log_dir, progress=progress)
    if isinstance(config, RayTeacher):
        from teacher.backends.ray import open_ray

        return open_ray(config, base_dir=base_dir, log_dir=log_dir)
    from teacher.backends.openai import OpenAICompatibleTeacher

    return OpenAICompatibleTeacher(config)


def open_student(
    folder: Path,
    *,
    engine: Engine,
    name: str = "",
    log_dir: Path | None = None,
    batch_size: BatchSize = "auto",
    instruction: Instruction = UNINSTRUCTED,
    progress: Progress | None = None,
) -> Teacher:
    """A student's or base's folder, opened to be scored, asked with the instruction that it learned.

    Of a served engine `name` is the model's in its run, and `log_dir` is where a server that is started keeps its log.

    Raises CheckpointError (one line) for anything wrong in it, RecipeError for a system prompt that its chat template
    has no place for.
    """
    if engine == "native":
        from teacher.backends.native.opening import open_native

        kind: dict[str, Any] = {"as_student": True, "instruction": instruction, "progress": progress}
        return open_native(folder, batch_size=batch_size, on_cpu=_STUDENTS_TOGETHER, **kind)
    if engine != "transformers":
        from teacher.backends.served_student import open_served_student

        how: dict[str, Any] = {"name": name, "instruction": instruction, "progress": progress}
        return open_served_student(folder, engine, log_dir=log_dir or folder.parent, **how)
    from teacher.backends.transformers import open_transformers

    batch_size = _STUDENTS_TOGETHER if batch_size == "auto" else batch_size
    return open_transformers(folder, batch_size=batch_size, instruction=instruction)


def describe_prompt_of(folder: Path, instruction: Instruction) -> str:
    """What a teacher in a folder is given around a question.

    Raises CheckpointError where the folder has no template, RecipeError where that has no place for a system prompt.
    """
    from distill.prompt_text import describe_prompt
    from teacher.backends.tokenizer import check_instruction, load_tokenizer, render_question
    from teacher.models.load import read_facts

    tokenizer = load_tokenizer(folder, read_facts(folder))
    check_instruction(tokenizer, instruction, folder)
    question = "What is 2 + 3?"
    return describe_prompt(render_question(tokenizer, question, instruction), question, instruction.system_prompt)


def check_folder(
    folder: Path, *, speculate: bool = False, as_student: bool = False, instruction: Instruction = UNINSTRUCTED
) -> None:
    """Raise what opening the folder would find wrong, without making the model."""
    from teacher.backends.native.opening import check_native

    check_native(folder, speculate=speculate, as_student=as_student, instruction=instruction)
