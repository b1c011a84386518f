"""Serving a slice of DeepSeek-V3 over the GPUs of a node beside one GPU: the same requests for each of them.

    python -m benchmarks.parallel_serving [--moe-layers 2] [--batches 8,32,128] [--dry-run] [--out DIR]

Every GPU decodes sequences of its own and holds its share of the routed experts (`teacher.parallel.serving`); one GPU
alone holds them all. Weights, scenarios and clock are those of `benchmarks.serve`; batches are of one GPU, prompts
differ between GPUs. Times are those of the first rank, which begins and ends with the others. Results go to
benchmarks/results/<gpu>/parallel-serving.json. With --dry-run, or with fewer than two GPUs, the sizes are toys, over
gloo on the CPU, and nothing is written unless --out names a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.device import device_name, where_and_when, write_result
from benchmarks.parallel import NO_MULTICAST
from benchmarks.serve import v3
from teacher.engine.engine import Engine
from teacher.engine.sequence import Sequence
from teacher.kernels.attention.mla_cache import PAGE
from teacher.parallel import groups
from teacher.parallel.groups import Ranks, opened_ranks
from teacher.parallel.serving import load_spread

STEP_TOKENS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moe-layers", type=int, default=2)
    parser.add_argument("--batches", default="8,32,128", help="sequences a GPU")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes over gloo; nothing is written without --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of benchmarks/results/<gpu>")
    arguments = parser.parse_args()
    toy = arguments.dry_run or torch.cuda.device_count() < 2
    batches = [int(batch) for batch in arguments.batches.split(",")]
    scale = v3.scale(moe_layers=arguments.moe_layers, batches=batches, toy=toy)
    num_ranks = 2 if toy else torch.cuda.device_count()
    os.environ.update(NO_MULTICAST)
    results = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder = Path(scratch) / "v3-slice"
        started = time.perf_counter()
        spawn(write, 1, folder, scale, toy)
        print(f"weights written in {time.perf_counter() - started:.0f} s", flush=True)
        for ranks in (1, num_ranks):
            print(f"ranks: {ranks}", flush=True)
            spawn(_measure, ranks, folder, scale, toy)
            results[ranks] = json.loads((folder / "result.json").read_text())
    rows = _rows(results)
    for row in rows:
        step = f"{row['step_ms']:.3f} ms" if row["step_ms"] else "-"
        times = f"{row['times_one']:.2f}x"
        print(f"{row['scenario']:10}{row['ranks']:>3}{row['batch']:>6}{step:>14}{row['tokens_per_s']:>12.0f}/s {times}")
    device = torch.device("cpu" if toy else "cuda")
    result = {
        **where_and_when(device),
        "sizes": "toy" if toy else "DeepSeek-V3",
        "config": scale.config.to_json(),
        "context": scale.context,
        "rows": rows,
    }
    if arguments.out or not toy:
        print(write_result("parallel-serving", result, device=device_name(device), folder=arguments.out))


def spawn(body: Any, num_ranks: int, *given: Any) -> None:
    torch.multiprocessing.start_processes(body, (num_ranks, *given), nprocs=num_ranks, start_method="spawn")


def write(rank: int, num_ranks: int, folder: Path, scale: v3.Scale, toy: bool) -> None:
    v3.write_random(folder, scale.config, device_of(rank, num_ranks, toy))


def spread_engine(folder: Path, ranks: Ranks, scale: v3.Scale, *, in_halves: bool = False) -> Engine:
    """Size of the inboxes for the largest batch; prompts fill steps that are too large for the small inboxes."""
    batch_size = max(scale.batches)
    step_tokens = STEP_TOKENS if ranks.device.type == "cuda" else 4 * scale.context
    sizes = {"batch_size": batch_size, "max_step_tokens": step_tokens}
    model, lockstep = load_spread(folder, ranks, **sizes, in_halves=in_halves)
    num_pages = batch_size * (-(-(scale.context + scale.many) // PAGE) + 1)
    return Engine(model, **sizes, eos_token_ids=(), prefix_caching=False, num_pages=num_pages, lockstep=lockstep)


def _measure(rank: int, num_ranks: int, folder: Path, scale: v3.Scale, toy: bool) -> None:
    torch.set_num_threads(1)
    device, store = device_of(rank, num_ranks, toy), f"file://{folder}/store"
    if num_ranks == 1:
        result = v3.ours(folder, scale, device)
    else:
        with opened_ranks(rank=rank, num_ranks=num_ranks, init_method=store, device=device, timeout_s=300) as ranks:
            engine = spread_engine(folder, ranks, scale)

            def generate(prompts: list[list[int]], num_tokens: int) -> None:
                dist.barrier(ranks.world)
                list(engine.run([Sequence(n, ids, max_tokens=num_tokens, seed=n) for n, ids in enumerate(prompts)]))

            result = v3.timed(generate, scale, seed=rank + 1)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))


def _rows(results: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    alone = results[1]
    for ranks, result in results.items():
        scenarios = [("decode", int(batch), step_s) for batch, step_s in result["decode"].items()]
        for scenario, batch, step_s in [*scenarios, ("prefill", v3.PREFILL, None)]:
            speed = result["prefill"] if step_s is None else batch / step_s
            speed_alone = alone["prefill"] if step_s is None else batch / alone["decode"][str(batch)]
            rows.append(
                {
                    "scenario": scenario,
                    "ranks": ranks,
                    "batch": batch,
                    "step_ms": step_s and 1e3 * step_s,
                    "tokens_per_s": ranks * speed,
                    "times_one": ranks * speed / speed_alone,
                }
            )
    return rows


def device_of(rank: int, num_ranks: int, toy: bool) -> torch.device:
    return torch.device("cpu") if toy else groups.device_of(rank, num_ranks)


if __name__ == "__main__":
    main()
