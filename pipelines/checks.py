"""Faults that can be found before a stage starts: in files that a recipe names, and in the weights of its models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from distill.benchmarks import bench_folder
from distill.bundled import locate
from distill.errors import CheckpointError, EnvironmentFault, RecipeError, nearest
from distill.gguf import checkpoint_folder
from distill.manifest import hash_file
from distill.model_folder import check_model_folder
from distill.progress import Progress
from distill.recipe import (
    UNINSTRUCTED,
    EndpointEngine,
    LocalSource,
    Method,
    NativeTeacher,
    OpenAITeacher,
    RayTeacher,
    Recipe,
    StudentConfig,
    TeacherConfig,
    VllmEngine,
    VllmTeacher,
)

# Weights up to this size are read whole beforehand; larger ones show faults in their values only when they are loaded.
MAX_CHECKED_BYTES = 2 * 2**30

Check = tuple[str, Callable[[], str]]
# Checks that matter to some stages alone.
OF_STAGES = {
    "models": {"generate", "distill", "eval"},
    "benchmarks": {"generate", "curate", "eval"},
    "suites": {"curate", "eval"},
    "engine": {"eval"},
    "push": {"push"},
    "push traces": {"push-traces"},
}


def check_recipe(recipe: Recipe, stages: Collection[str], *, base_dir: Path, progress: Progress | None = None) -> None:
    """Raise the first fault of `recipe_checks` that matters to these stages."""
    if recipe.synthesised and "generate" in stages:
        stages = {*stages, "curate"}  # whose filter against the suites' questions is applied as they are written
    for name, check in recipe_checks(recipe, base_dir, progress):
        if OF_STAGES.get(name, set(stages)) & set(stages):
            check()


def recipe_checks(recipe: Recipe, base_dir: Path, progress: Progress | None = None) -> Iterator[Check]:
    """Named checks of the files and names in a recipe, whose relative paths start at `base_dir`.

    Each returns what it found, or raises a UserInputError, or an EnvironmentFault for what is neither on this machine
    nor to be had. A GGUF file is converted where that has not been done.
    """
    yield "problems", lambda: _problems(recipe, base_dir)
    yield "models", lambda: _models(recipe, base_dir)
    for name, teacher in recipe.teachers.items():
        yield name, partial(_teacher, teacher, base_dir, progress)
    if recipe.synthesised:
        yield "synthesis", lambda: _synthesis(recipe)
    yield "students", lambda: _students(recipe, progress)
    yield "suites", lambda: _suites(recipe, progress)
    yield "engine", lambda: _engine(recipe)
    yield "benchmarks", lambda: _benchmarks(recipe, base_dir)
    yield "push", lambda: _push(recipe)
    yield "push traces", lambda: _push_traces(recipe)


def check_weights(recipe: Recipe, stages: Collection[str], *, known: Collection[str], base_dir: Path) -> None:
    """Open the local models that these stages read, as whole as they will be: names, shapes, values.

    Folders whose hash is in `known` have been opened before and are left alone. Raises CheckpointError.
    """
    for teacher in recipe.teachers.values() if {"generate", "eval"} & set(stages) else ():
        if not isinstance(teacher, NativeTeacher):
            continue
        folder = checkpoint_folder(locate(teacher.model, base_dir))
        if _is_new(folder, known):
            from teacher.backends import check_folder

            check_folder(folder, speculate=teacher.speculate, instruction=teacher.instruction)
    if {"distill", "eval"} & set(stages):
        folders = map(checkpoint_folder, _local_bases(recipe))
        asked = recipe.learned_instruction if "eval" in stages and "base" in recipe.eval.roles else UNINSTRUCTED
        new = [folder for folder in folders if _is_new(folder, known)]
        for folder in new:
            from teacher.backends import check_folder

            check_folder(folder, as_student=True, instruction=asked)
        if new and "distill" in stages:
            _preflight(recipe)


def _preflight(recipe: Recipe) -> None:
    """Template, tokenizer and vocabulary of every student whose base is on this machine. Raises CheckpointError."""
    from students.base_folder import local_base
    from students.preflight import preflight

    for student, methods in _students_of(recipe):
        folder = local_base(student.base)
        for method in methods if folder is not None else ():
            for finding in preflight(student, method, instruction=recipe.learned_instruction):
                if finding.state == "error":
                    raise CheckpointError(f"{student.name}: {finding.text}", where=folder, field=finding.check)


def _is_new(folder: Path, known: Collection[str]) -> bool:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return size <= MAX_CHECKED_BYTES and hash_file(folder) not in known


def _problems(recipe: Recipe, base_dir: Path) -> str:
    """Problem-set files can be read, local files to their last line; data sets of the Hub are not asked for."""
    from distill.problems import given_sources, load_problems, source_files
    from distill.problems.reasoning_gym import read_problem_set
    from eval.suites import own_suites

    asked = own_suites(recipe.eval)
    files = source_files([*recipe.problems, *asked.values()], base_dir=base_dir)
    for path in files.values():
        if path.suffix in (".yaml", ".yml"):
            read_problem_set(path)
    local = [source for source in given_sources(recipe.problems) if isinstance(source, LocalSource)]
    local += [source for name, source in asked.items() if name in recipe.eval.own and isinstance(source, LocalSource)]
    count = len(load_problems(local, base_dir=base_dir, limits=recipe.limits)) if local else 0
    return ", ".join([*files, *([f"{count} local problems"] if local else [])]) or "no local file"


def _benchmarks(recipe: Recipe, base_dir: Path) -> str:
    """The questions of every benchmark that is learned from or asked: read where they are files, else looked up."""
    from distill.problems import benchmark_parts
    from distill.problems.benchmark import describe_benchmark
    from eval.suites import parts_asked

    folder = bench_folder(recipe.bench_data, base_dir)
    parts = dict.fromkeys([*benchmark_parts(recipe.problems), *parts_asked(recipe.eval)])
    found = [describe_benchmark(name, split, folder, recipe.limits) for name, split in parts]
    return "; ".join(found) or "none"


def _models(recipe: Recipe, base_dir: Path) -> str:
    """What `potstill models fetch` brings is here or in the Hub's cache: no run is to end late for want of it."""
    from students.base_folder import FETCHED, local_base

    folder = Path(recipe.teacher.model)
    teacher = folder.name if folder.parent == Path(FETCHED) and not locate(str(folder), base_dir).exists() else None
    bases = [student for student, _ in _students_of(recipe) if local_base(student.base) is None]
    if teacher is None and not bases:
        return "none is missing"
    from huggingface_hub import try_to_load_from_cache

    from pipelines.models.catalogue import load_catalogue

    cached = (try_to_load_from_cache(one.base, "config.json", revision=one.revision) for one in bases)
    wanted = {one.base for one, file in zip(bases, cached, strict=True) if not isinstance(file, str)}
    catalogue = load_catalogue()
    models = catalogue.models.items()
    missing = {name: model for name, model in models if model.folder == teacher or model.repository in wanted}
    if not missing:
        return "none is missing"
    groups = (group for group, members in catalogue.groups.items() if missing.keys() <= set(members))
    remedy = f"potstill models fetch {next(groups, None) or ' '.join(missing)}"
    folders = ", ".join(f"{FETCHED}/{model.folder}" for model in missing.values())
    raise EnvironmentFault(f"not here; run `{remedy}`", where=folders)


def _synthesis(recipe: Recipe) -> str:
    """The most that is asked for: what it may cost is known before a question is written."""
    return "; ".join(
        f"{source.count:,} questions for {source.name}: at most {source.most_asked:,} asked for, "
        f"{source.num_votes} answers to each that is new"
        for source in recipe.synthesised
    )


def _teacher(teacher: TeacherConfig, base_dir: Path, progress: Progress | None) -> str:
    if isinstance(teacher, OpenAITeacher):
        return f"{teacher.model} at {teacher.base_url}"
    if isinstance(teacher, VllmTeacher):
        from teacher.backends.vllm.backend import check_vllm

        return check_vllm(teacher, base_dir=base_dir)
    if isinstance(teacher, RayTeacher):
        where = ", ".join(teacher.base_urls) or f"{teacher.num_replicas} replicas"
        return f"{teacher.model} over Ray: {where}"  # its folder lies on the nodes
    folder = checkpoint_folder(locate(teacher.model, base_dir), progress=progress)
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint folder", where=folder)
    check_model_folder(folder)
    return str(folder)


def _students(recipe: Recipe, progress: Progress | None) -> str:
    """Every name is in the zoo (or is a file that validates), none stands twice, every local base has its config."""
    names: dict[str, str] = {}
    for choice, (student, _) in zip(recipe.distill.choices, _students_of(recipe), strict=True):
        if student.name in names:
            message = f"{names[student.name]!r} and {choice.name!r} are both {student.name!r}, and share its folder"
            raise RecipeError(message, where="recipe", field="distill.students")
        names[student.name] = choice.name
    for base in _local_bases(recipe):
        check_model_folder(checkpoint_folder(base, progress=progress))
    return ", ".join(names)


def _students_of(recipe: Recipe) -> list[tuple[StudentConfig, tuple[Method, ...]]]:
    from students.zoo import students_of

    return students_of(recipe.distill)


def _push(recipe: Recipe) -> str:
    """The repository's name is one that the Hub takes, for some student that may be pushed."""
    from students.publish.hub import check_repo_name

    students = {student.name: student for student, _ in _students_of(recipe)}
    wanted = recipe.push.student
    if wanted is not None and wanted not in students:
        message = f"{wanted!r} is not among distill.students; {nearest(wanted, students)}"
        raise RecipeError(message, where="recipe", field="push.student")
    refused = {}
    may_go = [students[wanted]] if wanted is not None else [*students.values()]
    for student in may_go:
        try:
            check_repo_name(recipe.push.repo.replace("{student}", student.name), student)
        except RecipeError as exc:
            refused[student.name] = exc
    if len(refused) == len(may_go):
        raise refused[may_go[0].name]
    first = next(iter(refused.values()), None)
    return recipe.push.repo if first is None else f"{recipe.push.repo}; not for {', '.join(refused)}: {first}"


def _push_traces(recipe: Recipe) -> str:
    from distill.publish.hub import check_name

    repo = recipe.push_traces.repo.replace("{recipe}", recipe.name)
    check_name(repo, field="push_traces.repo")
    return repo


def _engine(recipe: Recipe) -> str:
    """Who scores bases and students. A vLLM that is to be started is installed; no endpoint is asked here."""
    engine = recipe.eval.engine
    if isinstance(engine, VllmEngine):
        from teacher.backends.vllm.launch import installed_version

        return f"vLLM {installed_version()}, {engine.num_gpus} ranks a model"
    return f"an endpoint, {engine.base_url}" if isinstance(engine, EndpointEngine) else engine


def _local_bases(recipe: Recipe) -> list[Path]:
    """Base folders and GGUF files on this machine. Raises CheckpointError for a base that is a path and not there."""
    from students.base_folder import is_repository, local_base

    folders = []
    for base in (student.base for student, _ in _students_of(recipe)):
        folder = local_base(base)
        if folder is not None:
            folders.append(folder)
        elif not is_repository(base):
            raise CheckpointError("no such checkpoint folder", where=base)
    return list(dict.fromkeys(folders))


def _suites(recipe: Recipe, progress: Progress | None) -> str:
    from eval.suites import check_suites

    check_suites(recipe.eval.suites, recipe.eval.own, progress)
    return ", ".join(recipe.eval.suites)
