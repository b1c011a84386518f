"""Scheduling: which tokens the next step computes.

Sequences that decode come first, a token each and the draft of another where there is one: no prompt delays them. What
is left of the step's budget goes to prompts, chunk by chunk, in the order of their arrival, so that each step brings
the first of them forward and none starves.

A sequence is admitted when the pages of all its tokens are there, and one more for every sequence that runs. Where a
prompt costs a pass of its own, admissions are held back for a few steps until some places are free: one pass then reads
several prompts, and the places that stand empty meanwhile are few of many.

When pages run out nevertheless, the newest sequence lets go of its own and waits at the head of the queue, with its
text and its random numbers: what it says does not change, only its latents are computed again.
"""

from __future__ import annotations

from collections import deque
from typing import Generic

from teacher.engine.block_manager import BlockManager, Copy, num_pages_for, page_key
from teacher.engine.sequence import Key, Sequence
from teacher.kernels.attention.mla_cache import PAGE

# How many waiting sequences are looked at behind one that waits for the prompt it shares.
_LOOK_AHEAD = 64
# Admissions wait for one place in so many to be free, and no longer than so many steps.
_PLACES_A_FREE_ONE = 32
_MOST_HELD_STEPS = 16


class Chunk(Generic[Key]):
    """The next `count` tokens of a sequence, and behind them, if it is there, the `draft` of the one that may follow.

    `start` is where they begin; `ends_text` whether logits behind them say how the text goes on.
    """

    __slots__ = ("count", "draft", "ends_text", "sequence", "start")

    def __init__(self, sequence: Sequence[Key], count: int, draft: int | None = None) -> None:
        self.sequence, self.count, self.draft = sequence, count, draft
        self.start = sequence.num_computed
        self.ends_text = self.start + count == len(sequence.prompt_ids) + len(sequence.generated_ids)

    @property
    def num_rows(self) -> int:
        return self.count + (self.draft is not None)

    @property
    def num_sampled(self) -> int:
        """Rows behind which a token is drawn: the last one, and the draft's."""
        return self.ends_text + (self.draft is not None)

    @property
    def end(self) -> int:
        return self.start + self.num_rows

    @property
    def scored(self) -> range:
        """Places of its tokens behind which a token of the prompt stands that waits for its logprob."""
        sequence = self.sequence
        if not sequence.is_unscored:
            return range(0)
        first = max(self.start, sequence.first_unscored)  # more are there where it had to wait, and starts again
        return range(first, max(first, min(self.start + self.count, len(sequence.prompt_ids) - 1)))

    @property
    def token_ids(self) -> list[int]:
        draft = [] if self.draft is None else [self.draft]
        return self.sequence.tokens(self.start, self.start + self.count) + draft


class Scheduler(Generic[Key]):
    """Sequences that run, in the order of admission, and those that wait."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_running: int,
        max_step_tokens: int,
        max_chunk: int,
        admits_together: bool = False,
    ) -> None:
        if max_step_tokens < max_running:
            raise ValueError(f"max_step_tokens must be at least {max_running}, got {max_step_tokens}")
        self.blocks = blocks
        self.waiting: deque[Sequence[Key]] = deque()
        self.running: list[Sequence[Key]] = []  # in the order of admission
        self.num_preempted = 0
        self._max_running = max_running
        self._max_step_tokens = max_step_tokens
        self._max_chunk = max_chunk
        self._wanted_places = max(max_running // _PLACES_A_FREE_ONE, 1) if admits_together else 1
        self._num_held_steps = 0
        self._being_computed: dict[bytes, Sequence[Key]] = {}  # keys of pages that others may wait for

    def schedule(self) -> list[Chunk[Key]]:
        """The chunks of a step; empty only where no sequence is left."""
        # Phase 1: who decodes, a token each; phase 2: prompts already begun; phase 3: admissions, while there is room.
        chunks = self._decodes()
        left = self._max_step_tokens - sum(chunk.num_rows for chunk in chunks)
        for sequence in self.running:
            if left and sequence.num_left > 1:
                chunks.append(self._chunk(sequence, left))
                left -= chunks[-1].count
        if self._holds_back(is_decoding=bool(chunks)):
            return chunks
        while left and len(self.running) < self._max_running and (sequence := self._admit()) is not None:
            chunks.append(self._chunk(sequence, left))
            left -= chunks[-1].count
        return chunks

    def _holds_back(self, *, is_decoding: bool) -> bool:
        """Tell whether admissions wait for more places to be free."""
        num_free = self._max_running - len(self.running)
        wanted = min(self._wanted_places, len(self.waiting))
        holds = is_decoding and 0 < num_free < wanted and self._num_held_steps < _MOST_HELD_STEPS
        self._num_held_steps = self._num_held_steps + 1 if holds else 0
        return holds

    def reserve_lookahead(self, sequences: list[Sequence[Key]], num_lookahead_tokens: int) -> bool:
        """Reserve pages for so many tokens more than are known, if the next step is sure to be of these again.

        Returns whether it is, though it is not known here what the step under way writes.
        """
        waits = self.waiting and len(self.running) < self._max_running
        if waits or len(sequences) != len(self.running) or any(sequence.is_ended for sequence in sequences):
            return False
        wanted = [
            num_pages_for(sequence.num_tokens + num_lookahead_tokens) - len(sequence.pages) for sequence in sequences
        ]
        if sum(max(number, 0) for number in wanted) > self.blocks.num_available:
            return False
        for sequence, number in zip(sequences, wanted, strict=True):
            for _ in range(number):
                sequence.pages.append(self.blocks.allocate(after=sequence.pages[-1]))
        return True

    def computed(self, sequence: Sequence[Key], count: int) -> None:
        """Count the next `count` tokens as in the cache.

        A draft that was refused is none of them: what it left is written over.
        """
        sequence.num_computed += count
        self.known(sequence, sequence.num_computed - count, sequence.num_computed)

    def known(self, sequence: Sequence[Key], start: int, end: int) -> None:
        """Register for sharing what pages these tokens fill, and the end of the prompt: it is known which they are."""
        if not self.blocks.caching or sequence.num_computed < end:  # it gave its pages away meanwhile
            return
        for index in range(start // PAGE, end // PAGE):
            key = self._key(sequence, index)
            self.blocks.register(sequence.pages[index], key, full=True)
            self._being_computed.pop(key, None)
        if sequence.tail_key is not None and end >= len(sequence.prompt_ids):
            self.blocks.register(sequence.pages[len(sequence.prompt_ids) // PAGE], sequence.tail_key, full=False)
            self._being_computed.pop(sequence.tail_key, None)
            sequence.tail_key = None

    def remove(self, sequence: Sequence[Key]) -> None:
        """Drop a sequence that is finished, or no longer wanted."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def _decodes(self) -> list[Chunk[Key]]:
        chunks = []
        for sequence in tuple(self.running):
            # This is asked of every sequence at every step: `num_left` and `is_written`, spelled out.
            num_generated = len(sequence.generated_ids)
            num_tokens = len(sequence.prompt_ids) + num_generated
            if num_tokens - sequence.num_computed != 1 or num_generated >= sequence.max_tokens or not sequence.pages:
                continue
            if num_tokens <= PAGE * len(sequence.pages) or self._make_room(sequence):
                chunks.append(Chunk(sequence, 1))
        for chunk in chunks[: self._max_step_tokens - len(chunks)]:  # only now: no sequence gives way to a draft
            if chunk.sequence.draft is not None:
                self._add_draft(chunk)
        return chunks

    def _add_draft(self, chunk: Chunk[Key]) -> None:
        """Give a chunk its sequence's draft, where there is one, and room for its latents."""
        sequence = chunk.sequence
        if sequence.draft is None:
            return
        if len(sequence.pages) < num_pages_for(sequence.num_tokens + 1):
            if not self.blocks.num_available:
                return
            sequence.pages.append(self.blocks.allocate(after=sequence.pages[-1]))
        chunk.draft = sequence.draft

    def _make_room(self, sequence: Sequence[Key]) -> bool:
        """A page for the next token, if need be a newer sequence's; False if the sequence itself had to give way."""
        while len(sequence.pages) < num_pages_for(sequence.num_tokens):
            if self.blocks.num_available:
                sequence.pages.append(self.blocks.allocate(after=sequence.pages[-1]))
                continue
            newest = self.running.pop()
            self._release(newest)
            self.waiting.appendleft(newest)
            self.num_preempted += 1
            if newest is sequence:
                return False
        return True

    def _chunk(self, sequence: Sequence[Key], left: int) -> Chunk[Key]:
        return Chunk(sequence, min(sequence.num_left, left, self._max_chunk))

    def _admit(self) -> Sequence[Key] | None:
        """The first waiting sequence, if there are pages for it; those that wait for a shared prompt stand aside."""
        for place, sequence in enumerate(self.waiting):
            # A placeholder: it was preempted while its next token was under way, and its text has no key until then.
            if place == _LOOK_AHEAD or sequence.num_placeholders:
                return None
            shared, tail = self._find_shared(sequence)
            if self._is_being_computed(sequence, len(shared)):
                continue
            if not self._fits(sequence, [*shared, *tail]):
                tail = []
                if not self._fits(sequence, shared):
                    return None
            del self.waiting[place]
            self._take_pages(sequence, shared, tail)
            self.running.append(sequence)
            return sequence
        return None

    def _find_shared(self, sequence: Sequence[Key]) -> tuple[list[int], list[int]]:
        """Pages that hold how the sequence begins, and the one, if any, that holds all the rest of it.

        The last token is left out: its logits are wanted, so it is computed again, in a page of the sequence's own.
        """
        if not self.blocks.caching:
            return [], []
        num_full = self._most_shared(sequence)
        shared: list[int] = []
        while len(shared) < num_full and (page := self.blocks.lookup(self._key(sequence, len(shared)))) is not None:
            shared.append(page)
        if sequence.is_unscored or len(shared) < num_full:
            return shared, []
        last = self.blocks.lookup(self._key(sequence, num_full))
        return shared, [] if last is None else [last]

    def _most_shared(self, sequence: Sequence[Key]) -> int:
        """Full pages that others may have computed: all but the last token's, and none of those that are scored."""
        most = (sequence.num_tokens - 1) // PAGE
        return min(most, sequence.scored_from // PAGE) if sequence.is_unscored else most

    def _is_being_computed(self, sequence: Sequence[Key], num_shared: int) -> bool:
        may_share = not sequence.is_unscored or num_shared < self._most_shared(sequence)
        return self.blocks.caching and may_share and self._key(sequence, num_shared) in self._being_computed

    def _fits(self, sequence: Sequence[Key], found: list[int]) -> bool:
        """Tell whether pages it does not share can be had, and one for each that runs, beside those that were found."""
        num_new = num_pages_for(sequence.num_tokens) - min(len(found), (sequence.num_tokens - 1) // PAGE)
        kept = sum(self.blocks.is_idle(page) for page in found)
        return num_new + kept + len(self.running) <= self.blocks.num_available

    def _take_pages(self, sequence: Sequence[Key], shared: list[int], tail: list[int]) -> None:
        blocks = self.blocks
        for page in (*shared, *tail):
            blocks.share(page)
        sequence.pages, sequence.num_computed = list(shared), len(shared) * PAGE
        own: int | None = None
        while len(sequence.pages) < num_pages_for(sequence.num_tokens):
            own = blocks.allocate(after=own)
            sequence.pages.append(own)
        if tail:
            sequence.num_computed = sequence.num_tokens - 1
            blocks.copies.append(Copy(tail[0], sequence.pages[-1]))
            blocks.release(tail)
        if blocks.caching:
            self._announce(sequence)

    def _announce(self, sequence: Sequence[Key]) -> None:
        """Let others that begin alike wait for the pages which this sequence is about to compute."""
        length = sequence.num_tokens
        if sequence.num_left == 1:
            return
        for index in range(sequence.num_computed // PAGE, length // PAGE):
            self._being_computed.setdefault(self._key(sequence, index), sequence)
        if length % PAGE and not sequence.generated_ids:
            sequence.tail_key = self._key(sequence, length // PAGE)
            self._being_computed.setdefault(sequence.tail_key, sequence)

    def _key(self, sequence: Sequence[Key], index: int) -> bytes:
        """Key of a page of the sequence, full or (its last) not."""
        keys = sequence.page_keys
        while len(keys) < min(index + 1, sequence.num_tokens // PAGE):
            start = len(keys) * PAGE
            keys.append(page_key(keys[-1] if keys else b"", sequence.tokens(start, start + PAGE)))
        if index < len(keys):
            return keys[index]
        length, key = sequence.last_key  # who waits is looked at more than once
        if length != sequence.num_tokens:
            key = page_key(keys[-1] if keys else b"", sequence.tokens(index * PAGE, sequence.num_tokens))
            sequence.last_key = sequence.num_tokens, key
        return key

    def _release(self, sequence: Sequence[Key]) -> None:
        self.blocks.release(sequence.pages)
        sequence.pages, sequence.num_computed, sequence.tail_key = [], 0, None
        for key in [key for key, owner in self._being_computed.items() if owner is sequence]:
            del self._being_computed[key]
