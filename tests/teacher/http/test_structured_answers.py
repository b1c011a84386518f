"""`response_format`, `structured_outputs` and penalties over HTTP, with the bundled teacher, which thinks first."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from distill.reasoning import END_OF_THINKING
from distill.records import Sampling
from teacher.http.app import build_app
from tests.repository import REPOSITORY
from tests.teacher.backends.native.test_native_backend import open_it

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": -9, "maximum": 99}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "What is 3 + 4?"}]


def schema_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["here", "in workers"])
def client(request: pytest.FixtureRequest) -> Iterator[TestClient]:
    teacher = open_it(REPOSITORY / "teacher" / "pico")
    teacher.max_workers = request.param
    with TestClient(
        build_app(teacher, model="pico", sampling=Sampling(max_tokens=400, temperature=1.0)),
        base_url="http://localhost",
    ) as client:
        yield client


def asked(client: TestClient, **fields: Any) -> Any:
    body = {"model": "pico", "messages": QUESTION, "include_reasoning": True, "seed": 5, **fields}
    return client.post("/v1/chat/completions", json=body)


def contents(client: TestClient, **fields: Any) -> list[str]:
    response = asked(client, **fields)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    assert all(choice["message"]["reasoning_content"] for choice in choices), "it has thought before"
    return [choice["message"]["content"] for choice in choices]


def test_an_answer_follows_its_schema(client: TestClient) -> None:
    for content in contents(client, n=3, **schema_format(SCHEMA)):
        answer = json.loads(content)
        assert (set(answer), type(answer["answer"]), type(answer["sure"])) == ({"answer", "sure"}, int, bool)


def test_any_object_a_choice_and_a_regex(client: TestClient) -> None:
    (choice,) = asked(client, response_format={"type": "json_object"}).json()["choices"]
    assert choice["message"]["content"].lstrip("\n").startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    (content,) = contents(client, structured_outputs={"choice": ["seven", "eight"]})
    assert content.strip("\n") in ("seven", "eight")
    (content,) = contents(client, structured_outputs={"regex": r"[0-9]{3}-[a-f]{1,5}"})
    assert re.fullmatch(r"\n{0,2}[0-9]{3}-[a-f]{1,5}", content)


def test_a_stream_says_the_same(client: TestClient) -> None:
    fields = {**schema_format(SCHEMA), "seed": 9, "logprobs": True}
    (whole,) = contents(client, **fields)
    events = [
        json.loads(line.removeprefix("data: "))
        for line in asked(client, stream=True, **fields).text.split("\n\n")
        if line.startswith("data: {")
    ]
    deltas = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    assert "".join(deltas) == whole


def test_a_completion_is_guided_from_its_first_token(client: TestClient) -> None:
    body = {"model": "pico", "prompt": "7 = ", "seed": 2, **schema_format(SCHEMA)}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert set(json.loads(choice["text"])) == {"answer", "sure"}


def test_text_is_any_text(client: TestClient) -> None:
    assert asked(client, response_format={"type": "text"}).json()["choices"] == asked(client).json()["choices"]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        (schema_format({"type": "nope"}), "response_format", "Invalid type: nope"),
        (schema_format({"enum": ["x" * 70_000]}), "response_format", "at most"),
        (schema_format({"$ref": "#"}), "response_format", "admits no text"),
        (schema_format("text"), "response_format.json_schema.schema", ""),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs", "regex"),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar", ""),
        ({"structured_outputs": {"json_object": True}, "response_format": {"type": "json_object"}}, None,
         "structured_outputs"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "<think>\nso"}], "continue_final_message": True,
          "add_generation_prompt": False, "response_format": {"type": "json_object"}}, None, "response_format"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_in_words(
    client: TestClient, fields: dict[str, Any], param: str | None, said: str
) -> None:
    response = asked(client, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert param is None or error["param"].startswith(param), error


def test_penalties_change_what_is_said(client: TestClient) -> None:
    def text(**fields: Any) -> str:
        answer = asked(client, max_tokens=60, temperature=0, **fields).json()["choices"][0]["message"]
        return (answer["reasoning_content"] or "") + END_OF_THINKING + (answer["content"] or "")

    plain = text()
    none = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
    assert text(**none) == plain
    changed = [text(presence_penalty=2), text(frequency_penalty=2), text(repetition_penalty=1.5)]
    assert plain not in changed
    assert len(set(changed)) > 1
