"""The request of `/v1/completions`, and `/tokenize`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from distill.records import content_id
from teacher.admission.fields import Body, Integer
from teacher.http.request import MAX_LOGPROBS, Request, sample_of
from teacher.live import GenerationRequest, PlainText

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
    """`/v1/completions`: what goes on from a text or from token ids, as they are; no chat template is put around them.

    As with vLLM, special tokens in a text are tokens, and those that the tokenizer puts in front of any text are added
    unless `add_special_tokens` is false.
    """

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_prompt)]
    max_tokens: Integer | None = Field(None, ge=0)
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: bool = True
    logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def prompts(self) -> list[GenerationRequest]:
        prompts: list[Any] = [self.prompt] if self._is_single else list(self.prompt)
        return [self._text(one) if isinstance(one, str) else _tokens(one) for one in prompts]

    def _text(self, text: str) -> GenerationRequest:
        prompt = PlainText(text, self.add_special_tokens)
        return GenerationRequest(sample_of(f"text {content_id([text, self.add_special_tokens])}"), prompt)

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
        if self.stream and (self.echo or self.prompt_logprobs is not None):
            raise ValueError(f"{'echo' if self.echo else 'prompt_logprobs'}: is not streamed")
        return self

    @model_validator(mode="after")
    def _a_budget_needs_a_question(self) -> CompletionRequest:
        if self.thinking_token_budget is not None:
            raise ValueError("thinking_token_budget: is for chat completions; where a plain text thinks cannot be seen")
        return self


class TokenizeRequest(Body):
    """`/tokenize`, as vLLM has it, for text. A chat template, if it is wanted, must be in the text already."""

    model: str
    prompt: str
    add_special_tokens: bool = True


def _tokens(ids: list[int]) -> GenerationRequest:
    return GenerationRequest(sample_of(f"tokens {content_id(ids)}"), tuple(ids))
