"""Faults that can be found before a stage starts: in files that a recipe names, and in the weights of its models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from distill.bundled import locate
from distill.errors import CheckpointError
from distill.manifest import hash_file
from distill.recipe import LocalSource, NativeTeacher, OpenAITeacher, RayTeacher, Recipe, VllmTeacher

# Weights up to this size are read whole beforehand; larger ones show faults in their values only when they are loaded.
MAX_CHECKED_BYTES = 2 * 2**30

Check = tuple[str, Callable[[], str]]


def check_recipe(recipe: Recipe, stages: Collection[str], *, base_dir: Path) -> None:
    """Raise the first fault of `recipe_checks`; the suites' files matter only to the stages that read them."""
    for name, check in recipe_checks(recipe, base_dir):
        if name != "suites" or {"curate", "eval"} & set(stages):
            check()


def recipe_checks(recipe: Recipe, base_dir: Path) -> Iterator[Check]:
    """Named checks of the files and names in a recipe, whose relative paths start at `base_dir`.

    Each returns what it found, or raises a UserInputError.
    """
    yield "problems", lambda: _problems(recipe, base_dir)
    yield "teacher", lambda: _teacher(recipe, base_dir)
    yield "students", lambda: _students(recipe)
    yield "suites", lambda: _suites(recipe)


def check_weights(recipe: Recipe, stages: Collection[str], *, known: Collection[str], base_dir: Path) -> None:
    """Open the local models that these stages read, as whole as they will be: names, shapes, values.

    Folders whose hash is in `known` have been opened before and are left alone. Raises CheckpointError.
    """
    if isinstance(recipe.teacher, NativeTeacher) and {"generate", "eval"} & set(stages):
        folder = locate(recipe.teacher.model, base_dir)
        if _is_new(folder, known):
            from teacher.backends import check_folder

            check_folder(folder, speculate=recipe.teacher.speculate)
    if {"distill", "eval"} & set(stages):
        new = [folder for folder in _local_bases(recipe) if _is_new(folder, known)]
        for folder in new:
            from teacher.backends import check_folder

            check_folder(folder, as_student=True)
        if new and "distill" in stages:
            _preflight(recipe)


def _preflight(recipe: Recipe) -> None:
    """Template, tokenizer and vocabulary of every student whose base is on this machine. Raises CheckpointError."""
    from students.base_folder import local_base
    from students.preflight import preflight
    from students.zoo import find_student

    for name in recipe.distill.students:
        student = find_student(name, recipe.distill.overrides)
        folder = local_base(student.base)
        for method in recipe.distill.methods if folder is not None else ():
            for finding in preflight(student, method):
                if finding.state == "error":
                    raise CheckpointError(f"{student.name}: {finding.text}", where=folder, field=finding.check)


def _is_new(folder: Path, known: Collection[str]) -> bool:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return size <= MAX_CHECKED_BYTES and hash_file(folder) not in known


def _problems(recipe: Recipe, base_dir: Path) -> str:
    """Problem-set files are there, local files can be read to their last line; the Hub is not asked."""
    from distill.problems import load_problems, source_files

    held_out = () if recipe.eval.held_out is None else (recipe.eval.held_out,)
    files = source_files([*recipe.problems, *held_out], base_dir=base_dir)
    local = [source for source in recipe.problems if isinstance(source, LocalSource)]
    count = len(load_problems(local, base_dir=base_dir)) if local else 0
    return ", ".join([*files, *([f"{count} local problems"] if local else [])]) or "no local file"


def _teacher(recipe: Recipe, base_dir: Path) -> str:
    if isinstance(recipe.teacher, OpenAITeacher):
        return f"{recipe.teacher.model} at {recipe.teacher.base_url}"
    if isinstance(recipe.teacher, VllmTeacher):
        from teacher.backends.vllm.backend import check_vllm

        return check_vllm(recipe.teacher, base_dir=base_dir)
    if isinstance(recipe.teacher, RayTeacher):
        where = ", ".join(recipe.teacher.base_urls) or f"{recipe.teacher.num_replicas} replicas"
        return f"{recipe.teacher.model} over Ray: {where}"  # its folder lies on the nodes
    folder = locate(recipe.teacher.model, base_dir)
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint folder", where=folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError("config.json is missing", where=folder)
    return str(folder)


def _students(recipe: Recipe) -> str:
    """Every name is in the zoo (or is a file that validates), every local base has its weight files."""
    from students.zoo import find_student

    names = [find_student(name, recipe.distill.overrides).name for name in recipe.distill.students]
    for folder in _local_bases(recipe):
        if not (folder / "config.json").is_file():
            raise CheckpointError("config.json is missing", where=folder)
    return ", ".join(names)


def _local_bases(recipe: Recipe) -> list[Path]:
    """Base folders on this machine. Raises CheckpointError for a base that is a path and not there."""
    from students.base_folder import is_repository, local_base
    from students.zoo import find_student

    folders = []
    for name in recipe.distill.students:
        base = find_student(name, recipe.distill.overrides).base
        folder = local_base(base)
        if folder is not None:
            folders.append(folder)
        elif not is_repository(base):
            raise CheckpointError("no such checkpoint folder", where=base)
    return list(dict.fromkeys(folders))


def _suites(recipe: Recipe) -> str:
    from eval.suites import check_suites

    check_suites(recipe.eval.suites, bench_data=recipe.eval.bench_data)
    return ", ".join(recipe.eval.suites)
