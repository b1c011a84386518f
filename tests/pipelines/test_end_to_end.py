"""The whole chain through the command line, on random models: what it writes, what it does not do twice, what a kill
changes (nothing)."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from benchmarks.keep_run import keep_run
from benchmarks.readme import written
from tests.pipelines.canary import command_lines_with, places_with
from tests.pipelines.tiny_world import make_world, potstill, tree_of
from tests.students.loopback_hub import TOKEN, loopback_hub

STAGES = ("generate", "curate", "distill", "eval", "compare")
MODELS = {"teacher", "tiny-base", "tiny-direct", "tiny-distilled"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("finished")
    result = potstill("run", recipe, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def results(out: Path) -> dict[str, object]:
    """What a run found out, without times and memory."""
    run = out / "tiny-world"
    summary = json.loads((run / "report/summary.json").read_text(encoding="utf-8"))
    return {
        "models": summary["models"],
        "funnel": summary["funnel"],
        "stages": [stage["name"] for stage in summary["stages"]],
        **{
            str(path.relative_to(run)): path.read_bytes()
            for pattern in (
                "generate/traces/part-00000.parquet",
                "curate/*.parquet",
                "distill/*/model.safetensors",
                "eval/*/scores.json",
            )
            for path in sorted(run.glob(pattern))
        },
    }


def test_the_chain_writes_the_agreed_layout(finished: tuple[Path, str]) -> None:
    out, stdout = finished
    run = out / "tiny-world"
    for name in (
        "generate/traces/part-00000.parquet",
        "curate/examples.parquet",
        "curate/direct.parquet",
        "curate/funnel.json",
    ):
        assert (run / name).is_file()
    for model in ("tiny-distilled", "tiny-direct"):
        assert (run / "distill" / model / "model.safetensors").is_file()
    assert {path.parent.name for path in (run / "eval").glob("*/scores.json")} == MODELS
    summary = json.loads((run / "report/summary.json").read_text(encoding="utf-8"))
    assert {model["name"] for model in summary["models"]} == MODELS
    assert [stage["name"] for stage in summary["stages"]] == list(STAGES)
    assert all(stage["peak_rss_bytes"] > 0 for stage in summary["stages"])
    assert list(summary["funnel"][0]) == ["filter", "in", "out"]
    assert (summary["best"]["student"], summary["suites"][0]["name"]) == ("tiny", "pico")
    assert {model["engine"] for model in summary["suites"][0]["models"]} == {"native"}
    lines = stdout.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == list(STAGES)
    assert all(" done in " in line for line in lines[1:6])
    assert lines[-2].startswith("best student: tiny, by the highest pass@1 on pico")
    assert lines[-1] == f"report: {run / 'report/index.html'}"


def test_a_run_becomes_the_table_of_the_documents(finished: tuple[Path, str], tmp_path: Path) -> None:
    run = finished[0] / "tiny-world"
    kept = keep_run(run, tmp_path)
    kept.rename(kept.with_name("small"))
    text = f"<!-- results: small-scores {kept.parent.name} -->\n<!-- end -->\n"
    table = written(text, "README.md", tmp_path)
    models = {m["name"]: m for m in json.loads((run / "report/summary.json").read_text("utf-8"))["suites"][0]["models"]}
    for name in MODELS:
        score = models[name]["scores"]["pass@1"]
        low, high = (100 * bound for bound in score["ci95"])
        assert f"{100 * score['value']:.1f} ({low:.1f} to {high:.1f})" in table
    assert "pico, 4 questions, 2 samples each; the teacher scores" in table


def test_a_second_run_does_nothing(recipe: Path, finished: tuple[Path, str]) -> None:
    out, _ = finished
    before = tree_of(out)
    result = potstill("run", recipe, "--out", out)
    assert result.returncode == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines()[1:6]] == [[name, "up", "to", "date"] for name in STAGES]
    assert tree_of(out) == before


@pytest.mark.parametrize(
    ("override", "rerun", "untouched"),
    [
        pytest.param(
            "eval.num_samples=1",
            {"eval", "compare"},
            ("generate/", "curate/", "distill/"),
            marks=pytest.mark.slow,
        ),
        (
            "distill.methods=[distilled]",
            {"distill", "eval", "compare"},
            ("generate/", "curate/", "distill/tiny-distilled"),
        ),
        ("eval.batch_size=4", None, ("generate/", "curate/", "distill/")),
    ],
)
def test_a_changed_recipe_reruns_what_depends_on_it(
    recipe: Path, finished: tuple[Path, str], tmp_path: Path, override: str, rerun: set[str] | None, untouched: tuple
) -> None:
    out = shutil.copytree(finished[0], tmp_path / "runs", copy_function=shutil.copy2)
    before = tree_of(out)
    result = potstill("run", recipe, "--set", override, "--out", out)
    assert result.returncode == 0, result.stderr
    ran = {line.split()[0] for line in result.stdout.splitlines()[1:6] if "up to date" not in line}
    if rerun is not None:
        assert ran == rerun
    after = tree_of(out)
    for prefix in untouched:
        names = [name for name in before if name.startswith(f"tiny-world/{prefix}")]
        assert names
        assert {name: after[name] for name in names} == {name: before[name] for name in names}


@pytest.mark.slow
def test_the_hub_token_is_found_nowhere_after_a_push(recipe: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    """Refused by a Hub that echoes it, then taken; whole tracebacks are searched too."""
    out = shutil.copytree(finished[0], tmp_path / "runs", copy_function=shutil.copy2)
    secret = "hf_canary_4e1d9c"
    with loopback_hub(tmp_path / "hub") as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        environment |= {"POTSTILL_DEBUG": "1", "HF_HUB_OFFLINE": "0"}
        outputs = []
        for refuse, token, code in ((None, secret, 3), (403, secret, 3), (500, TOKEN, 3), (None, TOKEN, 0)):
            hub.refuse = refuse
            done = potstill("push", recipe, "--out", out, HF_TOKEN=token, **environment)
            assert done.returncode == code, done.stderr
            assert not command_lines_with(token)
            outputs += [done.stdout, done.stderr]
    assert "Traceback" in outputs[1]
    assert hub.commits
    for token in (secret, TOKEN):
        assert places_with(token, tmp_path, *outputs) == []


def test_a_stage_alone_asks_for_the_ones_before_it(recipe: Path, tmp_path: Path) -> None:
    result = potstill("compare", recipe, "--out", tmp_path / "runs")
    assert result.returncode == 2
    assert "eval/manifest.json: not there yet; run `potstill eval`" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_killed_in_every_stage_and_run_again_is_the_same(
    recipe: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    """SIGKILL once in every stage, and then to the end (push: test_stage_push)."""
    for stage, place, code in (
        ("generate", "stage.ended/generate", -signal.SIGKILL),
        ("curate", "stage.begun/curate", -signal.SIGKILL),
        ("distill", "checkpoint.complete", -signal.SIGKILL),
        ("eval", "stage.ended/eval-model", 3),  # a worker dies, and the command says so
        ("eval", "stage.ended/eval", -signal.SIGKILL),
        ("report", "stage.ended/compare", -signal.SIGKILL),
    ):
        died = potstill("run", recipe, "--out", tmp_path, POTSTILL_FAILPOINT=place)
        assert died.returncode == code, (place, died.stderr)
        assert not (tmp_path / "tiny-world" / stage / "manifest.json").exists()
    result = potstill("run", recipe, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert results(tmp_path) == results(finished[0])
