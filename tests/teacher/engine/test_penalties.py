"""Penalties: OpenAI's and CTRL's definitions, the same text in any batch, and nothing where there are none."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import scipy.stats
import torch
import transformers
from hypothesis import given, settings, strategies as st

from teacher.engine.engine import Engine
from teacher.engine.sampler import SamplingParams, choose
from teacher.engine.sequence import Sequence
from teacher.engine.token_counts import TokenCounts
from teacher.model.transformer import DeepseekV3
from teacher.models.latent.model import LatentModel
from teacher.models.latent.weights import fuse_weights
from tests.teacher.engine.test_speculation import Planned
from tests.teacher.v3_models import random_model, tiny_config

END = 5
PENALTIES = [
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.5},
    {"repetition_penalty": 1.4},
    {"presence_penalty": -1.0, "frequency_penalty": 0.3, "repetition_penalty": 0.8},
]


def counted(prompt: list[int], answer: list[int], params: SamplingParams) -> TokenCounts:
    counts = TokenCounts(prompt if params.repetition_penalty != 1 else ())
    for token in answer:
        counts.push(token)
    return counts


def by_definition(logits_V: torch.Tensor, prompt: list[int], answer: list[int], params: SamplingParams) -> torch.Tensor:
    """Token by token, as OpenAI's reference has it, behind transformers' own processor."""
    ids = torch.tensor([[*prompt, *answer]])
    process = transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    logits_V = process(ids, logits_V[None].clone())[0]
    for token, count in Counter(answer).items():
        logits_V[token] -= count * params.frequency_penalty + (count > 0) * params.presence_penalty
    return logits_V


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 39), min_size=1, max_size=30),
    st.lists(st.integers(0, 39), max_size=30),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0.1, 3),
    st.integers(0, 2**31),
)
def test_logits_are_those_of_the_definition(
    prompt: list[int], answer: list[int], presence: float, frequency: float, repetition: float, seed: int
) -> None:
    """The likeliest token among all, then among all but that one, and so on: their order is the logits' own."""
    params = SamplingParams(
        presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition, logit_bias=((3, 0.5),)
    )
    logits_V = 4 * torch.randn(40, generator=torch.Generator().manual_seed(seed))
    wanted_V = by_definition(logits_V + 0.5 * (torch.arange(40) == 3), prompt, answer, params)
    seen = counted(prompt, answer, params).seen()
    for token in wanted_V.argsort(descending=True).tolist()[:10]:
        (found,) = choose(logits_V[None], [0.5], [params], [seen]).tolist()
        assert wanted_V[found].item() == pytest.approx(wanted_V[token].item(), abs=1e-5)
        logits_V[token] = wanted_V[token] = -1e9


def test_a_draft_counts_as_if_it_were_written() -> None:
    counts = counted([7, 8], [9, 9], SamplingParams(repetition_penalty=2.0))
    ahead = {draft: dict(zip(*map(list, counts.seen([draft])), strict=True)) for draft in (7, 9, 11)}
    assert ahead == {7: {7: 1, 8: 0, 9: 2}, 9: {7: 0, 8: 0, 9: 3}, 11: {7: 0, 8: 0, 9: 2, 11: 1}}
    assert dict(zip(*map(list, counts.seen()), strict=True)) == {7: 0, 8: 0, 9: 2}, "and is not"


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_draws_have_the_penalised_distribution(penalties: dict[str, float]) -> None:
    params = SamplingParams(1.0, **penalties)
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(1))
    prompt, answer = [0, 1, 2], [2, 3, 3, 3, 4]
    count = 20_000
    rows = logits_V.expand(count, -1)
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(2)).tolist()
    drawn = choose(rows, uniform, [params] * count, [counted(prompt, answer, params).seen()] * count)
    wanted_V = by_definition(logits_V, prompt, answer, params).double().softmax(dim=0)
    assert scipy.stats.chisquare(torch.bincount(drawn, minlength=12), wanted_V * count).pvalue > 1e-3
    plain = logits_V.double().softmax(dim=0) * count
    assert scipy.stats.chisquare(torch.bincount(drawn, minlength=12), plain).pvalue < 1e-6, "and not the plain one"


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    config = tiny_config(max_position_embeddings=512, rope_scaling=None, num_hidden_layers=2)
    return random_model(config, std=0.1).eval()


def requests() -> list[Sequence[int]]:
    """Every other one without penalties; prompts that share pages."""
    base = torch.randint(6, 64, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = (1, 5, 63, 64, 65, 128, 130, 200, 130, 130)
    draws = [SamplingParams(0.9, **PENALTIES[n // 2 % 4]) if n % 2 else SamplingParams(0.9) for n in range(10)]
    return [
        Sequence(n, base[:length], max_tokens=100, seed=n, sampling_params=draw)
        for n, (length, draw) in enumerate(zip(lengths, draws, strict=True))
    ]


def written(model: DeepseekV3, *, in_graphs: bool = False, **features: Any) -> tuple[dict[int, list[int]], Engine]:
    weights = fuse_weights(model, with_mtp=True)
    served = LatentModel(weights, Planned(weights) if in_graphs else None)
    engine = Engine(served, **{"batch_size": 16, "eos_token_ids": [END]} | features)
    done = {sequence.key: sequence.generated_ids for sequence in engine.run(requests())}
    return done, engine


@pytest.fixture(scope="module")
def alone(model: DeepseekV3) -> dict[int, list[int]]:
    return written(model, batch_size=1, prefix_caching=False)[0]


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"batch_size": 3, "max_chunk": 7},
        {"num_pages": 6, "max_step_tokens": 20},
        {"run_ahead": True},
        {"run_ahead": True, "num_pages": 6},
        {"speculate": True},
        {"speculate": True, "run_ahead": True, "num_pages": 6},
        {"in_graphs": True, "run_ahead": True},
        {"in_graphs": True, "run_ahead": True, "speculate": True, "num_pages": 6},
    ],
    ids=str,
)
def test_every_way_of_computing_writes_the_same(
    model: DeepseekV3, alone: dict[int, list[int]], features: dict[str, Any]
) -> None:
    texts, engine = written(model, **features)
    assert texts == alone
    assert ("num_pages" in features) <= (engine.scheduler.num_preempted > 0)


def test_greedy_text_is_transformers(model: DeepseekV3) -> None:
    peer = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**model.config.to_json())).eval()
    peer.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in peer.state_dict()})
    prompt = list(range(10, 30))
    texts = []
    for penalty in (1.0, 1.5):
        asked = {"max_new_tokens": 40, "do_sample": False, "repetition_penalty": penalty, "eos_token_id": None}
        wanted = peer.generate(torch.tensor([prompt]), **asked)[0, len(prompt) :].tolist()
        engine = Engine(LatentModel.of(model), batch_size=1, eos_token_ids=[])
        params = SamplingParams(repetition_penalty=penalty)
        (done,) = engine.run([Sequence(0, prompt, max_tokens=40, seed=0, sampling_params=params)])
        assert done.generated_ids == wanted
        texts.append(wanted)
    assert texts[0] != texts[1]


def test_who_has_none_pays_nothing(model: DeepseekV3) -> None:
    engine = Engine(LatentModel.of(model), batch_size=4, eos_token_ids=[END])
    plain, biased, penalised = (
        Sequence(n, [7, 8], max_tokens=3, seed=n, sampling_params=params)
        for n, params in enumerate(
            (SamplingParams(0.8), SamplingParams(logit_bias=((3, 1.0),)), SamplingParams(presence_penalty=0.1))
        )
    )
    for sequence in (plain, biased, penalised):
        engine.add(sequence)
    assert (plain.counts, biased.counts) == (None, None)
    assert (plain.is_plain, plain.may_run_ahead) == (True, True), "graphs draw its tokens, ahead of the host"
    assert (biased.is_plain, biased.may_run_ahead) == (False, True)
    assert (penalised.is_plain, penalised.may_run_ahead) == (False, False)
