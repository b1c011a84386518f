"""Prompts read in halves by GPUs that share experts: what of a half's travelling the other half's arithmetic covers.

    python -m benchmarks.overlap [--moe-layers 2] [--dry-run] [--out DIR]

The slice of DeepSeek-V3 of `benchmarks.serve`, eight prompts of 1,024 tokens a GPU, whole steps and steps in halves
(`teacher.parallel.serving`), then one more run in halves under torch's profiler: kernels of the stream on which tokens
travel, and how much of their time kernels of another stream run too. Barriers, which wait for the other GPU, are
kernels of that stream. Results go to benchmarks/results/<gpu>/overlap.json, and the kernels of one layer in the middle
of the run as overlap.svg beside it. One GPU alone is shared by two ranks: its timeline shows what runs beside what, but
waits are for turns on the GPU, and nothing is said about speed over NVLink; the files are named overlap-one-gpu. With
--dry-run, or without a GPU, the sizes are toys, over gloo on the CPU, where nothing overlaps, and nothing is written
unless --out names a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.device import device_name, where_and_when, write_result
from benchmarks.parallel import NO_MULTICAST
from benchmarks.parallel_serving import device_of, spawn, spread_engine, write
from benchmarks.serve import v3
from teacher.engine.engine import Engine
from teacher.engine.sequence import Sequence
from teacher.parallel.groups import Ranks, opened_ranks

REPEATS = 5


class Kernel(NamedTuple):
    name: str
    stream: int
    start: float  # microseconds
    end: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moe-layers", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes over gloo; nothing is written without --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of benchmarks/results/<gpu>")
    arguments = parser.parse_args()
    toy = arguments.dry_run or not torch.cuda.is_available()
    scale = v3.scale(moe_layers=arguments.moe_layers, batches=[v3.PREFILL], toy=toy)
    num_ranks = max(2, 0 if toy else torch.cuda.device_count())
    os.environ.update(NO_MULTICAST)
    device = torch.device("cpu" if toy else "cuda")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder = Path(scratch) / "v3-slice"
        spawn(write, 1, folder, scale, toy)
        print("weights written", flush=True)
        spawn(_measure, num_ranks, folder, scale, toy)
        result = json.loads((folder / "result.json").read_text())
        drawn = (folder / "overlap.svg").read_text() if not toy else None
    print(json.dumps(result, indent=2))
    about = {
        **where_and_when(device),
        "ranks": num_ranks,
        "sizes": "toy" if toy else "DeepSeek-V3",
        "config": scale.config.to_json(),
    }
    if arguments.out or not toy:
        name = "overlap-one-gpu" if torch.cuda.device_count() == 1 else "overlap"
        path = write_result(name, about | result, device=device_name(device), folder=arguments.out)
        print(path)
        if drawn is not None:
            path.with_suffix(".svg").write_text(drawn)


def _measure(rank: int, num_ranks: int, folder: Path, scale: v3.Scale, toy: bool) -> None:
    torch.set_num_threads(1)
    device = device_of(rank, num_ranks, toy)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(2, scale.config.vocab_size, (v3.PREFILL, scale.context), generator=generator).tolist()
    result: dict[str, Any] = {}
    store = f"file://{folder}/store"
    with opened_ranks(rank=rank, num_ranks=num_ranks, init_method=store, device=device, timeout_s=120) as ranks:
        for in_halves in (False, True):
            engine = spread_engine(folder, ranks, scale, in_halves=in_halves)
            seconds = [_read(engine, ranks, ids) for _ in range(REPEATS + 2)][2:]
            tokens_per_s = num_ranks * v3.PREFILL * scale.context / sorted(seconds)[REPEATS // 2]
            result["in halves" if in_halves else "whole"] = {"tokens_per_s": tokens_per_s, "seconds": seconds}
        if not toy:
            kernels = _profiled(engine, ranks, ids, folder / f"trace-{rank}.json")
            result["overlap"] = _overlap(kernels)
            if rank == 0:
                (folder / "overlap.svg").write_text(_drawn(kernels))
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))


def _read(engine: Engine, ranks: Ranks, prompts: list[list[int]]) -> float:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(ranks.world)
    started = time.perf_counter()
    list(engine.run([Sequence(n, ids, max_tokens=1, seed=n) for n, ids in enumerate(prompts)]))
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _profiled(engine: Engine, ranks: Ranks, prompts: list[list[int]], trace: Path) -> list[Kernel]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        _read(engine, ranks, prompts)
    profiler.export_chrome_trace(str(trace))
    kernels = [
        Kernel(event["name"], event["args"]["stream"], event["ts"], event["ts"] + event["dur"])
        for event in json.loads(trace.read_text())["traceEvents"]
        if event.get("cat") == "kernel"
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def _travel_stream(kernels: list[Kernel]) -> int:
    """The one on which tokens are sent."""
    return next(kernel.stream for kernel in kernels if "dispatch" in kernel.name)


def _overlap(kernels: list[Kernel]) -> dict[str, float]:
    travel = _travel_stream(kernels)
    others = _united([kernel for kernel in kernels if kernel.stream != travel])
    travelling = [kernel for kernel in kernels if kernel.stream == travel]
    covered = sum(
        max(0.0, min(kernel.end, end) - max(kernel.start, start)) for kernel in travelling for start, end in others
    )
    total = sum(kernel.end - kernel.start for kernel in travelling)
    return {
        "travel_ms": total / 1e3,
        "covered_ms": covered / 1e3,
        "covered_share": covered / total,
        "run_ms": (max(kernel.end for kernel in kernels) - kernels[0].start) / 1e3,
    }


def _united(kernels: list[Kernel]) -> list[tuple[float, float]]:
    spans: list[tuple[float, float]] = []
    for kernel in kernels:
        if spans and kernel.start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], kernel.end)
        else:
            spans.append((kernel.start, kernel.end))
    return spans


def _drawn(kernels: list[Kernel]) -> str:
    """From one layer's first dispatch to the next layer's: kernels that compute above, those that travel below."""
    travel = _travel_stream(kernels)
    sent = [kernel for kernel in kernels if kernel.stream == travel and "dispatch" in kernel.name]
    middle = len(sent) // 4 * 2  # two dispatches a layer
    begin, end = sent[middle].start, sent[min(middle + 2, len(sent) - 1)].start
    shown = [kernel for kernel in kernels if kernel.end > begin and kernel.start < end]
    width, scale = 1200, 1200 / (end - begin)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 90}" height="110" font-family="sans-serif" '
        'font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="84" y="16">one layer in halves, {(end - begin) / 1e3:.2f} ms</text>',
        '<text x="6" y="45">compute</text><text x="6" y="80">travel</text>',
    ]
    for kernel in shown:
        left, right = max(kernel.start, begin), min(kernel.end, end)
        top, colour = (64, "#e07b39") if kernel.stream == travel else (29, "#4f8fd6")
        parts.append(
            f'<rect x="{84 + (left - begin) * scale:.2f}" y="{top}" width="{(right - left) * scale:.2f}" height="24" '
            f'fill="{colour}"><title>{escape(kernel.name)} {kernel.end - kernel.start:.1f} us</title></rect>'
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
