"""A teacher that spells out what it was asked, and how its server is asked and read in tests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from starlette.testclient import TestClient

from distill.errors import DataError, EnvironmentFault, PotstillError
from distill.reasoning import THINK_LINE
from distill.records import Completion, Sampling
from teacher.engine.stopping import cut
from teacher.live import Conversation, GeneratedSample, GenerationRequest, PlainText, StreamHandle

DEFAULTS = Sampling(temperature=0.6, top_p=0.95, max_tokens=100, seed=3)


class SpellingTeacher:
    """A `LiveTeacher` that says what it was asked, with which seed, in seven tokens, once `hold` is set."""

    def __init__(self) -> None:
        self.submitted: list[tuple[GenerationRequest, Sampling]] = []
        self.num_finished = 0
        self.hold = threading.Event()
        self.hold.set()
        self.closed = False
        self.fault = None
        self.max_characters: int | None = None
        self._vocabulary: list[str] = []
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(64)

    def submit(
        self,
        wanted: GenerationRequest,
        sampling: Sampling,
        on_done: Callable[[GeneratedSample | PotstillError], None],
        on_tokens: Callable[[list[int], list], None] | None = None,
    ) -> StreamHandle:
        self.submitted.append((wanted, sampling))
        if wanted.request.problem.prompt == "too long":
            raise DataError("the prompt is too long", field="prompt")
        cancelled = threading.Event()
        self._pool.submit(self._write, wanted, sampling, cancelled, on_done, on_tokens)
        return StreamHandle(cancelled.set, [1] * 5, _opening(wanted))

    def _write(self, wanted, sampling, cancelled, on_done, on_tokens) -> None:
        assert self.hold.wait(30)
        request = wanted.request
        if cancelled.is_set():
            on_done(EnvironmentFault("the request was withdrawn"))
        elif request.problem.prompt == "out of memory":
            on_done(EnvironmentFault("no memory is left"))
        else:
            written = f"{_asked(wanted)}\n</think>\n\n\\boxed{{{request.seed(sampling)}}}"
            text, stopped = cut(written, wanted.options.stop)
            tokens = self._tokens(text)
            if on_tokens is not None:
                for token in tokens[:-1]:
                    on_tokens([token], [])
            counts = {"num_prompt_tokens": 5, "num_tokens": 7}
            opening = _opening(wanted)
            completion = Completion(request=request, text=opening + text, finish_reason="stop", **counts)
            with self._lock:
                self.num_finished += 1
            on_done(GeneratedSample(completion, [1] * 5, tokens, opening, stopped))

    def _tokens(self, text: str) -> list[int]:
        """Seven new words of the vocabulary that make up the text."""
        ends = [len(text) * part // 7 for part in range(8)]
        with self._lock:
            first = len(self._vocabulary)
            self._vocabulary += [text[start:end] for start, end in pairwise(ends)]
        return list(range(first, first + 7))

    def spell(self, *token_ids: int) -> str:
        return "".join(self._vocabulary[token] for token in token_ids)

    def gauges(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._pool.shutdown()
        self.closed = True


def _asked(wanted: GenerationRequest) -> str:
    if isinstance(wanted.prompt, PlainText):
        return wanted.prompt.text
    if isinstance(wanted.prompt, Conversation):
        return wanted.prompt.messages[-1]["content"]
    return wanted.request.problem.prompt


def _opening(wanted: GenerationRequest) -> str:
    return "" if isinstance(wanted.prompt, PlainText) else THINK_LINE


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def events(response) -> list[dict]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def chat(client: TestClient, **fields: object):
    body = {"model": "pico", "messages": [{"role": "user", "content": "what is 2 + 2"}], **fields}
    return client.post("/v1/chat/completions", json=body)
