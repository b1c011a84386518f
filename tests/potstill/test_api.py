"""The Python API: its page as a script, and the one run that it shares with the command line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import potstill
from distill.recipe import load_recipe
from tests.pipelines.test_init import write_rows
from tests.pipelines.tiny_world import ENVIRONMENT, make_world, potstill as command, tree_of
from tests.repository import REPOSITORY

PAGE = (REPOSITORY / "docs/api.md").read_text(encoding="utf-8")
(SCRIPT,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
WHOLE = "limit=2048"


def test_the_public_names_are_there_and_on_the_page() -> None:
    for name in potstill.__all__:
        assert getattr(potstill, name) is not None
        assert name == "__version__" or re.search(rf"`[^`]*\b{name}\b", PAGE), f"docs/api.md: {name}"
    assert potstill.__version__ == importlib.metadata.version("potstill")
    assert dir(potstill) == potstill.__all__
    with pytest.raises(AttributeError, match="module 'potstill' has no attribute 'Rnu'"):
        _ = potstill.Rnu


def test_importing_it_does_no_work(tmp_path: Path) -> None:
    """Processes of the packages import `potstill` when it is installed, for the sake of its name alone."""
    code = "import sys, typing; known = {*sys.modules}; import potstill; print(*{*sys.modules} - known)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert run.stdout == "potstill\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_the_page_runs_as_a_script(tmp_path: Path) -> None:
    """At a tenth of the bundled scale's problems, in a folder that has nothing, workers included."""
    assert SCRIPT.count(WHOLE) == 1
    (tmp_path / "page.py").write_text(SCRIPT.replace(WHOLE, "limit=410"), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    names = [line.split()[0] for line in run.stdout.splitlines()[:4]]
    assert sorted(names) == ["qwen2-0.4m-base", "qwen2-0.4m-direct", "qwen2-0.4m-distilled", "teacher"]
    assert run.stdout.count("\n") == 5, "a worker has run the script again"
    assert "would push" in run.stdout
    assert (tmp_path / "runs/first-student/report/index.html").is_file()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
def test_a_run_goes_on_between_python_and_the_command_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traces by a command, students in Python, scores by a command, the push in Python: nothing is done twice."""
    monkeypatch.chdir(tmp_path)
    generated = command("generate", world, "--out", "runs", cwd=tmp_path)
    assert generated.returncode == 0, generated.stderr
    before = tree_of(tmp_path / "runs/tiny-world/generate/traces")
    run = potstill.Run(world)
    assert sorted(run.learn()) == ["tiny-direct", "tiny-distilled"]
    assert tree_of(run.folder / "generate/traces") == before
    scored = command("run", run.folder / "recipe.yaml", "--out", "runs", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert [line.split()[1:] for line in scored.stdout.splitlines()[1:4]] == [["up", "to", "date"]] * 3
    before = tree_of(run.folder)
    cards = potstill.Run(world).score()
    assert {card.name for card in cards} == {"teacher", "tiny-base", "tiny-direct", "tiny-distilled"}
    assert tree_of(run.folder) == before
    summary = json.loads((run.folder / "report/summary.json").read_text(encoding="utf-8"))
    assert [card.model_dump(mode="json") for card in cards] == summary["models"]
    pushed = run.push("mine", dry_run=True)
    assert (pushed["repo"], pushed["bytes"]) == ("mine", sum(pushed["tree"].values()))
    assert not (run.folder / "push").exists()


def test_a_draft_is_what_init_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "sums.jsonl")
    answers = {"problems": "sums.jsonl", "student": "qwen2-0.2m", "teacher": "ollama:m", "limit": 20}
    flags = [text for name, value in answers.items() for text in (f"--{name}", str(value))]
    assert command("init", *flags, cwd=tmp_path).returncode == 0
    run = potstill.Run.draft(**answers)
    assert run.recipe == load_recipe(tmp_path / "sums.yaml")
    assert run.folder == Path("runs/sums")
    settings = {"generate.sampling.max_tokens": 9, "eval.suites": ["pico"]}
    changed = potstill.Run.draft(**answers, settings=settings, out="elsewhere")
    assert (changed.recipe.generate.sampling.max_tokens, changed.recipe.eval.suites) == (9, ("pico",))
    assert changed.folder == Path("elsewhere/sums")
    assert not any(path.is_dir() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: potstill.Run("pcio"), "pcio: neither a file nor one of the bundled recipes; did you mean 'pico'?"),
        (lambda: potstill.Run("tiny", settings={"generate.num_sampels": 2}), "generate.num_sampels: unknown key"),
        (lambda: potstill.Run(potstill.Run("tiny").recipe, settings={"name": "x"}), "settings: are for a recipe"),
        (lambda: potstill.Run.draft(problems="pico", student="x", teacher="native:"), "'native:' is no teacher"),
        (lambda: potstill.Run("tiny").push(private="perhaps"), "push: private: "),
    ],
)
def test_a_fault_is_of_the_public_tree(make, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(potstill.UserInputError) as caught:
        make()
    assert says in str(caught.value)
    assert os.listdir(tmp_path) == []  # noqa: PTH208
