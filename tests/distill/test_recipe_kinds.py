"""Values of the wrong kind, in every field of everything that is read from YAML: one line, in plain words."""

from __future__ import annotations

import datetime
import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from distill.errors import RecipeError
from distill.recipe import Config, Recipe, StudentConfig, parse
from distill.recipe.faults import WORDS
from distill.records import Sampling

for module in ("pipelines.launch.config", "students.pretrain.train", "teacher.train.config"):
    importlib.import_module(module)

WRONG = [
    *(None, True, 0, 1, -1, 1.5, 10**300, float("nan"), float("inf"), "text", "1e4", "", "\ud800"),
    *([], {}, [[]], [True], ["x", "x"], {"x": True}, {"x": [1]}, {1: 2}, [None, 2, 3]),
    *(datetime.date(2026, 1, 1), b"bytes", {"an element of a set"}, 1 + 2j),
]
MINE = {"kind": "local", "path": "mine.jsonl"}
PROCEDURAL = {"kind": "reasoning_gym", "families": "pico", "count": 4}
OF_A_VALIDATOR = re.compile(r"Input|valid (?!YAML)|instance|tuple|dict|str\b|int\b|bool|NoneType|regex|Unable|pydantic")


def configs(of: type[BaseModel] = Config) -> Iterator[type[BaseModel]]:
    for config in of.__subclasses__():
        yield config
        yield from configs(config)


ALL = sorted({*configs(), Sampling}, key=lambda config: config.__qualname__)


def error_types(model: type[BaseModel], tree: Any) -> set[str]:
    try:
        model.model_validate(tree)
    except ValidationError as exc:
        return {error["type"] for error in exc.errors()}
    return set()


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.__name__)
def test_whatever_stands_in_a_field_is_taken_or_refused_in_plain_words(config: type[BaseModel]) -> None:
    assert len(ALL) > 25
    for name in config.model_fields:
        for value in WRONG:
            try:
                parse(config, {name: value}, where="file.yaml")
            except RecipeError as exc:
                message = str(exc)
            else:
                continue
            assert message.startswith("file.yaml: ")
            assert "\n" not in message
            assert len(message) < 400
            assert not OF_A_VALIDATOR.search(message.replace(name, "")), message
            assert error_types(config, {name: value}) <= {*WORDS, "extra_forbidden"}


COMPARED = {"ge": "greater_than_equal", "gt": "greater_than", "le": "less_than_equal", "lt": "less_than"}
SIZED = {"min_length": "too_short", "max_length": "too_long"}
# What pydantic's validators of each kind may answer to a value that comes from YAML; the empty ones ask others.
REFUSALS: dict[str, set[str]] = {
    "model": {"model_type", "model_attributes_type"},
    "model-fields": {"missing", "extra_forbidden", "invalid_key", "model_type", "model_attributes_type"},
    "tagged-union": {"union_tag_invalid", "union_tag_not_found", "model_attributes_type"},
    "str": {"string_type", "string_unicode"},
    "int": {"int_type", "int_parsing", "int_from_float", "int_parsing_size", "finite_number"},
    "float": {"float_type", "float_parsing", "finite_number"},
    "bool": {"bool_type", "bool_parsing"},
    "literal": {"literal_error"},
    "tuple": {"tuple_type", "missing", "too_long"},
    "list": {"list_type"},
    "dict": {"dict_type"},
    "function-after": {"value_error"},
    "function-before": set(),  # it lays a default below what is given, and refuses nothing
    **{kind: set() for kind in ("any", "default", "nullable", "union", "definitions", "definition-ref", "model-field")},
}


def reachable(schema: Any) -> Iterator[str]:
    """Every kind of error that a schema of pydantic-core can give."""
    if isinstance(schema, list | tuple):
        for part in schema:
            yield from reachable(part)
    elif isinstance(schema, dict):
        if isinstance(kind := schema.get("type"), str):
            yield from REFUSALS[kind]
            sized = {bound: f"string_{error}" for bound, error in SIZED.items()} if kind == "str" else SIZED
            yield from (error for bound, error in (COMPARED | sized).items() if bound in schema)
            yield from ("string_pattern_mismatch" for _ in "x" if "pattern" in schema)
        for name, part in schema.items():
            if name not in ("metadata", "serialization", "default", "cls", "config", "function"):
                yield from reachable(part)


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.__name__)
def test_every_kind_of_error_that_there_can_be_has_its_words(config: type[BaseModel]) -> None:
    found = set(reachable(config.__pydantic_core_schema__))
    assert {"missing", "model_type", "invalid_key"} <= found
    assert found <= {*WORDS, "extra_forbidden"}


def test_no_words_are_for_errors_that_there_cannot_be() -> None:
    assert set(WORDS) <= {error for config in ALL for error in reachable(config.__pydantic_core_schema__)}


def refusals(config: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Fields that have a default, each with what is said of every value in `WRONG` that is refused there alone."""
    required = {name for name, field in config.model_fields.items() if field.is_required()}
    for name in config.model_fields.keys() - required:
        for value in WRONG:
            try:
                parse(config, {name: value}, where="f")
            except RecipeError as exc:
                yield name, str(exc)


@pytest.mark.parametrize("config", [one for one in ALL if not any(f.is_required() for f in one.model_fields.values())])
def test_the_field_is_named(config: type[BaseModel]) -> None:
    said = list(refusals(config))
    assert {name for name, _ in said} == set(config.model_fields)
    for name, message in said:
        # A value that is allowed may ask for another field: several nodes for the address of the first.
        fields = [name] if " must be " in message else config.model_fields
        assert re.match(rf"f: ({'|'.join(fields)})\b", message), message


BASE: dict[str, Any] = {
    "name": "r",
    "problems": [{"kind": "local", "path": "p.jsonl"}],
    "teacher": {"backend": "native", "model": "m"},
    "distill": {"students": ["s"]},
    "eval": {"suites": ["gsm8k"]},
}


def recipe_with(text: str) -> Recipe:
    return parse(Recipe, BASE | yaml.safe_load(text), where="r.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("generate: {sampling: {temperature: true}}", "generate.sampling.temperature: must be a number, got true"),
        ("generate: {num_samples: true}", "generate.num_samples: must be a number, got true"),
        ("generate: {num_samples: 1.5}", "generate.num_samples: must be a whole number, written in digits, got 1.5"),
        ("generate: {num_samples: 1e4}", "generate.num_samples: must be a whole number, written in digits, got '1e4'"),
        ("generate: {grade: 1}", "generate.grade: must be true or false, got 1"),
        ("generate: {grade: 'off'}", "generate.grade: must be true or false, got 'off'"),
        ("generate: {adaptive: {pass_rate: [false, true]}}", "generate.adaptive.pass_rate.0: must be a number, got f"),
        ("generate: {adaptive: {pass_rate: [0]}}", "generate.adaptive.pass_rate.1: required, but not given"),
        ("curate: {mix: {shares: {a: true}}}", "curate.mix.shares.a: must be a number, got true"),
        ("curate: {mix: {shares: {1: 2}}}", "curate.mix.shares.1: every key must be text, got 1"),
        ("curate: {language: no}", "curate.language: must be text, got false"),
        ("distill: {students: s}", "distill.students: must be a list, got 's'"),
        ("distill: {students: !!set {s}}", "distill.students: must be a list, got a set"),
        ("distill: {students: [s, s]}", "distill.students: 's' is given twice"),
        ("distill: {students: [s, {name: s}]}", "distill.students: 's' is given twice"),
        ("distill: {students: [1]}", "distill.students.0: must be text or a mapping, got 1"),
        ("distill: {students: [{name: s, nmae: t}]}", "distill.students.0.nmae: unknown key; did you mean 'name'?"),
        ("distill: {students: [{name: s, methods: [x]}]}", "distill.students.0.methods.0: must be 'distilled' or"),
        ("distill: {students: [s], methods: []}", "distill.methods: must not be empty"),
        ("distill: {students: [s], methods: [direct, direct]}", "distill.methods: 'direct' is given twice"),
        ("eval: {suites: [gsm8k], roles: []}", "eval.roles: must not be empty"),
        ("eval: {suites: [gsm8k, gsm8k]}", "eval.suites: 'gsm8k' is given twice"),
        ("eval: {suites: [gsm8k], roles: [direct]}", "eval.roles: distill.methods makes no direct student"),
        ("name: 7", "name: must be text, got 7"),
        ("name: 2026-01-01", "name: must be text, got a date"),
        ("teacher: {backend: native, model: m, batch_size: }", "teacher.batch_size: must be a whole number"),
        ("teacher: {backend: vlm}", "teacher: 'backend' must be one of 'native', 'openai', 'vllm', 'ray', got 'vlm'"),
        ("teacher: native", "teacher: must be a mapping, got 'native'"),
        ("problems: [{kind: reasoning_gym, count: 2, families: 3}]", "problems.0.families: must be text or a mapping"),
        (
            "problems: [{kind: reasoning_gym, count: 2, families: {gcd: 3}}]",
            "problems.0.families.gcd: must be a mapping, got 3",
        ),
    ],
)
def test_the_line_says_what_was_written_and_what_it_must_be(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_with(text)
    assert str(caught.value).startswith(f"r.yaml: {says}")


@pytest.mark.parametrize("written", ["10000", "1.0e+4", "'10000'"])
def test_a_whole_number_may_be_written_in_several_ways(written: str) -> None:
    assert recipe_with(f"generate: {{num_samples: {written}}}").generate.num_samples == 10_000


def test_a_student_file_is_as_strict() -> None:
    tree = {"name": "s", "base": "b", "architecture": "qwen2", "num_parameters": 5, "licence": "MIT"}
    assert parse(StudentConfig, {**tree, "sft": {"lr": "4e-5"}}, where="s.yaml").sft.lr == 4e-5
    with pytest.raises(RecipeError, match=r"s\.yaml: sft\.packing: must be true or false, got 1"):
        parse(StudentConfig, {**tree, "sft": {"lr": 1e-3, "packing": 1}}, where="s.yaml")


def tree_with(suites: list[Any], **changes: Any) -> dict[str, Any]:
    tree = {"name": "t", "problems": [{"kind": "benchmark", "name": "gsm8k"}], "distill": {"students": ["qwen2-0.2m"]}}
    return {**tree, "teacher": {"backend": "native", "model": "x"}, "eval": {"suites": suites, **changes}}


@pytest.mark.parametrize("day", ["2024-08-01", "'2024-08-01'"])
def test_a_day_is_a_day_quoted_or_not(day):
    dates = yaml.safe_load(f"first: {day}")
    recipe = parse(Recipe, tree_with(["livecodebench"], contest_dates=dates), where="recipe")
    assert recipe.eval.contest_dates.first == "2024-08-01"
    for wrong in ("2024-8-1", "2024-02-30", "August", 20240801):
        with pytest.raises(RecipeError, match=r"eval\.contest_dates\.first: must be (a day|text)"):
            parse(Recipe, tree_with(["livecodebench"], contest_dates={"first": wrong}), where="recipe")
    window = {**dates, "last": "2024-07-01"}
    with pytest.raises(RecipeError, match=r"eval\.contest_dates: first: 2024-08-01 is after last, 2024-07-01"):
        parse(Recipe, tree_with(["livecodebench"], contest_dates=window), where="recipe")


@pytest.mark.parametrize(
    ("suites", "words"),
    [
        ([{"name": "math500", "problems": MINE}], r"eval: own\.math500: is a suite that there is already"),
        (["gsm8k", {"name": "gsm8k", "problems": MINE}], r"eval\.suites: 'gsm8k' is given twice"),
        ([{"name": "mine"}], r"eval: suites\.0: a suite of yours has `name` and `problems`"),
        ([{"name": "mine", "problems": {"kind": "local"}}], r"eval\.own\.mine\.path: required, but not given"),
        ([{"name": "../mine", "problems": MINE}], r"eval: own: a suite's name must be of the form"),
        ([{"name": "mine", "problems": PROCEDURAL}], r"eval: own\.mine\.split: must be 'held_out'"),
    ],
)
def test_suites_of_one_s_own_that_are_refused(suites, words):
    with pytest.raises(RecipeError, match=words):
        parse(Recipe, tree_with(suites), where="recipe")


def test_a_suite_of_one_s_own_is_written_back_as_it_is_read():
    recipe = parse(Recipe, tree_with(["gsm8k", {"name": "mine", "problems": MINE}]), where="recipe")
    assert recipe.eval.suites == ("gsm8k", "mine")
    assert parse(Recipe, recipe.model_dump(mode="json"), where="recipe") == recipe
