"""A published model of half a billion parameters writes questions, answers them and agrees with itself, on a CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from distill.recipe import Recipe
from distill.records import Problem, Trace
from distill.tables import read_records
from pipelines.context import Context
from pipelines.stages.generate import generate
from tests.repository import REPOSITORY

MODELS = Path(os.environ.get("POTSTILL_MODELS", REPOSITORY / "models"))
WRITER = MODELS / "Qwen2.5-Coder-0.5B-Instruct"
SEEDS = {
    "A baker makes 24 rolls and sells 9 of them. How many rolls are left?": "15",
    "Tom has 3 boxes with 8 pencils in each box. How many pencils does Tom have?": "24",
    "A bus carries 18 people. At a stop 7 people get on and nobody gets off. How many people are on the bus?": "25",
    "Mia reads 12 pages every day. How many pages does she read in 5 days?": "60",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not WRITER.is_dir(), reason="needs Qwen2.5-Coder-0.5B-Instruct in models/ or POTSTILL_MODELS")
def test_a_real_model_writes_questions_that_it_can_answer(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": question, "answer": answer}) for question, answer in SEEDS.items()]
    (tmp_path / "seeds.jsonl").write_text("\n".join(rows))
    seeds = [{"kind": "local", "path": str(tmp_path / "seeds.jsonl")}]
    source = {"kind": "synthesised", "seeds": seeds, "count": 2, "max_asked": 16, "num_votes": 3}
    tree = {
        "name": "t",
        "problems": [{**source, "modes": {"rephrased": 1}, "sampling": {"temperature": 0.8, "max_tokens": 160}}],
        "teacher": {
            "backend": "native",
            "model": str(WRITER),
            "dtype": "bfloat16",
            "reasoning": "plain",
            "prompt_suffix": "Please reason step by step, and put your final answer within \\boxed{}.",
        },
        "generate": {"num_samples": 3, "sampling": {"temperature": 0.7, "max_tokens": 256}},
        "verify": {"num_workers": 1},
        "distill": {"students": ["x"]},
        "eval": {"held_out": {"families": {"gcd": {}}, "count": 9, "split": "held_out"}},
    }
    manifest = generate(Recipe.model_validate(tree), tmp_path, Context(tmp_path))
    kept = read_records(tmp_path / "generate/problems.parquet", Problem)
    assert kept, manifest.counts
    for problem in kept:
        assert problem.prompt not in SEEDS
        assert any(answer in (problem.answer or "") for answer in SEEDS.values()), "a right one: a seed's, by agreement"
        assert problem.metadata["votes"]["agreeing"] >= 2
    traces = read_records(tmp_path / "generate/traces", Trace)
    assert len(traces) == manifest.counts["reused"] == 3 * len(kept)
