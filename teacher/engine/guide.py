"""Guided decoding: before each token, which of the vocabulary leave the text one that its grammar admits.

llguidance keeps the parser and answers with a mask over the vocabulary (Willard and Louf, arXiv 2307.09702, on how
tokens meet a grammar). Of the libraries that do so it was taken because it needs no other package, has one wheel for
every Python, computes masks as they are needed instead of compiling a grammar against the whole vocabulary, and counts
what it does: a grammar that would take long, or much memory, is refused, when it is read or when a step gets there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from distill.reasoning import END_OF_THINKING

# A grammar of this length is read in some 0.5 s at worst (a schema of thousands of optional properties), most in 10 ms.
MAX_GRAMMAR_CHARACTERS = 2**16
# About 1 kB a state of the lexer, 4 ms a step at worst for either of the others: sequences have their own, and share a
# step's time. The library's defaults are four times as much; schemas of every kind that were tried need less than this.
LIMITS = LLParserLimits(
    max_lexer_states=8_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
_KEPT = 32  # grammars that were read last: `n` samples of a request have one, and clients ask again


@dataclass(frozen=True)
class Grammar:
    """Texts that a sequence may write: what the rule `answer` of `lark` derives (Lark, in llguidance's dialect).

    `tags` are texts that are one token in some vocabularies, text in others: `lark` has them as `tag_0`, `tag_1` and so
    on, and as `to_tag_0` any text that ends with the first such tag in it. With `thinks` the answer begins behind the
    end of the reasoning, and up to two line breaks. `field` is the request's, for whoever must be told that something
    is wrong.
    """

    lark: str
    tags: tuple[str, ...] = ()
    thinks: bool = False
    field: str = "response_format"


class Guide:
    """The grammar's side of one sequence: knows what was written, says what may come."""

    def __init__(self, matcher: LLMatcher, eos_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids

    @property
    def fault(self) -> str | None:
        """Why it cannot go on: a token that the grammar does not admit, or a limit that was reached."""
        return f"the answer's grammar could not be kept: {_reason(self._matcher)}" if self._matcher.is_error() else None

    def push(self, token: int) -> None:
        if token not in self._eos_token_ids:
            self._matcher.consume_token(token)

    def mask(self, drafts: Sequence[int] = ()) -> np.ndarray | None:
        """Which tokens may come behind the text and `drafts`, booleans; None: any, as none that is drawn will count.

        An end token may come where the grammar is satisfied, and nothing else where nothing can follow.
        """
        taken = self._matcher.try_consume_tokens(list(drafts)) if drafts else 0
        bits = self._matcher.compute_bitmask() if taken == len(drafts) else None
        if taken:
            self._matcher.rollback(taken)
        if bits is None or self._matcher.is_error():
            return None
        return np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").view(np.bool_)


class Guides:
    """Makes guides over one tokenizer's tokens. What is costly is done when it is first needed, by whoever asks."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._compiled = lru_cache(_KEPT)(self._compile)

    def guide(self, grammar: Grammar) -> Guide:
        """Raises ValueError, saying why, for a grammar that is wrong, too large or admits no text, and where the
        tokenizer is of a kind that llguidance does not know."""
        return Guide(self._compiled(grammar).deep_copy(), self._eos_token_ids)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if len(grammar.lark) > MAX_GRAMMAR_CHARACTERS:
            raise ValueError(f"must have at most {MAX_GRAMMAR_CHARACTERS} characters, has {len(grammar.lark)}")
        if grammar.thinks:
            self._compiled(
                replace(grammar, thinks=False)
            )  # what is wrong with the answer shows before it is thought about
        lark = LLMatcher.grammar_from_lark("\n".join([*self._beginning(grammar), grammar.lark]))
        matcher = LLMatcher(self._vocabulary, lark, log_level=0, limits=LIMITS)
        trial = matcher.deep_copy()
        trial.compute_bitmask()  # only here it shows that nothing may come first
        if trial.is_error():
            raise ValueError(_reason(trial))
        return matcher

    def _beginning(self, grammar: Grammar) -> Iterable[str]:
        """The rules that `Grammar` promises: where the text starts, and its tags."""
        # As the text goes on behind a forced end of the thinking, and as models go on by themselves.
        yield r'start: to_thinking "\n"{0,2} answer' if grammar.thinks else "start: answer"
        tags = {f"tag_{number}": tag for number, tag in enumerate(grammar.tags)}
        if grammar.thinks:
            tags["thinking"] = END_OF_THINKING
        for name, tag in tags.items():
            token = self._token_of(tag)
            if token is None:
                yield f"{name}: {json.dumps(tag)}"
                yield rf"to_{name}[lazy]: /(.|\n)*{_literal(tag)}/"
            else:
                yield f"{name}: <[{token}]>"
                yield rf"to_{name}: /(.|\n)*/ {name}"

    def _token_of(self, tag: str) -> int | None:
        """The token of a tag that text cannot spell otherwise; None: it is text like any other."""
        token = self._tokenizer.token_to_id(tag)
        return token if token is not None and self._vocabulary.is_special_token(token) else None

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        # About a second for 150,000 tokens.
        return LLTokenizer(self._tokenizer.to_str(), eos_token=sorted(self._eos_token_ids))


def _literal(text: str) -> str:
    """A regular expression of this text alone."""
    return re.escape(text).replace("/", r"\/")


def _reason(matcher: LLMatcher) -> str:
    """The first line of what the library says, without places in a text that the caller has not seen."""
    line = matcher.get_error().partition("\n")[0]
    if line.startswith("NoExtension"):
        return "admits no text"
    if line.startswith("at "):
        line = line.partition(": ")[2]
    for stage in ('failed to parse "%json": ', "failed to compile JSON schema: "):
        line = line.removeprefix(stage)
    return line.rstrip(":")
