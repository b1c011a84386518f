"""The order of stages, and what a command asks of the ones before it."""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path

import pytest

from distill.errors import CheckpointError, DataError, RecipeError
from distill.manifest import run_stage
from distill.recipe import Recipe, parse
from distill.records import StageManifest
from pipelines import chain
from pipelines.chain import COMMANDS, NEEDS, STAGES, Stage, _with_recipe, prepare, require_complete
from pipelines.checks import check_recipe
from pipelines.context import Context
from tests.pipelines.recorded_progress import RecordedProgress

HERE = Context(base_dir=Path())


def recipe(**changes: object) -> Recipe:
    tree = {
        "name": "chained",
        "problems": [{"kind": "reasoning_gym", "families": {"gcd": {}}, "count": 4}],
        "teacher": {"backend": "openai", "model": "served"},
        "distill": {"students": ["r1-distill-qwen-1.5b"]},
        "eval": {"held_out": {"families": {"gcd": {}}, "count": 4, "split": "held_out"}},
    }
    return parse(Recipe, {**tree, **changes}, where="test")


def complete(stage: str, made_with: Recipe, run_dir: Path) -> None:
    """What a stage leaves: an output and its manifest, with the recipe's own sections as config."""
    folder = run_dir / stage
    config = {"generate": made_with.model_dump(mode="json")["generate"], "seed": 17}

    def body() -> dict[str, int]:
        (folder / "traces.parquet").write_text("traces", encoding="utf-8")
        return {"samples": 4}

    run_stage(stage, {}, config, folder, body, ["traces.parquet"])


def write_three_samples(recipe: Recipe, run_dir: Path, context: Context) -> StageManifest:
    """A stage, as `STAGES` names them."""

    def work() -> dict[str, object]:
        (run_dir / "generate/out").write_text("x", encoding="utf-8")
        return {"samples": 3, "seconds": {"a": 1}}

    return run_stage("generate", {}, {}, run_dir / "generate", work, ["out"])


def test_every_stage_of_a_command_is_a_function_with_the_one_signature() -> None:
    for name in {name for names in COMMANDS.values() for name in names}:
        module, _, function = STAGES[name].partition(":")
        parameters = inspect.signature(getattr(import_module(module, chain.__package__), function)).parameters
        assert list(parameters) == ["recipe", "run_dir", "context"], name


def test_every_stage_comes_after_what_it_needs() -> None:
    for names in COMMANDS.values():
        for position, name in enumerate(names):
            assert not set(NEEDS[name]) & set(names[position:])
    assert COMMANDS["run"] == sum((COMMANDS[name] for name in ("generate", "distill", "eval", "compare")), ())


def test_a_missing_stage_is_named_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"generate/manifest.json: not there yet; run `potstill generate`"):
        prepare("distill", recipe(), tmp_path / "run", HERE)
    with pytest.raises(DataError, match=r"eval/manifest.json: not there yet; run `potstill eval`"):
        prepare("compare", recipe(), tmp_path / "run", HERE)
    assert not list(tmp_path.iterdir())


def test_a_stage_of_another_recipe_is_refused(tmp_path: Path) -> None:
    complete("generate", recipe(), tmp_path)
    require_complete("generate", recipe(), tmp_path)
    require_complete("generate", recipe(curate={"max_tokens": 9}), tmp_path)
    with pytest.raises(DataError, match=r"manifest.json: generate.num_samples: made with another setting"):
        require_complete("generate", recipe(generate={"num_samples": 2}), tmp_path)
    with pytest.raises(DataError, match=r"generate.sampling.seed: made with another setting"):
        require_complete("generate", recipe(generate={"sampling": {"seed": 5}}), tmp_path)


def test_a_changed_output_is_refused(tmp_path: Path) -> None:
    complete("generate", recipe(), tmp_path)
    (tmp_path / "generate/traces.parquet").write_text("other", encoding="utf-8")
    with pytest.raises(DataError, match=r"traces.parquet: not as the stage `generate` left it"):
        require_complete("generate", recipe(), tmp_path)


def test_outcome_tells_whether_a_stage_ran(tmp_path: Path) -> None:
    stage = Stage("generate", f"{__name__}:write_three_samples", recipe(), tmp_path, HERE)
    first, second = stage.run(), stage.run()
    shown = RecordedProgress()
    Stage(stage.name, stage.function, recipe(), tmp_path, Context(Path(), shown)).run()
    assert shown.totals == {"generate": None}, "a stage is heard of whatever it does"
    assert first.ran
    assert first.line().startswith("generate  done in ")
    assert first.line().endswith(" s: samples 3")
    assert not second.ran
    assert second.line() == "generate  up to date"


def test_the_resolved_recipe_is_written_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    assert list(_with_recipe([], recipe(), tmp_path)) == []
    written = path.stat().st_mtime_ns
    list(_with_recipe([], recipe(), tmp_path))
    assert path.stat().st_mtime_ns == written
    list(_with_recipe([], recipe(generate={"num_samples": 2}), tmp_path))
    assert "num_samples: 2" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": {"backend": "native", "model": "no/such/folder"}}, CheckpointError, "no/such/folder: no such"),
        ({"distill": {"students": ["qwen-nothing"]}}, RecipeError, "no student 'qwen-nothing'"),
        ({"distill": {"students": ["./mine.yaml"]}}, RecipeError, "mine.yaml: cannot be read"),
        ({"problems": [{"kind": "local", "path": "none.jsonl"}]}, (DataError, RecipeError), "none.jsonl"),
        (
            {"problems": [{"kind": "reasoning_gym", "families": "none.yaml", "count": 3}]},
            RecipeError,
            "none.yaml: problems.families: no such problem set",
        ),
        ({"eval": {"suites": ["gsm9k"]}}, RecipeError, "unknown suite 'gsm9k'; did you mean 'gsm8k'"),
    ],
)
def test_what_a_recipe_names_must_exist(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        check_recipe(recipe(**changes), COMMANDS["run"], base_dir=Path())
    assert message in str(caught.value)


def test_a_corrupt_prompt_file_is_found_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": "1 + 1", "answer": "2"}), '{"prompt": "1 + 2", "answer"']
    file.write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"prompts.jsonl:2"):
        prepare("generate", recipe(problems=[{"kind": "local", "path": str(file)}]), tmp_path / "run", HERE)
    assert not (tmp_path / "run").exists()
