"""Continuous batching: every step reads a piece of the prompts that wait and writes a token of each that is read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from teacher.kernels.mla_cache import PAGE
from teacher.serve.architecture import Architecture
from teacher.serve.block_manager import BlockManager
from teacher.serve.cache import default_num_pages
from teacher.serve.detokenizer import Decode
from teacher.serve.runner import ModelRunner, Outcome, with_drafts
from teacher.serve.sampler import score
from teacher.serve.scheduler import Chunk, Scheduler
from teacher.serve.sequence import Key, Sequence
from teacher.serve.speculation import draft, take
from teacher.serve.step import in_order
from teacher.serve.stopping import Watch

# Tokens a step: enough to keep matrix products busy, few enough that others' prompts do not delay who decodes.
_CPU_STEP_TOKENS = 512
_CUDA_STEP_TOKENS = 4096


def default_step_tokens(device: torch.device) -> int:
    return _CPU_STEP_TOKENS if device.type == "cpu" else _CUDA_STEP_TOKENS


class Lockstep(Protocol):
    """Engines whose experts are spread over ranks take their steps together (`teacher.parallel.serving`)."""

    is_on: bool  # whether any rank may still have something to compute

    def wait(self, num_waiting: int, is_closing: bool) -> tuple[int, bool]:
        """Between runs: the sequences that wait on the rank where most do, and whether all ranks are closing.
        Collective."""
        ...

    def begin(self, num_rows: int, num_warm_ups: int) -> bool:
        """Before each step, of so many rows here, none perhaps: whether it may be a graph. Collective.

        Where there are no rows the ranks are given their share of the step, before it returns.
        """
        ...


class Engine:
    """Generates for many sequences at once with one model.

    `batch_size` is the number of sequences in progress together. The cache has `num_pages` of 64 tokens (None: what
    `default_num_pages` says), a step at most `max_step_tokens` tokens and `max_chunk` of one prompt. A sequence that
    reaches `max_positions`, the model's last one or all that the cache can hold, ends with finish reason "length".

    With `speculate` a step writes up to two tokens of a sequence (`teacher.serve.speculation`), the same ones; raises
    ValueError for a model that has no layer to draft with. `decode` gives tokens their text, which stop strings need.

    With `run_ahead` (None: on a GPU) a step is launched before the tokens of the one before it have come back: the
    device never waits for the host, and of a sequence that ends meanwhile a token too many is computed, or two. It
    waits nevertheless for a sequence whose next token is not the device's alone to say (thinking limits, logprobs), and
    with speculation where sequences come or go: only the graph of a batch knows how many of its drafts came true.

    `lockstep`: the model shares its experts with other ranks' engines, which all take their steps together.
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
        run_ahead: bool | None = None,
        decode: Decode | None = None,
        lockstep: Lockstep | None = None,
    ) -> None:
        if lockstep is not None and speculate:
            raise ValueError("ranks that share experts do not speculate: the drafts' experts are not shared")
        self._lockstep = lockstep
        self.precision = model.precision
        self.batch_size = batch_size
        self.speculate = speculate
        self._runs_ahead = model.device.type == "cuda" if run_ahead is None else run_ahead
        self._under_way: _Launched | None = None
        self._ended: list[Sequence[Any]] = []
        self.eos_token_ids = frozenset(eos_token_ids)
        self._decode = decode
        if num_pages is None:
            shape = with_drafts(model) if speculate else model.cache_shape
            num_pages = default_num_pages(shape, batch_size, model.max_positions, model.dtype, model.device)
        self.max_positions = min(model.max_positions, num_pages * PAGE)
        self.num_computed_tokens = 0  # drafts among them
        self.num_drafts = self.num_accepted = 0
        step_tokens = max(max_step_tokens or default_step_tokens(model.device), batch_size * (1 + speculate))
        graphed = batch_size if cuda_graphs else 0
        self.runner = ModelRunner(model, num_pages, max_graphed=graphed, drafts=speculate)
        self.blocks = BlockManager(num_pages, extent=model.extent, caching=prefix_caching)
        self.scheduler: Scheduler[Any] = Scheduler(
            self.blocks, max_running=batch_size, max_step_tokens=step_tokens, max_chunk=max_chunk or step_tokens
        )

    def add(self, sequence: Sequence[Key]) -> None:
        """Let a sequence wait for its turn. One that can never fit gets a `fault`, and the next step returns it."""
        room = self.max_positions - len(sequence.prompt_ids)
        if room <= 0:
            most = self.max_positions - 1
            sequence.fault = f"the prompt has {len(sequence.prompt_ids)} tokens; the engine takes {most}"
        elif not sequence.prompt_ids:
            sequence.fault = "the prompt has no tokens"
        elif sequence.stops and self._decode is None:
            sequence.fault = "this engine knows no text, and stop strings are text"
        elif sequence.stops or sequence.repetition is not None:
            sequence.watch = Watch(sequence.stops, sequence.repetition, self._decode)
        sequence.max_tokens = min(sequence.max_tokens, room + 1)  # the last token needs no place of its own
        (self.scheduler.waiting if sequence.fault is None else self._ended).append(sequence)

    def cancel(self, key: object) -> None:
        """Forget a sequence and free its pages; one that is not here (any more) is no matter."""
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            if sequence.key == key:
                self._forget(sequence)
                return

    @property
    def is_idle(self) -> bool:
        others = self._lockstep is not None and self._lockstep.is_on
        return not (self.scheduler.running or self.scheduler.waiting or self._ended or others)

    def step(self) -> list[Sequence[Any]]:
        """Compute and sample once; returns the sequences that are finished."""
        if self.speculate:
            self._step_with_drafts()
        else:
            self._step()
        ended, self._ended = self._ended, []
        return ended

    def _step(self) -> None:
        before, self._under_way = self._under_way, None
        chunks = in_order(self.scheduler.schedule())
        graphed = True
        if self._lockstep is not None:
            num_rows = sum(chunk.num_rows for chunk in chunks)
            graphed = self._lockstep.begin(num_rows, self.runner.num_warm_ups(chunks))
        launched = self._launch(chunks, before, graphed=graphed) if chunks else None
        if before is not None:
            self._take(before)
        if launched is not None and launched.runs_ahead:
            self._under_way = launched
        elif launched is not None:
            self._take(launched)

    def _step_with_drafts(self) -> None:
        before, self._under_way = self._under_way, None
        if before is not None:
            onward = self._launch_on(before)
            self._take_with_drafts(before)
            if onward is not None:
                guesses = before.drafts()
                assert guesses is not None
                onward.chunks = [Chunk(c.sequence, 1, guess) for c, guess in zip(before.chunks, guesses, strict=True)]
                for chunk in onward.chunks:
                    chunk.ends_text = True  # those that have ended meanwhile have their rows too
                self._under_way = onward
                return
        if not (chunks := in_order(self.scheduler.schedule())):
            return
        launched = self._launch(chunks)
        if self._runs_ahead and launched.outcome.drafts_B is not None:
            self._under_way = launched
        else:
            self._take_with_drafts(launched)

    def run(
        self, sequences: Iterable[Sequence[Key]], *, more: Callable[[], Iterable[Sequence[Key]]] = tuple
    ) -> Generator[Sequence[Key], None, None]:
        """Yield each sequence once it is finished, with its `fault` where it has one.

        `more` is asked before every step which sequences have come since; the run ends when it has none and all are
        finished. Whoever abandons the run abandons its sequences. With `lockstep` all ranks run, with or without
        sequences, and the runs end when all are finished on all of them.
        """
        if self._lockstep is not None:
            self._lockstep.is_on = True
        try:
            for sequence in sequences:
                self.add(sequence)
            while not self.is_idle:
                yield from self.step()
                for sequence in more():
                    self.add(sequence)
        finally:
            for sequence in (*self.scheduler.running, *self.scheduler.waiting):
                self._forget(sequence)
            self._under_way = None

    def _forget(self, sequence: Sequence[Any]) -> None:
        sequence.is_wanted = False
        self.scheduler.remove(sequence)

    def _launch(self, chunks: list[Chunk[Any]], before: _Launched | None = None, *, graphed: bool = True) -> _Launched:
        """`before` is the step under way, where its tokens are not here yet."""
        before_Z = None if before is None else before.outcome.tokens_Z
        outcome = self.runner.run(chunks, self.blocks.take_copies(), before_Z, graphed=graphed)
        runs_ahead = self._runs_ahead and not self.speculate and all(chunk.sequence.may_run_ahead for chunk in chunks)
        if runs_ahead:
            writing = [chunk.sequence for chunk in chunks if chunk.ends_text]
            for row, sequence in enumerate(writing):
                sequence.expect(row)
            for chunk in chunks:
                chunk.sequence.num_computed += chunk.count
        return _Launched(chunks, outcome, runs_ahead)

    def _launch_on(self, before: _Launched) -> _Launched | None:
        """The step behind one with drafts that is under way, where it will be of the same sequences.

        That one writes one or two tokens of each, and this one computes two rows.
        """
        sequences = [chunk.sequence for chunk in before.chunks]
        fits = all(sequence.num_tokens + 3 <= self.max_positions for sequence in sequences)
        ends = all(len(sequence.generated_ids) + 1 >= sequence.max_tokens for sequence in sequences)
        if not fits or ends or not self.scheduler.go_on(sequences, 3):
            return None
        return _Launched([], self.runner.run_on(sequences, self.blocks.take_copies()), runs_ahead=False)

    def _take_with_drafts(self, launched: _Launched) -> None:
        self._take(launched)
        draft(self.runner, launched.chunks, self.max_positions, launched.drafts())

    def _take(self, launched: _Launched) -> None:
        """What was computed counts, and whose text is in the cache gets a token, or two where its draft came true."""
        sampled = launched.token_ids()
        row, rows, tokens_of_rows = 0, [], []
        for chunk in launched.chunks:
            sequence, num_new = chunk.sequence, 0
            first, row = row, row + chunk.num_sampled
            self.num_computed_tokens += chunk.num_rows
            if sequence.is_ended:
                continue  # it ended, or was withdrawn, while this step was under way
            if chunk.ends_text:
                tokens = take(chunk, sampled[first:row], self.eos_token_ids)
                self.num_drafts += chunk.draft is not None
                self.num_accepted += chunk.draft == tokens[0]
                num_new = len(tokens) - 1
                if sequence.draw.top_logprobs:
                    rows += [(first + ahead, sequence) for ahead in range(len(tokens))]
                    tokens_of_rows += tokens
            if launched.runs_ahead:
                self.scheduler.known(sequence, chunk.start, chunk.end)
            else:
                self.scheduler.computed(sequence, chunk.count + num_new)
            if sequence.finish_reason is not None:
                self.scheduler.remove(sequence)
                self._ended.append(sequence)
        if rows:
            assert launched.outcome.logits_ZV is not None
            self._score(launched.outcome.logits_ZV, rows, tokens_of_rows)

    def _score(self, logits_ZV: Tensor, rows: list[tuple[int, Sequence[Any]]], tokens: list[int]) -> None:
        most = max(sequence.draw.top_logprobs for _, sequence in rows)
        scores = score(logits_ZV[torch.tensor([row for row, _ in rows], device=logits_ZV.device)], tokens, most)
        for (_, sequence), (own, best) in zip(rows, scores, strict=True):
            sequence.logprobs.append((own, best[: sequence.draw.top_logprobs]))


class _Launched:
    """A step whose tokens are on their way to the host. Logits of a graph hold until another step is launched."""

    def __init__(self, chunks: list[Chunk[Any]], outcome: Outcome, runs_ahead: bool) -> None:
        self.chunks = chunks
        self.outcome = outcome
        self.runs_ahead = runs_ahead
        tokens_Z, _, drafts_B = outcome
        self._numbers = tokens_Z if drafts_B is None else torch.cat((tokens_Z, drafts_B))
        self._arrived: torch.cuda.Event | None = None
        if tokens_Z.is_cuda:
            on_device = self._numbers
            self._numbers = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self._numbers.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def token_ids(self) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers[: len(self.outcome.tokens_Z)].tolist()

    def drafts(self) -> list[int] | None:
        """A guess for each chunk's sequence, where the device has made them; to be asked for after the tokens."""
        return None if self.outcome.drafts_B is None else self._numbers[len(self.outcome.tokens_Z) :].tolist()
