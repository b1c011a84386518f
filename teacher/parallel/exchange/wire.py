"""The form of a token between ranks: one row of bytes with its numbers, their scales, and where it is to go.

Forms: `fp8` is E4M3 in tiles of 1x128 (DeepSeek-V3 arXiv 2412.19437 s.3.3.2), whose scales travel along, 7,392 bytes
for 7,168 numbers; `bf16` and `fp32` are the numbers. On the way out V3 sends FP8, both the tokens of the forward pass
and the gradients of the backward one; on the way back, where sums are formed, BF16 (s.3.3.3).

    numbers | scales FP32 | K slots int32 | K weights FP32 | count int32 | padding to 16 bytes

`count` is for `teacher.parallel.exchange.fixed_places`: how many rows a sender put.

Shape legend: N rows, D hidden, G = D / 128, K experts per token, B bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from teacher.kernels.quantise.quantise import quantise
from teacher.kernels.quantise.reference import Quantised, num_groups
from teacher.model.fp8 import BLOCK

Form = Literal["fp8", "bf16", "fp32"]
DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}
ROW_ALIGNMENT = 16  # bytes: rows are moved in whole words, on a GPU in vectors


@dataclass(frozen=True)
class Wire:
    """The forms out and back. Raises ValueError for FP8 on the way back: partial sums are not rounded that far."""

    out: Form = "fp8"
    back: Form = "bf16"

    def __post_init__(self) -> None:
        if self.out not in DTYPES or self.back not in DTYPES or self.back == "fp8":
            raise ValueError(f"out is one of fp8, bf16, fp32 and back one of bf16, fp32, got {self.out}, {self.back}")


class RowLayout(NamedTuple):
    """End of each part of a row, in bytes."""

    form: Form
    hidden: int
    numbers: int
    scales: int
    slots: int
    weights: int
    row_bytes: int


def layout(hidden: int, per_token: int, form: Form) -> RowLayout:
    """Raises ValueError where FP8's tiles of 128 do not divide `hidden`, or BF16 rows end within a word of 4 bytes."""
    numbers = hidden * DTYPES[form].itemsize
    if numbers % 4:
        raise ValueError(f"rows must be whole words of 4 bytes, got {hidden} numbers in {form}")
    scales = numbers + (4 * num_groups(hidden) if form == "fp8" else 0)
    slots = scales + 4 * per_token
    weights = slots + 4 * per_token
    padded = -(-(weights + 4) // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return RowLayout(form, hidden, numbers, scales, slots, weights, padded)


def pack(x_ND: Tensor, slots_NK: Tensor, weights_NK: Tensor, parts: RowLayout) -> Tensor:
    """uint8 [N, B]."""
    rows_NB = torch.zeros(x_ND.shape[0], parts.row_bytes, dtype=torch.uint8, device=x_ND.device)
    rows_NB[:, parts.scales : parts.slots].view(torch.int32).copy_(slots_NK)
    rows_NB[:, parts.slots : parts.weights].view(torch.float32).copy_(weights_NK)
    _write_numbers(rows_NB, x_ND, parts)
    return rows_NB


def addresses(rows_NB: Tensor, parts: RowLayout) -> tuple[Tensor, Tensor]:
    """(slots, weights), views of the rows."""
    slots_NK = rows_NB[:, parts.scales : parts.slots].view(torch.int32)
    return slots_NK, rows_NB[:, parts.slots : parts.weights].view(torch.float32)


def tail(rows_NB: Tensor, parts: RowLayout) -> Tensor:
    """The count, a view int32 [N]."""
    return rows_NB[:, parts.weights : parts.weights + 4].view(torch.int32)[:, 0]


def pack_numbers(x_ND: Tensor, parts: RowLayout) -> Tensor:
    """Numbers and scales alone, uint8 [N, end of the scales]: gradients know their way already."""
    rows_NB = torch.empty(x_ND.shape[0], parts.scales, dtype=torch.uint8, device=x_ND.device)
    _write_numbers(rows_NB, x_ND, parts)
    return rows_NB


def numbers(rows_NB: Tensor, parts: RowLayout, dtype: torch.dtype) -> Tensor:
    """The rows' numbers, dequantised, [N, D] contiguous in `dtype`."""
    if parts.form != "fp8":
        return rows_NB[:, : parts.numbers].view(DTYPES[parts.form]).to(dtype, copy=True)
    values, scale_inv_NG = quantised(rows_NB, parts)
    tiles = values.to(torch.float32).unflatten(1, (-1, BLOCK)) * scale_inv_NG.unsqueeze(-1)
    return tiles.flatten(1).to(dtype)


def quantised(rows_NB: Tensor, parts: RowLayout) -> Quantised:
    """The rows of form `fp8` as they are, views."""
    values_ND = rows_NB[:, : parts.numbers].view(torch.float8_e4m3fn)
    return Quantised(values_ND, rows_NB[:, parts.numbers : parts.scales].view(torch.float32))


def _write_numbers(rows_NB: Tensor, x_ND: Tensor, parts: RowLayout) -> None:
    if parts.form == "fp8":
        values_ND, scale_inv_NG = quantise(x_ND)
        # In words: single bytes would be copied one a thread.
        rows_NB[:, : parts.numbers].view(torch.int32).copy_(values_ND.view(torch.int32))
        rows_NB[:, parts.numbers : parts.scales].view(torch.float32).copy_(scale_inv_NG)
    else:
        rows_NB[:, : parts.numbers].view(DTYPES[parts.form]).copy_(x_ND)


def gather(rows_NB: Tensor, sources_C: Tensor) -> Tensor:
    """Rows of bytes, moved in words of eight where they divide into them."""
    word = torch.int64 if rows_NB.shape[1] % 8 == 0 else torch.int32
    return rows_NB.view(word).index_select(0, sources_C).view(torch.uint8)
