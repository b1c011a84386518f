"""Continuous batching: every step reads a piece of the prompts that wait and writes a token of each that is read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from teacher.engine.architecture import Architecture
from teacher.engine.block_manager import BlockManager
from teacher.engine.cache import default_num_pages
from teacher.engine.detokenizer import Decode
from teacher.engine.run_ahead import LaunchedStep, RunAhead
from teacher.engine.runner import ModelRunner, with_drafts
from teacher.engine.sampler import score
from teacher.engine.scheduler import Chunk, Scheduler
from teacher.engine.sequence import Key, Sequence
from teacher.engine.speculation import draft, take
from teacher.engine.step import in_order
from teacher.engine.stopping import Watch
from teacher.engine.token_counts import TokenCounts
from teacher.kernels.attention.mla_cache import PAGE

# Tokens a step: enough to keep matrix products busy, few enough that others' prompts do not delay who decodes.
_CPU_STEP_TOKENS = 512
_CUDA_STEP_TOKENS = 4096


def default_step_tokens(device: torch.device) -> int:
    """Tokens that a step computes at most."""
    return _CPU_STEP_TOKENS if device.type == "cpu" else _CUDA_STEP_TOKENS


class Lockstep(Protocol):
    """Engines whose experts are spread over ranks take their steps together (`teacher.parallel.serving`)."""

    is_on: bool  # whether any rank may still have something to compute

    def wait(self, num_waiting: int, is_closing: bool) -> tuple[int, bool]:
        """Agree between runs: the sequences that wait on the rank where most do, and whether all ranks are closing.

        Collective.
        """
        ...

    def begin(self, num_rows: int, num_warm_ups: int) -> bool:
        """Agree before each step, of so many rows here, none perhaps, whether it may be a graph. Collective.

        Where there are no rows the ranks are given their share of the step, before it returns.
        """
        ...


class EngineCounts(NamedTuple):
    """Counts of an engine's work since it was made, and of what it has under way.

    `num_computed_tokens` are prompts' too, and drafts; `num_written_tokens` are those of the answers.
    """

    num_computed_tokens: int = 0
    num_written_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0


class Engine:
    """Generates for many sequences at once with one model.

    `batch_size` is the number of sequences in progress together. The cache has `num_pages` of 64 tokens (None: what
    `default_num_pages` says), a step at most `max_step_tokens` tokens and `max_chunk` of one prompt. A sequence that
    reaches `max_positions`, the model's last one or all that the cache can hold, ends with finish reason "length".

    With `speculate` a step writes up to two tokens of a sequence (`teacher.engine.speculation`), the same ones; raises
    ValueError for a model that has no layer to draft with. `decode` gives tokens their text, which stop strings need.

    With `run_ahead` (None: on a GPU) a step is launched before the tokens of the one before it have come back, so that
    the device need not wait for the host (`teacher.engine.run_ahead`).

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
        self._ended: list[Sequence[Any]] = []
        self.eos_token_ids = frozenset(eos_token_ids)
        self._decode = decode
        if num_pages is None:
            shape = with_drafts(model) if speculate else model.cache_shape
            num_pages = default_num_pages(shape, batch_size, model.max_positions, model.dtype, model.device)
        self.max_positions = min(model.max_positions, num_pages * PAGE)
        self.num_computed_tokens = self.num_written_tokens = 0
        self.num_drafts = self.num_accepted = 0
        step_tokens = max(max_step_tokens or default_step_tokens(model.device), batch_size * (1 + speculate))
        graphed = batch_size if cuda_graphs else 0
        self.runner = ModelRunner(
            model,
            num_pages,
            max_graphed=graphed,
            max_rows=step_tokens,
            drafts=speculate,
            one_pass=lockstep is not None,
        )
        self._extent, self._warms_up = model.extent, model.reads_together
        self.blocks = BlockManager(num_pages, extent=model.extent, caching=prefix_caching)
        self.scheduler: Scheduler[Any] = Scheduler(
            self.blocks,
            max_running=batch_size,
            max_step_tokens=step_tokens,
            max_chunk=max_chunk or step_tokens,
            admits_together=self.runner.graphs is not None and model.reads_together,
        )
        self._run_ahead = RunAhead(
            self.runner,
            self.blocks,
            self.scheduler,
            is_on=model.device.type == "cuda" if run_ahead is None else run_ahead,
            speculate=speculate,
            max_positions=self.max_positions,
        )

    @torch.inference_mode()
    def warm_up(self) -> Generator[int, None, None]:
        """Compile kernels and capture graphs before there is work, yielding how many graphs are left after each.

        Only of models whose prompts are read together; others capture a graph when they first need it.
        """
        graphs = self.runner.graphs
        if graphs is not None and self._warms_up:
            yield from graphs.warm_up(self.batch_size)

    def add(self, sequence: Sequence[Key]) -> None:
        """Let a sequence wait for its turn. One that can never fit gets a `fault`, and the next step returns it."""
        room = self.max_positions - len(sequence.prompt_ids)
        # One token alone needs no place of its own: it may follow a prompt that has them all.
        if room < (sequence.max_tokens > 1):
            most = self.max_positions - 1
            sequence.fault = f"the prompt has {len(sequence.prompt_ids)} tokens; the engine takes {most}"
        elif not sequence.prompt_ids:
            sequence.fault = "the prompt has no tokens"
        elif sequence.stops and self._decode is None:
            sequence.fault = "this engine knows no text, and stop strings are text"
        elif sequence.grammar is not None and sequence.guide is None:
            sequence.fault = "this engine has no vocabulary, and a grammar needs one"
        elif sequence.stops or sequence.repetition is not None:
            sequence.watch = Watch(sequence.stops, sequence.repetition, self._decode)
        if sequence.sampling_params.penalises:
            repeated = sequence.sampling_params.repetition_penalty != 1
            sequence.counts = TokenCounts(sequence.prompt_ids if repeated else ())
        sequence.max_tokens = min(sequence.max_tokens, room + 1)  # the last token needs no place of its own
        (self.scheduler.waiting if sequence.fault is None else self._ended).append(sequence)

    def cancel(self, key: object) -> None:
        """Forget a sequence and free its pages; one that is not here (any more) is no matter."""
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            if sequence.key == key:
                self._forget(sequence)
                return

    @property
    def counts(self) -> EngineCounts:
        """How the work stands; may be asked from any thread."""
        queued = len(self.scheduler.running), len(self.scheduler.waiting)
        return EngineCounts(self.num_computed_tokens, self.num_written_tokens, *queued)

    @property
    def is_idle(self) -> bool:
        others = self._lockstep is not None and self._lockstep.is_on
        return not (self.scheduler.running or self.scheduler.waiting or self._ended or others)

    def step(self) -> list[Sequence[Any]]:
        """Schedule, run and postprocess once; returns the sequences that are finished."""
        before = self._run_ahead.take()  # still under way: its tokens are not known here
        launched = None
        if self.speculate and before is not None:
            launched = self._run_ahead.launch_on(before)
            self._postprocess(before)
            if launched is not None:
                launched.judged(before)
            before = None
        if launched is None:
            launched = self._schedule_and_run(before)
        if before is not None:  # only now, while the device computes the step behind it
            self._postprocess(before)
        if launched is not None and not self._run_ahead.keep(launched):
            self._postprocess(launched)
        ended, self._ended = self._ended, []
        return ended

    def _schedule_and_run(self, before: LaunchedStep | None) -> LaunchedStep | None:
        chunks = in_order(self.scheduler.schedule(), extent=self._extent)
        graphed = True
        if self._lockstep is not None:  # also without chunks: this rank's experts serve the others
            num_rows = sum(chunk.num_rows for chunk in chunks)
            graphed = self._lockstep.begin(num_rows, self.runner.num_warm_ups(chunks))
        return self._run_ahead.launch(chunks, before, graphed=graphed) if chunks else None

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
            self._run_ahead.forget()

    def _forget(self, sequence: Sequence[Any]) -> None:
        sequence.is_wanted = False
        self.scheduler.remove(sequence)

    def _postprocess(self, step: LaunchedStep) -> None:
        """Append the step's tokens, and with speculation give every sequence that goes on its next draft."""
        self._append(step)
        if self.speculate:
            source = step.drafts() if step.sampled.forward is None else step.sampled.forward
            assert source is not None
            draft(self.runner, step.chunks, self.max_positions, source)

    def _append(self, step: LaunchedStep) -> None:
        """Count what was computed, and give whose text is in the cache a token, or two where its draft came true."""
        sampled = step.token_ids()
        self.num_computed_tokens += sum([chunk.num_rows for chunk in step.chunks])
        if step.is_counted:
            self._append_one_each(step.chunks, sampled)
            return
        row, rows, tokens_of_rows = 0, [], []
        for chunk in step.chunks:
            sequence, num_new = chunk.sequence, 0
            first, row = row, row + chunk.num_sampled
            if sequence.is_ended:
                continue  # it ended, or was cancelled, while this step was under way
            if chunk.ends_text:
                tokens = take(chunk, sampled[first:row], self.eos_token_ids)
                self.num_drafts += chunk.draft is not None
                self.num_accepted += chunk.draft == tokens[0]
                num_new = len(tokens) - 1
                self.num_written_tokens += len(tokens)
                if sequence.sampling_params.top_logprobs:
                    rows += [(first + ahead, sequence) for ahead in range(len(tokens))]
                    tokens_of_rows += tokens
            self.scheduler.computed(sequence, chunk.count + num_new)
            if sequence.finish_reason is not None:
                self.scheduler.remove(sequence)
                self._ended.append(sequence)
        if rows:
            assert step.sampled.forward is not None
            self._score(step.sampled.forward.logits_ZV, rows, tokens_of_rows)

    def _append_one_each(self, chunks: list[Chunk[Any]], sampled: list[int]) -> None:
        """Do as `_append` for a step whose sequences have counted it: a token each, without drafts and logprobs.

        Most steps are this one, and what it does a sequence is most of what the host does at all.
        """
        tokens, ends, num_written = iter(sampled), self.eos_token_ids, 0
        for chunk in chunks:
            sequence, token = chunk.sequence, next(tokens) if chunk.ends_text else None
            if sequence.finish_reason is not None or not sequence.is_wanted:
                continue  # it ended, or was cancelled, while this step was under way
            if token is not None:
                sequence.append(token, ends)
                num_written += 1
            end = chunk.start + chunk.count
            if chunk.start // PAGE != end // PAGE or sequence.tail_key is not None:
                self.scheduler.known(sequence, chunk.start, end)
            if sequence.finish_reason is not None:
                self.scheduler.remove(sequence)
                self._ended.append(sequence)
        self.num_written_tokens += num_written

    def _score(self, logits_ZV: Tensor, rows: list[tuple[int, Sequence[Any]]], tokens: list[int]) -> None:
        most = max(sequence.sampling_params.top_logprobs for _, sequence in rows)
        scores = score(logits_ZV[torch.tensor([row for row, _ in rows], device=logits_ZV.device)], tokens, most)
        for (_, sequence), (own, best) in zip(rows, scores, strict=True):
            sequence.logprobs.append((own, best[: sequence.sampling_params.top_logprobs]))
