"""Who is answered without a key: programs of this machine, and no page that a browser has open."""

from __future__ import annotations

import json

import httpx
import pytest

from teacher.http.app import build_app
from tests.teacher.http.listening import Address, asked, is_openai_error, listening, posted
from tests.teacher.http.spelling_teacher import DEFAULTS, SpellingTeacher

KEY = "sk-canary-0916"
QUESTION = json.dumps({"model": "pico", "messages": [{"role": "user", "content": "what is 2 + 2"}]}).encode()
ROUTES = ("/health", "/version", "/metrics", "/v1/models", "/v1/nothing")


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LocalHost:1", "127.0.0.1", "127.0.0.1:65535", "[::1]", "[::1]:8000"]
)
def test_names_of_the_loopback_are_answered(address: Address, host: str) -> None:
    assert posted(address, QUESTION, host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "rebound.example",
        "rebound.example:8000",
        "localhost.rebound.example",
        "127.0.0.1.rebound.example",
        "rebound.example#localhost",
        "user@localhost",
        "localhost:",
        "localhost:8000, x",
        "::1",
        "0.0.0.0",
        "2130706433",
        "",
    ],
)
def test_a_name_that_somebody_points_here_is_not(address: Address, teacher: SpellingTeacher, host: str) -> None:
    status, body = posted(address, QUESTION, host=host)
    assert (status, is_openai_error(body)) == (421, True)
    assert "POTSTILL_API_KEY" in body["error"]["message"]
    for route in ROUTES:
        head = f"GET {route} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
        assert asked(address, head.encode())[0] == 421
    assert not teacher.submitted


def test_two_hosts_or_none_are_no_name(address: Address) -> None:
    for hosts in ("", "host: localhost\r\nhost: rebound.example\r\n", "host: localhost\r\nhost: localhost\r\n"):
        assert asked(address, f"GET /health HTTP/1.1\r\n{hosts}connection: close\r\n\r\n".encode())[0] in (400, 421)
    assert asked(address, b"GET /health HTTP/1.0\r\n\r\n")[0] == 421


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "text/plain; application/json",
    ],
)
def test_what_a_form_could_send_is_no_question(address: Address, teacher: SpellingTeacher, kind: str) -> None:
    status, body = posted(address, QUESTION, f"content-type: {kind}")
    assert (status, is_openai_error(body)) == (415, True)
    assert "-H 'content-type: application/json'" in body["error"]["message"]
    assert not teacher.submitted


def test_json_may_name_its_only_encoding(address: Address) -> None:
    for kind in (
        "application/json; charset=utf-8",
        "Application/JSON;charset=UTF-8",
        'application/json; charset="utf-8"',
    ):
        assert posted(address, QUESTION, f"content-type: {kind}")[0] == 200


@pytest.mark.parametrize("origin", ["https://rebound.example", "null", "http://localhost.rebound.example", "file://"])
def test_a_page_of_another_site_is_refused(address: Address, teacher: SpellingTeacher, origin: str) -> None:
    status, body = posted(address, QUESTION, f"origin: {origin}")
    assert (status, is_openai_error(body)) == (403, True)
    assert not teacher.submitted


def test_a_page_of_this_machine_is_not(address: Address) -> None:
    assert posted(address, QUESTION, "origin: http://localhost:3000")[0] == 200


@pytest.mark.parametrize("origin", ["https://rebound.example", "http://localhost:3000"])
@pytest.mark.parametrize("key", ["", KEY])
def test_nobody_is_given_permission_beforehand(teacher: SpellingTeacher, origin: str, key: str) -> None:
    """The question that a browser asks before it sends JSON to another origin."""
    asks = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization",
        "access-control-request-private-network": "true",
    }
    with listening(build_app(teacher, model="pico", sampling=DEFAULTS, api_key=key)) as (host, port):
        answer = httpx.options(f"http://{host}:{port}/v1/chat/completions", headers=asks)
    assert answer.status_code in (401, 403, 405)
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_with_a_key_the_key_alone_decides(teacher: SpellingTeacher) -> None:
    with listening(build_app(teacher, model="pico", sampling=DEFAULTS, api_key=KEY)) as address:
        head = ("origin: https://somewhere.example", "content-type: text/plain")
        assert posted(address, QUESTION, *head, host="somewhere.example")[0] == 401
        assert posted(address, QUESTION, *head, f"authorization: Bearer {KEY}", host="somewhere.example")[0] == 200
        assert asked(address, b"GET /health HTTP/1.1\r\nhost: a.b\r\nconnection: close\r\n\r\n")[0] == 200
    assert len(teacher.submitted) == 1
