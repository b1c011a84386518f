from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings

from tests.leftovers import Leftovers

# A deadline is wall time, which a machine that does other things stretches; the suite's timeout bounds whole tests.
# The same examples in every run, so that a change is what turns a test red; `make torture` looks for new ones.
settings.register_profile("potstill", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=2_000)
settings.load_profile("potstill")

LEFTOVERS = Leftovers()
LEFTOVERS.mark()  # before test modules copy the environment


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    LEFTOVERS.look(item.nodeid)
    return result


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Behind everything else that is set up for the whole run."""
    yield
    if left := LEFTOVERS.end():
        pytest.fail("processes were left behind:\n" + "\n".join(left), pytrace=False)
