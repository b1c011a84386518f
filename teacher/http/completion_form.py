"""The answer of `/v1/completions`: text, behind its prompt where that is to be echoed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.logprobs import TokenLogprobs
from teacher.engine.sequence import Logprobs
from teacher.http.completion_request import CompletionRequest
from teacher.http.form import UNFINISHED, Form, Offsets, scored
from teacher.http.parts import Parts
from teacher.live import GeneratedSample


class TextForm(Form[CompletionRequest]):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def whole(self, answers: Sequence[GeneratedSample]) -> dict[str, Any]:
        if self.request.max_tokens == 0:
            answers = [_unwritten(answer) for answer in answers]
        tree = super().whole(answers)
        for index, choice in enumerate(tree["choices"]):
            first = answers[index - index % self.request.n]  # it has scored the prompt for all of them
            if self.request.echo:
                self._echo(choice, first)
            if self.request.prompt_logprobs is not None:
                choice["prompt_logprobs"] = self._of_prompt(first)
        return tree

    def _echo(self, choice: dict[str, Any], answer: GeneratedSample) -> None:
        """Put the prompt in front of an answer. The first token's logprob is null: nothing stands before it."""
        spelled, given = self.spell(*answer.prompt_ids), self.request.text_of(choice["index"])
        prompt = spelled if given is None else given
        choice["text"] = prompt + choice["text"]
        if (written := choice["logprobs"]) is None:
            return
        # What the tokenizer puts in front of a text is spelled, but not in it.
        echoed = self.logprobs(_scored_prompt(answer), self.offsets(len(prompt) - len(spelled)))
        echoed["top_logprobs"][0] = None
        echoed["text_offset"] = [max(0, offset) for offset in echoed["text_offset"]]
        written["text_offset"] = [len(prompt) + offset for offset in written["text_offset"]]
        choice["logprobs"] = {name: echoed[name] + written[name] for name in written}

    def _of_prompt(self, answer: GeneratedSample) -> list[dict[str, Any] | None]:
        """One entry a token of the prompt, as vLLM has it: its own, and the likeliest ones with their ranks."""
        entries: list[dict[str, Any] | None] = [None]
        kept = _scored_prompt(answer)
        for (token, own), top in zip(kept.sampled[1:], kept.top[1:], strict=True):
            ranked = [(*pair, rank) for rank, pair in enumerate(top[: self.request.prompt_logprobs], start=1)]
            told = {token: (token, own, None)} | {other: (other, value, rank) for other, value, rank in ranked}
            entries.append(
                {
                    str(other): {"logprob": value, "rank": rank, "decoded_token": self.spell(other)}
                    for other, value, rank in told.values()
                }
            )
        return entries

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


def _scored_prompt(answer: GeneratedSample) -> TokenLogprobs:
    """All tokens of a prompt with their logprobs, none of the first."""
    first: Logprobs = (0.0, [])
    kept = scored(answer.prompt_ids, [first, *answer.prompt_logprobs])
    assert kept is not None
    return TokenLogprobs(kept.unit, [(answer.prompt_ids[0], None), *kept.sampled[1:]], kept.top)


def _unwritten(answer: GeneratedSample) -> GeneratedSample:
    """An answer of which nothing was wanted."""
    kept = None if answer.completion.logprobs is None else TokenLogprobs("id", [], []).packed()
    changes = {"text": "", "finish_reason": "length", "num_tokens": 0, "logprobs": kept}
    return answer._replace(completion=answer.completion.model_copy(update=changes), token_ids=(), stop_reason=None)
