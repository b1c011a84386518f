"""The answer of `/v1/completions`: text."""

from __future__ import annotations

from typing import Any

from distill.logprobs import TokenLogprobs
from teacher.http.completion_request import CompletionRequest
from teacher.http.form import Form, Offsets, ending
from teacher.live import GeneratedSample


class TextForm(Form[CompletionRequest]):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def logprobs(self, kept: TokenLogprobs, offsets: Offsets) -> dict[str, Any]:
        tokens = [token for token, _ in kept.sampled]
        return {
            "tokens": [self._named(token) for token in tokens],
            "token_logprobs": [logprob for _, logprob in kept.sampled],
            "top_logprobs": [{self._named(token): value for token, value in self._top(top)} for top in kept.top],
            "text_offset": [offsets.next(token) for token in tokens],
        }

    def content(self, reasoning: str, text: str) -> dict[str, Any]:
        return {"text": text}

    def deltas(
        self,
        index: int,
        parts: tuple[str, str],
        logprobs: dict[str, Any] | None,
        ids: dict[str, Any],
        *,
        first: bool,
        answer: GeneratedSample | None,
    ) -> list[dict[str, Any]]:
        if not (parts[1] or logprobs or ids or answer):
            return []
        return [{"index": index, "text": parts[1], "logprobs": logprobs, **ending(answer), **ids}]
