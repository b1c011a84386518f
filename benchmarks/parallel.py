"""Expert parallelism between the GPUs of a node: microseconds of dispatch and combine, beside NCCL's for those bytes.

    python -m benchmarks.parallel [--ranks N] [--only REGEX] [--dry-run] [--out DIR]

DeepSeek-V3's layer: hidden 7,168, 256 experts, eight a token, FP8 out and BF16 back. `low latency` (128 tokens a rank)
runs in CUDA graphs, stored to peers' memory (symmetric) or by exchanges of a fixed size; `throughput` (4,096 tokens a
rank) as it is called, or, stored to peers' memory, in CUDA graphs. Results are checked before they are timed: experts
that give each token back times its weight.
Times are medians on the slowest rank. The floor is the bytes that leave a rank at the speed of a large NCCL all-to-all,
measured in the same run. Peers are NCCL's all-to-all, once each way, of the very same bytes.

Each section has processes of its own: one that fails or hangs is reported, and the others run. Results go to
benchmarks/results/<gpu>/parallel.json. With --dry-run, or with fewer than two GPUs, the sizes are toys, over gloo on
the CPU, and nothing is written unless --out names a folder. NVLink multicast is switched off, in NCCL and in torch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from benchmarks.device import device_name, driver_version, write_result
from teacher.model.fp8 import BLOCK
from teacher.parallel import wire
from teacher.parallel.dispatch import Exchange
from teacher.parallel.groups import Ranks, opened_ranks
from teacher.parallel.low_latency import LowLatency
from teacher.parallel.placement import Placement
from teacher.parallel.symmetric import SymmetricLowLatency
from teacher.parallel.wire import Wire

SECTION_S = 55.0  # of processes: start, compilation, measurement
LAUNCHES = 10  # in a graph, or between two events
REPLAYS = 20
ERROR = 2**-7  # of the largest number: BF16 on the way back rounds each rank's share by 2^-9 of it, and their sum
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


class Sizes(NamedTuple):
    hidden: int
    experts: int
    per_token: int
    decode_tokens: int
    prefill_tokens: int
    large_bytes: int  # a peer


FULL = Sizes(7168, 256, 8, 128, 4096, 256 << 20)
TOY = Sizes(256, 16, 4, 8, 64, 1 << 16)


@dataclass
class Row:
    what: str
    ranks: int
    shape: str
    us: float | None
    floor_us: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    gb_per_s: float | None = None  # that leave a rank
    error: float | None = None
    failed: str | None = None


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
        "device": device_name(device),
        "sizes": "toy" if toy else "DeepSeek-V3",
        "torch": torch.__version__,
        "nccl": None if toy else ".".join(map(str, torch.cuda.nccl.version())),
        "driver": None if toy else driver_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": [asdict(row) for row in rows],
    }
    if arguments.out or not toy:
        path = write_result("parallel", result, device=device_name(device), folder=arguments.out)
        print(f"\n{path}")
    print_table(result, rows)
    if any(row.failed for row in rows):
        sys.exit(1)


def section_rows(name: str, ranks: int, *, toy: bool) -> list[Row]:
    """What the section measured until it ended, by itself or not."""
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


def low_latency(ranks: Ranks, sizes: Sizes, form: type[LowLatency]) -> Iterator[Row]:
    exchange = exchange_of(ranks, sizes)
    tokens = sizes.decode_tokens
    decode = form(exchange, hidden=sizes.hidden, per_token=sizes.per_token, max_tokens=tokens)
    x, indices, weights = layer_input(ranks, sizes, tokens)
    arrived = decode.dispatch(x, indices, weights)
    error = wrong_by(x, weights, decode.combine(scaled(arrived.x(torch.bfloat16), arrived), arrived))
    if decode.take_overflow():
        raise RuntimeError("overflowed with a capacity of the largest batch")
    out = torch.randn(len(arrived.rows_QB), sizes.hidden, device=ranks.device).to(torch.bfloat16)

    def step() -> Tensor:
        return decode.combine(out, decode.dispatch(x, indices, weights))

    us = slowest_us(ranks, step, graph=True)
    row_bytes = [arrived.parts.row_bytes, 2 * sizes.hidden]
    full = [tokens * num_bytes for num_bytes in row_bytes]
    peer = sum(all_to_all_us(ranks, [num_bytes] * ranks.num_ranks, graph=True) for num_bytes in full)
    yield row_of(
        ranks, sizes, f"low latency, {'symmetric' if form is SymmetricLowLatency else 'exchange'}", tokens, us,
        leaving_bytes(ranks, arrived.places_NK, decode.capacity, sum(row_bytes)), {"all-to-all": peer}, error,
    )  # fmt: skip


def throughput(ranks: Ranks, sizes: Sizes) -> Iterator[Row]:
    exchange = exchange_of(ranks, sizes)
    tokens = sizes.prefill_tokens
    x, indices, weights = layer_input(ranks, sizes, tokens)
    with torch.no_grad():
        arrived = exchange.dispatch(x, indices, weights)
        error = wrong_by(x, weights, exchange.combine(scaled(arrived.x_MD, arrived), arrived))
        out = torch.randn_like(arrived.x_MD)
        (hop,) = arrived.sent
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


def symmetric_throughput(ranks: Ranks, sizes: Sizes) -> Iterator[Row]:
    """The form that stores to peers, for as many tokens: its halves apart, each with its barrier, in CUDA graphs."""
    if ranks.device.type != "cuda":
        return
    tokens = sizes.prefill_tokens
    sized = {"hidden": sizes.hidden, "per_token": sizes.per_token, "max_tokens": tokens}
    form = SymmetricLowLatency(exchange_of(ranks, sizes), **sized)
    x, indices, weights = layer_input(ranks, sizes, tokens)
    arrived = form.dispatch(x, indices, weights)
    error = wrong_by(x, weights, form.combine(scaled(arrived.x(torch.bfloat16), arrived), arrived))
    out = torch.randn(len(arrived.rows_QB), sizes.hidden, device=ranks.device).to(torch.bfloat16)
    sent = per_rank(arrived.places_NK, form.capacity, ranks.num_ranks)
    received = arrived.filled_Q.view(ranks.num_ranks, -1).sum(dim=1).tolist()
    for what, run, row_bytes, counts in (
        ("dispatch", lambda: form.dispatch(x, indices, weights).slots_MK, arrived.parts.row_bytes, (sent, received)),
        ("combine", lambda: form.combine(out, arrived), 2 * sizes.hidden, (received, sent)),
    ):
        us = slowest_us(ranks, run, graph=True)
        in_bytes = [[count * row_bytes for count in of_peers] for of_peers in counts]
        peer = all_to_all_us(ranks, *in_bytes, graph=True)
        leaving = sum(in_bytes[0]) - in_bytes[0][ranks.rank]
        yield row_of(ranks, sizes, f"throughput, symmetric {what}", tokens, us, leaving, {"all-to-all": peer}, error)


SECTIONS: dict[str, Callable[[Ranks, Sizes], Iterator[Row]]] = {}


def _symmetric(ranks: Ranks, sizes: Sizes) -> Iterator[Row]:
    if ranks.device.type == "cuda":
        yield from low_latency(ranks, sizes, SymmetricLowLatency)


def _exchange(ranks: Ranks, sizes: Sizes) -> Iterator[Row]:
    yield from low_latency(ranks, sizes, LowLatency)


SECTIONS |= {
    "link": link, "symmetric": _symmetric, "exchange": _exchange, "throughput": throughput,
    "many-symmetric": symmetric_throughput,
}  # fmt: skip


# --- what they share --------------------------------------------------------------------------------------------------


def exchange_of(ranks: Ranks, sizes: Sizes) -> Exchange:
    placement = Placement.contiguous(num_experts=sizes.experts, num_ranks=ranks.num_ranks)
    return Exchange(ranks, placement, wire=Wire(out="fp8", back="bf16"))


def layer_input(ranks: Ranks, sizes: Sizes, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x BF16, experts drawn evenly, weights that sum to 2.5 (V3's routed_scaling_factor)."""
    generator = torch.Generator().manual_seed(ranks.rank)
    x = torch.randn(tokens, sizes.hidden, generator=generator).to(torch.bfloat16)
    scores, indices = torch.rand(tokens, sizes.experts, generator=generator).topk(sizes.per_token, dim=1)
    weights = 2.5 * scores / scores.sum(dim=1, keepdim=True)
    return x.to(ranks.device), indices.to(ranks.device), weights.to(ranks.device)


def scaled(x_MD: Tensor, arrived: Any) -> Tensor:
    """What experts give that return their token: each row times the sum of this rank's weights."""
    share_M = torch.where(arrived.slots_MK >= 0, arrived.weights_MK, 0.0).sum(dim=1)
    return (x_MD.float() * share_M.unsqueeze(1)).to(torch.bfloat16)


def wrong_by(x: Tensor, weights: Tensor, out: Tensor) -> float:
    """The largest error over the largest number. Raises RuntimeError where it is more than roundings explain."""
    values, scale_inv = wire.quantise(x)
    wanted = values.float() * scale_inv.repeat_interleave(BLOCK, dim=1) * weights.sum(dim=1, keepdim=True)
    error = float((out.float() - wanted).abs().max() / wanted.abs().max())
    if not error <= ERROR:  # NaN is not
        raise RuntimeError(f"the result is wrong: error {error:.2e}, at most {ERROR:.1e} is right")
    return error


def per_rank(places_NK: Tensor, capacity: int, num_ranks: int) -> list[int]:
    """Copies to each."""
    return torch.bincount(places_NK[places_NK >= 0] // capacity, minlength=num_ranks).tolist()


def leaving_bytes(ranks: Ranks, places_NK: Tensor, capacity: int, row_bytes: int) -> int:
    to_others = (places_NK >= 0) & (places_NK // capacity != ranks.rank)
    return int(to_others.sum()) * row_bytes


def row_of(
    ranks: Ranks, sizes: Sizes, what: str, tokens: int, us: float, leaving: int, peers: dict[str, float], error: float
) -> Row:
    bytes_per_us = sizes.large_bytes * (ranks.num_ranks - 1) / large_us(ranks, sizes.large_bytes)
    shape = f"{tokens} x {sizes.hidden}, {sizes.per_token} of {sizes.experts}"
    return Row(what, ranks.num_ranks, shape, us, leaving / bytes_per_us, peers, leaving / us / 1e3, error)


def large_us(ranks: Ranks, num_bytes: int) -> float:
    return all_to_all_us(ranks, [num_bytes] * ranks.num_ranks, graph=False)


def all_to_all_us(ranks: Ranks, send: list[int], receive: list[int] | None = None, *, graph: bool) -> float:
    """Bytes to each rank and from each; equal parts where `receive` is left out."""
    sent = torch.ones(sum(send), dtype=torch.uint8, device=ranks.device)
    received = torch.empty(sum(receive or send), dtype=torch.uint8, device=ranks.device)

    def run() -> Tensor:
        dist.all_to_all_single(received, sent, receive, send if receive else None, group=ranks.world)
        return received

    return slowest_us(ranks, run, graph=graph)


def slowest_us(ranks: Ranks, run: Callable[[], Tensor], *, graph: bool) -> float:
    """Microseconds a call: the median over replays, of the rank that took longest."""
    on_gpu = ranks.device.type == "cuda"
    for _ in range(3):
        run()
    launches = LAUNCHES if on_gpu else 1
    captured = captured_graph(run) if on_gpu and graph else None
    repeated = captured.replay if captured else lambda: [run() for _ in range(launches)]
    times = []
    for _ in range(REPLAYS if on_gpu else 5):
        dist.barrier(ranks.world)
        times.append(elapsed_us(ranks.device, repeated))
    slowest = torch.tensor(statistics.median(times) / launches, device=ranks.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=ranks.world)
    if captured:
        captured.reset()
    return float(slowest)


def captured_graph(run: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events from a thread of its own, which a global capture would forbid.
    with torch.cuda.graph(captured, capture_error_mode="thread_local"):
        for _ in range(LAUNCHES):
            run()
    captured.replay()
    torch.cuda.synchronize()
    return captured


def elapsed_us(device: torch.device, run: Callable[[], object]) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


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
