"""Speculative decoding with the multi-token prediction (MTP) layer (DeepSeek-V3, arXiv 2412.19437 s.2.2, 5.4.3).

The layer guesses, at the end of each step and for every sequence that goes on, the token after the next one. The next
step computes two rows of each: its last token and that draft. A draft that turns out right has saved a step.

A token is drawn from the model's logits by the sequence's own uniform number, with speculation as without; a draft
counts only where it equals the token drawn in its place, and what was computed behind it only then. So a seed gives the
same text either way, which is more than the same distribution: the rejection sampling of arXiv 2211.17192 and
2302.01318 keeps the distribution alone. The price is acceptance: theirs is 1 - TV(p, q), one minus the distance of the
model's distribution from that of the drafts. To lose little of it, a draft is drawn from the layer's own distribution
by the same number in the same manner, as two near distributions then mostly give the same token (the shared randomness
of arXiv 2408.07978); where the temperature is 0, both are the likeliest token.

Penalties and grammars apply to what is drawn, behind a draft as if it had been written; drafts are made without them.

A rejected draft leaves a latent behind, which the next step writes over. The layer's own latent at a place depends on
the token after it, so that of a shared page's last place may have been made for another continuation: it can spoil a
guess, never a text.
"""

from __future__ import annotations

from typing import Any

from teacher.engine.runner import ForwardPass, ModelRunner
from teacher.engine.sampler import sample
from teacher.engine.scheduler import Chunk
from teacher.engine.sequence import Sequence


def take(chunk: Chunk[Any], sampled: list[int], eos_token_ids: frozenset[int]) -> list[int]:
    """Append to a chunk's sequence what was sampled behind it and, where its draft came true, behind that."""
    sequence = chunk.sequence
    tokens = [sequence.append(sampled[0], eos_token_ids)]
    if chunk.draft is None:
        return tokens
    accepted = tokens[0] == chunk.draft
    sequence.num_drafts += 1
    sequence.num_accepted += accepted
    if accepted and sequence.finish_reason is None:
        tokens.append(sequence.append(sampled[1], eos_token_ids))
    return tokens


def draft(
    runner: ModelRunner,
    chunks: list[Chunk[Any]],
    max_positions: int,
    source: ForwardPass | list[int],
) -> None:
    """Give every sequence that goes on a guess at its next token, and the draft layers' cache this step's tokens.

    `source` is the step's forward pass, or the guesses, one a chunk, where the step has made them itself. A
    sequence that is at its last position gets none: there is no place where it could be verified.
    """
    going = [chunk.sequence for chunk in chunks if chunk.ends_text and chunk.sequence.finish_reason is None]
    if isinstance(source, ForwardPass):
        guesses = _guess(runner, source, chunks, going)
    else:
        guesses = [guess for chunk, guess in zip(chunks, source, strict=True) if chunk.sequence.finish_reason is None]
    for sequence, guess in zip(going, guesses, strict=True):
        fits = sequence.num_tokens < max_positions
        sequence.draft = (guess if sequence.forced is None else sequence.forced) if fits else None


def _guess(
    runner: ModelRunner, forward: ForwardPass, chunks: list[Chunk[Any]], going: list[Sequence[Any]]
) -> list[int]:
    next_ids: list[int] = []
    rows: list[int] = []
    for chunk in chunks:
        sequence = chunk.sequence
        if chunk.ends_text and sequence.finish_reason is None:
            rows.append(len(next_ids) + sequence.num_computed - chunk.start - 1)
        following = sequence.tokens(chunk.start + 1, chunk.end + 1)
        next_ids += following + following[-1:] * (chunk.num_rows - len(following))  # behind a rejected draft: any token
    logits_NV = runner.draft(forward, next_ids, rows)
    return sample(logits_NV, [s.uniform() for s in going], [s.sampling_params for s in going]) if going else []
