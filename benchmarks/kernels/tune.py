"""Measure the tilings of the dense block-scaled product on this GPU and keep the fastest: `make tune`.

    python -m benchmarks.kernels.tune [--out FILE]

For each shape of a DeepSeek-V3 layer and each number of rows: our fastest tiling, and whether cuBLAS is faster than it.
Results go to teacher/kernels/dense/tables/<gpu>.json, which `teacher.kernels.dense.gemm` reads. A tiling whose result
is wrong is left out, and so is one that the GPU has no room for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.kernels.case import PeerMissing, relative_error
from benchmarks.kernels.dense import TOLERANCE, V3_SHAPES, exact_product, operands, scaled_mm
from benchmarks.kernels.inputs import Operands
from benchmarks.kernels.timing import microseconds, num_sets
from teacher.kernels.dense.gemm import block_gemm
from teacher.kernels.dense.reference import MANY_ROWS, MANY_ROWS_PLAIN, GemmTiling
from teacher.kernels.dense.tables import table_path

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1_024, 4_096)
FEW = 64  # rows: up to here the weights' bytes are the bound, and K may be split
SPLITS = (1, 2, 4, 8)
# Columns, stages, and whether a warp only loads: two or three programs share a multiprocessor.
FEW_ROWS = ((128, 4, False), (64, 4, False), (128, 4, True), (128, 6, True), (64, 4, True), (64, 6, True))
MARGIN = 1.02  # ours is kept unless the library is faster by more than the measurement's noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="instead of teacher/kernels/dense/tables/<gpu>.json")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning needs a GPU: on a CPU the plain-torch twin has nothing to choose")
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    shapes: dict[str, dict[str, Any]] = {}
    work = [(n, k, m) for n, k in V3_SHAPES for m in arguments.rows]
    for n, k, m in track(work, description="tuning"):
        entry = tuned(m, n, k, device)
        shapes.setdefault(f"{n}x{k}", {})[str(m)] = entry
        print(f"{m:5d} x {n}x{k}: {entry['us']:8.1f} us {entry['plan']}, cuBLAS {entry['library_us']}", flush=True)
    table = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gemm": shapes,
    }
    path = arguments.out or table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(path)


def tuned(m: int, n: int, k: int, device: torch.device) -> dict[str, Any]:
    """The fastest of our tilings, its microseconds, cuBLAS's (None where it takes no such shape)."""
    from triton import OutOfResources

    sets = [operands(device, seed, m, n, k) for seed in range(num_sets(n * k + m * k + 2 * m * n, device, least=2))]
    wanted = exact_product(sets[0])
    times: dict[GemmTiling, float] = {}
    for tiling in tilings(m):

        def run(given: Operands, tiling: GemmTiling = tiling) -> torch.Tensor:
            return block_gemm(*given, tiling=tiling)

        try:
            if relative_error(run(sets[0]), wanted) <= TOLERANCE:
                times[tiling] = microseconds(run, sets, device)
        except OutOfResources:
            continue
    best = min(times, key=times.__getitem__)
    peer = scaled_mm(m, device)
    library = None if isinstance(peer, PeerMissing) else microseconds(peer.run, sets, device)
    return {
        "plan": best._asdict(),
        "us": round(times[best], 2),
        "library": library is not None and library * MARGIN < times[best],
        "library_us": library and round(library, 2),
    }


def tilings(m: int) -> Iterator[GemmTiling]:
    if m > FEW:
        yield MANY_ROWS
        yield MANY_ROWS_PLAIN
    if m <= 4 * FEW:
        rows = min(128, max(16, 1 << (m - 1).bit_length()))
        for splits in SPLITS:
            for columns, num_stages, loader in FEW_ROWS:
                if rows * columns <= 128 * 64:  # a program's sums, in the registers of four warps
                    yield GemmTiling(rows, columns, splits, True, num_stages=num_stages, loader=loader)


if __name__ == "__main__":
    main()
