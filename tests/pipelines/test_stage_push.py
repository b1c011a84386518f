"""The push stage against a Hub on loopback: what arrives is what was trained, and comes back as a model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.errors import DataError, RecipeError
from distill.recipe import load_recipe
from distill.records import ScoreCard
from pipelines.context import Context
from pipelines.stages.distill import distill
from pipelines.stages.push import best_name, push
from tests.students.loopback_hub import TOKEN, loopback_hub
from tests.students.tiny_bases import make_base, make_examples, make_student

DRY = Context(Path(), dry_run=True)
# The endpoint is read when huggingface_hub is imported: every push is a process of its own.
PUSH = """
import sys
from pathlib import Path
from distill.errors import PotstillError
from distill.recipe import load_recipe
from pipelines.context import Context
from pipelines.stages.push import push
try:
    push(load_recipe(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2]), Context(Path()))
except PotstillError as exc:
    sys.stderr.write(f"{exc.exit_code} {exc}")
    sys.exit(exc.exit_code)
"""


def card_of(name: str, value: float, num_parameters: int, role: str = "distilled", suite: str = "pico") -> dict:
    return ScoreCard(
        name=name,
        role=role,
        architecture="qwen2",
        num_parameters=num_parameters,
        num_active_parameters=num_parameters,
        suite=suite,
        metric="pass@1",
        value=value,
        stderr=0.01,
        ci95=(value - 0.02, value + 0.02),
        num_questions=100,
        num_samples=4,
    ).model_dump(mode="json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with one student trained and scored: the recipe's path and the run's folder."""
    folder = tmp_path_factory.mktemp("push")
    student = make_student(make_base(folder / "base"), num_epochs=1)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(student.model_dump(mode="json", exclude_none=True)))
    tree = {
        "name": "test",
        "problems": [{"kind": "local", "path": "data/questions.jsonl"}],
        "teacher": {"backend": "native", "model": "teacher/pico"},
        "distill": {"students": [str(folder / "tiny.yaml")]},
        "eval": {"suites": ["gsm8k"]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    run = folder / "run"
    make_examples(run / "curate" / "examples.parquet")
    distill(load_recipe(folder / "recipe.yaml"), run, Context(Path()))
    for name, cards in {
        "tiny-distilled": [
            card_of("tiny-distilled", 0.75, 20, suite="gsm8k"),
            card_of("tiny-distilled", 0.9, 20, suite="gsm8k/sums"),
        ],
        "tiny": [card_of("tiny", 0.9, 20, "base", suite="gsm8k")],
    }.items():
        (run / "eval" / name).mkdir(parents=True)
        (run / "eval" / name / "scores.json").write_text(json.dumps(cards))
    return folder / "recipe.yaml", run


def push_to(endpoint: str, trained, home, *overrides: str, token: str = TOKEN) -> subprocess.CompletedProcess:
    process = start_push(endpoint, trained, home, *overrides, token=token)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_push(endpoint: str, trained, home, *overrides: str, token: str = TOKEN) -> subprocess.Popen:
    recipe, run = trained
    env = {**os.environ, "PYTHONPATH": ".", "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    env |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", PUSH, str(recipe), str(run), *overrides]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_dry_run_shows_the_tree_and_touches_nothing(trained, monkeypatch):
    recipe, run = trained

    def no_network(*args, **kwargs):
        raise AssertionError("a dry run opened a socket")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    counts = push(load_recipe(recipe), run, DRY).counts
    assert (counts["repo"], counts["private"]) == ("potstill-tiny", True)
    model = run / "distill" / "tiny-distilled"
    assert counts["tree"]["model.safetensors"] == (model / "model.safetensors").stat().st_size
    assert counts["tree"]["README.md"] == len(counts["card"].encode())
    assert "manifest.json" not in counts["tree"]
    assert not (run / "push").exists()


def test_a_licence_that_was_mended_is_pushed_without_training_again(trained, tmp_path):
    recipe, run = trained
    assert "license: apache-2.0" in push(load_recipe(recipe), run, DRY).counts["card"]
    mended = yaml.safe_load((recipe.parent / "tiny.yaml").read_text()) | {"licence": "other:qwen-research"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(mended))
    card = push(load_recipe(recipe, [f"distill.students.0={tmp_path / 'tiny.yaml'}"]), run, DRY).counts["card"]
    assert "license: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n" in card


@pytest.mark.slow
def test_what_arrives_is_what_was_trained_and_loads(trained, tmp_path):
    _, run = trained
    with loopback_hub(tmp_path / "hub") as hub:
        refused = push_to(hub.url, trained, tmp_path / "home", token="hf_wrong_token")
        hub.refuse = 403
        forbidden = push_to(hub.url, trained, tmp_path / "home")
        hub.refuse = None
        hub.requests.clear()
        assert not (run / "push" / "manifest.json").exists()
        done = push_to(hub.url, trained, tmp_path / "home")
        num_requests = len(hub.requests)
        again = push_to(hub.url, trained, tmp_path / "home")
    assert refused.stderr.splitlines()[-1] == (
        f"3 {hub.url}: no valid token to push 'potstill-tiny' with (401); set HF_TOKEN or run `hf auth login`"
    )
    assert "hf_wrong_token" not in refused.stdout + refused.stderr
    assert f"3 {hub.url}: the token may not write 'potstill-tiny' (403)" in forbidden.stderr
    assert (done.returncode, again.returncode) == (0, 0), done.stderr
    assert len(hub.requests) == num_requests, "a push that is done asks nothing again"
    assert not [request for request in hub.requests if request.startswith("unknown")]
    assert TOKEN not in done.stdout + done.stderr
    assert hub.repos["tester/potstill-tiny"]["visibility"] == "private"
    stored, model = tmp_path / "hub" / "tester" / "potstill-tiny", run / "distill" / "tiny-distilled"
    expected = {path.name for path in model.iterdir()} - {"manifest.json"} | {"README.md"}
    assert {path.name for path in stored.iterdir()} == expected
    for path in model.iterdir():
        changed = ("manifest.json", "train_log.json")  # the log is published without paths
        assert path.name in changed or (stored / path.name).read_bytes() == path.read_bytes()
    assert str(run.parent) not in "".join(path.read_text(errors="replace") for path in stored.iterdir())
    manifest = json.loads((run / "push" / "manifest.json").read_text())
    assert manifest["counts"]["tree"] == {path.name: path.stat().st_size for path in stored.iterdir()}
    assert (manifest["counts"]["repo"], len(hub.commits)) == ("tester/potstill-tiny", 1)
    card = ModelCard.load(stored / "README.md")
    assert (card.data.license, card.data.eval_results[0].metric_value) == ("apache-2.0", 75.0)
    assert load_file(stored / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    pushed = AutoModelForCausalLM.from_pretrained(stored)
    assert pushed.num_parameters() == AutoModelForCausalLM.from_pretrained(model).num_parameters()
    assert AutoTokenizer.from_pretrained(stored).chat_template.endswith("{%- endif %}")


@pytest.mark.slow
def test_a_killed_push_goes_on_and_ends_the_same(trained, tmp_path):
    """SIGKILL while the Hub holds the commit back: nothing claims to be pushed, and the next push makes it whole."""
    _, run = trained
    with loopback_hub(tmp_path / "hub") as hub:
        hub.hold_commits = True
        process = start_push(hub.url, trained, tmp_path / "home", "push.repo=killed")
        until = time.monotonic() + 60
        while not hub.held:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (run / "push" / "manifest.json").exists()
        hub.hold_commits = False
        done = push_to(hub.url, trained, tmp_path / "home", "push.repo=killed")
    assert done.returncode == 0, done.stderr
    stored = tmp_path / "hub" / "tester" / "killed"
    counts = json.loads((run / "push" / "manifest.json").read_text())["counts"]
    assert counts["tree"] == {path.name: path.stat().st_size for path in stored.iterdir()}
    weights = run / "distill" / "tiny-distilled" / "model.safetensors"
    assert (stored / "model.safetensors").read_bytes() == weights.read_bytes()


@pytest.mark.slow
def test_a_hub_that_is_not_there_is_one_line(trained, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = push_to(endpoint, trained, tmp_path / "home", "push.repo=elsewhere")
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == f"3 {endpoint}: cannot be reached (ConnectError)"
    assert TOKEN not in done.stdout + done.stderr


def test_the_best_student_is_the_highest_on_the_suite_that_decides_and_of_equals_the_smaller(tmp_path):
    rows = [
        card_of("a-distilled", 0.5, 10),
        card_of("b-distilled", 0.7, 20),
        card_of("c-distilled", 0.7, 30),
        card_of("a-distilled", 0.99, 10, suite="pico/gcd"),
        card_of("a-distilled", 0.9, 10, suite="gsm8k"),
        card_of("b-distilled", 0.1, 20, suite="gsm8k"),
        card_of("b-direct", 0.9, 20, "direct"),
    ]
    cards = [ScoreCard.model_validate(row) for row in rows]
    assert [best_name(cards, suite, tmp_path) for suite in ("pico", "gsm8k")] == ["b-distilled", "a-distilled"]
    with pytest.raises(DataError, match="no distilled student is scored on math500 yet"):
        best_name(cards, "math500", tmp_path)


def test_a_student_that_is_not_there_and_scores_that_are_none_are_named(trained, tmp_path):
    recipe, run = trained
    named = load_recipe(recipe, ["push.student=tinny"])
    with pytest.raises(RecipeError, match=r"push\.student: no distilled student 'tinny' .*did you mean 'tiny'\?"):
        push(named, run, DRY)
    (tmp_path / "eval" / "x").mkdir(parents=True)
    (tmp_path / "eval" / "x" / "scores.json").write_text("[{}]")
    with pytest.raises(DataError, match=r"scores\.json: not a file of score cards"):
        push(load_recipe(recipe), tmp_path, DRY)
