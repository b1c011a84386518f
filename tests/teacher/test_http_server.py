"""The HTTP API over a teacher that answers from its request alone, so that every answer can be predicted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from distill.errors import EnvironmentFault
from distill.records import Completion, Problem, Sampling, TeacherIdentity, TraceRequest
from teacher.serve.batching import Asked, Batcher
from teacher.serve.http import build_app

DEFAULTS = Sampling(temperature=0.6, top_p=0.95, max_tokens=100, seed=3)


class SpellingTeacher:
    """Says what it was asked, with which seed; finishes a batch from its end, and remembers the batches."""

    def __init__(self) -> None:
        self.identity = TeacherIdentity(name="spelling", weights="-", template="-", backend="test", backend_version="1")
        self.batches: list[tuple[int, Sampling]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.closed = False

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        self.batches.append((len(requests), sampling))
        assert self.hold.wait(30)
        for request in reversed(requests):
            if request.problem.prompt == "out of memory":
                raise EnvironmentFault("no memory is left")
            text = f"<think>\n{request.problem.prompt}\n</think>\n\n\\boxed{{{request.seed(sampling)}}}"
            yield Completion(request=request, text=text, finish_reason="stop", num_prompt_tokens=5, num_tokens=7)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def teacher() -> SpellingTeacher:
    return SpellingTeacher()


@pytest.fixture
def client(teacher: SpellingTeacher) -> Iterator[TestClient]:
    with TestClient(build_app(teacher, model="pico", sampling=DEFAULTS)) as client:
        yield client
    assert teacher.closed


def chat(client: TestClient, **fields: object):
    body = {"model": "pico", "messages": [{"role": "user", "content": "what is 2 + 2"}], **fields}
    return client.post("/v1/chat/completions", json=body)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def events(response) -> list[dict]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


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
    assert teacher.batches[0][1] == Sampling(temperature=0, top_p=0.5, max_tokens=12, seed=8)
    assert teacher.batches[1][1] == DEFAULTS.model_copy(update={"max_tokens": 13})
    assert teacher.batches[2][1] == DEFAULTS.model_copy(update={"max_tokens": 12, "max_thinking_tokens": 5})


def test_completions_take_several_prompts(client: TestClient) -> None:
    body = {"model": "pico", "prompt": ["one", "two"], "n": 2, "stop": ["</think>", "zzz"]}
    answer = client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["<think>\none\n"] * 2 + ["<think>\ntwo\n"] * 2
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


def test_requests_that_wait_together_are_one_batch(client: TestClient, teacher: SpellingTeacher) -> None:
    teacher.hold.clear()
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(chat, client)
        wait_until(lambda: len(teacher.batches) == 1)
        rest = [pool.submit(chat, client) for _ in range(8)]
        wait_until(lambda: client.app.state.batcher.num_waiting() == 8)
        teacher.hold.set()
        answers = [future.result() for future in [first, *rest]]
    assert [answer.status_code for answer in answers] == [200] * 9
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 9
    assert [size for size, _ in teacher.batches] == [1, 8]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "be brief"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "content": "4"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "2"}] * 2}, "messages"),
        ({"continue_final_message": True}, "messages"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"tools": []}, "tools"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
    ],
)
def test_bad_fields_are_named(client: TestClient, teacher: SpellingTeacher, fields: dict, param: str) -> None:
    response = chat(client, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not teacher.batches


BOTH = [{"role": "user", "content": "what is 2 + 2"}, {"role": "assistant", "content": "<think>\nso"}]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs"),
        ({"logprobs": True, "stop": "x"}, "stop: cuts the text, not its tokens"),
        ({"add_generation_prompt": False}, "add_generation_prompt: must be the opposite"),
        (
            {"messages": BOTH, "continue_final_message": True, "thinking_token_budget": 3},
            "thinking_token_budget: cannot be counted",
        ),
    ],
)
def test_fields_that_contradict_each_other(client: TestClient, fields: dict, said: str) -> None:
    response = chat(client, **fields)
    assert (response.status_code, said in response.json()["error"]["message"]) == (400, True), response.text


def test_what_a_plain_teacher_cannot_do_is_refused_and_not_left_out(client: TestClient) -> None:
    """It knows questions alone, and neither its tokens nor their logprobs."""
    for fields, param in [
        ({"messages": BOTH, "continue_final_message": True}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"return_token_ids": True}, "return_token_ids"),
    ]:
        response = chat(client, **fields)
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), fields
    body = {"model": "pico", "prompt": [1, 2, 3]}
    assert client.post("/v1/completions", json=body).json()["error"]["param"] == "prompt"
    text = {"model": "pico", "prompt": "a", "add_special_tokens": False}
    assert client.post("/tokenize", json=text).status_code == 404


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"logprobs": True}, "invalid_request_error"),
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
    monkeypatch.setattr("teacher.serve.stream.KEEP_ALIVE_S", 0.02)
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
    app = build_app(teacher, model="pico", sampling=DEFAULTS, max_waiting=4)
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        teacher.hold.clear()
        running = pool.submit(chat, client)
        wait_until(lambda: len(teacher.batches) == 1)
        assert chat(client, n=5).status_code == 429
        teacher.hold.set()
        assert running.result().status_code == 200
        assert chat(client).status_code == 200
    assert [size for size, _ in teacher.batches] == [1, 1]


def test_closing_fails_what_still_waits(teacher: SpellingTeacher) -> None:
    batcher = Batcher(teacher, max_batch=1)
    teacher.hold.clear()
    problem = Problem(prompt="1 + 1", answer=None, grader="math", source="test")
    requests = [Asked(TraceRequest(problem=problem, sample_index=index)) for index in range(3)]
    futures = batcher.submit(requests[:1], DEFAULTS)
    wait_until(lambda: len(teacher.batches) == 1)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    late = batcher.submit(requests[1:], DEFAULTS)
    teacher.hold.set()
    closing.join(30)
    assert futures[0].result(30).completion.request == requests[0].request
    for future in late:
        outcome = future.exception(30)
        assert outcome is None or isinstance(outcome, EnvironmentFault)
    assert teacher.closed
