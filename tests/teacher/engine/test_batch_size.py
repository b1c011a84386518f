"""The batch that memory allows, where nobody says one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from teacher.engine.batch_size import fitting_batch_size
from teacher.engine.cache import CacheShape

GIB = 1 << 30


def model(num_layers: int, width: int, *, positions: int = 32_768, device: str = "cuda") -> Any:
    return SimpleNamespace(
        device=torch.device(device),
        dtype=torch.bfloat16,
        max_positions=positions,
        cache_shape=CacheShape(num_layers, width),
    )


QWEN_1_5B, QWEN3_8B, SMOL = model(28, 512), model(36, 2048), model(30, 384, positions=8_192)


@pytest.mark.parametrize(
    ("of", "vocab_size", "free_gib", "wanted"),
    [
        (QWEN_1_5B, 151_936, 130, 512),
        (SMOL, 49_152, 130, 512),
        (QWEN3_8B, 151_936, 60, 320),  # 0.8 * 60 GiB over 144 MiB a sequence
        (QWEN_1_5B, 151_936, 8, 224),  # 0.8 * 8 GiB over 28 MiB
        (QWEN_1_5B, 151_936, 2, 48),
        (QWEN3_8B, 151_936, 0.1, 1),
    ],
)
def test_the_batch_is_the_largest_whose_cache_and_logits_have_room(
    of: Any, vocab_size: int, free_gib: float, wanted: int
) -> None:
    free_bytes = int(free_gib * GIB)
    batch = fitting_batch_size(of, vocab_size, free_bytes=free_bytes)
    assert batch == wanted
    cache = batch * min(1024, of.max_positions) * of.cache_shape.bytes_per_token(of.dtype)
    logits = batch * vocab_size * 4 * 5
    assert batch == 1 or cache + logits <= 0.9 * free_bytes


def test_a_wide_vocabulary_bounds_it_too() -> None:
    assert fitting_batch_size(SMOL, 2_000_000, free_bytes=40 * GIB) == 96


def test_a_cpu_has_what_it_is_told() -> None:
    of = model(2, 64, device="cpu")
    assert fitting_batch_size(of, 80) == 64
    assert fitting_batch_size(of, 80, on_cpu=128) == 128
