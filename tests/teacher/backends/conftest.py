from __future__ import annotations

from pathlib import Path

import pytest

from tests.teacher.backends.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """`make_checkpoint(architecture="qwen2", template="plain", ...)` -> a model folder of its own."""

    def make(architecture: str = "qwen2", **settings) -> Path:
        return save_tiny_model(tmp_path_factory.mktemp(f"{architecture}-model"), architecture, **settings)

    return make


@pytest.fixture(scope="session")
def qwen_dir(make_checkpoint) -> Path:
    return make_checkpoint()
