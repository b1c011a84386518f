"""Where a step's time goes while prompts come and go: the GPU's kernels and gaps, and the host's functions.

    python -m benchmarks.serve.account FOLDER [--batch 512] [--steps 60]

A student's folder, its engine as the native backend opens it, with GSM8K's questions admitted as places get free. After
a start, a window of steps is recorded by torch's profiler, and one as long by cProfile. Printed, not kept: it is for
whoever makes the engine faster.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.generation import held_out_problems
from benchmarks.serve.students import TEMPERATURE, TOP_P, gsm8k, prompts_of
from teacher.backends.native.opening import open_native
from teacher.engine.engine import Engine
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Sequence

LONG_GAP_US = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60, help="of each window; half as many pass before the first")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    backend = open_native(args.folder, batch_size=args.batch, as_student=True)
    engine, count = backend.engine, 4 * args.batch
    assert isinstance(engine, Engine)
    questions = gsm8k(count) if on_gpu else [problem.prompt for problem in held_out_problems(count)]
    drawn = SamplingParams(TEMPERATURE, TOP_P)
    for number, prompt_ids in enumerate(prompts_of(args.folder, questions)):
        engine.add(Sequence(number, prompt_ids, 512, seed=number, sampling_params=drawn))
    for _ in range(args.steps // 2):
        engine.step()
    _record(engine, args.steps, on_gpu)
    _record_host(engine, args.steps)


def _record(engine: Engine, steps: int, on_gpu: bool) -> None:
    computed, written = engine.num_computed_tokens, engine.num_written_tokens
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        if on_gpu:
            torch.cuda.synchronize()
        step_ms = 1e3 * (time.perf_counter() - started) / steps
    computed, written = engine.num_computed_tokens - computed, engine.num_written_tokens - written
    print(
        f"{steps} steps of {step_ms:.2f} ms, {computed / steps:.0f} tokens computed and {written / steps:.0f} written"
    )
    _print_device(recorded, steps)


def _print_device(recorded: Any, steps: int) -> None:
    """Busy share of the device, its longest gaps and what they lie between, and its kernels by time."""
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not spans:
        return
    by_name: Counter[str] = Counter()
    gaps: list[tuple[float, str, str]] = []
    busy, (end, _, last) = 0.0, spans[0]
    for start, stop, name in spans:
        by_name[name] += stop - start
        if start > end:
            gaps.append((start - end, last, name))
            end = start
        if stop > end:
            busy, end, last = busy + stop - end, stop, name
    total = end - spans[0][0]
    long = [gap for gap, _, _ in gaps if gap > LONG_GAP_US]
    print(f"device busy {busy / total:.1%}, {len(spans) / steps:.0f} kernels and copies a step")
    print(f"gaps over {LONG_GAP_US} us: {len(long) / steps:.1f} a step, {sum(long) / steps:.0f} us of it")
    for gap, before, after in sorted(gaps, reverse=True)[:8]:
        print(f"  {gap:8.0f} us between {before[:50]} and {after[:50]}")
    for name, microseconds in by_name.most_common(20):
        print(f"  {microseconds / steps:8.1f} us a step {microseconds / total:6.1%}  {name[:90]}")


def _record_host(engine: Engine, steps: int) -> None:
    recorded = cProfile.Profile()
    with recorded:
        for _ in range(steps):
            engine.step()
    pstats.Stats(recorded).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    main()
