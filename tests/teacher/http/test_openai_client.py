"""OpenAI's own client against the bundled teacher behind a socket: the whole chat surface, streamed and not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from distill.recipe import NativeTeacher
from distill.records import Sampling
from teacher.backends import open_teacher
from teacher.http.app import build_app
from tests.repository import REPOSITORY
from tests.teacher.http.listening import listening

openai = pytest.importorskip("openai")

QUESTION = {"role": "user", "content": "State the final answer to the following arithmetic problem: 12 + 34 - 5 + 20 ="}
ANSWER = "<think>\n12 + 34 = 46\n46 - 5 = 41\n41 + 20 = 61\n</think>\n\n\\boxed{61}"
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
# What each field of the client's `create` may be without changing the answer; the others are honoured or refused below.
NO_OPS: dict[str, Any] = {
    "audio": None,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "logprobs": False,
    "metadata": {"run": "7"},
    "modalities": ["text"],
    "moderation": None,
    "n": 1,
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "61"},
    "presence_penalty": 0,
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "in_memory",
    "reasoning_effort": None,
    "response_format": {"type": "text"},
    "safety_identifier": "s",
    "seed": None,
    "service_tier": "auto",
    "stop": None,
    "store": True,
    "stream_options": None,
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": None,
    "top_p": None,
    "user": "u",
    "verbosity": "medium",
    "web_search_options": None,
}
REFUSED: dict[str, Any] = {
    "audio": {"format": "wav", "voice": "a"},
    "function_call": {"name": "add"},
    "functions": [{"name": "add"}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "n": 0,
    "reasoning_effort": "low",
    "response_format": {"type": "xml"},
    "stop": [7],
    "temperature": 7,
    "tool_choice": "auto",
    "tools": [ADD],
    "top_logprobs": 3,
    "verbosity": "low",
    "web_search_options": {},
}


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    teacher = open_teacher(NativeTeacher(model="pico", batch_size=8), base_dir=REPOSITORY / "teacher")
    app = build_app(teacher, model="pico", sampling=Sampling(temperature=0.0, max_tokens=100))  # type: ignore[arg-type]
    with listening(app) as (host, port):
        yield openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0)


def ask(client: Any, *messages: dict[str, Any], **fields: Any) -> Any:
    return client.chat.completions.create(model="pico", messages=[*messages] or [QUESTION], **fields)


def test_every_field_of_the_client_is_decided(client: Any) -> None:
    """One that a later client has is decided here, too: honoured, of no effect, or refused in the API's words."""
    parameters = inspect.signature(client.chat.completions.create).parameters
    fields = {name for name in parameters if not name.startswith("extra_")} - {"timeout"}
    honoured = {"messages", "model", "stream", "temperature", "max_tokens", "max_completion_tokens"}
    assert fields == honoured | NO_OPS.keys()


def test_what_changes_nothing_is_taken(client: Any) -> None:
    assert ask(client, **NO_OPS).choices[0].message.content == ANSWER
    others = {"n": None, "stream": None, "logit_bias": None, "repetition_penalty": 1, "top_k": -1}
    assert ask(client, extra_body=others).choices[0].message.content == ANSWER


@pytest.mark.parametrize("field", REFUSED)
def test_what_would_change_the_answer_is_refused(client: Any, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **{field: REFUSED[field]})
    assert refused.value.type == "invalid_request_error"
    assert refused.value.param.split("[")[0].split(".")[0] == field
    assert field in refused.value.message
    assert refused.value.code


def test_a_stream_says_what_a_whole_answer_does(client: Any) -> None:
    whole = ask(client)
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    with client.chat.completions.stream(model="pico", messages=[QUESTION]) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_logprobs_samples_and_limits(client: Any) -> None:
    several = ask(client, n=3, temperature=1, seed=5, logprobs=True, top_logprobs=2, max_completion_tokens=7)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in several.choices} == {"length"}
    for choice in several.choices:
        assert len(choice.logprobs.content) == 7
        assert {len(entry.top_logprobs) for entry in choice.logprobs.content} == {2}
    assert several.usage.completion_tokens == 21
    again = ask(client, n=3, temperature=1, seed=5, max_tokens=7)
    assert [c.message.content for c in again.choices] == [c.message.content for c in several.choices]


def test_turns_roles_and_parts_reach_the_model(client: Any) -> None:
    def prompt_tokens(*messages: dict[str, Any]) -> int:
        return ask(client, *messages, max_tokens=1).usage.prompt_tokens

    system = {"role": "system", "content": "1 + 1 = 2"}
    answered = {"role": "assistant", "content": "\\boxed{61}"}
    alone = prompt_tokens(QUESTION)
    assert prompt_tokens(system, QUESTION) > alone
    assert prompt_tokens({**system, "role": "developer"}, QUESTION) == prompt_tokens(system, QUESTION)
    assert prompt_tokens(QUESTION, answered, QUESTION) > 2 * alone
    parts = [{"type": "text", "text": QUESTION["content"]}]
    assert ask(client, {"role": "user", "content": parts}).choices[0].message.content == ANSWER
    echoed = ask(client).choices[0].message.model_dump()  # with every field of the client's that is null
    assert prompt_tokens(QUESTION, echoed, QUESTION) > alone


def test_every_turn_counts_for_the_seed(client: Any) -> None:
    """Pico's template drops nothing; what it makes of two conversations differs, and so do their samples."""

    def sample(first: str) -> str:
        turns = [{"role": "user", "content": first}, {"role": "assistant", "content": "7"}, QUESTION]
        return ask(client, *turns, temperature=5, seed=1, max_tokens=8).choices[0].message.content

    assert sample("3 + 4") == sample("3 + 4")
    assert sample("3 + 4") != sample("4 + 3")


def test_a_message_goes_on_behind_other_turns(client: Any) -> None:
    turns = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}, QUESTION]
    whole = ask(client, *turns).choices[0].message.content
    first_step = whole[: whole.index("\n", len("<think>\n")) + 1]
    begun = {"role": "assistant", "content": first_step}
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    rest = ask(client, *turns, begun, extra_body=fields).choices[0].message.content
    assert rest
    assert first_step + rest == whole


def test_models_are_listed_and_retrieved(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["pico"]
    assert client.models.retrieve("pico").owned_by == "potstill"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("org/other")
    assert unknown.value.code == "model_not_found"
    assert "The model 'org/other' does not exist; 'pico' does." in unknown.value.message
    with pytest.raises(openai.NotFoundError) as asked:
        client.chat.completions.create(model="gpt-4o", messages=[QUESTION])
    assert (asked.value.code, asked.value.param) == ("model_not_found", "model")


def test_a_completion_goes_on_from_the_text_as_it_is(client: Any) -> None:
    prompt = f"<|bos|><|user|>{QUESTION['content']}<|assistant|><think>\n"
    settings = {"model": "pico", "temperature": 0, "max_tokens": 100}
    written = client.completions.create(prompt=prompt, **settings).choices[0].text
    assert written == ANSWER.removeprefix("<think>\n"), "special tokens in a text are tokens"
    chunks = client.completions.create(prompt=prompt, stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in chunks) == written
    bare = client.completions.create(prompt=QUESTION["content"], **settings | {"max_tokens": 1}).usage.prompt_tokens
    assert bare < client.completions.create(prompt=prompt, **settings | {"max_tokens": 1}).usage.prompt_tokens


def test_a_prompt_too_long_has_the_code_that_clients_look_for(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, {"role": "user", "content": "1 + " * 4_000})
    assert refused.value.code == "context_length_exceeded"
    assert "maximum context length" in refused.value.message
