"""potstill's own server asked by its own client: what comes is what the engine writes when it is asked directly."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from distill.logprobs import TokenLogprobs
from distill.reasoning import THINK_LINE
from distill.recipe import OpenAITeacher
from distill.records import Completion, Problem, Sampling, TraceRequest
from teacher.backends.native.backend import FORCED_END
from teacher.backends.openai import OpenAICompatibleTeacher
from teacher.http.app import build_app
from tests.teacher.backends.native.test_native_backend import open_it
from tests.teacher.v3_models import tiny_config, write_model_folder

# Greedy, so that both sides draw alike: a client's seed is one more step away from the engine's.
SAMPLING = Sampling(temperature=0.0, max_tokens=40, seed=3)
BUDGET = 9
NUM_FORCED = 4  # FORCED_END in this tokenizer
# FP32; the endpoint's second request reads in one prefill what the engine wrote step by step.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny"
    path.mkdir()
    write_model_folder(path, tiny_config(), std=0.1)
    return path


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    app = build_app(open_it(folder), model="tiny", sampling=Sampling(max_tokens=40))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def requests() -> list[TraceRequest]:
    problems = [Problem(prompt=f"{n} + {3 * n}?", answer=None, grader="math", source="t") for n in range(6)]
    return [TraceRequest(problem=problem, sample_index=0) for problem in problems]


def through_the_server(url: str, sampling: Sampling, **settings: Any) -> dict[str, Completion]:
    config = OpenAITeacher.model_validate({"base_url": url, "model": "tiny", **settings})
    done = OpenAICompatibleTeacher(config, backoff_s=0.01).generate(requests(), sampling)
    return {completion.request.problem.id: completion for completion in done}


def directly(folder: Path, sampling: Sampling) -> dict[str, Completion]:
    return {completion.request.problem.id: completion for completion in open_it(folder).generate(requests(), sampling)}


def kept(completion: Completion) -> TokenLogprobs:
    assert completion.logprobs is not None
    return TokenLogprobs.unpacked(completion.logprobs)


@pytest.mark.parametrize("stream", [True, False])
def test_logprobs_are_the_engine_s_own(folder: Path, url: str, stream: bool) -> None:
    sampling = SAMPLING.model_copy(update={"top_logprobs": 4})
    wanted = directly(folder, sampling)
    by_id = through_the_server(url, sampling, stream=stream, extra_body={"return_tokens_as_token_ids": True})
    by_text = through_the_server(url, sampling, stream=stream)
    tokenizer = open_it(folder).tokenizer
    for problem, completion in wanted.items():
        own, served, spelled = kept(completion), kept(by_id[problem]), kept(by_text[problem])
        assert by_id[problem].text == by_text[problem].text == completion.text
        assert (served.unit, spelled.unit) == ("id", "text")
        assert [token for token, _ in served.sampled] == [token for token, _ in own.sampled]
        assert [token for token, _ in spelled.sampled] == [tokenizer.decode([token]) for token, _ in own.sampled]
        for mine, theirs in zip([own.sampled, *own.top], [served.sampled, *served.top], strict=True):
            assert [value for _, value in theirs] == pytest.approx([value for _, value in mine], abs=TOLERANCE)
        assert {len(top) for top in served.top} == {4}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("forcing", ["completions", "chat", "server"])
def test_every_way_of_budget_forcing_says_what_the_engine_says(
    folder: Path, url: str, forcing: str, stream: bool
) -> None:
    sampling = SAMPLING.model_copy(update={"max_thinking_tokens": BUDGET, "top_logprobs": 2})
    wanted = directly(folder, sampling)
    ids = {"return_tokens_as_token_ids": True}
    found = through_the_server(url, sampling, stream=stream, budget_forcing=forcing, extra_body=ids)
    num_forced = 0
    for problem, completion in wanted.items():
        thought, forced, _ = completion.text.partition(FORCED_END)
        num_forced += len(thought) == len(THINK_LINE) + BUDGET and bool(forced)
        # Who forces by `chat` cannot count what it forces beforehand: so many tokens may follow beyond the limit.
        beyond = found[problem].num_tokens - completion.num_tokens
        assert found[problem].text[: len(completion.text)] == completion.text
        assert len(found[problem].text) - len(completion.text) == beyond <= (NUM_FORCED if forcing == "chat" else 0)
        assert found[problem].num_prompt_tokens == completion.num_prompt_tokens
        own = dict(enumerate(kept(completion).sampled))
        served = kept(found[problem]).sampled
        if forcing != "chat":  # which is told the number of forced tokens, not which they are
            assert [token for token, _ in served] == [token for token, _ in own.values()]
            for place, (_, value) in enumerate(served):
                assert value is None or value == pytest.approx(own[place][1], abs=TOLERANCE)
    assert num_forced >= 3, "the budget ended most of these thoughts"


@pytest.mark.parametrize("names", [{}, {"return_tokens_as_token_ids": True}])
def test_offsets_say_where_in_the_text_each_token_stands(folder: Path, url: str, names: dict[str, bool]) -> None:
    spell = open_it(folder).spell
    text = "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    for prompt in text, open_it(folder).encode(text):
        asked = {"prompt": prompt, "logprobs": 1, "max_tokens": 30, "return_token_ids": True, "seed": 1}
        body = {"model": "tiny", **asked, **names}
        choice = httpx.post(f"{url}/completions", json=body).json()["choices"][0]
        text, offsets = choice["text"], choice["logprobs"]["text_offset"]
        tokens = [spell(token) for token in choice["token_ids"]]
        if choice["finish_reason"] == "stop":
            assert offsets.pop() == len(text)
            tokens.pop()
        assert offsets[0] == 0
        assert [text[offset : offset + len(token)] for offset, token in zip(offsets, tokens, strict=True)] == tokens
        assert len(tokens) > 5


def test_tokens_go_in_and_out(folder: Path, url: str) -> None:
    tokenizer = open_it(folder).tokenizer
    text = "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    body = {"model": "tiny", "prompt": text, "add_special_tokens": False}
    ids = httpx.post(f"{url.removesuffix('/v1')}/tokenize", json=body).json()["tokens"]
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    settings = {"model": "tiny", "temperature": 0, "max_tokens": 12, "return_token_ids": True}
    message = {"role": "user", "content": "1 + 1?"}
    asked = httpx.post(f"{url}/chat/completions", json={**settings, "messages": [message]}).json()["choices"][0]
    assert asked["prompt_token_ids"] == ids
    for cut in (0, 5):
        given = [*ids, *asked["token_ids"][:cut]]
        body = {**settings, "prompt": given, "max_tokens": 12 - cut}
        rest = httpx.post(f"{url}/completions", json=body).json()["choices"][0]
        assert rest["prompt_token_ids"] == given
        assert rest["token_ids"] == asked["token_ids"][cut:]
        assert rest["text"] == tokenizer.decode(rest["token_ids"])
    two = httpx.post(f"{url}/completions", json={**settings, "prompt": [ids, ids], "n": 2}).json()
    assert [choice["token_ids"] for choice in two["choices"]] == [asked["token_ids"]] * 4
    for prompt, said in ([10**6], "the model has 101 tokens"), ([0] * 128, "maximum context length is 127 tokens"):
        refused = httpx.post(f"{url}/completions", json={**settings, "prompt": prompt})
        assert (refused.status_code, said in refused.text) == (400, True), refused.text
