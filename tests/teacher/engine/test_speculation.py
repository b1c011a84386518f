"""Speculative decoding: the text of a seed is what it is without, and its distribution the model's own."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import scipy.stats
import torch
import transformers

from distill.problems import load_problems
from distill.recipe import ReasoningGymSource
from teacher.engine import engine as engine_module
from teacher.engine.block_manager import num_pages_for
from teacher.engine.engine import Engine
from teacher.engine.sampler import SamplingParams
from teacher.engine.scheduler import Chunk
from teacher.engine.sequence import Sequence, ThinkingLimit
from teacher.engine.speculation import take
from teacher.engine.step import Decodes, Step
from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.mla_decode import mla_decode_twin
from teacher.model.checkpoint import load_checkpoint
from teacher.model.transformer import DeepseekV3
from teacher.models.cpu_attention import PiecePlan
from teacher.models.latent.model import LatentModel
from teacher.models.latent.plain import PlainOperations
from teacher.models.latent.weights import fuse_weights
from tests.repository import REPOSITORY
from tests.teacher.v3_models import random_model, tiny_config

END = 5
# Of a random model's 64 tokens a few are made likely, so that its drafts come true about half of the time.
FEW = (*((token, 30.0) for token in (7, 8, 9, 10)), (END, 27.0))
SETTINGS = [
    SamplingParams(logit_bias=FEW),
    SamplingParams(0.8, 0.9, top_logprobs=2, logit_bias=FEW),
    SamplingParams(1.0, top_k=3, logit_bias=FEW),
    SamplingParams(1.0, min_p=0.1, top_logprobs=1, logit_bias=FEW),
    SamplingParams(),
    SamplingParams(0.7),
]


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    config = tiny_config(max_position_embeddings=512, rope_scaling=None, num_hidden_layers=2)
    return random_model(config, std=0.1).eval()


def requests() -> list[Sequence[int]]:
    """Prompts that share pages, end at a page's edge, are equal, or differ in one token; settings and limits mixed."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(11, 64, (200,), generator=generator).tolist()
    prompts = [base[:n] for n in (1, 5, 61, 62, 63, 64, 65, 128, 130, 200)] + [base[:130]] * 2 + [base[:128]]
    prompts += [[*base[:70], 7, 8], [9, *base[:100]], [*base[:64], 20], torch.arange(11, 60).tolist()]
    limits = [None, ThinkingLimit(9, 8, (12, 8, 13)), ThinkingLimit(20, 33, (14, 15, 33))]
    return [
        Sequence(
            n,
            prompt,
            max_tokens=3 + 37 * (n % 5),
            seed=n,
            sampling_params=SETTINGS[n % len(SETTINGS)],
            thinking=limits[n % 3],
        )
        for n, prompt in enumerate(prompts)
    ]


def written(model: DeepseekV3, sequences: list[Sequence[int]], **settings: Any) -> tuple[dict[int, Any], Engine]:
    settings = {"batch_size": 20, "eos_token_ids": [END], "speculate": True} | settings
    engine = Engine(LatentModel.of(model, with_mtp=True), **settings)
    engine.runner.cache.entries_LPSE.fill_(float("nan"))  # what memory may hold before it is cleared
    done = {sequence.key: sequence for sequence in engine.run(sequences)}
    assert engine.blocks.num_available == engine.blocks.num_pages
    return {key: (sequence.generated_ids, sequence.finish_reason) for key, sequence in done.items()}, engine


@pytest.fixture(scope="module")
def alone(model: DeepseekV3) -> dict[int, Any]:
    one = {"speculate": False, "batch_size": 1, "prefix_caching": False}
    return {n: written(model, [sequence], **one)[0][n] for n, sequence in enumerate(requests())}


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"batch_size": 1},
        {"batch_size": 3, "max_chunk": 1},
        {"max_chunk": 7, "prefix_caching": False},
        {"max_chunk": 64, "max_step_tokens": 65},
        {"max_chunk": 65, "num_pages": 8},
        {"num_pages": 8, "prefix_caching": False},
        {"num_pages": 8, "max_step_tokens": 20},
    ],
    ids=str,
)
def test_a_seed_writes_the_same_with_speculation(
    model: DeepseekV3, alone: dict[int, Any], features: dict[str, Any]
) -> None:
    sequences = requests()
    texts, engine = written(model, sequences, **features)
    assert texts == alone
    assert {reason for _, reason in alone.values()} == {"length", "stop"}
    assert 0.2 < engine.num_accepted / engine.num_drafts < 0.95  # both outcomes are there in plenty
    assert engine.num_drafts == sum(sequence.num_drafts for sequence in sequences)
    assert engine.num_accepted == sum(sequence.num_accepted for sequence in sequences)
    if "num_pages" in features:
        assert engine.scheduler.num_preempted > 0


def test_logprobs_are_those_of_every_token_taken(model: DeepseekV3) -> None:
    by_mode = []
    for speculate in (False, True):
        sequences = requests()
        written(model, sequences, speculate=speculate)
        by_mode.append(sequences)
    for plain, fast in zip(*by_mode, strict=True):
        assert len(fast.logprobs) == (len(fast.generated_ids) if fast.sampling_params.top_logprobs else 0)
        own = [torch.tensor([taken for taken, _ in sequence.logprobs]) for sequence in (plain, fast)]
        torch.testing.assert_close(own[1], own[0], atol=1e-4, rtol=0)  # FP32, other orders of summation
        assert [[token for token, _ in top] for _, top in fast.logprobs] == [
            [token for token, _ in top] for _, top in plain.logprobs
        ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_bundled_teacher_writes_the_same_in_half_the_steps(temperature: float) -> None:
    """On problems of its own, which it has not seen."""
    model = load_checkpoint(REPOSITORY / "teacher" / "pico")
    tokenizer = transformers.AutoTokenizer.from_pretrained(REPOSITORY / "teacher" / "pico")
    source = ReasoningGymSource(families="distill/problems/pico.yaml", count=6, seed=5, split="held_out")
    problems = load_problems([source], base_dir=REPOSITORY)[:6]
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def run(speculate: bool) -> tuple[dict[int, Any], Engine]:
        draw = SamplingParams(temperature)
        sequences = [Sequence(n, prompt, 60, seed=n, sampling_params=draw) for n, prompt in enumerate(prompts)]
        return written(model, sequences, speculate=speculate, eos_token_ids=model.config.eos_token_ids, max_chunk=33)

    (plain, _), (fast, engine) = run(False), run(True)
    assert fast == plain
    assert engine.num_accepted >= 0.8 * engine.num_drafts > 0


def test_the_end_of_positions_and_of_tokens_is_where_it_was() -> None:
    """At each length of prompt the last position falls on a sequence's own token, or on its draft."""
    model = random_model(tiny_config(max_position_embeddings=24, rope_scaling=None), std=0.1).eval()
    for length, limit in itertools.product(range(1, 24), (1, 2, 3, 100)):
        draw = SETTINGS[length % len(SETTINGS)]
        pair = [
            written(model, [Sequence(0, [20] * length, limit, 0, draw)], speculate=speculate, eos_token_ids=())[0]
            for speculate in (False, True)
        ]
        assert pair[0] == pair[1]


@pytest.mark.parametrize("draw", [SamplingParams(), SamplingParams(logit_bias=FEW)], ids=["as it is", "biased"])
def test_drafts_are_the_module_s_and_are_counted_right(model: DeepseekV3, draw: SamplingParams) -> None:
    """What the training forward says of the finished text: at which tokens a draft stood, and whether it was right."""
    sequence = Sequence(0, [20, 21, 22], 100, 0, draw)
    written(model, [sequence], eos_token_ids=())
    text = [*sequence.prompt_ids, *sequence.generated_ids]
    with torch.no_grad():
        guesses_BTV = model(torch.tensor([text])).mtp_logits_BTV
    for token, value in draw.logit_bias:
        guesses_BTV[..., token] += value
    guess_of = {place + 2: token for place, token in enumerate(guesses_BTV[0].argmax(dim=-1).tolist())}
    num_drafts = num_accepted = 0
    place = len(sequence.prompt_ids) + 1  # the first token of the text needs no draft
    while place < len(text):
        num_drafts += 1
        right = guess_of[place] == text[place]
        num_accepted += right
        place += 1 + right
    assert (sequence.num_drafts, sequence.num_accepted) == (num_drafts, num_accepted)
    assert num_drafts > 40


def test_an_engine_without_a_module_to_draft_with_says_so(model: DeepseekV3) -> None:
    with pytest.raises(ValueError, match="MTP"):
        Engine(LatentModel.of(model), batch_size=2, eos_token_ids=(), speculate=True)
    without = random_model(tiny_config(num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match="MTP"):
        Engine(LatentModel.of(without, with_mtp=True), batch_size=2, eos_token_ids=(), speculate=True)


# --- the distribution -------------------------------------------------------------------------------------------------

VOCABULARY = 6
PROMPT = [3]
# So that the model's distribution and the drafts' are near each other, and neither is flat.
SLOPE = tuple((token, -0.6 * token) for token in range(VOCABULARY))


def keeps_drafts(chunk: Chunk[Any], sampled: list[int], eos_token_ids: frozenset[int]) -> list[int]:
    """Wrong: one refused draft in three is taken all the same."""
    if chunk.draft is not None and random.Random(chunk.sequence.seed).random() < 1 / 3:
        sampled = [chunk.draft, *sampled[1:]]
    return take(chunk, sampled, eos_token_ids)


class OneNumber(Sequence[int]):
    """Wrong: the token behind an accepted draft is drawn by the number that drew the draft."""

    def uniform(self, ahead: int = 0) -> float:
        return super().uniform(0)


def p_value(model: DeepseekV3, draw: SamplingParams, count: int, kind: type[Sequence[int]] = Sequence) -> float:
    """Of the first three tokens' joint distribution, by the chi-square test (cells expected under five times as one).

    The first is drawn behind the prompt, the second in the place of a draft, the third behind it, if it came true.
    """
    sequences = [kind(n, PROMPT, 3, seed=n, sampling_params=draw) for n in range(count)]
    texts, engine = written(model, sequences, batch_size=1000, num_pages=1000, eos_token_ids=(), prefix_caching=False)
    assert 0.2 < engine.num_accepted / engine.num_drafts < 0.9
    seen = Counter(tuple(tokens) for tokens, _ in texts.values())
    triples = list(itertools.product(range(VOCABULARY), repeat=3))
    with torch.no_grad():
        logits_BTV = model(torch.tensor([[*PROMPT, *triple] for triple in triples]), with_mtp=False).logits_BTV
    bias_V = torch.tensor([value for _, value in draw.logit_bias])
    shares_BTV = ((logits_BTV[:, len(PROMPT) - 1 : -1] + bias_V) / draw.temperature).double().softmax(dim=-1)
    expected_B = count * shares_BTV.gather(2, torch.tensor(triples)[:, :, None]).prod(dim=1).squeeze(1)
    observed_B = torch.tensor([seen[triple] for triple in triples])
    rare = expected_B < 5
    groups = [(observed_B[~rare], observed_B[rare].sum()[None]), (expected_B[~rare], expected_B[rare].sum()[None])]
    observed, expected = (torch.cat(parts).double() for parts in groups)
    held = expected > 0
    return float(scipy.stats.chisquare(observed[held], expected[held] * observed.sum() / expected.sum()).pvalue)


@pytest.fixture(scope="module")
def small() -> DeepseekV3:
    widths = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    return random_model(tiny_config(vocab_size=VOCABULARY, max_position_embeddings=PAGE, **widths), std=0.3).eval()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand_samples_have_the_model_s_distribution(small: DeepseekV3) -> None:
    assert p_value(small, SamplingParams(0.7, logit_bias=SLOPE), 100_000) > 1e-3


def test_ten_thousand_samples_have_the_model_s_distribution(small: DeepseekV3) -> None:
    assert p_value(small, SamplingParams(1.0, logit_bias=SLOPE), 10_000) > 1e-3


@pytest.mark.slow
def test_the_distribution_s_test_finds_a_wrong_rule(small: DeepseekV3, monkeypatch: pytest.MonkeyPatch) -> None:
    assert p_value(small, SamplingParams(1.0, logit_bias=SLOPE), 10_000, OneNumber) < 1e-3
    monkeypatch.setattr(engine_module, "take", keeps_drafts)
    assert p_value(small, SamplingParams(1.0, logit_bias=SLOPE), 10_000) < 1e-3


# --- two queries a sequence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_queries", [1, 2])
def test_two_queries_in_place_equal_attention_over_gathered_pages(num_queries: int) -> None:
    """Any pages: scattered, shared, over several extents, the draft alone on the last; what no query sees is noise."""
    model = random_model(tiny_config())
    operations, config = PlainOperations(fuse_weights(model)), model.config
    generator = torch.Generator().manual_seed(1)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    cache_PSE = torch.randn(44, PAGE, width, generator=generator)
    pages = [[0, 1, 2, 3, 9, 17], [0, 1, 2, 3, 11], [0, 20], [24, 25], [28, 29], [32], [39], [0, 1, 5, 4, 7], [40, 36]]
    lengths = [330, 320, 65, 128, 100, 2, 64, 300, 65]
    assert all(len(row) == num_pages_for(length) for row, length in zip(pages, lengths, strict=True))
    query_BTHE = torch.randn(len(pages), num_queries, config.num_attention_heads, width, generator=generator)
    out = operations.decode(query_BTHE, cache_PSE, operations.plan(Decodes(pages, lengths, num_queries)))
    table_BQ = torch.tensor([row + [0] * (6 - len(row)) for row in pages])
    given = query_BTHE, cache_PSE, table_BQ, torch.tensor(lengths)
    wanted = mla_decode_twin(*given, scale=1.0, latent=config.kv_lora_rank)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


class Planned(PlainOperations):
    """Operations that ask for none of a step's numbers, as a GPU's do: a step may be a graph."""

    graphable = True

    def plan_on_device(self, pages_BQ: torch.Tensor, lengths_B: torch.Tensor, num_queries: int) -> Any:
        return pages_BQ, lengths_B

    def write(self, projected_ME: torch.Tensor, weights: Any, step: Step, cache_PSE: torch.Tensor) -> None:
        held = step.slots_M >= 0  # the others are padding
        kept = replace(step, positions_M=step.positions_M[held], slots_M=step.slots_M[held])
        super().write(projected_ME[held], weights, kept, cache_PSE)

    def decode(self, query_BTHE: torch.Tensor, cache_PSE: torch.Tensor, plan: Any) -> torch.Tensor:
        if isinstance(plan, PiecePlan):
            return super().decode(query_BTHE, cache_PSE, plan)
        return mla_decode_twin(query_BTHE, cache_PSE, *plan, scale=1.0, latent=self._latent)


class Likely(LatentModel):
    """Few tokens are likely, so that drafts come true about half of the time."""

    def logits(self, x_ZD: torch.Tensor) -> torch.Tensor:
        logits_ZV = super().logits(x_ZD)
        for token, bias in FEW:
            logits_ZV[:, token] += bias
        return logits_ZV


PLAIN_SETTINGS = [
    SamplingParams(),
    SamplingParams(0.8, 0.9),
    SamplingParams(1.0, top_k=3),
    SamplingParams(1.0, min_p=0.1),
    SamplingParams(1.0),
]


@pytest.mark.parametrize(
    ("features", "greedy"),
    [
        ({}, False),
        ({"batch_size": 1}, False),
        ({"batch_size": 3}, True),
        ({"num_pages": 9, "max_step_tokens": 20}, False),
    ],
    ids=str,
)
def test_steps_launched_before_their_drafts_are_judged_write_the_same(
    model: DeepseekV3, features: dict[str, Any], greedy: bool
) -> None:
    weights = fuse_weights(model, with_mtp=True)

    def run(speculate: bool) -> tuple[dict[int, Any], list[int], Engine]:
        served = Likely(weights, Planned(weights) if speculate else None)
        settings = {"batch_size": 20, "eos_token_ids": [END], "speculate": speculate, "run_ahead": speculate} | features
        engine = Engine(served, **settings)
        sizes: list[int] = []
        run_on = engine.runner.run_on
        engine.runner.run_on = lambda before, sequences, copies: (
            sizes.append(len(sequences)) or run_on(before, sequences, copies)
        )
        sequences = [
            replace(
                sequence,
                sampling_params=SamplingParams() if greedy else PLAIN_SETTINGS[n % len(PLAIN_SETTINGS)],
                thinking=sequence.thinking if n % 4 == 2 else None,
                max_tokens=400 if n == 9 else sequence.max_tokens,  # to the last position
            )
            for n, sequence in enumerate(requests())
        ]
        written = {done.key: (done.generated_ids, done.finish_reason) for done in engine.run(sequences)}
        assert engine.blocks.num_available == engine.blocks.num_pages
        return written, sizes, engine

    (plain, _, _), (fast, sizes, engine) = run(False), run(True)
    assert fast == plain
    assert len(sizes) > 20
    assert max(sizes) > 1 or engine.batch_size == 1
    assert 0.2 < engine.num_accepted / engine.num_drafts < 0.99
