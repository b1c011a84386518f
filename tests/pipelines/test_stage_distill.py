"""The distill stage: students side by side, what is done stays done, a failure or Ctrl-C leaves nothing running."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from distill.errors import CheckpointError, DataError, EnvironmentFault
from distill.manifest import read_manifest
from distill.recipe import Recipe, parse
from pipelines.context import Context
from pipelines.stages.distill import distill
from tests.students.tiny_bases import make_base, make_examples, make_student


class Recorder:
    """Progress that keeps what it is told, and may do something at a step of a student."""

    def __init__(self, at=None, do=None):
        self.steps: dict[str, float] = {}
        self.facts: dict[str, dict[str, float]] = {}
        self.at, self.do = at, do

    @contextmanager
    def task(self, name, total, *, done=0, unit="it"):
        recorder = self

        class Task:
            def advance(self, amount=1, **facts):
                recorder.steps[name] = recorder.steps.get(name, 0) + amount
                recorder.facts.setdefault(name, {}).update(facts)
                if recorder.at == (name, recorder.steps[name]) and amount:
                    recorder.do()

        yield Task()


@pytest.fixture
def run(tmp_path):
    """A run folder whose curation is done, and two students of different size."""
    for name, hidden in (("small", 16), ("large", 32)):
        student = make_student(make_base(tmp_path / f"base-{name}", hidden=hidden), save_steps=5)
        student = student.model_copy(update={"name": name, "num_parameters": hidden})
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(student.model_dump(mode="json", exclude_none=True)))
    make_examples(tmp_path / "run" / "curate" / "examples.parquet")
    make_examples(tmp_path / "run" / "curate" / "direct.parquet", direct=True)
    return tmp_path / "run"


def recipe_of(run: Path, students=("small", "large"), **settings) -> Recipe:
    tree = {
        "name": "test",
        "problems": [{"kind": "local", "path": "none.jsonl"}],
        "teacher": {"backend": "native", "model": "none"},
        "distill": {"students": [str(run.parent / f"{name}.yaml") for name in students], **settings},
        "eval": {"suites": ["gsm8k"]},
    }
    return parse(Recipe, tree, where="test")


def stamps(run: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (run / "distill").glob("*/model.safetensors")}


@pytest.mark.slow
def test_one_after_the_other_then_nothing_then_what_changed(run):
    recipe = recipe_of(run, ["small"], methods=["distilled", "direct"])
    recorder = Recorder()
    manifest = distill(recipe, run, Context(Path(), recorder))
    assert manifest.counts["trained"] == 2
    assert recorder.steps["train small-distilled"] == recorder.steps["train small-direct"] == 16
    inner = read_manifest(run / "distill" / "small-distilled")
    shown = recorder.facts["train small-distilled"]
    assert shown["loss"] == pytest.approx(inner.counts["last_loss"], abs=1e-3)
    assert 0 < shown["tokens_per_s"] < 1e7
    assert {"model.safetensors", "config.json", "chat_template.jinja", "train_log.json"} <= inner.outputs.keys()
    assert inner.counts["last_loss"] < inner.counts["first_loss"]
    before = stamps(run)
    again = Recorder()
    assert distill(recipe, run, Context(Path(), again)) == manifest
    assert (again.steps, stamps(run)) == ({}, before)
    make_examples(run / "curate" / "direct.parquet", direct=True, seed=1)
    assert distill(recipe, run, Context(Path())).counts["trained"] == 1
    changed = stamps(run)
    assert {name for name in changed if changed[name] != before[name]} == {"small-direct"}
    other = recipe_of(run, ["small"], methods=["distilled", "direct"], overrides={"lr": 1e-3})
    assert distill(other, run, Context(Path())).counts["trained"] == 2
    assert distill(other.model_copy(update={"name": "renamed"}), run, Context(Path(), again)).counts["trained"] == 2
    assert again.steps == {}


def test_a_student_may_have_methods_and_settings_of_its_own(run):
    recipe = recipe_of(run, methods=["distilled", "direct"], overrides={"lr": 2e-3, "num_epochs": 1})
    small, large = recipe.distill.students
    own = {"name": large, "methods": ["distilled"], "overrides": {"num_epochs": 2}}
    tree = {**recipe.model_dump(mode="json"), "distill": {**recipe.distill.model_dump(), "students": [small, own]}}
    manifest = distill(parse(Recipe, tree, where="test"), run, Context(Path()))
    assert set(manifest.outputs) == {"small-distilled", "small-direct", "large-distilled"}
    steps = {name: read_manifest(run / "distill" / name).counts["steps"] for name in manifest.outputs}
    assert steps["large-distilled"] == 2 * steps["small-distilled"]
    config = read_manifest(run / "distill" / "large-distilled").config
    assert (config["student"]["sft"]["lr"], config["student"]["sft"]["num_epochs"]) == (2e-3, 2)


def test_examples_that_are_not_there_are_named(run):
    (run / "curate" / "direct.parquet").unlink()
    with pytest.raises(DataError, match=r"direct\.parquet: not there yet"):
        distill(recipe_of(run, methods=["distilled", "direct"]), run, Context(Path()))
    assert not (run / "distill").exists()


@pytest.mark.slow
def test_side_by_side_gives_what_one_after_the_other_gives(run):
    recorder = Recorder()
    recipe = recipe_of(run, methods=["distilled", "direct"])
    side = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"num_workers": 2})})
    manifest = distill(side, run, Context(Path(), recorder))
    assert recorder.steps["train large-distilled"] == 16
    assert len([name for name in recorder.steps if name.startswith("train")]) == 4
    assert multiprocessing.active_children() == []
    assert distill(recipe, run, Context(Path())) == manifest  # the number of workers changes nothing
    kept = run.parent / "kept"
    shutil.move(run / "distill", kept)
    distill(recipe, run, Context(Path()))
    for name in manifest.outputs:
        one, other = (load_file(folder / name / "model.safetensors") for folder in (kept, run / "distill"))
        assert_close(one, other, rtol=1e-3, atol=1e-3)  # sums in the order of one thread and of several, through Adam


@pytest.mark.slow
def test_a_failing_student_ends_the_stage_with_its_own_error(run):
    weights = run.parent / "base-small" / "model.safetensors"
    broken = load_file(weights)
    broken["model.norm.weight"][0] = float("nan")
    save_file(broken, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"base-small: model\.norm\.weight: has values that are not finite"):
        distill(recipe_of(run, num_workers=2), run, Context(Path()))
    assert multiprocessing.active_children() == []
    assert not (run / "distill" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "interrupt"])
def test_a_killed_worker_and_ctrl_c_leave_a_stage_that_goes_on(run, end):
    def kill() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    def interrupt() -> None:
        raise KeyboardInterrupt

    recipe = recipe_of(run, num_workers=2)
    expected, do = (EnvironmentFault, kill) if end == "kill" else (KeyboardInterrupt, interrupt)
    with pytest.raises(expected):
        distill(recipe, run, Context(Path(), Recorder(("train large-distilled", 8), do)))
    assert multiprocessing.active_children() == []
    assert not (run / "distill" / "large-distilled" / "model.safetensors").exists()
    recorder = Recorder()
    distill(recipe, run, Context(Path(), recorder))
    assert (run / "distill" / "large-distilled" / "model.safetensors").exists()
    assert recorder.steps["train large-distilled"] < 16  # from a checkpoint on, not from the start
