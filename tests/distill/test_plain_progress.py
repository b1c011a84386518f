"""Progress in plain lines."""

from __future__ import annotations

import io
import itertools
import threading
import time

import pytest

from distill.plain_progress import PlainProgress, facts_text, seconds_text

QUIET_S = 0.2


def lines_of(stream: io.StringIO, *, at_least: int = 1) -> list[str]:
    """What has been written, once there are so many lines."""
    for _ in range(500):
        if stream.getvalue().count("\n") >= at_least:
            return stream.getvalue().splitlines()
        time.sleep(0.02)
    raise AssertionError(stream.getvalue())


def test_plain_lines_carry_rate_time_left_and_facts() -> None:
    stream = io.StringIO()
    with PlainProgress(stream, quiet_s=QUIET_S).task("generate", 100, done=40, unit="samples") as task:
        task.advance(30, loss=0.123456, state="fine")
        line = lines_of(stream)[0]
    assert line.startswith("  generate: 70/100 samples (70%), ")
    assert " samples/s, " in line
    assert line.endswith(" left, loss=0.1235 state=fine")
    rate = float(line.split(", ")[1].split()[0])
    assert 0 < rate <= 30 / QUIET_S  # what an earlier run had done does not count


def test_a_task_whose_first_step_takes_long_is_not_silent() -> None:
    stream = io.StringIO()
    with PlainProgress(stream, quiet_s=QUIET_S).task("generate", 8, unit="samples") as task:
        task.advance(0, tokens=12, tokens_per_s=1.5)
        first, second = lines_of(stream, at_least=2)[:2]
    assert first == "  generate: 0/8 samples (0%), 0 s so far, tokens=12 tokens_per_s=1.5"
    assert second.startswith("  generate: 0/8 samples (0%), ")


def test_a_task_of_unknown_length_speaks_where_no_other_does() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, quiet_s=QUIET_S)
    with progress.task("eval", None):
        with progress.task("load base", None):
            assert lines_of(stream)[0].startswith("  load base: 0 s so far")
        with progress.task("base gsm8k", 4, unit="samples"):
            lines_of(stream, at_least=stream.getvalue().count("\n") + 1)
        assert "  eval: " not in stream.getvalue()
        lines_of(stream, at_least=stream.getvalue().count("\n") + 1)
        assert stream.getvalue().splitlines()[-1].startswith("  eval: ")


def test_many_short_tasks_are_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr("distill.plain_progress.time.monotonic", lambda: now)
    stream = io.StringIO()
    progress = PlainProgress(stream, quiet_s=10)
    with progress.task("eval", None):
        for number in range(12):
            with progress.task(f"model {number}", 4) as task:
                for _ in range(4):
                    now += 1
                    task.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert all(line.startswith("  model ") for line in lines)


def test_plain_lines_are_rare() -> None:
    stream = io.StringIO()
    with PlainProgress(stream, quiet_s=30).task("eval", 1_000) as task:
        for _ in range(1_000):
            task.advance()
    assert stream.getvalue() == ""


def test_lines_of_a_long_task_become_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr("distill.plain_progress.time.monotonic", lambda: now)
    stream = io.StringIO()
    spoken = []
    with PlainProgress(stream, quiet_s=10).task("train", 10**6) as task:
        for _ in range(7_200):
            now += 1
            task.advance()
            if stream.getvalue().count("\n") > len(spoken):
                spoken.append(now)
    pauses = [later - sooner for sooner, later in itertools.pairwise([1_000.0, *spoken])]
    assert pauses[:5] == [10] * 5
    assert pauses == sorted(pauses)
    assert max(pauses) == 60


def test_no_thread_is_left() -> None:
    progress = PlainProgress(io.StringIO(), quiet_s=0.05)
    for _ in range(3):
        assert not beating()
        with progress.task("a", 1), progress.task("b", None):
            assert len(beating()) == 1


def beating() -> list[threading.Thread]:
    """Threads that speak for open tasks, once those of closed ones have had time to end."""
    of_progress = [thread for thread in threading.enumerate() if thread.name == "progress"]
    for thread in of_progress:
        thread.join(0.5)
    return [thread for thread in of_progress if thread.is_alive()]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (61, "1 min 01 s"),
        (3_599.9, "1 h 00 min"),
        (7_500, "2 h 05 min"),
        (float("inf"), "?"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_facts() -> None:
    assert facts_text({"loss": 1.23456, "step": 12, "lr": 1e-5}) == "loss=1.235 step=12 lr=1e-05"
