"""Batch invariance: a request's logits, bit for bit, and its tokens, whatever is computed beside it and however."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from distill.errors import EnvironmentFault, UserInputError
from teacher.engine.architecture import Architecture
from teacher.engine.engine import Engine
from teacher.engine.runner import ForwardPass
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Sequence
from teacher.models.gqa.model import GqaModel
from teacher.models.gqa.weights import load_gqa
from teacher.models.invariant import arithmetic as invariant
from teacher.models.invariant.models import InvariantGqaModel, InvariantLatentModel
from teacher.models.latent.model import LatentModel
from teacher.models.latent.weights import fuse_weights
from tests.teacher.models.test_gqa_engine import save_random
from tests.teacher.v3_models import random_model, tiny_config

CPU = torch.device("cpu")
PROMPT = torch.randint(6, 60, (150,), generator=torch.Generator().manual_seed(3)).tolist()
NUM_TOKENS = 14


def latent_weights() -> Any:
    config = tiny_config(max_position_embeddings=512, rope_scaling=None, num_hidden_layers=2, v_head_dim=12)
    return fuse_weights(random_model(config, std=0.1).eval(), with_mtp=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Architecture]:
    found: dict[str, Architecture] = {"deepseek_v3": InvariantLatentModel(latent_weights())}
    for family in ("qwen2", "qwen3", "llama"):
        folder = tmp_path_factory.mktemp(family)
        save_random(folder, family, num_key_value_heads=1 if family == "llama" else 2)
        found[family] = InvariantGqaModel(load_gqa(folder, CPU, torch.float32))
    return found


def logits_of(
    model: Architecture, others: list[tuple[list[int], int]], late: int = 0, **features: Any
) -> tuple[list[int], list[torch.Tensor]]:
    """The request's tokens and the logits behind each; `others` are (prompt, tokens), the last `late` come later."""
    engine = Engine(model, **{"batch_size": 8, "eos_token_ids": ()} | features)
    request = Sequence(0, PROMPT, NUM_TOKENS, seed=7, sampling_params=SamplingParams(0.9, 0.95))
    crowd = [
        Sequence(n, row, count, seed=n, sampling_params=SamplingParams(1.0)) for n, (row, count) in enumerate(others, 1)
    ]
    seen: list[torch.Tensor] = []
    take = engine.runner.forward

    def forward(chunks: Any, *given: Any) -> ForwardPass:
        out = take(chunks, *given)
        row = 0
        for chunk in chunks:
            if chunk.sequence is request and chunk.ends_text:
                seen.append(out.logits_ZV[row].clone())
            row += chunk.num_sampled
        return out

    engine.runner.forward = forward
    early = len(crowd) - late
    waiting = [[sequence] for sequence in crowd[early:]]
    for done in engine.run([*crowd[: early // 2], request, *crowd[early // 2 : early]], more=lambda: _next(waiting)):
        assert done.fault is None
    return request.generated_ids, seen


def _next(waiting: list[list[Sequence[int]]]) -> list[Sequence[int]]:
    return waiting.pop(0) if waiting else []


CROWDS = st.lists(
    st.tuples(
        st.one_of(
            st.integers(1, 149).map(lambda n: PROMPT[:n]),
            st.lists(st.integers(6, 59), min_size=1, max_size=120),
            st.just(PROMPT),
        ),
        st.integers(1, 30),
    ),
    max_size=9,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    crowd=CROWDS,
    late=st.integers(0, 4),
    max_chunk=st.sampled_from([1, 7, 64, 100, 512]),
    num_pages=st.sampled_from([None, 10]),
    caching=st.booleans(),
)
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2", "qwen3", "llama"])
def test_a_request_has_the_same_bits_in_every_batch(
    models: dict[str, Architecture],
    family: str,
    crowd: list[tuple[list[int], int]],
    late: int,
    max_chunk: int,
    num_pages: int | None,
    caching: bool,
) -> None:
    alone = logits_of(models[family], [])
    features = {"max_chunk": max_chunk, "num_pages": num_pages, "prefix_caching": caching}
    tokens, logits = logits_of(models[family], crowd, min(late, len(crowd)), **features)
    assert tokens == alone[0]
    # A pre-empted request is read again in chunks; the logits behind its text are then computed once more.
    assert len(logits) == NUM_TOKENS
    assert all(torch.equal(one, other) for one, other in zip(logits, alone[1], strict=True))


def test_the_plain_forms_are_not_invariant(models: dict[str, Architecture]) -> None:
    """Else there were nothing to do, and the test above could not fail."""
    latent = models["deepseek_v3"]
    plain = LatentModel(latent.weights), GqaModel(models["qwen2"].weights)
    for model in plain:
        alone, crowded = logits_of(model, []), logits_of(model, [(PROMPT[:n], 20) for n in (3, 50, 149)])
        assert not all(torch.equal(one, other) for one, other in zip(alone[1], crowded[1], strict=False))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2"])
def test_the_invariant_form_computes_the_same_function(models: dict[str, Architecture], family: str) -> None:
    model = models[family]
    plain = LatentModel(model.weights) if family == "deepseek_v3" else GqaModel(model.weights)
    for one, other in zip(logits_of(model, [])[1][:4], logits_of(plain, [])[1][:4], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)  # FP32, other orders of summation


def test_a_draft_changes_no_bit(models: dict[str, Architecture]) -> None:
    tokens, _ = logits_of(models["deepseek_v3"], [(PROMPT[:30], 9)], speculate=True)
    assert tokens == logits_of(models["deepseek_v3"], [])[0]


def test_only_where_it_is_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(tmp_path, "qwen2")
    with pytest.raises(UserInputError, match=r"batch_invariant.*FP32 on a CPU"):
        InvariantGqaModel(load_gqa(tmp_path, CPU, torch.bfloat16))

    def uneven(x: torch.Tensor, weight_NK: torch.Tensor, tile: int) -> torch.Tensor:
        return (x @ weight_NK.t()) + torch.arange(tile)[:, None]

    monkeypatch.setattr(invariant, "linear", uneven)
    with pytest.raises(EnvironmentFault, match="depends on the row's place"):
        InvariantGqaModel(load_gqa(tmp_path, CPU, torch.float32))


def test_silu_has_the_same_bits_in_any_company() -> None:
    wide = torch.randn(1_000, 2 * 130, generator=torch.Generator().manual_seed(0))
    whole = invariant.silu(wide[:, :130])
    for begin, end in ((0, 1), (3, 10), (100, 999)):
        assert torch.equal(invariant.silu(wide[begin:end, :130]), whole[begin:end])


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2"])
def test_threads_make_no_difference(models: dict[str, Architecture], family: str) -> None:
    alone = logits_of(models[family], [])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        crowded = logits_of(models[family], [(PROMPT[:n], 20) for n in (1, 70, 149)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert crowded[0] == alone[0]
    assert all(torch.equal(one, other) for one, other in zip(crowded[1], alone[1], strict=True))
