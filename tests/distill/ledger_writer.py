"""A process that fills a ledger and may be killed, and the traces it writes: `ledger_writer.py LEDGER SEED CREDIT`.

It adds what is missing, in an order of its own, and reports each batch when it is stored. After CREDIT batches it waits
(-1: never), so that a kill always falls into the middle of the work however fast or slow the machine is.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from distill.ledger import Ledger
from distill.records import Trace

BATCH = 8


def trace(index: int, text: str = "") -> Trace:
    return Trace(
        key=f"{index:032x}",
        problem_id=f"{index // 4:032x}",
        sample_index=index % 4,
        text=text or f"<think>\nstep {index} größer ⊢ 𝔸\n</think>\n\n\\boxed{{{index}}}",
        finish_reason="stop",
        num_prompt_tokens=7,
        num_tokens=index,
        teacher="pico",
    )


KEYS = [trace(index).key for index in range(4_000)]


def main(path: Path, seed: int, credit: int) -> None:
    with Ledger.open(path) as ledger:
        missing = ledger.missing(KEYS)
        random.Random(seed).shuffle(missing)
        _say("open")
        for start in range(0, len(missing), BATCH):
            if credit == 0:
                sys.stdin.read()
            credit -= 1
            batch = missing[start : start + BATCH]
            ledger.add(trace(int(key, 16)) for key in batch)
            _say(*batch)
    _say("done")


def _say(*words: str) -> None:
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
