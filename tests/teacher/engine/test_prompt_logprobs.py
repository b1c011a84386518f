"""Logprobs of the prompt's own tokens: transformers', however the prompt is cut, shared or made to wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from teacher.engine import runner
from teacher.engine.engine import Engine
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Sequence
from teacher.models.load import load_model
from tests.repository import REPOSITORY
from tests.teacher.backends.tiny_models import save_tiny_model
from tests.teacher.v3_models import tiny_config, write_model_folder

# FP32 on both sides; sums are taken in other orders.
TOLERANCE = 1e-4
TOP = 4


@pytest.fixture(scope="module", params=["qwen2", "llama", "pico student", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "pico student":
        return REPOSITORY / "students" / "pico" / "qwen2-0.4m"
    path = tmp_path_factory.mktemp("scored") / "model"
    path.mkdir()
    if request.param == "deepseek_v3":
        write_model_folder(path, tiny_config(max_position_embeddings=512, rope_scaling=None), std=0.1)
        return path
    return save_tiny_model(path, request.param)


def prompts() -> list[list[int]]:
    base = torch.randint(3, 90, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    return [base[:n] for n in (1, 2, 3, 64, 65, 129, 200)] + [base[:129], [*base[:70], 7, 8]]


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[torch.Tensor]:
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        return [peer(torch.tensor([ids])).logits[0].log_softmax(dim=-1) for ids in prompts()]


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"batch_size": 2, "max_chunk": 1},
        {"max_chunk": 7},
        {"max_chunk": 65, "num_pages": 6},
        {"run_ahead": True, "prefix_caching": False},
    ],
    ids=str,
)
def test_they_are_transformers(
    folder: Path, wanted: list[torch.Tensor], features: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SCORED_ROWS", 5)  # many pieces, their edges among the tokens
    engine = Engine(load_model(folder, torch.device("cpu")), **{"batch_size": 16, "eos_token_ids": []} | features)
    scored = SamplingParams(0.7, prompt_logprobs=TOP)
    sequences = [
        Sequence(
            (ids, n), prompt, max_tokens=90, seed=n, sampling_params=scored if ids == "scored" else SamplingParams(0.7)
        )
        for ids in ("plain", "scored")
        for n, prompt in enumerate(prompts())
    ]
    done = {sequence.key: sequence for sequence in engine.run(sequences)}
    assert ("num_pages" in features) <= (engine.scheduler.num_preempted > 0)
    for n, (prompt, logprobs_TV) in enumerate(zip(prompts(), wanted, strict=True)):
        sequence, plain = done["scored", n], done["plain", n]
        assert sequence.generated_ids == plain.generated_ids
        assert plain.prompt_logprobs == []
        assert len(sequence.prompt_logprobs) == len(prompt) - 1
        for place, (own, top) in enumerate(sequence.prompt_logprobs):
            row_V = logprobs_TV[place]
            assert own == pytest.approx(row_V[prompt[place + 1]].item(), abs=TOLERANCE)
            assert [value for _, value in top] == pytest.approx(row_V.topk(TOP).values.tolist(), abs=TOLERANCE)
            assert all(value == pytest.approx(row_V[token].item(), abs=TOLERANCE) for token, value in top)


def test_the_rest_of_a_prompt_and_a_given_token_are_scored(folder: Path, wanted: list[torch.Tensor]) -> None:
    """From a place on, behind pages that others have computed, up to a token that needs no place of its own."""
    model = load_model(folder, torch.device("cpu"))
    engine = Engine(model, batch_size=4, eos_token_ids=[], num_pages=8)
    engine.max_positions = 199  # the longest prompt and its given token have 200
    scored = SamplingParams(top_logprobs=1, prompt_logprobs=1)
    sequences = [
        Sequence((n, start), ids[:-1], 1, 0, scored, scored_from=start, first_ids=ids[-1:])
        for n, ids in enumerate(prompts())
        for start in (0, 63, 64, 100, len(ids) - 2)
        if 0 <= start < len(ids) - 1
    ]
    for sequence in engine.run(sequences):
        (n, start), ids = sequence.key, prompts()[sequence.key[0]]
        logprobs_TV = wanted[n]
        assert (sequence.fault, sequence.generated_ids) == (None, ids[-1:])
        found = [*sequence.prompt_logprobs, *sequence.logprobs]
        assert len(found) == len(ids) - 1 - start
        for place, (own, [(best, value)]) in enumerate(found, start=start):
            assert own == pytest.approx(logprobs_TV[place, ids[place + 1]].item(), abs=TOLERANCE)
            assert value == pytest.approx(logprobs_TV[place, best].item(), abs=TOLERANCE)
            assert value == pytest.approx(logprobs_TV[place].max().item(), abs=TOLERANCE)
    assert engine.num_computed_tokens < sum(len(sequence.prompt_ids) for sequence in sequences), "pages were shared"
    too_long = Sequence("long", prompts()[6], 1, 0, scored)
    (refused,) = engine.run([too_long])
    assert refused.fault == "the prompt has 200 tokens; the engine takes 198"


def test_logits_of_a_long_prompt_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(REPOSITORY / "students" / "pico" / "qwen2-0.2m", torch.device("cpu"))
    asked: list[int] = []
    logits = model.logits

    def counting(x_ZD: torch.Tensor) -> torch.Tensor:
        asked.append(len(x_ZD))
        return logits(x_ZD)

    monkeypatch.setattr(model, "logits", counting)
    engine = Engine(model, batch_size=1, eos_token_ids=[], max_step_tokens=4096)
    prompt = torch.randint(3, 90, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    sequence = Sequence(0, prompt, max_tokens=1, seed=0, sampling_params=SamplingParams(prompt_logprobs=0))
    (done,) = engine.run([sequence])
    assert len(done.prompt_logprobs) == 599
    assert sum(asked) == 600
    assert max(asked) <= runner.SCORED_ROWS
