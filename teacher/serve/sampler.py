"""Drawing tokens: greedy, temperature, nucleus; one uniform number a row decides, so rows do not influence each other.

Shape legend: N rows, V vocabulary, J likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The nucleus of a trained model fits in this many tokens nearly always; rows where it does not are sorted whole.
_LIKELIEST = 64


@torch.inference_mode()
def sample(logits_NV: Tensor, uniform_N: list[float], *, temperature: float, top_p: float) -> list[int]:
    """One token a row. Temperature 0 is greedy (the first of equal maxima).

    The nucleus is the smallest set of likeliest tokens whose probability reaches `top_p`. `uniform_N` in [0, 1) picks
    from it by inverse transform in order of falling probability.
    """
    if temperature == 0:
        return logits_NV.argmax(dim=-1).tolist()
    probabilities_NV = (logits_NV.float() / temperature).softmax(dim=-1)
    uniform = torch.tensor(uniform_N, dtype=torch.float64, device=logits_NV.device)
    num_tokens = logits_NV.shape[1]
    likeliest = probabilities_NV.topk(min(_LIKELIEST, num_tokens), dim=-1)
    tokens = _pick(likeliest.values, likeliest.indices, uniform, top_p)
    wide = likeliest.values.sum(dim=-1) < min(top_p, 1 - 1e-6)
    if bool(wide.any()):
        ordered = probabilities_NV[wide].sort(dim=-1, descending=True, stable=True)
        tokens[wide] = _pick(ordered.values, ordered.indices, uniform[wide], top_p)
    return tokens.tolist()


@torch.inference_mode()
def score(logits_NV: Tensor, tokens: list[int], top: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """For every row the logprob of its token, and the `top` likeliest tokens with theirs, best first.

    Of the raw logits: what the model says, not what temperature and nucleus make of it.
    """
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    taken_N1 = logprobs_NV.gather(1, torch.tensor(tokens, device=logits_NV.device)[:, None])
    best = logprobs_NV.topk(min(top, logits_NV.shape[1]), dim=-1)
    rows = zip(taken_N1[:, 0].tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    return [(taken, list(zip(ids, values, strict=True))) for taken, ids, values in rows]


def _pick(probabilities_NJ: Tensor, tokens_NJ: Tensor, uniform_N: Tensor, top_p: float) -> Tensor:
    cumulative_NJ = probabilities_NJ.double().cumsum(dim=-1)
    in_nucleus = (cumulative_NJ - probabilities_NJ < top_p).sum(dim=-1, keepdim=True)
    mass_N1 = cumulative_NJ.gather(1, in_nucleus - 1)
    picked = torch.searchsorted(cumulative_NJ, uniform_N[:, None] * mass_N1, right=True)
    return tokens_NJ.gather(1, picked.minimum(in_nucleus - 1)).squeeze(1)
