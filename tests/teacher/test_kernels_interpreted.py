"""The kernels under Triton's interpreter, in a process of their own (why: tests/teacher/kernels/conftest.py)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).with_name("kernels")


@pytest.mark.slow
@pytest.mark.timeout(1_200)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
def test_the_kernels_pass_under_the_interpreter() -> None:
    # Beside it other tests end, which leaves the cores to it.
    spread = ["--numprocesses", "auto", "--maxprocesses", "4"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *spread, str(KERNELS)]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment = {**ours, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1_100, check=False)
    assert result.returncode == 0, result.stdout[-8_000:] + result.stderr[-2_000:]
    assert " passed" in result.stdout
