"""Expert parallelism between the GPUs of a node: microseconds of dispatch and combine, beside NCCL's for those bytes.

    python -m benchmarks.parallel [--ranks N] [--only REGEX] [--dry-run] [--out DIR]

DeepSeek-V3's layer: hidden 7,168, 256 experts, eight a token, FP8 out and BF16 back. `throughput` (4,096 tokens a
rank) is training's form, as it is called; `fixed places` (4,096, routed by V3's gate) is serving's, stored to peers'
memory in CUDA graphs, and called without. Results are checked before they are timed: experts that give each token
back times its weight. `FP8 layer` is all of a layer's routed experts, over the ranks, and as its peer on one rank
alone for the same tokens a rank.
Times are medians on the slowest rank. The floor is the bytes that leave a rank at the speed of a large NCCL all-to-all,
measured in the same run. Peers are NCCL's all-to-all, once each way, of the very same bytes.

Each section has processes of its own: one that fails or hangs is reported, and the others run. Results go to
benchmarks/results/<gpu>/parallel.json, those of --only to parallel-part.json. With --dry-run, or with fewer than two
GPUs, the sizes are toys, over gloo on the CPU, and nothing is written unless --out names a folder. NVLink multicast is
switched off, in NCCL and in torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from benchmarks.device import device_name, where_and_when, write_result
from benchmarks.parallel_layer import places_and_layer
from benchmarks.parallel_timing import (
    FULL,
    TOY,
    Row,
    Sizes,
    all_to_all_us,
    exchange_of,
    large_us,
    layer_input,
    row_of,
    scaled,
    slowest_us,
    wrong_by,
)
from teacher.parallel.exchange import wire
from teacher.parallel.groups import Ranks, opened_ranks

SECTION_S = 55.0  # of processes: start, compilation, measurement
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="processes; all GPUs unless told otherwise, two on a CPU")
    parser.add_argument("--only", default="", metavar="REGEX", help="of sections: " + ", ".join(SECTIONS))
    parser.add_argument("--dry-run", action="store_true", help="toy sizes over gloo; nothing is written without --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of benchmarks/results/<gpu>")
    arguments = parser.parse_args()
    toy = arguments.dry_run or torch.cuda.device_count() < 2
    ranks = arguments.ranks or (2 if toy else torch.cuda.device_count())
    chosen = [name for name in SECTIONS if re.search(arguments.only, name)]
    if not chosen:
        sys.exit(f"no section matches {arguments.only!r}; there are {', '.join(SECTIONS)}")
    os.environ.update(NO_MULTICAST)
    rows = [row for name in chosen for row in section_rows(name, ranks, toy=toy)]
    device = torch.device("cpu" if toy else "cuda")
    result = {
        **where_and_when(device),
        "sizes": "toy" if toy else "DeepSeek-V3",
        "nccl": None if toy else ".".join(map(str, torch.cuda.nccl.version())),
        "rows": [asdict(row) for row in rows],
    }
    if arguments.out or not toy:
        path = write_result(
            "parallel-part" if arguments.only else "parallel", result, device=device_name(device), folder=arguments.out
        )
        print(f"\n{path}")
    print_table(result, rows)
    if any(row.failed for row in rows):
        sys.exit(1)


def section_rows(name: str, ranks: int, *, toy: bool) -> list[Row]:
    """Rows that the section measured until it ended, by itself or not."""
    print(f"{name} ...", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "rows.jsonl"
        context = torch.multiprocessing.start_processes(
            run_rank, (name, ranks, toy, folder), nprocs=ranks, join=False, start_method="spawn"
        )
        failed = None
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() - started > SECTION_S:
                    failed = f"did not end within {SECTION_S:.0f} s"
                    break
        except Exception as error:  # noqa: BLE001 - reported in the table, and by the exit status
            lines = [line for line in str(error).splitlines() if line.strip()]
            failed = f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"
            print(error, file=sys.stderr)
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()
        rows = [Row(**json.loads(line)) for line in written.read_text().splitlines()] if written.exists() else []
    if failed:
        rows.append(Row(name, ranks, "-", None, failed=failed))
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


def run_rank(rank: int, name: str, ranks: int, toy: bool, folder: str) -> None:
    device = torch.device("cpu") if toy else torch.device("cuda", rank)
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    with opened_ranks(rank=rank, num_ranks=ranks, init_method=store, device=device, timeout_s=45.0) as opened:
        for row in SECTIONS[name](opened, TOY if toy else FULL):
            if rank == 0:
                with (Path(folder) / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")


# --- sections ---------------------------------------------------------------------------------------------------------


def link(ranks: Ranks, sizes: Sizes) -> Iterator[Row]:
    """NCCL's own speed, the smallest and a large exchange."""
    num_bytes = sizes.large_bytes
    us = large_us(ranks, num_bytes)
    leaving = num_bytes * (ranks.num_ranks - 1)
    yield Row("all-to-all", ranks.num_ranks, f"{num_bytes >> 10} KiB a peer", us, gb_per_s=leaving / us / 1e3)
    yield Row("all-to-all", ranks.num_ranks, "16 B a peer", all_to_all_us(ranks, [16] * ranks.num_ranks, graph=True))


def throughput(ranks: Ranks, sizes: Sizes) -> Iterator[Row]:
    exchange = exchange_of(ranks, sizes)
    tokens = sizes.prefill_tokens
    x, indices, weights = layer_input(ranks, sizes, tokens)
    with torch.no_grad():
        arrived = exchange.dispatch(x, indices, weights)
        error = wrong_by(x, weights, exchange.combine(scaled(arrived.x_MD, arrived), arrived))
        out = torch.randn_like(arrived.x_MD)
        (hop,) = arrived.handles
        parts = wire.layout(sizes.hidden, sizes.per_token, exchange.wire.out)
        for what, run, row_bytes in (
            ("throughput, dispatch", lambda: exchange.dispatch(x, indices, weights).x_MD, parts.row_bytes),
            ("throughput, combine", lambda: exchange.combine(out, arrived), 2 * sizes.hidden),
        ):
            us = slowest_us(ranks, run, graph=False)
            counts = (hop.send, hop.receive) if what.endswith("dispatch") else (hop.receive, hop.send)
            in_bytes = [[count * row_bytes for count in of_peers] for of_peers in counts]
            peer = all_to_all_us(ranks, *in_bytes, graph=False)
            leaving = sum(in_bytes[0]) - in_bytes[0][ranks.rank]
            yield row_of(ranks, sizes, what, tokens, us, leaving, {"all-to-all": peer}, error)


SECTIONS: dict[str, Callable[[Ranks, Sizes], Iterator[Row]]] = {
    "link": link, "throughput": throughput, "places": places_and_layer,
}  # fmt: skip


def print_table(result: dict[str, Any], rows: list[Row]) -> None:
    print(f"\n{result['device']}, torch {result['torch']}, NCCL {result['nccl']}, {result['sizes']} sizes")
    form = "{:30s} {:>5s}  {:26s} {:>10s} {:>9s} {:>7s} {:>8s}  {}"
    print(form.format("what", "ranks", "shape", "us", "floor us", "GB/s", "error", "peers (us)"))
    for row in rows:
        cells = [f"{value:.1f}" if value else "-" for value in (row.us, row.floor_us, row.gb_per_s)]
        error = "-" if row.error is None else f"{row.error:.1e}"
        peers = ", ".join(f"{name} {us:.1f}" for name, us in row.peers.items())
        said = f"FAILED: {row.failed}" if row.failed else peers
        print(form.format(row.what, str(row.ranks), row.shape, *cells, error, said).rstrip())


if __name__ == "__main__":
    main()
