"""Decides how many requests to keep in flight: more while that brings more tokens a second, fewer when told so.

A pure controller: it is told what happens and when, and says whether another request may start. No clock, no chance, no
input or output of its own, so that a simulation runs it through an hour in a millisecond.

Three phases. *Growth* doubles the limit as long as the rate of tokens rises with it. Where it does not, the last limit
that helped is the knee: *hold* it, and probe a quarter above it every few windows, because load and answer lengths
change. An *overload* (429, 5xx, a time-out) multiplies the limit by 0.7, once for all requests that were in flight
together, and from there it climbs fast to nine tenths of where it broke and slowly beyond (the idea of CUBIC, RFC
9438).

The rate counts tokens as they stream in, or whole completions where they do not stream. It is taken over a window of
`window_s` seconds in which the limit was used up and as many pieces have come as there are places; the first window
after a change is the new requests' prompts being read, and is not counted.
"""

from __future__ import annotations

BACK_OFF = 0.7
DOUBLE, PROBE = 2.0, 1.25
# A step must bring this share of what it would bring if throughput were proportional: less is noise or the knee.
WORTH_IT = 0.4
HELD_WINDOWS = 8
NEAR_THE_BREAK = 0.9
FAST_CLIMB, SLOW_CLIMB = 1.5, 1.05


class AdaptiveConcurrency:
    """Bounded by 1 and `maximum`. Times are seconds of one monotonic clock, whichever it is."""

    def __init__(self, maximum: int, *, initial: int, window_s: float) -> None:
        self.maximum = maximum
        self.in_flight = 0
        self.paused_until = 0.0
        self._window_s = window_s
        self._limit = float(min(initial, maximum))
        self._growing = True
        self._broke_at: float | None = None
        self._knee: tuple[float, float] | None = None  # the limit that a step started from, and its rate
        self._held = 0
        self._backed_off = float("-inf")
        self._settling = True
        self._opened: float | None = None
        self._tokens = self._pieces = 0
        self._filled = False

    @property
    def limit(self) -> int:
        return max(1, int(self._limit))

    def may_start(self, now: float) -> bool:
        return self.in_flight < self.limit and now >= self.paused_until

    def started(self, now: float) -> None:
        if self.in_flight == 0:  # nothing was asked for a while: that is no window
            self._open_window(now, settling=True)
        self.in_flight += 1
        self._filled = self._filled or self.in_flight >= self.limit

    def ended(self) -> None:
        self.in_flight -= 1

    def produced(self, now: float, tokens: int) -> None:
        """Tokens that have come, in one piece of a stream or as a whole completion."""
        self._tokens += tokens
        self._pieces += 1
        if self._opened is None or now - self._opened < self._window_s or self._pieces < self.limit:
            return
        rate, filled = self._tokens / (now - self._opened), self._filled
        settled = not self._settling
        self._open_window(now)
        if settled and filled:
            self._judge(rate)

    def overloaded(self, now: float, started: float, *, retry_after_s: float = 0.0) -> None:
        """The endpoint refused or did not answer a request that was sent at `started`.

        What was sent before the last back-off says nothing new about the limit since; its wish to be left alone counts.
        """
        self.paused_until = max(self.paused_until, now + retry_after_s)
        if started < self._backed_off:
            return
        self._backed_off = now
        self._broke_at = self._limit
        self._growing = False
        self._set(self._limit * BACK_OFF)
        self._knee = None
        self._open_window(now, settling=True)

    def _judge(self, rate: float) -> None:
        """One settled window under a limit that was used up has given `rate` tokens a second."""
        if self._knee is not None:
            below, rate_below = self._knee
            needed = 1 + WORTH_IT * (self._limit / below - 1)
            if rate < needed * rate_below:
                self._growing, self._knee, self._held = False, None, HELD_WINDOWS
                self._step(below)
                return
            self._knee = None
        if self._held > 0:
            self._held -= 1
            return
        wider = self._wider()
        if wider > self._limit:
            # A climb back to where it broke is not judged by its rate: the break is what limits it.
            self._knee = None if self._broke_at is not None else (self._limit, rate)
            self._step(wider)

    def _wider(self) -> float:
        if self._broke_at is not None and self._limit >= self._broke_at:
            self._broke_at = None
        if self._broke_at is not None:
            fast = self._limit * FAST_CLIMB
            climb = fast if fast <= NEAR_THE_BREAK * self._broke_at else max(self._limit + 1, self._limit * SLOW_CLIMB)
            return min(climb, self.maximum)
        return min(max(self._limit + 1, self._limit * (DOUBLE if self._growing else PROBE)), self.maximum)

    def _step(self, limit: float) -> None:
        self._set(limit)
        self._settling = True

    def _set(self, limit: float) -> None:
        self._limit = min(max(1.0, limit), float(self.maximum))

    def _open_window(self, now: float, *, settling: bool = False) -> None:
        self._opened, self._tokens, self._pieces = now, 0, 0
        self._settling = settling
        self._filled = self.in_flight >= self.limit
