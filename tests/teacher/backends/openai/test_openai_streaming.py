"""Streams that break off, stall or say too little; many requests of which some fail; an endpoint with a hard limit."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, strategies as st
from starlette.responses import JSONResponse, Response

from distill.errors import EnvironmentFault, RecipeError
from distill.records import Completion
from teacher.backends.openai.answers import Answer, EndpointError
from teacher.backends.openai.client import retry_after_s
from teacher.backends.openai.secrets import ApiKey
from teacher.backends.openai.streaming import EventDecoder
from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint, serving
from tests.teacher.backends.openai.test_openai_backend import SAMPLING, check_all, collect, requests, teacher


@pytest.fixture
def endpoint() -> Iterator[ChatEndpoint]:
    with serving(ChatEndpoint()) as endpoint:
        yield endpoint


# --- streams ----------------------------------------------------------------------------------------------------------

EVENTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), min_size=1))


@given(EVENTS, st.sampled_from(["\n", "\r\n"]), st.randoms(use_true_random=False))
def test_events_come_whole_wherever_the_bytes_are_cut(events: list[str], end: str, chance: random.Random) -> None:
    stream = "".join(f": keep-alive{end}{end}data: {event}{end}id: 3{end}{end}" for event in events).encode()
    decoder, found, rest = EventDecoder(), [], stream
    while rest:
        size = chance.randint(1, 9)
        found += decoder.feed(rest[:size])
        rest = rest[size:]
    assert found == events


def test_a_stream_is_asked_for_and_read(endpoint: ChatEndpoint) -> None:
    asked = requests(4)
    check_all(list(teacher(endpoint).generate(asked, SAMPLING)), asked)
    assert all(payload["stream_options"] == {"include_usage": True} for payload in endpoint.payloads)


@pytest.mark.parametrize("ask_for_streams", [True, False])
def test_an_endpoint_that_does_not_stream_is_read_as_well(endpoint: ChatEndpoint, ask_for_streams: bool) -> None:
    endpoint.streams = False
    asked = requests(4)
    check_all(list(teacher(endpoint, stream=ask_for_streams).generate(asked, SAMPLING)), asked)
    assert {payload.get("stream", False) for payload in endpoint.payloads} == {ask_for_streams}


def test_a_stream_without_token_counts_names_the_switch(endpoint: ChatEndpoint) -> None:
    endpoint.counts = False
    with pytest.raises(RecipeError, match=r"teacher: sends no token counts; set teacher\.stream to false$"):
        list(teacher(endpoint).generate(requests(4), SAMPLING))
    asked = requests(2)
    check_all(list(teacher(endpoint, stream=False).generate(asked, SAMPLING)), asked)


def test_a_stream_that_breaks_off_is_no_completion(endpoint: ChatEndpoint) -> None:
    endpoint.breaks_off = True
    with pytest.raises(EnvironmentFault, match=r"after 3 attempts \(MalformedAnswer: ended without a finish_reason\)"):
        list(teacher(endpoint, max_retries=2).generate(requests(1), SAMPLING))


def test_a_stream_that_stalls_is_given_up_and_asked_for_again(endpoint: ChatEndpoint) -> None:
    endpoint.stall = lambda number: number == 3 and len(endpoint.payloads) <= 2
    asked = requests(1)
    source = teacher(endpoint, idle_timeout_s=0.5, timeout_s=3600, max_retries=100)
    check_all(list(source.generate(asked, SAMPLING)), asked)
    assert len(endpoint.payloads) >= 4


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"message": "out of\nmemory"}, 500),
        ({"message": "out of\nmemory", "type": "invalid_request_error", "code": "context_length_exceeded"}, 400),
        ({"message": "out of\nmemory", "type": "BadRequestError", "code": 422}, 422),
        ({"message": "out of\nmemory", "type": "rate_limit_error", "code": None}, 429),
        ("out of memory", 500),
    ],
)
def test_an_error_inside_a_stream_says_what_it_amounts_to(error: Any, status: int) -> None:
    answer = Answer()
    answer.take(json.dumps({"choices": [{"index": 0, "delta": {"content": "x"}}]}))
    with pytest.raises(EndpointError, match="broke off with the error 'out of memory'") as caught:
        answer.take(json.dumps({"error": error}))
    assert caught.value.status == status


def _streamed(error: dict[str, Any]) -> Response:
    return Response(f"data: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n", media_type="text/event-stream")


def test_a_request_refused_inside_a_stream_is_not_asked_again(endpoint: ChatEndpoint) -> None:
    refusal = {"message": "the prompt is too long", "type": "invalid_request_error", "code": None}
    endpoint.fault = lambda number, payload: _streamed(refusal)
    with pytest.raises(RecipeError, match=r"refused the request \(HTTP 400: the prompt is too long\)"):
        list(teacher(endpoint).generate(requests(1), SAMPLING))
    assert len(endpoint.payloads) == 2, "once a sample"


def test_a_fault_inside_a_stream_is_asked_again(endpoint: ChatEndpoint) -> None:
    asked = requests(1)
    fault = {"message": "EngineCore encountered an issue", "type": "InternalServerError", "code": 500}
    endpoint.fault = lambda number, payload: _streamed(fault) if number <= 2 else None
    check_all(list(teacher(endpoint, max_retries=5).generate(asked, SAMPLING)), asked)
    assert len(endpoint.payloads) == len(asked) + 2


# --- many requests ----------------------------------------------------------------------------------------------------


def test_one_bad_request_does_not_end_the_others(endpoint: ChatEndpoint) -> None:
    asked = requests(30)

    def refuse(number: int, payload: dict[str, Any]) -> Response | None:
        content = payload["messages"][-1]["content"]
        if content.startswith("3 +"):
            return JSONResponse({"error": {"message": "too long"}}, 400)
        return Response("down", 503) if content.startswith("5 +") else None

    endpoint.fault = refuse
    arrived: list[Completion] = []
    with pytest.raises(RecipeError, match=r"refused the request \(HTTP 400: too long\) \(4 of 60 requests failed\)$"):
        collect(teacher(endpoint, max_concurrency=2, max_retries=1).generate(asked, SAMPLING), arrived)
    check_all(arrived, [r for r in asked if not r.problem.prompt.startswith(("3 +", "5 +"))])


def test_an_endpoint_that_answers_nothing_is_not_asked_a_thousand_times(endpoint: ChatEndpoint) -> None:
    endpoint.fault = lambda number, payload: JSONResponse({"error": {"message": "no"}}, 400)
    with pytest.raises(RecipeError, match="refused the request"):
        list(teacher(endpoint, max_concurrency=4).generate(requests(500), SAMPLING))
    assert len(endpoint.payloads) < 40


def test_a_hard_limit_is_found_and_kept(endpoint: ChatEndpoint) -> None:
    """A real endpoint that answers 429 above twelve at a time, and says when to come back."""
    refused: list[int] = []

    def limited(number: int, payload: dict[str, Any]) -> Response | None:
        if endpoint.running <= 12:
            return None
        refused.append(number)
        return JSONResponse({"error": {"message": "slow down"}}, 429, headers={"retry-after": "0.01"})

    endpoint.fault = limited
    # The first sixteen meet inside, so that there is something to refuse whatever the machine's load.
    endpoint.hold = lambda number: number <= 16 and len(endpoint.payloads) < 16
    asked = requests(200)
    source = teacher(endpoint, max_concurrency=64, max_retries=30)
    check_all(list(source.generate(asked, SAMPLING)), asked)
    assert refused
    assert source._control.limit <= 16
    assert len(refused) < 0.2 * len(asked)


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after_s("7.5") == 7.5
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after_s("Fri, 31 Dec 2100 23:59:59 GMT") > 1e9
    assert (retry_after_s(""), retry_after_s("soon"), retry_after_s("-3")) == (0, 0, 0)


# --- the key ----------------------------------------------------------------------------------------------------------


def test_a_key_is_hidden_before_the_message_is_cut() -> None:
    key = ApiKey("sk-canary/0123456789", variable="K")
    for start in range(170, 215):
        said = key.redacted("x" * start + " sk-canary/0123456789 sk-canary%2F0123456789 tail")
        assert len(said) <= 200
        assert "sk-c" not in said
    assert "canary" not in repr(key)


def test_a_key_that_is_none_is_named_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K", "sk-canary\nX-Injected: 1")
    with pytest.raises(EnvironmentFault, match=r"^\$K: holds characters that no key has") as caught:
        ApiKey.of_environment("K")
    assert "canary" not in str(caught.value)
    monkeypatch.setenv("K", " sk-canary \n")
    assert ApiKey.of_environment("K").headers() == {"Authorization": "Bearer sk-canary"}
