"""How many sequences an engine has in progress together, where nobody has said it."""

from __future__ import annotations

import torch

from teacher.engine.architecture import Architecture
from teacher.engine.cache import cache_bytes
from teacher.engine.decode_graph import padded

# On a CPU the products of some tens of rows are as fast a row as those of hundreds.
CPU_BATCH_SIZE = 64
# On a GPU more sequences hardly write more tokens together, and each one waits longer.
MOST_TOGETHER = 512
# A sequence's length that the cache should have room for; longer ones pre-empt each other at the worst.
_EXPECTED_TOKENS = 1024
# A step holds a row's logits about so often, in FP32: scaled, as probabilities, in what the operations need besides.
_LOGITS_HELD = 5
_LOGITS_SHARE = 0.1  # of the memory that is free once the weights are there


def fitting_batch_size(
    model: Architecture, vocab_size: int, *, on_cpu: int = CPU_BATCH_SIZE, free_bytes: int | None = None
) -> int:
    """The largest number of sequences, 512 at the most, whose cache and logits have room; `on_cpu` on a CPU.

    `free_bytes` of the device, with the weights there; None: as it says.
    """
    if model.device.type == "cpu":
        return on_cpu
    if free_bytes is None:
        free_bytes = torch.cuda.mem_get_info(model.device)[0]
    tokens = min(_EXPECTED_TOKENS, model.max_positions)
    by_cache = cache_bytes(free_bytes) // (tokens * model.cache_shape.bytes_per_token(model.dtype))
    by_logits = int(_LOGITS_SHARE * free_bytes) // (vocab_size * 4 * _LOGITS_HELD)
    most = min(MOST_TOGETHER, by_cache, by_logits)
    return next((size for size in range(most, 0, -1) if padded(size) == size), 1)  # no graph needs padding for it
