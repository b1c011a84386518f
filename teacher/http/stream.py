"""Answers as server-sent events: each token goes out when it is there.

A piece carries all that has come since the one before, of every sample: each costs this process and the client a
system call and a wake-up, so after the first they are `PIECE_S` apart. Text that may yet become a stop string or
`</think>`, or that ends within a character, waits for what follows. A client that does not read is not sent more; what
is generated meanwhile, at most its own `max_tokens`, waits for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distill.errors import PotstillError
from teacher.engine.detokenizer import Detokenizer
from teacher.engine.stopping import StopStrings
from teacher.http.feed import SampleFuture
from teacher.http.form import Form, Offsets, ending, scored, usage
from teacher.http.lane import dumps_in_turns
from teacher.http.refusal import APIError
from teacher.live import GeneratedSample

# An answer may lie unread for so long.
UNREAD_S = 60.0
# Clients and proxies give a silent connection up after a minute or more.
KEEP_ALIVE_S = 15.0
# uvicorn waits for a client to read before a part is sent, not within one.
SEND_BYTES = 2**18
# Tokens and logprobs that are made into a piece on the event loop.
SMALL_PIECE = 4_096
# The eye sees no difference below it; a piece a token would cost a core at some 10,000 tokens a second.
PIECE_S = 0.02


class Wake:
    """An event of the server's loop that any thread may set, at the price of one wake-up until it is heard."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def __call__(self) -> None:
        if not self._event.is_set():
            self._loop.call_soon_threadsafe(self._event.set)

    async def heard(self, timeout_s: float) -> bool:
        """Wait until it is called; True where it was, since it was heard last, within a time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


class _Choice:
    """One sample, and how much of it has been told."""

    def __init__(
        self, form: Form[Any], index: int, sample: SampleFuture, future: asyncio.Future[GeneratedSample]
    ) -> None:
        self.future = future
        self._form = form
        self._index = index
        self._sample = sample
        self._num_tokens = self._num_characters = 0
        self._is_begun = False
        self._stops = StopStrings(form.request.stops())
        self._text = Detokenizer(lambda token_ids: form.spell(*token_ids))
        self._splitter = form.splitter()
        self._has_called = False
        self._offsets: Offsets | None = None

    def num_values(self) -> int:
        """Roughly, how much there is to tell: at the end all logprobs are looked at again."""
        if not self.future.done() or self.future.cancelled() or self.future.exception() is not None:
            return self._sample.num_new_tokens() * self._form.values_per_token
        scores_all = self._form.request.num_logprobs() is not None
        num_told = 0 if scores_all else self._num_tokens
        return (self.future.result().completion.num_tokens - num_told) * self._form.values_per_token

    def deltas(self) -> Iterator[dict[str, Any]]:
        """Entries of `choices` for the tokens that have come since."""
        handle = self._sample.handle
        if handle is None or self._sample.num_new_tokens() < self._form.request.stream_interval:
            return
        token_ids, logprobs = self._sample.take_tokens()
        text = self._stops.feed(self._text.push(token_ids))
        scores = None if self._form.request.num_logprobs() is None else scored(token_ids, logprobs)
        yield from self._piece(text, handle.prompt_ids, handle.opening, token_ids, scores)

    def last_deltas(self, answer: GeneratedSample) -> Iterator[dict[str, Any]]:
        """The rest of the text, and why it ends there."""
        self._sample.take_tokens()
        start = self._num_tokens
        kept = self._form.kept(answer)
        scores = None if kept is None else type(kept)(kept.unit, kept.sampled[start:], kept.top[start:])
        text = answer.completion.text[self._num_characters or len(answer.opening) :]
        yield from self._piece(text, answer.prompt_ids, answer.opening, answer.token_ids[start:], scores, answer)

    def _piece(
        self,
        text: str,
        prompt_ids: Sequence[int],
        opening: str,
        token_ids: Sequence[int],
        scores: Any,
        answer: GeneratedSample | None = None,
    ) -> Iterator[dict[str, Any]]:
        form, first = self._form, not self._is_begun
        if self._offsets is None:
            self._offsets = form.offsets(len(opening))
        if first:
            text = opening + text
            self._is_begun = True
        self._num_characters += len(text)
        self._num_tokens += len(token_ids)
        logprobs = (
            None if scores is None or form.request.num_logprobs() is None else form.logprobs(scores, self._offsets)
        )
        parts = self._splitter.feed(text)
        if answer is not None:
            parts = parts.then(self._splitter.rest())
        self._has_called |= bool(parts.calls)
        end = None if answer is None else ending(answer, has_called=self._has_called)
        ids = form.ids(prompt_ids if first else None, token_ids)
        yield from form.deltas(self._index, parts, logprobs, ids, first=first, end=end)


class Stream(Response):
    """Every sample as it grows, then the usage if it was asked for, then `[DONE]`.

    starlette's own streams cost three times as much (a task group a request, `LOG.md`).
    """

    def __init__(
        self,
        form: Form[Any],
        samples: Sequence[SampleFuture],
        wake: Wake,
        finished: Callable[[Sequence[GeneratedSample]], object],
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._form = form
        self._wake = wake
        self._finished = finished
        self._futures = [asyncio.wrap_future(sample) for sample in samples]
        entries = enumerate(zip(samples, self._futures, strict=True))
        self._pending = [_Choice(form, index, sample, future) for index, (sample, future) in entries]
        for future in self._futures:
            future.add_done_callback(lambda _: wake())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.ensure_future(left(receive))
        gone.add_done_callback(lambda _: cancel(self._futures))
        try:
            async for piece, more in self._pieces():
                body = piece.encode()
                for start in range(0, len(body), SEND_BYTES):
                    part, end = body[start : start + SEND_BYTES], start + SEND_BYTES >= len(body)
                    async with asyncio.timeout(UNREAD_S):
                        await send({"type": "http.response.body", "body": part, "more_body": more or not end})
                if more:
                    await asyncio.sleep(PIECE_S)
        except TimeoutError:
            pass  # uvicorn closes the connection of an answer without an end
        finally:
            gone.cancel()
            cancel(self._futures)

    async def _pieces(self) -> AsyncIterator[tuple[str, bool]]:
        """Text to send, and whether more follows; ends early where the client has gone."""
        while True:
            heard = await self._wake.heard(KEEP_ALIVE_S)
            if any(future.cancelled() for future in self._futures):
                return
            try:
                piece = await self._piece() if heard else ": keep-alive\n\n"
            except PotstillError as exc:
                yield f"{_event(APIError.because_of(exc).body)}data: [DONE]\n\n", False
                return
            if not self._pending:
                yield f"{piece}{self._usage()}data: [DONE]\n\n", False
                return
            if piece:
                yield piece, True

    async def _piece(self) -> str:
        """Put together what is new: on a thread where that is much, as when a client has not read for long."""
        if sum(choice.num_values() for choice in self._pending) <= SMALL_PIECE:
            return "".join(map(_event, self._events()))
        return await asyncio.to_thread(lambda: "".join(f"data: {dumps_in_turns(tree)}\n\n" for tree in self._events()))

    def _events(self) -> Iterator[dict[str, Any]]:
        for choice in tuple(self._pending):
            if not choice.future.done():
                entries = choice.deltas()
            else:
                self._pending.remove(choice)
                answer = choice.future.result()
                self._finished([answer])
                entries = choice.last_deltas(answer)
            for entry in entries:
                yield {**self._form.head(chunk=True), "choices": [entry]}

    def _usage(self) -> str:
        options = self._form.request.stream_options
        if options is None or not options.include_usage:
            return ""
        counts = usage([future.result() for future in self._futures], n=self._form.request.n)
        return _event({**self._form.head(chunk=True), "choices": [], "usage": counts})


def _event(tree: dict[str, Any]) -> str:
    return f"data: {json.dumps(tree, ensure_ascii=False)}\n\n"


def cancel(futures: Sequence[asyncio.Future[GeneratedSample]]) -> None:
    for future in futures:
        future.cancel()


async def left(receive: Receive) -> None:
    """Return once the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
