"""Reproduce a known model's score by its reference's protocol: the gate before scores of one's own are believed.

The model is scored as a teacher by the eval stage, as in any run: same prompts, engine, graders and statistics. What is
kept lies in OUT/reproduce-NAME, so that it goes on where it was stopped; `reproduction.json` says how it ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from distill.errors import DataError
from distill.manifest import write_atomically
from distill.recipe import OWN_SUITES, Recipe, load_recipe
from eval.references import Reference, Reproduction, find_reference, reproduction
from eval.scored import read_model
from pipelines.checks import check_recipe, check_weights
from pipelines.context import Context
from pipelines.recipes import find_recipe
from pipelines.run_folder import check_run_folder, held
from pipelines.stages.eval import evaluate

RESULT = "reproduction.json"
STAGES = ("eval",)


def reproduce(name: str, overrides: Iterable[str], out: Path, context: Context) -> tuple[Reproduction, Path]:
    """Score the model and compare; also the file that says so. Raises RecipeError for a name that is unknown."""
    reference = find_reference(name)
    recipe = reproduction_recipe(name, reference, overrides)
    run_dir = out / recipe.name
    check_recipe(recipe, STAGES, base_dir=context.base_dir, progress=context.progress)
    check_run_folder(run_dir, [run_dir / "eval"])
    check_weights(recipe, STAGES, known=(), base_dir=context.base_dir)
    with held(run_dir):
        evaluate(recipe, run_dir, context)
        scored = read_model(run_dir / "eval" / "teacher")
        card = scored.card(reference.suite)
        if card is None:
            raise DataError(f"has no score on {reference.suite}", where=run_dir / "eval" / "teacher")
        found = reproduction(name, reference, card)
        told = {**asdict(found), "inside": found.inside, "identity": dict(scored.identity)}
        write_atomically(run_dir / RESULT, json.dumps(told, indent=2) + "\n")
    return found, run_dir / RESULT


def reproduction_recipe(name: str, reference: Reference, overrides: Iterable[str] = ()) -> Recipe:
    """The bundled scale's recipe with the reference's model and protocol in place of its own; `overrides` come last."""
    teacher = {"backend": "native", "model": reference.model, "reasoning": reference.reasoning}
    scored = {
        "suites": [reference.suite],
        "roles": ["teacher"],
        "num_samples": reference.num_samples,
        "sampling": reference.sampling.model_dump(exclude_none=True),
    }
    if reference.suite not in OWN_SUITES:
        scored["held_out"] = None
    settings = {"name": f"reproduce-{name}", "teacher": teacher, **{f"eval.{field}": scored[field] for field in scored}}
    own = [f"{field}={json.dumps(value)}" for field, value in settings.items()]
    return load_recipe(find_recipe("pico"), [*own, *overrides])
