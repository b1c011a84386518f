"""Students' architectures on a GPU: kernels and CUDA graphs against the plain forms on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from teacher.engine.runner import ModelRunner
from teacher.engine.scheduler import Chunk
from teacher.engine.sequence import Sequence
from teacher.engine.step import in_order
from teacher.models.gqa.gpu import GqaKernels
from teacher.models.gqa.model import GqaModel
from teacher.models.gqa.weights import load_gqa
from tests.teacher.models.test_gqa_engine import LLAMA3, ours, prompts, save_random

KINDS = [
    ("qwen2", {"head_dim": 16, "hidden_size": 64}),
    ("qwen3", {"head_dim": 32}),
    ("llama", {"head_dim": 128, "num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    ("llama", {"head_dim": 12}),  # the twins' own
]
# BF16 against FP32 over two layers of unnormed random weights.
BF16_ERROR = 3e-2
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def logits(model: GqaModel) -> torch.Tensor:
    """Of a step with two sequences that decode and a chunk of a third, after their prompts."""
    runner = ModelRunner(model, num_pages=16)
    sequences = [Sequence(n, prompts()[row], max_tokens=9, seed=0) for n, row in enumerate((1, 4, 5))]
    for n, sequence in enumerate(sequences):
        sequence.pages = list(range(5 * n, 5 * n + 5))
    counts = [5, 130, 200]
    runner.forward(in_order([Chunk(s, count) for s, count in zip(sequences, counts, strict=True)]), [])
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.num_computed = count
    for sequence in sequences[:2]:
        sequence.generated_ids.append(7)
    return runner.forward(in_order([Chunk(s, s.num_left) for s in sequences]), []).logits_ZV.cpu()


@pytest.mark.parametrize(("family", "changes"), KINDS, ids=str)
def test_kernel_forms_compute_what_plain_ones_do(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """On a CPU, where the kernels' twins stand in for them."""
    save_random(tmp_path, family, **changes)
    weights = load_gqa(tmp_path, torch.device("cpu"), torch.float32)
    # FP32, other orders of summation.
    got, wanted = logits(GqaModel(weights, GqaKernels(weights))), logits(GqaModel(weights))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("family", "changes"), KINDS, ids=str)
def test_logits_on_a_gpu(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    save_random(tmp_path, family, **changes)
    wanted = logits(GqaModel.load(tmp_path, torch.device("cpu"))).double()
    for dtype, error in ((torch.float32, 2e-3), (torch.bfloat16, BF16_ERROR)):  # products in TF32 are off by default
        got = logits(GqaModel.load(tmp_path, torch.device("cuda"), dtype)).double()
        assert ((got - wanted).norm() / wanted.norm()) < error


@pytest.mark.gpu
@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("family", "changes"), KINDS[:3], ids=str)
def test_graphs_write_what_steps_write(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    save_random(tmp_path, family, **changes)
    model = GqaModel.load(tmp_path, torch.device("cuda"), torch.float32)
    assert model.graphable
    wanted = ours(GqaModel.load(tmp_path, torch.device("cpu")), prompts())
    for features in ({}, {"cuda_graphs": False}, {"run_ahead": False}, {"num_pages": 10, "max_chunk": 33}):
        assert ours(model, prompts(), **features) == wanted, features
