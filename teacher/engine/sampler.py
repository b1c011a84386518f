"""Drawing tokens, each row by its own settings; one uniform number a row decides, so rows do not influence each other.

Shape legend: N rows, V vocabulary, J likeliest tokens, E tokens that rows' texts have already.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from teacher.engine.token_counts import SeenTokens
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

    Then tokens that the text has already are penalised, in vLLM's order (`apply_penalties`). One in the prompt or the
    answer: a logit above zero is divided by `repetition_penalty`, any other multiplied by it (CTRL, arXiv 1909.05858
    s.4.1, for logits of either sign). One that the answer has c > 0 times loses c times `frequency_penalty` and once
    `presence_penalty` (OpenAI's API reference).

    `prompt_logprobs` is how many logprobs are kept of each token of the prompt beside its own; None: none at all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_logprobs: int = 0
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    prompt_logprobs: int | None = None

    @property
    def penalises(self) -> bool:
        """Tell whether tokens that the text has already are less likely, or more, to come again."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


def sample(logits_NV: Tensor, uniform_N: Many[float], draws: Many[SamplingParams]) -> list[int]:
    """`choose`, on the host."""
    return choose(logits_NV, uniform_N, draws).tolist()


@torch.inference_mode()
def choose(
    logits_NV: Tensor,
    uniform_N: Many[float],
    draws: Many[SamplingParams],
    seen_N: Many[SeenTokens | None] | None = None,
) -> Tensor:
    """Sample one token a row, int64 [N] on the logits' device; on a GPU without waiting for it.

    `uniform_N` in [0, 1) picks by inverse transform in order of falling probability. `seen_N` are the tokens that each
    row's text has, where they are penalised; None: nowhere.
    """
    logits_NV = _biased(logits_NV, draws)
    if seen_N is not None:
        logits_NV = _penalised(logits_NV, draws, seen_N)
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

    Of the raw logits: what the model says, not what temperature, bias, penalties and nucleus make of it. Where a
    grammar rules, it has taken its part before, as in vLLM: what it does not admit has no probability.
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


def masked(logits_NV: Tensor, masks_N: Many[np.ndarray | None]) -> Tensor:
    """Let only tokens come that a row's mask has, booleans by token; a row without one stays as it is."""
    rows = [row for row, mask in enumerate(masks_N) if mask is not None]
    if not rows:
        return logits_NV
    may_come_RV = np.zeros((len(rows), logits_NV.shape[1]), np.bool_)
    for may_come_V, row in zip(may_come_RV, rows, strict=True):
        mask = masks_N[row][: len(may_come_V)]
        may_come_V[: len(mask)] = mask
    rows_R = _sent(torch.tensor(rows), logits_NV.device)
    may_come_RV = _sent(torch.from_numpy(may_come_RV), logits_NV.device)
    return logits_NV.index_copy(0, rows_R, logits_NV[rows_R].masked_fill(~may_come_RV, -torch.inf))


def _penalised(logits_NV: Tensor, draws: Many[SamplingParams], seen_N: Many[SeenTokens | None]) -> Tensor:
    """Change the logits of tokens that a row's text has, as `SamplingParams` says."""
    rows = [(row, seen, draws[row]) for row, seen in enumerate(seen_N) if seen is not None]
    if not rows:
        return logits_NV
    sizes = [len(seen.tokens) for _, seen, _ in rows]
    of_rows = [(row, d.repetition_penalty, d.frequency_penalty, d.presence_penalty) for row, _, d in rows]
    table_4E = np.repeat(np.array(of_rows).T, sizes, axis=1)
    tokens_E, counts_E = (np.concatenate(column) for column in zip(*(seen for _, seen, _ in rows), strict=True))
    subtracted_E = table_4E[2] * counts_E + table_4E[3] * (counts_E > 0)
    indices_2E = _sent(torch.from_numpy(np.stack((table_4E[0].astype(np.int64), tokens_E))), logits_NV.device)
    changes_2E = _sent(torch.from_numpy(np.stack((table_4E[1], subtracted_E))).float(), logits_NV.device)
    logits_E = logits_NV[indices_2E[0], indices_2E[1]].float()
    logits_E = torch.where(logits_E > 0, logits_E / changes_2E[0], logits_E * changes_2E[0]) - changes_2E[1]
    return logits_NV.index_put((indices_2E[0], indices_2E[1]), logits_E.to(logits_NV.dtype))


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
