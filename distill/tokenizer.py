"""Byte-level BPE tokenizers for models of our own: digits stand alone, operators carry their spaces, words are words.

Single digits keep arithmetic regular; ` + ` as one token keeps worked steps short. Any text can be encoded (the byte
alphabet is complete) and decodes to itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PIECES = r" ?[A-Za-z]+| [-+*/=:] |\d|\n+|[^\S\n]+|[^\sA-Za-z\d]"


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str], plain_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Train on `texts`; `special_tokens` (ids from 0) vanish when decoding, `plain_tokens` (`<think>`) stay."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(plain_tokens),
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain_tokens])
    return tokenizer
