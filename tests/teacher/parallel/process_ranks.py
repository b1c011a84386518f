"""Ranks as processes of their own over gloo, or NCCL, forked from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher.parallel.groups import Ranks, device_of, opened_ranks

JOIN_S = 240.0  # two busy cores
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "teacher.train.spread"])


def needs_gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPUs")


# Where there is one GPU alone, ranks share it.
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpus(1)])]


def run_ranks(
    body: Callable[..., Any],
    num_ranks: int,
    folder: Path,
    *arguments: Any,
    ranks_per_node: int | None = None,
    timeout_s: float = 120.0,
    device: str = "cpu",
    lost: tuple[int, ...] = (),
    wait_for_lost: bool = True,
) -> list[Any]:
    """`body(ranks, *arguments)` on every rank; its results in order. Ranks in `lost` may die and give None."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"num_ranks": num_ranks, "ranks_per_node": ranks_per_node, "timeout_s": timeout_s, "device": device}
    processes = [
        _context.Process(target=_one, args=(folder, rank, options, body, arguments), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + JOIN_S
    for rank, process in enumerate(processes):
        if rank in lost and not wait_for_lost:
            continue
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
    results = []
    for rank in range(num_ranks):
        path = folder / f"{rank}.pickle"
        if rank in lost:
            results.append(None)
            continue
        assert path.exists(), f"rank {rank} ended without a result, exit code {processes[rank].exitcode}"
        results.append(pickle.loads(path.read_bytes()))
    failures = [result for result in results if isinstance(result, str) and result.startswith("Traceback")]
    assert not failures, "\n".join(failures)
    return results


def _one(folder: Path, rank: int, options: dict[str, Any], body: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    try:
        device = "cpu" if options["device"] == "cpu" else device_of(rank, options["num_ranks"])
        options = options | {"device": device, "init_method": f"file://{folder / 'store'}"}
        with opened_ranks(rank=rank, **options) as ranks:
            result = body(ranks, *arguments)
    except BaseException:  # noqa: BLE001 - reported by the test
        result = traceback.format_exc()
    written = folder / f"{rank}.part"
    written.write_bytes(pickle.dumps(result))
    written.rename(folder / f"{rank}.pickle")


def own(ranks: Ranks, whole: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """This rank's rows of a tensor that all ranks made alike, on its device."""
    return whole.split(sizes)[ranks.rank].to(ranks.device)
