"""A teacher behind any OpenAI-compatible endpoint: vLLM, SGLang, DeepSeek's own.

Requests run in an event loop on a thread of its own, at most `max_concurrency` at a time, and `generate` yields each
completion as it arrives. What passes by itself (429, 5xx, time-outs, dropped connections, garbled answers) is asked
again with jittered exponential backoff; what does not (a refused key, an unknown model, a refused request) ends the
run in one line, after the requests in flight have come home, so that paid-for work is kept.

Every sample carries a seed of its own, derived from problem and index. The API key is read from the environment and
appears in no message.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx

from distill.errors import EnvironmentFault, PotstillError, RecipeError, nearest
from distill.recipe import OpenAITeacher
from distill.records import Completion, FinishReason, Sampling, TeacherIdentity, TraceRequest, content_id

THINK = "<think>"
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
MAX_BACKOFF_S = 60.0
CONNECT_TIMEOUT_S = 30.0


class Garbled(Exception):
    """The endpoint answered 200, but not with a completion."""


class OpenAICompatibleTeacher:
    """A `distill.protocols.Teacher` over `/chat/completions`.

    Raises on construction: EnvironmentFault (the endpoint cannot be reached, the key is refused), RecipeError (the
    endpoint does not serve this model). `backoff_s` is the first pause before asking again; it doubles each time.
    `api_key` stands for the one in the environment. Where `gone` says that the endpoint will not come back (its
    process has ended), nothing is asked again: EnvironmentFault at once.
    """

    def __init__(
        self,
        config: OpenAITeacher,
        *,
        backoff_s: float = 0.5,
        api_key: str | None = None,
        gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self._base_url = config.base_url.rstrip("/")
        self._key = api_key or os.environ.get(config.api_key_env) or None
        self._backoff_s = backoff_s
        self._gone = gone
        self._identity = self._ask_identity()

    @property
    def identity(self) -> TeacherIdentity:
        return self._identity

    def close(self) -> None:
        """Nothing is held between calls of `generate`."""

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions as they finish. Closing the iterator cancels what is in flight."""
        if sampling.top_logprobs or sampling.max_thinking_tokens is not None:
            message = "top_logprobs and max_thinking_tokens need the native backend"
            raise RecipeError(message, where="recipe", field="generate.sampling")
        results: queue.Queue[Completion | BaseException | None] = queue.Queue()
        loop = asyncio.new_event_loop()
        work = _Work(self, requests, sampling, results)
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

    def _ask_identity(self) -> TeacherIdentity:
        config = self.config
        with self._client_sync() as client:
            listed = self._get(client, f"{self._base_url}/models")
            version = self._get(client, f"{self._base_url.removesuffix('/v1')}/version")
        models = [str(entry["id"]) for entry in _entries(listed) if "id" in entry]
        if models and config.model not in models:
            message = f"{config.model!r} is not served; {nearest(config.model, models)}"
            raise RecipeError(message, where=self._base_url, field="teacher.model")
        served = version.get("version") if isinstance(version, dict) else None
        return TeacherIdentity(
            name=config.model,
            weights=f"{config.model}@{config.revision}",
            template=content_id(["openai", config.system_prompt, config.think_prefilled]),
            backend="openai",
            backend_version=served if isinstance(served, str) else "unknown",
        )

    def _get(self, client: httpx.Client, url: str) -> Any:
        """The JSON behind an optional route; None where the endpoint has no such route."""
        attempt = 0
        while True:
            try:
                response = client.get(url)
            except httpx.TransportError as exc:
                message = f"cannot be reached ({type(exc).__name__}: {self._redacted(str(exc))})"
                raise EnvironmentFault(message, where=self._base_url) from exc
            except httpx.InvalidURL as exc:
                raise RecipeError(f"not a URL ({exc})", where="teacher.base_url") from exc
            if response.status_code in RETRIED and attempt < self.config.max_retries:
                threading.Event().wait(self.pause(attempt, response))
                attempt += 1
                continue
            if response.status_code in (401, 403):
                raise self.fault(response)
            try:
                return response.json() if response.is_success else None
            except ValueError:
                return None

    def _client_sync(self) -> httpx.Client:
        return httpx.Client(headers=self.headers(), timeout=CONNECT_TIMEOUT_S)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers=self.headers(),
            timeout=httpx.Timeout(self.config.timeout_s, connect=min(CONNECT_TIMEOUT_S, self.config.timeout_s)),
            limits=httpx.Limits(max_connections=self.config.max_concurrency),
        )

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    async def complete(self, client: httpx.AsyncClient, request: TraceRequest, sampling: Sampling) -> Completion:
        """One completion, asked for until it comes or `max_retries` are used up."""
        payload = self._payload(request, sampling)
        attempt = 0
        while True:
            response: httpx.Response | None = None
            try:
                response = await client.post(f"{self._base_url}/chat/completions", json=payload)
                if response.status_code not in RETRIED:
                    if not response.is_success:
                        raise self.fault(response)
                    return self._completion(request, response)
                trouble = f"HTTP {response.status_code}"
            except (httpx.TransportError, httpx.DecodingError, Garbled) as exc:
                trouble = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
            if attempt >= self.config.max_retries:
                message = f"no completion after {attempt + 1} attempts ({self._redacted(trouble)})"
                raise EnvironmentFault(f"{message}; run the same command again", where=self._base_url)
            await asyncio.sleep(self.pause(attempt, response))
            attempt += 1

    def pause(self, attempt: int, response: httpx.Response | None) -> float:
        """Seconds until the next attempt: doubled each time, jittered by half, at least what the endpoint asks for.

        Raises EnvironmentFault where there is nobody left to ask.
        """
        if self._gone():
            raise EnvironmentFault("the server has ended", where=self._base_url)
        pause: float = min(MAX_BACKOFF_S, self._backoff_s * 2.0**attempt) * random.uniform(0.5, 1.5)
        asked = response.headers.get("retry-after", "") if response is not None else ""
        return max(pause, min(float(asked), MAX_BACKOFF_S)) if asked.isdigit() else pause

    def fault(self, response: httpx.Response) -> PotstillError:
        """What an answer that no repetition will change means."""
        said = self._redacted(_message(response))
        status = response.status_code
        if status in (401, 403):
            key = f"the key in ${self.config.api_key_env}" if self._key else f"no key (${self.config.api_key_env})"
            return EnvironmentFault(f"refused {key} (HTTP {status}: {said})", where=self._base_url)
        if status == 404:
            message = f"{self.config.model!r} is not served (HTTP 404: {said})"
            return RecipeError(message, where=self._base_url, field="teacher.model")
        if 400 <= status < 500:
            return RecipeError(f"refused the request (HTTP {status}: {said})", where=self._base_url, field="teacher")
        return EnvironmentFault(f"answered HTTP {status}: {said}", where=self._base_url)

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _payload(self, request: TraceRequest, sampling: Sampling) -> dict[str, Any]:
        system = self.config.system_prompt
        messages = [{"role": "system", "content": system}] if system else []
        return {
            "model": self.config.model,
            "messages": [*messages, {"role": "user", "content": request.problem.prompt}],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": request.seed(sampling),
        }

    def _completion(self, request: TraceRequest, response: httpx.Response) -> Completion:
        try:
            body = response.json()
            choice, usage = body["choices"][0], body["usage"]
            message, reason = choice["message"], choice["finish_reason"]
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            content = message.get("content") or ""
            tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        except (ValueError, LookupError, TypeError, AttributeError) as exc:
            raise Garbled(f"not a chat completion: {response.text[:80]!r}") from exc
        if reason not in ("stop", "length") or not isinstance(reasoning, str) or not isinstance(content, str):
            raise Garbled(f"finish_reason {reason!r}")
        finish: FinishReason = reason
        text = whole_text(reasoning, content, think_prefilled=self.config.think_prefilled)
        # A lone surrogate is valid JSON but no text: neither the ledger nor a tokenizer could take it.
        text = text.encode("utf-8", "replace").decode()
        return Completion(
            request=request, text=text, finish_reason=finish, num_prompt_tokens=tokens[0], num_tokens=tokens[1]
        )


def whole_text(reasoning: str, content: str, *, think_prefilled: bool) -> str:
    """The completion as the model wrote it, from what an endpoint hands out in parts.

    A reasoning parser returns the thinking apart from the answer: it goes back between its tags, left open where the
    answer never began. Without one, a template that prefills `<think>` leaves the tag out of the content.
    """
    if reasoning:
        thought = f"{THINK}\n{reasoning.strip(chr(10))}\n"
        return f"{thought}</think>\n\n{content.lstrip(chr(10))}" if content.strip() else thought
    body = content.lstrip()
    if body.startswith(THINK):
        body = body.removeprefix(THINK)
        return THINK + (body if body.startswith("\n") else f"\n{body}")
    return f"{THINK}\n{content}" if think_prefilled else content


class _Work:
    """All requests of one call of `generate`, on the loop's thread."""

    def __init__(
        self,
        teacher: OpenAICompatibleTeacher,
        requests: Sequence[TraceRequest],
        sampling: Sampling,
        results: queue.Queue[Completion | BaseException | None],
    ) -> None:
        self._teacher = teacher
        self._requests = iter(requests)
        self._num_workers = min(teacher.config.max_concurrency, len(requests))
        self._sampling = sampling
        self._results = results
        self._fault: PotstillError | None = None
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False

    async def run(self) -> None:
        self._task = asyncio.current_task()
        if not self._cancelled:
            async with self._teacher.client() as client:
                await asyncio.gather(*(self._worker(client) for _ in range(self._num_workers)))
        if self._fault is not None:
            raise self._fault

    def cancel(self) -> None:
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()

    async def _worker(self, client: httpx.AsyncClient) -> None:
        """Take requests until there are none, or until one has failed for good: the others still come home."""
        for request in self._requests:
            if self._fault is not None:
                return
            try:
                self._results.put(await self._teacher.complete(client, request, self._sampling))
            except PotstillError as exc:
                self._fault = self._fault or exc
                return


def _drive(loop: asyncio.AbstractEventLoop, work: _Work) -> None:
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


def _message(response: httpx.Response) -> str:
    """What the endpoint says of an error, cut to a line."""
    try:
        body = response.json()
        error = body.get("error", body) if isinstance(body, dict) else body
        said = error.get("message", error) if isinstance(error, dict) else error
        text = said if isinstance(said, str) else json.dumps(said)
    except ValueError:
        text = response.text
    return " ".join(text.split())[:200] or "no message"
