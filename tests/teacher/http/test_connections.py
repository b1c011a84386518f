"""Connections to their end: whoever is refused reads why, whatever is left unsent; nobody takes a place for ever."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import time

import httpx
import pytest

from teacher.admission.bodies import MAX_BODY_BYTES
from teacher.http import guard
from teacher.http.app import build_app
from tests.teacher.http.listening import Address, asked, is_openai_error, listening, posted, said
from tests.teacher.http.spelling_teacher import DEFAULTS, SpellingTeacher, wait_until

POST = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
QUESTION = json.dumps({"model": "pico", "messages": [{"role": "user", "content": "what is 2 + 2"}]}).encode()
FIVE_MB = 5 * 10**6


def in_chunks(body: bytes, size: int) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
@pytest.mark.parametrize(
    ("header", "body"),
    [
        (f"content-length: {FIVE_MB}", b"x" * FIVE_MB),
        ("transfer-encoding: chunked", in_chunks(b"x" * FIVE_MB, 60_000)),
        (f"content-length: {FIVE_MB}\r\nexpect: 100-continue", b"x" * FIVE_MB),
    ],
    ids=["length", "chunked", "expect"],
)
def test_a_body_that_is_too_large_is_told_so(address: Address, header: str, body: bytes, connection: str) -> None:
    """By a client that sends all of it before it looks for an answer, as most do."""
    status, answer = asked(address, f"{POST}connection: {connection}\r\n{header}\r\n\r\n".encode() + body)
    assert (status, is_openai_error(answer)) == (413, True)
    assert str(MAX_BODY_BYTES) in answer["error"]["message"]


def test_who_asks_before_sending_is_answered_at_once(address: Address) -> None:
    head = f"{POST}content-length: {{}}\r\nexpect: 100-continue\r\n\r\n"
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(head.format(FIVE_MB).encode())
        assert said(connection)[0] == 413
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(head.format(len(QUESTION)).encode())
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(QUESTION)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_clients_of_the_usual_kind_read_every_refusal(address: Address) -> None:
    url = f"http://{address[0]}:{address[1]}"
    with httpx.Client(base_url=url) as client:
        for _ in range(2):
            for route, headers, status in (
                ("/v1/chat/completions", {}, 413),
                ("/v1/nothing", {}, 404),
                ("/health", {}, 405),
                ("/v1/chat/completions", {"host": "rebound.example"}, 421),
                ("/v1/chat/completions", {"content-type": "text/plain"}, 415),
            ):
                headers = {"content-type": "application/json", **headers}
                answer = client.post(route, content=b"x" * FIVE_MB, headers=headers)
                assert (answer.status_code, is_openai_error(answer.json())) == (status, True)
        assert client.get("/health").status_code == 200


def test_who_sends_on_and_on_after_a_refusal_is_cut_off(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_LINGER_BYTES", 2**20)
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(f"{POST}content-length: {10**12}\r\n\r\n".encode())
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            send_for_ever(connection, b"x" * 2**20, every_s=0)


def test_who_stays_after_a_refusal_is_cut_off(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LINGER_S", 0.3)
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(f"{POST}content-length: {10**12}\r\n\r\n".encode())
        assert said(connection)[0] == 413
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            send_for_ever(connection, b"x", every_s=0.05)


def send_for_ever(connection: socket.socket, piece: bytes, *, every_s: float) -> None:
    while True:
        connection.sendall(piece)
        time.sleep(every_s)


@pytest.mark.parametrize("size", [1, 7, 4_096])
def test_a_body_in_any_chunks_is_the_same_body(address: Address, size: int) -> None:
    head = f"{POST}transfer-encoding: chunked\r\nconnection: close\r\n\r\n".encode()
    status, _ = asked(address, head + in_chunks(QUESTION, size))
    assert status == 200


def test_a_large_body_of_single_bytes_is_read(address: Address) -> None:
    body = QUESTION + b" " * 200_000
    head = f"{POST}transfer-encoding: chunked\r\nconnection: close\r\n\r\n".encode()
    assert asked(address, head + in_chunks(body, 1))[0] == 200


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        (("content-encoding: gzip",), gzip.compress(QUESTION, mtime=0), 415),
        (("content-encoding: identity",), QUESTION, 200),
        (("content-length: 3",), QUESTION, 400),
        (("transfer-encoding: chunked",), QUESTION, 400),
        ((), QUESTION + b"}", 400),
        ((), b"\xef\xbb\xbf" + QUESTION, 200),
        ((), QUESTION.decode().encode("utf-16"), 400),
        ((), QUESTION.replace(b"what", b"wh\xc3t"), 400),
        ((), QUESTION.replace(b"what", rb"wh\ud800t"), 400),
        ((), QUESTION.replace(b"what", rb"wh\u0000t"), 200),
        ((), QUESTION.replace(b"pico", rb"p\udc00co"), 400),
        ((), b"[]", 400),
        ((), b'"text"', 400),
        ((), b"null", 400),
        ((), b"1", 400),
        ((), b"", 400),
    ],
)
def test_bodies_and_lengths(address: Address, headers: tuple[str, ...], body: bytes, status: int) -> None:
    got, answer = posted(address, body, *headers)
    assert (got, got == 200 or is_openai_error(answer)) == (status, True), answer


def head_of(size: int) -> bytes:
    head = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: "
    return head + b"y" * (size - len(head) - 4) + b"\r\n\r\n"


def test_the_limit_of_a_head_holds_however_it_comes(address: Address) -> None:
    assert asked(address, head_of(guard.MAX_HEAD_BYTES - 100))[0] == 200
    for size in (guard.MAX_HEAD_BYTES + 100, 120_000, 250_000):
        status, body = asked(address, head_of(size))
        assert (status, is_openai_error(body)) == (431, True)
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(4_096).startswith(b"HTTP/1.1 200")
        connection.sendall(head_of(120_000))
        assert said(connection)[0] == 431


def test_requests_sent_ahead_are_answered_in_turn(address: Address) -> None:
    """Behind a body of which much came with it, which is no part of the next head."""
    body = QUESTION + b" " * (2 * guard.MAX_HEAD_BYTES)
    first = f"{POST}content-length: {len(body)}\r\n\r\n".encode() + body
    last = head_of(guard.MAX_HEAD_BYTES - 100)
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(first + first + last[:50])
        time.sleep(0.1)
        connection.sendall(last[50:])
        text = b""
        while piece := connection.recv(65_536):
            text += piece
    assert text.count(b"HTTP/1.1 200 OK") == 3


def test_what_follows_a_request_and_is_none_ends_the_connection_behind_the_answer(address: Address) -> None:
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(4_096).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\x00\x01\x02\r\n\r\n")
        assert said(connection)[0] == 400


def test_nonsense_behind_a_question_that_is_worked_on_ends_it(address: Address, teacher: SpellingTeacher) -> None:
    teacher.hold.clear()
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(f"{POST}content-length: {len(QUESTION)}\r\n\r\n".encode() + QUESTION)
        wait_until(lambda: len(teacher.submitted) == 1)
        connection.sendall(b"\x00\x01\x02\r\n\r\n")
        assert said(connection)[0] == 400
    time.sleep(0.3)
    teacher.hold.set()
    assert posted(address, QUESTION)[0] == 200
    assert teacher.num_finished == 1


def test_an_offer_of_another_protocol_is_passed_over(address: Address) -> None:
    """As curl --http2 makes it."""
    offer = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
    with socket.create_connection(address, timeout=20) as connection:
        for _ in range(2):
            connection.sendall(f"GET /health HTTP/1.1\r\nhost: localhost\r\n{offer}\r\n".encode())
            assert connection.recv(4_096).startswith(b"HTTP/1.1 200")


def test_who_ends_the_half_that_asks_has_left(address: Address, teacher: SpellingTeacher) -> None:
    teacher.hold.clear()
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(f"{POST}content-length: {len(QUESTION)}\r\n\r\n".encode() + QUESTION)
        wait_until(lambda: len(teacher.submitted) == 1)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    time.sleep(0.3)
    teacher.hold.set()
    assert posted(address, QUESTION)[0] == 200
    assert teacher.num_finished == 1


def test_connections_beyond_the_limit_are_told_and_places_come_free(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_CONNECTIONS", 20)
    idle = [socket.create_connection(address, timeout=20) for _ in range(20)]
    health = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    for _ in range(3):
        with socket.create_connection(address, timeout=20) as late:
            late.sendall(health)
            status, body = said(late)
            assert (status, body["error"]["type"]) == (503, "server_error")
    for connection in idle[:10]:
        connection.close()
    for connection in idle[10:15]:  # as a machine that is switched off: a reset
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    time.sleep(0.2)
    assert [asked(address, health)[0] for _ in range(3)] == [200] * 3
    for connection in idle[15:]:
        connection.close()


def test_what_has_not_come_whole_is_not_waited_for_at_the_end(teacher: SpellingTeacher) -> None:
    with listening(build_app(teacher, model="pico", sampling=DEFAULTS)) as address:
        slow = [socket.create_connection(address, timeout=20) for _ in range(4)]
        slow[1].sendall(b"GET /hea")
        slow[2].sendall(f"{POST}content-length: 100\r\n\r\n{{".encode())
        slow[3].sendall(f"{POST}content-length: {10**9}\r\n\r\n".encode())
        assert slow[3].recv(100).startswith(b"HTTP/1.1 413")
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    status, body = said(slow[2])
    assert (status, is_openai_error(body)) == (503, True)
    for connection in slow:
        connection.close()
