"""OpenAI's own client asks the native engine over HTTP: streams, stop strings, loops, reasoning, settings."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from distill.reasoning import END_OF_THINKING, THINK_LINE
from distill.records import Sampling
from teacher.backends.native.backend import NativeBackend
from teacher.engine.stopping import RepetitionLimit
from teacher.http.app import build_app
from teacher.http.guard import GuardedProtocol
from tests.teacher.backends.native.test_native_backend import open_it
from tests.teacher.http.whole_reasoning import split
from tests.teacher.v3_models import tiny_config, write_model_folder

openai = pytest.importorskip("openai", reason="the openai package comes with vLLM")
LIMIT = 60
QUESTION: Any = [{"role": "user", "content": "1 + 1?"}]
STEP_S = 0.03
ENDLESS: Any = {"seed": 4, "logit_bias": {"2": -100}}  # never the end token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asked") / "tiny"
    path.mkdir()
    write_model_folder(path, tiny_config(), std=0.1)
    return path


@contextmanager
def asking(teacher: Any, **settings: Any) -> Iterator[openai.OpenAI]:
    app = build_app(teacher, model="tiny", sampling=Sampling(temperature=0, max_tokens=LIMIT), **settings)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", http=GuardedProtocol, ws="none")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0) as client:
        yield client
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def native(folder: Path) -> NativeBackend:
    backend: NativeBackend = open_it(folder)
    backend.max_workers = 1  # so that the engine can be looked at
    return backend


@pytest.fixture(scope="module")
def client(native: NativeBackend) -> Iterator[openai.OpenAI]:
    with asking(native) as client:
        yield client


def chat(client: openai.OpenAI, *, seed: int = 1, temperature: float = 1.0, **fields: Any) -> Any:
    """A choice; sampled, since a greedy tiny model says little."""
    extra = {name: fields.pop(name) for name in tuple(fields) if name in EXTRA}
    settings = {"model": "tiny", "messages": QUESTION, "seed": seed, "temperature": temperature}
    return client.chat.completions.create(**settings, **fields, extra_body=extra)


EXTRA = ("top_k", "min_p", "repetition_detection", "include_reasoning", "thinking_token_budget", "return_token_ids")


def computed(native: NativeBackend) -> int:
    return native.engine.num_computed_tokens


def test_the_first_token_comes_long_before_the_last(
    client: openai.OpenAI, native: NativeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = native.engine.step

    def slowly() -> Any:
        time.sleep(STEP_S)
        return step()

    monkeypatch.setattr(native.engine, "step", slowly)
    whole = chat(client, **ENDLESS)
    begun, arrived, pieces = time.monotonic(), [], []
    for chunk in chat(client, **ENDLESS, stream=True):
        arrived.append(time.monotonic() - begun)
        pieces.append(chunk.choices[0].delta.content or "")
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.usage.completion_tokens == LIMIT
    assert len(pieces) > LIMIT / 2, "a piece for nearly every token"
    assert arrived[0] < arrived[-1] / 3, (arrived[0], arrived[-1])


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_streams_say_what_whole_answers_say(folder: Path, workers: int) -> None:
    """Text, reasons, usage, logprobs and token ids, of several samples side by side, here and in worker processes."""
    backend: NativeBackend = open_it(folder)
    backend.max_workers = workers
    asked = {"n": 3, "seed": 7, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    with asking(backend) as client:
        whole = chat(client, **asked)
        chunks = list(chat(client, **asked, stream=True, stream_options={"include_usage": True}))
        body: dict[str, Any] = {"model": "tiny", "prompt": ["1?", "2?"], "logprobs": 2, "seed": 3, "temperature": 1}
        text_whole = client.completions.create(**body)
        text_chunks = list(client.completions.create(**body, stream=True))
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 12
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert mine[0].prompt_token_ids == choice.prompt_token_ids
        assert [token for c in mine for token in getattr(c, "token_ids", None) or []] == choice.token_ids
        entries = [entry for c in mine if c.logprobs for entry in c.logprobs.content]
        assert [entry.token for entry in entries] == [entry.token for entry in choice.logprobs.content]
        for entry, wanted in zip(entries, choice.logprobs.content, strict=True):
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-3)
            assert len(entry.top_logprobs) == 2
    for choice in text_whole.choices:
        mine = [c for chunk in text_chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        offsets = [offset for c in mine if c.logprobs for offset in c.logprobs.text_offset]
        assert offsets == choice.logprobs.text_offset


def test_a_stop_string_ends_the_work_and_the_bill(client: openai.OpenAI, native: NativeBackend) -> None:
    whole = chat(client, **ENDLESS)
    text = whole.choices[0].message.content
    written = text.removeprefix(THINK_LINE)
    stop = written[9:12]  # three tokens of this tokenizer, which has one a character
    place = written.index(stop)
    before = computed(native)
    stopped = chat(client, **ENDLESS, stop=[stop, "never said"])
    assert stopped.choices[0].message.content == THINK_LINE + written[:place]
    assert (stopped.choices[0].finish_reason, stopped.choices[0].stop_reason) == ("stop", stop)
    assert stopped.usage.completion_tokens == place + 3 < whole.usage.completion_tokens
    # The prompt's last token is computed again, and each written token but the last.
    assert computed(native) - before <= place + 3 + whole.usage.prompt_tokens
    sent = "".join(chunk.choices[0].delta.content or "" for chunk in chat(client, **ENDLESS, stop=stop, stream=True))
    assert sent == THINK_LINE + written[:place]
    text_stop = client.completions.create(model="tiny", prompt="1 + 1?", temperature=1, stop=stop, **ENDLESS)
    assert stop not in text_stop.choices[0].text


def test_loops_end_where_they_are_seen(folder: Path) -> None:
    """A bias makes the model say one token for ever."""
    loop: dict[str, Any] = {"logit_bias": {"20": 100}, "temperature": 0.0}
    limit = RepetitionLimit(max_pattern_size=8, min_pattern_size=1, min_count=4, min_tokens=12)
    backend: NativeBackend = open_it(folder)
    backend.max_workers = 1
    with asking(backend, repetition=limit) as client:
        by_default = chat(client, **loop)
        said = chat(client, **loop, repetition_detection={"max_pattern_size": 3, "min_count": 5})
        off = chat(client, **loop, repetition_detection={})
        honest = chat(client, seed=4)
    assert [answer.usage.completion_tokens for answer in (by_default, said, off)] == [12, 5, LIMIT]
    for answer in (by_default, said):
        assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("length", "repetition_detected")
    assert off.choices[0].stop_reason is honest.choices[0].stop_reason is None


def test_top_k_min_p_and_bias_decide_what_is_drawn(client: openai.OpenAI) -> None:
    greedy = chat(client, temperature=0.0).choices[0].message.content
    assert chat(client, temperature=5.0, top_k=1).choices[0].message.content == greedy
    assert chat(client, temperature=1.0, min_p=1.0).choices[0].message.content == greedy
    assert chat(client, temperature=5.0, top_k=-1).choices[0].message.content != greedy
    banned = {str(token): -100 for token in range(101) if token != 30}
    only = client.completions.create(model="tiny", prompt="1?", max_tokens=4, temperature=1, logit_bias=banned)
    (letter,) = set(only.choices[0].text)
    assert len(only.choices[0].text) == 4
    assert letter == chr(30 - 5 + 32)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"logit_bias": {"3": 101}}, "logit_bias.3"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1000": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 0 for token in range(2_000)}}, "logit_bias"),
        ({"repetition_detection": {"max_pattern_size": 4}}, "repetition_detection"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_bad_settings_are_refused_at_once(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    begun = time.process_time()
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **fields)
    assert refused.value.type == "invalid_request_error"
    assert str(refused.value.param).startswith(param)
    assert time.process_time() - begun < 1, "0.1 s of this process, in which the server runs as well"


def test_reasoning_is_told_apart_when_asked_for(client: openai.OpenAI, native: NativeBackend) -> None:
    budget = {"thinking_token_budget": 9, "max_completion_tokens": 40}
    plain = chat(client, **budget).choices[0].message
    assert END_OF_THINKING in plain.content
    assert not hasattr(plain, "reasoning_content")
    reasoning, answer = split(plain.content)
    assert len(reasoning) <= 9 + 1
    apart = chat(client, **budget, include_reasoning=True).choices[0].message
    assert (apart.reasoning_content, apart.content) == (reasoning, answer)
    out = chat(client, **budget, include_reasoning=False).choices[0].message
    assert out.content == answer
    assert not hasattr(out, "reasoning_content")
    cut = chat(client, max_completion_tokens=8, include_reasoning=True).choices[0]
    assert (cut.message.content, cut.finish_reason) == (None, "length")
    assert len(cut.message.reasoning_content) == 8
    deltas = [chunk.choices[0].delta for chunk in chat(client, **budget, include_reasoning=True, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == reasoning
    assert "".join(delta.content or "" for delta in deltas) == answer


def test_a_server_can_tell_reasoning_apart_by_default(folder: Path) -> None:
    with asking(open_it(folder), reasoning="apart") as client:
        whole = chat(client, seed=4).choices[0].message
        kept = "".join(
            getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
            for chunk in chat(client, seed=4, stream=True)
        )
    assert whole.reasoning_content == kept != ""


def test_who_leaves_a_stream_is_not_worked_for(
    client: openai.OpenAI, native: NativeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = native.engine.step

    def slowly() -> Any:
        time.sleep(STEP_S)
        return step()

    monkeypatch.setattr(native.engine, "step", slowly)
    stream = chat(client, **ENDLESS, stream=True)
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 20
    while not native.engine.is_idle:
        assert time.monotonic() < until
        time.sleep(0.01)
    after = computed(native)
    time.sleep(4 * STEP_S)
    assert computed(native) == after
