"""A teacher behind an endpoint: the `Teacher` protocol over `Client`.

Requests run in an event loop on a thread of its own, and `generate` yields each completion as it arrives. A request
that is refused, or whose retries are used up, does not end the others: the fault is raised once everything else has
come home, or once so many have failed in a row that the endpoint is clearly not answering.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from distill.errors import PotstillError, RecipeError, nearest
from distill.reasoning import FORCED_END
from distill.recipe import OpenAITeacher
from distill.records import Completion, Sampling, TeacherIdentity, TraceRequest, content_id
from teacher.backends.openai.answers import Answer
from teacher.backends.openai.client import Client, RequestFailed, Usage
from teacher.backends.openai.completing import Asker
from teacher.backends.openai.concurrency import AdaptiveConcurrency
from teacher.backends.openai.proxy import Proxy
from teacher.backends.openai.secrets import ApiKey

# Where growth starts, and how long each step is watched.
INITIAL_CONCURRENCY = 16
WINDOW_S = 3.0
# So many failures without one answer between them end the run.
FAILURES_IN_A_ROW = 16

Result = Any  # of a request, a BaseException that ends the call, or None: that was all
Ask = Callable[[Any], Awaitable[Any]]
Asks = Callable[[Client], Ask]


class OpenAICompatibleTeacher:
    """A `distill.protocols.Teacher` over `/chat/completions`.

    Raises on construction: EnvironmentFault (the endpoint cannot be reached, key or proxy is refused), RecipeError (the
    endpoint does not serve this model). `backoff_s` bounds the first pause before asking again; the bound doubles each
    time. `api_key` stands for the one in the environment. Where `gone` says that the endpoint will not come back (its
    process has ended), nothing is asked again: EnvironmentFault at once.
    """

    def __init__(
        self,
        config: OpenAITeacher,
        *,
        backoff_s: float = 0.5,
        api_key: str | None = None,
        gone: Callable[[], bool] = lambda: False,
        initial_concurrency: int = INITIAL_CONCURRENCY,
    ) -> None:
        self.config = config
        self.usage = Usage()
        self._base_url = config.base_url.rstrip("/")
        self._root_url = self._base_url.removesuffix("/v1")
        self._key = (
            ApiKey(api_key, variable=config.api_key_env) if api_key else ApiKey.of_environment(config.api_key_env)
        )
        self._proxy = Proxy.of_environment(self._base_url)
        self._backoff_s = backoff_s
        self._gone = gone
        self._control = AdaptiveConcurrency(config.max_concurrency, initial=initial_concurrency, window_s=WINDOW_S)
        self._asked_since: float | None = None
        self._identity = self._ask_identity()

    @property
    def identity(self) -> TeacherIdentity:
        return self._identity

    def close(self) -> None:
        """Nothing is held between calls of `generate`."""

    def facts(self) -> dict[str, str | float]:
        """Tokens a second as they stream in, requests in flight, the cost so far, for the eyes of who waits."""
        elapsed = max(time.monotonic() - self._asked_since, 1e-9) if self._asked_since is not None else 1.0
        facts: dict[str, str | float] = {
            "tokens_per_s": round(self.usage.completion_tokens / elapsed),
            "in_flight": self._control.in_flight,
            "limit": self._control.limit,
        }
        cost = self.config.cost(self.usage.prompt_tokens, self.usage.completion_tokens)
        return facts if cost is None else facts | {"cost": round(cost, 4)}

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions as they finish. Closing the iterator cancels what is in flight."""
        forced_ids = self._forced_ids(sampling)
        yield from self._asked(requests, lambda client: Asker(client, sampling, forced_ids=forced_ids).complete)

    def complete(self, payloads: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Answer]]:
        """Yield the number and the answer of every request to `/completions`, as they come; `model` is put in here."""

        def asks(client: Client) -> Callable[[tuple[int, Mapping[str, Any]]], Awaitable[tuple[int, Answer]]]:
            async def ask(numbered: tuple[int, Mapping[str, Any]]) -> tuple[int, Answer]:
                number, payload = numbered
                body = {"model": self.config.model, **self.config.extra_body, **payload}
                answer = await client.ask(f"{client.base_url}/completions", body)
                if client.key.is_in(answer.content):
                    message = "answers with the API key in its text; nothing of it is kept"
                    raise RequestFailed(RecipeError(message, where=client.base_url))
                return number, answer

            return ask

        yield from self._asked(list(enumerate(payloads)), asks)

    def _asked(self, requests: Sequence[Any], asks: Asks) -> Iterator[Any]:
        self._asked_since = self._asked_since or time.monotonic()
        results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        work = _GenerateCall(self, requests, asks, results)
        thread = threading.Thread(target=_drive, args=(loop, work), name="openai-teacher", daemon=True)
        thread.start()
        try:
            while (result := results.get()) is not None:
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            loop.call_soon_threadsafe(work.cancel)
            thread.join()
            loop.close()

    def client(self) -> Client:
        """A client for the event loop that is running."""
        return Client(
            self.config,
            self._key,
            self._proxy,
            self._control,
            self.usage,
            backoff_s=self._backoff_s,
            gone=self._gone,
        )

    def _ask_identity(self) -> TeacherIdentity:
        config = self.config
        listed = self._json("GET", f"{self._base_url}/models")
        version = self._json("GET", f"{self._root_url}/version")
        models = [str(entry["id"]) for entry in _entries(listed) if "id" in entry]
        if models and config.model not in models:
            message = f"{config.model!r} is not served; {nearest(config.model, models)}"
            raise RecipeError(message, where=self._base_url, field="teacher.model")
        served = version.get("version") if isinstance(version, dict) else None
        return TeacherIdentity(
            name=config.model,
            weights=f"{config.model}@{config.revision}",
            template=content_id(["openai", config.system_prompt, config.opens_thinking, *self._what_else_matters()]),
            backend="openai",
            backend_version=served if isinstance(served, str) else "unknown",
        )

    def _what_else_matters(self) -> list[Any]:
        """Settings that change the text where they are used; none of them leaves the identity as it always was."""
        body, forcing, suffix = self.config.extra_body, self.config.budget_forcing, self.config.prompt_suffix
        matters: list[Any] = [body, forcing] if body or forcing != "completions" else []
        return [*matters, {"prompt_suffix": suffix}] if suffix else matters

    def _forced_ids(self, sampling: Sampling) -> list[int]:
        if sampling.max_thinking_tokens is None or self.config.budget_forcing != "completions":
            return []
        payload = {"model": self.config.model, "prompt": FORCED_END, "add_special_tokens": False}
        answer = self._json("POST", f"{self._root_url}/tokenize", payload)
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list) or not tokens:
            message = "has no /tokenize, as vLLM has; use 'chat' or 'server'"
            raise RecipeError(message, where=self._base_url, field="teacher.budget_forcing")
        return [int(token) for token in tokens]

    def _json(self, method: str, url: str, payload: Any = None) -> Any:
        async def fetch() -> Any:
            async with self.client() as client:
                return await client.fetch(method, url, payload)

        return asyncio.run(fetch())


class _GenerateCall:
    """All requests of one call, on the loop's thread. `asks` makes of a client what answers one of them."""

    def __init__(
        self,
        teacher: OpenAICompatibleTeacher,
        requests: Sequence[Any],
        asks: Asks,
        results: queue.SimpleQueue[Result],
    ) -> None:
        self._teacher = teacher
        self._requests = iter(requests)
        self._num_requests = len(requests)
        self._asks = asks
        self._results = results
        self._fatal: PotstillError | None = None
        self._refused: list[PotstillError] = []
        self._in_a_row = 0
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False

    async def run(self) -> None:
        self._task = asyncio.current_task()
        if not self._cancelled:
            num_workers = min(self._teacher.config.max_concurrency, self._num_requests)
            async with self._teacher.client() as client:
                ask = self._asks(client)
                await asyncio.gather(*(self._worker(ask) for _ in range(num_workers)))
        if self._fatal is not None:
            raise self._fatal
        if self._refused:
            raise _of_all(self._refused, self._num_requests)

    def cancel(self) -> None:
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()

    async def _worker(self, ask: Ask) -> None:
        """Take requests until there are none, or until it is no use: what is in flight still comes home."""
        for request in self._requests:
            if self._fatal is not None or self._in_a_row >= FAILURES_IN_A_ROW:
                return
            try:
                self._results.put(await ask(request))
                self._in_a_row = 0
            except RequestFailed as exc:
                self._refused.append(exc.fault)
                self._in_a_row += 1
            except PotstillError as exc:
                self._fatal = self._fatal or exc
                return


def _of_all(refused: list[PotstillError], num_requests: int) -> PotstillError:
    """One fault for all requests that failed. What the user must mend stands before what may pass by itself."""
    first = next((fault for fault in refused if isinstance(fault, RecipeError)), refused[0])
    if len(refused) == 1:
        return first
    return type(first)(f"{first} ({len(refused)} of {num_requests} requests failed)")


def _drive(loop: asyncio.AbstractEventLoop, work: _GenerateCall) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(work.run())
    except asyncio.CancelledError:
        pass
    except BaseException as exc:  # noqa: BLE001  handed to the thread that waits, which raises it
        work._results.put(exc)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        work._results.put(None)


def _entries(listed: Any) -> list[dict[str, Any]]:
    data = listed.get("data") if isinstance(listed, dict) else None
    return [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
