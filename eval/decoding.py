"""Batched sampling over a transformers decoder: a growing cache, rows that leave when they finish, noise of one's own.

Shape legend: B rows still alive, T cached positions, V vocabulary.

Why not `generate`: it draws all rows' noise from one stream, so that a sample depends on who else is in its batch, and
it drags finished rows along until the slowest one ends. Here every request has a random stream of its own, finished
rows are compacted out of the cache, and only the last position's logits are computed. Results of one request are equal
in every batch up to floating-point rounding of the matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

_NOISE_BLOCK = 128  # uniforms drawn ahead for every row; a stream continues exactly where it stopped
_COMPACT_AT = 0.7  # share of a batch's rows still running below which the ended ones are taken out
_FIRST_ROOM = 128  # cached positions allocated beyond the prompt at first; doubled whenever they run out


@dataclass
class Row:
    """One request in flight."""

    index: int
    prompt: list[int]
    seed: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    finished: bool = False  # by an end-of-turn token, which `tokens` leaves out

    @property
    def ended(self) -> bool:
        return self.finished or len(self.tokens) >= self.max_tokens


class GrowingLayer(CacheLayerMixin):
    """Keys and values of one layer, `[B, heads, capacity, head_dim]`, written in place and handed out as views.

    `DynamicCache` copies everything it holds at every step; this copies when the capacity doubles.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = self._empty(key_states, key_states.shape[2] + _FIRST_ROOM)
        self.values = self._empty(value_states, value_states.shape[2] + _FIRST_ROOM)
        self.is_initialized = True

    @staticmethod
    def _empty(like: torch.Tensor, capacity: int) -> torch.Tensor:
        batch, heads, _, width = like.shape
        return like.new_zeros((batch, heads, capacity, width))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            for name in ("keys", "values"):
                old = getattr(self, name)
                grown = self._empty(old, max(end, 2 * old.shape[2]))
                grown[:, :, : self.length] = old[:, :, : self.length]
                setattr(self, name, grown)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, rows_B: torch.Tensor) -> None:
        self.keys = self.keys.index_select(0, rows_B)
        self.values = self.values.index_select(0, rows_B)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


ATTENTION = "potstill_grouped"


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface without its copy of the cache for every query head of a group.

    `query` is `[B, heads, T, head_dim]`, keys and values `[B, kv_heads, T_cache, head_dim]`, the mask boolean (True:
    may look). In a decode step the heads of a group become the queries of one key-value head: same sums, no copy.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    if length == 1:
        grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return out.reshape(batch, 1, heads, width), None
    many = heads != kv_heads
    out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=many)
    return out.transpose(1, 2).contiguous(), None


class Noise:
    """One uniform in [0, 1) a row and step, from a Philox stream a request: equal whatever the batch is."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._streams = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        self._block = np.empty((len(seeds), 0))
        self._step = 0

    def next(self) -> torch.Tensor:
        if self._step == self._block.shape[1]:
            self._block = np.stack([stream.random(_NOISE_BLOCK) for stream in self._streams])
            self._step = 0
        self._step += 1
        return torch.from_numpy(self._block[:, self._step - 1].copy())

    def keep(self, rows: Sequence[int]) -> None:
        self._streams = [self._streams[row] for row in rows]
        self._block = self._block[list(rows)]


def sample_tokens(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor | None, temperature: float, top_p: float
) -> torch.Tensor:
    """Draw one token a row by inverting the nucleus' cumulative distribution at `uniform_B`.

    The nucleus is the smallest set of most likely tokens whose probability reaches `top_p` (1904.09751 s.3.1).
    Temperature 0 is the arg max and needs no noise.
    """
    if temperature == 0 or uniform_B is None:
        return logits_BV.argmax(dim=-1)
    probs_BV = torch.softmax(logits_BV.float() / temperature, dim=-1)
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
    cumulative_BV = sorted_BV.cumsum(dim=-1)
    if top_p < 1:
        outside_BV = cumulative_BV - sorted_BV >= top_p
        cumulative_BV = sorted_BV.masked_fill(outside_BV, 0).cumsum(dim=-1)
    target_B1 = (uniform_B.to(cumulative_BV) * cumulative_BV[:, -1]).unsqueeze(-1)
    # right=True: the first token whose cumulative mass exceeds the target, so one of mass zero is never drawn
    rank_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    last_B1 = (sorted_BV > 0).sum(dim=-1, keepdim=True) - 1 if top_p >= 1 else (~outside_BV).sum(-1, keepdim=True) - 1
    return order_BV.gather(-1, torch.minimum(rank_B1, last_B1)).squeeze(-1)


class _Batch:
    """The tensors of the rows that are alive together: cache, mask, positions, noise."""

    def __init__(self, model: Any, rows: Sequence[Row], pad: int, sampled: bool) -> None:
        self.model, self.rows, device = model, list(rows), model.device
        width = max(len(row.prompt) for row in rows)
        self.ids_BT = torch.tensor([[pad] * (width - len(r.prompt)) + r.prompt for r in rows], device=device)
        starts_B1 = torch.tensor([[width - len(row.prompt)] for row in rows], device=device)
        columns_T = torch.arange(width, device=device)
        self.seen_BT = columns_T >= starts_B1
        self.position_B1 = (columns_T - starts_B1).clamp(min=0)
        self.cache = Cache(layers=[GrowingLayer() for _ in range(model.config.num_hidden_layers)])
        self.noise = Noise([row.seed for row in rows]) if sampled else None
        causal_TT = columns_T.unsqueeze(0) <= columns_T.unsqueeze(1)
        # A padding query may look at itself alone: a row of nothing but masked keys has no softmax.
        itself_TT = columns_T.unsqueeze(0) == columns_T.unsqueeze(1)
        self.mask = ((causal_TT & self.seen_BT.unsqueeze(1)) | itself_TT).unsqueeze(1)

    def step(self) -> torch.Tensor:
        """Logits `[B, V]` of the next token; afterwards feed the chosen tokens to `append`."""
        out = self.model(
            input_ids=self.ids_BT,
            attention_mask=self.mask,
            position_ids=self.position_B1,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def append(self, tokens_B: torch.Tensor) -> None:
        self.ids_BT = tokens_B.unsqueeze(1)
        self.position_B1 = self.position_B1[:, -1:] + 1
        self.seen_BT = torch.cat([self.seen_BT, self.seen_BT.new_ones(len(self.rows), 1)], dim=1)
        self.mask = self.seen_BT[:, None, None, :]

    def keep(self, rows: Sequence[int]) -> None:
        index_B = torch.tensor(rows, device=self.ids_BT.device)
        self.rows = [self.rows[row] for row in rows]
        self.ids_BT, self.position_B1 = self.ids_BT[index_B], self.position_B1[index_B]
        self.seen_BT = self.seen_BT[index_B]
        self.mask = self.seen_BT[:, None, None, :]
        for layer in self.cache.layers:
            layer.keep(index_B)
        if self.noise is not None:
            self.noise.keep(rows)


def prepare(model: Any) -> None:
    """Switch a transformers decoder to this module's attention."""
    AttentionInterface.register(ATTENTION, grouped_attention)
    model.set_attn_implementation(ATTENTION)


@torch.inference_mode()
def decode(
    model: Any, rows: Sequence[Row], *, temperature: float, top_p: float, eos: frozenset[int], pad: int
) -> Iterator[Row]:
    """Fill `tokens` of every row (all prompts non-empty) and yield each row as soon as it has ended."""
    batch = _Batch(model, rows, pad, sampled=temperature > 0)
    running = len(batch.rows)
    while running:
        uniform_B = None if batch.noise is None else batch.noise.next()
        tokens_B = sample_tokens(batch.step(), uniform_B, temperature, top_p)
        for row, token in zip(batch.rows, tokens_B.tolist(), strict=True):
            if row.ended:
                continue
            row.finished = token in eos
            if not row.finished:
                row.tokens.append(token)
            if row.ended:
                running -= 1
                yield row
        batch.append(tokens_B)
        # Taking rows out copies the cache of those that stay: worth it for a share of the batch, not for each one.
        if 0 < running <= _COMPACT_AT * len(batch.rows):
            batch.keep([place for place, row in enumerate(batch.rows) if not row.ended])
