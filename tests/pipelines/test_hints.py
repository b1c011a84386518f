"""A second try with the reference as a hint: who gets one, what becomes of it, where it is told."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from distill.recipe import Recipe
from distill.records import Example, Trace
from distill.tables import read_records
from pipelines.context import Context
from pipelines.stages.curate import curate
from pipelines.stages.generate import generate
from pipelines.stages.push_traces import push_traces
from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint, serving

NUM_SAMPLES, NUM_HINTED = 4, 2


class Guesser(ChatEndpoint):
    """Adds small numbers right; of larger sums it tells random things, unless it is told the answer.

    Told one, it speaks of the hint in every second sample. Of 90 + 91 it says 7 each time: the reference is wrong.
    """

    def _answer(self, payload: dict[str, Any]) -> Response:
        asked = payload["messages"][-1]["content"]
        a, b = map(int, re.findall(r"\d+", asked)[:2])
        told = re.search(r"final answer is (\d+)", asked)
        if a == 90:
            says = "90 and 91 are \\boxed{7}"
        elif told:
            leak = "As the hint says, " if payload["seed"] % 2 else ""
            says = f"{leak}{a} and {b} are {a + b}: \\boxed{{{told[1]}}}"
        else:
            says = f"\\boxed{{{a + b if a < 20 else payload['seed'] % 1000 + 1000}}}"
        message = {"role": "assistant", "content": f"<think>\nseed {payload['seed']}\n</think>\n\n{says}"}
        usage = {"prompt_tokens": 9, "completion_tokens": 20, "total_tokens": 29}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})


@pytest.fixture
def endpoint() -> Iterator[ChatEndpoint]:
    with serving(Guesser()) as running:
        yield running


def recipe(folder: Path, endpoint: ChatEndpoint, **generate_: Any) -> Recipe:
    """Ten easy sums, ten hard ones, one with a wrong reference."""
    sums = [*range(10), *range(30, 40), 90]
    rows = [{"prompt": f"{n} + {n + 1}?", "answer": str(2 * n + 1)} for n in sums]
    (folder / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tree = {
        "name": "t",
        "problems": [{"kind": "local", "path": str(folder / "p.jsonl")}],
        "teacher": {"backend": "openai", "model": "pico", "base_url": endpoint.url, "think_prefilled": False},
        "generate": {"num_samples": NUM_SAMPLES, "hints": {"num_samples": NUM_HINTED}, **generate_},
        "verify": {"num_workers": 1},
        "curate": {"decontaminate": False, "difficulty": {"min_pass_rate": 0.0, "max_pass_rate": 0.9}},
        "distill": {"students": ["x"]},
        "eval": {"held_out": {"families": {"gcd": {}}, "count": 9, "split": "held_out"}},
    }
    return Recipe.model_validate(tree)


def test_the_unsolved_get_a_second_try(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    what = recipe(tmp_path, endpoint)
    generated = generate(what, tmp_path, Context(tmp_path))
    hinted = [payload for payload in endpoint.payloads if "final answer is" in payload["messages"][-1]["content"]]
    assert len(hinted) == 10 * NUM_HINTED, "not the solved ones, nor the one whose reference is suspected"
    assert (generated.counts["hinted"], generated.counts["not_hinted_suspected"]) == (20, 1)
    traces = read_records(tmp_path / "generate/traces", Trace)
    assert [trace.hinted for trace in traces] == [False] * 21 * NUM_SAMPLES + [True] * 20
    leaking = sum("hint" in trace.text for trace in traces)
    assert 0 < leaking < 20

    curated = curate(what, tmp_path, Context(tmp_path))
    funnel = {step["filter"]: step for step in curated.counts["funnel"]}
    assert funnel["verdict"] == {"filter": "verdict", "in": 104, "out": 60, "hinted": 20}
    assert funnel["hint_leak"] == {"filter": "hint_leak", "in": 60, "out": 60 - leaking}
    assert funnel["difficulty"]["out"] == 20 - leaking, "by pass rates without hints: 1.0 of the easy, 0.0 of the hard"
    examples = read_records(tmp_path / "curate/examples.parquet", Example)
    assert curated.counts["hinted"] == len(examples) == 20 - leaking
    assert all(example.hinted and re.fullmatch(r"3\d \+ \d\d\?", example.question) for example in examples)
    (suspect,) = json.loads((tmp_path / "curate/audit.json").read_text())["suspected_references"]
    assert suspect["question"] == "90 + 91?"

    push_traces(what, tmp_path, Context(tmp_path, dry_run=True))
    card = next(tmp_path.rglob("README.md")).read_text()
    assert "20 samples were asked with the reference as a hint" in card


@pytest.mark.slow
def test_a_second_run_asks_nothing_and_more_samples_leave_the_hinted_alone(
    endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    generate(recipe(tmp_path, endpoint), tmp_path, Context(tmp_path))
    before = {(payload["messages"][-1]["content"], payload["seed"]) for payload in endpoint.payloads}
    endpoint.payloads.clear()
    (tmp_path / "generate/manifest.json").unlink()
    generate(recipe(tmp_path, endpoint), tmp_path, Context(tmp_path))
    assert not endpoint.payloads
    more = generate(recipe(tmp_path, endpoint, num_samples=6, hints={"num_samples": 3}), tmp_path, Context(tmp_path))
    asked = [(payload["messages"][-1]["content"], payload["seed"]) for payload in endpoint.payloads]
    assert not before & set(asked)
    assert len(asked) == 21 * 2 + 10
    assert more.counts["samples"] == 21 * 6 + 30


def test_without_hints_nothing_is_graded_or_asked_twice(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    counts = generate(recipe(tmp_path, endpoint, hints=None), tmp_path, Context(tmp_path)).counts
    assert len(endpoint.payloads) == counts["samples"] == 21 * NUM_SAMPLES
    assert "hinted" not in counts
