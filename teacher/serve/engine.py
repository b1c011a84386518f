"""Continuous batching: as soon as sequences end, waiting ones take their slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from teacher.model.transformer import DeepseekV3
from teacher.serve.runner import ModelRunner
from teacher.serve.sampler import sample, score
from teacher.serve.sequence import Key, Sequence
from teacher.serve.weights import fuse_weights

# A prefill costs memory in proportion to its padded tokens; longer prompts go in fewer at a time.
_MAX_PREFILL_TOKENS = 8_192
# Admitting one by one would run a prefill every few steps: wait until this share of the slots is free.
_ADMIT_SHARE = 1 / 16


@dataclass(frozen=True)
class Draw:
    """How the tokens of one run are drawn, and how many logprobs are kept of each."""

    temperature: float
    top_p: float
    top_logprobs: int = 0

    def as_arguments(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_p": self.top_p, "top_logprobs": self.top_logprobs}


class Engine:
    """Generates for many sequences at once with one model.

    `batch_size` is the number of sequences decoded together. Each `run` draws with one temperature and top_p. A
    sequence that reaches the model's last position ends with finish reason "length".
    """

    def __init__(self, model: DeepseekV3, *, batch_size: int, eos_token_ids: Iterable[int]) -> None:
        self.batch_size = batch_size
        self.max_positions = model.config.max_position_embeddings
        self.eos_token_ids = frozenset(eos_token_ids)
        self.dtype = next(model.parameters()).dtype
        self.runner = ModelRunner(fuse_weights(model), batch_size)

    def run(
        self,
        sequences: Iterable[Sequence[Key]],
        *,
        temperature: float,
        top_p: float,
        top_logprobs: int = 0,
        more: Callable[[], Iterable[Sequence[Key]]] = tuple,
    ) -> Iterator[Sequence[Key]]:
        """Yield each sequence once it is finished. Prompts must be shorter than the model's last position.

        With `top_logprobs` each sequence's `logprobs` say how likely its tokens and that many best ones were. `more` is
        asked before every step which sequences have come since; the run ends when it has none and all are finished.
        """
        waiting = deque(sequences)
        running: list[Sequence[Key]] = []
        draw = Draw(temperature, top_p, top_logprobs)
        while waiting or running:
            if waiting and self._should_admit(len(waiting), len(running)):
                self._admit(waiting, running, draw)
            else:
                self._step(running, draw)
            yield from self._retire(running)
            waiting.extend(more())

    def _should_admit(self, num_waiting: int, num_running: int) -> bool:
        free = self.batch_size - num_running
        return free >= min(num_waiting, max(1, int(self.batch_size * _ADMIT_SHARE)))

    def _admit(self, waiting: deque[Sequence[Key]], running: list[Sequence[Key]], draw: Draw) -> None:
        """Prefill as many waiting sequences as fit; equal prompts are computed once."""
        groups: dict[tuple[int, ...], list[Sequence[Key]]] = {}
        longest = admitted = 0
        while waiting and len(running) + admitted < self.batch_size:
            prompt = tuple(waiting[0].prompt_ids)
            longest = max(longest, len(prompt))
            if groups and longest * (len(groups) + (prompt not in groups)) > _MAX_PREFILL_TOKENS:
                break
            groups.setdefault(prompt, []).append(waiting.popleft())
            admitted += 1
        slots: list[list[int]] = []
        rows: list[int] = []
        for row, group in enumerate(groups.values()):
            slots.append(list(range(len(running), len(running) + len(group))))
            rows += [row] * len(group)
            running += group
        logits = self.runner.prefill([list(prompt) for prompt in groups], slots)
        self._take(running[len(running) - admitted :], logits[rows], draw)

    def _step(self, running: list[Sequence[Key]], draw: Draw) -> None:
        logits = self.runner.decode([seq.generated_ids[-1] for seq in running], [seq.num_cached for seq in running])
        self._take(running, logits, draw)

    def _take(self, sequences: list[Sequence[Key]], logits_NV: Tensor, draw: Draw) -> None:
        sampled = sample(logits_NV, [s.draw() for s in sequences], temperature=draw.temperature, top_p=draw.top_p)
        tokens = [s.append(token, self.eos_token_ids) for s, token in zip(sequences, sampled, strict=True)]
        for sequence in sequences:
            if sequence.finish_reason is None and sequence.num_cached >= self.max_positions:
                sequence.finish_reason = "length"
        if draw.top_logprobs:
            for sequence, entry in zip(sequences, score(logits_NV, tokens, draw.top_logprobs), strict=True):
                sequence.logprobs.append(entry)

    def _retire(self, running: list[Sequence[Key]]) -> Iterator[Sequence[Key]]:
        """Remove finished sequences; the last live one moves into each freed slot."""
        for slot in range(len(running) - 1, -1, -1):
            if running[slot].finish_reason is None:
                continue
            finished, last = running[slot], running.pop()
            if last is not finished:
                running[slot] = last
                self.runner.cache.move(len(running), slot, last.num_cached)
            yield finished
