"""The HTTP API over a teacher that answers from its request alone, so that every answer can be predicted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from distill.records import Sampling
from teacher.http.app import build_app
from tests.teacher.http.spelling_teacher import DEFAULTS, SpellingTeacher, chat, events, wait_until


@pytest.fixture
def client(teacher: SpellingTeacher) -> Iterator[TestClient]:
    with TestClient(build_app(teacher, model="pico", sampling=DEFAULTS)) as client:
        yield client
    assert teacher.closed


def test_plain_routes(client: TestClient) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/version").json()["version"]
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["pico"]


def test_chat_answers_n_distinct_samples_in_order(client: TestClient) -> None:
    answer = chat(client, n=3).json()
    assert answer["object"] == "chat.completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 3
    assert all(text.startswith("<think>\nwhat is 2 + 2\n</think>") for text in texts)
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 21, "total_tokens": 26}


def test_a_seed_repeats_and_no_seed_differs(client: TestClient) -> None:
    def texts(**fields: object) -> list[str]:
        return [choice["message"]["content"] for choice in chat(client, n=2, **fields).json()["choices"]]

    assert texts(seed=9) == texts(seed=9)
    assert texts(seed=9) != texts(seed=10)
    assert not set(texts()) & set(texts())


def test_fields_reach_the_sampling(client: TestClient, teacher: SpellingTeacher) -> None:
    chat(client, temperature=0, top_p=0.5, max_tokens=12, seed=8)
    chat(client, max_completion_tokens=13, max_tokens=12)
    chat(client, max_tokens=12, thinking_token_budget=5)
    assert teacher.submitted[0][1] == Sampling(temperature=0, top_p=0.5, max_tokens=12, seed=8)
    assert teacher.submitted[1][1] == DEFAULTS.model_copy(update={"max_tokens": 13})
    assert teacher.submitted[2][1] == DEFAULTS.model_copy(update={"max_tokens": 12, "max_thinking_tokens": 5})


def test_completions_take_several_prompts(client: TestClient) -> None:
    body = {"model": "pico", "prompt": ["one", "two"], "n": 2, "stop": ["</think>", "zzz"]}
    answer = client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["one\n"] * 2 + ["two\n"] * 2
    assert answer["usage"]["prompt_tokens"] == 10


def test_streams_carry_the_same_text_as_whole_answers(client: TestClient) -> None:
    whole = chat(client, n=2, seed=4).json()
    chunks = events(chat(client, n=2, seed=4, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {choice["index"]: choice["message"]["content"] for choice in whole["choices"]}
    assert reasons == {0: "stop", 1: "stop"}


def test_requests_that_come_together_are_under_way_together(client: TestClient, teacher: SpellingTeacher) -> None:
    teacher.hold.clear()
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(chat, client)
        wait_until(lambda: len(teacher.submitted) == 1)
        rest = [pool.submit(chat, client) for _ in range(8)]
        wait_until(lambda: client.app.state.feed.num_unfinished() == 9)
        teacher.hold.set()
        answers = [future.result() for future in [first, *rest]]
    assert [answer.status_code for answer in answers] == [200] * 9
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 9
    assert len(teacher.submitted) == teacher.num_finished == 9


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "owner", "content": "be brief"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"continue_final_message": True}, "messages"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_bad_fields_are_named(client: TestClient, teacher: SpellingTeacher, fields: dict, param: str) -> None:
    response = chat(client, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not teacher.submitted


BOTH = [{"role": "user", "content": "what is 2 + 2"}, {"role": "assistant", "content": "<think>\nso"}]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"top_logprobs": 2}, "Invalid 'top_logprobs': needs logprobs"),
        ({"logprobs": True, "stop": "x"}, "Invalid 'stop': cuts the text, not its tokens"),
        ({"add_generation_prompt": False}, "Invalid 'add_generation_prompt': must be the opposite"),
        (
            {"messages": BOTH, "continue_final_message": True, "thinking_token_budget": 3},
            "Invalid 'thinking_token_budget': cannot be counted",
        ),
    ],
)
def test_fields_that_contradict_each_other(client: TestClient, fields: dict, said: str) -> None:
    response = chat(client, **fields)
    assert (response.status_code, said in response.json()["error"]["message"]) == (400, True), response.text


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"messages": [{"role": "user", "content": "too long"}]}, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "out of memory"}]}, "server_error"),
    ],
)
def test_a_stream_names_a_fault_as_a_whole_answer_does(client: TestClient, fields: dict, kind: str) -> None:
    (last,) = events(chat(client, stream=True, **fields))
    assert last["error"] == chat(client, **fields).json()["error"]
    assert last["error"]["type"] == kind


def test_a_long_answer_keeps_its_connection_alive(
    client: TestClient, teacher: SpellingTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher.http.stream.KEEP_ALIVE_S", 0.02)
    teacher.hold.clear()
    threading.Timer(0.3, teacher.hold.set).start()
    text = chat(client, stream=True).text
    comments = [part for part in text.split("\n\n") if part.startswith(":")]
    assert set(comments) == {": keep-alive"}
    assert text.index(": keep-alive") < text.index("data: ")
    assert text.endswith("data: [DONE]\n\n")


def test_other_bad_requests(client: TestClient) -> None:
    assert client.post("/v1/completions", content=b"{").status_code == 400
    assert client.post("/v1/completions", content=b"\xff").status_code == 400
    assert client.post("/v1/completions", content=b" " * (8 * 2**20 + 1)).status_code == 413
    unknown = chat(client, model="r1")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/nothing").json()["error"]["message"] == "Not Found"
    assert client.get("/v1/completions").status_code == 405


def test_a_fault_of_the_teacher_ends_its_request_and_not_the_server(client: TestClient) -> None:
    broken = [{"role": "user", "content": "out of memory"}]
    response = chat(client, messages=broken)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "no memory is left"
    assert events(chat(client, messages=broken, stream=True))[-1]["error"]["message"] == "no memory is left"
    assert chat(client).status_code == 200


def test_a_full_queue_is_refused(teacher: SpellingTeacher) -> None:
    app = build_app(teacher, model="pico", sampling=DEFAULTS, max_batch=1, max_waiting=4)
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        teacher.hold.clear()
        running = pool.submit(chat, client)
        wait_until(lambda: len(teacher.submitted) == 1)
        assert chat(client, n=5).status_code == 429
        teacher.hold.set()
        assert running.result().status_code == 200
        assert chat(client).status_code == 200
    assert len(teacher.submitted) == 2
