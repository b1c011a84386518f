"""A server whose teacher spells the question out, and what the tests of HTTP ask of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from teacher.http.app import build_app
from tests.teacher.http.listening import Address, listening
from tests.teacher.http.spelling_teacher import DEFAULTS, SpellingTeacher


@pytest.fixture
def teacher() -> SpellingTeacher:
    return SpellingTeacher()


@pytest.fixture
def address(teacher: SpellingTeacher) -> Iterator[Address]:
    with listening(build_app(teacher, model="pico", sampling=DEFAULTS)) as address:
        yield address
