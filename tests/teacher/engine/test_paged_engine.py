"""The paged engine: whatever chunks, pages, shares and pre-empts, the text is that of each request alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from teacher.engine.block_manager import num_pages_for
from teacher.engine.engine import Engine
from teacher.engine.sampler import SamplingParams, sample
from teacher.engine.sequence import Sequence
from teacher.engine.step import Decodes
from teacher.kernels.attention.mla_cache import PAGE
from teacher.model.checkpoint import load_checkpoint
from teacher.model.config import DeepseekV3Config
from teacher.model.transformer import DeepseekV3
from teacher.models.cpu_attention import EXTENT, Piece, find_pieces, group_pieces
from teacher.models.latent.gpu import KernelOperations
from teacher.models.latent.model import LatentModel
from teacher.models.latent.plain import PlainOperations
from teacher.models.latent.weights import fuse_weights
from tests.repository import REPOSITORY
from tests.teacher.v3_models import random_model, tiny_config

PICO = REPOSITORY / "teacher" / "pico"
SETTINGS = [
    SamplingParams(),
    SamplingParams(0.8, 0.9, top_logprobs=2),
    SamplingParams(1.0, top_k=5, logit_bias=((5, -50.0),)),
    SamplingParams(1.0, min_p=0.1, logit_bias=((3, -50.0), (5, -50.0))),
]


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    config = tiny_config(max_position_embeddings=512, rope_scaling=None, num_hidden_layers=2)
    return random_model(config, std=0.1).eval()


def requests() -> list[Sequence[int]]:
    """Prompts that share pages, end on a page's edge, are equal, or differ in one token; settings mixed."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(6, 64, (200,), generator=generator).tolist()
    prompts = [base[:n] for n in (1, 5, 63, 64, 65, 128, 130, 200)] + [base[:130]] * 2 + [base[:128]]
    prompts += [[*base[:70], 7, 8], [9, *base[:100]], torch.randint(6, 64, (90,), generator=generator).tolist()]
    return [
        Sequence(n, prompt, max_tokens=10 + 45 * (n % 4), seed=n, sampling_params=SETTINGS[n % len(SETTINGS)])
        for n, prompt in enumerate(prompts)
    ]


def written(engine: Engine, sequences: list[Sequence[int]]) -> dict[int, Any]:
    done = {sequence.key: sequence for sequence in engine.run(sequences)}
    assert engine.blocks.num_available == engine.blocks.num_pages
    return {key: (sequence.generated_ids, sequence.finish_reason) for key, sequence in done.items()}


@pytest.fixture(scope="module")
def alone(model: DeepseekV3) -> dict[int, Any]:
    engine = Engine(LatentModel.of(model), batch_size=1, eos_token_ids=[5], prefix_caching=False)
    return {n: written(engine, [sequence])[n] for n, sequence in enumerate(requests())}


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"batch_size": 3, "max_chunk": 1},
        {"max_chunk": 7, "prefix_caching": False},
        {"max_chunk": 64, "max_step_tokens": 65},
        {"max_chunk": 65, "num_pages": 8},
        {"num_pages": 8, "prefix_caching": False},
        {"num_pages": 8, "max_step_tokens": 20},
        {"run_ahead": True},
        {"run_ahead": True, "batch_size": 3, "max_chunk": 7},
        {"run_ahead": True, "max_chunk": 65, "num_pages": 8},
        {"run_ahead": True, "num_pages": 8, "max_step_tokens": 20, "prefix_caching": False},
    ],
    ids=str,
)
def test_every_feature_leaves_the_text_as_it_is(
    model: DeepseekV3, alone: dict[int, Any], features: dict[str, Any]
) -> None:
    engine = Engine(LatentModel.of(model), **{"batch_size": 16, "eos_token_ids": [5]} | features)
    engine.runner.cache.entries_LPSE.fill_(float("nan"))  # what memory may hold before it is cleared
    assert written(engine, requests()) == alone
    if "num_pages" in features:
        assert engine.scheduler.num_preempted > 0
    assert {reason for _, reason in alone.values()} == {"length", "stop"}


@pytest.mark.parametrize("num_pages", [8, 64])
def test_a_sequence_withdrawn_while_its_token_is_under_way_leaves_nothing(
    model: DeepseekV3, alone: dict[int, Any], num_pages: int
) -> None:
    engine = Engine(LatentModel.of(model), batch_size=6, eos_token_ids=[5], num_pages=num_pages, run_ahead=True)
    for sequence in requests():
        engine.add(sequence)
    done: dict[int, Any] = {}
    cancelled = []
    for step in range(1_000):
        if engine.is_idle:
            break
        done |= {sequence.key: (sequence.generated_ids, sequence.finish_reason) for sequence in engine.step()}
        expecting = [sequence.key for sequence in engine.scheduler.running if sequence.num_placeholders]
        if step % 9 == 4 and expecting:
            engine.cancel(expecting[0])
            cancelled.append(expecting[0])
    assert engine.is_idle
    assert cancelled
    assert done.keys() | set(cancelled) == alone.keys()
    assert all(outcome == alone[key] for key, outcome in done.items())
    assert engine.blocks.num_available == engine.blocks.num_pages


def test_a_text_met_again_is_read_from_the_cache(model: DeepseekV3) -> None:
    engine = Engine(LatentModel.of(model), batch_size=2, eos_token_ids=())
    first, again = Sequence(0, [7] * 150, max_tokens=50, seed=0), Sequence(1, [7] * 150, max_tokens=50, seed=0)
    assert written(engine, [first])[0] == written(engine, [again])[1]
    # The page with the end of the prompt is full by now, so it stayed: the last token alone is read again.
    assert engine.num_computed_tokens == (150 + 49) + (1 + 49)
    longer = Sequence(2, [*first.prompt_ids, *first.generated_ids], max_tokens=1, seed=0)
    before = engine.num_computed_tokens
    written(engine, [longer])
    assert engine.num_computed_tokens - before == 200 - 3 * PAGE


def test_sixteen_samples_cost_one_prefill(model: DeepseekV3) -> None:
    engine = Engine(LatentModel.of(model), batch_size=16, eos_token_ids=())
    samples = [Sequence(n, [9] * 100, max_tokens=5, seed=n, sampling_params=SamplingParams(1.0)) for n in range(16)]
    texts = written(engine, samples)
    # The first reads the prompt, every other one its last token; the fifth token of each is never an input.
    assert engine.num_computed_tokens == 100 + 15 + 16 * 4
    assert len({tuple(tokens) for tokens, _ in texts.values()}) == 16


def test_greedy_tokens_of_the_bundled_teacher_equal_transformers(tmp_path: Path) -> None:
    model = load_checkpoint(PICO)
    peer = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**model.config.to_json())).eval()
    peer.load_state_dict({k: v for k, v in model.state_dict().items() if k in peer.state_dict()})
    tokenizer = transformers.AutoTokenizer.from_pretrained(PICO)
    questions = ["What is 12 + 30 - 7?", "Sort: 9 3 5", "What is 23 * 11?", "x" * 90]
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    engine = Engine(LatentModel.of(model), batch_size=3, eos_token_ids=(), max_chunk=33)
    ours = written(engine, [Sequence(n, prompt, max_tokens=24, seed=0) for n, prompt in enumerate(prompts)])
    for n, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        limits = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = peer.generate(ids, attention_mask=torch.ones_like(ids), **limits)[0, len(prompt) :]
        assert ours[n][0] == wanted.tolist()


# --- what ends a sequence otherwise -----------------------------------------------------------------------------------


def test_a_prompt_that_never_fits_is_told_so_and_the_others_go_on(model: DeepseekV3) -> None:
    engine = Engine(LatentModel.of(model), batch_size=4, eos_token_ids=(), num_pages=2)
    rows = {0: [1] * 128, 1: [1, 2, 3], 2: [], 3: [1] * 127}
    done = {s.key: s for s in engine.run([Sequence(key, row, max_tokens=9, seed=0) for key, row in rows.items()])}
    assert done[0].fault == "the prompt has 128 tokens; the engine takes 127"
    assert done[2].fault == "the prompt has no tokens"
    assert (done[1].fault, len(done[1].generated_ids)) == (None, 9)
    assert (done[3].finish_reason, len(done[3].generated_ids)) == ("length", 2)


def test_cancelled_and_abandoned_sequences_free_their_pages(model: DeepseekV3) -> None:
    engine = Engine(LatentModel.of(model), batch_size=4, eos_token_ids=(), prefix_caching=False)
    for n in range(6):
        engine.add(Sequence(n, [n + 1] * 70, max_tokens=90, seed=n))
    engine.step()
    engine.step()
    held = engine.blocks.num_pages - engine.blocks.num_available
    engine.cancel(1)
    assert engine.blocks.num_pages - engine.blocks.num_available == held - 2
    engine.cancel(5)  # waits
    engine.cancel(77)  # is not there
    texts = engine.run([])
    assert next(texts).key in {0, 2, 3, 4}
    texts.close()
    assert engine.is_idle
    assert engine.blocks.num_available == engine.blocks.num_pages


# --- the operations ---------------------------------------------------------------------------------------------------

POWERS_OF_TWO = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}


def agrees_with_plain(
    config: DeepseekV3Config, num_prompts: int = 5, num_tokens: int = 4, *, speculate: bool = False
) -> None:
    """Kernel forms against plain ones, from the same engine: chunks, shared pages and decoding in each step."""
    model = random_model(config, std=0.1).eval()
    logits: list[list[torch.Tensor]] = []
    texts = []
    for form in (PlainOperations, KernelOperations):
        weights = fuse_weights(model, with_mtp=speculate)
        served = LatentModel(weights, form(weights))
        engine = Engine(served, batch_size=4, eos_token_ids=(), max_chunk=40, num_pages=16, speculate=speculate)
        forward, seen = engine.runner.forward, []
        engine.runner.forward = lambda *given, f=forward, seen=seen: seen.append(f(*given)) or seen[-1]
        prompts = [[7] * 90, [7] * 90, [*[7] * 64, 1, 2], [3, 4], [5] * 70][:num_prompts]
        texts.append(
            written(engine, [Sequence(n, prompt, max_tokens=num_tokens, seed=0) for n, prompt in enumerate(prompts)])
        )
        logits.append(
            [step.logits_ZV.sort(dim=0).values for step in seen]
        )  # rows stand in the order of the device's pages
    assert texts[0] == texts[1]
    for plain, kernel in zip(*logits, strict=True):
        torch.testing.assert_close(kernel, plain, atol=1e-4, rtol=0)  # FP32, other orders of summation


@pytest.mark.parametrize("speculate", [False, True], ids=["one query", "two queries"])
@pytest.mark.parametrize("widths", [{}, POWERS_OF_TWO], ids=["twins", "kernels' own choice"])
def test_kernel_forms_write_what_plain_ones_write(widths: dict[str, int], speculate: bool) -> None:
    agrees_with_plain(tiny_config(max_position_embeddings=512, rope_scaling=None, **widths), speculate=speculate)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
@pytest.mark.parametrize("speculate", [False, True], ids=["one query", "two queries"])
def test_interpreted_kernels_write_what_plain_operations_write(speculate: bool) -> None:
    program = (
        f"from {__name__} import POWERS_OF_TWO, agrees_with_plain, tiny_config\n"
        "small = {'num_hidden_layers': 1, 'first_k_dense_replace': 0}\n"
        "config = tiny_config(max_position_embeddings=512, rope_scaling=None, **POWERS_OF_TWO, **small)\n"
        f"agrees_with_plain(config, num_prompts=3, num_tokens={2 + speculate}, {speculate=})\n"
    )
    search = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": search}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_decoding_reads_few_pieces_in_few_calls() -> None:
    """One call for sequences an extent apart; a shared page is read once for all its sequences."""
    apart = Decodes([[n * EXTENT, n * EXTENT + 1] for n in range(5)], [100] * 5)
    assert [len(group) for group in group_pieces(find_pieces(apart))] == [5]
    shared = Decodes([[0, 1, 4], [0, 1, 8], [0, 1, 12, 13]], [150, 140, 230])
    pieces = find_pieces(shared)
    assert pieces == [Piece(0, 128, (0, 1, 2)), Piece(4, 22, (0,)), Piece(8, 12, (1,)), Piece(12, 102, (2,))]
    assert [len(group) for group in group_pieces(pieces)] == [1, 2, 1]


def test_decode_in_place_equals_attention_over_gathered_pages() -> None:
    """Any pages: scattered, shared, over several extents; places beyond a sequence hold numbers that must not count."""
    model = random_model(tiny_config())
    operations, config = PlainOperations(fuse_weights(model)), model.config
    generator = torch.Generator().manual_seed(1)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    cache_PSE = torch.randn(40, PAGE, width, generator=generator)
    pages = [[0, 1, 2, 3, 9, 17], [0, 1, 2, 3, 11], [0, 20], [24, 25], [28, 29], [32], [39], [0, 1, 5, 4, 7]]
    lengths = [330, 320, 65, 128, 100, 1, 64, 300]
    assert all(len(row) == num_pages_for(length) for row, length in zip(pages, lengths, strict=True))
    query_BHE = torch.randn(len(pages), config.num_attention_heads, width, generator=generator)
    out = operations.decode(query_BHE[:, None], cache_PSE, operations.plan(Decodes(pages, lengths)))[:, 0]
    for row, length, query_HE, found in zip(pages, lengths, query_BHE, out, strict=True):
        entries_UE = cache_PSE[row].flatten(0, 1)[:length]
        wanted = (query_HE @ entries_UE.T).softmax(dim=-1) @ entries_UE[:, : config.kv_lora_rank]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# --- draws that differ in one batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [12, 300])
def test_a_row_is_drawn_by_its_own_settings_whatever_stands_beside_it(num_tokens: int) -> None:
    logits = torch.randn(200, num_tokens, generator=torch.Generator().manual_seed(num_tokens))
    kinds = [*SETTINGS, SamplingParams(1.0), SamplingParams(1.5, 0.7, top_k=100), SamplingParams(0.3, 1.0, min_p=0.01)]
    draws = [kinds[n % len(kinds)] for n in range(200)]
    uniform = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    together = sample(logits, uniform, draws)
    rows = zip(logits, uniform, draws, strict=True)
    assert together == [sample(row[None], [u], [draw])[0] for row, u, draw in rows]


@pytest.mark.parametrize("num_tokens", [12, 300])
def test_limits_cut_in_the_order_of_transformers(num_tokens: int) -> None:
    logits = torch.randn(1, num_tokens, generator=torch.Generator().manual_seed(3)) * 2
    processors = transformers.LogitsProcessorList(
        [
            transformers.TemperatureLogitsWarper(0.9),
            transformers.TopKLogitsWarper(9),
            transformers.TopPLogitsWarper(0.9),
            transformers.MinPLogitsWarper(0.05),
        ]
    )
    wanted = processors(torch.tensor([[1]]), logits).softmax(dim=-1)[0]
    count = 4000
    grid = [(n + 0.5) / count for n in range(count)]
    tokens = torch.tensor(
        sample(logits.expand(count, -1), grid, [SamplingParams(0.9, 0.9, top_k=9, min_p=0.05)] * count)
    )
    shares = torch.bincount(tokens, minlength=num_tokens) / count
    torch.testing.assert_close(shares, wanted, atol=1e-3, rtol=0)


def test_bias_moves_choices_but_not_logprobs(model: DeepseekV3) -> None:
    engine = Engine(LatentModel.of(model), batch_size=4, eos_token_ids=())
    draws = [SamplingParams(top_logprobs=1), SamplingParams(top_logprobs=3, logit_bias=((11, 1e4),)), SamplingParams()]
    done = {
        s.key: s for s in engine.run([Sequence(n, [7, 8], 3, 0, sampling_params=draw) for n, draw in enumerate(draws)])
    }
    assert done[1].generated_ids == [11, 11, 11]
    assert done[0].generated_ids == done[2].generated_ids
    assert done[1].logprobs[0][1][0] == pytest.approx(done[0].logprobs[0][1][0], abs=1e-5)
    assert [len(top) for _, top in done[1].logprobs] == [3, 3, 3]
    assert done[2].logprobs == []
