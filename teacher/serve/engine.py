"""Continuous batching: every step reads a piece of the prompts that wait and writes a token of each that is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from teacher.kernels.mla_cache import PAGE
from teacher.serve.architecture import Architecture
from teacher.serve.block_manager import BlockManager
from teacher.serve.cache import default_num_pages
from teacher.serve.detokenizer import Decode
from teacher.serve.runner import ModelRunner, with_drafts
from teacher.serve.sampler import sample, score
from teacher.serve.scheduler import Chunk, Scheduler
from teacher.serve.sequence import Key, Sequence
from teacher.serve.speculation import draft, take
from teacher.serve.step import in_order
from teacher.serve.stopping import Watch

# Tokens a step: enough to keep matrix products busy, few enough that others' prompts do not delay who decodes.
_CPU_STEP_TOKENS = 512
_CUDA_STEP_TOKENS = 4096


class Engine:
    """Generates for many sequences at once with one model.

    `batch_size` is the number of sequences in progress together. The cache has `num_pages` of 64 tokens (None: what
    `default_num_pages` says), a step at most `max_step_tokens` tokens and `max_chunk` of one prompt. A sequence that
    reaches `max_positions`, the model's last one or all that the cache can hold, ends with finish reason "length".

    With `speculate` a step writes up to two tokens of a sequence (`teacher.serve.speculation`), the same ones; raises
    ValueError for a model that has no layer to draft with. `decode` gives tokens their text, which stop strings need.
    """

    def __init__(
        self,
        model: Architecture,
        *,
        batch_size: int,
        eos_token_ids: Iterable[int],
        num_pages: int | None = None,
        max_step_tokens: int | None = None,
        max_chunk: int | None = None,
        prefix_caching: bool = True,
        cuda_graphs: bool = True,
        speculate: bool = False,
        decode: Decode | None = None,
    ) -> None:
        self.precision = model.precision
        self.batch_size = batch_size
        self.speculate = speculate
        self.eos_token_ids = frozenset(eos_token_ids)
        self._decode = decode
        if num_pages is None:
            shape = with_drafts(model) if speculate else model.cache_shape
            num_pages = default_num_pages(shape, batch_size, model.max_positions, model.dtype, model.device)
        self.max_positions = min(model.max_positions, num_pages * PAGE)
        self.num_computed_tokens = 0  # drafts among them
        self.num_drafts = self.num_accepted = 0
        self._refused: list[Sequence[Any]] = []
        step_tokens = max_step_tokens or (_CPU_STEP_TOKENS if model.device.type == "cpu" else _CUDA_STEP_TOKENS)
        step_tokens = max(step_tokens, batch_size * (1 + speculate))
        graphed = batch_size if cuda_graphs else 0
        self.runner = ModelRunner(model, num_pages, max_graphed=graphed, drafts=speculate)
        self.blocks = BlockManager(num_pages, extent=model.extent, caching=prefix_caching)
        self.scheduler: Scheduler[Any] = Scheduler(
            self.blocks, max_running=batch_size, max_step_tokens=step_tokens, max_chunk=max_chunk or step_tokens
        )

    def add(self, sequence: Sequence[Key]) -> None:
        """Let a sequence wait for its turn. One that can never fit gets a `fault`, and the next step returns it."""
        if len(sequence.prompt_ids) >= self.max_positions:
            room = self.max_positions - 1
            sequence.fault = f"the prompt has {len(sequence.prompt_ids)} tokens; the engine takes {room}"
        elif not sequence.prompt_ids:
            sequence.fault = "the prompt has no tokens"
        elif sequence.stops and self._decode is None:
            sequence.fault = "this engine knows no text, and stop strings are text"
        elif sequence.stops or sequence.repetition is not None:
            sequence.watch = Watch(sequence.stops, sequence.repetition, self._decode)
        (self.scheduler.waiting if sequence.fault is None else self._refused).append(sequence)

    def cancel(self, key: object) -> None:
        """Forget a sequence and free its pages; one that is not here (any more) is no matter."""
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            if sequence.key == key:
                self.scheduler.remove(sequence)
                return

    @property
    def is_idle(self) -> bool:
        return not (self.scheduler.running or self.scheduler.waiting or self._refused)

    def step(self) -> list[Sequence[Any]]:
        """Compute and sample once; returns the sequences that are finished."""
        chunks = in_order(self.scheduler.schedule())
        if chunks:
            logits_ZV = self.runner.run(chunks, self.blocks.take_copies())
            self._take(chunks, logits_ZV)
            if self.speculate:
                draft(self.runner, chunks, self.max_positions)
        return self._retire()

    def run(
        self, sequences: Iterable[Sequence[Key]], *, more: Callable[[], Iterable[Sequence[Key]]] = tuple
    ) -> Iterator[Sequence[Key]]:
        """Yield each sequence once it is finished, with its `fault` where it has one.

        `more` is asked before every step which sequences have come since; the run ends when it has none and all are
        finished. Whoever abandons the run abandons its sequences.
        """
        try:
            for sequence in sequences:
                self.add(sequence)
            while not self.is_idle:
                yield from self.step()
                for sequence in more():
                    self.add(sequence)
        finally:
            for sequence in (*self.scheduler.running, *self.scheduler.waiting):
                self.scheduler.remove(sequence)

    def _take(self, chunks: list[Chunk[Any]], logits_ZV: Tensor) -> None:
        """What was computed counts, and whose text is in the cache gets a token, or two where its draft came true."""
        places = [(chunk.sequence, ahead) for chunk in chunks for ahead in range(chunk.num_sampled)]
        sampled: list[int] = []
        if places:
            sampled = sample(logits_ZV, [s.uniform(ahead) for s, ahead in places], [s.draw for s, _ in places])
        taken: dict[int, int] = {}  # row of the logits: token
        row = 0
        for chunk in chunks:
            sequence, num_new = chunk.sequence, 0
            if chunk.ends_text:
                tokens = take(chunk, sampled[row : row + chunk.num_sampled], self.eos_token_ids)
                self.num_drafts += chunk.draft is not None
                self.num_accepted += chunk.draft == tokens[0]
                taken.update(enumerate(tokens, start=row))
                num_new = len(tokens) - 1
            row += chunk.num_sampled
            self.num_computed_tokens += chunk.num_rows
            self.scheduler.computed(sequence, chunk.count + num_new)
            if chunk.ends_text and sequence.finish_reason is None and sequence.num_computed >= self.max_positions:
                sequence.finish_reason = "length"
        self._score([sequence for sequence, _ in places], taken, logits_ZV)

    def _score(self, sequences: list[Sequence[Any]], taken: dict[int, int], logits_ZV: Tensor) -> None:
        rows = [row for row in taken if sequences[row].draw.top_logprobs]
        if not rows:
            return
        most = max(sequences[row].draw.top_logprobs for row in rows)
        scores = score(logits_ZV[torch.tensor(rows, device=logits_ZV.device)], [taken[row] for row in rows], most)
        for row, (own, best) in zip(rows, scores, strict=True):
            sequences[row].logprobs.append((own, best[: sequences[row].draw.top_logprobs]))

    def _retire(self) -> list[Sequence[Any]]:
        finished = [sequence for sequence in self.scheduler.running if sequence.finish_reason is not None]
        for sequence in finished:
            self.scheduler.remove(sequence)
        refused, self._refused = self._refused, []
        return refused + finished
