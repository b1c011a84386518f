"""A chat client's exchange of three turns with a system message: transformers' tokens, greedily."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from distill.recipe import NativeTeacher
from distill.records import Sampling
from teacher.backends import open_teacher
from teacher.http.app import build_app
from tests.teacher.backends.published_templates import template
from tests.teacher.backends.tiny_models import save_tiny_model
from tests.teacher.http.spelling_teacher import events

# Where published models lie, a folder each; without it the tests of real ones are skipped.
MODELS = Path(os.environ.get("POTSTILL_MODELS", "/nonexistent"))
SYSTEM = {"role": "system", "content": "You are a careful assistant. Answer in one sentence."}
QUESTIONS = ("What is the capital of France?", "And how many people live there?", "Name one of its rivers.")
# As Open WebUI sends it: parameters that are not set are null or not there at all.
CLIENT = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "tools": [], "seed": None}


@pytest.fixture(
    params=["tiny", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SmolLM2-135M", "Qwen2.5-Coder-0.5B"))]
)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "tiny":
        made = save_tiny_model(tmp_path / "tiny", "qwen2", context=2_048)
        (made / "chat_template.jinja").write_text(template("qwen2_5"))
        return made
    found = sorted(MODELS.glob(f"{request.param}-Instruct"))
    if not found:
        pytest.skip(f"{request.param}-Instruct is not in $POTSTILL_MODELS")
    return found[0]


def said(folder: Path, text: str) -> str:
    """The text without special tokens, which a model of random weights writes: in a message they would be plain text
    here, and tokens for transformers."""
    specials = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True).all_special_tokens
    for token in specials:
        text = text.replace(token, "")
    return text


def exchange(folder: Path, max_tokens: int) -> list[tuple[str, list[int], list[int]]]:
    """Text, prompt and answer of each turn, streamed; the next question comes behind what was answered."""
    teacher: Any = open_teacher(NativeTeacher(model=folder.name, batch_size=1), base_dir=folder.parent)
    teacher.max_workers = 1
    messages: list[dict[str, Any]] = [SYSTEM]
    turns = []
    with TestClient(build_app(teacher, model="m", sampling=Sampling()), base_url="http://localhost") as client:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            body = {"model": "m", "messages": messages, "max_tokens": max_tokens, "return_token_ids": True, **CLIENT}
            pieces = events(client.post("/v1/chat/completions", json=body))
            assert pieces.pop()["usage"]["prompt_tokens"] == len(pieces[0]["choices"][0]["prompt_token_ids"])
            choices = [piece["choices"][0] for piece in pieces]
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            messages.append({"role": "assistant", "content": said(folder, text)})
            written = [token for choice in choices for token in choice.get("token_ids", [])]
            turns.append((text, choices[0]["prompt_token_ids"], written))
    return turns


def test_three_turns_are_transformers_own(folder: Path) -> None:
    turns = exchange(folder, max_tokens=24)
    # AutoTokenizer would split the tiny model's text as the family's own tokenizer does.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    messages: list[dict[str, Any]] = [SYSTEM]
    for question, (text, prompt_ids, token_ids) in zip(QUESTIONS, turns, strict=True):
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert prompt["input_ids"][0].tolist() == prompt_ids
        written = model.generate(**prompt, do_sample=False, max_new_tokens=24, repetition_penalty=1.0)
        assert written[0, len(prompt_ids) :].tolist() == token_ids
        messages.append({"role": "assistant", "content": said(folder, text)})
    assert len({text for text, _, _ in turns}) > 1
