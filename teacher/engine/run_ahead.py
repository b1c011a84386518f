"""Run-ahead: a step is launched before the tokens of the one before it have reached the host.

What it is for. A step of a small model takes a GPU less time than the host needs to hear of its tokens, append them,
look for ends and schedule the next one. An engine that waits for the tokens leaves the GPU idle in between. So the
host launches step n + 1 while step n is under way, and handles the tokens of n while the device computes n + 1. Between
two steps it waits for one thing only: the copy of the older step's tokens, which was put on the stream right behind
that step. Measured on an H200 with the bundled teacher at batch 1: a step with drafts that waited to be judged brought
0.9 times the tokens/s of a step without, launched ahead 1.59 times (CHANGELOG, LOG of 2026-11-27).

What it assumes. Step n + 1 is launched as if every sequence went on; that, and which inputs it has, is settled in one
of two ways.

Without drafts each sequence gets exactly one token a step, so all but the token is known: positions, pages, uniform
numbers. The unknown token is a placeholder in `generated_ids` (`placeholders`), which the device replaces. Sequences
may come and go between the two steps: the scheduler plans n + 1 as ever, with `num_computed` and the text's length
already counted on. Pages are registered for sharing only once their tokens are known (`Scheduler.known`), since their
keys are hashes of the tokens; and a sequence that had to give its pages away is not admitted again while it has a
placeholder, for the same reason.

With drafts a sequence gets one token or two, and only the device knows which. The graph of step n judges its drafts,
makes the next ones and leaves tokens, lengths and the choice of uniform numbers where step n + 1 looks for them
(`graph_bodies`). So step n + 1 must be of the same sequences in the same order, and is launched only where that is
sure: all of them run, none is known to have ended, nobody waits for a free seat, and each can have pages for the most
that it may need (`Scheduler.reserve_lookahead`). The host gives it its chunks afterwards (`LaunchedStep.judged`).

When it does not launch. Where the host has a say in the next token (a thinking limit may force one; penalties and a
grammar go by the one before it) or must keep the logits (logprobs), where run-ahead is off, and, with drafts, where the
step was no graph or the conditions above do not hold: then the tokens are waited for first, and the scheduler plans the
next step from what is known.

When an assumption fails. Nothing is undone on the device:
- A sequence ended with step n (end token, stop string, loop). Its rows of n + 1 are computed all the same, one token
  too many or two; the host passes over them, since `is_ended`. Its pages may go to another sequence meanwhile, because
  steps run in the order of their launch: whoever gets the pages writes them after n + 1 has.
- A sequence was cancelled. The same, as `is_wanted` is then false.
- A draft was rejected. Step n left the length behind the last token that holds, so n + 1 writes over the rejected
  token's cache entries.
- A sequence was preempted while its token was under way. Its chunk's token is appended when it arrives; the pages are
  not registered, as `num_computed` is behind them; it waits without pages until its placeholder is gone.

Same tokens either way: run-ahead decides when work is launched, never what is computed.
"""

from __future__ import annotations

from typing import Any

import torch

from teacher.engine.block_manager import BlockManager
from teacher.engine.runner import ModelRunner, SampledTokens
from teacher.engine.scheduler import Chunk, Scheduler

# With drafts: two tokens that the step under way may write beyond the known one's place, and the next step's draft.
_LOOKAHEAD_TOKENS = 3


class LaunchedStep:
    """A step whose tokens are on their way to the host. Logits of a graph hold until another step is launched.

    `is_counted`: its sequences have placeholders for its tokens, and count what it computes as computed.
    """

    def __init__(self, chunks: list[Chunk[Any]], sampled: SampledTokens, *, is_counted: bool = False) -> None:
        self.chunks = chunks
        self.sampled = sampled
        self.is_counted = is_counted
        self._numbers = sampled.tokens_Z
        if sampled.drafts_B is not None:
            self._numbers = torch.cat((sampled.tokens_Z, sampled.drafts_B))
        self._arrived: torch.cuda.Event | None = None
        if self._numbers.is_cuda:
            # The copy stands on the stream behind this step and before the next one. The event tells when it is done;
            # to wait for the stream instead would be to wait for whatever has been launched behind it.
            on_device = self._numbers
            self._numbers = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self._numbers.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def token_ids(self) -> list[int]:
        """Wait for the tokens."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers[: len(self.sampled.tokens_Z)].tolist()

    def drafts(self) -> list[int] | None:
        """A guess for each chunk's sequence, where the device has made them; to be asked for after the tokens."""
        if self.sampled.drafts_B is None:
            return None
        return self._numbers[len(self.sampled.tokens_Z) :].tolist()

    def judged(self, before: LaunchedStep) -> None:
        """Say what this step computes, now that the host has heard of the one before it."""
        drafts = before.drafts()
        assert drafts is not None
        self.chunks = [Chunk(chunk.sequence, 1, draft) for chunk, draft in zip(before.chunks, drafts, strict=True)]
        for chunk in self.chunks:
            chunk.ends_text = True  # those that have ended meanwhile have their rows too


class RunAhead:
    """Launches steps, and keeps the one that is under way. `is_on`: steps may be launched before tokens are known."""

    def __init__(
        self,
        runner: ModelRunner,
        blocks: BlockManager,
        scheduler: Scheduler[Any],
        *,
        is_on: bool,
        speculate: bool,
        max_positions: int,
    ) -> None:
        self._runner = runner
        self._blocks = blocks
        self._scheduler = scheduler
        self._is_on = is_on
        self._speculate = speculate
        self._max_positions = max_positions
        self._under_way: LaunchedStep | None = None

    def take(self) -> LaunchedStep | None:
        """Hand over the step under way, whose tokens are not known yet."""
        before, self._under_way = self._under_way, None
        return before

    def keep(self, step: LaunchedStep) -> bool:
        """Leave a step under way, if it may be; else its tokens must be waited for before the next is launched."""
        stays = self._is_on and step.sampled.drafts_B is not None if self._speculate else step.is_counted
        if stays:
            self._under_way = step
        return stays

    def forget(self) -> None:
        """Abandon the step under way."""
        self._under_way = None

    def launch(self, chunks: list[Chunk[Any]], before: LaunchedStep | None, *, graphed: bool = True) -> LaunchedStep:
        """Launch a step of these chunks. Placeholders in them stand for tokens of `before`, the step under way."""
        before_Z = None if before is None else before.sampled.tokens_Z
        sampled = self._runner.run(chunks, self._blocks.take_copies(), before_Z, graphed=graphed)
        is_counted = self._is_on and not self._speculate and all(chunk.sequence.may_run_ahead for chunk in chunks)
        if is_counted:
            writing = [chunk.sequence for chunk in chunks if chunk.ends_text]
            for row, sequence in enumerate(writing):
                sequence.append_placeholder(row)
            for chunk in chunks:
                chunk.sequence.num_computed += chunk.count
        return LaunchedStep(chunks, sampled, is_counted=is_counted)

    def launch_on(self, before: LaunchedStep) -> LaunchedStep | None:
        """Launch the step behind one with drafts that is under way, where it is sure to be of the same sequences.

        That one writes one or two tokens of each, and this one computes two rows; `judged` gives it its chunks.
        """
        graph, sequences = before.sampled.graph, [chunk.sequence for chunk in before.chunks]
        fits = all(sequence.num_tokens + _LOOKAHEAD_TOKENS <= self._max_positions for sequence in sequences)
        ends = all(len(sequence.generated_ids) + 1 >= sequence.max_tokens for sequence in sequences)
        if not fits or ends or not self._scheduler.reserve_lookahead(sequences, _LOOKAHEAD_TOKENS):
            return None
        assert graph is not None  # only graphs make drafts, and only what has made drafts is under way
        return LaunchedStep([], self._runner.run_on(graph, sequences, self._blocks.take_copies()))
