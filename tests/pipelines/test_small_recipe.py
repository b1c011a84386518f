"""The small scale before it runs: what it lacks is said first, with what brings it; its card names its questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill import bundled
from distill.errors import DataError, EnvironmentFault
from distill.recipe import NativeTeacher, Recipe, load_recipe
from pipelines.checks import check_recipe, recipe_checks
from pipelines.models.catalogue import load_catalogue
from pipelines.stages.push import _problems
from students.zoo import students_of
from tests.repository import REPOSITORY

RECIPES = REPOSITORY / "pipelines/recipes"
NAMES = ("small", "small-cpu")


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in without any model, nor benchmark files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundled, "ROOT", tmp_path / "installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("POTSTILL_BENCH_DATA", raising=False)
    return tmp_path


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def fetch(folder: Path, *names: str) -> None:
    """As far as a look for a model goes."""
    for name in names:
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "config.json").write_text("{}")


@pytest.mark.parametrize("name", NAMES)
def test_models_that_are_not_here_are_fetched_by_the_command_that_is_named(nowhere: Path, name: str) -> None:
    recipe = recipe_of(name)
    with pytest.raises(EnvironmentFault, match=r"not here; run `potstill models fetch small`$") as caught:
        check_recipe(recipe, ("generate",), base_dir=nowhere)
    folders = [model.folder for model in load_catalogue().chosen(["small"]).values()]
    missing = str(caught.value).partition(": ")[0].split(", ")
    assert set(missing) == {f"models/{folder}" for folder in folders if name == "small" or "1.5B" not in folder}
    fetch(nowhere, *(place.removeprefix("models/") for place in missing[1:]))
    with pytest.raises(EnvironmentFault, match=rf"^{missing[0]}: not here"):
        check_recipe(recipe, ("eval",), base_dir=nowhere)
    fetch(nowhere, missing[0].removeprefix("models/"))
    assert dict(recipe_checks(recipe, nowhere))["models"]() == "none is missing"


def test_a_base_in_the_hub_s_cache_is_here(nowhere: Path) -> None:
    recipe = recipe_of("small-cpu")
    fetch(nowhere, "Qwen2.5-Coder-0.5B-Instruct")
    snapshots = nowhere / "cache/models--HuggingFaceTB--SmolLM2-135M-Instruct"
    commit = "0" * 40
    (snapshots / "snapshots" / commit).mkdir(parents=True)
    (snapshots / "snapshots" / commit / "config.json").write_text("{}")
    (snapshots / "refs").mkdir()
    (snapshots / "refs/main").write_text(commit)
    assert dict(recipe_checks(recipe, nowhere))["models"]() == "none is missing"


def test_questions_are_looked_for_where_the_recipe_says(nowhere: Path) -> None:
    row = {"question": "1 + 1?", "answer": "#### 2"}
    for file in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        (nowhere / file).write_text(json.dumps(row))
    recipe = recipe_of("small", "bench_data=.", "eval.suites=[gsm8k]")
    found = dict(recipe_checks(recipe, nowhere))["benchmarks"]()
    assert found == f"gsm8k train: 1 questions in {nowhere}; gsm8k test: 1 questions in {nowhere}"
    whole = dict(recipe_checks(recipe_of("small", "bench_data=."), nowhere))["benchmarks"]
    with pytest.raises(DataError, match=r"math500\.jsonl: missing benchmark file of 'math500', split test"):
        whole()


def test_the_teacher_that_is_not_scored_is_the_largest_student_s_base() -> None:
    recipe = recipe_of("small")
    assert isinstance(recipe.teacher, NativeTeacher)
    largest, methods = max(students_of(recipe.distill), key=lambda chosen: chosen[0].num_parameters)
    assert "teacher" not in recipe.eval.roles
    assert largest.base.rpartition("/")[2] == Path(recipe.teacher.model).name
    assert methods == ("distilled",)
    assert recipe.learned_instruction == recipe.teacher.instruction, "it is asked in the teacher's words"


def test_the_card_names_the_benchmark_and_its_licence() -> None:
    assert _problems(recipe_of("small").problems) == ["gsm8k (`openai/gsm8k`, mit), split train"]
