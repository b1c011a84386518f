"""One student on several GPUs or nodes: what `accelerate launch` starts, one process a GPU.

    accelerate launch --config_file students/accelerate/fsdp2.yaml -m students.launch \\
        --student r1-distill-qwen-7b --examples runs/r1/curate/examples.parquet \\
        --out runs/r1/distill/r1-distill-qwen-7b-distilled

`potstill distill` finds the finished folder afterwards and does not train it again. Exit codes as everywhere: 2 for
what was given, 3 for the environment, 4 for a training failure.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from distill.errors import PotstillError
from distill.plain_progress import PlainProgress
from distill.printable import printable
from distill.progress import silent
from students.sft import train_student
from students.zoo import find_student, sft_overrides


def main(argv: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # launchers in the background hand on that it is ignored
    described = "Train one student under accelerate launch."
    parser = argparse.ArgumentParser(prog=f"{__package__}.launch", description=described)
    parser.add_argument("--student", required=True, help="name in the zoo, or path of a student file")
    parser.add_argument("--examples", required=True, help="Parquet file: columns of examples, or messages")
    parser.add_argument("--out", required=True, help="checkpoint folder to write")
    parser.add_argument("--method", choices=("distilled", "direct"), default="distilled")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override of an sft setting")
    options = parser.parse_args(argv)
    try:
        student = find_student(options.student, sft_overrides(options.set))
        first = os.environ.get("RANK", "0") == "0"  # one process speaks for all
        progress = PlainProgress(sys.stderr) if first else silent()
        train_student(student, options.examples, options.method, options.out, seed=options.seed, progress=progress)
    except PotstillError as exc:
        sys.stderr.write(f"{printable(str(exc))}\n")
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
