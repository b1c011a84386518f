"""Attention whose result for a token is the same to the last bit, whatever is computed beside it, on a CPU.

Every row of a step, of a prompt or of a sequence that decodes, attends alone to one logical page after another: the
same products of one query's heads by PAGE positions, the last page masked, wherever its pages lie and whoever shares
them. Results are joined by their log-sum-exps in the order of the text.

Shape legend: B rows, H heads, J key-value heads, D width of a head, V value width, E numbers a token, P pages, S places
a page, Z rows that have a certain page.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teacher.engine.block_manager import num_pages_for
from teacher.engine.step import Decodes, Step
from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.exponential import exp_of_minus_abs
from teacher.models.cpu_attention import EXTENT, Call, HeadLayout, as_index, hiding_bias


@dataclass(frozen=True)
class Level:
    """All rows' n-th pages: the calls, and their rows one after another."""

    calls: list[Call]
    rows_Z: Tensor


def as_decodes(step: Step) -> Step:
    """The same step, every row of it a sequence that decodes."""
    pages: list[list[int]] = []
    lengths: list[int] = []
    for group in step.decodes:
        for own, length in zip(group.pages, group.lengths, strict=True):
            ends = range(length - group.num_queries + 1, length + 1)
            lengths += ends
            pages += [own[: num_pages_for(end)] for end in ends]
    for chunk in step.chunks:
        own = chunk.pages.tolist()
        ends = range(chunk.context - chunk.num_queries + 1, chunk.context + 1)
        lengths += ends
        pages += [own[: num_pages_for(end)] for end in ends]
    return replace(step, decodes=[Decodes(pages, lengths)], chunks=[])


def with_plan(step: Step, dtype: torch.dtype) -> Step:
    """`as_decodes`, with its plan."""
    step = as_decodes(step)
    (group,) = step.decodes
    return replace(step, decodes=[replace(group, plan=plan_levels(group, dtype))])


def plan_levels(decodes: Decodes, dtype: torch.dtype) -> list[Level]:
    """Group each level's rows into calls: those that share a page, and those whose pages lie an extent apart."""
    levels = []
    for number in range(max(len(pages) for pages in decodes.pages)):
        owners: dict[int, list[int]] = {}
        for row, pages in enumerate(decodes.pages):
            if number < len(pages):
                owners.setdefault(pages[number], []).append(row)
        calls: list[Call] = []
        rows: list[int] = []
        for page, distance, sharing in _runs(owners):
            lengths = [min(decodes.lengths[row] - number * PAGE, PAGE) for row in sharing]
            bias = hiding_bias(lengths, PAGE, dtype)
            calls.append(Call(page, len(sharing), PAGE, distance, as_index(sharing), bias))
            rows += sharing
        levels.append(Level(calls, torch.tensor(rows)))
    return levels


def attend_levels(
    query_BHD: Tensor, cache_PSE: Tensor, levels: list[Level], layout: HeadLayout, scale: float
) -> Tensor:
    """[B, H, V]."""
    parts = []
    for level in levels:
        found = [call.attend(query_BHD, cache_PSE, layout, scale) for call in level.calls]
        parts.append((level.rows_Z, torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])))
    most_BH = query_BHD.new_full(query_BHD.shape[:2], float("-inf"))
    for rows_Z, _, lse_ZH in parts:
        most_BH[rows_Z] = most_BH[rows_Z].maximum(lse_ZH)
    total_BH = torch.zeros_like(most_BH)
    sums_BHV = query_BHD.new_zeros(*query_BHD.shape[:2], layout.value_width)
    for rows_Z, out_ZHV, lse_ZH in parts:
        # torch's exponential rounds otherwise in the rest of a vector, this one nowhere.
        weight_ZH = exp_of_minus_abs(lse_ZH - most_BH[rows_Z])
        total_BH[rows_Z] = total_BH[rows_Z] + weight_ZH
        sums_BHV[rows_Z] = sums_BHV[rows_Z] + weight_ZH[..., None] * out_ZHV
    return sums_BHV / total_BH[..., None]


def _runs(owners: dict[int, list[int]]) -> list[tuple[int, int, list[int]]]:
    """(page, distance, rows) of each call: pages with one row each, an extent apart, or one page with all its rows."""
    runs: list[tuple[int, int, list[int]]] = []
    last = -1
    for page in sorted(owners):
        rows = owners[page]
        if len(rows) == 1 and runs and runs[-1][1] and page == last + EXTENT:
            runs[-1][2].extend(rows)
        else:
            runs.append((page, EXTENT if len(rows) == 1 else 0, list(rows)))
        last = page
    return runs
