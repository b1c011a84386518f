"""The Triton side of `teacher.parallel.exchange.copies.summed`: a token's copies added up in one launch.

Shape legend: N tokens, K experts per token, C copies, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SUM_BLOCK = 1_024


@triton.jit
def _sum(rows_ptr, places_ptr, out_ptr, per_token, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < HIDDEN
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in range(per_token):
        place = tl.load(places_ptr + token * per_token + k)
        if place >= 0:
            total += tl.load(rows_ptr + place.to(tl.int64) * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * HIDDEN + columns, total, mask=inside)


def sum_copies_kernel(rows_CD: Tensor, places_NK: Tensor) -> Tensor:
    """`plan.sum_copies` of rows [C, D] by places [N, K], FP32 [N, D]."""
    (num_tokens, per_token), hidden = places_NK.shape, rows_CD.shape[1]
    out_ND = torch.empty(num_tokens, hidden, dtype=torch.float32, device=rows_CD.device)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(hidden, SUM_BLOCK))
        _sum[grid](rows_CD, places_NK, out_ND, per_token, HIDDEN=hidden, COLUMNS=SUM_BLOCK)
    return out_ND
