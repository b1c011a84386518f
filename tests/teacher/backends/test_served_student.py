"""A student that is scored behind a server: the native engine's texts and log-likelihoods, whoever serves it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RecipeError
from distill.protocols import PlainPrompt, ScoredText, Teacher, TokenModel
from distill.recipe import EndpointEngine, EvalConfig, Instruction, VllmEngine
from distill.records import Problem, Sampling, TraceRequest
from teacher.backends import open_student
from teacher.backends.tokenizer import encode_prompt, render_question
from teacher.http.app import build_app
from tests.repository import REPOSITORY
from tests.teacher.backends.native.test_native_backend import open_it
from tests.teacher.http.listening import listening

PICO = REPOSITORY / "students" / "pico" / "qwen2-0.4m"
GREEDY = Sampling(temperature=0.0, max_tokens=24)
ASKED = Instruction(prompt_suffix="Say only the number.")
# FP32 on both sides.
TOLERANCE = 1e-4
# BF16 against FP32: two tokens whose logits are nearer than this are a tie.
BF16_TIE = 0.5


@pytest.fixture(scope="module")
def native() -> Iterator[Any]:
    with contextlib.closing(open_student(PICO, engine="native", batch_size=8, instruction=ASKED)) as model:
        yield model


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    """Behind our own server, under the name that it has there."""
    app = build_app(open_it(PICO), model="pico", sampling=Sampling())
    with listening(app) as (host, port):
        engine = EndpointEngine(base_url=f"http://{host}:{port}/v1", served={"qwen2-0.4m-base": "pico"})
        model = open_student(PICO, engine=engine, name="qwen2-0.4m-base", instruction=ASKED)
        with contextlib.closing(model):
            yield model
        with pytest.raises(RecipeError, match=r"'other' is not served; allowed: pico"):
            open_student(PICO, engine=engine, name="other")


def requests(count: int) -> list[TraceRequest]:
    problems = [Problem(prompt=f"What is {n} + {n + 1}?", answer="x", grader="math", source="t") for n in range(count)]
    return [TraceRequest(problem=problem, sample_index=0) for problem in problems]


def texts(model: Teacher, asked: Sequence[TraceRequest]) -> list[tuple[str, str, int, int]]:
    done = {c.request.problem.id: c for c in model.generate(asked, GREEDY)}
    found = [done[request.problem.id] for request in asked]
    return [(c.text, c.finish_reason, c.num_prompt_tokens, c.num_tokens) for c in found]


def margins(
    native: Any, asked: Sequence[TraceRequest], ours: Sequence[tuple[Any, ...]], theirs: Sequence[tuple[Any, ...]]
) -> list[float]:
    """For each question whose texts part: how far apart the native engine has the two tokens that come first there."""
    wanted = []
    for request, one, other in zip(asked, ours, theirs, strict=True):
        first, second = (_ids(native, text, finish) for text, finish, *_ in (one, other))
        place = next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if place is None:
            assert one[0] == other[0], "a text that goes on parts at the other's end token"
            continue
        prompt = encode_prompt(native.tokenizer, render_question(native.tokenizer, request.problem.prompt, ASKED))
        wanted += [ScoredText((*prompt, *first[:place]), (row[place],)) for row in (first, second)]
    found = dict(native.likelihoods(wanted))
    return [abs(found[number].logprob - found[number + 1].logprob) for number in range(0, len(wanted), 2)]


def _ids(native: Any, text: str, finish_reason: str) -> list[int]:
    ids = native.tokenizer.encode(text, add_special_tokens=False)
    return [*ids, native.tokenizer.eos_token_id] if finish_reason == "stop" else ids


def scored_texts(model: TokenModel) -> list[ScoredText]:
    encoded = [model.vocabulary.encode(text) for text in ("12 + 13 = 25", "3 * 4 = 12 = 3 * 4", "9 9 9 9 9")]
    return [ScoredText(tuple(ids[:cut]), tuple(ids[cut:])) for ids in encoded for cut in (1, 3, len(ids) - 1)]


def test_its_answers_are_the_native_ones(native: Any, served: Any) -> None:
    assert isinstance(served, Teacher)
    assert isinstance(served, TokenModel)
    assert texts(served, requests(6)) == texts(native, requests(6))
    identity = served.identity
    assert (identity.weights, identity.template) == (native.identity.weights, native.identity.template)
    assert (identity.backend, identity == native.identity) == ("openai", False)


def test_a_prompt_that_fills_the_context_is_an_answer_cut_off(served: Any) -> None:
    context = json.loads((PICO / "config.json").read_text())["max_position_embeddings"]
    problem = Problem(prompt="1 " * context, answer="x", grader="math", source="t")
    (done,) = served.generate([TraceRequest(problem=problem, sample_index=0)], GREEDY)
    assert (done.finish_reason, done.num_tokens) == ("length", 0)


def test_it_scores_and_continues_texts_as_the_native_engine_does(native: Any, served: Any) -> None:
    wanted = scored_texts(native)
    ours, theirs = dict(native.likelihoods(wanted)), dict(served.likelihoods(wanted))
    assert ours.keys() == theirs.keys() == set(range(len(wanted)))
    for number, found in ours.items():
        assert theirs[number].logprob == pytest.approx(
            found.logprob, abs=TOLERANCE * len(wanted[number].continuation_ids)
        )
        assert theirs[number].is_greedy == found.is_greedy
    assert {found.is_greedy for found in ours.values()} == {True, False}
    prompts = [
        PlainPrompt(tuple(native.vocabulary.encode(text)), GREEDY, 1, stop=stop)
        for text in ("7 + 5 =", "What is 3 + 4?\n")
        for stop in ((), ("1",))
    ]
    ours, theirs = dict(native.continuations(prompts)), dict(served.continuations(prompts))
    for number, prompt in enumerate(prompts):
        before = [
            answer.text.split(prompt.stop[0])[0] if prompt.stop else answer.text
            for answer in (ours[number], theirs[number])
        ]
        assert before[0] == before[1]


def test_an_engine_is_named_by_a_word_or_set_up() -> None:
    assert EvalConfig(engine="vllm").engine == VllmEngine()
    flags = {"tensor-parallel-size": 4, "data-parallel-size": 2, "dtype": "bfloat16", "max-model-len": 32768}
    engine = EvalConfig.model_validate({"engine": {"backend": "vllm", "flags": flags}}).engine
    assert isinstance(engine, VllmEngine)
    assert (engine.num_gpus, engine.numerics) == (8, {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="is for the native engine"):
        EvalConfig(engine="vllm", sampling=Sampling(max_thinking_tokens=5))
    with pytest.raises(ValueError, match="engine"):
        EvalConfig.model_validate({"engine": "sglang"})


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_scores_and_continues_as_the_native_engine_does(tmp_path: Path) -> None:
    """BF16 there, FP32 here: a log-probability differs by hundredths, and greedy texts may part at a tie.

    The largest pico model: vLLM's CPU build has no attention for the heads of the others.
    """
    folder, flags = PICO.with_name("qwen2-0.8m"), {"max-model-len": 512, "max-num-seqs": 16}
    engine = VllmEngine(flags=flags)
    with (
        contextlib.closing(open_student(folder, engine="native", batch_size=8, instruction=ASKED)) as native,
        contextlib.closing(open_student(folder, engine=engine, log_dir=tmp_path, instruction=ASKED)) as model,
    ):
        asked = requests(32)
        ours, theirs = texts(native, asked), texts(model, asked)
        assert [row[2] for row in theirs] == [row[2] for row in ours], "the same prompts"
        parted = margins(native, asked, ours, theirs)
        assert len(parted) < len(asked), "some greedy texts meet no tie"
        assert all(margin < BF16_TIE for margin in parted), parted
        wanted = scored_texts(native)
        expected, found = dict(native.likelihoods(wanted)), dict(model.likelihoods(wanted))
        for number, text in enumerate(wanted):
            tolerance = 0.05 * len(text.continuation_ids) + 0.01 * abs(expected[number].logprob)
            assert found[number].logprob == pytest.approx(expected[number].logprob, abs=tolerance)
