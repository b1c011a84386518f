"""Block manager: who holds which page of the cache, and which pages still hold what a new prompt begins with.

A page is free, live (sequences refer to it; several may share one that is full) or idle: nobody refers to it, but its
content is known by a key and may serve again, until the page is needed and it is the one unused for longest. The key of
a page is the hash of its tokens and of the key before, so that equal keys mean equal beginnings.

On a GPU any page is as good as another. On a CPU attention is one call for pages that lie evenly in memory, so there
pages come in extents: a sequence fills one extent before it takes another, the lowest in which nothing is live; idle
pages in the way move up. See `teacher.models.cpu_attention`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Many
from typing import NamedTuple

from teacher.kernels.attention.mla_cache import PAGE

_FREE, _LIVE, _IDLE = range(3)


class Copy(NamedTuple):
    """The content of a page, in all layers, is needed in another; copies are made in the order they were asked for."""

    source: int
    target: int


def page_key(before: bytes, token_ids: Many[int]) -> bytes:
    """Hash that names a page, full or not, behind the page with the key `before` (empty: first of a prompt)."""
    return hashlib.blake2b(before + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockManager:
    def __init__(self, num_pages: int, *, extent: int = 1, caching: bool = True) -> None:
        self.num_pages = num_pages
        self.extent = extent
        self.caching = caching
        self.copies: list[Copy] = []
        self._references = [0] * num_pages
        self._state = bytearray(num_pages)
        self._live_in_extent = bytearray(-(-num_pages // extent))
        self._num_free = num_pages
        # Least recently used first, by the first of their keys, which stays when they move.
        self._idle: OrderedDict[bytes, int] = OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._keys_of: dict[int, list[bytes]] = {}
        self._full: set[int] = set()  # pages that may idle: full, and known by a key

    @property
    def num_available(self) -> int:
        """Pages that could be allocated: free and idle ones."""
        return self._num_free + len(self._idle)

    def is_idle(self, page: int) -> bool:
        return self._state[page] == _IDLE

    def allocate(self, after: int | None = None) -> int:
        """A page for one sequence, whose last page so far is `after`. There must be one available."""
        page = self._place(after)
        if self._state[page] == _IDLE:
            self._vacate(page)
        self._num_free -= 1
        self._make_live(page)
        return page

    def share(self, page: int) -> None:
        """Let one more sequence refer to a live or idle page."""
        if self._state[page] == _IDLE:
            del self._idle[self._keys_of[page][0]]
            self._make_live(page)
        else:
            self._references[page] += 1

    def release(self, pages: Many[int]) -> None:
        """A sequence lets go of its pages. The end of its text is forgotten first: beginnings are shared more often."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            self._live_in_extent[page // self.extent] -= 1
            if page in self._full:
                self._state[page] = _IDLE
                self._idle[self._keys_of[page][0]] = page
            else:
                self._forget(page)

    def register(self, page: int, key: bytes, *, full: bool) -> None:
        """The page's content is computed: who needs `key` may share it, or copy it if it is not full."""
        if not self.caching or key in self._page_of:
            return
        self._page_of[key] = page
        self._keys_of.setdefault(page, []).append(key)
        if full:
            self._full.add(page)

    def lookup(self, key: bytes) -> int | None:
        return self._page_of.get(key)

    def take_copies(self) -> list[Copy]:
        """The copies that must be made before anything is written; forgotten here."""
        copies, self.copies = self.copies, []
        return copies

    def _place(self, after: int | None) -> int:
        if self.extent > 1:
            following = self.num_pages if after is None else after + 1
            if following < self.num_pages and following % self.extent and self._state[following] != _LIVE:
                return following
            lowest = self._live_in_extent.find(0)
            if lowest >= 0:
                return lowest * self.extent
        if self._num_free:
            return self._state.find(_FREE)
        return next(iter(self._idle.values()))

    def _vacate(self, page: int) -> None:
        """Free an idle page. Its content moves, if need be to where the least recently used one is lost."""
        if not self._num_free:
            _, oldest = self._idle.popitem(last=False)
            self._forget(oldest)
        if self._state[page] == _IDLE:
            self._move(page, self._state.rfind(_FREE))

    def _move(self, page: int, home: int) -> None:
        """An idle page's content and keys go to a free page; its turn to be forgotten stays."""
        self.copies.append(Copy(page, home))
        keys = self._keys_of[home] = self._keys_of.pop(page)
        self._page_of.update(dict.fromkeys(keys, home))
        self._full.remove(page)
        self._full.add(home)
        self._state[page], self._state[home] = _FREE, _IDLE
        self._idle[keys[0]] = home

    def _make_live(self, page: int) -> None:
        self._references[page] = 1
        self._state[page] = _LIVE
        self._live_in_extent[page // self.extent] += 1

    def _forget(self, page: int) -> None:
        for key in self._keys_of.pop(page, ()):
            del self._page_of[key]
        self._full.discard(page)
        self._state[page] = _FREE
        self._num_free += 1


def num_pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE)
