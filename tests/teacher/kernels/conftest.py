"""Where the kernels run: on a GPU with FP8 where there is one, else on the CPU under Triton's interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def device() -> Iterator[str]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        yield "cuda"
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield "cpu"
