"""The fields of requests to vLLM: what it would ignore is refused, what changes nothing does not reach it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from teacher.backends.vllm.routes import AllowList
from tests.repository import REPOSITORY

KEY = "sk-canary-0917"
MESSAGES = [{"role": "user", "content": "?"}]


class Read(BaseModel):
    """Some of vLLM's fields, which it takes beside any others."""

    model: str | None = None
    messages: list[Any] = []
    prompt: str | None = None
    n: int | None = 1
    user: str | None = None
    temperature: float | None = None
    tools: list[Any] | None = None
    tool_choice: str | None = None
    reasoning_effort: str | None = None


async def generate(raw: Request, request: Read = None) -> Response:  # type: ignore[assignment]
    return JSONResponse(await raw.json())


async def models(raw: Request) -> Response:
    if raw.headers.get("authorization") != f"Bearer {KEY}":
        return JSONResponse({"error": "Unauthorized"}, 401)
    return JSONResponse({"object": "list", "data": [{"id": "org/m", "object": "model", "owned_by": "vllm"}]})


@contextmanager
def served() -> Iterator[TestClient]:
    routes = [Route(f"/v1/{name}", generate, methods=["POST"]) for name in ("chat/completions", "completions")]
    app = Starlette(routes=[*routes, Route("/v1/models", models)])
    app.add_middleware(AllowList)
    with TestClient(app, base_url="http://localhost", headers={"authorization": f"Bearer {KEY}"}) as client:
        yield client


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with served() as client:
        yield client


def chat(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"model": "m", "messages": MESSAGES, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none"},
        {"n": None, "temperature": None},
        {
            "store": True,
            "metadata": {"a": "b"},
            "service_tier": "auto",
            "prompt_cache_key": "k",
            "safety_identifier": "s",
        },
        {"modalities": ["text"], "verbosity": "medium", "prediction": {"type": "content", "content": "?"}},
        {"audio": None, "functions": [], "function_call": "none", "web_search_options": None},
    ],
)
def test_what_changes_nothing_does_not_arrive(client: TestClient, fields: dict[str, Any]) -> None:
    assert chat(client, **fields).json() == {"model": "m", "messages": MESSAGES}


def test_what_vllm_knows_arrives_as_it_was(client: TestClient) -> None:
    known = {"n": 2, "user": "u", "tools": [{"type": "function"}], "tool_choice": "none", "reasoning_effort": "low"}
    assert chat(client, **known).json() == {"model": "m", "messages": MESSAGES, **known}
    assert client.post("/v1/completions", json={"model": "m", "prompt": "a"}).json() == {"model": "m", "prompt": "a"}


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"web_search_options": {}}, "web_search_options", "unsupported_parameter", "is not supported with this model"),
        ({"verbosity": "low"}, "verbosity", "invalid_value", "Supported values are: 'medium'"),
        ({"temprature": 1}, "temprature", "unknown_parameter", "Did you mean 'temperature'?"),
        ({"guided_json": {}}, "guided_json", "unknown_parameter", "Unknown parameter: 'guided_json'."),
        ({"store": "yes, please"}, "store", "invalid_type", "expected a boolean"),
    ],
)
def test_what_it_would_ignore_is_refused(
    client: TestClient, fields: dict[str, Any], param: str, code: str, message: str
) -> None:
    answer = chat(client, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert message in error["message"]


def test_fields_of_chat_are_unknown_to_completions(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"model": "m", "prompt": "a", "modalities": ["text"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter")


def test_one_model_is_retrieved_by_whoever_may_list_them(client: TestClient) -> None:
    assert client.get("/v1/models/org/m").json() == {"id": "org/m", "object": "model", "owned_by": "vllm"}
    other = client.get("/v1/models/other")
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    denied = client.get("/v1/models/org/m", headers={"authorization": "Bearer x"})
    assert (denied.status_code, denied.json()) == (401, {"error": "Unauthorized"})
    assert client.post("/v1/models/org/m", json={}).status_code == 404


# In a process of its own: whatever other tests have imported, vLLM brings its own order of imports along.
FIELDS_OF_VLLM = """
import json
from fastapi import FastAPI
from vllm.entrypoints.openai.chat_completion import api_router as chat_routes
from vllm.entrypoints.openai.completion import api_router as text_routes
from teacher.backends.vllm.fields import known_fields

app = FastAPI()
app.include_router(chat_routes.router)
app.include_router(text_routes.router)
paths = "/v1/chat/completions", "/v1/completions"
print("FIELDS", json.dumps([sorted(known_fields(app.routes, path)) for path in paths]))
"""


@pytest.mark.vllm
def test_the_routes_of_the_vllm_that_is_installed_tell_their_fields() -> None:
    command = [sys.executable, "-c", FIELDS_OF_VLLM]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=True)
    told = next(line for line in ran.stdout.splitlines() if line.startswith("FIELDS "))
    chat_fields, text_fields = map(set, json.loads(told.removeprefix("FIELDS ")))
    assert {"messages", "tools", "response_format", "repetition_penalty", "thinking_token_budget"} <= chat_fields
    assert {"prompt", "echo", "prompt_logprobs"} <= text_fields
    assert not {"store", "verbosity", "web_search_options"} & chat_fields
