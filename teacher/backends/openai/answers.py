"""Reads what an endpoint says into one `Answer`, whether it comes whole or as a stream, from chat or from completions.

Anything that is not a finished answer with its token counts is `MalformedAnswer`: it is asked for again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from distill.logprobs import IMPOSSIBLE, Scored, TokenLogprobs
from distill.reasoning import END_OF_THINKING, THINK
from distill.records import FinishReason

# The form in which vLLM writes a token where it is asked for ids (`return_tokens_as_token_ids`).
ID_PREFIX = "token_id:"
# Errors inside a stream come after status 200: vLLM gives the status as `code`, OpenAI and others a type alone.
STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "BadRequestError": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "NotFoundError": 404,
    "rate_limit_error": 429,
}


class MalformedAnswer(Exception):
    """The endpoint answered, but not with a completion."""


class EndpointError(MalformedAnswer):
    """The endpoint broke off with an error of its own; `status` is the HTTP status that it amounts to."""

    def __init__(self, body: str, status: int) -> None:
        super().__init__(f"broke off with the error {said_in(body)!r}")
        self.body = body
        self.status = status


class MissingUsage(Exception):
    """A whole stream has come, and it never said how many tokens it was."""


@dataclass
class Answer:
    """One choice, put together from the pieces in which it came.

    `token_ids` and `prompt_token_ids` are there where the endpoint sends them (vLLM's `return_token_ids`).
    """

    num_prompt_tokens: int = 0
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    _counted: bool = False
    _reasoning: list[str] = field(default_factory=list)
    _content: list[str] = field(default_factory=list)
    _sampled: list[Scored] = field(default_factory=list)
    _top: list[list[Scored]] = field(default_factory=list)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def logprobs(self) -> TokenLogprobs | None:
        if not self._sampled:
            return None
        scored = [*self._sampled, *(pair for pairs in self._top for pair in pairs)]
        if all(isinstance(token, str) and token.startswith(ID_PREFIX) for token, _ in scored):
            return TokenLogprobs(
                "id", [_by_id(pair) for pair in self._sampled], [list(map(_by_id, t)) for t in self._top]
            )
        return TokenLogprobs("text", self._sampled, self._top)

    def take(self, text: str) -> int:
        """One JSON object: a whole answer, or one piece of a stream. Returns how many tokens it seems to bring.

        Raises EndpointError for an error, MalformedAnswer for anything else.
        """
        try:
            body = json.loads(text)
            return self._take(body)
        except (ValueError, LookupError, TypeError, AttributeError) as exc:
            raise MalformedAnswer(f"not a completion: {text[:80]!r}") from exc

    def _take(self, body: dict[str, Any]) -> int:
        if body.get("error"):
            raise EndpointError(json.dumps(body), _status_of(body["error"]))
        self.prompt_token_ids += body.get("prompt_token_ids") or []
        if usage := body.get("usage"):
            self.num_prompt_tokens, self.num_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            self._counted = True
        brought = 0
        for choice in body["choices"]:
            message = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            content = message.get("content") or ""
            if not isinstance(reasoning, str) or not isinstance(content, str):
                raise MalformedAnswer("reasoning or content is no text")
            if reasoning:
                self._reasoning.append(reasoning)
            if content:
                self._content.append(content)
            ids = choice.get("token_ids") or []
            self.token_ids += ids
            self.prompt_token_ids += choice.get("prompt_token_ids") or []
            self._score(choice.get("logprobs") or {})
            brought += len(ids) or (1 if reasoning or content else 0)
            if (reason := choice.get("finish_reason")) is not None:
                if reason not in ("stop", "length"):
                    raise MalformedAnswer(f"finish_reason {reason!r}")
                self.finish_reason = reason
        return brought

    def _score(self, logprobs: dict[str, Any]) -> None:
        for entry in logprobs.get("content") or ():  # chat
            self._sampled.append(_scored(entry))
            self._top.append(_best_first([_scored(other) for other in entry.get("top_logprobs") or ()]))
        tokens = logprobs.get("tokens") or ()  # completions
        values, tops = logprobs.get("token_logprobs") or (), logprobs.get("top_logprobs") or ()
        for token, value, top in zip(tokens, values, tops or [None] * len(tokens), strict=True):
            self._sampled.append((str(token), _logprob(value)))
            self._top.append(_best_first([(str(other), _logprob(score)) for other, score in (top or {}).items()]))

    def finish(self) -> None:
        """Everything has come. Raises MalformedAnswer where it was not all, MissingUsage where only that is missing."""
        if self.finish_reason is None:
            raise MalformedAnswer("ended without a finish_reason")
        if not self._counted:
            raise MissingUsage


def said_in(text: str) -> str:
    """The message in the body of an error, on one line."""
    try:
        body = json.loads(text)
        error = body.get("error", body) if isinstance(body, dict) else body
        said = error.get("message", error) if isinstance(error, dict) else error
        text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    except ValueError:
        pass
    return " ".join(text.split()) or "no message"


def _status_of(error: Any) -> int:
    """The HTTP status that an error object stands for; 500 where it does not say."""
    if isinstance(error, dict):
        code = error.get("code")
        if str(code).isdecimal() and 400 <= int(code) < 600:
            return int(code)
        return STATUS_OF_TYPE.get(str(error.get("type")), 500)
    return 500


def whole_text(reasoning: str, content: str, *, think_prefilled: bool) -> str:
    """The completion as the model wrote it, from what an endpoint hands out in parts.

    A reasoning parser returns the thinking apart from the answer: it goes back between its tags, left open where the
    answer never began. Without one, a template that prefills `<think>` leaves the tag out of the content.
    """
    if reasoning:
        thought = f"{THINK}\n{reasoning.strip(chr(10))}\n"
        return f"{thought}{END_OF_THINKING}\n\n{content.lstrip(chr(10))}" if content.strip() else thought
    body = content.lstrip()
    if body.startswith(THINK):
        body = body.removeprefix(THINK)
        return THINK + (body if body.startswith("\n") else f"\n{body}")
    return f"{THINK}\n{content}" if think_prefilled else content


def _scored(entry: dict[str, Any]) -> Scored:
    return str(entry["token"]), _logprob(entry["logprob"])


def _logprob(value: float | None) -> float:
    return IMPOSSIBLE if value is None else float(value)


def _best_first(pairs: list[Scored]) -> list[Scored]:
    return sorted(pairs, key=lambda pair: -pair[1])


def _by_id(pair: Scored) -> Scored:
    return int(str(pair[0]).removeprefix(ID_PREFIX)), pair[1]
