"""Several runs as one comparison: models named by their run, paired over equal questions that were asked alike.

A pair of models from two runs says something only where both were asked the same questions under one protocol: the
suite's task file, sampling (but for the seed), instruction, grader and its version. Where they were not, what differs
is said, and no difference is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.compare import Comparison, by_size, compare_suite, difference_on, with_adjusted_p
from eval.contamination import Contamination
from eval.scored import Model
from eval.statistics import Difference, holm

ASKED = ("sampling", "instruction", "question_alone", "grading")  # of a model's settings, those that are the protocol
SEED = "sampling.seed"


@dataclass(frozen=True)
class RunPair:
    """One student, base or teacher in two runs, `second` minus `first`; no difference where `why_not` says why."""

    first: Model
    second: Model
    difference: Difference | None
    why_not: str = ""


def merge(runs: Mapping[str, Comparison]) -> Comparison:
    """One comparison of all models; `runs` have names that tell them apart. The first one's deciding suite decides."""
    first = next(iter(runs.values()))
    models = by_size([of_run(model, run) for run, one in runs.items() for model in one.models])
    suites = list(dict.fromkeys(suite.name for one in runs.values() for suite in one.suites))
    return replace(
        first,
        name=", ".join(runs),
        models=models,
        suites=with_adjusted_p(compare_suite(name, models) for name in suites),
        funnel=(),
        questions={},
        num_hinted=0,
        audit=None,
        stages=tuple({**stage, "name": f"{run}/{stage['name']}"} for run, one in runs.items() for stage in one.stages),
        manifests={f"{run}/{name}": of for run, one in runs.items() for name, of in one.manifests.items()},
        contamination=_all_leaks(runs),
        curves=tuple(replace(curve, name=f"{run}/{curve.name}") for run, one in runs.items() for curve in one.curves),
        runs=runs,
    )


def run_names(folders: Sequence[Path]) -> list[str]:
    """Each folder's name, with as many of the folders above it as tell them apart.

    >>> run_names([Path("a/pico"), Path("b/pico")])
    ['a/pico', 'b/pico']
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of[-length:]) for of in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def of_run(model: Model, run: str) -> Model:
    name = f"{run}/{model.name}"
    cards = tuple(card.model_copy(update={"name": name}) for card in model.cards)
    return replace(model, name=name, cards=cards, run=run)


def run_pairs(models: Sequence[Model], suite: str) -> list[RunPair]:
    """Models of one name in several runs, each beside that of the first run that has it.

    The pairs of one suite are a family of comparisons: p-values are adjusted for their number.
    """
    firsts: dict[str, Model] = {}
    pairs = []
    for model in sorted(models, key=lambda model: list(dict.fromkeys(one.run for one in models)).index(model.run)):
        first = firsts.setdefault(model.name.removeprefix(f"{model.run}/"), model)
        if first is not model:
            pairs.append(RunPair(first, model, *difference_of(model, first, suite)))
    adjusted = iter(holm([pair.difference for pair in pairs if pair.difference is not None]))
    return [pair if pair.difference is None else replace(pair, difference=next(adjusted)) for pair in pairs]


def difference_of(model: Model, other: Model, suite: str) -> tuple[Difference | None, str]:
    """`model` minus `other`, paired; none, and why, where two runs asked them differently."""
    if model.run != other.run and (why := "; ".join(protocol_differences(other, model, suite))):
        return None, why
    if not model.answers[suite].means.keys() & other.answers[suite].means.keys():
        return None, "no question in common"
    return difference_on(suite, model, other), ""


def pair_row(suite: str, other: Model, model: Model) -> dict[str, Any]:
    """`model` minus `other` as a row of a table; empty cells and the reason where they cannot be paired."""
    difference, why_not = difference_of(model, other, suite)
    named = {"suite": suite, "model": model.name, "minus": other.name, "why_not": why_not}
    if difference is None:
        return named
    low, high = difference.ci95
    return {
        **named,
        "difference": difference.value,
        "ci95_low": low,
        "ci95_high": high,
        "p_value": difference.p_value,
        "num_questions": difference.num_questions,
    }


def protocol_differences(first: Model, second: Model, suite: str) -> list[str]:
    """What of the protocol differs, `sampling.temperature 0.6 and 1.0`; empty where nothing does."""
    if first.manifest is None or second.manifest is None:
        return ["how one of them was asked is not known"]
    asked = [dict(_flat({name: model.manifest.config.get(name) for name in ASKED})) for model in (first, second)]  # type: ignore[union-attr]
    found = [
        f"{name} {asked[0].get(name, 'unset')} and {asked[1].get(name, 'unset')}"
        for name in sorted(asked[0].keys() | asked[1].keys())
        if name != SEED and asked[0].get(name) != asked[1].get(name)
    ]
    tasks = [[model.manifest.inputs.get(name) for name in (f"task:{suite}", "protocol")] for model in (first, second)]  # type: ignore[union-attr]
    return [*found, *(["another version of the suite"] if tasks[0] != tasks[1] else [])]


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{at}.{name}" if at else str(name))
    else:
        yield at, value


def _all_leaks(runs: Mapping[str, Comparison]) -> Contamination | None:
    """The findings of all runs, each training set called by its run."""
    found = [(run, one.contamination) for run, one in runs.items() if one.contamination is not None]
    if not found:
        return None
    sets = [
        of.model_copy(
            update={"name": f"{run}/{of.name}", "students": tuple(f"{run}/{student}" for student in of.students)}
        )
        for run, one in found
        for of in one.training_sets
    ]
    leaked = [
        of.model_copy(update={"training_set": f"{run}/{of.training_set}"}) for run, one in found for of in one.leaked
    ]
    return Contamination(training_sets=tuple(sets), leaked=tuple(leaked))
