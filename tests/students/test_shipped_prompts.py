"""Prompts of students as they are shipped: the same token ids by transformers, by potstill and its server, by vLLM."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from transformers import AutoTokenizer

from distill.recipe import Instruction, NativeTeacher, VllmTeacher
from distill.records import Sampling
from students import bases
from students.sft import train_student
from students.zoo import find_student
from teacher.backends import open_teacher
from teacher.backends.tokenizer import encode_prompt, load_tokenizer, render_question
from teacher.http.app import build_app
from teacher.models.load import read_facts
from tests.published_models import published
from tests.students.tiny_bases import make_base, make_examples, make_student

METHODS = ("distilled", "direct")
REAL = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct")
ASKED = Instruction(prompt_suffix="Please reason step by step, and put your final answer within \\boxed{}.")
QUESTIONS = (
    "Natalia sold clips to 48 of her friends in April, and half as many in May. How many did she sell in all?",
    "A robe costs $1,250.50; it is 20% off.\n\nHow much is saved?\r\n  (in €, at 1:1)",
    "If x² + 5 = 41 and x > 0, what is x?  ",
)
SYSTEM = "You are a careful assistant."
HISTORY = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "<think>\n2 + 3 = 5\n</think>\n\n\\boxed{5}"},
    {"role": "user", "content": "And 3 more?"},
]
Conversations = list[list[dict[str, str]]]
CONVERSATIONS: Conversations = [[{"role": "user", "content": ASKED.asked(question)}] for question in QUESTIONS]


def ship(name: str, method: Any, out: Path) -> Path:
    """A student's folder as training leaves it, with the base's own weights: prompts do not depend on them."""
    student = find_student(name)
    base = published(student.base.rpartition("/")[2])
    tokenizer = bases.open_tokenizer(student, method, base)
    config = bases.open_config(base)
    bases.adapt_config(config, student, tokenizer)
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.copyfile(base / "generation_config.json", out / "generation_config.json")
    for weights in base.glob("*.safetensors"):
        (out / weights.name).symlink_to(weights)
    return out


def by_transformers(folder: Path, conversations: Conversations) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        for turns in conversations
    ]


def by_backend(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder, read_facts(folder))
    return [encode_prompt(tokenizer, render_question(tokenizer, question, ASKED)) for question in QUESTIONS]


def by_server(folder: Path, conversations: Conversations) -> list[list[int]]:
    config = NativeTeacher(model=folder.name, batch_size=1, dtype="bfloat16")
    teacher: Any = open_teacher(config, base_dir=folder.parent)
    teacher.max_workers = 1
    with TestClient(build_app(teacher, model="m", sampling=Sampling()), base_url="http://localhost") as client:
        return [
            client.post(
                "/v1/chat/completions",
                json={"model": "m", "messages": turns, "max_tokens": 1, "return_token_ids": True},
            ).json()["choices"][0]["prompt_token_ids"]
            for turns in conversations
        ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("architecture", "style"), [("qwen2", "chatml"), ("llama", "llama3")])
def test_a_trained_student_is_asked_alike(tmp_path: Path, architecture: str, style: str, method: Any) -> None:
    base = make_base(tmp_path / "base", architecture=architecture, style=style)
    student = make_student(base, architecture=architecture, style=style, num_epochs=1)
    examples = make_examples(tmp_path / "e.parquet", 8, direct=method == "direct")
    train_student(student, examples, method, tmp_path / "out")
    turns: Conversations = [[{"role": "user", "content": question}] for question in ("1 + 2?", "12 * 3\n= ?")]
    assert by_server(tmp_path / "out", turns) == by_transformers(tmp_path / "out", turns)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", REAL)
def test_a_published_model_s_student_is_asked_alike(tmp_path: Path, name: str, method: Any) -> None:
    folder = ship(name, method, tmp_path / "student")
    expected = by_transformers(folder, [*CONVERSATIONS, HISTORY])
    assert by_backend(folder) == expected[: len(QUESTIONS)]
    assert by_server(folder, [*CONVERSATIONS, HISTORY]) == expected


def by_vllm(folder: Path, conversations: Conversations) -> list[list[int]]:
    flags = {"max-model-len": 1024, "max-num-seqs": 2, "enforce-eager": True}
    config = VllmTeacher(model=str(folder), flags=flags)
    server: Any = open_teacher(config, base_dir=folder, log_dir=folder.parent)
    with contextlib.closing(server), httpx.Client(base_url=server.url, timeout=60) as client:
        client.headers["Authorization"] = f"Bearer {server.key}"
        (served,) = client.get("/v1/models").json()["data"]
        answers = [client.post("/tokenize", json={"model": served["id"], "messages": turns}) for turns in conversations]
        return [answer.raise_for_status().json()["tokens"] for answer in answers]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("name", REAL)
def test_vllm_asks_a_published_model_s_student_alike(tmp_path: Path, name: str) -> None:
    folder = ship(name, "distilled", tmp_path / "student")
    assert by_vllm(folder, [*CONVERSATIONS, HISTORY]) == by_transformers(folder, [*CONVERSATIONS, HISTORY])
