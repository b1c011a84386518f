"""The recipes that ship: each validates, and names only what exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.problems import source_files
from distill.recipe import NativeTeacher, OpenAITeacher, load_recipe
from pipelines.checks import recipe_checks
from students.zoo import find_student, students_of
from tests.repository import REPOSITORY

RECIPES = sorted((REPOSITORY / "pipelines/recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_validates_and_names_what_exists(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    held_out = [recipe.eval.held_out] if recipe.eval.held_out else []
    for file in source_files([*recipe.problems, *held_out], base_dir=REPOSITORY).values():
        assert file.is_file()
    for choice, (student, _) in zip(recipe.distill.choices, students_of(recipe.distill), strict=True):
        assert student.name == choice.name


def test_pico_is_the_default_scale() -> None:
    recipe = load_recipe(REPOSITORY / "pipelines/recipes/pico.yaml")
    assert isinstance(recipe.teacher, NativeTeacher)
    assert recipe.generate.sampling.temperature == 0.6
    assert recipe.generate.sampling.top_p == 0.95
    assert set(recipe.distill.methods) == {"distilled", "direct"}
    architectures = {find_student(name).architecture for name in recipe.distill.students}
    assert architectures == {"qwen2", "llama"}
    assert len({find_student(name).num_parameters for name in recipe.distill.students}) >= 3


def test_tiny_differs_from_pico_in_size_alone() -> None:
    tiny = load_recipe(REPOSITORY / "pipelines/recipes/tiny.yaml")
    pico = load_recipe(REPOSITORY / "pipelines/recipes/pico.yaml")
    assert tiny.teacher == pico.teacher
    assert tiny.generate.sampling == pico.generate.sampling
    assert tiny.eval.held_out is not None
    assert pico.eval.held_out is not None
    assert tiny.eval.held_out.families == pico.eval.held_out.families
    assert tiny.problems[0].count < pico.problems[0].count


def test_full_scale_reads_r1_and_trains_the_six() -> None:
    recipe = load_recipe(REPOSITORY / "pipelines/recipes/r1-openai.yaml")
    assert isinstance(recipe.teacher, OpenAITeacher)
    assert "DeepSeek-R1" in recipe.teacher.model
    assert recipe.generate.sampling.max_tokens == 32_768
    assert len(recipe.distill.students) == 6
    assert all(name.startswith("r1-distill-") for name in recipe.distill.students)
    assert {"gsm8k", "math500", "aime24"} <= set(recipe.eval.suites)


def test_a_pool_over_ray_needs_no_folder_here() -> None:
    pool = {"backend": "ray", "model": "r1", "base_urls": ["http://a/v1", "http://b/v1"]}
    recipe = load_recipe(REPOSITORY / "pipelines/recipes/tiny.yaml", [f"teacher={json.dumps(pool)}"])
    checks = dict(recipe_checks(recipe, REPOSITORY))
    assert checks["teacher"]() == "r1 over Ray: http://a/v1, http://b/v1"
