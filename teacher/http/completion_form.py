"""The answer of `/v1/completions`: text."""

from __future__ import annotations

from typing import Any

from distill.logprobs import TokenLogprobs
from teacher.http.completion_request import CompletionRequest
from teacher.http.form import UNFINISHED, Form, Offsets
from teacher.http.parts import Parts


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

    def content(self, parts: Parts) -> dict[str, Any]:
        return {"text": parts.text}

    def deltas(
        self,
        index: int,
        parts: Parts,
        logprobs: dict[str, Any] | None,
        ids: dict[str, Any],
        *,
        first: bool,
        end: dict[str, Any] | None,
    ) -> list[dict[str, Any]]:
        if not (parts.text or logprobs or ids or end):
            return []
        return [{"index": index, "text": parts.text, "logprobs": logprobs, **(end or UNFINISHED), **ids}]
