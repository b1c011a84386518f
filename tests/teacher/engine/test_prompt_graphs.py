"""Prompts as graphs among sequences that decode: on a CPU, launch by launch, they write what plain steps write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from teacher.engine.engine import Engine
from teacher.engine.prompt_inputs import PromptInputs, shapes_up_to
from teacher.engine.sampler import SamplingParams
from teacher.engine.scheduler import Chunk
from teacher.engine.seats import Seats
from teacher.engine.sequence import Sequence
from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.reference import QUERY_BLOCK
from teacher.models.gqa.gpu import GqaKernels
from teacher.models.gqa.model import GqaModel
from teacher.models.gqa.weights import load_gqa
from teacher.models.latent.model import LatentModel
from teacher.models.latent.weights import fuse_weights
from tests.teacher.engine.test_speculation import Planned
from tests.teacher.models.test_gqa_engine import LLAMA3, prompts, save_random
from tests.teacher.v3_models import random_model, tiny_config

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"head_dim": 16, "hidden_size": 64},
    "qwen3": {"head_dim": 32},
    "llama": {"head_dim": 16, "rope_parameters": LLAMA3},
}
SETTINGS = [
    SamplingParams(),
    SamplingParams(0.8, 0.9),
    SamplingParams(1.0, top_k=5),
    SamplingParams(1.0, min_p=0.1),
]
FEATURES: list[dict[str, Any]] = [
    {},
    {"batch_size": 1},
    {"batch_size": 3},
    {"batch_size": 3, "max_chunk": 33},
    {"num_pages": 9},
    {"num_pages": 9, "prefix_caching": False},
    {"run_ahead": False},
    {"max_step_tokens": 100},
]


class Graphed(GqaKernels):
    """Operations whose steps may be graphs; on a CPU nothing is recorded, and the kernels' twins compute."""

    graphable = True


def requests() -> list[Sequence[int]]:
    """Several samples of each prompt, so that prompts are shared, more than fit a batch at once, of many lengths."""
    return [
        Sequence(n, row, 3 + 31 * (n % 4), seed=n, sampling_params=SETTINGS[n % len(SETTINGS)])
        for n, row in enumerate(row for row in prompts() for _ in range(3))
    ]


def written(engine: Engine, sequences: list[Sequence[int]], before: float = float("nan")) -> dict[int, Any]:
    engine.runner.cache.entries_LPSE.fill_(before)  # what memory may hold before it is written
    done = {sequence.key: sequence for sequence in engine.run(sequences)}
    assert engine.blocks.num_available == engine.blocks.num_pages
    return {key: (sequence.generated_ids, sequence.finish_reason) for key, sequence in done.items()}


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_write_what_steps_write(tmp_path: Path, family: str, features: dict[str, Any]) -> None:
    save_random(tmp_path, family, **FAMILIES[family])
    weights = load_gqa(tmp_path, CPU, torch.float32)
    plain = Engine(GqaModel(weights), batch_size=16, eos_token_ids=[5])
    settings = {"batch_size": 16, "eos_token_ids": [5], "run_ahead": True} | features
    engine = Engine(GqaModel(weights, Graphed(weights)), **settings)
    eager = []
    forward = engine.runner.forward
    engine.runner.forward = lambda chunks, *given: eager.append(chunks) or forward(chunks, *given)
    list(engine.warm_up())
    assert written(engine, requests()) == written(plain, requests())
    # Every step is graphs, unless there is no shape for it (`max_step_tokens`) or a prompt's last token came alone.
    assert not eager or features.keys() & {"max_step_tokens", "max_chunk"}


@pytest.mark.parametrize("features", [{}, {"batch_size": 3}, {"num_pages": 9}], ids=str)
def test_prompts_of_latent_attention_are_graphs_of_their_own(features: dict[str, Any]) -> None:
    """Beside the sequences that decode, up to four of 128 tokens; longer ones and more at once are steps as before."""
    weights = fuse_weights(random_model(tiny_config(max_position_embeddings=512, rope_scaling=None), std=0.1))
    plain = Engine(LatentModel(weights), batch_size=16, eos_token_ids=[5])
    engine = Engine(
        LatentModel(weights, Planned(weights)), **{"batch_size": 16, "eos_token_ids": [5], "run_ahead": True} | features
    )
    assert engine.runner.graphs is not None
    mixed: list[bool] = []
    step = engine.runner.graphs.step
    engine.runner.graphs.step = lambda chunks, before: (
        mixed.append(0 < sum(chunk.count > 1 for chunk in chunks) < len(chunks)) or step(chunks, before)
    )
    # Its twin looks at whole pages, which must hold numbers: a runner with graphs clears them.
    assert written(engine, requests(), before=0.0) == written(plain, requests())
    assert any(mixed), "prompts beside sequences that decode"


def test_what_the_host_has_a_say_in_is_no_graph(tmp_path: Path) -> None:
    """Scores of prompts and of tokens, penalties and biases, among sequences that have none."""
    save_random(tmp_path, "qwen2", **FAMILIES["qwen2"])
    weights = load_gqa(tmp_path, CPU, torch.float32)
    settings = [
        SamplingParams(0.8, top_logprobs=2),
        SamplingParams(0.8, repetition_penalty=1.3),
        SamplingParams(0.8, logit_bias=((5, -9.0),)),
        SamplingParams(0.8, prompt_logprobs=1),
        SamplingParams(0.8),
    ]
    found = []
    for model in (GqaModel(weights), GqaModel(weights, Graphed(weights))):
        engine = Engine(model, batch_size=4, eos_token_ids=[5], run_ahead=True)
        sequences = [
            Sequence(n, row, 12, seed=n, sampling_params=settings[n % len(settings)]) for n, row in enumerate(prompts())
        ]
        done = {sequence.key: sequence for sequence in engine.run(sequences)}
        found.append({n: sequence.generated_ids for n, sequence in done.items()})
        assert all(len(s.prompt_logprobs) == len(s.prompt_ids) - 1 for n, s in done.items() if n % 5 == 3)
    assert found[0] == found[1]


def test_packed_rows_are_those_of_their_prompts() -> None:
    inputs = PromptInputs(4096, 8, CPU)
    counts = [70, 2, 129]
    sequences = [Sequence(n, list(range(100 * n, 100 * n + 200)), 1, seed=0) for n in range(3)]
    for n, sequence in enumerate(sequences):
        sequence.pages, sequence.num_computed = [3 * n + 2, 3 * n, 3 * n + 1], 10 * n
    chunks = [Chunk(sequence, count) for sequence, count in zip(sequences, counts, strict=True)]
    shape = inputs.shape_for(chunks)
    assert shape is not None
    inputs.fill(chunks, shape)
    packed = inputs.of(shape)
    row = 0
    for chunk, (first, end, length) in zip(chunks, packed.queries.spans_K3.tolist(), strict=False):
        assert (first, end, length) == (row, row + chunk.count, chunk.end)
        assert packed.token_ids_R[first:end].tolist() == chunk.token_ids
        places = packed.positions_R[first:end].tolist()
        assert places == list(range(chunk.start, chunk.end))
        pages = chunk.sequence.pages
        assert packed.slots_R[first:end].tolist() == [pages[p // PAGE] * PAGE + p % PAGE for p in places]
        row = end
    assert (packed.slots_R[row:] == -1).all()
    blocks = [(n, first) for n, first in packed.queries.blocks_N2.tolist() if n >= 0]
    covered = [r for n, first in blocks for r in range(first, min(first + QUERY_BLOCK, packed.queries.spans_K3[n, 1]))]
    assert covered == list(range(row))


def test_every_step_of_prompts_has_a_shape() -> None:
    """Whatever is left of a step's budget, for prompts of a page on average; and none beyond the budget's own."""
    inputs = PromptInputs(4096, 1, CPU)
    for rows in (2, 64, 65, 500, 4096):
        chunks = [Chunk(Sequence(n, [7] * min(64, rows - 64 * n), 1, seed=0), 1) for n in range(-(-rows // 64))]
        for chunk in chunks:
            chunk.count = len(chunk.sequence.prompt_ids)
        shape = inputs.shape_for(chunks)
        assert shape is not None
        assert rows <= shape.num_rows < max(2 * rows, 65)
    assert shapes_up_to(100)[-1].num_rows == 128


def test_a_seat_is_that_of_who_has_the_pages() -> None:
    """More sequences than seats, one after another; pages added, given away, and taken again."""
    seats = Seats(2, 4)
    sequences = [Sequence(n, [1], 9, seed=0, sampling_params=SamplingParams(n / 10)) for n in range(5)]
    for n, sequence in enumerate(sequences):
        sequence.pages = [n, n + 10]
        beside = [sequences[n - 1]] if n else []
        assert seats.pages_of([sequence, *beside], 4)[0].tolist() == [n, n + 10, 0, 0]
        sequence.pages.append(n + 20)
        assert seats.pages_of([*beside, sequence], 4)[-1].tolist() == [n, n + 10, n + 20, 0]
        assert seats.settings_of([sequence])[0, 3] == n / 10
        for other in beside:
            other.pages = []  # it has ended
    again = sequences[0]
    again.pages = [5]
    assert seats.pages_of([again, sequences[4]], 4).tolist() == [[5, 0, 0, 0], [4, 14, 24, 0]]
