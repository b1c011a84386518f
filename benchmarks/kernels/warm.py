"""Compile every kernel that will be timed, in parallel, into the disk cache: one after the other takes minutes.

A process a case. The experts share one, since their weights fill a part of the device that cannot be had twice.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby

import torch

from benchmarks.kernels.case import Case
from benchmarks.kernels.families import all_cases
from distill.cores import num_cores

MOST_PROCESSES = 12  # each holds a context and a case's inputs
WORTHWHILE = 8  # cases: starting processes takes as long as compiling a few kernels


def warm(cases: Sequence[Case]) -> None:
    """Run each of DeepSeek-V3's cases once, elsewhere. What fails there fails again where it is measured."""
    if len(cases) < WORTHWHILE:
        return
    tasks = [
        names
        for kernel, group in groupby(cases, key=lambda case: case.kernel)
        for names in _tasks(kernel, [case.name for case in group])
    ]
    processes = min(MOST_PROCESSES, num_cores(), len(tasks))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = [name for of_task in pool.map(_run, tasks) for name in of_task]
    print(f"compiled for {len(cases)} cases in {processes} processes" + (f"; failed: {failed}" if failed else ""))


def _tasks(kernel: str, names: list[str]) -> list[list[str]]:
    return [names] if kernel == "routed experts" else [[name] for name in names]


def _run(names: list[str]) -> list[str]:
    """Those that failed."""
    failed = []
    for case in all_cases(toy=False):
        if case.name not in names:
            continue
        try:
            work = case.build(torch.device("cuda"))
            work.run(work.make(0))
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001 - whatever it is, the case's own measurement will meet and report it
            failed.append(case.name)
        torch.cuda.empty_cache()
    return failed
