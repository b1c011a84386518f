"""Every kernel once, at small shapes and checked: what compute-sanitizer can go through in minutes.

compute-sanitizer --tool memcheck python -m benchmarks.kernels.one_pass [--only REGEX]
compute-sanitizer --tool racecheck python -m benchmarks.kernels.one_pass
"""

from __future__ import annotations

import argparse
import re
import sys

import torch

from benchmarks.kernels.families import all_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="of cases: kernel, a space, shape")
    only = parser.parse_args().only
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"benchmarks on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}")
    wrong = 0
    for case in all_cases(toy=True):
        if not re.search(only, case.name):
            continue
        work = case.build(device)
        error = work.checked(work.make(0))
        right = error <= work.tolerance
        wrong += not right
        print(f"{case.name:60s} error {error:.1e} {'' if right else 'WRONG'}", flush=True)
    if wrong:
        sys.exit(f"{wrong} results were wrong")


if __name__ == "__main__":
    main()
