"""The wheel: what it holds, and that all of it works where nothing of the repository is.

The environment is a new one in which the dependencies of this one can be imported, and of potstill the wheel alone.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repository import REPOSITORY

MAX_BYTES = 25_000_000
TREE = ("distill", "teacher", "students", "eval", "pipelines", "potstill")
NOT_INSTALLED = {"pipelines/setup.sh"}  # builds a checkout's .venv
COMMANDS = re.compile(r"^  ([a-z-]+)  ", re.MULTILINE)


# In a process of its own: setuptools must be the first to import distutils, and here somebody else may have been.
REWRITTEN = """
import runpy, setuptools, sys
setuptools.setup = lambda **_: None
rewrite = runpy.run_path("setup.py")["below_top"]
sys.stdout.buffer.write(rewrite(sys.stdin.buffer.read()))
"""


def rewritten(source: str) -> subprocess.CompletedProcess[bytes]:
    """What setup.py makes of a module's source."""
    return subprocess.run(
        [sys.executable, "-c", REWRITTEN], cwd=REPOSITORY, input=source.encode(), capture_output=True, check=False
    )


BLOCK = "def f():\n    from {}students.zoo import (\n        a,\n    )\n"


@pytest.mark.parametrize(
    ("source", "installed"),
    [
        ("from distill.errors import A\n", "from potstill.distill.errors import A\n"),
        ("from eval import suites\n", "from potstill.eval import suites\n"),
        ("import teacher.model as model, os\n", "import potstill.teacher.model as model, os\n"),
        (BLOCK.format(""), BLOCK.format("potstill.")),
        ("é = 1; from pipelines import api\n", "é = 1; from potstill.pipelines import api\n"),
        ("s = 'from distill import x'  # from distill import y\n", None),
        ("from distillery import x\nfrom . import distill\neval('1')\n", None),
        ("from potstill.distill import x\n", None),
    ],
)
def test_imports_are_rewritten_and_nothing_else(source: str, installed: str | None) -> None:
    assert rewritten(source).stdout.decode() == (source if installed is None else installed)


def test_an_import_that_the_wheel_could_not_serve_stops_the_build() -> None:
    stopped = rewritten("\nimport distill.errors\n")
    assert stopped.returncode != 0
    assert b"ValueError: line 2: write `from ... import`, got `import distill.errors`" in stopped.stderr


def sources() -> Iterator[tuple[str, ast.Module]]:
    for name in TREE:
        for path in sorted((REPOSITORY / name).rglob("*.py")):
            yield path.relative_to(REPOSITORY).as_posix(), _parsed(path.read_text(encoding="utf-8"))


def _parsed(source: str) -> ast.Module:
    """Once more where CPython 3.11 loses count of its depth ("AST constructor recursion depth mismatch"), as it did
    once in a long run."""
    try:
        return ast.parse(source)
    except SystemError:
        return ast.parse(source)


def test_no_string_names_a_module_by_its_place_in_the_tree() -> None:
    """Installed it has another; `f"{__package__}.worker"` is right in both. Fields of recipes are no modules."""
    trees = dict(sources())
    modules = {name.removesuffix(".py").replace("/", ".") for name in trees}
    found = []
    for name, tree in trees.items():
        nodes = list(ast.walk(tree))
        told = {id(node.value) for node in nodes if isinstance(node, ast.keyword) and node.arg in ("where", "field")}
        parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told | parts:
                place = re.fullmatch(r"([a-z_]\w*(?:\.\w+)+)(?::\w+)?", node.value)
                if place and {place[1], place[1].rpartition(".")[0]} & modules:
                    found.append(f"{name}:{node.lineno}: {node.value}")
    assert found == []


def test_paths_of_recipes_are_looked_for_among_the_bundled_files_too() -> None:
    """`distill.bundled.locate` alone puts a path behind the folder in which it starts."""
    found = {
        f"{name}: {ast.unparse(node)}"
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and ast.unparse(node.left) in ("base_dir", "self.base_dir", "context.base_dir")
    }
    owner = "teacher/backends/vllm/backend.py: base_dir / owner"  # is it here? then it is none of the Hub's
    folder = "distill/benchmarks/__init__.py: base_dir / name"  # a folder of the user's own
    assert found == {"distill/bundled.py: base_dir / path", owner, folder}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=outside | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1_500,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what the repository tracks."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file() and name.split("/")[0] in (
            *TREE,
            "setup.py",
            "pyproject.toml",
            "README.md",
            "LICENSE",
        ):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, copy / name)
    built = run(sys.executable, "-m", "pip", "wheel", copy, "--no-deps", "--no-build-isolation", "-w", out, cwd=out)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_file_below_one_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (top_level,) = (archive.read(name) for name in archive.namelist() if name.endswith("/top_level.txt"))
    listed = subprocess.run(["git", "ls-files", *TREE], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()} - NOT_INSTALLED
    assert held >= {name if name.startswith("potstill/") else f"potstill/{name}" for name in tracked}
    assert top_level.split() == [b"potstill"]
    assert {name.split("/")[0] for name in held} == {"potstill"}
    assert wheel.stat().st_size < MAX_BYTES


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    made = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert made.returncode == 0, made.stderr
    python = folder / "bin/python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).stdout.strip())
    # A path that a .pth file adds has no say in turn: the hook that makes the checkout importable stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--ignore-installed", "--no-index")
    installed = run(*pip, wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return python


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_starts_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    potstill = python.with_name("potstill")
    helped = run(potstill, "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    commands = COMMANDS.findall(helped.stdout.partition("Commands:")[2])
    assert len(commands) > 12
    for name in commands:
        shown = run(potstill, name, "--help", cwd=tmp_path)
        assert shown.returncode == 0, (name, shown.stderr)
        for inner in COMMANDS.findall(shown.stdout.partition("Commands:")[2]):
            assert run(potstill, name, inner, "--help", cwd=tmp_path).returncode == 0, (name, inner)
    names = run(python, "-c", "import eval", cwd=tmp_path), run(python, "-c", "import distill", cwd=tmp_path)
    assert all("ModuleNotFoundError" in one.stderr for one in names)
    listed = run(potstill, "zoo", "list", cwd=tmp_path)
    assert "qwen2-0.2m" in listed.stdout
    examined = run(potstill, "doctor", "pico", cwd=tmp_path)
    assert examined.returncode == 0, examined.stdout
    assert examined.stdout.count("preflight passed") == 8
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_the_bundled_scale_runs_where_it_is_installed(python: Path, tmp_path: Path) -> None:
    """At a tenth of its size and with two of its students, then what the run left in the tree's stead: nothing."""
    sizes = ("problems.0.count=410", "eval.held_out.count=40", "distill.students=[qwen2-0.2m,llama-0.4m]")
    options = [text for size in sizes for text in ("--set", size)]
    ran = run(python.with_name("potstill"), "run", "pico", *options, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "llama-0.4m-distilled" in ran.stdout
    assert (tmp_path / "runs/pico/report/index.html").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    again = run(python, "-m", "potstill", "run", "pico", *options, cwd=tmp_path)
    assert again.stdout.count("up to date") == 5, again.stderr


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_the_pages_script_runs_where_potstill_is_installed(python: Path, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs/api.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "page.py").write_text(script.replace("limit=2048", "limit=128"), encoding="utf-8")
    ran = run(python, "page.py", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "would push" in ran.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_programs_are_graded_where_potstill_is_installed(python: Path, tmp_path: Path) -> None:
    """The sandbox takes modules of these packages by their names, which the wheel has changed."""
    code = """
from potstill.distill.recipe import CodeLimits
from potstill.distill.verify.code.grader import CodeGrader
tests = {"tests": "def check(f):\\n    assert f(1) == 2\\n", "entry_point": "f", "remote": ["f"]}
grader = CodeGrader(CodeLimits(), num_workers=1)
for program in ("def f(x): return x + 1", "def f(x): return x"):
    print(grader.submit(tests, program).result()[0])
grader.close()
"""
    ran = run(python, "-c", code, cwd=tmp_path)
    assert ran.stdout == "correct\nwrong\n", ran.stderr
