"""A forward and a backward in turn: the same gradients to the last bit, exchanges in one order on all ranks."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill.progress import silent
from teacher.parallel import turns
from teacher.parallel.groups import Ranks
from teacher.parallel.pipeline import overlapped
from tests.teacher.parallel.process_ranks import needs_gpus, run_ranks
from tests.teacher.parallel.spread_runs import ARCHITECTURE, RECOMPUTES_SPLIT, config_of, missed, spread_run, state_of

LAYOUT = {"pp": 2, "ep": 2, "schedule": "dualpipev", "microbatches": 4}


def steps(name: str, count: int, said: list[str]) -> Callable[[], None]:
    def run() -> None:
        for number in range(count):
            said.append(f"{name}{number}")
            if number < count - 1:
                turns.pass_on()

    return run


@pytest.mark.parametrize(
    ("first", "second", "order", "num_changes"),
    [
        (3, 3, "a0 b0 a1 b1 a2 b2", 5),
        (1, 3, "a0 b0 b1 b2", 1),
        (4, 2, "a0 b0 a1 b1 a2 a3", 4),
        (1, 1, "a0 b0", 1),
    ],
)
def test_turns_change_at_every_exchange_until_one_has_ended(
    first: int, second: int, order: str, num_changes: int
) -> None:
    said: list[str] = []
    assert turns.in_turn(steps("a", first, said), steps("b", second, said)) == num_changes
    assert said == order.split()
    assert not turns.are_taken()


@pytest.mark.parametrize("broken", [(0,), (1,), (0, 1)])
def test_what_breaks_is_raised_when_the_other_has_ended(broken: tuple[int, ...]) -> None:
    said: list[str] = []

    def breaking(name: str) -> Callable[[], None]:
        def run() -> None:
            steps(name, 2, said)()
            raise ValueError(name)

        return run

    parties = [breaking(name) if number in broken else steps(name, 4, said) for number, name in enumerate("ab")]
    with pytest.raises(ValueError, match=r"^[ab]$") as caught:
        turns.in_turn(*parties)
    assert str(caught.value) == "ab"[broken[0]]
    assert len(said) == 4 if len(broken) == 2 else 6
    assert not turns.are_taken()
    turns.pass_on()  # of no effect where nobody takes turns


def test_turns_within_turns_are_refused() -> None:
    with pytest.raises(RuntimeError, match="in turn already"):
        turns.in_turn(lambda: turns.in_turn(lambda: None, lambda: None), lambda: None)


def test_the_other_thread_casts_as_this_one_does() -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.append((threading.get_ident(), (torch.ones(2, 2) @ torch.ones(2, 2)).dtype))

    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            turns.in_turn(look, look)
    assert [dtype for _, dtype in seen] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert len({thread for thread, _ in seen[:2]}) == 2


def trained(ranks: Ranks, is_overlapped: bool, schedule: str) -> tuple[Any, list[int], list[str]]:
    """A run's end; how often the turn changed in each pair; and which thread began each exchange of tokens."""
    layout = LAYOUT | {"schedule": schedule, "overlapped": is_overlapped}
    architecture = ARCHITECTURE | {"first_k_dense_replace": 0}
    changed = {"num_steps": 3, "memory": {"recompute": RECOMPUTES_SPLIT}, "architecture": architecture}
    run = spread_run(ranks, config_of(layout, **changed))
    changes, began, in_turn, exchange = [], [], turns.in_turn, dist.all_to_all_single

    def counting(*both: Any) -> None:
        changes.append(in_turn(*both))

    def noting(*given: Any, async_op: bool = False, **options: Any) -> Any:
        if turns.are_taken():
            began.append(threading.current_thread().name)
        return exchange(*given, async_op=async_op, **options)

    overlapped.turns.in_turn, dist.all_to_all_single = counting, noting  # this process is the test's own
    run.run(silent())
    return state_of(run), changes, began


def numbers(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in ("seconds", "tokens_per_s")} for row in log]


@pytest.mark.slow
def test_overlapped_pairs_learn_what_they_learn_one_behind_the_other(tmp_path: Path) -> None:
    plain = run_ranks(trained, 4, tmp_path / "plain", False, "dualpipev")
    paired = run_ranks(trained, 4, tmp_path / "paired", True, "dualpipev")
    for (wanted, none, _), (found, changes, began) in zip(plain, paired, strict=True):
        assert not none
        assert min(changes) >= 6  # an MoE layer a stage at the least: three exchanges of each
        assert set(began) == {"MainThread", "potstill-second"}
        alternations = sum(a != b for a, b in itertools.pairwise(began))
        assert alternations > 0.6 * len(began)  # the last stage has an MTP module more than the others
        assert numbers(found.log) == numbers(wanted.log)
        assert found.held.keys() == wanted.held.keys()
        for name, tensor in wanted.held.items():
            assert torch.equal(found.held[name], tensor), name
    # Ranks that share experts begin their exchanges in one order.
    assert paired[0][2] == paired[1][2]
    assert paired[2][2] == paired[3][2]


@pytest.mark.gpu
@needs_gpus(1)
def test_overlapped_pairs_learn_the_same_on_gpus(tmp_path: Path) -> None:
    """Within FP32's rounding: sums there have no fixed order."""
    plain = run_ranks(trained, 4, tmp_path / "plain", False, "dualpipev", device="cuda")
    paired = run_ranks(trained, 4, tmp_path / "paired", True, "dualpipev", device="cuda")
    for (wanted, _, _), (found, changes, _) in zip(plain, paired, strict=True):
        assert min(changes) >= 6
        for name, tensor in wanted.held.items():
            torch.testing.assert_close(found.held[name], tensor, atol=1e-4, rtol=1e-4)


def test_nothing_is_paired_where_nothing_travels(tmp_path: Path) -> None:
    for _, changes, _ in run_ranks(trained, 4, tmp_path, True, "1f1b"):
        assert changes == []


def dying(ranks: Ranks) -> tuple[str, float]:
    run = spread_run(ranks, config_of(LAYOUT, num_steps=3))
    in_turn, seen = turns.in_turn, []

    def fatal(first: Callable[[], object], second: Callable[[], object]) -> None:
        seen.append(1)
        if ranks.rank == 1 and len(seen) == 3:

            def die() -> None:
                turns.pass_on()
                os.kill(os.getpid(), signal.SIGKILL)

            in_turn(die, second)
        in_turn(first, second)

    overlapped.turns.in_turn = fatal
    return missed(run)


def test_a_rank_that_dies_in_a_pair_is_missed_by_all(tmp_path: Path) -> None:
    results = run_ranks(dying, 4, tmp_path, timeout_s=50.0, lost=(1,))
    for rank in (0, 2, 3):
        message, waited_s = results[rank]
        assert f"rank {rank} lost its peers" in message
        assert waited_s < 60
