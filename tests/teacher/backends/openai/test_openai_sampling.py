"""Logprobs and budget forcing through an endpoint, against a model that has one token a character."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from distill.errors import RecipeError
from distill.logprobs import TokenLogprobs
from distill.recipe import OpenAITeacher
from distill.records import Completion, Problem, Sampling, TraceRequest
from teacher.backends.openai import OpenAICompatibleTeacher
from tests.teacher.backends.openai.chat_endpoint import serving
from tests.teacher.backends.openai.spelling_endpoint import END, SpellingEndpoint, answer, logprob, thought

QUESTION = "17 + 25?"
REQUEST = TraceRequest(problem=Problem(prompt=QUESTION, answer="42", grader="math", source="t"), sample_index=0)
NUM_PROMPT = len(f"<user>{QUESTION}<assistant><think>\n")
BUDGET = 20


@pytest.fixture
def endpoint() -> Iterator[SpellingEndpoint]:
    with serving(SpellingEndpoint()) as endpoint:
        yield endpoint


def complete(endpoint: SpellingEndpoint, settings: dict[str, Any], **sampling: Any) -> Completion:
    config = OpenAITeacher.model_validate({"base_url": endpoint.url, "model": "pico", **settings})
    source = OpenAICompatibleTeacher(config, backoff_s=0.002)
    (completion,) = source.generate([REQUEST], Sampling(max_tokens=400, seed=3, **sampling))
    return completion


@pytest.mark.parametrize("forcing", ["completions", "chat", "server"])
@pytest.mark.parametrize("parses", [False, True])
def test_thinking_ends_at_its_budget_and_the_answer_follows(
    endpoint: SpellingEndpoint, forcing: str, parses: bool
) -> None:
    endpoint.parses = parses
    done = complete(endpoint, {"budget_forcing": forcing}, max_thinking_tokens=BUDGET)
    assert done.text == f"<think>\n{thought(QUESTION)[:BUDGET]}{END}{answer(QUESTION)}"
    assert (done.finish_reason, done.num_prompt_tokens) == ("stop", NUM_PROMPT)
    assert done.num_tokens == BUDGET + len(END) + len(answer(QUESTION)), "what was forced counts"
    assert len(endpoint.payloads) == (1 if forcing == "server" else 2)
    if forcing == "completions":
        assert "".join(map(chr, endpoint.payloads[1]["prompt"])).endswith(thought(QUESTION)[:BUDGET] + END)
    if forcing != "server":
        first, second = endpoint.payloads
        assert first["seed"] != second["seed"], "the answer does not draw the thinking's random numbers again"
        assert (first["max_tokens"], second["max_tokens"]) == (
            BUDGET,
            400 - BUDGET - len(END) * (forcing == "completions"),
        )


@pytest.mark.parametrize("forcing", ["completions", "chat"])
def test_thinking_that_ends_in_time_is_left_alone(endpoint: SpellingEndpoint, forcing: str) -> None:
    whole = f"<think>\n{thought(QUESTION)}{END}{answer(QUESTION)}"
    free = complete(endpoint, {"budget_forcing": forcing})
    assert (free.text, len(endpoint.payloads)) == (whole, 1)
    in_time = complete(endpoint, {"budget_forcing": forcing}, max_thinking_tokens=399)
    assert (in_time.text, in_time.num_tokens, len(endpoint.payloads)) == (whole, free.num_tokens, 2)
    cut_in_the_answer = complete(
        endpoint, {"budget_forcing": forcing}, max_thinking_tokens=len(thought(QUESTION)) + len(END) + 3
    )
    assert (cut_in_the_answer.text, cut_in_the_answer.num_tokens) == (whole, free.num_tokens)


def test_both_requests_are_paid_for(endpoint: SpellingEndpoint) -> None:
    config = OpenAITeacher(base_url=endpoint.url, model="pico", price_per_million_prompt_tokens=1e6)
    source = OpenAICompatibleTeacher(config)
    (done,) = source.generate([REQUEST], Sampling(max_tokens=400, seed=3, max_thinking_tokens=BUDGET))
    assert done.num_prompt_tokens == NUM_PROMPT
    assert source.facts()["cost"] == NUM_PROMPT + (NUM_PROMPT + BUDGET + len(END))
    assert source.usage.completion_tokens == BUDGET + len(answer(QUESTION))


def test_an_endpoint_without_token_ids_is_named(endpoint: SpellingEndpoint) -> None:
    endpoint.tells_ids = False
    with pytest.raises(RecipeError, match=r"teacher\.budget_forcing: has no /tokenize, as vLLM has; use 'chat' or"):
        complete(endpoint, {}, max_thinking_tokens=BUDGET)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("extra", "unit"), [({}, "text"), ({"return_tokens_as_token_ids": True}, "id")])
def test_logprobs_are_kept_as_they_come(
    endpoint: SpellingEndpoint, extra: dict[str, Any], unit: str, stream: bool
) -> None:
    done = complete(endpoint, {"extra_body": extra, "stream": stream}, top_logprobs=2)
    assert done.logprobs is not None
    kept = TokenLogprobs.unpacked(done.logprobs)
    written = done.text.removeprefix("<think>\n")
    named: list[Any] = [ord(c) for c in written] if unit == "id" else list(written)
    assert kept.unit == unit
    values = [pytest.approx(logprob(NUM_PROMPT + place)) for place in range(len(written))]
    assert kept.sampled == list(zip(named, values, strict=True))
    assert [top[0] for top in kept.top] == kept.sampled, "best first"
    assert {top[1][1] for top in kept.top} == {-5.0}
    assert endpoint.payloads[0]["top_logprobs"] == 2


@pytest.mark.parametrize(("forcing", "num_forced"), [("completions", len(END)), ("chat", len(END))])
def test_logprobs_go_on_over_a_forced_end(endpoint: SpellingEndpoint, forcing: str, num_forced: int) -> None:
    settings = {"budget_forcing": forcing, "extra_body": {"return_tokens_as_token_ids": True}}
    done = complete(endpoint, settings, top_logprobs=2, max_thinking_tokens=BUDGET)
    assert done.logprobs is not None
    kept = TokenLogprobs.unpacked(done.logprobs)
    forced = [(token, value) for token, value in kept.sampled if value is None]
    if forcing == "completions":
        assert "".join(chr(int(token)) for token, _ in kept.sampled) == done.text.removeprefix("<think>\n")
        assert len(forced) == num_forced
        assert [kept.top[place] for place, (_, value) in enumerate(kept.sampled) if value is None] == [[]] * num_forced
    answered = [value for _, value in kept.sampled][-len(answer(QUESTION)) :]
    start = NUM_PROMPT + BUDGET + len(END)
    assert answered == [pytest.approx(logprob(start + place)) for place in range(len(answer(QUESTION)))]


def test_an_endpoint_without_logprobs_is_named() -> None:
    from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint

    with serving(ChatEndpoint()) as plain:
        config = OpenAITeacher(base_url=plain.url, model="pico")
        with pytest.raises(RecipeError, match=r"generate\.sampling\.top_logprobs: sends no logprobs"):
            list(OpenAICompatibleTeacher(config).generate([REQUEST], Sampling(max_tokens=64, top_logprobs=3)))
