"""What differences a recipe's suites can show, before any model answers: a line of `potstill doctor` a suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distill.benchmarks import BENCHMARKS, bench_folder
from distill.errors import PotstillError
from distill.findings import Finding
from distill.problems import load_problems
from distill.problems.benchmark import read_benchmark
from distill.recipe import OWN_SUITES, BenchmarkSource, DatasetSource, ReasoningGymSource, Recipe
from eval.harness import task_config
from eval.power import POWER, Expected, smallest_difference
from eval.suites import HELD_OUT, own_suites


def detectable_differences(recipe: Recipe, base_dir: Path) -> Iterator[Finding]:
    """A suite whose questions cannot be counted is left out: other checks name the fault, or a run fetches them."""
    config, expected = recipe.eval, Expected()
    for suite in config.graded:
        try:
            counted = _num_questions(suite, recipe, base_dir)
        except PotstillError:
            continue
        if counted is None:
            continue
        num_questions = min(counted, config.limit or counted)
        num_samples = config.stated("num_samples") or _repeats(suite)
        shown = 100 * smallest_difference(num_questions, num_samples, expected)
        yield Finding(
            f"{suite} shows",
            "ok",
            f"differences of {shown:.1f} points or more ({POWER:.0%} power at 5%): {num_questions:,} questions x "
            f"{num_samples}, two models about {expected.accuracy:.0%} right, correlated {expected.correlation:g}",
        )


def _repeats(suite: str) -> int:
    """Samples a question by the suite's own protocol; problems of the recipe's own are asked like `held_out`."""
    return int(task_config(suite if suite in BENCHMARKS else HELD_OUT)["repeats"])


def _num_questions(suite: str, recipe: Recipe, base_dir: Path) -> int | None:
    """None where it takes the Hub to know."""
    folder = bench_folder(recipe.bench_data, base_dir)
    if suite in BENCHMARKS:
        return len(read_benchmark(suite, "test", folder, recipe.limits)) if folder else None
    source = own_suites(recipe.eval).get(HELD_OUT if suite in OWN_SUITES else suite)
    if isinstance(source, ReasoningGymSource):
        return source.count
    from_hub = folder is None and isinstance(source, BenchmarkSource)
    if source is None or isinstance(source, DatasetSource) or from_hub:
        return None
    return len(load_problems([source], base_dir=base_dir, limits=recipe.limits, bench_data=folder))
