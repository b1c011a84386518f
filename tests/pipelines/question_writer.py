"""A teacher that writes questions about apples, answers them and makes mistakes, behind an endpoint on loopback.

All that it says is decided by what it is asked and the request's seed, so that a run that was killed can be compared
with one that was not; each answer tells the seed.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response

from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint

HELD_OUT = (
    "Rosalind picks 31 crates of apples before noon and her brother picks 22 crates more until the evening bell rings. "
    "How many crates of apples are there?"
)
BOX = "Box the answer."


class QuestionWriter(ChatEndpoint):
    """Answers `a + b` for a question with two numbers; of sums that end in 5 its samples tell different things."""

    def _answer(self, payload: dict[str, Any]) -> Response:
        asked, seed = payload["messages"][-1]["content"], int(payload["seed"])
        draw = random.Random(f"{asked} {seed}")
        text = self._question(asked, draw) if "<question>" in asked else self._solution(asked, draw)
        message = {"role": "assistant", "content": f"{text}\n(seed {seed})"}
        usage = {"prompt_tokens": 9, "completion_tokens": 20, "total_tokens": 29}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})

    def _question(self, asked: str, draw: random.Random) -> str:
        a, b = numbers(asked)
        name, fruit = draw.choice(["Ann", "Bob", "Cyd", "Dan"]), "apples"
        if "other numbers" in asked:
            a, b = draw.randrange(2, 60), draw.randrange(2, 60)
        elif "same kind" in asked:
            a, b, fruit = draw.randrange(2, 60), draw.randrange(2, 60), draw.choice(["pears", "plums", "figs"])
        kind = draw.random()
        if kind < 0.1:
            return "I would rather not."
        if kind < 0.2:
            return f"<question>{name} has {a} and {b} {fruit}. How many? The answer is {a + b}.</question>"
        if kind < 0.3:
            return f"<question>{HELD_OUT}</question>"
        if kind < 0.4 and "other words" in asked:
            a += 1  # other words, and another problem
        wording = draw.choice(["owns", "carries", "finds", "keeps", "sells", "counts"])
        return f"<question>{name} {wording} {a} {fruit} and then {b} more. What is the sum of these {fruit}?</question>"

    def _solution(self, asked: str, draw: random.Random) -> str:
        a, b = numbers(asked)
        total = a + b
        if total % 10 == 5:
            total += draw.randrange(9)
        elif draw.random() < 0.1:
            total += 1
        spelled = draw.choice([f"{total}", f"\\frac{{{2 * total}}}{{2}}", f"{total}.0"])
        return f"{a} and {b} are \\boxed{{{spelled}}}." if asked.endswith(BOX) else f"{a} and {b} are {spelled}."


def numbers(text: str) -> tuple[int, int]:
    """The first two numbers of a question, or of the seed in a prompt."""
    first, second, *_ = map(int, re.findall(r"\d+", text))
    return first, second


def write_seeds(folder: Path, count: int = 10) -> None:
    """Seeds with references; the last one is a question of the evaluation, and the evaluation's questions."""
    rows = [
        {"prompt": f"Eve has {n} apples and buys {2 * n + 1} more at the fair. How many has she?", "answer": 3 * n + 1}
        for n in range(3, 3 + count)
    ]
    rows.append({"prompt": HELD_OUT, "answer": 53})
    (folder / "seeds.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (folder / "exam.jsonl").write_text(json.dumps({"prompt": HELD_OUT, "answer": 53}) + "\n", encoding="utf-8")


def recipe_tree(folder: Path, url: str, **source: Any) -> dict[str, Any]:
    """A recipe whose problems are all written; `source` changes how."""
    seeds = [{"kind": "local", "path": str(folder / "seeds.jsonl")}]
    return {
        "name": "written",
        "problems": [{"kind": "synthesised", "seeds": seeds, "count": 12, **source}],
        "teacher": {
            "backend": "openai",
            "model": "pico",
            "base_url": url,
            "reasoning": "plain",
            "system_prompt": "You solve problems.",
            "prompt_suffix": BOX,
        },
        "generate": {"num_samples": 5, "grade": False, "sampling": {"max_tokens": 64, "seed": 3}},
        "verify": {"num_workers": 1},
        "distill": {"students": ["x"]},
        "eval": {"suites": ["held_out"], "held_out": {"kind": "local", "path": str(folder / "exam.jsonl")}},
    }
