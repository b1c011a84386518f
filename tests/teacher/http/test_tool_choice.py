"""Tools over HTTP: a model of ours behind the templates of others, made to call and left to itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, Field
from starlette.testclient import TestClient

from distill.records import Sampling
from teacher.http.app import build_app
from tests.repository import REPOSITORY
from tests.teacher.backends.native.test_native_backend import open_it
from tests.teacher.backends.published_templates import template
from tests.teacher.http.listening import listening

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two digits",
        "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"$ref": "#/$defs/digit"}},
            "required": ["a", "b"],
            "additionalProperties": False,
            "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
QUESTION = {"role": "user", "content": "3 + 4"}


@pytest.fixture(scope="module", params=["qwen2_5", "llama3_1"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The bundled teacher in another's clothes: what it writes by itself is no call, what it must is one."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    shutil.copytree(REPOSITORY / "teacher" / "pico", folder, copy_function=os.symlink)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text(template(request.param))
    teacher = open_it(folder)
    teacher.max_workers = 1
    app = build_app(teacher, model="m", sampling=Sampling(max_tokens=120, temperature=1.0))
    with listening(app) as (host, port), httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
        yield client


def asked(client: httpx.Client | TestClient, *messages: dict[str, Any], **fields: Any) -> Any:
    body = {"model": "m", "messages": [*messages] or [QUESTION], "tools": [ADD, NOW], "seed": 5, **fields}
    return client.post("/v1/chat/completions", json=body)


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    assert choice["finish_reason"] == "tool_calls", choice
    assert choice["message"]["content"] is None
    calls = choice["message"]["tool_calls"]
    assert {call["type"] for call in calls} == {"function"}
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def is_valid(call: tuple[str, Any]) -> bool:
    name, arguments = call
    if name == "now":
        return arguments == {}
    return set(arguments) == {"a", "b"} and all(type(v) is int and 0 <= v <= 9 for v in arguments.values())


def test_a_model_that_must_call_does(client: httpx.Client) -> None:
    answer = asked(client, tool_choice="required", parallel_tool_calls=False, n=4)
    assert answer.status_code == 200, answer.text
    calls = [calls_of(choice) for choice in answer.json()["choices"]]
    assert {len(made) for made in calls} == {1}
    assert all(is_valid(made[0]) for made in calls)


def test_a_named_function_is_the_one_that_is_called(client: httpx.Client) -> None:
    for name in "add", "now":
        choice = {"type": "function", "function": {"name": name}}
        (answer,) = asked(client, tool_choice=choice, parallel_tool_calls=False).json()["choices"]
        assert [called for called, _ in calls_of(answer)] == [name]


def test_a_stream_tells_the_same_calls(client: httpx.Client) -> None:
    fields = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
    (whole,) = asked(client, **fields).json()["choices"]
    text = asked(client, stream=True, **fields).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events]
    (told,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert told["index"] == 0
    assert told["id"].startswith("call_")
    assert told["function"] == whole["message"]["tool_calls"][0]["function"]
    assert not any(delta.get("content") for delta in deltas)
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_strict_functions_are_called_by_their_schema_or_not_at_all(client: httpx.Client) -> None:
    strict = {"type": "function", "function": {**ADD["function"], "strict": True}}
    answer = asked(client, tools=[strict], n=4)
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        assert all(
            is_valid((c["function"]["name"], json.loads(c["function"]["arguments"])))
            for c in choice["message"].get("tool_calls", [])
        )


class Sum(BaseModel):
    """Adds two digits"""

    a: int = Field(ge=0, le=9)
    b: int = Field(ge=0, le=9)


def test_the_official_client_parses_what_comes(client: httpx.Client) -> None:
    openai = pytest.importorskip("openai")
    asking = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0).chat.completions
    settings = {"model": "m", "messages": [QUESTION], "seed": 5}
    tools = [openai.pydantic_function_tool(Sum, name="add")]
    choice = {"type": "function", "function": {"name": "add"}}
    one = {**settings, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    (call,) = asking.parse(**one).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Sum)
    with asking.stream(**one) as stream:
        assert stream.get_final_completion().choices[0].message.tool_calls[0].function == call.function
    said = asking.parse(**settings, response_format=Sum).choices[0].message
    assert isinstance(said.parsed, Sum)
    either = asking.parse(**settings, tools=tools, response_format=Sum).choices[0].message
    assert either.tool_calls or isinstance(either.parsed, Sum)


def test_a_conversation_goes_on_behind_a_call(client: httpx.Client) -> None:
    (first,) = asked(client, tool_choice="required", parallel_tool_calls=False).json()["choices"]
    call = first["message"]["tool_calls"][0]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "7"}
    fields = {"temperature": 0, "max_tokens": 8, "return_token_ids": True}
    told = asked(client, QUESTION, first["message"], result, **fields).json()["choices"][0]
    other = asked(client, QUESTION, first["message"], {**result, "content": "8"}, **fields).json()["choices"][0]
    assert told["prompt_token_ids"] != other["prompt_token_ids"]
    lost = asked(client, QUESTION, {"role": "tool", "tool_call_id": "c", "content": "7"})
    assert (lost.status_code, lost.json()["error"]["param"]) == (400, "messages[1].tool_call_id")


def test_none_leaves_the_tools_out_of_the_prompt(client: httpx.Client) -> None:
    def prompt(**fields: Any) -> list[int]:
        answer = asked(client, max_tokens=1, return_token_ids=True, **fields).json()
        return answer["choices"][0]["prompt_token_ids"]

    assert prompt(tool_choice="none") == prompt(tools=[]) == prompt(tools=None)
    assert len(prompt()) > len(prompt(tools=[]))


def test_a_schema_that_is_none_is_refused(client: httpx.Client) -> None:
    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
    answer = asked(client, tools=[broken], tool_choice="required")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tool_choice"


def test_a_model_without_tools_refuses_them() -> None:
    teacher = open_it(Path(REPOSITORY / "teacher" / "pico"))
    teacher.max_workers = 1
    with TestClient(build_app(teacher, model="m", sampling=Sampling()), base_url="http://localhost") as client:
        answer = asked(client)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    assert answer.json()["error"]["message"].startswith("Unsupported parameter: 'tools' is not supported")
