"""The split that a problem belongs to, decided by the problem itself.

The hash is over the prompt's sorted words, so that two problems with the same numbers in another order fall on the same
side: training and held-out problems are disjoint by construction, whatever seeds drew them.
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal

Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 8  # one problem in eight


def split_of(prompt: str) -> Split:
    """`held_out` for one eighth of all prompts, `train` for the others; order and punctuation of words do not count."""
    words = sorted(re.findall(r"[\w.+*/-]*\w", prompt.lower()))
    digest = hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0 else "train"


def normalise(prompt: str) -> str:
    """The prompt with every run of whitespace as one space: what counts as the same question."""
    return " ".join(prompt.split())
