from __future__ import annotations

import pytest

from distill.errors import RecipeError
from distill.intervals import wilson
from distill.records import ScoreCard
from eval.references import Reference, find_reference, references, reproduction
from eval.statistics import mean_estimate
from eval.suites import SUITES
from pipelines.reproduce import reproduction_recipe


def card(num_right: int, num_questions: int) -> ScoreCard:
    estimate = mean_estimate([1.0] * num_right + [0.0] * (num_questions - num_right), num_questions)
    subject = {"name": "m", "role": "teacher", "architecture": "x", "num_parameters": 1, "num_active_parameters": 1}
    return ScoreCard(**subject, suite="gsm8k", metric="pass@1", **vars(estimate))


def test_a_score_is_inside_or_outside_the_interval_of_the_difference():
    """Newcombe 1998, table II (a), method 10: 56/70 against 48/80 is 0.2000, 0.0524 to 0.3339."""
    whole = {"model": "m", "suite": "gsm8k", "num_samples": 1, "sampling": {}, "source": "s"}
    reference = Reference.model_validate({**whole, "value": 60.0, "num_questions": 80})
    found = reproduction("name", reference, card(56, 70))
    assert (found.difference, *found.ci95) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert not found.inside
    assert reproduction("name", reference, card(45, 70)).inside


def test_a_stated_standard_error_stands_for_its_number_of_questions():
    """6 points at one half are 69.4 independent questions."""
    whole = {"model": "m", "suite": "aime24", "num_questions": 30, "num_samples": 64, "sampling": {}, "source": "s"}
    stated = Reference.model_validate({**whole, "value": 50.0, "stderr": 6.0})
    assert stated.ci95 == pytest.approx(wilson(0.25 / 0.0036 / 2, 0.25 / 0.0036))
    assert Reference.model_validate({**whole, "value": 50.0}).ci95 == pytest.approx(wilson(15, 30))


def test_every_reference_makes_a_recipe_of_its_protocol():
    assert {"pico", "r1-distill-qwen-7b", "r1-distill-llama-70b-aime24"} <= set(references())
    for name, reference in references().items():
        recipe = reproduction_recipe(name, reference, ["eval.limit=7"])
        assert reference.suite in SUITES
        assert (recipe.eval.suites, recipe.eval.roles, recipe.eval.limit) == ((reference.suite,), ("teacher",), 7)
        assert (recipe.eval.num_samples, recipe.eval.sampling) == (reference.num_samples, reference.sampling)
        assert (recipe.teacher.model, recipe.teacher.reasoning) == (reference.model, reference.reasoning)
    with pytest.raises(RecipeError, match="no such reference"):
        find_reference("pica")
