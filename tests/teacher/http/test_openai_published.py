"""OpenAI's own client against a published model behind a socket: its template, its tools, its grammar's words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from distill.recipe import NativeTeacher
from distill.records import Sampling
from teacher.backends import open_teacher
from teacher.http.app import build_app
from tests.teacher.http.listening import listening

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")

NAME = "Qwen2.5-Coder-0.5B-Instruct"
MODELS = Path(os.environ.get("POTSTILL_MODELS", "/nonexistent"))
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
ASKED = {"role": "user", "content": "What is the weather in Paris, in degrees Celsius?"}


class Capital(BaseModel):
    country: Literal["France", "Spain"]
    capital: str
    is_in_europe: bool


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    if not (MODELS / NAME).is_dir():
        pytest.skip(f"{NAME} is not in $POTSTILL_MODELS")
    teacher: Any = open_teacher(NativeTeacher(model=NAME, batch_size=4), base_dir=MODELS)
    with listening(build_app(teacher, model=NAME, sampling=Sampling(temperature=0.0, max_tokens=48))) as (host, port):
        yield openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client: Any, *messages: dict[str, Any], **fields: Any) -> Any:
    return client.chat.completions.create(model=NAME, messages=messages, **fields)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_it_answers_and_streams_what_it_answers(client: Any) -> None:
    question = user("What is the capital of France? Answer in one word.")
    whole = ask(client, question)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(ask(client, question, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_a_system_message_takes_the_place_of_the_templates_own(client: Any) -> None:
    def prompt_tokens(*messages: dict[str, Any]) -> int:
        return ask(client, *messages, max_tokens=1).usage.prompt_tokens

    alone = prompt_tokens(user("Hi"))
    short = prompt_tokens({"role": "system", "content": "Hi"}, user("Hi"))
    assert short < alone, "the template's own system message is longer than this one"
    assert prompt_tokens({"role": "developer", "content": "Hi"}, user("Hi")) == short


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_call_of_a_tool_fits_its_schema(client: Any, choice: Any, streamed: bool) -> None:
    fields = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    if streamed:
        with client.chat.completions.stream(model=NAME, messages=[ASKED], **fields) as stream:
            answer = stream.get_final_completion().choices[0]
    else:
        answer = ask(client, ASKED, **fields).choices[0]
    (call,) = answer.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris", "unit": "C"}
    assert answer.finish_reason == "tool_calls"


def test_what_a_tool_found_reaches_the_model(client: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    turns = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "17 degrees and rain"},
    ]
    assert "rain" in ask(client, *turns).choices[0].message.content


def test_a_schema_is_kept_to(client: Any) -> None:
    parsed = client.chat.completions.parse(
        model=NAME, messages=[user("Tell me of the capital of Spain.")], response_format=Capital
    )
    found = parsed.choices[0].message.parsed
    assert isinstance(found, Capital)
    assert (found.country, found.capital, found.is_in_europe) == ("Spain", "Madrid", True)


def test_json_is_json_at_any_temperature(client: Any) -> None:
    fields = {"response_format": {"type": "json_object"}, "temperature": 1.5, "n": 3, "seed": 1}
    for choice in ask(client, user("Two colours, as JSON."), **fields).choices:
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.message.content.lstrip().startswith("{")


def test_penalties_and_stops_change_what_is_written(client: Any) -> None:
    question = user("Write the word 'so' twenty times, with spaces between.")
    plain = ask(client, question).choices[0].message.content
    penalised = ask(client, question, frequency_penalty=2.0, presence_penalty=2.0).choices[0].message.content
    assert plain.count("so ") > 2 * penalised.count("so ")
    stopped = ask(client, question, stop=["so so"]).choices[0]
    assert stopped.message.content == plain[: plain.index("so so")]
    assert stopped.finish_reason == "stop"


def test_logprobs_are_those_of_the_tokens_written(client: Any) -> None:
    answer = ask(client, user("Say yes."), logprobs=True, top_logprobs=3, max_tokens=4).choices[0]
    for entry in answer.logprobs.content:
        assert entry.top_logprobs[0].token == entry.token, "greedy"
        assert 0 >= entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    assert b"".join(bytes(entry.bytes) for entry in answer.logprobs.content).decode().startswith(answer.message.content)


def test_a_text_is_continued_and_echoed_with_its_logprobs(client: Any) -> None:
    prompt = "def add(a, b):\n    return"
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=6, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text.startswith(f"{prompt} a + b")
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == answer.usage.total_tokens
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])


def test_the_model_is_listed_and_retrieved(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
