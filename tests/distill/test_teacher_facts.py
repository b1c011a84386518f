"""A teacher's facts are shown beside the bar, also while nothing is finished."""

from __future__ import annotations

import threading
from typing import Any

from distill.teacher_facts import with_teacher_facts


class Bar:
    def __init__(self) -> None:
        self.done = 0.0
        self.seen: list[dict[str, Any]] = []
        self.beaten = threading.Event()

    def advance(self, amount: float = 1, **facts: str | float) -> None:
        self.done += amount
        self.seen.append(facts)
        if amount == 0:
            self.beaten.set()


class Silent:
    identity: Any = None

    def generate(self, requests: Any, sampling: Any) -> Any: ...

    def close(self) -> None: ...


class Talking(Silent):
    def facts(self) -> dict[str, str | float]:
        return {"in_flight": 3, "tokens_per_s": 50}


def test_facts_come_with_every_step_and_without_one() -> None:
    bar = Bar()
    with with_teacher_facts(bar, Talking(), beat_s=0.001) as task:
        assert bar.beaten.wait(30)
        task.advance(2, tokens=7, tokens_per_s=1)
    assert bar.done == 2
    assert {"tokens": 7, "tokens_per_s": 50, "in_flight": 3} in bar.seen
    assert {"tokens_per_s": 50, "in_flight": 3} in bar.seen


def test_a_teacher_that_says_nothing_leaves_the_bar_as_it_was() -> None:
    bar = Bar()
    threads = threading.active_count()
    with with_teacher_facts(bar, Silent(), beat_s=0.001) as task:
        assert threading.active_count() == threads
        task.advance(1, tokens=7)
    assert bar.seen == [{"tokens": 7}]
