"""Procedural problems of the reasoning-gym package.

A problem set maps a family (a name of our own) to a reasoning-gym data set and its parameters:

    families:
      gcd:          {min_numbers: 3, max_numbers: 3}
      long_sums:    {dataset: chain_sum, min_terms: 6, max_terms: 8}

Questions are drawn from a stream that the seed and the family fix; one is kept when `split_of` puts it on the wanted
side and it is new. Growing `count` therefore keeps the questions that were there. `Problem.metadata` holds what
`score_answer` asks for, as JSON: `{"dataset", "params", "entry"}`; `entry_of` gives the entry back with its Python
types (tuples, integer keys).

reasoning-gym takes seconds to import and is imported on first use only.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any

from distill.bundled import locate
from distill.errors import RecipeError, nearest
from distill.problems.split import normalise, split_of
from distill.reading.yaml_text import read_yaml
from distill.recipe import ReasoningGymSource
from distill.records import Problem, content_id

CHUNK_SIZE = 500  # some data sets draw everything when they are made: the stream is made of chunks, each with its seed
PATIENCE = 2_000  # draws in a row without a new question after which a family counts as exhausted
RESERVED = ("seed", "size")


def problem_set_path(families: str, base_dir: Path) -> Path:
    path = locate(families, base_dir)
    if not path.is_file():
        raise RecipeError("no such problem set", where=path, field="problems.families")
    return path


def read(source: ReasoningGymSource, base_dir: Path) -> list[Problem]:
    """`source.count` problems, the families taking turns; the first families take one more where it does not divide.

    Raises RecipeError for an unknown family or parameter, a value that reasoning-gym refuses, or a family that has
    too few distinct questions.
    """
    if isinstance(source.families, str):
        where: str = str(problem_set_path(source.families, base_dir))
        families = read_problem_set(Path(where))
    else:
        where, families = "problems.families", source.families
    if not families:
        raise RecipeError("must name at least one family", where=where)
    share, extra = divmod(source.count, len(families))
    seen: set[str] = set()  # over all families: two of them may draw from the same data set
    columns = [
        _draw(name, parameters, share + (index < extra), seen, source, where)
        for index, (name, parameters) in enumerate(families.items())
    ]
    return [problem for row in zip_longest(*columns) for problem in row if problem is not None]


def make_dataset(name: str, parameters: Mapping[str, Any], *, seed: int, size: int, where: str, field: str) -> Any:
    """A reasoning-gym data set of `size` entries. Raises RecipeError naming what reasoning-gym would not take."""
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise RecipeError(
            f"unknown reasoning-gym data set {name!r}; {nearest(name, DATASETS)}", where=where, field=field
        )
    make, config_class = DATASETS[name]
    known = [f.name for f in dataclasses.fields(config_class) if f.name not in RESERVED]
    for key in parameters:
        if key not in known:
            raise RecipeError(f"unknown key; {nearest(str(key), known)}", where=where, field=f"{field}.{key}")
    try:
        config = config_class(**parameters, seed=seed, size=size)
        config.validate()
        return make(config)
    except (AssertionError, ValueError, TypeError, AttributeError, KeyError) as exc:
        raise RecipeError(f"refused by reasoning-gym: {exc or type(exc).__name__}", where=where, field=field) from exc


def entry_of(problem: Problem) -> dict[str, Any]:
    """The reasoning-gym entry (`question`, `answer`, `metadata`) behind a problem."""
    entry: dict[str, Any] = from_json(problem.metadata["entry"])
    return entry


def to_json(value: Any) -> Any:
    """A JSON value from which `from_json` makes `value` again, Python's containers and fractions included."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [to_json(item) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {"$set": sorted((to_json(item) for item in value), key=repr)}
    if isinstance(value, Fraction):
        return {"$fraction": str(value)}
    if isinstance(value, complex):
        return {"$complex": [value.real, value.imag]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: to_json(item) for key, item in value.items()}
        return {"$dict": [[to_json(key), to_json(item)] for key, item in value.items()]}
    return str(value)  # an opaque object of the generator's (an enum, a date): its text is all that a grader could use


def from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, inner),) = value.items()
        if tag == "$tuple":
            return tuple(from_json(item) for item in inner)
        if tag == "$set":
            return {from_json(item) for item in inner}
        if tag == "$fraction":
            return Fraction(inner)
        if tag == "$complex":
            return complex(*inner)
        if tag == "$dict":
            return {from_json(key): from_json(item) for key, item in inner}
    return {key: from_json(item) for key, item in value.items()}


def read_problem_set(path: Path) -> dict[str, dict[str, Any]]:
    """Family -> parameters, as they stand there. Raises RecipeError for a file that is no problem set."""
    tree = read_yaml(path, RecipeError)
    if not isinstance(tree, dict):
        raise RecipeError(f"must be a mapping with the key 'families', got {type(tree).__name__}", where=path)
    for key in tree:
        if key != "families":
            raise RecipeError(f"unknown key; {nearest(str(key), ['families'])}", where=path, field=str(key))
    families = tree.get("families")
    if not isinstance(families, dict):
        raise RecipeError(f"must map families to parameters, got {families!r}", where=path, field="families")
    for name, parameters in families.items():
        if not isinstance(name, str) or not isinstance(parameters, (dict, type(None))):
            raise RecipeError(f"must be a mapping, got {parameters!r}", where=path, field=f"families.{name}")
    return {name: parameters or {} for name, parameters in families.items()}


def _draw(
    family: str,
    parameters: Mapping[str, Any],
    count: int,
    seen: set[str],
    source: ReasoningGymSource,
    where: str,
) -> list[Problem]:
    params = dict(parameters)
    name = str(params.pop("dataset", family))
    kept: list[Problem] = []
    fruitless = 0
    stream = _entries(family, name, params, seed=source.seed, where=where)
    while len(kept) < count:
        entry = next(stream)
        question = normalise(entry["question"])
        if question in seen or split_of(question) != source.split:
            fruitless += 1
            if fruitless > PATIENCE:
                raise RecipeError(
                    f"has only {len(kept)} distinct {source.split} questions with these parameters, {count} are asked "
                    "for; widen its parameters or lower problems.count",
                    where=where,
                    field=family,
                )
            continue
        fruitless = 0
        seen.add(question)
        kept.append(_problem(family, name, params, entry))
    return kept


def _entries(family: str, name: str, params: Mapping[str, Any], *, seed: int, where: str) -> Iterator[dict[str, Any]]:
    chunk = 0
    while True:
        chunk_seed = int(content_id(["stream", seed, family, name, chunk], digits=8), 16) >> 1
        dataset = make_dataset(name, params, seed=chunk_seed, size=CHUNK_SIZE, where=where, field=family)
        for index in range(CHUNK_SIZE):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a generator's own deprecations say nothing to its user
                try:
                    entry: dict[str, Any] = dataset[index]
                except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as exc:
                    message = f"reasoning-gym made no question of these parameters: {exc or type(exc).__name__}"
                    raise RecipeError(message, where=where, field=family) from exc
            yield entry
        chunk += 1


def _problem(family: str, name: str, params: Mapping[str, Any], entry: Mapping[str, Any]) -> Problem:
    answer = entry["answer"]
    kept = {"question": entry["question"], "answer": answer, "metadata": entry["metadata"]}
    return Problem(
        prompt=entry["question"],
        answer=None if answer is None else str(answer),
        grader="reasoning_gym",
        source=family,
        metadata={"dataset": name, "params": to_json(dict(params)), "entry": to_json(kept)},
    )
