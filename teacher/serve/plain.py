"""A step's parts in plain torch operations, for a CPU.

Decoding reads the cache in place: gathering pages first would copy every latent for a single use (1.7 to 4.8 times the
time, LOG.md). torch's fused attention takes a batch of keys that lie evenly in memory, so pages of one sequence
that follow each other make a piece, and pieces that follow each other at the distance of an extent make one call, the
shorter ones masked. A page that several sequences share is one piece with all their queries. Where a sequence has
several pieces, their results are joined by their log-sum-exps (FlashDecoding; FlashAttention arXiv 2205.14135 s.3.1).

Shape legend: B sequences, T queries of each, H heads, C latent, R rope, E = C + R, P pages, S places a page, N pieces
of a call, W sequences that share a piece, U positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.kernels.mla_cache import PAGE
from teacher.model.mla import LATENT_NORM_EPS
from teacher.model.rope import rotate
from teacher.serve.operations import gathered
from teacher.serve.step import Decodes, PromptChunk, Step
from teacher.serve.weights import AttentionWeights, InferenceWeights, MoEWeights

EXTENT = 4
# What a call costs beside its arithmetic, in positions of one sequence: 15 us and 0.3 us at pico's widths.
_CALL_POSITIONS = 48
# Finite, since a sequence's first query may see nothing of its last piece: minus infinity would give it no number, and
# this gives it a weight of zero where pieces are joined.
_HIDDEN = -1e30


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
    """Attention of [N, W * T * H] queries over N pieces, an extent apart; `bias` hides what a query must not see."""

    page: int
    num_pieces: int
    num_positions: int
    rows: slice | Tensor
    bias_N1XU: Tensor | None  # X is W * T * H, or 1 where it is the same for all

    def keys(self, cache_PSE: Tensor) -> Tensor:
        """A view, [N, 1, U, E]."""
        page_stride, place_stride, _ = cache_PSE.stride()
        shape = self.num_pieces, 1, self.num_positions, cache_PSE.shape[2]
        strides = EXTENT * page_stride, page_stride, place_stride, 1
        return cache_PSE.as_strided(shape, strides, cache_PSE.storage_offset() + self.page * page_stride)


@dataclass(frozen=True)
class Plan:
    """`rows` of all calls one after another, as often as a sequence has pieces; None if that is once, in order."""

    calls: list[Call]
    rows: Tensor | None


class PlainOperations:
    graphable = False
    extent = EXTENT

    def __init__(self, weights: InferenceWeights) -> None:
        self._config = weights.config
        self._tables = weights.cos, weights.sin
        self._latent = weights.config.kv_lora_rank
        self._dtype = weights.embedding.dtype

    def plan(self, decodes: Decodes) -> Plan:
        calls = [self._call(group, decodes.num_queries) for group in group_pieces(find_pieces(decodes))]
        rows = [row for group in calls for row in group[1]]
        in_place = rows == list(range(len(decodes)))
        return Plan([call for call, _ in calls], None if in_place else torch.tensor(rows))

    def plan_on_device(self, pages_BQ: Tensor, lengths_B: Tensor, num_queries: int) -> Plan:
        raise NotImplementedError("attention on a CPU is planned by the pages' numbers")

    def rotate(self, query_MHD: Tensor, step: Step) -> None:
        rope = query_MHD[..., -self._config.qk_rope_head_dim :]
        cos, sin = (table[step.positions_M][:, None] for table in self._tables)
        rope.copy_(rotate(rope, cos, sin, interleave=self._config.rope_interleave))

    def write(self, projected_ME: Tensor, weights: AttentionWeights, step: Step, cache_PSE: Tensor) -> None:
        latent, k_rope = projected_ME.split((self._latent, self._config.qk_rope_head_dim), dim=1)
        cos, sin = (table[step.positions_M] for table in self._tables)
        k_rope = rotate(k_rope, cos, sin, interleave=self._config.rope_interleave)
        latent = F.rms_norm(latent, (self._latent,), weights.kv_norm, LATENT_NORM_EPS)
        cache_PSE.flatten(0, 1).index_copy_(0, step.slots_M, torch.cat((latent, k_rope), dim=1))

    def decode(self, query_BTHE: Tensor, cache_PSE: Tensor, plan: Plan) -> Tensor:
        query_BHE = query_BTHE.flatten(1, 2)  # to a piece a sequence's queries are so many heads more
        parts = [self._attend(call, query_BHE, cache_PSE) for call in plan.calls]
        out = torch.cat([out for out, _ in parts]) if len(parts) > 1 else parts[0][0]
        out = out[..., : self._latent]
        if plan.rows is not None:
            lses_ZH = torch.cat([lse for _, lse in parts]) if len(parts) > 1 else parts[0][1]
            out = _join(out, lses_ZH, plan.rows, len(query_BHE))
        return out.unflatten(1, query_BTHE.shape[1:3])

    def absorbed(self, query_THE: Tensor, cache_PSE: Tensor, chunk: PromptChunk) -> Tensor:
        keys = gathered(cache_PSE, chunk)[None, None]
        num_queries, num_heads, _ = query_THE.shape
        bias_TU = _causal_bias(num_queries, chunk.context, query_THE.dtype).repeat_interleave(num_heads, dim=0)
        query = query_THE.flatten(0, 1)[None, None]
        out = F.scaled_dot_product_attention(query, keys, keys, attn_mask=bias_TU, scale=1.0)
        return out[0, 0].view_as(query_THE)[..., : self._latent]

    def expanded(self, query_THD: Tensor, key_UHD: Tensor, value_UHV: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query_THD, key_UHD, value_UHV))
        num_queries, context = q.shape[2], k.shape[2]
        if num_queries == context:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        else:
            bias_TU = _causal_bias(num_queries, context, q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_TU, scale=1.0)
        return out[0].transpose(0, 1)

    def route(self, x_MX: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor, Tensor]:
        indices_MK, gates_MK, _ = weights.router(x_MX)
        load_E = torch.bincount(indices_MK.flatten(), minlength=weights.down_EID.shape[0])
        return indices_MK, gates_MK, load_E.cumsum(0).to(torch.int32)

    def _call(self, pieces: list[Piece], num_queries: int) -> tuple[Call, list[int]]:
        rows = [row for piece in pieces for row in piece.rows]
        lengths = [piece.length for piece in pieces]
        longest, bias = max(lengths), None
        if any(piece.num_hidden for piece in pieces):
            bias = self._bias_a_query(pieces, num_queries, longest)
        elif min(lengths) < longest:
            hidden_NU = torch.arange(longest) >= torch.tensor(lengths)[:, None]
            bias = torch.zeros(hidden_NU.shape, dtype=self._dtype).masked_fill_(hidden_NU, _HIDDEN)[:, None, None]
        consecutive = rows == list(range(rows[0], rows[0] + len(rows)))
        index = slice(rows[0], rows[0] + len(rows)) if consecutive else torch.tensor(rows)
        return Call(pieces[0].page, len(pieces), longest, index, bias), rows

    def _bias_a_query(self, pieces: list[Piece], num_queries: int, longest: int) -> Tensor:
        seen = [[piece.length - max(piece.num_hidden - query, 0) for query in range(num_queries)] for piece in pieces]
        hidden_NTU = torch.arange(longest) >= torch.tensor(seen)[:, :, None]
        bias_NTU = torch.zeros(hidden_NTU.shape, dtype=self._dtype).masked_fill_(hidden_NTU, _HIDDEN)
        num_sequences, heads = len(pieces[0].rows), self._config.num_attention_heads
        shape = len(pieces), num_sequences, num_queries, heads, longest
        return bias_NTU[:, None, :, None].expand(shape).flatten(1, 3)[:, None]

    def _attend(self, call: Call, query_BHE: Tensor, cache_PSE: Tensor) -> tuple[Tensor, Tensor]:
        """[N * W, H, E] and the logarithm of the exponential sum, [N * W, H]; whole entries serve as values: so torch's
        fused kernel reads the cache once."""
        keys = call.keys(cache_PSE)
        query = query_BHE[call.rows].reshape(call.num_pieces, 1, -1, keys.shape[3])
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, keys, 0.0, False, attn_mask=call.bias_N1XU, scale=1.0
        )
        return out.reshape(-1, *query_BHE.shape[1:]), lse.reshape(-1, query_BHE.shape[1])


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
            extra = (len(group) + 1) * together - len(group) * longest - piece.length
            fits = piece.page == group[-1].page + EXTENT and len(piece.rows) == len(group[-1].rows)
            if fits and extra * len(piece.rows) <= _CALL_POSITIONS:
                group.append(piece)
                longest = together
                continue
        groups.append([piece])
        longest = piece.length
    return groups


def _join(outs_ZHC: Tensor, lses_ZH: Tensor, rows_Z: Tensor, num_sequences: int) -> Tensor:
    index_ZH = rows_Z[:, None].expand_as(lses_ZH)
    most_BH = lses_ZH.new_full((num_sequences, lses_ZH.shape[1]), float("-inf"))
    most_BH.scatter_reduce_(0, index_ZH, lses_ZH, "amax")
    weights_ZH = (lses_ZH - most_BH[rows_Z]).exp_()
    total_BH = torch.zeros_like(most_BH).index_add_(0, rows_Z, weights_ZH)
    weights_ZH /= total_BH[rows_Z]
    out = outs_ZHC.new_zeros(num_sequences, *outs_ZHC.shape[1:])
    return out.index_add_(0, rows_Z, outs_ZHC * weights_ZH[..., None])


def _causal_bias(num_queries: int, context: int, dtype: torch.dtype) -> Tensor:
    bias_TU = torch.full((num_queries, context), float("-inf"), dtype=dtype)
    return bias_TU.triu_(context - num_queries + 1)
