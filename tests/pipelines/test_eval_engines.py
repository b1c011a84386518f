"""Bases scored behind a server: by an endpoint as by the native engine, by vLLM within the paired interval."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distill.recipe import Recipe
from distill.records import Sampling
from eval.scored import read_model
from pipelines.chain import require_complete
from pipelines.checks import recipe_checks
from pipelines.context import Context
from pipelines.stages.eval import evaluate
from students.zoo import find_student
from teacher.http.app import build_app
from tests.repository import REPOSITORY
from tests.teacher.backends.native.test_native_backend import open_it
from tests.teacher.http.listening import listening

NAME = "qwen2-0.4m-base"
CONTEXT = Context(REPOSITORY, num_workers=1)


def recipe_of(engine: Any, *, count: int, student: str = "qwen2-0.4m", **changes: Any) -> Recipe:
    pico = {"kind": "reasoning_gym", "families": "distill/problems/pico.yaml", "count": count, "seed": 3}
    return Recipe.model_validate(
        {
            "name": "engines",
            "problems": [pico],
            "teacher": {"backend": "native", "model": "teacher/pico"},
            "distill": {"students": [student]},
            "eval": {
                "held_out": {**pico, "split": "held_out"},
                "roles": ["base"],
                "num_samples": 1,
                "sampling": {"temperature": 0.0, "max_tokens": 48},
                "engine": engine,
                **changes,
            },
        }
    )


@pytest.mark.slow
def test_an_endpoint_scores_what_the_native_engine_scores(tmp_path: Path) -> None:
    base = Path(find_student("qwen2-0.4m").base)
    app = build_app(open_it(REPOSITORY / base), model="pico", sampling=Sampling())
    native = recipe_of("native", count=12)
    evaluate(native, tmp_path, CONTEXT)
    folder = tmp_path / "eval" / NAME
    columns = ["problem_id", "text", "finish_reason", "num_prompt_tokens", "num_tokens", "verdict"]
    before = pq.read_table(folder / "samples.parquet", columns=columns)
    with listening(app) as (host, port):
        endpoint = {"backend": "openai", "base_url": f"http://{host}:{port}/v1", "served": {NAME: "pico"}}
        manifest = evaluate(recipe_of(endpoint, count=12), tmp_path, CONTEXT)
        assert manifest.counts["asked"] == 12
        faster = endpoint | {"max_concurrency": 3, "timeout_s": 60}
        assert evaluate(recipe_of(faster, count=12), tmp_path, CONTEXT) == manifest
        require_complete("eval", recipe_of(faster, count=12), tmp_path)
    assert pq.read_table(folder / "samples.parquet", columns=columns) == before
    identity = json.loads((folder / "manifest.json").read_text())["counts"]["identity"]
    assert identity["backend"] == "openai"
    assert evaluate(native, tmp_path, CONTEXT).counts["asked"] == 0, "both engines' samples are kept"


def test_the_engine_is_looked_at_beforehand() -> None:
    flags = {"tensor-parallel-size": 2}
    checks = dict(recipe_checks(recipe_of({"backend": "openai", "base_url": "http://h/v1"}, count=4), REPOSITORY))
    assert checks["engine"]() == "an endpoint, http://h/v1"
    if importlib.util.find_spec("vllm") is not None:
        checks = dict(recipe_checks(recipe_of({"backend": "vllm", "flags": flags}, count=4), REPOSITORY))
        assert checks["engine"]().endswith("2 ranks a model")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_scores_a_pico_model_within_the_interval_of_native(tmp_path: Path) -> None:
    # vLLM's CPU build has no attention for the heads of smaller ones.
    drawn = {"student": "qwen2-0.8m", "sampling": {"temperature": 0.6, "max_tokens": 96}, "num_samples": 2}
    means = []
    for engine in ("native", {"backend": "vllm", "flags": {"max-model-len": 512, "max-num-seqs": 32}}):
        run_dir = tmp_path / str(len(means))
        evaluate(recipe_of(engine, count=64, **drawn), run_dir, CONTEXT)
        means.append(read_model(run_dir / "eval" / "qwen2-0.8m-base").answers["pico"].means)
    ours, theirs = means
    assert ours.keys() == theirs.keys()
    differences = [ours[question] - theirs[question] for question in ours]
    stderr = statistics.stdev(differences) / math.sqrt(len(differences))
    assert abs(statistics.mean(differences)) <= 2 * stderr + 1e-9
    assert (tmp_path / "1" / "eval" / "qwen2-0.8m-base" / "vllm.log").is_file()
