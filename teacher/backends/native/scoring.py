"""Texts scored and continued by their tokens, in an engine: what lm-eval's tasks ask for.

Of a text that is scored, all but the last token is read; the last one is what the engine is made to write. So a model
reads no more than lm-eval's own `hf` model gives it, and continuations of one token share the cache of their context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Many
from typing import Any

from distill.errors import DataError, RecipeError
from distill.protocols import Likelihood, PlainAnswer, PlainPrompt, ScoredText
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Logprobs, Sequence

# Fields of `PlainPrompt.shaping` that the engine knows, under its own names, which are the API's.
_SHAPING = ("top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def scored_sequence(number: int, wanted: ScoredText) -> Sequence[int]:
    """The sequence that scores a continuation."""
    *read, last = (*wanted.context_ids, *wanted.continuation_ids)
    own = None if len(wanted.continuation_ids) == 1 else 1
    params = SamplingParams(top_logprobs=1, prompt_logprobs=own)
    first = len(wanted.context_ids) - 1
    return Sequence(number, read, 1, 0, params, scored_from=first, first_ids=(last,))


def likelihood_of(done: Sequence[int]) -> Likelihood:
    """What the engine made of a `scored_sequence`. Raises DataError where it could not take it."""
    _check(done)
    scored: list[tuple[int, Logprobs]] = list(
        zip(
            (*done.prompt_ids[done.scored_from + 1 :], *done.first_ids),
            (*done.prompt_logprobs, *done.logprobs),
            strict=True,
        )
    )
    is_greedy = all(best[0][0] == token for token, (_, best) in scored)
    return Likelihood(sum(own for _, (own, _) in scored), is_greedy)


def plain_sequence(number: int, wanted: PlainPrompt) -> Sequence[int]:
    """Raises RecipeError for a shaping of the distribution that the engine does not know."""
    if unknown := [name for name, _ in wanted.shaping if name not in _SHAPING]:
        raise RecipeError(
            f"the native engine has no {unknown[0]!r}; it has {', '.join(_SHAPING)}", where="lm_eval task"
        )
    sampling, shaping = wanted.sampling, dict[str, Any](wanted.shaping)
    if "top_k" in shaping:
        shaping["top_k"] = int(shaping["top_k"])
    params = SamplingParams(sampling.temperature, sampling.top_p, **shaping)
    return Sequence(number, wanted.prompt_ids, sampling.max_tokens, wanted.seed, params, stops=wanted.stop)


def plain_answer(done: Sequence[int], spell: Callable[[Many[int]], str], ends: frozenset[int]) -> PlainAnswer:
    """The answer of a `plain_sequence`; `spell` leaves special tokens out. Raises DataError as `likelihood_of` does."""
    _check(done)
    written = done.generated_ids[:-1] if done.generated_ids[-1] in ends else done.generated_ids
    reason = "stop" if done.finish_reason == "stop" else "length"
    return PlainAnswer(spell(written), reason, len(done.prompt_ids), len(done.generated_ids))


def _check(done: Sequence[int]) -> None:
    if done.fault is not None:
        raise DataError(done.fault, where="lm_eval task")
