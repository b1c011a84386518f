"""Every kernel of the teacher at DeepSeek-V3's shapes: microseconds, its floor, and its peers.

    python -m benchmarks.kernels [--only REGEX] [--dry-run] [--out DIR]

A result is compared with the kernel's twin before it is timed, in memory that was filled with NaN: a kernel that is
wrong has no time. Times are medians over replays of a CUDA graph whose launches rotate over random inputs that outsize
the L2 cache. The floor is what the bytes take at the speed of a large copy, or the FLOP at the speed of a large matrix
product of their type, whichever is longer; both speeds are measured in the same run. Peers that are not installed, or
that do not take a shape, are left out, and the result says why.

Results go to benchmarks/results/<gpu>/kernels.json. Without a GPU, or with --dry-run, the sizes are toys, the twins run
by the clock, and nothing is written unless --out names a folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import device_name, where_and_when, write_result
from benchmarks.kernels import ceilings as speeds
from benchmarks.kernels.case import Case, Peer, PeerMissing, Work
from benchmarks.kernels.families import all_cases
from benchmarks.kernels.report import Row, heading, line, total
from benchmarks.kernels.timing import microseconds, num_sets
from benchmarks.kernels.warm import warm


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    toy = arguments.dry_run or device.type == "cpu"
    chosen = [case for case in all_cases(toy=toy) if re.search(arguments.only, case.name)]
    if not chosen:
        sys.exit(f"no case matches {arguments.only!r}; the first is {next(all_cases(toy=toy)).name!r}")
    if not toy:
        warm(chosen)
    ceilings = speeds.measure(device)
    header = {
        **where_and_when(device),
        "sizes": "toy" if toy else "DeepSeek-V3",
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        **ceilings._asdict(),
    }
    for name, value in header.items():
        print(f"{name:16s} {value:.4g}" if isinstance(value, float) else f"{name:16s} {value}")
    print("\n" + heading())
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for (_, shape), group in itertools.groupby(chosen, key=lambda case: (case.kernel, case.total)):
        of_group = []
        for case in group:
            row, absent = measured_or_failed(case, ceilings, device)
            of_group.append(row)
            missing = {f"{case.kernel}: {name}": why for name, why in absent.items()} | missing
            print(line(row), flush=True)
        if shape and len(of_group) > 1:
            of_group.append(total(shape, of_group))
            print(line(of_group[-1]), flush=True)
        rows += of_group
    for peer, why in missing.items():
        print(f"left out: {peer}: {why}")
    result = header | {"peers_left_out": missing, "rows": [row.as_json() for row in rows]}
    if arguments.out or not toy:
        path = write_result(
            "kernels", result, device=None if arguments.out else device_name(device), folder=arguments.out
        )
        print(f"\n{path}")
    if failed := [row for row in rows if row.us is None]:
        sys.exit(f"{len(failed)} of {len(rows)} results were wrong")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="of cases: kernel, a space, shape")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes; nothing is written without --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of benchmarks/results/<gpu>")
    return parser.parse_args()


def measured_or_failed(case: Case, ceilings: speeds.Ceilings, device: torch.device) -> tuple[Row, dict[str, str]]:
    """A kernel that does not compile or run is a row of its own: the others are measured all the same."""
    try:
        return measured(case, ceilings, device)
    except Exception as error:  # noqa: BLE001 - reported in the table, and by the exit status
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        unknown = {"floor_us": 0.0, "size_bytes": 0, "flop": 0, "error": float("nan")}
        return Row(kernel=case.kernel, shape=case.shape, us=None, failed=said, **unknown), {}


def measured(case: Case, ceilings: speeds.Ceilings, device: torch.device) -> tuple[Row, dict[str, str]]:
    """The case's row, and the peers that it does without."""
    work = case.build(device)
    floor = ceilings.floor_us(work.size_bytes, work.flop, work.product)
    error = work.checked(work.make(0))
    row = {
        "kernel": case.kernel,
        "shape": case.shape,
        "floor_us": floor,
        "size_bytes": work.size_bytes,
        "flop": work.flop,
        "error": error,
    }
    if not error <= work.tolerance:  # NaN is not
        return Row(us=None, failed=f"error {error:.2e}, at most {work.tolerance:.0e} is right", **row), {}
    sets = [work.make(seed) for seed in range(num_sets(work.size_bytes, device, least=work.least_sets))]
    ours = microseconds(work.run, sets, device)
    peers, missing = peers_of(work, sets, device)
    return Row(us=ours, peers=peers, **row), missing


def peers_of(work: Work, sets: Sequence[Any], device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    times, missing = {}, {}
    for name, peer in work.peers().items():
        try:
            times[name] = peer_time(peer, work, sets, device)
        except PeerMissing as why:
            missing[name] = str(why)
        except Exception as error:  # noqa: BLE001 - another's program; ours go on without it
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return times, missing


def peer_time(peer: Peer | PeerMissing, work: Work, sets: Sequence[Any], device: torch.device) -> float:
    if isinstance(peer, PeerMissing):
        raise peer
    prepared = [peer.prepare(inputs) for inputs in sets] if peer.prepare else sets
    if peer.tolerance is not None:
        error = work.error(peer.run(prepared[0]), sets[0])
        if not error <= peer.tolerance:
            raise PeerMissing(f"its result is another: error {error:.2e}")
    return microseconds(peer.run, prepared, device)


if __name__ == "__main__":
    main()
