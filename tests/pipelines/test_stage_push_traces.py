"""The traces as a data set: what is laid out loads and trains, and what a Hub on loopback gets is what was laid out."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from distill.curate import DroppedTrace
from distill.errors import DataError, RecipeError
from distill.export import export_traces
from distill.ledger import Ledger
from distill.manifest import run_stage
from distill.problems import load_problems
from distill.problems.worked import worked_solution
from distill.publish import traces as module
from distill.recipe import Recipe, load_recipe
from distill.records import Example, Problem, Trace, Verdict
from distill.tables import read_records, write_records
from pipelines.context import Context
from pipelines.stages.curate import curate
from pipelines.stages.push_traces import _without_path, push_traces
from tests.pipelines.tiny_world import potstill, write_yaml
from tests.students.loopback_hub import TOKEN, loopback_hub

SYSTEM = "Please reason | step by step,\nand box the answer."
DRY = Context(Path(), dry_run=True)
IDENTITY = {"name": "x", "weights": "w" * 8, "template": "t" * 8, "backend": "openai", "backend_version": "1"}


def write_run(folder: Path) -> Path:
    """A run up to curation: 24 questions, three samples each (right, wrong, cut off); returns the recipe."""
    path = write_yaml(
        folder / "recipe.yaml",
        {
            "name": "t",
            "problems": [{"kind": "reasoning_gym", "families": {"chain_sum": {}, "lcm": {}}, "count": 24}],
            "teacher": {"backend": "openai", "model": "x", "system_prompt": SYSTEM},
            "generate": {"num_samples": 3},
            "verify": {"num_workers": 1},
            "distill": {"students": ["qwen2-0.2m"]},
            "eval": {"held_out": {"families": {"lcm": {}}, "count": 4, "split": "held_out"}},
        },
    )
    recipe = load_recipe(path)
    out = folder / "runs" / "t" / "generate"
    problems = load_problems(recipe.problems, base_dir=folder)
    traces = []
    for problem in problems:
        wrong = "<think>\nno\n</think>\n\n\\boxed{-1}"
        texts = [(worked_solution(problem), "stop"), (wrong, "stop"), ("<think>", "length")]
        for index, (text, reason) in enumerate(texts):
            fields = {"key": f"{problem.id}{index}", "problem_id": problem.id, "sample_index": index, "text": text}
            fields |= {"finish_reason": reason, "num_prompt_tokens": 9, "num_tokens": len(text), "teacher": "x"}
            traces.append(Trace.model_validate(fields))

    def body() -> dict[str, Any]:
        write_records(out / "problems.parquet", problems, Problem)
        with Ledger.open(out / "ledger.sqlite") as ledger:
            ledger.add(traces)
            export_traces(ledger, lambda: (trace.key for trace in traces), out / "traces")
        return {"identity": IDENTITY}

    config = {"problems": [source.model_dump(mode="json") for source in recipe.problems]}
    run_stage("generate", {}, config, out, body, ("problems.parquet", "traces"))
    curate(recipe, folder / "runs" / "t", Context(folder))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    write_run(folder)
    return folder


def dry(world: Path, **settings: Any) -> tuple[Any, Path]:
    recipe = Recipe.model_validate({**load_recipe(world / "recipe.yaml").model_dump(), "push_traces": settings})
    run_dir = world / "runs" / "t"
    return push_traces(recipe, run_dir, DRY), run_dir / "push-traces" / "layout" / "dataset"


def test_what_is_laid_out_loads_and_holds_every_sample(world: Path, tmp_path: Path) -> None:
    shown, folder = dry(world, include_rejected=True)
    run = world / "runs" / "t"
    assert shown.counts["tree"].keys() == {
        "README.md",
        "data/train-00000-of-00001.parquet",
        "all/train-00000-of-00001.parquet",
    }
    assert not (run / "push-traces" / "manifest.json").exists(), "nothing was pushed"
    assert shown.counts["folder"] == str(folder)
    kept = load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    every = load_dataset(str(folder), "all", split="train", cache_dir=str(tmp_path))
    examples = {e.trace_key: e for e in read_records(run / "curate" / "examples.parquet", Example)}
    assert kept["trace_key"][:] == list(examples)
    for row in kept:
        example = examples[row["trace_key"]]
        assert row["messages"] == [
            {"role": "user", "content": example.question},
            {"role": "assistant", "content": example.completion},
        ]
        assert row["messages"][1]["content"].startswith("<think>\n")
        assert (row["source"], row["problem_id"]) == (example.source, example.problem_id)
    traces = read_records(run / "generate" / "traces", Trace)
    assert every["trace_key"][:] == [trace.key for trace in traces]
    dropped = {one.key: one for one in read_records(run / "curate" / "dropped.parquet", DroppedTrace)}
    assert {row["trace_key"]: row["dropped_by"] for row in every if row["dropped_by"]} == {
        key: one.filter for key, one in dropped.items()
    }
    assert {row["verdict"] for row in every} == {"correct", "wrong", "truncated"}
    assert [row["sample_index"] for row in every][:3] == [0, 1, 2]


def test_the_card_says_what_the_rows_are(world: Path) -> None:
    shown, folder = dry(world, include_rejected=True, licences={"lcm": "mit"}, repo="me/{recipe}-traces")
    card = DatasetCard.load(folder / "README.md")
    assert shown.counts["repo"] == "me/t-traces"
    assert card.data.license == ["apache-2.0", "mit"]
    assert {info["config_name"]: info["splits"][0]["num_examples"] for info in card.data.dataset_info} == {
        "default": shown.counts["examples"],
        "all": 72,
    }
    assert [config["data_files"][0]["path"] for config in card.data.configs] == ["data/train-*", "all/train-*"]
    text = " ".join(card.text.split())
    funnel = json.loads((world / "runs" / "t" / "curate" / "funnel.json").read_text())
    for said in (
        "| verdict | 72 | 48 | 24 |",
        f"| lcm | mit | 36 | {funnel[-1]['out'] // 2} |",
        "| weights | `wwwwwwww` |",
        "| system prompt | `Please reason \\| step by step, and box the answer.` |",
        "| temperature | 0.6 |",
        "| samples a question | 3 |",
        "Decontaminated against: pico.",
        'load_dataset("me/t-traces", "all", split="train")',
    ):
        assert said in text
    assert all(f"`{name}`" in text for name in load_columns(folder))


def load_columns(folder: Path) -> list[str]:
    return list(pq.read_schema(next((folder / "all").iterdir())).names)


def test_shards_follow_their_size_and_say_how_many_they_are(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW_GROUP", 5)
    problems = {p.id: p for p in read_records(world / "runs/t/generate/problems.parquet", Problem)}
    traces = read_records(world / "runs/t/generate/traces", Trace)
    relabelled = Verdict(state="correct", relabelled=True)
    rows = [(problems[trace.problem_id], trace, relabelled, None) for trace in traces]
    folder = world / "shards"
    laid = module.lay_out(rows, folder, licences={}, include_rejected=False, shard_bytes=6_000)
    names = sorted(path.name for path in (folder / "data").iterdir())
    assert len(names) > 2
    assert names == [f"train-{n:05d}-of-{len(names):05d}.parquet" for n in range(len(names))]
    assert laid.num_rows == {"default": 72}
    loaded = load_dataset("parquet", data_files=str(folder / "data/*"), split="train", cache_dir=str(world / "cache"))
    assert loaded["trace_key"][:] == [trace.key for trace in traces]
    assert all(loaded["relabelled"])


def test_the_messages_train_in_trl_unchanged(world: Path, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    from tests.students.tiny_bases import make_base

    _, folder = dry(world)
    base = make_base(tmp_path / "base")
    data = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        max_length=512,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
    )
    trained_on = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    question, answer = (message["content"] for message in data[0]["messages"])
    assert question in trained_on
    assert answer in trained_on, "reasoning and all"
    result = trainer.train()
    assert result.global_step == 2
    assert 0 < result.training_loss < 20


def push(world: Path, endpoint: str, *more: str, token: str = TOKEN, **environment: str) -> subprocess.CompletedProcess:
    hub = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token}
    offline = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(world / "home")}
    arguments = ("push-traces", world / "recipe.yaml", "--out", world / "runs", *more)
    return potstill(*arguments, **{**hub, **offline, **environment})


@pytest.mark.slow
def test_what_arrives_is_what_was_laid_out_and_the_token_is_nowhere(world: Path, tmp_path: Path) -> None:
    shutil.copy(world / "recipe.yaml", tmp_path)
    for stage in ("generate", "curate"):
        shutil.copytree(world / "runs/t" / stage, tmp_path / "runs/t" / stage)
    layout = tmp_path / "runs/t/push-traces/layout/dataset"
    canary = "hf_canary_0123456789"
    with loopback_hub(tmp_path / "hub") as hub:
        refused = push(tmp_path, hub.url, token=canary, POTSTILL_DEBUG="1")
        hub.refuse = 403
        forbidden = push(tmp_path, hub.url, POTSTILL_DEBUG="1")
        hub.refuse = None
        hub.requests.clear()
        stale = tmp_path / "hub/datasets/tester/potstill-t-traces/data/train-00001-of-00002.parquet"
        stale.parent.mkdir(parents=True)
        stale.write_bytes(b"of an earlier, larger push")
        done = push(tmp_path, hub.url, "--set", "push_traces.include_rejected=true")
        num_requests = len(hub.requests)
        again = push(tmp_path, hub.url, "--set", "push_traces.include_rejected=true")
    assert (refused.returncode, forbidden.returncode, done.returncode, again.returncode) == (3, 3, 0, 0), done.stderr
    says = "no valid token to push 'potstill-t-traces' with (401); set HF_TOKEN or run `hf auth login`"
    assert refused.stderr.splitlines()[-1] == f"potstill: {hub.url}: {says}"
    assert "Traceback" in refused.stderr
    assert "the token may not write 'potstill-t-traces' (403)" in forbidden.stderr
    assert len(hub.requests) == num_requests, "a push that is done asks nothing again"
    assert not [request for request in hub.requests if request.startswith("unknown")]
    assert hub.repos["datasets/tester/potstill-t-traces"]["visibility"] == "private"
    stored = tmp_path / "hub/datasets/tester/potstill-t-traces"
    assert files_of(stored) == files_of(layout)
    counts = json.loads((tmp_path / "runs/t/push-traces/manifest.json").read_text())["counts"]
    assert counts["tree"] == {name: len(data) for name, data in files_of(stored).items()}
    assert (counts["repo"], len(hub.commits)) == ("tester/potstill-t-traces", 1)
    assert "all/train-00000-of-00001.parquet" in done.stdout
    loaded = load_dataset(str(stored), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == counts["examples"]
    for secret in (TOKEN, canary):
        assert not any(secret in run.stdout + run.stderr for run in (refused, forbidden, done, again))
        for folder in (tmp_path / "runs", tmp_path / "hub"):
            assert not [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_faults_are_one_line(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"push_traces\.repo: not a repository name"):
        dry(world, repo="not a name!")
    with pytest.raises(
        RecipeError, match=r"push_traces\.licences: 'lmc' is no source of the problems; did you mean 'lcm'"
    ):
        dry(world, licences={"lmc": "mit"})
    with pytest.raises(DataError, match="not there yet; run `potstill distill` with this recipe first"):
        push_traces(load_recipe(world / "recipe.yaml"), tmp_path, DRY)
    assert not list(tmp_path.iterdir())
    done = potstill("push-traces", world / "recipe.yaml", "--out", tmp_path, "--dry-run")
    assert done.returncode == 2
    assert "generate/manifest.json: not there yet; run `potstill generate` with this recipe first" in done.stderr


def test_the_path_under_which_an_endpoint_serves_its_model_is_not_published(world: Path, tmp_path: Path) -> None:
    served = load_recipe(world / "recipe.yaml", ["teacher.model=/models/mine/R1"])
    identity = {"name": "/models/mine/R1", "weights": "/models/mine/R1@main", "backend": "openai"}
    named = {"name": "a local checkpoint", "weights": "a local checkpoint@main", "backend": "openai"}
    assert _without_path(identity, served, tmp_path) == named
    assert _without_path({"name": "x"}, load_recipe(world / "recipe.yaml"), tmp_path) == {"name": "x"}
