"""`echo` and `prompt_logprobs` over HTTP: transformers' logprobs, in OpenAI's shape and in vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.records import Sampling
from teacher.http.app import build_app
from tests.repository import REPOSITORY
from tests.teacher.backends.native.test_native_backend import open_it

FOLDER = REPOSITORY / "students" / "pico" / "qwen2-0.4m"
TEXTS = ["What is 3 + 4?", "é 7 * 8 = 56\n", "1"]
# FP32 in other orders of summation, and five digits.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=False)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = build_app(open_it(Path(FOLDER)), model="pico", sampling=Sampling(temperature=0.0, max_tokens=6))
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def completed(client: TestClient, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": "pico", "prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def wanted(tokenizer: Any) -> list[tuple[list[int], torch.Tensor]]:
    """Tokens of each text, and what transformers says of the one behind each."""
    peer = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, trust_remote_code=False).eval()
    rows = [tokenizer.encode(text) for text in TEXTS]
    with torch.no_grad():
        return [(ids, peer(torch.tensor([ids])).logits[0].log_softmax(dim=-1)) for ids in rows]


@pytest.mark.parametrize("as_tokens", [True, False], ids=["tokens", "texts"])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_echoed_prompts_have_transformers_logprobs(
    client: TestClient, tokenizer: Any, wanted: list[Any], as_tokens: bool, max_tokens: int
) -> None:
    prompts = [ids for ids, _ in wanted] if as_tokens else TEXTS
    body = completed(client, prompts, echo=True, logprobs=2, max_tokens=max_tokens, n=2)
    plain = completed(client, prompts, max_tokens=max(1, max_tokens))["choices"]
    assert body["usage"]["completion_tokens"] <= 6 * max_tokens
    assert body["usage"]["prompt_tokens"] == sum(len(ids) for ids, _ in wanted)
    for number, choice in enumerate(body["choices"]):
        ids, logprobs_TV = wanted[number // 2]
        told, text = choice["logprobs"], TEXTS[number // 2]
        written = plain[number // 2]["text"] if max_tokens else ""
        assert choice["text"] == text + written
        assert told["tokens"][: len(ids)] == [tokenizer.decode([token]) for token in ids]
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        found = told["token_logprobs"][1 : len(ids)]
        assert found == pytest.approx(
            logprobs_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), abs=TOLERANCE
        )
        for place in range(1, len(ids)):
            values = logprobs_TV[place - 1].topk(2).values.tolist()
            assert list(told["top_logprobs"][place].values()) == pytest.approx(values, abs=TOLERANCE)
        assert len({len(entries) for entries in told.values()}) == 1
        assert len(told["tokens"]) - len(ids) <= max_tokens
        if "�" not in "".join(told["tokens"]):
            whole = [
                choice["text"][at:].startswith(token)
                for at, token in zip(told["text_offset"], told["tokens"], strict=True)
            ]
            assert all(whole) or choice["finish_reason"] == "stop"  # the end token is no part of the text


def test_prompt_logprobs_are_in_vllms_shape(client: TestClient, tokenizer: Any, wanted: list[Any]) -> None:
    body = completed(client, TEXTS, prompt_logprobs=2, max_tokens=2)
    assert body["choices"][0]["logprobs"] is None
    for choice, (ids, logprobs_TV) in zip(body["choices"], wanted, strict=True):
        first, *entries = choice["prompt_logprobs"]
        assert first is None
        for token, row_V, entry in zip(ids[1:], logprobs_TV, entries, strict=False):
            best = row_V.topk(2)
            assert set(entry) == {str(token), *map(str, best.indices.tolist())}
            for name, told in entry.items():
                assert told["logprob"] == pytest.approx(row_V[int(name)].item(), abs=TOLERANCE)
                assert told["decoded_token"] == tokenizer.decode([int(name)])
            assert [entry[str(other)]["rank"] for other in best.indices.tolist()] == [1, 2]
        assert len(entries) == len(ids) - 1


def test_echo_alone_is_the_prompt_and_what_follows(client: TestClient) -> None:
    (choice,) = completed(client, TEXTS[0], echo=True)["choices"]
    assert choice["text"] == TEXTS[0] + completed(client, TEXTS[0])["choices"][0]["text"]
    assert choice["logprobs"] is None
    only = completed(client, TEXTS[0], echo=True, max_tokens=0)
    assert (only["choices"][0]["text"], only["choices"][0]["finish_reason"]) == (TEXTS[0], "length")
    assert only["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "stream": True}, "echo"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_told_is_refused(client: TestClient, fields: dict[str, Any], param: str) -> None:
    response = client.post("/v1/completions", json={"model": "pico", "prompt": "1", **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert param in (error["param"], error["message"].partition(":")[0].strip("'")), error
