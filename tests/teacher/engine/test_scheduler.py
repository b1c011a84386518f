"""Scheduler and block manager against a cache that remembers of every place whose token it holds, drafts among them."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from teacher.engine.block_manager import BlockManager, page_key
from teacher.engine.scheduler import Chunk, Scheduler
from teacher.engine.sequence import Sequence
from teacher.engine.speculation import take
from teacher.kernels.attention.mla_cache import PAGE


@dataclass
class Job:
    """A request: a beginning that others may have too, a rest, and when it comes and goes."""

    template: int
    num_shared: int
    num_own: int
    max_tokens: int
    arrival: int
    cancelled_after: int | None

    def prompt(self, number: int) -> list[int]:
        shared = [(self.template * 31 + i) % 7 for i in range(self.num_shared)]
        return shared + [100 + number + i % 3 for i in range(self.num_own)]


@dataclass
class Case:
    num_pages: int
    extent: int
    caching: bool
    max_running: int
    spare_tokens: int
    max_chunk: int
    jobs: list[Job]
    drafts: Literal["none", "right", "wrong", "mixed"] = "none"
    ahead: bool = False  # a step is launched before the drafts of the last one are judged, where that can be


lengths = st.sampled_from([1, 2, 63, 64, 65, 100, 127, 128, 129, 150])
jobs = st.builds(
    Job,
    template=st.integers(0, 1),
    num_shared=st.one_of(st.just(0), lengths),
    num_own=st.sampled_from([0, 0, 1, 5, 64]),
    max_tokens=st.one_of(st.integers(1, 8), st.integers(60, 140)),
    arrival=st.integers(0, 30),
    cancelled_after=st.one_of(st.none(), st.none(), st.integers(0, 40)),
)
cases = st.builds(
    Case,
    num_pages=st.integers(1, 14),
    extent=st.sampled_from([1, 2, 4]),
    caching=st.booleans(),
    max_running=st.integers(1, 6),
    spare_tokens=st.sampled_from([0, 1, 30, 64, 300]),
    max_chunk=st.sampled_from([1, 7, 64, 1000]),
    jobs=st.lists(jobs, min_size=1, max_size=9),
    drafts=st.sampled_from(["none", "right", "wrong", "mixed"]),
    ahead=st.booleans(),
)


@dataclass
class World:
    """The engine without a model: the next token follows from the text so far, a place holds a hash of all up to it.

    A draft layer's place holds a hash of all up to it and of the token behind it.
    """

    case: Case
    finished: dict[int, Sequence[int]] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    num_computed: int = 0
    num_ahead: int = 0
    under_way: list[Chunk[int]] = field(default_factory=list)  # computed, and not yet taken

    def __post_init__(self) -> None:
        case = self.case
        self.blocks = BlockManager(case.num_pages, extent=case.extent, caching=case.caching)
        limits = {"max_running": case.max_running, "max_step_tokens": case.max_running + case.spare_tokens}
        self.scheduler: Scheduler[int] = Scheduler(self.blocks, **limits, max_chunk=case.max_chunk)
        self.places: list[list[Any]] = [[None] * PAGE for _ in range(case.num_pages)]
        self.draft_places: list[list[Any]] = [[None] * PAGE for _ in range(case.num_pages)]

    def run(self) -> None:
        coming = {n: job for n, job in enumerate(self.case.jobs) if 0 < len(job.prompt(n)) < self.room}
        alive: dict[int, tuple[Sequence[int], int | None]] = {}
        step = idle = 0
        while coming or alive:
            for number in [n for n, job in coming.items() if job.arrival <= step]:
                job = coming.pop(number)
                sequence = Sequence(number, job.prompt(number), max_tokens=job.max_tokens, seed=number)
                gone = None if job.cancelled_after is None else step + job.cancelled_after
                alive[number] = sequence, gone
                self.scheduler.waiting.append(sequence)
            for number in [n for n, (_, gone) in alive.items() if gone is not None and gone <= step]:
                alive[number][0].is_wanted = False
                self.scheduler.remove(alive.pop(number)[0])
                self.cancelled.add(number)
            computed = self.step()
            idle = 0 if computed or not alive else idle + 1
            assert idle == 0, "nothing was computed although sequences wait"
            for number in [n for n, (sequence, _) in alive.items() if sequence.finish_reason]:
                self.finished[number] = alive.pop(number)[0]
                self.scheduler.remove(self.finished[number])
            self.check()
            step += 1
            assert step < 20_000

    def step(self) -> int:
        if self.under_way:
            return self.step_ahead()
        chunks = self.scheduler.schedule()
        assert len({chunk.sequence.key for chunk in chunks}) == len(chunks)
        total = sum(chunk.num_rows for chunk in chunks)
        assert total <= self.case.max_running + self.case.spare_tokens
        assert all(0 < chunk.count <= self.case.max_chunk for chunk in chunks)
        self.check()
        for source, target in self.blocks.take_copies():
            self.places[target] = list(self.places[source])
            self.draft_places[target] = list(self.draft_places[source])
        for chunk in chunks:
            self.compute(chunk)
        self.num_computed += total
        drafted = all(chunk.count == 1 and chunk.draft is not None for chunk in chunks)
        alone = len(chunks) == 1 and chunks[0].ends_text
        if self.case.ahead and self.case.drafts != "none" and (drafted or alone):
            self.under_way = chunks
        else:
            self.judge(chunks)
        return total

    def step_ahead(self) -> int:
        """As `RunAhead.launch_on`: pages for the next step before this one's drafts are judged.

        What that step computes the device knows by then; here it is computed once it is known, before anything else.
        """
        chunks, self.under_way = self.under_way, []
        sequences = [chunk.sequence for chunk in chunks]
        fits = all(sequence.num_tokens + 3 <= self.room for sequence in sequences)
        goes_on = fits and self.scheduler.reserve_lookahead(sequences, 3)
        self.check()
        for source, target in self.blocks.take_copies():
            self.places[target] = list(self.places[source])
            self.draft_places[target] = list(self.draft_places[source])
        if goes_on:
            assert sequences == [s for s in sequences if s in self.scheduler.running]
            assert len(sequences) == len(self.scheduler.running), "a prompt is passed over"
            room = self.case.max_running - len(sequences)
            assert not (room and self.scheduler.waiting), "one who waits is passed over"
        self.judge(chunks)
        if goes_on:
            self.num_ahead += 1
            for sequence in sequences:
                chunk = Chunk(sequence, 1, -1 if sequence.draft is None else sequence.draft)
                chunk.ends_text = True
                if not sequence.is_ended:
                    assert chunk.end <= len(sequence.pages) * PAGE, "there is no page for what was launched"
                    self.compute(chunk)
                self.under_way.append(chunk)
        return sum(chunk.num_rows for chunk in chunks)

    def judge(self, chunks: list[Chunk[int]]) -> None:
        chunks = [chunk for chunk in chunks if not chunk.sequence.is_ended]
        for chunk in chunks:
            self.take(chunk)
        for chunk in chunks:
            self.draft(chunk)

    def compute(self, chunk: Chunk[int]) -> None:
        sequence = chunk.sequence
        text = [*sequence.tokens(0, chunk.start), *chunk.token_ids]
        seen: Any = None
        for position, token in enumerate(text):
            page, place = sequence.pages[position // PAGE], position % PAGE
            seen, before = hash((seen, token)), seen
            if position < chunk.start:
                assert self.places[page][place] == seen, "a page does not hold what its sequence wrote"
            else:
                assert self.blocks._references[page] == 1, "a shared page is written"
                self.places[page][place] = seen
            # Only a shared page's last place may stand for another continuation.
            if self.case.drafts != "none" and 0 < position <= chunk.start and position % PAGE:
                earlier = self.draft_places[sequence.pages[(position - 1) // PAGE]][(position - 1) % PAGE]
                assert earlier == hash((before, token, "draft")), "the draft layer has not read what its sequence wrote"

    def take(self, chunk: Chunk[int]) -> None:
        sequence = chunk.sequence
        num_new = 0
        if chunk.ends_text:
            tokens = take(chunk, [next_token(sequence), next_token(sequence, chunk.draft)], frozenset())
            num_new = len(tokens) - 1
        self.scheduler.computed(sequence, chunk.count + num_new)
        if chunk.ends_text and sequence.finish_reason is None and sequence.num_computed >= self.room:
            sequence.finish_reason = "length"

    def draft(self, chunk: Chunk[int]) -> None:
        sequence, case = chunk.sequence, self.case
        if case.drafts == "none":
            return
        seen: Any = None
        text = sequence.tokens(0, sequence.num_computed + 1)
        for position, (token, following) in enumerate(itertools.pairwise(text)):
            seen = hash((seen, token))
            if position >= chunk.start:
                self.draft_places[sequence.pages[position // PAGE]][position % PAGE] = hash((seen, following, "draft"))
        for position in range(len(text) - 1, chunk.end):  # behind a refused draft
            self.draft_places[sequence.pages[position // PAGE]][position % PAGE] = "refused"
        if chunk.ends_text and sequence.finish_reason is None:
            right = case.drafts == "right" or (case.drafts == "mixed" and hash((sequence.seed, len(text))) % 2)
            guess = next_token(sequence) if right else -1
            sequence.draft = guess if sequence.num_tokens < self.room else None

    @property
    def room(self) -> int:
        return self.case.num_pages * PAGE

    def check(self) -> None:
        """References are exact, nothing is leaked, and no page is two things at once."""
        held = Counter(page for sequence in self.scheduler.running for page in sequence.pages)
        assert all(not sequence.pages for sequence in self.scheduler.waiting)
        blocks = self.blocks
        assert blocks._references == [held[page] for page in range(self.case.num_pages)]
        idle = set(blocks._idle.values())
        assert len(idle) == len(blocks._idle)
        assert not idle & held.keys()
        assert blocks.num_available == self.case.num_pages - len(held)
        for key, page in blocks._page_of.items():
            assert key in blocks._keys_of[page]
            assert page in idle or page in held
        for start in range(0, self.case.num_pages, self.case.extent):
            live = sum(page in held for page in range(start, start + self.case.extent))
            assert blocks._live_in_extent[start // self.case.extent] == live

    def check_end(self) -> None:
        assert self.blocks.num_available == self.case.num_pages
        assert not self.scheduler._being_computed
        for number, sequence in self.finished.items():
            alone = Sequence(number, sequence.prompt_ids, max_tokens=sequence.max_tokens, seed=number)
            while alone.finish_reason is None:
                alone.append(next_token(alone), frozenset())
                if alone.num_tokens > self.room:
                    alone.finish_reason = "length"
            assert sequence.generated_ids == alone.generated_ids
            if self.case.drafts in ("right", "wrong"):
                assert sequence.num_accepted == (sequence.num_drafts if self.case.drafts == "right" else 0)


def next_token(sequence: Sequence[int], draft: int | None = None) -> int:
    """What follows the text, or the text and a draft."""
    ahead = draft is not None
    return hash((sequence.seed, sequence.num_tokens + ahead, sequence.uniform(ahead))) % 5


def play(case: Case) -> World:
    world = World(case)
    world.run()
    world.check_end()
    fitting = {n for n, job in enumerate(case.jobs) if 0 < len(job.prompt(n)) <= case.num_pages * PAGE - 1}
    assert world.finished.keys() | world.cancelled == fitting
    return world


@pytest.mark.parametrize("drafts", ["right", "wrong", "mixed"])
def test_steps_go_ahead_while_the_same_sequences_go_on(drafts: Any) -> None:
    jobs = [Job(0, 60, n, 100, 0, None) for n in range(3)]
    world = play(Case(14, 4, True, 3, 300, 1000, jobs, drafts=drafts, ahead=True))
    assert world.num_ahead > 40


def test_steps_do_not_go_ahead_of_the_pages() -> None:
    """Two sequences of three pages each in a cache of five: one has to give way, and both end as if alone."""
    world = play(Case(5, 1, False, 2, 300, 1000, [Job(0, 60, n, 120, 0, None) for n in range(2)], "right", True))
    assert world.num_ahead > 20
    assert world.scheduler.num_preempted > 0


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases)
def test_every_request_ends_as_if_alone_and_no_page_is_lost(case: Case) -> None:
    play(case)


@pytest.mark.torture
@pytest.mark.timeout(3_600)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases)
def test_ten_thousand_schedules(case: Case) -> None:
    play(case)


def job(num_shared: int, **changes: Any) -> Job:
    fields = {"template": 0, "num_own": 0, "max_tokens": 4, "arrival": 0, "cancelled_after": None}
    return Job(num_shared=num_shared, **(fields | changes))


def case(jobs: list[Job], **changes: Any) -> Case:
    fields = {"num_pages": 64, "extent": 4, "caching": True, "max_running": 16, "spare_tokens": 500, "max_chunk": 500}
    return Case(jobs=jobs, **(fields | changes))


@pytest.mark.parametrize("length", [5, 63, 64, 65, 128, 150])
@pytest.mark.parametrize("max_chunk", [7, 500])
def test_samples_of_one_prompt_cost_one_prefill(length: int, max_chunk: int) -> None:
    """The first reads the prompt; each other one computes the prompt's last token for its logits, and its own text."""
    world = play(case([job(length) for _ in range(16)], max_chunk=max_chunk))
    assert world.num_computed == length + 15 + 16 * 3  # the last of four tokens is never computed


def test_a_small_cache_pre_empts_and_still_writes_the_same() -> None:
    world = play(case([job(100, template=n % 2, num_own=n, max_tokens=120) for n in range(6)], num_pages=10))
    assert world.scheduler.num_preempted > 0
    assert len(world.finished) == 6


def test_who_decodes_gets_a_token_every_step_while_a_long_prompt_is_read() -> None:
    world = World(case([], spare_tokens=48, max_chunk=64, num_pages=32))
    short, long = Sequence(0, [1, 2], 50, 0), Sequence(1, list(range(1000)), 4, 1)
    world.scheduler.waiting.append(short)
    world.step()
    world.scheduler.waiting.append(long)
    for written in range(2, 14):
        world.step()
        assert len(short.generated_ids) == written
    assert 0 < long.num_computed < 1000
    assert not long.generated_ids


def test_a_cancelled_sequence_frees_its_pages_at_once() -> None:
    world = World(case([], num_pages=8))
    sequence = Sequence(0, list(range(200)), 4, 0)
    world.scheduler.waiting.append(sequence)
    world.step()
    assert world.blocks.num_available == 4
    world.scheduler.remove(sequence)
    assert world.blocks.num_available == 8
    world.check()


def test_who_waits_for_a_shared_prompt_goes_on_when_its_reader_is_gone() -> None:
    world = World(case([], spare_tokens=48, max_chunk=50, num_pages=32))
    first, second = (Sequence(n, list(range(300)), 4, n) for n in range(2))
    world.scheduler.waiting.extend((first, second))
    world.step()
    assert (first.num_computed, second.num_computed) == (50, 0)
    world.scheduler.remove(first)
    while not second.generated_ids:
        assert world.step()


def test_the_least_recently_used_page_is_forgotten_first() -> None:
    blocks = BlockManager(4)
    keys = [page_key(b"", [n] * PAGE) for n in range(4)]
    pages = [blocks.allocate() for _ in keys]
    for page, key in zip(pages, keys, strict=True):
        blocks.register(page, key, full=True)
    for n in (2, 0, 3, 1):
        blocks.release([pages[n]])
    blocks.share(pages[2])
    blocks.release([pages[2]])
    forgotten = []
    for _ in range(4):
        blocks.allocate()
        forgotten += [n for n in range(4) if blocks.lookup(keys[n]) is None and n not in forgotten]
    assert forgotten == [0, 3, 1, 2]


def test_what_is_live_stays_together_and_what_idles_moves_out_of_the_way() -> None:
    blocks = BlockManager(16, extent=4)
    old = [blocks.allocate()]
    for _ in range(3):
        old.append(blocks.allocate(after=old[-1]))
    assert old == [0, 1, 2, 3]
    keys = [page_key(b"", [n] * PAGE) for n in range(4)]
    for page, key in zip(old, keys, strict=True):
        blocks.register(page, key, full=True)
    blocks.release(old)
    new = [blocks.allocate()]
    new.append(blocks.allocate(after=new[-1]))
    assert new == [0, 1]
    assert [blocks.lookup(key) for key in keys] == [15, 14, 2, 3]
    assert blocks.take_copies() == [(0, 15), (1, 14)]


def test_admissions_wait_for_some_places_where_prompts_are_passes_of_their_own() -> None:
    """Of 64 places two must be free, if two wait; but nobody waits for long, nor where nothing decodes."""
    scheduler: Scheduler[int] = Scheduler(
        BlockManager(200), max_running=64, max_step_tokens=4096, max_chunk=4096, admits_together=True
    )

    def step() -> list[int]:
        """The prompts that were begun."""
        begun = []
        for chunk in scheduler.schedule():
            sequence = chunk.sequence
            begun += [sequence.key] if chunk.start == 0 else []
            sequence.generated_ids.append(7)
            scheduler.computed(sequence, chunk.count)
        return begun

    scheduler.waiting.extend(Sequence(n, [n, *range(20)], 100, seed=n) for n in range(70))
    assert step() == list(range(64))
    scheduler.remove(scheduler.running[5])
    assert step() == []
    scheduler.remove(scheduler.running[9])
    assert step() == [64, 65]
    scheduler.remove(scheduler.running[9])
    begun = [step() for _ in range(20)]
    assert begun == [[]] * 16 + [[66]] + [[]] * 3
    for _ in range(2):
        scheduler.remove(scheduler.waiting[-1])
    scheduler.remove(scheduler.running[0])
    assert step() == [67], "no more wait than there are places"
