"""A base and examples that the tests of a module share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.students.tiny_bases import make_base, make_examples


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_examples(tmp_path_factory.mktemp("data") / "examples.parquet", 16)
