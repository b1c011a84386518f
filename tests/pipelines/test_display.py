"""Progress on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipelines.display import BarProgress


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


def test_a_bar_without_a_total_shows_the_time() -> None:
    stream = io.StringIO()
    bars = BarProgress(Console(file=stream, force_terminal=True, width=120))
    with bars.task("load the teacher", None) as task:
        task.advance(0, read="3 GB")
        bars._bars.refresh()
        shown = stream.getvalue()
    assert "load the teacher" in shown
    assert "0 s so far read=3 GB" in shown


def test_bars_come_down_when_a_task_fails() -> None:
    bars = BarProgress(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(ValueError, match="broken"), bars.task("fails", 1):
        raise ValueError("broken")
    assert not bars._bars.live.is_started
