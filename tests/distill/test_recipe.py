"""Every fault of a recipe is one line: the file, the field, what is wrong and what is allowed."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from distill.errors import RecipeError
from distill.recipe import (
    Mark,
    NativeTeacher,
    OpenAITeacher,
    RayTeacher,
    Recipe,
    VllmTeacher,
    load_recipe,
    load_student,
    marked_fields,
)

GOOD: dict[str, Any] = {
    "name": "good",
    "problems": [
        {"kind": "reasoning_gym", "families": {"gcd": {}}, "count": 8},
        {"kind": "local", "path": "p.jsonl"},
    ],
    "teacher": {"backend": "native", "model": "teacher/pico"},
    "distill": {"students": ["a"]},
    "eval": {"held_out": {"families": {"gcd": {}}, "count": 9, "split": "held_out"}},
}
STUDENT = {
    "name": "s",
    "base": "b",
    "architecture": "qwen2",
    "num_parameters": 5,
    "licence": "MIT",
    "sft": {"lr": "4e-5", "num_epochs": 2},
}


def written(folder: Path, tree: Any, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with one dotted place set, or taken away where the value is None."""
    tree = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    node: Any = tree
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("nmae", "x", r"nmae: unknown key; did you mean 'name'\?"),
        ("generate.num_sample", 2, r"generate\.num_sample: unknown key; did you mean 'num_samples'\?"),
        (
            "generate.sampling.temprature",
            1,
            r"generate\.sampling\.temprature: unknown key; did you mean 'temperature'\?",
        ),
        ("teacher.batchsize", 2, r"teacher\.batchsize: unknown key; did you mean 'batch_size'\?"),
        ("problems.0.cuont", 2, r"problems\.0\.cuont: unknown key; did you mean 'count'\?"),
        ("problems.1.promptfield", "q", r"problems\.1\.promptfield: unknown key; did you mean 'prompt_field'\?"),
        ("eval.held_out.sede", 2, r"eval\.held_out\.sede: unknown key; did you mean 'seed'\?"),
        ("curate.zzz", 2, r"curate\.zzz: unknown key; allowed: best_of_n, complete_reasoning, correct_only"),
        ("name", None, r"name: required, but not given"),
        ("distill.students", None, r"distill\.students: required, but not given"),
        ("name", "Bad Name", r"name: must be of the form .*, got 'Bad Name'"),
        ("generate.num_samples", 0, r"generate\.num_samples: must be at least 1, got 0"),
        ("generate.num_samples", "four", r"generate\.num_samples: must be a whole number, .*, got 'four'"),
        ("generate.num_samples", 2.5, r"generate\.num_samples: .*got 2\.5"),
        ("generate.sampling.temperature", -1, r"temperature: .*got -1"),
        (
            "generate.sampling",
            {"max_tokens": 9, "max_thinking_tokens": 9},
            r": generate\.sampling: max_thinking_tokens: must be below max_tokens \(9\)$",
        ),
        ("generate.sampling.top_p", float("nan"), r"top_p: .*got nan"),
        ("verify.timeout_s", float("inf"), r"verify\.timeout_s: must be a finite number, got inf"),
        ("curate.max_repetition", 1.5, r"max_repetition: .*got 1\.5"),
        ("curate.correct_only", "perhaps", r"correct_only: must be true or false, got 'perhaps'"),
        ("teacher.backend", "vlm", r"teacher: .*'native', 'openai'"),
        ("problems.0.kind", None, r"problems\.0: .*'kind'"),
        ("problems", [], r"problems: must not be empty"),
        ("distill.methods", ["distil"], r"distill\.methods\.0: must be 'distilled' or 'direct', got 'distil'"),
        ("eval.held_out", None, r"eval\.held_out: the suite 'pico' needs its problems"),
        ("eval.held_out.split", "train", r"eval\.held_out\.split: must be 'held_out'"),
        (
            "eval.held_out",
            {"kind": "local", "path": "q.jsonl", "split": "train"},
            r"eval\.held_out\.split: must be 'held",
        ),
        ("eval.held_out", {"kind": "local", "pth": "q.jsonl", "path": "q"}, r"held_out\.pth: .*mean 'path'"),
        ("eval", {"suites": ["held_out"]}, r"eval\.held_out: the suite 'held_out' needs its problems"),
        ("eval", 3, r"eval: .*got 3"),
        ("push.best_by", "pica", r"push\.best_by: 'pica' is not among eval\.suites; did you mean 'pico'\?"),
    ],
)
def test_a_fault_names_file_and_field(tmp_path: Path, path: str, value: Any, says: str) -> None:
    recipe = written(tmp_path, changed(path, value))
    with pytest.raises(RecipeError, match=says) as caught:
        load_recipe(recipe)
    assert str(caught.value).startswith(f"{recipe}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: [", r"r\.yaml: not valid YAML"),
        ("- name", r"r\.yaml: must be a mapping, got list"),
        ("", r"r\.yaml: must be a mapping, got NoneType"),
        ("name: a\nname: b\n", r"r\.yaml: not valid YAML: .*'name' is given twice"),
        ("extends: 3", r"r\.yaml: extends: must be a path, got 3"),
        ("extends: none.yaml", r"none\.yaml: cannot be read \(No such file"),
        ("extends: r.yaml", r"r\.yaml: extends: 'r\.yaml' extends this file again"),
        ("\x00", r"r\.yaml: not valid YAML"),
        ("name: 2026-13-45", r"r\.yaml: not valid YAML: month must be in 1\.\.12"),
        (f"name: {'9' * 5000}", r"r\.yaml: not valid YAML: .*digits"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(path)
    (tmp_path / "latin.yaml").write_bytes(b"name: gr\xfc\xdfe")
    with pytest.raises(RecipeError, match=r"latin\.yaml: cannot be read"):
        load_recipe(tmp_path / "latin.yaml")


def test_two_files_that_extend_each_other_are_named(tmp_path: Path) -> None:
    written(tmp_path, {"extends": "b.yaml"}, "a.yaml")
    written(tmp_path, {"extends": "a.yaml"}, "b.yaml")
    with pytest.raises(RecipeError, match="extends this file again"):
        load_recipe(tmp_path / "a.yaml")


def test_a_child_changes_what_it_names_and_inherits_the_rest(tmp_path: Path) -> None:
    written(tmp_path, changed("generate.sampling", {"seed": 5, "top_p": 0.5}), "parent.yaml")
    child = {
        "extends": "parent.yaml",
        "name": "child",
        "generate": {"sampling": {"top_p": 0.9}},
        "problems": [GOOD["problems"][1]],
    }
    recipe = load_recipe(written(tmp_path, child))
    assert recipe.name == "child"
    assert (recipe.generate.sampling.seed, recipe.generate.sampling.top_p) == (5, 0.9)
    assert len(recipe.problems) == 1


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("generate.num_samples=16", lambda r: r.generate.num_samples, 16),
        ("generate.sampling.temperature=0", lambda r: r.generate.sampling.temperature, 0),
        ("problems.0.count=77", lambda r: r.problems[0].count, 77),
        ("distill.students=[x, y]", lambda r: r.distill.students, ("x", "y")),
        ("distill.students.0=z", lambda r: r.distill.students, ("z",)),
        ("distill.overrides.lr=4e-5", lambda r: r.distill.overrides, {"lr": "4e-5"}),
        ("curate.max_repetition=null", lambda r: r.curate.max_repetition, None),
        ("push.repo=a=b", lambda r: r.push.repo, "a=b"),
    ],
)
def test_overrides(tmp_path: Path, override: str, read: Any, value: Any) -> None:
    assert read(load_recipe(written(tmp_path, GOOD), [override])) == value


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("generate.num_samples", r"--set: must be a\.b=value, got 'generate\.num_samples'"),
        ("=3", r"--set: must be a\.b=value"),
        ("name.x=3", r"--set: name\.x: goes through a plain value"),
        ("problems.7.count=3", r"--set: problems\.7\.count: index '7' is not in 0\.\.1"),
        ("problems.x=3", r"--set: problems\.x: index 'x' is not in 0\.\.1"),
        ("name=[", r"--set: name: not valid YAML: .*line 1"),
        ("generate.num_sample=3", r"generate\.num_sample: unknown key; did you mean 'num_samples'"),
        ("generate.num_samples=many", r"generate\.num_samples: .*got 'many'"),
    ],
)
def test_bad_overrides_are_named(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(written(tmp_path, GOOD), [override])


def test_students_take_numbers_as_texts_and_overrides_are_checked(tmp_path: Path) -> None:
    path = written(tmp_path, STUDENT, "s.yaml")
    assert load_student(path).sft.lr == 4e-5
    assert load_student(path, {"num_epochs": 7}).sft.num_epochs == 7
    with pytest.raises(RecipeError, match=r"s\.yaml: sft\.num_epoch: unknown key; did you mean 'num_epochs'\?"):
        load_student(path, {"num_epoch": 7})
    with pytest.raises(RecipeError, match=r"s\.yaml: sft\.lr: must be below 1, got 3"):
        load_student(path, {"lr": 3})


def test_a_resolved_recipe_reads_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, GOOD))
    again = load_recipe(written(tmp_path, recipe.model_dump(mode="json"), "again.yaml"))
    assert again == recipe


KEYS = st.sampled_from(["name", "problems", "teacher", "generate", "eval", "distill", "kind", "x", "held_out", "0"])
TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["native", "local"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=6))
def test_no_tree_whatever_ends_in_anything_but_one_line(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    path = written(tmp_path_factory.getbasetemp(), yaml.safe_dump({**GOOD, **tree}), "any.yaml")
    try:
        recipe = load_recipe(path)
    except RecipeError as exc:
        message = str(exc)
    else:
        message = str(path)
        assert isinstance(recipe, Recipe)
    assert message.startswith(str(path))
    assert "\n" not in message


# --- fields of a teacher that change none of its texts ----------------------------------------------------------------

INSTRUCTED = {"system_prompt", "prompt_suffix", "reasoning"}
ASKED = {"model", "revision", "extra_body", "budget_forcing", "think_prefilled", *INSTRUCTED}
TEACHERS = {
    NativeTeacher: {"backend", "model", "batch_invariant", "dtype", "num_ranks", *INSTRUCTED},
    OpenAITeacher: {"backend", "base_url", *ASKED},
    VllmTeacher: {"backend", "flags", "environment", *ASKED},
    RayTeacher: {"backend", "flags", "environment", *ASKED},
}


@pytest.mark.parametrize("teacher", TEACHERS, ids=lambda teacher: teacher.__name__)
def test_a_teachers_identity_is_every_field_that_can_change_a_text(teacher: type[NativeTeacher]) -> None:
    """A new field has to be placed here: in the identity, or with a mark where it is declared."""
    assert set(teacher(model="m").identity()) == TEACHERS[teacher]
    assert set(marked_fields(teacher)) == set(teacher.model_fields) - TEACHERS[teacher]
    assert teacher(model="m").identity() != teacher(model="n").identity()


def test_a_marked_field_leaves_the_identity_as_it_was() -> None:
    plain = NativeTeacher(model="m")
    assert NativeTeacher(model="m", batch_size=3, speculate=True).identity() == plain.identity()
    assert NativeTeacher(model="m", num_ranks=2).identity() != plain.identity()
    moved = {"num_nodes": 2, "head_address": "10.0.0.1", "in_halves": True, "num_redundant": 8}
    ranks = NativeTeacher(model="m", num_ranks=2)
    assert NativeTeacher(model="m", num_ranks=2, **moved).identity() == ranks.identity()


def test_the_documents_list_the_marked_fields() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/recipes.md").read_text(encoding="utf-8")
    listed = {
        mark: set(re.findall(r"`(\w+)`", found.group(1)))
        for mark in Mark
        if (found := re.search(rf"^- {mark.value}: (.*(?:\n  .*)*)", text, re.MULTILINE))
    }
    marks = {name: mark for teacher in TEACHERS for name, mark in marked_fields(teacher).items()}
    assert listed == {mark: {name for name, of in marks.items() if of is mark} for mark in Mark}


@pytest.mark.parametrize("teacher", TEACHERS, ids=lambda teacher: teacher.__name__)
def test_every_teacher_can_be_instructed(teacher: type[NativeTeacher]) -> None:
    told = teacher(model="m", system_prompt="Be brief.", prompt_suffix="Box it.")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?\n\nBox it."}]
    assert told.instruction.turns("1 + 1?") == turns
    assert teacher(model="m", system_prompt="").instruction.turns("1 + 1?") == [{"role": "user", "content": "1 + 1?"}]


def test_a_budget_of_thinking_needs_tags(tmp_path: Path) -> None:
    tree = changed("generate.sampling.max_thinking_tokens", 8)
    load_recipe(written(tmp_path, tree))
    tree["teacher"]["reasoning"] = "plain"
    with pytest.raises(
        RecipeError, match=r"generate\.sampling\.max_thinking_tokens: needs a teacher whose reasoning is"
    ):
        load_recipe(written(tmp_path, tree))


@pytest.mark.parametrize("split", ["all", "held_out"])
def test_a_local_file_may_be_held_out(tmp_path: Path, split: str) -> None:
    held_out = {"kind": "local", "path": "q.jsonl", "split": split}
    assert load_recipe(written(tmp_path, changed("eval.held_out", held_out))).eval.held_out.split == split


def test_the_first_suite_decides_unless_the_recipe_says_another(tmp_path: Path) -> None:
    tree = changed("eval.suites", ["gsm8k", "math500"])
    assert load_recipe(written(tmp_path, tree)).deciding_suite == "gsm8k"
    assert load_recipe(written(tmp_path, tree), ["push.best_by=math500"]).deciding_suite == "math500"
