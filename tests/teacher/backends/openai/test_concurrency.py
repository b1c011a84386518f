"""The controller of requests in flight, against models of endpoints on a simulated clock."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given, settings, strategies as st

from teacher.backends.openai.concurrency import BACK_OFF, AdaptiveConcurrency

TOKENS = 100


class Endpoint:
    """Takes `latency_s` for a completion up to `knee` requests at a time; beyond, all share the same throughput.

    More than `most` at a time are refused at once. Service times vary by `noise`.
    """

    def __init__(self, *, knee: int, latency_s: float = 2.0, most: int = 10**9, noise: float = 0.1, seed: int = 0):
        self.knee, self.latency_s, self.most, self.noise = knee, latency_s, most, noise
        self.chance = random.Random(seed)

    def service_s(self, in_flight: int) -> float:
        return self.latency_s * max(1.0, in_flight / self.knee) * self.chance.uniform(1 - self.noise, 1 + self.noise)


def simulate(control: AdaptiveConcurrency, endpoint: Endpoint, seconds: float) -> list[tuple[float, str, int]]:
    """Ask without end for `seconds`; returns (time, what, limit) of every completion and refusal."""
    now, number, history = 0.0, 0, []
    events: list[tuple[float, int, str, float]] = []
    while now < seconds:
        while control.may_start(now):
            number += 1
            control.started(now)
            refused = control.in_flight > endpoint.most
            done = now + (0.01 if refused else endpoint.service_s(control.in_flight))
            heapq.heappush(events, (done, number, "refused" if refused else "done", now))
        if not events:
            now = control.paused_until
            continue
        now, _, what, started = heapq.heappop(events)
        if what == "refused":
            control.overloaded(now, started, retry_after_s=0.5)
        else:
            control.produced(now, TOKENS)
        control.ended()
        history.append((now, what, control.limit))
    return history


def rate(history: list[tuple[float, str, int]], since: float) -> float:
    done = [time for time, what, _ in history if what == "done" and time >= since]
    return TOKENS * len(done) / (history[-1][0] - since)


@pytest.mark.parametrize("knee", [8, 30, 70, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_the_knee_and_stays_near_it(knee: int, seed: int) -> None:
    control = AdaptiveConcurrency(1024, initial=16, window_s=3.0)
    endpoint = Endpoint(knee=knee, seed=seed)
    history = simulate(control, endpoint, 600)
    best = knee / endpoint.latency_s * TOKENS
    assert rate(history, 200) > 0.95 * best
    late = [limit for time, _, limit in history if time > 200]
    assert max(late) <= 2.5 * max(knee, 16), "no more in flight than brings something"


def test_it_grows_to_its_bound_where_nothing_stops_it_and_never_beyond() -> None:
    control = AdaptiveConcurrency(100, initial=16, window_s=3.0)
    history = simulate(control, Endpoint(knee=10_000), 120)
    assert {limit for _, _, limit in history} == {16, 32, 64, 100}
    assert history[-1][2] == 100


@pytest.mark.parametrize("most", [5, 40, 150])
def test_under_a_hard_limit_it_keeps_close_and_is_seldom_refused(most: int) -> None:
    control = AdaptiveConcurrency(1024, initial=16, window_s=3.0)
    endpoint = Endpoint(knee=10_000, most=most)
    history = simulate(control, endpoint, 900)
    assert rate(history, 300) > 0.75 * most / endpoint.latency_s * TOKENS
    refused = sum(what == "refused" for _, what, _ in history)
    assert refused < 0.05 * len(history)


def test_requests_that_were_in_flight_together_count_as_one_overload() -> None:
    control = AdaptiveConcurrency(100, initial=40, window_s=3.0)
    for _ in range(40):
        control.started(1.0)
    for _ in range(40):
        control.overloaded(2.0, 1.0)
        control.ended()
    assert control.limit == int(40 * BACK_OFF)
    control.started(3.0)
    control.overloaded(4.0, 3.0)
    assert control.limit == int(40 * BACK_OFF**2)


def test_nothing_starts_before_the_time_that_was_asked_for() -> None:
    control = AdaptiveConcurrency(10, initial=10, window_s=3.0)
    control.started(0.0)
    control.overloaded(1.0, 0.0, retry_after_s=20.0)
    control.overloaded(2.0, 0.0, retry_after_s=5.0)
    assert not control.may_start(20.9)
    assert control.may_start(21.0)


def test_a_pause_between_two_calls_is_not_taken_for_a_slow_endpoint() -> None:
    control = AdaptiveConcurrency(1024, initial=16, window_s=3.0)
    endpoint = Endpoint(knee=300)
    simulate(control, endpoint, 40)
    before = control.limit
    while control.in_flight:
        control.ended()
    control.started(10_000.0)
    control.produced(10_000.5, TOKENS)
    assert control.limit == before


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 50), st.integers(1, 60), st.lists(st.tuples(st.sampled_from("sdop"), st.floats(0, 9)), max_size=200)
)
def test_whatever_happens_the_limit_stays_within_its_bounds(
    maximum: int, initial: int, events: list[tuple[str, float]]
) -> None:
    control = AdaptiveConcurrency(maximum, initial=initial, window_s=3.0)
    now, starts = 0.0, []
    for what, after in events:
        now += after
        if what == "s" and control.may_start(now):
            control.started(now)
            starts.append(now)
        elif what == "p":
            control.produced(now, 1000)
        elif what in "do" and starts:
            if what == "o":
                control.overloaded(now, starts[0], retry_after_s=after)
            control.ended()
            starts.pop(0)
        assert 1 <= control.limit <= maximum
        assert 0 <= control.in_flight == len(starts) <= maximum
