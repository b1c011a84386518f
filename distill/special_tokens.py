"""Special tokens that a text spells out: `<|im_end|>` in a question is ten characters, and no end of a turn.

A chat template writes a prompt's special tokens as text, beside what people and models wrote; in the one string that
results a tokenizer cannot tell the ones from the others. So what was written is veiled first: every special token in
it becomes a stand-in that templates pass through. Behind the template, stand-ins are encoded as the plain characters
that they stand for, and what the template wrote as special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import Tokenizer

from distill.reasoning import END_OF_THINKING, THINK

# Unicode noncharacters: they stand in no text that programs exchange, and no template looks for them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_STAND_IN = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class SpecialTokens:
    """The special tokens of one of transformers' tokenizers. Reasoning tags are none: models and traces write them."""

    def __init__(self, tokenizer: Any) -> None:
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        named = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token} - {None}
        names = sorted((added | named) - {THINK, END_OF_THINKING}, key=len, reverse=True)
        self._tokenizer = tokenizer
        self._ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
        self._veiled = [*names, _OPEN, _CLOSE]
        # Looked for first: a thousand times faster than the patterns, and in most texts none of them occurs.
        self._beginnings = {name[:2] for name in self._veiled}
        self._in_rendered = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._in_text = re.compile("|".join(map(re.escape, self._veiled)))

    def first_in(self, text: str) -> str | None:
        """The first special token that `text` spells out."""
        found = self._in_rendered.search(text)
        return None if found is None else found[0]

    def veil(self, text: str) -> str:
        """`text` with a stand-in for every special token, and for the characters that stand-ins are made of."""
        if not any(beginning in text for beginning in self._beginnings):
            return text
        return self._in_text.sub(lambda found: f"{_OPEN}{self._veiled.index(found[0])}{_CLOSE}", text)

    def unveil(self, text: str) -> str:
        return _STAND_IN.sub(lambda found: self._veiled[int(found[1])], text)

    def is_veiled(self, text: str) -> bool:
        """Tell whether `text` has a stand-in."""
        return _STAND_IN.search(text) is not None

    def veil_within(self, value: Any) -> Any:
        """`value` with every text in it veiled: messages as chat templates take them, whatever their content is."""
        if isinstance(value, str):
            return self.veil(value)
        if isinstance(value, Mapping):
            return {name: self.veil_within(inner) for name, inner in value.items()}
        return [self.veil_within(inner) for inner in value] if isinstance(value, list | tuple) else value

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered text: special tokens where the template wrote them, plain ones for stand-ins.

        Nothing is added in front or behind.
        """
        if not self.is_veiled(rendered):
            return list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])
        return [token for piece in self._pieces(rendered) for token in piece]

    def _pieces(self, rendered: str) -> Iterator[list[int]]:
        """As a tokenizer does it: what stands between two special tokens is encoded by itself."""
        start = 0
        for found in self._in_rendered.finditer(rendered):
            yield self._plain_ids(rendered[start : found.start()])
            yield [self._ids[found[0]]]
            start = found.end()
        yield self._plain_ids(rendered[start:])

    def _plain_ids(self, text: str) -> list[int]:
        return list(self._plain.encode(self.unveil(text), add_special_tokens=False).ids)

    @cached_property
    def _plain(self) -> Tokenizer:
        """A copy that takes special tokens for text; a switch on the tokenizer would be seen by other threads."""
        plain = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Those of `tokenizer`, found once. Its end of turn and padding must have been chosen before."""
    return SpecialTokens(tokenizer)
