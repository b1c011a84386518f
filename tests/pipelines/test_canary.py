"""A canary API key: an endpoint echoes it wherever it can, and it is found nowhere.

The real command line runs with `POTSTILL_DEBUG=1`, so that whole tracebacks are among what is searched.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from pipelines.cli import main
from tests.pipelines.canary import command_lines_with, places_with
from tests.pipelines.tiny_world import potstill, write_yaml
from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint, serving

KEY = "sk-canary-0b5e7f/+42"
ECHO = {"error": {"message": f"no, not with Bearer {KEY}, {KEY!r}", "type": KEY}}


def recipe(folder: Path, url: str, **teacher: Any) -> Path:
    rows = [{"prompt": f"{n} + {n + 1}?", "answer": str(2 * n + 1)} for n in range(12)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    tree = {
        "name": "canary",
        "problems": [{"kind": "local", "path": str(folder / "prompts.jsonl")}],
        "teacher": {"backend": "openai", "base_url": url, "model": "pico", "api_key_env": "CANARY_KEY", **teacher},
        "generate": {"num_samples": 2, "sampling": {"max_tokens": 64}},
        "distill": {"students": ["r1-distill-qwen-1.5b"]},
        "eval": {"suites": ["gsm8k"]},
    }
    return write_yaml(folder / "recipe.yaml", tree)


def run(folder: Path, url: str, **teacher: Any) -> tuple[int, str, str]:
    """The command line in a process of its own."""
    environment = {"CANARY_KEY": KEY, "POTSTILL_DEBUG": "1"}
    done = potstill("generate", recipe(folder, url, **teacher), "--out", folder / "runs", **environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """The same in this process, which has imported everything already."""

    def run(folder: Path, url: str, **teacher: Any) -> tuple[int, str, str]:
        arguments = ["generate", str(recipe(folder, url, **teacher)), "--out", str(folder / "runs")]
        monkeypatch.setattr(sys, "argv", ["potstill", *arguments])
        monkeypatch.setenv("CANARY_KEY", KEY)
        monkeypatch.setenv("POTSTILL_DEBUG", "1")
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def passing(number: int) -> Response | None:
    """Every way of failing that is asked again, with the key in it, and then answers."""
    ways: list[Callable[[], Response]] = [
        lambda: JSONResponse(ECHO, 500, headers={"x-echo": KEY}),
        lambda: JSONResponse(ECHO, 429, headers={"retry-after": KEY}),
        lambda: JSONResponse(ECHO, 200),
        lambda: Response(f"{{torn {KEY}", 200),
        lambda: Response(f"data: {KEY}\n\n", 200, media_type="text/event-stream"),
    ]
    return ways[number - 1]() if number <= len(ways) else None


def test_what_passes_by_itself_leaves_nothing_behind(tmp_path: Path) -> None:
    seen: list[str] = []

    def watched(number: int, payload: dict[str, Any]) -> Response | None:
        seen.extend(command_lines_with(KEY))
        return passing(number)

    with serving(ChatEndpoint(key=KEY)) as endpoint:
        endpoint.fault = watched
        code, stdout, stderr = run(tmp_path, endpoint.url)
    assert code == 0, stderr
    assert len(endpoint.payloads) >= 29, "the key was sent, and accepted"
    assert not seen
    assert places_with(KEY, tmp_path, stdout, stderr) == []
    # The search itself: it finds a line of a trace in compressed Parquet and in SQLite.
    places = places_with("7 + 8 = 15", tmp_path / "runs")
    assert {Path(place).suffix for place in places} >= {".parquet", ".sqlite"}
    assert command_lines_with("pytest")


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (lambda number, payload: JSONResponse(ECHO, 500), 3, "no completion after 2 attempts (HTTP 500)"),
        (lambda number, payload: JSONResponse(ECHO, 200), 3, "broke off with the error"),
        (lambda number, payload: JSONResponse(ECHO, 400), 2, "refused the request (HTTP 400: no, not with Bearer ***"),
        (lambda number, payload: JSONResponse(ECHO, 401), 3, "refused the key in $CANARY_KEY (HTTP 401"),
        (lambda number, payload: JSONResponse(ECHO, 404), 2, "'pico' is not served (HTTP 404"),
        (
            lambda number, payload: JSONResponse(
                {
                    "choices": [{"message": {"content": f"it is {KEY}"}, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 1, "completion_tokens": 1},
                }
            ),
            2,
            "answers with the API key in its text; nothing of it is kept",
        ),
    ],
    ids=["500", "error in 200", "400", "401", "404", "in the answer"],
)
def test_the_key_is_in_no_error(run_here: Any, tmp_path: Path, fault: Any, code: int, says: str) -> None:
    with serving(ChatEndpoint(key=KEY)) as endpoint:
        endpoint.fault = fault
        got, stdout, stderr = run_here(tmp_path, endpoint.url, max_retries=1)
    assert got == code, stderr
    assert says in stderr
    assert "Traceback" in stderr, "it is searched too"
    assert len(endpoint.payloads) >= 12, "the key was sent, and accepted"
    assert places_with(KEY, tmp_path, stdout, stderr) == []
    assert (tmp_path / "runs/canary/generate/ledger.sqlite").exists()


@contextmanager
def garbage_server() -> Iterator[str]:
    """Speaks no HTTP: sends back what it was sent, as its status line."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                got = connection.recv(65536).decode()
                line = next(line for line in got.splitlines() if line.lower().startswith("authorization"))
                connection.sendall(f"{line}\r\nx: {line}\r\n\r\n".encode())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(20)


def test_what_is_no_http_does_not_show_it_either(run_here: Any, tmp_path: Path) -> None:
    with garbage_server() as url:
        code, stdout, stderr = run_here(tmp_path, url)
    assert code == 3
    assert "cannot be reached" in stderr
    assert places_with(KEY, tmp_path, stdout, stderr) == []


def test_a_refused_key_at_the_first_question(run_here: Any, tmp_path: Path) -> None:
    with serving(ChatEndpoint(key="another")) as endpoint:
        code, stdout, stderr = run_here(tmp_path, endpoint.url)
    assert code == 3
    assert "refused the key in $CANARY_KEY (HTTP 401: Incorrect API key provided: Bearer ***)" in stderr
    assert "Traceback" in stderr, "the traceback is searched too"
    assert places_with(KEY, tmp_path, stdout, stderr) == []
