"""Questions from every source: deterministic, split by construction, and every fault named where it is."""

from __future__ import annotations

import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from distill.errors import DataError, RecipeError
from distill.problems import load_problems, normalise, source_files, split_of
from distill.problems.reasoning_gym import entry_of, from_json, make_dataset, to_json
from distill.problems.stream import PICO_FAMILIES
from distill.problems.worked import worked_steps
from distill.recipe import DatasetSource, LocalSource, ReasoningGymSource

FAMILIES = {"gcd": {}, "sums": {"dataset": "chain_sum", "min_terms": 3, "max_terms": 5}, "products": {}}


def gym(count: int = 30, families: object = FAMILIES, **more: object) -> ReasoningGymSource:
    return ReasoningGymSource.model_validate({"families": families, "count": count, **more})


def test_families_take_turns_and_share_the_count(tmp_path: Path) -> None:
    problems = load_problems([gym(31)], base_dir=tmp_path)
    assert Counter(problem.source for problem in problems) == {"gcd": 11, "sums": 10, "products": 10}
    assert [problem.source for problem in problems[:4]] == ["gcd", "sums", "products", "gcd"]
    assert all(problem.grader == "reasoning_gym" and problem.answer for problem in problems)


def test_equal_seeds_give_equal_problems_and_more_keeps_the_first(tmp_path: Path) -> None:
    few, many = (load_problems([gym(count)], base_dir=tmp_path) for count in (30, 60))
    assert few == many[:30]
    other = load_problems([gym(30, seed=2)], base_dir=tmp_path)
    assert len({p.id for p in few} & {p.id for p in other}) < 3


def test_train_and_held_out_never_meet_whatever_the_seed(tmp_path: Path) -> None:
    small = {"gcd": {"max_value": 60}}
    train = {p.prompt for s in range(3) for p in load_problems([gym(300, small, seed=s)], base_dir=tmp_path)}
    held = {
        p.prompt for s in range(3) for p in load_problems([gym(60, small, seed=s, split="held_out")], base_dir=tmp_path)
    }
    assert train
    assert held
    assert not train & held
    assert {split_of(prompt) for prompt in held} == {"held_out"}


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1), st.sampled_from([" ", "\n", "\t ", "  "]))
def test_split_ignores_whitespace_alone(text: str, gap: str) -> None:
    assert split_of(text) == split_of(gap + text.replace(" ", gap) + gap)
    assert normalise(normalise(text)) == normalise(text)


def test_one_question_in_eight_is_held_out() -> None:
    held = sum(split_of(f"What is {n} + 1?") == "held_out" for n in range(8_000))
    assert abs(held - 1_000) < 4 * (8_000 / 8 * 7 / 8) ** 0.5  # four standard errors of the binomial


def test_questions_are_distinct_across_families(tmp_path: Path) -> None:
    twins = {"one": {"dataset": "gcd", "max_value": 40}, "two": {"dataset": "gcd", "max_value": 40}}
    problems = load_problems([gym(200, twins)], base_dir=tmp_path)
    assert len({normalise(p.prompt) for p in problems}) == 200


def test_an_exhausted_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gcd: has only \d+ distinct train questions.* 5000 are asked"):
        load_problems([gym(5_000, {"gcd": {"min_value": 1, "max_value": 9}})], base_dir=tmp_path)


@pytest.mark.parametrize(
    ("families", "says"),
    [
        ({"gdc": {}}, r"gdc: unknown reasoning-gym data set 'gdc'; did you mean 'gcd'\?"),
        ({"mine": {"dataset": "chain_sums"}}, r"mine: .*did you mean 'chain_sum'\?"),
        ({"gcd": {"max_valu": 3}}, r"gcd\.max_valu: unknown key; did you mean 'max_value'\?"),
        ({"gcd": {"seed": 3}}, r"gcd\.seed: unknown key"),
        ({"gcd": {"min_value": 10, "max_value": 5}}, r"gcd: refused by reasoning-gym: max_value"),
        ({"gcd": {"min_value": "ten"}}, r"gcd: refused by reasoning-gym"),
        ({}, "at least one family"),
    ],
)
def test_bad_families_are_recipe_errors(tmp_path: Path, families: dict[str, dict[str, object]], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        load_problems([gym(3, families)], base_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_problem_set_file_is_read_and_listed(tmp_path: Path) -> None:
    (tmp_path / "set.yaml").write_text("families:\n  gcd: {max_value: 900}\n  sums: {dataset: chain_sum}\n")
    source = gym(4, "set.yaml")
    assert [p.source for p in load_problems([source], base_dir=tmp_path)] == ["gcd", "sums", "gcd", "sums"]
    assert source_files([source], base_dir=tmp_path) == {"problems:set.yaml": tmp_path / "set.yaml"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("familes: {gcd: {}}", r"set\.yaml: familes: unknown key; did you mean 'families'\?"),
        ("families: [gcd]", r"set\.yaml: families: must map"),
        ("families: {gcd: 3}", r"set\.yaml: families\.gcd: must be a mapping, got 3"),
        ("families: {gcd: ", r"set\.yaml: not valid YAML"),
        ("- gcd", r"set\.yaml: must be a mapping"),
    ],
)
def test_bad_problem_sets_are_recipe_errors(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "set.yaml").write_text(text)
    with pytest.raises(RecipeError, match=says):
        load_problems([gym(3, "set.yaml")], base_dir=tmp_path)


def test_a_missing_problem_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: problems\.families: no such problem set"):
        load_problems([gym(3, "none.yaml")], base_dir=tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.tuples(st.integers()), inner, max_size=3)
        | st.sets(st.integers(), max_size=3)
        | st.fractions()
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_entries_survive_json(value: object) -> None:
    back = from_json(json.loads(json.dumps(to_json(value))))
    assert back == value
    assert type(back) is type(value)


@given(st.sampled_from(["$tuple", "$dict", "$set", "$fraction", "$complex", "$x"]), st.text())
def test_keys_that_look_like_tags_survive(key: str, text: str) -> None:
    assert from_json(json.loads(json.dumps(to_json({key: text})))) == {key: text}


def test_scoring_is_the_same_after_storage(tmp_path: Path) -> None:
    families = ["graph_color", "polynomial_equations", "fraction_simplification", "tower_of_hanoi", "simple_equations"]
    for problem in load_problems([gym(10, {name: {} for name in families})], base_dir=tmp_path):
        back = type(problem).model_validate_json(problem.model_dump_json())
        dataset = make_dataset(problem.source, {}, seed=0, size=1, where="test", field=problem.source)
        entry = entry_of(back)
        assert entry["question"] == problem.prompt
        assert entry == entry_of(problem)
        if problem.source == "graph_color":
            assert all(isinstance(node, int) for node in entry["metadata"]["possible_answer"])
        else:
            assert dataset.score_answer(problem.answer, entry) == 1.0
    assert from_json(to_json(Fraction(1, 3))) == Fraction(1, 3)


# --- local files and data sets ----------------------------------------------------------------------------------------


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_and_parquet_give_the_same_problems(tmp_path: Path) -> None:
    rows = [{"q": f"{n}+{n}?", "a": "2" if n == 1 else str(2 * n), "x": n} for n in range(20)]
    write_lines(tmp_path / "t.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    both = [
        load_problems([LocalSource(path=f"t.{suffix}", prompt_field="q", answer_field="a", limit=9)], base_dir=tmp_path)
        for suffix in ("jsonl", "parquet")
    ]
    assert both[0] == both[1]
    assert len(both[0]) == 9
    assert both[0][3].answer == "6"


def test_a_worked_answer_counts_from_its_last_marker(tmp_path: Path) -> None:
    write_lines(tmp_path / "t.jsonl", [{"prompt": "p", "answer": "1+1=2\n#### 2"}, {"prompt": "q", "answer": 7}])
    problems = load_problems([LocalSource(path="t.jsonl")], base_dir=tmp_path)
    assert [p.answer for p in problems] == ["2", "7"]


@pytest.mark.parametrize("answer", ["B", "two", 1, "y"])
def test_choices_are_listed_and_the_reference_is_the_letter(tmp_path: Path, answer: object) -> None:
    row = {"prompt": "1+1?", "answer": answer, "choices": {"text": ["one", "two"], "label": ["x", "y"]}}
    write_lines(tmp_path / "t.jsonl", [row])
    source = LocalSource(path="t.jsonl", choices_field="choices", grader="choice")
    (problem,) = load_problems([source], base_dir=tmp_path)
    assert problem.prompt == "1+1?\nA. one\nB. two"
    assert problem.answer == "B"
    assert problem.metadata == {"choices": ["one", "two"]}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "x"', r"t\.jsonl:2: not a JSON line"),
        ("[1]", r"t\.jsonl:2: must be a JSON object, got list"),
        ('{"promt": "x", "answer": "1"}', r"t\.jsonl:2: prompt: missing; did you mean 'promt'\?"),
        ('{"prompt": "x"}', r"t\.jsonl:2: answer: missing"),
        ('{"prompt": "", "answer": "1"}', r"t\.jsonl:2: prompt: must be a text, got ''"),
        ('{"prompt": 3, "answer": "1"}', r"t\.jsonl:2: prompt: must be a text, got 3"),
        ('{"prompt": "x", "answer": [1]}', r"t\.jsonl:2: answer: must be a text or a number"),
    ],
)
def test_a_corrupt_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "ok", "answer": "1"}\n' + line + "\n")
    with pytest.raises(DataError, match=says):
        load_problems([LocalSource(path="t.jsonl")], base_dir=tmp_path)


def test_a_line_torn_inside_a_character_is_named(tmp_path: Path) -> None:
    whole = '{"prompt": "größer", "answer": "1"}\n'.encode()
    for cut in range(1, len(whole) - 1):
        (tmp_path / "t.jsonl").write_bytes(whole + whole[:cut])
        with pytest.raises(DataError, match=r"t\.jsonl:2: not a JSON line"):
            load_problems([LocalSource(path="t.jsonl")], base_dir=tmp_path)


@pytest.mark.parametrize("name", ["t.parquet", "t.txt", "absent.jsonl", "empty.jsonl"])
def test_unreadable_files_are_named(tmp_path: Path, name: str) -> None:
    if name != "absent.jsonl":
        (tmp_path / name).write_text("" if name == "empty.jsonl" else "not a table")
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_problems([LocalSource(path=name)], base_dir=tmp_path)


def test_a_data_set_in_a_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([{"problem": "1+1", "answer": "2"}]), folder / "train.parquet")
    (problem,) = load_problems([DatasetSource(repo=str(folder))], base_dir=tmp_path)
    assert (problem.prompt, problem.answer, problem.grader) == ("1+1", "2", "math")
    with pytest.raises(RecipeError, match=r"problems\.split: Unknown split"):
        load_problems([DatasetSource(repo=str(folder), split="tset")], base_dir=tmp_path)
    with pytest.raises(DataError, match=r"row 1: solution: missing"):
        load_problems([DatasetSource(repo=str(folder), answer_field="solution")], base_dir=tmp_path)


def test_worked_reasoning_of_the_pico_set_ends_in_the_answer(tmp_path: Path) -> None:
    for problem in load_problems([gym(40, str(PICO_FAMILIES))], base_dir=tmp_path):
        numbers = {text.lstrip("= ") for step in worked_steps(problem) for text in re.split(r" = ", step)}
        back = type(problem).model_validate_json(problem.model_dump_json())
        assert worked_steps(back) == worked_steps(problem)
        if problem.source not in ("complex_arithmetic", "fraction_simplification"):
            assert problem.answer in numbers, problem


def test_a_local_file_is_both_sides_of_an_evaluation(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"prompt": f"{n} + {n}?", "answer": 2 * n}) + "\n" for n in range(80))
    (tmp_path / "t.jsonl").write_text(rows, encoding="utf-8")
    sides = {
        split: [p.prompt for p in load_problems([LocalSource(path="t.jsonl", split=split)], base_dir=tmp_path)]
        for split in ("all", "train", "held_out")
    }
    assert sorted(sides["train"] + sides["held_out"]) == sorted(sides["all"])
    assert {split_of(prompt) for prompt in sides["held_out"]} == {"held_out"}
    few = load_problems([LocalSource(path="t.jsonl", split="held_out", limit=3)], base_dir=tmp_path)
    assert [problem.prompt for problem in few] == sides["held_out"][:3]


def test_a_file_too_small_to_hold_anything_out_says_so(tmp_path: Path) -> None:
    question = next(text for n in range(99) if split_of(text := f"{n} + 1?") == "train")
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": question, "answer": "1"}), encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.jsonl: problems\.split: none of its 1 questions is in .* 'held_out'"):
        load_problems([LocalSource(path="t.jsonl", split="held_out")], base_dir=tmp_path)
