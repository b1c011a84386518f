"""Drawing tokens, each row by its own settings; one uniform number a row decides, so rows do not influence each other.

Shape legend: N rows, V vocabulary, J likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher.kernels.device import runs_kernels
from teacher.kernels.sampling.sample import Settings, draw, draw_twin, pick

# The nucleus of a trained model fits in this many tokens nearly always; rows where it does not are sorted whole.
_LIKELIEST = 64


@dataclass(frozen=True)
class SamplingParams:
    """Parameters by which a sequence's tokens are sampled, and how many logprobs are kept of each.

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


def sample(logits_NV: Tensor, uniform_N: Many[float], draws: Many[SamplingParams]) -> list[int]:
    """`choose`, on the host."""
    return choose(logits_NV, uniform_N, draws).tolist()


@torch.inference_mode()
def choose(logits_NV: Tensor, uniform_N: Many[float], draws: Many[SamplingParams]) -> Tensor:
    """Sample one token a row, int64 [N] on the logits' device; on a GPU without waiting for it.

    `uniform_N` in [0, 1) picks by inverse transform in order of falling probability.
    """
    logits_NV = _biased(logits_NV, draws)
    if all(draw.temperature == 0 for draw in draws):
        return logits_NV.argmax(dim=-1)
    num_tokens = logits_NV.shape[1]
    rows = zip(uniform_N, draws, strict=True)
    columns = [(u, d.top_p, d.min_p, d.top_k or num_tokens, d.temperature, d.temperature == 0) for u, d in rows]
    table = _sent(torch.tensor(columns, dtype=torch.float64), logits_NV.device)
    *limits, temperature, greedy = table.split(1, dim=1)
    probabilities_NV = (logits_NV.float() / torch.where(greedy > 0, 1, temperature).float()).softmax(dim=-1)
    if runs_kernels(probabilities_NV):
        tokens_N = draw(probabilities_NV, Settings(*limits))
    else:
        tokens_N = _draw_likeliest(probabilities_NV, Settings(*limits))
    if any(draw.temperature == 0 for draw in draws):
        tokens_N = torch.where(greedy[:, 0] > 0, logits_NV.argmax(dim=-1), tokens_N)
    return tokens_N


@torch.inference_mode()
def score(logits_NV: Tensor, tokens: list[int], top: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """Logprobs of every row's token, and the `top` likeliest tokens with theirs, best first.

    Of the raw logits: what the model says, not what temperature, bias and nucleus make of it.
    """
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    taken_N1 = logprobs_NV.gather(1, torch.tensor(tokens, device=logits_NV.device)[:, None])
    best = logprobs_NV.topk(min(top, logits_NV.shape[1]), dim=-1)
    rows = zip(taken_N1[:, 0].tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    return [(taken, list(zip(ids, values, strict=True))) for taken, ids, values in rows]


def _biased(logits_NV: Tensor, draws: Many[SamplingParams]) -> Tensor:
    entries = [(row, token, value) for row, draw in enumerate(draws) for token, value in draw.logit_bias]
    if not entries:
        return logits_NV
    rows, tokens, values = (_sent(torch.tensor(part), logits_NV.device) for part in zip(*entries, strict=True))
    return logits_NV.index_put((rows, tokens), values.to(logits_NV.dtype), accumulate=True)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _draw_likeliest(probabilities_NV: Tensor, settings: Settings) -> Tensor:
    """`draw`, but only rows that need it are sorted whole."""
    num_tokens = probabilities_NV.shape[1]
    likeliest = probabilities_NV.topk(min(_LIKELIEST, num_tokens), dim=-1)
    tokens_N = pick(likeliest.values, likeliest.indices, settings)
    wide_N = _may_lack(likeliest.values, settings, num_tokens)
    if bool(wide_N.any()):
        tokens_N[wide_N] = draw_twin(probabilities_NV[wide_N], settings.of(wide_N))
    return tokens_N


def _may_lack(probabilities_NJ: Tensor, settings: Settings, num_tokens: int) -> Tensor:
    """Rows, as booleans, in which a token beyond the likeliest ones could be kept."""
    num_likeliest = probabilities_NJ.shape[1]
    if num_likeliest == num_tokens:
        return torch.zeros(len(probabilities_NJ), dtype=torch.bool, device=probabilities_NJ.device)
    by_mass_N1 = probabilities_NJ.sum(dim=-1, keepdim=True) < settings.top_p.clamp(max=1 - 1e-6)
    by_count_N1 = settings.top_k > num_likeliest
    by_height_N1 = probabilities_NJ[:, -1:] >= settings.min_p * probabilities_NJ[:, :1]
    return (by_mass_N1 & by_count_N1 & by_height_N1).squeeze(1)
