"""The Triton side of `teacher.kernels.moe.reference.align_twin`: rows for pairs, an expert's pairs in their order.

For few pairs one launch does all, a program for each expert that looks at every pair. For many, that would be a long
walk: three launches count each chunk of pairs, add the counts before it, and place its pairs.

Shape legend: N tokens, K experts per token, P = N * K pairs, E routed experts, R rows with padding, T tiles of rows,
C chunks of pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.moe.reference import Grouping, num_rows

FEW_PAIRS = 4_096
PAIRS_A_STEP = 1_024
PAIRS_A_CHUNK = 256
EXPERTS_A_PROGRAM = 8
FILLED_A_STEP = 1_024


def align_kernel(indices_NK: Tensor, load_E: Tensor, rows_a_tile: int, *, rows_NK: Tensor | None = None) -> Grouping:
    """Do as `teacher.kernels.moe.reference.align_twin`; `load_E` is the router's count of each expert's pairs.

    `rows_NK` int32 is filled with each pair's row; pairs that no expert here serves stay unwritten.
    """
    num_pairs, num_experts = indices_NK.numel(), load_E.numel()
    length = num_rows(num_pairs, num_experts, rows_a_tile)
    num_tiles = length // rows_a_tile
    pairs = torch.empty(length, dtype=torch.int32, device=indices_NK.device)
    experts = torch.empty(num_tiles, dtype=torch.int32, device=indices_NK.device)
    sizes = {"E": num_experts, "E_PADDED": triton.next_power_of_2(num_experts), "ROWS": rows_a_tile}
    placed = rows_NK is not None
    if num_pairs <= FEW_PAIRS:
        _align[(num_experts + 1,)](
            indices_NK, load_E, pairs, experts, rows_NK, num_pairs, num_tiles, STEP=PAIRS_A_STEP, PLACED=placed, **sizes
        )
        return Grouping(pairs, experts, load_E)
    chunks = triton.cdiv(num_pairs, PAIRS_A_CHUNK)
    ranks_P = torch.empty(num_pairs, dtype=torch.int32, device=indices_NK.device)
    counts_CE = torch.empty(chunks, num_experts, dtype=torch.int32, device=indices_NK.device)
    _count[(chunks,)](
        indices_NK, ranks_P, counts_CE, pairs, experts, num_pairs, length, num_tiles,
        E=num_experts, E_PADDED=sizes["E_PADDED"], CHUNK=PAIRS_A_CHUNK, STEP=FILLED_A_STEP, num_warps=8,
    )  # fmt: skip
    _begin[(triton.cdiv(num_experts, EXPERTS_A_PROGRAM),)](
        load_E, counts_CE, experts, chunks, EXPERTS=EXPERTS_A_PROGRAM, CHUNKS=triton.next_power_of_2(chunks), **sizes
    )
    _place[(chunks,)](
        indices_NK, ranks_P, counts_CE, pairs, rows_NK, num_pairs, E=num_experts, CHUNK=PAIRS_A_CHUNK, PLACED=placed
    )
    return Grouping(pairs, experts, load_E)


@triton.jit
def _align(
    indices_ptr, load_ptr, pairs_ptr, experts_ptr, rows_ptr, num_pairs, num_tiles,
    E: tl.constexpr, E_PADDED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """A program an expert, and one for what is left of the tiles. Rank within an expert is the order of the pairs."""
    me = tl.program_id(0)
    experts = tl.arange(0, E_PADDED)
    # Where an expert's tiles begin follows from the loads before it: no program waits for another.
    tiles_E = (tl.load(load_ptr + experts, mask=experts < E, other=0) + ROWS - 1) // ROWS
    first_tile = tl.sum(tl.where(experts < me, tiles_E, 0), axis=0)
    steps = tl.arange(0, STEP)
    if me == E:
        # The extra program: tiles without an expert, rows without a pair.
        for begin in range(first_tile, num_tiles, STEP):
            tl.store(experts_ptr + begin + steps, tl.full((STEP,), -1, tl.int32), mask=begin + steps < num_tiles)
        for begin in range(first_tile * ROWS, num_tiles * ROWS, STEP):
            rest = begin + steps
            tl.store(pairs_ptr + rest, tl.zeros((STEP,), tl.int32) + num_pairs, mask=rest < num_tiles * ROWS)
    else:
        mine = tl.sum(tl.where(experts == me, tiles_E, 0), axis=0)
        # 1. This expert's tiles.
        for begin in range(0, mine, STEP):
            tl.store(
                experts_ptr + first_tile + begin + steps, tl.zeros((STEP,), tl.int32) + me, mask=begin + steps < mine
            )
        row = first_tile * ROWS
        # 2. Its pairs in their order: a pair's row follows from how many of the expert's came before it.
        for begin in range(0, num_pairs, STEP):
            pairs = begin + steps
            chosen = tl.load(indices_ptr + pairs, mask=pairs < num_pairs, other=-1) == me
            rank = tl.cumsum(chosen.to(tl.int32), axis=0)
            tl.store(pairs_ptr + row + rank - 1, pairs, mask=chosen)
            if PLACED:
                tl.store(rows_ptr + pairs, row + rank - 1, mask=chosen)
            row += tl.sum(chosen.to(tl.int32), axis=0)
        # 3. The rest of its last tile is padding.
        padding = row + tl.arange(0, ROWS)
        tl.store(
            pairs_ptr + padding, tl.zeros((ROWS,), tl.int32) + num_pairs, mask=padding < (first_tile + mine) * ROWS
        )


@triton.jit
def _count(
    indices_ptr, ranks_ptr, counts_ptr, pairs_ptr, experts_ptr, num_pairs, length, num_tiles,
    E: tl.constexpr, E_PADDED: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A chunk's pairs of each expert, and each pair's rank among them. All rows begin as padding, all tiles without
    an expert: the programs share these."""
    chunk = tl.program_id(0)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(indices_ptr + pairs, mask=pairs < num_pairs, other=-1)
    before = (expert[None, :] == expert[:, None]) & (pairs[None, :] < pairs[:, None])
    tl.store(ranks_ptr + pairs, tl.sum(before.to(tl.int32), axis=1), mask=pairs < num_pairs)
    experts = tl.arange(0, E_PADDED)
    count = tl.sum((expert[None, :] == experts[:, None]).to(tl.int32), axis=1)
    tl.store(counts_ptr + chunk * E + experts, count, mask=experts < E)
    steps = tl.arange(0, STEP)
    for begin in range(chunk * STEP, length, tl.num_programs(0) * STEP):
        rows = begin + steps
        tl.store(pairs_ptr + rows, tl.zeros((STEP,), tl.int32) + num_pairs, mask=rows < length)
        tl.store(experts_ptr + rows, tl.full((STEP,), -1, tl.int32), mask=rows < num_tiles)


@triton.jit
def _begin(
    load_ptr, counts_ptr, experts_ptr, num_chunks,
    E: tl.constexpr, E_PADDED: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """In place of each chunk's count of an expert, the row of its first pair there. Each tile's expert."""
    all_experts = tl.arange(0, E_PADDED)
    tiles_E = (tl.load(load_ptr + all_experts, mask=all_experts < E, other=0) + ROWS - 1) // ROWS
    experts = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    first_tile = tl.sum(tl.where(all_experts[:, None] < experts[None, :], tiles_E[:, None], 0), axis=0)
    chunks = tl.arange(0, CHUNKS)
    inside = (chunks[:, None] < num_chunks) & (experts[None, :] < E)
    places = counts_ptr + chunks[:, None] * E + experts[None, :]
    count = tl.load(places, mask=inside, other=0)
    tl.store(places, first_tile[None, :] * ROWS + tl.cumsum(count, axis=0) - count, mask=inside)
    tiles = (tl.load(load_ptr + experts, mask=experts < E, other=0) + ROWS - 1) // ROWS
    for tile in range(tl.max(tiles, axis=0)):
        tl.store(experts_ptr + first_tile + tile, experts, mask=tile < tiles)


@triton.jit
def _place(
    indices_ptr, ranks_ptr, begins_ptr, pairs_ptr, rows_ptr, num_pairs,
    E: tl.constexpr, CHUNK: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(indices_ptr + pairs, mask=pairs < num_pairs, other=-1)
    served = expert >= 0
    begin = tl.load(begins_ptr + chunk * E + expert, mask=served, other=0)
    row = begin + tl.load(ranks_ptr + pairs, mask=served, other=0)
    tl.store(pairs_ptr + row, pairs, mask=served)
    if PLACED:
        tl.store(rows_ptr + pairs, row, mask=served)
