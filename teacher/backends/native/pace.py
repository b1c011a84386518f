"""The pace of engines: how fast they read and write, from the first step on, when no answer is finished for minutes."""

from __future__ import annotations

import time
from typing import Protocol

from teacher.engine.engine import EngineCounts


class Counted(Protocol):
    """An engine, or several."""

    @property
    def counts(self) -> EngineCounts: ...


class Pace:
    """Tokens from the moment at which it is made."""

    def __init__(self, engine: Counted) -> None:
        self._engine = engine
        self._before = engine.counts
        self._started = time.monotonic()

    def facts(self) -> dict[str, str | float]:
        """Tokens of prompts that were read, tokens written and how many a second, sequences in progress and waiting."""
        now, elapsed = self._engine.counts, max(time.monotonic() - self._started, 1e-9)
        written = now.num_written_tokens - self._before.num_written_tokens
        computed = now.num_computed_tokens - self._before.num_computed_tokens
        return {
            "prompt_tokens": max(0, computed - written),  # a written token is computed when the next one is
            "tokens": written,
            "tokens_per_s": round(written / elapsed, 1),
            "running": now.num_running,
            "waiting": now.num_waiting,
        }
