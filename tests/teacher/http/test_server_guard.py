"""The server against clients that send too slowly, too much, nonsense or no key, over real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest
from starlette.testclient import TestClient

from distill.errors import EnvironmentFault
from teacher.admission.bodies import MAX_BODY_BYTES
from teacher.http import guard
from teacher.http.app import build_app
from tests.teacher.http.listening import is_openai_error, said
from tests.teacher.http.spelling_teacher import DEFAULTS, SpellingTeacher, chat, wait_until

KEY = "sk-canary-0916"
LOCAL = "host: localhost\r\ncontent-type: application/json\r\n"
QUESTION = {"model": "pico", "messages": [{"role": "user", "content": "what is 2 + 2"}]}


def test_a_head_that_does_not_come_ends_its_connection_alone(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "HEAD_S", 0.5)
    silent, slow = (socket.create_connection(address, timeout=20) for _ in range(2))
    begun = time.monotonic()
    with httpx.Client(base_url=f"http://{address[0]}:{address[1]}") as honest:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
        while time.monotonic() - begun < 0.4:
            slow.sendall(b"a")
            assert honest.post("/v1/chat/completions", json=QUESTION).status_code == 200
            time.sleep(0.05)
        for connection in (silent, slow):
            status, body = said(connection)
            assert (status, is_openai_error(body)) == (408, True)
            connection.close()
        assert time.monotonic() - begun < 5
        assert honest.get("/health").status_code == 200, "a connection that is not slow is kept"


def test_a_second_request_has_its_own_time(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HEAD_S", 0.5)
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(4_096).startswith(b"HTTP/1.1 200")
        time.sleep(0.7)  # idle: that is not slow
        connection.sendall(b"GET /hea")
        status, body = said(connection)
        assert (status, is_openai_error(body)) == (408, True)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /health HTTP/1.1\r\n" + b"x: " + b"y" * (guard.MAX_HEAD_BYTES + 1), 431),
        (b"\x16\x03\x01 what is this\r\n\r\n", 400),
    ],
)
def test_heads_that_are_none(address: tuple[str, int], sent: bytes, status: int) -> None:
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(sent)
        got, body = said(connection)
    assert (got, is_openai_error(body)) == (status, True)


def test_a_body_that_does_not_come_is_given_up(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher.admission.bodies.BODY_S", 0.5)
    with socket.create_connection(address, timeout=20) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{LOCAL}connection: close\r\ncontent-length: 100\r\n\r\n"
        connection.sendall(head.encode() + b"{")
        status, body = said(connection)
    assert (status, is_openai_error(body)) == (408, True)


def test_an_answer_that_nobody_reads_is_given_up(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher.http.stream.UNREAD_S", 0.5)
    question = {"model": "pico", "messages": [{"role": "user", "content": "x" * 500_000}], "n": 64, "stream": True}
    body = json.dumps(question).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        connection.settimeout(20)
        connection.connect(address)
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{LOCAL}content-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        time.sleep(2)
        read = 0
        while piece := connection.recv(1 << 20):
            read += len(piece)
    assert 0 < read < 64 * 500_000, "the connection was closed before all of it was read"
    assert httpx.get(f"http://{address[0]}:{address[1]}/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_worked_for(
    address: tuple[str, int], teacher: SpellingTeacher, stream: bool
) -> None:
    """Its samples wait behind another's; gone before their turn, they are never generated."""
    url = f"http://{address[0]}:{address[1]}/v1/chat/completions"
    teacher.hold.clear()
    running = threading.Thread(target=httpx.post, args=(url,), kwargs={"json": QUESTION, "timeout": 60})
    running.start()
    wait_until(lambda: len(teacher.submitted) == 1)
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream("POST", url, json={**QUESTION, "stream": stream, "n": 3}, timeout=0.3) as left,
    ):
        list(left.iter_raw())
    time.sleep(0.3)
    teacher.hold.set()
    running.join(30)
    assert httpx.post(url, json=QUESTION).status_code == 200
    assert (len(teacher.submitted), teacher.num_finished) == (5, 2)


def test_bodies_that_are_refused(teacher: SpellingTeacher) -> None:
    deep = b"[" * 100_000
    question = json.dumps(QUESTION)[:-1]
    cases = [
        (b'{"messages": ' + deep, 400, "nested"),
        (f'{question}, "temperature": NaN}}'.encode(), 400, "NaN"),
        (f'{question}, "temperature": Infinity}}'.encode(), 400, "Infinity"),
        (f'{question}, "temperature": 1e999}}'.encode(), 400, "too large"),
        (f'{question}, "n": 1000000000}}'.encode(), 400, "'n'"),
        (f'{question}, "seed": {"9" * 5_000}}}'.encode(), 400, "64 bits"),
        (b" " * (MAX_BODY_BYTES + 1), 413, "over"),
    ]
    with TestClient(build_app(teacher, model="pico", sampling=DEFAULTS), raise_server_exceptions=False) as client:
        for body, status, word in cases:
            answer = client.post("/v1/chat/completions", content=body)
            assert answer.status_code == status, (body[:60], answer.text)
            assert is_openai_error(answer.json())
            assert word in answer.json()["error"]["message"]
        prompts = {"model": "pico", "prompt": ["a"] * 1_000, "n": 128}
        answer = client.post("/v1/completions", json=prompts)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    assert not teacher.submitted


def test_a_key_is_asked_for_everywhere_but_for_health(teacher: SpellingTeacher) -> None:
    with TestClient(build_app(teacher, model="pico", sampling=DEFAULTS, api_key=KEY)) as client:
        assert client.get("/health").status_code == 200
        for route in ("/version", "/metrics", "/v1/models", "/v1/nothing"):
            for headers in ({}, {"authorization": "Bearer x"}, {"authorization": KEY}):
                refused = client.get(route, headers=headers)
                assert (refused.status_code, is_openai_error(refused.json())) == (401, True)
                assert KEY not in refused.text
        assert chat(client).status_code == 401
        client.headers["authorization"] = f"Bearer {KEY}"
        assert chat(client).status_code == 200
        assert client.get("/v1/nothing").status_code == 404
    assert len(teacher.submitted) == 1


def test_a_full_queue_says_when_to_come_back(teacher: SpellingTeacher) -> None:
    teacher.hold.clear()
    with TestClient(build_app(teacher, model="pico", sampling=DEFAULTS, max_batch=1, max_waiting=1)) as client:
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(chat(client))) for _ in range(6)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answers) >= 3)
        teacher.hold.set()
        for thread in threads:
            thread.join(30)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) >= 3
    assert all(answer.headers["retry-after"] == "1" for answer in refused)
    assert all(answer.json()["error"]["type"] == "rate_limit_error" for answer in refused)
    assert {answer.status_code for answer in answers} == {200, 429}


def test_health_says_when_the_engine_is_lost(address: tuple[str, int], teacher: SpellingTeacher) -> None:
    url = f"http://{address[0]}:{address[1]}/health"
    assert httpx.get(url).status_code == 200
    teacher.fault = EnvironmentFault("a worker has ended")
    assert httpx.get(url).status_code == 503


def test_metrics_count_what_was_answered(teacher: SpellingTeacher) -> None:
    with TestClient(build_app(teacher, model="pico", sampling=DEFAULTS)) as client:
        chat(client, n=3)
        chat(client, stream=True)
        chat(client, n=0)
        client.get("/v1/a-series-of-their-own")
        text = client.get("/metrics").text
    for line in (
        'potstill_requests_total{route="/v1/chat/completions",status="200"} 2.0',
        'potstill_requests_total{route="/v1/chat/completions",status="400"} 1.0',
        'potstill_requests_total{route="other",status="404"} 1.0',
        'potstill_tokens_total{kind="completion"} 28.0',
        "potstill_unfinished_samples 0.0",
    ):
        assert line in text.splitlines()
    assert "a-series" not in text
