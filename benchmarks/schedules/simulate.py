"""When each rank does what: a schedule's actions in their order, each as soon as what it waits for is there.

A forward waits for the stage before it, a backward for its own forward and for the stage after it, weights' gradients
for the gradient of their input. Transfers take `transfer` between ranks and occupy nobody. What a rank does not work,
from the first action of all to the last, is its bubble. An activation is held from the start of its forward to the end
of the last of its backwards.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.schedules.schedules import Action, Durations, Schedule, StageDurations, Work


class Span(NamedTuple):
    start: float
    end: float
    action: Action


class Timeline(NamedTuple):
    """Spans of every rank in order; the end of the last; idle time and most activations held, rank by rank."""

    schedule: Schedule
    spans_by_rank: tuple[tuple[Span, ...], ...]
    makespan: float
    bubbles: tuple[float, ...]
    activations: tuple[int, ...]

    @property
    def bubble(self) -> float:
        return max(self.bubbles)


def simulate(schedule: Schedule, times: Durations | StageDurations, *, transfer: float = 0.0) -> Timeline:
    """Raises ValueError for an order in which ranks wait for one another for ever."""
    done: dict[tuple[str, int, int], tuple[float, int]] = {}  # work to (end, rank); B counts as I and W
    spans: list[list[Span]] = [[] for _ in schedule.actions_by_rank]
    total = sum(map(len, schedule.actions_by_rank))
    while (count := sum(map(len, spans))) < total:
        for rank, actions in enumerate(schedule.actions_by_rank):
            while len(spans[rank]) < len(actions):
                action = actions[len(spans[rank])]
                waits = [need for work in action for need in _needs(work, schedule.num_stages)]
                if any(need not in done for need in waits):
                    break
                ready = [done[need][0] + (transfer if done[need][1] != rank else 0.0) for need in waits]
                start = max([spans[rank][-1].end if spans[rank] else 0.0, *ready])
                spans[rank].append(Span(start, start + times.of(action), action))
                for work in action:
                    for kind in "IW" if work.kind == "B" else work.kind:
                        done[kind, work.stage, work.microbatch] = spans[rank][-1].end, rank
        if sum(map(len, spans)) == count:
            stuck = [str(actions[len(spans[rank])]) for rank, actions in enumerate(schedule.actions_by_rank)
                     if len(spans[rank]) < len(actions)]  # fmt: skip
            raise ValueError(f"{schedule.name}: ranks wait for one another: {'; '.join(stuck)}")
    makespan = max(of_rank[-1].end for of_rank in spans)
    return Timeline(
        schedule,
        tuple(map(tuple, spans)),
        makespan,
        tuple(makespan - sum(span.end - span.start for span in of_rank) for of_rank in spans),
        tuple(_most_held(of_rank) for of_rank in spans),
    )


def _needs(work: Work, num_stages: int) -> list[tuple[str, int, int]]:
    kind, stage, microbatch = work
    if kind == "F":
        return [("F", stage - 1, microbatch)] if stage else []
    if kind == "W":
        return [("I", stage, microbatch)]
    after = [("I", stage + 1, microbatch)] if stage < num_stages - 1 else []
    return [("F", stage, microbatch), *after]


def _most_held(spans: list[Span]) -> int:
    held = most = 0
    for span in spans:
        kinds = [work.kind for work in span.action]
        held += kinds.count("F")
        most = max(most, held)
        held -= kinds.count("B") + kinds.count("W")
    return most
