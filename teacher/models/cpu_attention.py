"""Attention of decoding sequences over a paged cache in place, in plain torch operations, for a CPU.

Gathering pages first would copy every key for a single use (1.7 to 4.8 times the time, LOG.md). torch's fused attention
takes a batch of keys that lie evenly in memory, so pages of one sequence that follow each other make a piece, and
pieces that follow each other at the distance of an extent make one call, the shorter ones masked. A page that several
sequences share is one piece with all their queries. Where a sequence has several pieces, their results are joined by
their log-sum-exps (FlashDecoding; FlashAttention arXiv 2205.14135 s.3.1).

Shape legend: B sequences, T queries of each, H heads (to a piece a sequence's queries are so many heads more), J
key-value heads, D width of a head, E numbers a token, P pages, S places a page, N pieces of a call, W sequences that
share a piece, U positions, Z = N * W over all calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from teacher.engine.step import Decodes
from teacher.kernels.attention.mla_cache import PAGE

EXTENT = 4
# What a call costs beside its arithmetic, in positions of one sequence: 15 us and 0.3 us at pico's widths.
_CALL_POSITIONS = 48
# Finite, since a sequence's first query may see nothing of its last piece: minus infinity would give it no number, and
# this gives it a weight of zero where pieces are joined.
_HIDDEN = -1e30


class HeadLayout(NamedTuple):
    """Places of keys and values in a token's entry: J heads of D numbers each, one after another, from these offsets.

    MLA's entries are one head whose key serves as its value too, so that torch's fused kernel reads the cache once; of
    the result only the first `value_width` numbers mean something.
    """

    num_kv_heads: int
    width: int
    keys: int
    values: int
    value_width: int


class Piece(NamedTuple):
    """Positions that lie in consecutive pages of one extent, and the sequences (rows) that attend to them.

    The last `num_hidden` of them are later than a sequence's first query.
    """

    page: int
    length: int
    rows: tuple[int, ...]
    num_hidden: int = 0


@dataclass(frozen=True)
class Call:
    """Attention over N pieces, `distance` pages apart; `bias` hides what a query must not see."""

    page: int
    num_pieces: int
    num_positions: int
    distance: int
    rows: slice | Tensor
    bias_N1XU: Tensor | None  # X is the queries of a call, or 1 where it is the same for all

    def view(self, cache_PSE: Tensor, layout: HeadLayout, offset: int) -> Tensor:
        """Keys or values, [N, J, U, D]."""
        page_stride, place_stride, _ = cache_PSE.stride()
        shape = self.num_pieces, layout.num_kv_heads, self.num_positions, layout.width
        strides = self.distance * page_stride, layout.width, place_stride, 1
        return cache_PSE.as_strided(shape, strides, cache_PSE.storage_offset() + self.page * page_stride + offset)

    def attend(self, query_BHD: Tensor, cache_PSE: Tensor, layout: HeadLayout, scale: float) -> tuple[Tensor, Tensor]:
        """[Z, H, value width] and the logarithm of the exponential sum, [Z, H]. A group of heads shares its key-value
        head: the queries of a call are [N, J, W * H / J, D]."""
        heads, width = query_BHD.shape[1:]
        kv_heads = layout.num_kv_heads
        keys = self.view(cache_PSE, layout, layout.keys)
        values = keys if layout.values == layout.keys else self.view(cache_PSE, layout, layout.values)
        query = query_BHD[self.rows].view(self.num_pieces, -1, kv_heads, heads // kv_heads, width)
        num_sharing = query.shape[1]
        query = query.transpose(1, 2).reshape(self.num_pieces, kv_heads, -1, width)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, False, attn_mask=self.bias_N1XU, scale=scale
        )
        out = out.view(self.num_pieces, kv_heads, num_sharing, -1, width).transpose(1, 2)
        lse = lse.reshape(self.num_pieces, kv_heads, num_sharing, -1).transpose(1, 2)
        return out.reshape(-1, heads, width)[..., : layout.value_width], lse.reshape(-1, heads)


@dataclass(frozen=True)
class PiecePlan:
    """`rows` of all calls one after another, as often as a sequence has pieces; None if that is once, in order."""

    calls: list[Call]
    rows: Tensor | None


def plan_pieces(decodes: Decodes, dtype: torch.dtype, num_heads: int) -> PiecePlan:
    """`dtype` is that of the queries, `num_heads` those of one query."""
    calls = [_call(group, dtype, decodes.num_queries, num_heads) for group in group_pieces(find_pieces(decodes))]
    rows = [row for group in calls for row in group[1]]
    in_place = rows == list(range(len(decodes)))
    return PiecePlan([call for call, _ in calls], None if in_place else torch.tensor(rows))


def attend_pieces(query_BHD: Tensor, cache_PSE: Tensor, plan: PiecePlan, layout: HeadLayout, scale: float) -> Tensor:
    """[B, H, value width]."""
    parts = [call.attend(query_BHD, cache_PSE, layout, scale) for call in plan.calls]
    outs_ZHD = torch.cat([out for out, _ in parts]) if len(parts) > 1 else parts[0][0]
    if plan.rows is None:
        return outs_ZHD
    lses_ZH = torch.cat([lse for _, lse in parts]) if len(parts) > 1 else parts[0][1]
    return join(outs_ZHD, lses_ZH, plan.rows, len(query_BHD))


def find_pieces(decodes: Decodes) -> list[Piece]:
    """In the order of their pages, for one query a sequence or two."""
    owners: dict[int, list[int]] = {}
    lengths: dict[int, int] = {}
    for row, (pages, length) in enumerate(zip(decodes.pages, decodes.lengths, strict=True)):
        for page in pages:
            owners.setdefault(page, []).append(row)
        lengths[pages[-1]] = length - (len(pages) - 1) * PAGE  # every other page is full
    pieces: list[Piece] = []
    for page in sorted(owners):
        rows, length = tuple(owners[page]), lengths.get(page, PAGE)
        num_hidden = decodes.num_queries - 1 if page in lengths else 0
        if page % EXTENT and pieces:
            before = pieces[-1]
            # The same sequences, and no gap: a piece goes on, within one extent.
            if before.rows == rows and before.page * PAGE + before.length == page * PAGE:
                pieces[-1] = Piece(before.page, before.length + length, rows, num_hidden)
                continue
        pieces.append(Piece(page, length, rows, num_hidden))
    return pieces


def group_pieces(pieces: list[Piece]) -> list[list[Piece]]:
    """Pieces for one call each: an extent apart, and not so different in length that two calls would be cheaper."""
    groups: list[list[Piece]] = []
    longest = 0
    for piece in pieces:
        if groups:
            group = groups[-1]
            together = max(longest, piece.length)
            # Positions that would be computed and masked, if the piece joined the group's call.
            extra = (len(group) + 1) * together - len(group) * longest - piece.length
            fits = piece.page == group[-1].page + EXTENT and len(piece.rows) == len(group[-1].rows)
            if fits and extra * len(piece.rows) <= _CALL_POSITIONS:
                group.append(piece)
                longest = together
                continue
        groups.append([piece])
        longest = piece.length
    return groups


def join(outs_ZHD: Tensor, lses_ZH: Tensor, rows_Z: Tensor, num_sequences: int) -> Tensor:
    """Weigh each piece's result by its exponential sum: [B, H, D] from [Z, H, D] and log-sum-exps [Z, H]."""
    index_ZH = rows_Z[:, None].expand_as(lses_ZH)
    most_BH = lses_ZH.new_full((num_sequences, lses_ZH.shape[1]), float("-inf"))
    most_BH.scatter_reduce_(0, index_ZH, lses_ZH, "amax")
    weights_ZH = (lses_ZH - most_BH[rows_Z]).exp_()
    total_BH = torch.zeros_like(most_BH).index_add_(0, rows_Z, weights_ZH)
    weights_ZH /= total_BH[rows_Z]
    out = outs_ZHD.new_zeros(num_sequences, *outs_ZHD.shape[1:])
    return out.index_add_(0, rows_Z, outs_ZHD * weights_ZH[..., None])


def as_index(rows: list[int]) -> slice | Tensor:
    """A slice where rows follow each other: then queries are not copied."""
    consecutive = rows == list(range(rows[0], rows[0] + len(rows)))
    return slice(rows[0], rows[0] + len(rows)) if consecutive else torch.tensor(rows)


def hiding_bias(lengths: list[int], num_positions: int, dtype: torch.dtype) -> Tensor:
    """[N, 1, 1, U]: a very low number beyond each piece's length."""
    hidden_NU = torch.arange(num_positions) >= torch.tensor(lengths)[:, None]
    return torch.zeros(hidden_NU.shape, dtype=dtype).masked_fill_(hidden_NU, _HIDDEN)[:, None, None]


def causal_bias(num_queries: int, context: int, dtype: torch.dtype) -> Tensor:
    """[T, U] of a chunk's last T of U tokens."""
    bias_TU = torch.full((num_queries, context), float("-inf"), dtype=dtype)
    return bias_TU.triu_(context - num_queries + 1)


def _call(pieces: list[Piece], dtype: torch.dtype, num_queries: int, num_heads: int) -> tuple[Call, list[int]]:
    rows = [row for piece in pieces for row in piece.rows]
    lengths = [piece.length for piece in pieces]
    longest, bias = max(lengths), None
    if any(piece.num_hidden for piece in pieces):
        bias = _bias_a_query(pieces, longest, dtype, num_queries, num_heads)
    elif min(lengths) < longest:
        bias = hiding_bias(lengths, longest, dtype)
    return Call(pieces[0].page, len(pieces), longest, EXTENT, as_index(rows), bias), rows


def _bias_a_query(pieces: list[Piece], longest: int, dtype: torch.dtype, num_queries: int, num_heads: int) -> Tensor:
    """[N, 1, W * T * H, U]."""
    seen = [[piece.length - max(piece.num_hidden - query, 0) for query in range(num_queries)] for piece in pieces]
    hidden_NTU = torch.arange(longest) >= torch.tensor(seen)[:, :, None]
    bias_NTU = torch.zeros(hidden_NTU.shape, dtype=dtype).masked_fill_(hidden_NTU, _HIDDEN)
    shape = len(pieces), len(pieces[0].rows), num_queries, num_heads, longest
    return bias_NTU[:, None, :, None].expand(shape).flatten(1, 3)[:, None]
