"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from pipelines.display import BarProgress, PlainProgress, facts_text, seconds_text


def test_plain_lines_carry_rate_time_left_and_facts() -> None:
    stream = io.StringIO()
    with PlainProgress(stream, quiet_s=0.0).task("generate", 100, done=40, unit="samples") as task:
        time.sleep(0.05)
        task.advance(30, loss=0.123456, state="fine")
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("  generate: 70/100 samples (70%), ")
    assert " samples/s, " in line
    assert line.endswith(" left, loss=0.1235 state=fine")
    rate = float(line.split(", ")[1].split()[0])
    assert 30 / 5 < rate <= 30 / 0.05  # what an earlier run had done does not count


def test_plain_lines_are_rare() -> None:
    stream = io.StringIO()
    with PlainProgress(stream, quiet_s=0.5).task("eval", 1_000) as task:
        for _ in range(1_000):
            task.advance()
        assert stream.getvalue() == ""
        time.sleep(0.51)
        task.advance(0)
        task.advance(0)
    assert stream.getvalue().count("\n") == 1
    assert "1000/1000 it (100%)" in stream.getvalue()


def test_bars_show_every_open_task_and_leave_nothing() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    bars = BarProgress(console)
    with bars.task("outer", 10, unit="models") as outer, bars.task("inner", 4, done=1) as inner:
        inner.advance(1, loss=0.5)
        outer.advance(2.5)
        bars._bars.refresh()
        shown = stream.getvalue()
    assert "outer" in shown
    assert "2.5/10" in shown
    assert "2/4" in shown
    assert "loss=0.5" in shown
    assert not bars._bars.tasks
    assert not bars._bars.live.is_started


def test_bars_come_down_when_a_task_fails() -> None:
    bars = BarProgress(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(ValueError, match="broken"), bars.task("fails", 1):
        raise ValueError("broken")
    assert not bars._bars.live.is_started


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
