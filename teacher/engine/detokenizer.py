"""The text of a sequence, piece by piece as its tokens come.

A token alone has no text: it may hold a part of a character, and some decoders drop the space in front of a first word.
So each piece is decoded behind the tokens of the piece before it, and what ends within a character waits for the rest
of it. All pieces together are what decoding all tokens at once gives; a piece costs two short decodings, however long
the text is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

Decode = Callable[[Sequence[int]], str]
UNSPELLABLE = "\ufffd"
# A character has at most four bytes (UTF-8), a token at least one: so many tokens may wait for the next.
_MAX_WAITING = 3


def decode_by(tokenizer: Tokenizer) -> Decode:
    """Its text of tokens, special ones among them, as they are."""

    def decode(token_ids: Sequence[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=False)

    return decode


class Detokenizer:
    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._before: list[int] = []  # the tokens of the last piece
        self._text_before = ""
        self._waiting: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain with these tokens, and was not before."""
        self._waiting += token_ids
        whole = self._decode(self._before + self._waiting)
        if not whole.endswith(UNSPELLABLE):
            return self._settle(len(self._waiting), whole)
        # Perhaps a character that has only begun, perhaps bytes that are no text: all but the end can be told by now.
        for kept in range(_MAX_WAITING, 2 * _MAX_WAITING + 1):
            cut = len(self._waiting) - kept
            if cut <= 0:
                break
            head = self._decode(self._before + self._waiting[:cut])
            if head + self._decode(self._waiting[cut:]) == whole:
                return self._settle(cut, head)
        return ""

    def flush(self) -> str:
        """Release what is left at the end, as U+FFFD where it is no text."""
        whole = self._decode(self._before + self._waiting)
        return self._settle(len(self._waiting), whole)

    def _settle(self, count: int, whole: str) -> str:
        """`whole` is the text of the last piece and of the first `count` tokens that wait."""
        piece = whole[len(self._text_before) :]
        self._before, self._waiting = self._waiting[:count], self._waiting[count:]
        self._text_before = self._decode(self._before)
        return piece
