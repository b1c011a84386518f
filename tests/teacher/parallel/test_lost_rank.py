"""A rank that is killed in the middle of a run: the others end soon, with an error that says why."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from distill.errors import DataError, EnvironmentFault
from teacher.parallel.exchange.dispatch import Exchange
from teacher.parallel.groups import Ranks, opened_ranks
from teacher.parallel.placement.placement import Placement
from tests.teacher.parallel.process_ranks import run_ranks


def exchanging(ranks: Ranks, how: str) -> tuple[str, float]:
    """Until a peer is missed; rank 1 dies, or stops answering, in the tenth turn."""
    exchange = Exchange(ranks, Placement.contiguous(num_experts=6, num_ranks=ranks.num_ranks))
    x, indices, weights = torch.ones(4, 128), torch.arange(4).unsqueeze(1), torch.ones(4, 1)
    for turn in range(1_000):
        last = time.monotonic()
        if ranks.rank == 1 and turn == 10:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # hung: alive, its connections open
        try:
            exchange.combine(exchange.dispatch(x, indices, weights).x_MD, exchange.dispatch(x, indices, weights))
        except EnvironmentFault as fault:
            return str(fault), time.monotonic() - last
    raise AssertionError("nobody was missed")


@pytest.mark.parametrize(("how", "num_ranks"), [("killed", 3), ("hung", 2)])
def test_the_others_end_within_a_minute_and_say_why(tmp_path, how, num_ranks) -> None:
    started = time.monotonic()
    results = run_ranks(exchanging, num_ranks, tmp_path, how, timeout_s=4.0, lost=(1,), wait_for_lost=False)
    assert time.monotonic() - started < 60
    for rank, result in enumerate(results):
        if rank != 1:
            message, waited_s = result
            assert f"rank {rank} lost its peers in an exchange among {num_ranks} ranks" in message
            assert waited_s < 30
            assert "\n" not in message


def test_ranks_that_do_not_come_are_an_error(tmp_path) -> None:
    with (
        pytest.raises(EnvironmentFault, match="the 2 ranks did not meet"),
        opened_ranks(rank=0, num_ranks=2, init_method=f"file://{tmp_path / 'store'}", timeout_s=1.0),
    ):
        pass


def test_nodes_that_are_not_whole_are_refused_before_anybody_waits() -> None:
    with pytest.raises(DataError, match="3 ranks are no whole number of nodes"):
        opened_ranks(rank=0, num_ranks=3, ranks_per_node=2, init_method="tcp://127.0.0.1:1").__enter__()
