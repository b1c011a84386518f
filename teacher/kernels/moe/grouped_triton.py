"""The Triton side of `teacher.kernels.moe.training.grouped`. All are bound by memory.

Shape legend: N tokens, K experts per token, P pairs, R rows with padding, T tiles of 128 rows, D columns,
I expert intermediate, B = 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import to_dtype
from teacher.model.fp8 import BLOCK

B = tl.constexpr(BLOCK)
COLUMNS_A_PROGRAM = 1_024


@triton.jit
def _sum_choices(
    rows_ptr, indices_ptr, places_ptr, gates_ptr, out_ptr, width,
    TOP_K: tl.constexpr, COLUMNS: tl.constexpr, PARTIAL: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        counted = inside
        if PARTIAL:  # nobody has written a row for a choice that is served elsewhere
            counted = columns < tl.where(tl.load(indices_ptr + pair) >= 0, width, 0)
        if PLACED:
            row = tl.load(places_ptr + pair).to(tl.int64)
            values = tl.load(rows_ptr + row * width + columns, mask=counted, other=0.0).to(tl.float32)
            total += values * tl.load(gates_ptr + pair)
        else:
            total += tl.load(rows_ptr + pair * width + columns, mask=counted, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, to_dtype(total, out_ptr.dtype.element_ty), mask=inside)


def sum_choices_kernel(
    values: Tensor,
    top_k: int,
    *,
    indices_NK: Tensor | None = None,
    places_P: Tensor | None = None,
    gates_NK: Tensor | None = None,
) -> Tensor:
    """[N, D] from [P, D]; or from rows in another order, times their gates, where each pair's row is given.

    With `indices_NK`, pairs of a negative index are not read.
    """
    num_pairs = values.shape[0] if places_P is None else places_P.numel()
    num_tokens, width = num_pairs // top_k, values.shape[1]
    out = torch.empty(num_tokens, width, dtype=values.dtype, device=values.device)
    _sum_choices[(num_tokens, triton.cdiv(width, COLUMNS_A_PROGRAM))](
        values, indices_NK, places_P, gates_NK, out, width,
        TOP_K=top_k, COLUMNS=COLUMNS_A_PROGRAM, PARTIAL=indices_NK is not None, PLACED=places_P is not None,
    )  # fmt: skip
    return out
