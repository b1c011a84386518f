"""Answers of a model in training, drawn without a cache: a quick look at pass@1 between the steps of a GPU run.

What counts is measured by the evaluation stage from the shipped weights; this is the trainer's own thermometer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from distill.records import Problem


@torch.inference_mode()
def sampled_accuracy(
    next_logits: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    prompts: Sequence[str],
    *,
    eos_id: int,
    temperature: float,
    max_tokens: int,
    device: torch.device,
) -> dict[str, float]:
    """Share of right answers per family; `next_logits` maps ids [B, T], padded on the right, to logits [B, T, V]."""
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    lengths = torch.tensor([len(ids) for ids in encoded], device=device)
    ids = torch.zeros(len(encoded), int(lengths.max()) + max_tokens, dtype=torch.long, device=device)
    for row, prompt_ids in enumerate(encoded):
        ids[row, : len(prompt_ids)] = torch.tensor(prompt_ids, device=device)
    generator = torch.Generator(device).manual_seed(17)
    ended = torch.zeros(len(encoded), dtype=torch.bool, device=device)
    every = torch.arange(len(encoded), device=device)
    for _ in range(max_tokens):
        logits = next_logits(ids[:, : int(lengths.max())])[every, lengths - 1].float()
        probabilities = (logits / max(temperature, 1e-6)).softmax(-1)
        token = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        ids[every, lengths] = torch.where(ended, ids[every, lengths], token)
        lengths = torch.where(ended, lengths, lengths + 1)
        ended |= token == eos_id
        if bool(ended.all()):
            break
    right: dict[str, list[bool]] = {}
    for problem, row, length in zip(problems, ids.tolist(), lengths.tolist(), strict=True):
        boxed = re.findall(r"\\boxed\{(.*?)\}", tokenizer.decode(row[:length]))
        right.setdefault(problem.source, []).append(bool(boxed) and boxed[-1] == problem.answer)
    return {family: sum(hits) / len(hits) for family, hits in right.items()}
