"""The endpoint backend against a real server on loopback, with everything that goes wrong on the way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from distill.errors import EnvironmentFault, RecipeError
from distill.protocols import Teacher
from distill.recipe import OpenAITeacher
from distill.records import Completion, Problem, Sampling, TraceRequest
from teacher.backends.openai import OpenAICompatibleTeacher
from teacher.backends.openai.answers import whole_text
from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint, dropped, serving

SAMPLING = Sampling(temperature=0.6, top_p=0.95, max_tokens=64, seed=3)


@pytest.fixture
def endpoint() -> Iterator[ChatEndpoint]:
    with serving(ChatEndpoint()) as endpoint:
        yield endpoint


def requests(count: int) -> list[TraceRequest]:
    problems = [
        Problem(prompt=f"{n} + {n + 1}?", answer=str(2 * n + 1), grader="math", source="t") for n in range(count)
    ]
    return [TraceRequest(problem=problem, sample_index=index) for problem in problems for index in range(2)]


def teacher(endpoint: ChatEndpoint, **settings: Any) -> OpenAICompatibleTeacher:
    config = OpenAITeacher.model_validate({"base_url": endpoint.url, "model": "pico", "timeout_s": 20, **settings})
    return OpenAICompatibleTeacher(config, backoff_s=0.002)


def expected(request: TraceRequest) -> str:
    a, _, b = request.problem.prompt.rstrip("?").split()
    total = int(a) + int(b)
    return f"<think>\nseed {request.seed(SAMPLING)}\n{a} + {b} = {total}\n</think>\n\n\\boxed{{{total}}}"


def check_all(completions: list[Completion], asked: list[TraceRequest]) -> None:
    answered = sorted((completion.request.problem.id, completion.request.sample_index) for completion in completions)
    assert answered == sorted((request.problem.id, request.sample_index) for request in asked)
    for completion in completions:
        assert completion.text == expected(completion.request)
        assert (completion.finish_reason, completion.num_prompt_tokens, completion.num_tokens) == ("stop", 9, 20)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("style", ["prefilled", "reasoning_content", "reasoning"])
def test_every_request_is_answered_once_whatever_the_server_parses(
    endpoint: ChatEndpoint, style: str, stream: bool
) -> None:
    endpoint.style = style
    asked = requests(20)
    source = teacher(endpoint, stream=stream)
    assert isinstance(source, Teacher)
    check_all(list(source.generate(asked, SAMPLING)), asked)
    assert len({payload["seed"] for payload in endpoint.payloads}) == 40
    assert {(p["temperature"], p["top_p"], p["max_tokens"]) for p in endpoint.payloads} == {(0.6, 0.95, 64)}


def test_concurrency_is_used_and_bounded(endpoint: ChatEndpoint) -> None:
    endpoint.hold = lambda number: endpoint.most_running < 7
    asked = requests(30)
    check_all(list(teacher(endpoint, max_concurrency=7).generate(asked, SAMPLING)), asked)
    assert endpoint.most_running == 7


def test_completions_arrive_as_they_finish(endpoint: ChatEndpoint) -> None:
    endpoint.hold = lambda number: number > 1
    stream = teacher(endpoint, max_concurrency=2).generate(requests(20), SAMPLING)
    next(stream)
    stream.close()
    endpoint.hold = lambda number: False
    assert teacher(endpoint).identity.name == "pico"
    time.sleep(0.5)  # what was on its way when the stream was closed has arrived
    assert len(endpoint.payloads) <= 3, "the others wait for their turn, and a closed stream asks for nothing more"


def test_faults_that_pass_are_asked_again(endpoint: ChatEndpoint) -> None:
    faults = itertools.cycle(
        [
            lambda: JSONResponse({"error": {"message": "busy"}}, 429, headers={"retry-after": "0"}),
            lambda: Response("oops", 500),
            lambda: Response("{torn", 200),
            lambda: JSONResponse({"choices": []}),
            dropped,
            lambda: JSONResponse({"choices": [{"message": {"content": "x"}, "finish_reason": "abort"}], "usage": {}}),
        ]
    )
    endpoint.fault = lambda number, payload: next(faults)() if number % 2 else None
    asked = requests(30)
    check_all(list(teacher(endpoint, max_retries=40).generate(asked, SAMPLING)), asked)
    assert len(endpoint.payloads) > 1.4 * len(asked)


def test_a_time_out_is_asked_again(endpoint: ChatEndpoint) -> None:
    endpoint.hold = lambda number: number <= 2
    asked = requests(1)
    check_all(list(teacher(endpoint, timeout_s=0.3, max_retries=100).generate(asked, SAMPLING)), asked)
    assert len(endpoint.payloads) >= 2 + len(asked)


def test_faults_that_stay_end_in_one_line(endpoint: ChatEndpoint) -> None:
    endpoint.fault = lambda number, payload: Response("down", 503)
    with pytest.raises(EnvironmentFault, match=r"/v1: no completion after 3 attempts \(HTTP 503\); run the same"):
        list(teacher(endpoint, max_retries=2).generate(requests(3), SAMPLING))


def collect(stream: Iterator[Completion], into: list[Completion]) -> None:
    for completion in stream:
        into.append(completion)


def test_paid_for_work_comes_home_before_the_error(endpoint: ChatEndpoint) -> None:
    refused: list[int] = []

    def too_long(number: int) -> bool:
        return bool(endpoint.payloads[number - 1]["messages"][-1]["content"].startswith("1 +"))

    def refuse_one(number: int, payload: dict[str, Any]) -> Response | None:
        if not too_long(number):
            return None
        refused.append(number)
        return JSONResponse({"error": {"message": "too long\nfor 64 tokens"}}, 400)

    # All eight are in flight when the first of them is refused, and the others are still there when it has been.
    endpoint.hold = lambda number: len(endpoint.payloads) < 8 if too_long(number) else not refused

    endpoint.fault = refuse_one
    arrived: list[Completion] = []
    with pytest.raises(RecipeError, match=r"teacher: refused the request \(HTTP 400: too long for 64 tokens\)"):
        collect(teacher(endpoint, max_concurrency=8).generate(requests(4), SAMPLING), arrived)
    check_all(arrived, [r for r in requests(4) if not r.problem.prompt.startswith("1 +")])


def test_a_refused_key_is_named_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ChatEndpoint(key="sk-right")) as endpoint:
        monkeypatch.setenv("MY_KEY", "sk-wrong-secret")
        with pytest.raises(EnvironmentFault, match=r"refused the key in \$MY_KEY \(HTTP 401: .*\*\*\*") as caught:
            teacher(endpoint, api_key_env="MY_KEY")
        assert "sk-wrong" not in str(caught.value)
        monkeypatch.delenv("MY_KEY")
        with pytest.raises(EnvironmentFault, match=r"refused no key \(\$MY_KEY\)"):
            teacher(endpoint, api_key_env="MY_KEY")
        monkeypatch.setenv("MY_KEY", "sk-right")
        asked = requests(2)
        source = teacher(endpoint, api_key_env="MY_KEY")
        check_all(list(source.generate(asked, SAMPLING)), asked)
        endpoint.key = "sk-rotated"
        with pytest.raises(EnvironmentFault, match=r"refused the key") as caught:
            list(source.generate(asked, SAMPLING))
        assert "sk-right" not in str(caught.value)


def test_an_unknown_model_names_the_nearest(endpoint: ChatEndpoint) -> None:
    with pytest.raises(RecipeError, match=r"teacher\.model: 'pcio' is not served; did you mean 'pico'\?"):
        teacher(endpoint, model="pcio")
    source = teacher(endpoint)
    endpoint.model = "another"
    with pytest.raises(RecipeError, match=r"teacher\.model: 'pico' is not served \(HTTP 404"):
        list(source.generate(requests(1), SAMPLING))


def test_an_endpoint_that_is_not_there_is_an_environment_fault(endpoint: ChatEndpoint) -> None:
    config = OpenAITeacher(base_url="http://127.0.0.1:9/v1", model="pico")
    with pytest.raises(EnvironmentFault, match=r"http://127\.0\.0\.1:9/v1: cannot be reached"):
        OpenAICompatibleTeacher(config)


def test_identity_changes_with_what_changes_the_text(endpoint: ChatEndpoint) -> None:
    first = teacher(endpoint).identity
    assert (first.name, first.backend, first.backend_version) == ("pico", "openai", "0.31.0")
    same = teacher(endpoint, max_concurrency=3, max_retries=1, timeout_s=9).identity
    assert same == first
    others = [
        teacher(endpoint, revision="abc").identity,
        teacher(endpoint, system_prompt="Think.").identity,
        teacher(endpoint, think_prefilled=False).identity,
        teacher(endpoint, prompt_suffix="Think.").identity,
    ]
    endpoint.version = None
    others.append(teacher(endpoint).identity)
    assert others[-1].backend_version == "unknown"
    assert len({identity.model_dump_json() for identity in [first, *others]}) == 6


def test_the_instruction_is_sent(endpoint: ChatEndpoint) -> None:
    instruction = {"system_prompt": "Think first.", "prompt_suffix": "Box it."}
    list(teacher(endpoint, **instruction).generate(requests(1), SAMPLING))
    assert endpoint.payloads[0]["messages"] == [
        {"role": "system", "content": "Think first."},
        {"role": "user", "content": "0 + 1?\n\nBox it."},
    ]


def test_nothing_is_put_in_front_of_plain_text(endpoint: ChatEndpoint) -> None:
    (first, *_) = teacher(endpoint, reasoning="plain").generate(requests(1), SAMPLING)
    assert first.text.startswith("seed ")


@pytest.mark.parametrize(
    ("reasoning", "content", "prefilled", "text"),
    [
        ("a\nb", "c", True, "<think>\na\nb\n</think>\n\nc"),
        ("\na\n", "\n\nc", False, "<think>\na\n</think>\n\nc"),
        ("cut of", "", True, "<think>\ncut of\n"),
        ("", "a\n</think>\n\nc", True, "<think>\na\n</think>\n\nc"),
        ("", "<think>\na\n</think>\n\nc", True, "<think>\na\n</think>\n\nc"),
        ("", "<think>a</think>c", False, "<think>\na</think>c"),
        ("", "plain", False, "plain"),
        ("", "", True, "<think>\n"),
    ],
)
def test_the_thinking_goes_back_between_its_tags(reasoning: str, content: str, prefilled: bool, text: str) -> None:
    assert whole_text(reasoning, content, think_prefilled=prefilled) == text


def test_a_lone_surrogate_does_not_reach_the_ledger(endpoint: ChatEndpoint) -> None:
    body = '{"choices":[{"message":{"content":"\\ud83d half"},"finish_reason":"length"}],"usage":%s}'
    usage = '{"prompt_tokens":1,"completion_tokens":2}'
    endpoint.fault = lambda number, payload: Response(body % usage, media_type="application/json")
    (completion, _) = teacher(endpoint).generate(requests(1), SAMPLING)
    assert completion.text == "<think>\n? half"
    assert completion.finish_reason == "length"
