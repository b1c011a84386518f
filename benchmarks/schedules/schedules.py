"""Pipeline schedules as data: what each rank does in which order. `benchmarks.schedules.simulate` gives them times.

- `one_f_one_b`: 1F1B (arXiv 2104.04473 s.2.2).
- `zero_bubble`: ZB1P, the form of zero-bubble with 1F1B's memory (arXiv 2401.10241 s.2.3, ZB-H1).
- `dual_pipe`: DualPipe (DeepSeek-V3, arXiv 2412.19437 s.3.2.1): micro-batches enter at both ends, every rank holds a
  stage of either direction, and the forward of one direction overlaps the backward of the other.
- `dual_pipe_v`: DualPipe cut in half: the stages run down the ranks and up again, so half the ranks hold the same parts
  with one copy of the parameters.

Stages are numbered along the way of a micro-batch. Work is one micro-batch on one stage: `F` forward, `B` the whole
backward, `I` the gradient of the input alone, `W` that of the weights, which nobody waits for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Work(NamedTuple):
    kind: Kind
    stage: int
    microbatch: int


Action = tuple[Work, ...]  # one piece of work, or a forward and a backward that overlap


@dataclass(frozen=True)
class Schedule:
    """`copies`: how often each stage's parameters are held. `microbatches` counts both directions."""

    name: str
    num_stages: int
    microbatches: int
    copies: int
    actions_by_rank: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.actions_by_rank)


@dataclass(frozen=True)
class Durations:
    """Durations of one micro-batch on one stage, in any unit: forward, whole backward, the weights' share of it, and a
    forward and a backward that overlap. Raises ValueError unless 0 < W < B and all are positive."""

    forward: float = 1.0
    backward: float = 2.0
    weights: float = 1.0
    overlapped: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.weights < self.backward or self.forward <= 0 or self.overlapped <= 0:
            raise ValueError(f"durations must be positive, and weights less than backward, got {self}")

    def of(self, action: Action) -> float:
        if len(action) == 2:
            return self.overlapped
        times = {"F": self.forward, "B": self.backward, "I": self.backward - self.weights, "W": self.weights}
        return times[action[0].kind]


@dataclass(frozen=True)
class StageDurations:
    """Durations of each kind of work on each stage, as measured, say; of a pair the one behind the other."""

    by_work: Mapping[tuple[Kind, int], float]

    def of(self, action: Action) -> float:
        return sum(self.by_work[work.kind, work.stage] for work in action)


class Bound(NamedTuple):
    """The papers' figures of a schedule: idle time of a rank, copies of parameters, activations held at most."""

    bubble: float
    parameters: int
    activations: int


def paper_bound(schedule: Schedule, times: Durations) -> Bound:
    """DeepSeek-V3 table 2. Activations count micro-batches on a stage; PP is the number of stages.

    The simulator agrees exactly for F = B - W = W, whatever F&B takes, and for 1F1B and ZB1P in general, as long as W
    takes no longer than F and B - W.

    DualPipeV is not in the table: the bubble is that of DualPipe with as many stages, the parameters are held once, and
    a rank holds two stages, of half the size each for the same number of ranks.
    """
    depth, t = schedule.num_stages, times
    if schedule.name == "1f1b":
        return Bound((depth - 1) * (t.forward + t.backward), 1, depth)
    if schedule.name == "zb1p":
        return Bound((depth - 1) * (t.forward + t.backward - 2 * t.weights), 1, depth)
    bubble = (depth // 2 - 1) * (t.overlapped + t.backward - 3 * t.weights)
    return Bound(bubble, schedule.copies, depth + 1)


def one_f_one_b(num_ranks: int, microbatches: int) -> Schedule:
    _checked(num_ranks, microbatches, least=num_ranks)
    ranks = []
    for rank in range(num_ranks):
        ahead = num_ranks - rank - 1
        forwards = [(Work("F", rank, m),) for m in range(microbatches)]
        backwards = [(Work("B", rank, m),) for m in range(microbatches)]
        steady = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
        ranks.append((*forwards[:ahead], *steady, *backwards[microbatches - ahead :]))
    return Schedule("1f1b", num_ranks, microbatches, 1, tuple(ranks))


def zero_bubble(num_ranks: int, microbatches: int) -> Schedule:
    """Rank r computes weights' gradients r micro-batches late: inputs' gradients reach the first rank sooner, the end
    of the pipeline has work left, and no rank holds more than 1F1B's first."""
    _checked(num_ranks, microbatches, least=num_ranks)
    ranks = []
    for rank in range(num_ranks):
        ahead = num_ranks - rank - 1
        actions: list[Action] = [(Work("F", rank, m),) for m in range(ahead)]
        for m in range(microbatches):
            if m + ahead < microbatches:
                actions.append((Work("F", rank, m + ahead),))
            actions.append((Work("I", rank, m),))
            if m >= rank:
                actions.append((Work("W", rank, m - rank),))
        actions += [(Work("W", rank, m),) for m in range(microbatches - rank, microbatches)]
        ranks.append(tuple(actions))
    return Schedule("zb1p", num_ranks, microbatches, 1, tuple(ranks))


def dual_pipe(num_ranks: int, microbatches: int) -> Schedule:
    """`microbatches` counts both directions. Raises ValueError unless ranks and micro-batches are even, and the latter
    at least twice the ranks."""
    _checked(num_ranks, microbatches, least=2 * num_ranks)
    if num_ranks % 2 or microbatches % 2:
        raise ValueError(f"ranks and micro-batches must be even, got {num_ranks} and {microbatches}")
    half = microbatches // 2
    ranks = []
    for rank in range(num_ranks):
        # The upper half of the ranks sees the same, its own end being the nearer one.
        mirrored = rank >= num_ranks // 2
        near = num_ranks - 1 - rank if mirrored else rank

        def place(phase: int, m: int, near: int = near, mirrored: bool = mirrored) -> tuple[int, int]:
            stage = near if phase == 0 else num_ranks - 1 - near
            return stage, m + half * ((phase == 1) != mirrored)

        ranks.append(_dual_order(near, num_ranks // 2, half, place))
    return Schedule("dualpipe", num_ranks, microbatches, 2, tuple(ranks))


def dual_pipe_v(num_ranks: int, microbatches: int) -> Schedule:
    """Rank r holds stages r and 2 R - 1 - r. Raises ValueError for fewer micro-batches than twice the ranks."""
    _checked(num_ranks, microbatches, least=2 * num_ranks)
    ranks = []
    for rank in range(num_ranks):

        def place(phase: int, m: int, rank: int = rank) -> tuple[int, int]:
            return (rank if phase == 0 else 2 * num_ranks - 1 - rank), m

        ranks.append(_dual_order(rank, num_ranks, microbatches, place))
    return Schedule("dualpipev", 2 * num_ranks, microbatches, 1, tuple(ranks))


class _DualRank:
    """Actions of a rank that works on two phases: 0 is the one whose micro-batches enter on its side."""

    def __init__(self, place: Callable[[int, int], tuple[int, int]]) -> None:
        self._place = place
        self._next = {kind: [0, 0] for kind in ("F", "B")}
        self._owed: deque[Work] = deque()
        self.actions: list[Action] = []

    def _work(self, kind: Kind, phase: int) -> Work:
        counter = self._next["F" if kind == "F" else "B"]
        stage, microbatch = self._place(phase, counter[phase])
        counter[phase] += 1
        return Work(kind, stage, microbatch)

    def forward(self, phase: int) -> None:
        self.actions.append((self._work("F", phase),))

    def backward(self, phase: int, *, split: bool = False) -> None:
        work = self._work("I" if split else "B", phase)
        self.actions.append((work,))
        if split:
            self._owed.append(work._replace(kind="W"))

    def both(self, forward: int, backward: int) -> None:
        self.actions.append((self._work("F", forward), self._work("B", backward)))

    def weights(self) -> None:
        self.actions.append((self._owed.popleft(),))


def _dual_order(
    near: int, half_ranks: int, microbatches: int, place: Callable[[int, int], tuple[int, int]]
) -> tuple[Action, ...]:
    """The eight steps of DualPipe, for a rank `near` ranks from its end; `microbatches` a phase."""
    far = half_ranks - near - 1
    rank = _DualRank(place)
    for _ in range(2 * far):  # step 1: nF0
        rank.forward(0)
    for _ in range(near + 1):  # step 2: nF0F1
        rank.forward(0)
        rank.forward(1)
    for _ in range(far):  # step 3: nI1W1F1
        rank.backward(1, split=True)
        rank.weights()
        rank.forward(1)
    for turn in range(microbatches - 2 * half_ranks + near + 1):  # step 4: nF0B1F1B0, the main part
        if turn == 0 and far == 0:  # in the middle, this backward waits for that very forward
            rank.forward(0)
            rank.backward(1)
        else:
            rank.both(0, 1)
        rank.both(1, 0)
    for _ in range(far):  # step 5: nB1F1B0
        rank.backward(1)
        rank.both(1, 0)
    split = False
    for turn in range(near + 1):  # step 6: nB1B0; its second half leaves the weights for later
        split |= turn == (near + 1) // 2 and near % 2 == 1
        rank.backward(1, split=split)
        split |= turn == (near + 1) // 2 and near % 2 == 0
        rank.backward(0, split=split)
    for _ in range(far):  # step 7: nWI0
        rank.weights()
        rank.backward(0, split=True)
    for _ in range(near + 1):  # step 8: nW
        rank.weights()
    return tuple(rank.actions)


def _checked(num_ranks: int, microbatches: int, *, least: int) -> None:
    if num_ranks < 1 or microbatches < least:
        raise ValueError(f"{num_ranks} ranks need at least {max(1, least)} micro-batches, got {microbatches}")


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_f_one_b,
    "zb1p": zero_bubble,
    "dualpipe": dual_pipe,
    "dualpipev": dual_pipe_v,
}
