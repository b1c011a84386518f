"""Drawing tokens, each row by its own settings; one uniform number a row decides, so rows do not influence each other.

Shape legend: N rows, V vocabulary, J likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# The nucleus of a trained model fits in this many tokens nearly always; rows where it does not are sorted whole.
_LIKELIEST = 64


@dataclass(frozen=True)
class Draw:
    """How a sequence's tokens are drawn, and how many logprobs are kept of each.

    Temperature 0 is greedy (the first of equal maxima). Otherwise a token comes from the likeliest ones alone, cut in
    transformers' order: the `top_k` best (0: all), of these the smallest set whose share reaches `top_p`, and no token
    below `min_p` times the best one's probability. `logit_bias` is added to the logits of tokens first.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_logprobs: int = 0
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


class _Limits(NamedTuple):
    """Settings as columns, FP64 [N, 1] but for `top_k`, which is int64."""

    uniform: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor

    def of(self, rows_N: Tensor) -> _Limits:
        return _Limits(*(column[rows_N] for column in self))


@torch.inference_mode()
def sample(logits_NV: Tensor, uniform_N: Many[float], draws: Many[Draw]) -> list[int]:
    """One token a row. `uniform_N` in [0, 1) picks by inverse transform in order of falling probability."""
    logits_NV = _biased(logits_NV, draws)
    if all(draw.temperature == 0 for draw in draws):
        return logits_NV.argmax(dim=-1).tolist()
    device, num_tokens = logits_NV.device, logits_NV.shape[1]
    rows = zip(uniform_N, draws, strict=True)
    columns = [(u, d.top_p, d.top_k or num_tokens, d.min_p, d.temperature or 1.0) for u, d in rows]
    table = torch.tensor(columns, dtype=torch.float64, device=device)
    uniform, top_p, top_k, min_p, temperature = table.split(1, dim=1)
    limits = _Limits(uniform, top_p, top_k.long(), min_p)
    probabilities_NV = (logits_NV.float() / temperature.float()).softmax(dim=-1)
    likeliest = probabilities_NV.topk(min(_LIKELIEST, num_tokens), dim=-1)
    tokens_N = _pick(likeliest.values, likeliest.indices, limits)
    wide_N = _may_lack(likeliest.values, limits, num_tokens)
    if bool(wide_N.any()):
        ordered = probabilities_NV[wide_N].sort(dim=-1, descending=True, stable=True)
        tokens_N[wide_N] = _pick(ordered.values, ordered.indices, limits.of(wide_N))
    if any(draw.temperature == 0 for draw in draws):
        greedy_N = torch.tensor([draw.temperature == 0 for draw in draws], device=device)
        tokens_N = torch.where(greedy_N, logits_NV.argmax(dim=-1), tokens_N)
    return tokens_N.tolist()


@torch.inference_mode()
def score(logits_NV: Tensor, tokens: list[int], top: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """For every row the logprob of its token, and the `top` likeliest tokens with theirs, best first.

    Of the raw logits: what the model says, not what temperature, bias and nucleus make of it.
    """
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    taken_N1 = logprobs_NV.gather(1, torch.tensor(tokens, device=logits_NV.device)[:, None])
    best = logprobs_NV.topk(min(top, logits_NV.shape[1]), dim=-1)
    rows = zip(taken_N1[:, 0].tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    return [(taken, list(zip(ids, values, strict=True))) for taken, ids, values in rows]


def _biased(logits_NV: Tensor, draws: Many[Draw]) -> Tensor:
    entries = [(row, token, value) for row, draw in enumerate(draws) for token, value in draw.logit_bias]
    if not entries:
        return logits_NV
    rows, tokens, values = (torch.tensor(part, device=logits_NV.device) for part in zip(*entries, strict=True))
    return logits_NV.index_put((rows, tokens), values.to(logits_NV.dtype), accumulate=True)


def _pick(probabilities_NJ: Tensor, tokens_NJ: Tensor, limits: _Limits) -> Tensor:
    """Every limit keeps a beginning of the falling order, so the shortest decides."""
    cumulative_NJ = probabilities_NJ.double().cumsum(dim=-1)
    last = probabilities_NJ.shape[1] - 1
    # A whole distribution's sum is one, not what rounding makes of it.
    best_k_N1 = torch.where(limits.top_k > last, 1.0, cumulative_NJ.gather(1, (limits.top_k - 1).clamp(max=last)))
    in_nucleus = (cumulative_NJ - probabilities_NJ < limits.top_p * best_k_N1).sum(dim=-1, keepdim=True)
    above = (probabilities_NJ >= limits.min_p * probabilities_NJ[:, :1]).sum(dim=-1, keepdim=True)
    kept_N1 = in_nucleus.minimum(above).minimum(limits.top_k).clamp(min=1)
    mass_N1 = cumulative_NJ.gather(1, kept_N1 - 1)
    picked = torch.searchsorted(cumulative_NJ, limits.uniform * mass_N1, right=True)
    return tokens_NJ.gather(1, picked.minimum(kept_N1 - 1)).squeeze(1)


def _may_lack(probabilities_NJ: Tensor, limits: _Limits, num_tokens: int) -> Tensor:
    """Rows, as booleans, in which a token beyond the likeliest ones could be kept."""
    num_likeliest = probabilities_NJ.shape[1]
    if num_likeliest == num_tokens:
        return torch.zeros(len(probabilities_NJ), dtype=torch.bool, device=probabilities_NJ.device)
    by_mass_N1 = probabilities_NJ.sum(dim=-1, keepdim=True) < limits.top_p.clamp(max=1 - 1e-6)
    by_count_N1 = limits.top_k > num_likeliest
    by_height_N1 = probabilities_NJ[:, -1:] >= limits.min_p * probabilities_NJ[:, :1]
    return (by_mass_N1 & by_count_N1 & by_height_N1).squeeze(1)
