"""Row-wise arithmetic whose result for a row is the same to the last bit, whatever rows stand beside it, on a CPU.

A BLAS blocks a product by its number of rows, and sums in another order for few of them: one row alone has other bits
than the same row among 64. So rows are multiplied in tiles of one fixed height, the last one padded with zeros: every
product has one shape for good. (He, "Defeating Nondeterminism in LLM Inference", 2025, does so on GPUs.) Within a tile
a row's place must not matter either; `check_places` tries that on the processor at hand.

Vectorised functions round otherwise in the scalar rest of a vector, so what is not a multiplication, an addition or a
division is computed where these rests lie at fixed columns. And all is computed by one thread: the other cores are for
other processes.

Shape legend: M rows, K columns in, N columns out, R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import EnvironmentFault

TILE = 32
# Of an expert's rows, which are a step's over the share of experts that a token meets.
EXPERT_TILE = 8


def linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, tile: int = TILE) -> Tensor:
    """`F.linear`, [M, N]."""
    num_rows = len(x_MK)
    x_MK = _padded(x_MK, tile)
    out_MN = x_MK.new_empty(len(x_MK), weight_NK.shape[0])
    for start in range(0, len(x_MK), tile):
        rows = slice(start, start + tile)
        if bias_N is None:
            torch.mm(x_MK[rows], weight_NK.t(), out=out_MN[rows])
        else:
            torch.addmm(bias_N, x_MK[rows], weight_NK.t(), out=out_MN[rows])
    return out_MN[:num_rows]


def by_tiles(compute: Callable[[Tensor], Any], x_M: Tensor) -> Any:
    """`compute` of TILE rows at a time; what it returns, a tensor or several, joined again."""
    x_padded = _padded(x_M, TILE)
    parts = [compute(x_padded[start : start + TILE]) for start in range(0, len(x_padded), TILE)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[: len(x_M)]
    return tuple(torch.cat(part)[: len(x_M)] for part in zip(*parts, strict=True))


def silu(x_MK: Tensor) -> Tensor:
    """`F.silu` of a slice of a wider tensor, whose rows are therefore vectorised one by one."""
    assert len(x_MK) < 2 or x_MK.stride(0) > x_MK.shape[1], "rows that touch would be vectorised as one"
    return F.silu(x_MK)


@contextmanager
def one_thread() -> Iterator[None]:
    """Several threads would cut products, rows and their scratch memory by their own number and the size of a batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_places(compute: Callable[[Tensor], Tensor], shape: tuple[int, ...], *, tile: int = TILE) -> None:
    """Raise EnvironmentFault unless `compute` gives equal rows of this shape equal results wherever in a tile they are.

    MKL's products of widths that no vector divides do not.
    """
    row = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out_R = compute(row.expand(tile, *shape).contiguous())
    if not torch.equal(out_R, out_R[:1].expand_as(out_R)):
        message = f"a product of {list(row.shape)} and {list(out_R.shape[1:])} numbers a row depends on the row's place"
        raise EnvironmentFault(message, where="batch_invariant")


def check_matrices(matrices: Iterable[Tensor], *, tile: int = TILE) -> None:
    """`check_places` for `linear` with each kind of matrix."""
    kinds = {(matrix.shape, matrix.stride()): matrix for matrix in matrices}
    for matrix_NK in kinds.values():
        check_places(partial(linear, weight_NK=matrix_NK, tile=tile), (matrix_NK.shape[1],), tile=tile)


def _padded(x_M: Tensor, tile: int) -> Tensor:
    """Whole tiles, contiguous."""
    missing = -len(x_M) % tile
    if not missing:
        return x_M.contiguous()
    return torch.cat((x_M, x_M.new_zeros(missing, *x_M.shape[1:])))
