"""The routed experts for many tokens an expert: rows gathered by expert, two grouped products, one sum.

    1. each (token, choice) gets a row in its expert's run, to which the token and its scales are copied;
    2. gate and up, SwiGLU and quantisation, down, each over all rows; what is padding alone is skipped;
    3. a token's rows, times their gates, are summed in the order of its choices.

Few tokens an expert are bound by the weights' bytes, and `experts_triton` fuses more; here the tensor cores are the
bound, which the grouped product alone keeps busiest. On Hopper, `experts_gluon` fuses SwiGLU and quantisation into the
first product, and multiplies an expert's last few rows with the tile before them.

Shape legend: N tokens, D hidden, E routed experts, K experts per token, P = N * K pairs, I expert intermediate, R rows
with padding, T tiles of 128 rows, U units, B = 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.device import runs_hopper_kernels
from teacher.kernels.moe.align_triton import align_kernel
from teacher.kernels.moe.grouped_triton import sum_choices_kernel
from teacher.kernels.moe.reference import ExpertWeights, Grouping
from teacher.kernels.moe.route_reference import Choice
from teacher.kernels.moe.units import FULL_UNIT, HALF_UNIT, TAILED_UNIT, UNIT_KINDS
from teacher.kernels.quantise.quantise_triton import swiglu_quantise_kernel
from teacher.kernels.quantise.reference import Quantised, empty_scales
from teacher.model.fp8 import BLOCK

B = tl.constexpr(BLOCK)
FULL, TAILED, HALF, KINDS = (tl.constexpr(kind) for kind in (FULL_UNIT, TAILED_UNIT, HALF_UNIT, UNIT_KINDS))
BYTES_A_STEP = 2_048
GROUPS_A_PROGRAM = 8


def routed_experts_prefill(x: Quantised, choice: Choice, weights: ExpertWeights) -> Tensor:
    """BF16 [N, D]; `teacher.kernels.moe.experts.routed_experts_fp8` has checked the shapes, N is not zero."""
    top_k = choice.indices_NK.shape[1]
    rows_NK = torch.empty_like(choice.indices_NK)
    grouping = align_kernel(choice.indices_NK, choice.load_E, BLOCK, rows_NK=rows_NK)
    rows = spread_tokens(x, choice.indices_NK, rows_NK, grouping.pairs_R)
    products = _products_hopper if runs_hopper_kernels(x.values_MK.device) else _products
    down_RD = products(rows, grouping, weights)
    placed = {"places_P": rows_NK.flatten(), "gates_NK": choice.weights_NK}
    return sum_choices_kernel(down_RD, top_k, indices_NK=choice.indices_NK, **placed)


def _products_hopper(rows: Quantised, grouping: Grouping, weights: ExpertWeights) -> Tensor:
    from teacher.kernels.moe.sm90_experts import TAIL_ROWS, down_hopper, gate_up_hopper

    units = {"experts_T": grouping.experts_T, "units_U": list_units(grouping, TAIL_ROWS)}
    inner = gate_up_hopper(rows, weights.gate_up_E2ID, weights.gate_up_scale_inv, **units)
    out_RD = torch.empty(rows.values_MK.shape, dtype=torch.bfloat16, device=rows.values_MK.device)
    down_hopper(inner, weights.down_EDI, weights.down_scale_inv, out_RD, **units)
    return out_RD


def _products(rows: Quantised, grouping: Grouping, weights: ExpertWeights) -> Tensor:
    gate_up_R2I = _grouped(rows, weights.gate_up_E2ID, weights.gate_up_scale_inv, grouping)
    inner = swiglu_quantise_kernel(gate_up_R2I)
    return _grouped(inner, weights.down_EDI, weights.down_scale_inv, grouping)


def _grouped(rows: Quantised, weight_ENK: Tensor, scale_inv_EPG: Tensor, grouping: Grouping) -> Tensor:
    from teacher.kernels.moe.grouped_gemm_kernels import m_grouped_fp8_kernel

    device = rows.values_MK.device
    out = torch.empty(rows.values_MK.shape[0], weight_ENK.shape[1], dtype=torch.bfloat16, device=device)
    m_grouped_fp8_kernel(rows, weight_ENK, scale_inv_EPG, grouping, out, to_pairs=False, gates_P=None)
    return out


def list_units(grouping: Grouping, tail_rows: int) -> Tensor:
    """int32 [1 + T]: how many units of rows there are, then each one's tile of rows times `UNIT_KINDS` plus its kind.

    A tile that holds at most `tail_rows` of an expert which has another before it is part of that one's unit (kind
    `TAILED_UNIT`); these units come first. `HALF_UNIT` is a tile whose second 64 rows are padding.
    """
    num_experts = grouping.load_E.numel()
    units = torch.empty(1 + grouping.experts_T.numel(), dtype=torch.int32, device=grouping.load_E.device)
    _list_units[(1,)](
        grouping.load_E, units, E=num_experts, E_PADDED=triton.next_power_of_2(num_experts), TAIL=tail_rows
    )
    return units


@triton.jit
def _list_units(load_ptr, units_ptr, E: tl.constexpr, E_PADDED: tl.constexpr, TAIL: tl.constexpr):
    experts = tl.arange(0, E_PADDED)
    load = tl.load(load_ptr + experts, mask=experts < E, other=0)
    tiles = (load + B - 1) // B
    # Tiles are counted as `align_kernel` lays them: each expert's run begins at a multiple of 128 rows.
    first = tl.cumsum(tiles, axis=0) - tiles
    rest = load % B
    tailed = ((load > B) & (rest > 0) & (rest <= TAIL)).to(tl.int32)
    num_tailed = tl.sum(tailed, axis=0)
    # 1. Units with a tail, the longest ones.
    tl.store(units_ptr + tl.cumsum(tailed, axis=0), (first + tiles - 2) * KINDS + TAILED, mask=tailed > 0)
    # 2. All other tiles, an expert's one after another; a tail and the tile before it are in their unit already.
    others = tiles - 2 * tailed
    places = units_ptr + 1 + num_tailed + tl.cumsum(others, axis=0) - others
    for tile in range(tl.max(others, axis=0)):
        half = (tile == tiles - 1) & (rest > 0) & (rest <= B // 2)
        tl.store(places + tile, (first + tile) * KINDS + tl.where(half, HALF, FULL), mask=tile < others)
    # 3. How many there are, which programs read on the device: no host knows the loads.
    tl.store(units_ptr, num_tailed + tl.sum(others, axis=0))


def spread_tokens(x: Quantised, indices_NK: Tensor, rows_NK: Tensor, pairs_R: Tensor) -> Quantised:
    """Each token copied to the rows of its choices; padding stays unwritten.

    A token's program writes its values to all of its rows, a tile's program the scales of all its rows: in either case
    what is written lies together.
    """
    (num_tokens, top_k), hidden, num_rows = indices_NK.shape, x.values_MK.shape[1], pairs_R.numel()
    device, groups = x.values_MK.device, hidden // BLOCK
    values = torch.empty(num_rows, hidden, dtype=torch.float8_e4m3fn, device=device)
    scales = empty_scales(num_rows, groups, device)
    _spread[(num_tokens,)](
        x.values_MK.view(torch.uint8), indices_NK, rows_NK, values.view(torch.uint8), hidden,
        TOP_K=top_k, STEPS=triton.cdiv(hidden, BYTES_A_STEP), STEP=BYTES_A_STEP,
    )  # fmt: skip
    _spread_scales[(triton.cdiv(num_rows, BLOCK), triton.cdiv(groups, GROUPS_A_PROGRAM))](
        x.scale_inv_MG, pairs_R, scales, num_rows, num_tokens * top_k, top_k, groups, x.scale_inv_MG.stride(1),
        scales.stride(1), GROUPS=GROUPS_A_PROGRAM,
    )  # fmt: skip
    return Quantised(values, scales)


@triton.jit
def _spread(
    x_ptr, indices_ptr, rows_ptr, out_ptr, width,
    TOP_K: tl.constexpr, STEPS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    parts = ()
    # Read once into registers, written TOP_K times.
    for step in tl.static_range(STEPS):
        columns = step * STEP + tl.arange(0, STEP)
        parts = parts + (tl.load(x_ptr + token * width + columns, mask=columns < width),)  # noqa: RUF005 - as Triton can
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        reach = tl.where(tl.load(indices_ptr + pair) >= 0, width, 0)  # nothing, for an expert that is elsewhere
        row = tl.load(rows_ptr + pair).to(tl.int64)
        for step in tl.static_range(STEPS):
            columns = step * STEP + tl.arange(0, STEP)
            tl.store(out_ptr + row * width + columns, parts[step], mask=columns < reach)


@triton.jit
def _spread_scales(
    x_scale_ptr, pairs_ptr, out_scale_ptr, num_rows, num_pairs, top_k, num_groups, x_scale_stride, out_scale_stride,
    GROUPS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * B + tl.arange(0, B)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    pairs = tl.load(pairs_ptr + rows, mask=rows < num_rows, other=num_pairs)
    inside = (groups[:, None] < num_groups) & (pairs[None, :] < num_pairs)
    scales = tl.load(x_scale_ptr + groups[:, None] * x_scale_stride + (pairs // top_k)[None, :], mask=inside)
    tl.store(out_scale_ptr + groups[:, None] * out_scale_stride + rows[None, :], scales, mask=inside)
