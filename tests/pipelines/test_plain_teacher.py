"""An instruct model as a teacher, from the request to what a student learns and is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response
from transformers import PreTrainedTokenizerFast

from distill.recipe import Recipe
from distill.records import Example, Trace
from distill.tables import read_records
from pipelines.context import Context
from pipelines.stages.curate import curate
from pipelines.stages.generate import generate
from students.tokens import render
from teacher.backends.tokenizer import render_question
from tests.repository import REPOSITORY
from tests.students.tiny_bases import make_base
from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint, serving


class InstructModel(ChatEndpoint):
    """Works a sum in plain words where it is told to box the answer; every fourth question meets the token limit."""

    def _answer(self, payload: dict[str, Any]) -> Response:
        asked = payload["messages"][-1]["content"]
        a, b = map(int, re.findall(r"\d+", asked))
        total = f"\\boxed{{{a + b}}}" if asked.endswith("\n\nBox it.") else str(a + b)
        cut_off = a % 4 == 3
        content = f"{a} plus {b} is {total}{', and so' if cut_off else '.'}"
        choice = {"message": {"content": content}, "finish_reason": "length" if cut_off else "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 20}
        return JSONResponse({"choices": [{"index": 0, **choice}], "usage": usage})


@pytest.fixture
def endpoint() -> Iterator[ChatEndpoint]:
    with serving(InstructModel()) as running:
        yield running


def recipe(folder: Path, endpoint: ChatEndpoint, *, box: bool = True) -> Recipe:
    rows = [json.dumps({"prompt": f"{n} + {n + 1}?", "answer": str(2 * n + 1)}) for n in range(8)]
    (folder / "p.jsonl").write_text("\n".join(rows))
    instruction = {"system_prompt": "Be brief.", **({"prompt_suffix": "Box it."} if box else {})}
    tree = {
        "name": "t",
        "problems": [{"kind": "local", "path": str(folder / "p.jsonl")}],
        "teacher": {
            "backend": "openai",
            "model": "pico",
            "base_url": endpoint.url,
            "reasoning": "plain",
            **instruction,
        },
        "verify": {"num_workers": 1},
        "curate": {"instruction": "keep", "decontaminate": False},
        "distill": {"students": ["x"]},
        "eval": {"held_out": {"families": {"gcd": {}}, "count": 9, "split": "held_out"}},
    }
    return Recipe.model_validate(tree)


def test_what_it_writes_is_learned_and_asked_in_the_same_words(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    wanted = recipe(tmp_path, endpoint)
    generated = generate(wanted, tmp_path, Context(tmp_path))
    assert generated.counts["no_answer"] == 0
    traces = read_records(tmp_path / "generate" / "traces", Trace)
    assert {trace.text for trace in traces} >= {"0 plus 1 is \\boxed{1}.", "3 plus 4 is \\boxed{7}, and so"}

    curated = curate(wanted, tmp_path, Context(tmp_path))
    assert curated.counts["funnel"][:2] == [
        {"filter": "verdict", "in": 8, "out": 8},
        {"filter": "complete_reasoning", "in": 8, "out": 6},
    ]
    first, *_ = read_records(tmp_path / "curate" / "examples.parquet", Example)
    assert first.completion == "<think>\n0 plus 1 is \\boxed{1}.\n</think>\n\n\\boxed{1}"

    make_base(tmp_path / "base")
    student = PreTrainedTokenizerFast.from_pretrained(tmp_path / "base")
    student.chat_template = (REPOSITORY / "students/templates/chatml_think.jinja").read_text(encoding="utf-8")
    prompt, answer = render(student, first.question, first.completion, first.history)
    assert prompt == render_question(student, "0 + 1?", wanted.learned_instruction)
    assert prompt.endswith(
        "Be brief.<|im_end|>\n<|im_start|>user\n0 + 1?\n\nBox it.<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert answer == "0 plus 1 is \\boxed{1}.\n</think>\n\n\\boxed{1}<|im_end|>"


def test_one_that_was_not_told_to_box_its_answer_is_counted_so(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    generated = generate(recipe(tmp_path, endpoint, box=False), tmp_path, Context(tmp_path))
    assert generated.counts["no_answer"] == 6, "two were cut off before they ended"
