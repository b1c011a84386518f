"""Where the kernels run: on a GPU with FP8 where there is one, else on the CPU under Triton's interpreter.

Triton decides when it is imported whether its own library is interpreted, so interpreted tests need a process in which
`TRITON_INTERPRET=1` was set from the start: `make test-all` starts one for this folder, others pass it over.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)

if not HAS_FP8 and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*test_*.py"]  # in folders below as well


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HAS_FP8 and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="module")
def device() -> str:
    return "cuda" if HAS_FP8 else "cpu"
