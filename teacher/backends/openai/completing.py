"""One sample: what is asked for it, and budget forcing where the thinking has used its tokens up.

Budget forcing (`Sampling.max_thinking_tokens`; s1, arXiv 2501.19393 s.3.1) asks for the budget first. Where that ends
inside the thinking, the end of the thinking is put behind it and the answer is asked for as its continuation. How, is
`teacher.budget_forcing`:

- `completions`: the very tokens of prompt and thinking go to `/completions` (vLLM: `return_token_ids`, `/tokenize`).
  The default, because the templates of R1 and its kin delete the thinking from an assistant message;
- `chat`: the text goes back as an assistant message to be continued (`continue_final_message`, vLLM and SGLang), for
  templates that leave it alone;
- `server`: one request, and the server forces the end (`thinking_token_budget`: vLLM with `--reasoning-config`,
  potstill).

`num_tokens` counts everything that was written, what was forced included; the second prompt is counted in the costs
alone.
"""

from __future__ import annotations

from typing import Any

from distill.errors import RecipeError
from distill.logprobs import TokenLogprobs
from distill.reasoning import END_OF_THINKING, FORCED_END, THINK
from distill.recipe import OpenAITeacher
from distill.records import Completion, Sampling, TraceRequest, content_id
from teacher.backends.openai.answers import Answer, whole_text
from teacher.backends.openai.client import Client, RequestFailed


class Asker:
    """Completes requests with one client and one sampling. `forced_ids` is `FORCED_END` in the model's tokens."""

    def __init__(self, client: Client, sampling: Sampling, *, forced_ids: list[int]) -> None:
        self._client = client
        self._config: OpenAITeacher = client.config
        self._sampling = sampling
        self._forced_ids = forced_ids

    async def complete(self, request: TraceRequest) -> Completion:
        """Raises RequestFailed for this request alone, PotstillError for what concerns all."""
        budget = self._sampling.max_thinking_tokens
        forced_here = budget is not None and self._config.budget_forcing != "server"
        answer = await self._client.ask(self._chat_url, self._first(request, budget if forced_here else None))
        text = self._text(answer)
        if forced_here and answer.finish_reason == "length":
            return await self._continued(request, answer, text)
        return self._completion(request, text, answer)

    def _text(self, answer: Answer) -> str:
        text = whole_text(answer.reasoning, answer.content, think_prefilled=self._config.opens_thinking)
        if self._client.key.is_in(text):
            said = RecipeError(
                "answers with the API key in its text; nothing of it is kept", where=self._client.base_url
            )
            raise RequestFailed(said)
        return text

    @property
    def _chat_url(self) -> str:
        return f"{self._client.base_url}/chat/completions"

    def _first(self, request: TraceRequest, budget: int | None) -> dict[str, Any]:
        payload = self._settings(request.seed(self._sampling), budget or self._sampling.max_tokens)
        payload |= self._messages(request) | self._chat_logprobs()
        if budget is not None and self._config.budget_forcing == "completions":
            payload["return_token_ids"] = True
        if self._config.budget_forcing == "server" and self._sampling.max_thinking_tokens is not None:
            payload["thinking_token_budget"] = self._sampling.max_thinking_tokens
        return payload

    def _messages(self, request: TraceRequest, *continued: dict[str, str]) -> dict[str, Any]:
        return {"messages": [*self._config.around(request.problem).turns(request.problem.prompt), *continued]}

    def _chat_logprobs(self) -> dict[str, Any]:
        top = self._sampling.top_logprobs
        return {"logprobs": True, "top_logprobs": top} if top else {}

    def _settings(self, seed: int, max_tokens: int) -> dict[str, Any]:
        streamed = {"stream": True, "stream_options": {"include_usage": True}} if self._config.stream else {}
        return {
            "model": self._config.model,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "max_tokens": max_tokens,
            "seed": seed,
            **streamed,
            **self._config.extra_body,
        }

    async def _continued(self, request: TraceRequest, first: Answer, text: str) -> Completion:
        """The budget is used up: end the thinking if it still goes on, and let the answer follow."""
        open_ = text.startswith(THINK) and END_OF_THINKING not in text
        forced_ids = self._forced_ids if open_ else []
        partial = text.rstrip("\n") + FORCED_END if open_ else text
        left = self._sampling.max_tokens - first.num_tokens - len(forced_ids)
        if left < 1:
            return self._completion(request, partial, first, num_forced=len(forced_ids))
        # A seed of its own: the same one would draw the thinking's random numbers again.
        payload = self._settings(int(content_id([request.seed(self._sampling), "answer"], digits=15), 16), left)
        if self._config.budget_forcing == "chat":
            continued = {"role": "assistant", "content": partial}
            payload |= self._messages(request, continued) | self._chat_logprobs()
            payload |= {"continue_final_message": True, "add_generation_prompt": False}
            second = await self._client.ask(self._chat_url, payload)
            # The template wrote prompt and thinking again: what the second prompt has beyond them was forced.
            num_forced = max(0, second.num_prompt_tokens - first.num_prompt_tokens - first.num_tokens)
        else:
            if not first.prompt_token_ids or not first.token_ids:
                message = "sends no token ids, as vLLM does; use 'chat' or 'server'"
                raise RecipeError(message, where=self._client.base_url, field="teacher.budget_forcing")
            payload["prompt"] = [*first.prompt_token_ids, *first.token_ids, *forced_ids]
            if self._sampling.top_logprobs:
                payload["logprobs"] = self._sampling.top_logprobs
            second = await self._client.ask(f"{self._client.base_url}/completions", payload)
            num_forced = len(forced_ids)
        return self._completion(request, partial, first, second, num_forced=num_forced)

    def _completion(
        self, request: TraceRequest, text: str, first: Answer, second: Answer | None = None, *, num_forced: int = 0
    ) -> Completion:
        answers = [first] if second is None else [first, second]
        reason = answers[-1].finish_reason
        assert reason is not None  # `Answer.finish` has seen to it
        if second is not None:
            text += second.reasoning + second.content  # a parser that saw no <think> may call the answer reasoning
        # A lone surrogate is valid JSON but no text: neither the ledger nor a tokenizer could take it.
        return Completion(
            request=request,
            text=text.encode("utf-8", "replace").decode(),
            finish_reason=reason,
            num_prompt_tokens=first.num_prompt_tokens,
            num_tokens=sum(answer.num_tokens for answer in answers) + num_forced,
            logprobs=self._logprobs(answers, num_forced) if self._sampling.top_logprobs else None,
        )

    def _logprobs(self, answers: list[Answer], num_forced: int) -> str:
        """All parts in order; of a forced token the endpoint has said nothing, so its entry has no numbers."""
        parts = [answer.logprobs for answer in answers]
        if any(part is None for part in parts):
            raise RecipeError("sends no logprobs", where=self._client.base_url, field="generate.sampling.top_logprobs")
        first, *rest = [part for part in parts if part is not None]
        if num_forced:
            tokens: list[int | str] = list(self._forced_ids) if first.unit == "id" else [FORCED_END]
            first = first.followed_by(TokenLogprobs(first.unit, [(t, None) for t in tokens], [[] for _ in tokens]))
        for part in rest:
            first = first.followed_by(part)
        return first.packed()
