"""The request of `/v1/completions`, and `/tokenize`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from distill.records import content_id
from teacher.http.request import MAX_LOGPROBS, Request, sample_of
from teacher.live import GenerationRequest

MAX_PROMPTS, MAX_PROMPT_TOKENS = 1_024, 2**18


def _prompt(given: Any) -> Any:
    """A text, tokens, or a list of either. By hand: pydantic's union tries every form on every entry of a long list."""
    many = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    prompts = given if many else [given]
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"must be at most {MAX_PROMPTS} prompts, got {len(prompts)}")
    if any(len(one) > MAX_PROMPT_TOKENS for one in prompts if isinstance(one, list)):
        raise ValueError(f"must have at most {MAX_PROMPT_TOKENS} tokens")
    if not all(_is_text(one) for one in prompts) and not all(_is_tokens(one) for one in prompts):
        raise ValueError("must be a text, a list of token ids, or a list of several of the one or the other")
    return given


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str) and bool(prompt)


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int and token >= 0 for token in prompt)


class CompletionRequest(Request):
    """`/v1/completions`. A prompt of text is a question: the teacher's own chat template is put around it. A prompt of
    token ids is taken as it is, and its completion goes on from there."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_prompt)]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    best_of: Literal[1] | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def prompts(self) -> list[GenerationRequest]:
        prompts: list[Any] = [self.prompt] if self._is_single else list(self.prompt)
        return [GenerationRequest(sample_of(one)) if isinstance(one, str) else _tokens(one) for one in prompts]

    def num_samples(self) -> int:
        return self.n if self._is_single else self.n * len(self.prompt)

    @property
    def _is_single(self) -> bool:
        return isinstance(self.prompt, str) or isinstance(self.prompt[0], int)

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def num_prompt_logprobs(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        return max((number for number in (echoed, self.prompt_logprobs) if number is not None), default=None)

    def limit(self) -> int | None:
        # Who wants nothing written gets nothing (`TextForm`); a sample has a token at least.
        return 1 if self.max_tokens == 0 else self.max_tokens

    def text_of(self, index: int) -> str | None:
        """The text of the prompt that an answer belongs to; None: it was given as tokens."""
        prompt = self.prompt if self._is_single else self.prompt[index // self.n]
        return prompt if isinstance(prompt, str) else None

    @model_validator(mode="after")
    def _prompts_are_told_whole(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("max_tokens: 0 leaves nothing to answer without echo or prompt_logprobs")
        for name in ("echo", "prompt_logprobs"):
            if self.stream and getattr(self, name) not in (None, False):
                raise ValueError(f"{name}: is not streamed")
        return self

    @model_validator(mode="after")
    def _a_budget_needs_a_question(self) -> CompletionRequest:
        if self.thinking_token_budget is not None and any(one.prompt_ids for one in self.prompts()):
            raise ValueError("thinking_token_budget: where a prompt of token ids thinks cannot be seen")
        return self


class TokenizeRequest(BaseModel):
    """`/tokenize`, as vLLM has it, for text. A chat template, if it is wanted, must be in the text already."""

    model_config = ConfigDict(extra="forbid")

    model: str
    prompt: str
    add_special_tokens: Literal[False]


def _tokens(ids: list[int]) -> GenerationRequest:
    """The problem stands for the seed alone, which every prompt must have to itself."""
    return GenerationRequest(sample_of(f"tokens {content_id(ids)}"), prompt_ids=tuple(ids))
