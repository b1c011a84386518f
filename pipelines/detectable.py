"""What differences a recipe's suites can show, before any model answers: a line of `potstill doctor` a suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distill.benchmarks import bench_folder, parts_of_suites
from distill.errors import PotstillError
from distill.findings import Finding
from distill.problems import load_problems
from distill.problems.benchmark import read_benchmark
from distill.recipe import OWN_SUITES, ReasoningGymSource, Recipe
from eval.harness import task_config
from eval.power import POWER, Expected, smallest_difference


def detectable_differences(recipe: Recipe, base_dir: Path) -> Iterator[Finding]:
    """A suite whose questions cannot be counted is left out: other checks name the fault, or a run fetches them."""
    config, expected = recipe.eval, Expected()
    for suite in config.suites:
        try:
            counted = _num_questions(suite, recipe, base_dir)
        except PotstillError:
            continue
        if counted is None:
            continue
        num_questions = min(counted, config.limit or counted)
        stated = "num_samples" in config.model_fields_set or set(config.suites) <= set(OWN_SUITES)
        num_samples = config.num_samples if stated else int(task_config(suite)["repeats"])
        shown = 100 * smallest_difference(num_questions, num_samples, expected)
        yield Finding(
            f"{suite} shows",
            "ok",
            f"differences of {shown:.1f} points or more ({POWER:.0%} power at 5%): {num_questions:,} questions x "
            f"{num_samples}, two models about {expected.accuracy:.0%} right, correlated {expected.correlation:g}",
        )


def _num_questions(suite: str, recipe: Recipe, base_dir: Path) -> int | None:
    """None where it takes the Hub to know."""
    held_out = recipe.eval.held_out
    if suite in OWN_SUITES:
        if held_out is None:
            return None
        drawn = isinstance(held_out, ReasoningGymSource)
        return held_out.count if drawn else len(load_problems([held_out], base_dir=base_dir))
    folder = bench_folder(recipe.bench_data, base_dir)
    parts = parts_of_suites([suite])
    return len(read_benchmark(*parts[0], folder, recipe.limits)) if folder and parts else None
