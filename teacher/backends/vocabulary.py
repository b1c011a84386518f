"""A checkpoint folder's tokenizer and chat template as `distill.protocols.Vocabulary`: what lm-eval's tasks ask of it.

Text is encoded as transformers does it: what a tokenizer puts in front of any text (a BOS) is in front, special tokens
that the text spells out are tokens. That is lm-eval's way; a question of ours goes by `teacher.backends.tokenizer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill import chat_templates
from distill.errors import CheckpointError, UserInputError
from teacher.backends.tokenizer import encode_text

# Stands where the last turn of a conversation is to be continued.
_GOES_ON = "potstill-goes-on"


class FolderVocabulary:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self._tokenizer, self._folder = tokenizer, folder

    @property
    def prefix_id(self) -> int:
        """Raises CheckpointError for a tokenizer that names neither token."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        message = "names neither a BOS nor an EOS token, and a text is scored behind one"
        raise CheckpointError(message, where=self._folder / "tokenizer_config.json")

    @property
    def end_text(self) -> str:
        return str(self._tokenizer.eos_token or "")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return encode_text(self._tokenizer, text, add_special_tokens=add_special_tokens)

    def spell(self, *token_ids: int) -> str:
        return str(self._tokenizer.decode(list(token_ids)))

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        if not self._tokenizer.chat_template:
            message = "has no chat template; eval.lm_eval.chat_template must be false"
            raise UserInputError(message, where=self._folder)
        turns = [dict(message) for message in messages]
        if not add_generation_prompt:
            turns[-1]["content"] += _GOES_ON
        try:
            text = chat_templates.render(self._tokenizer, turns, add_generation_prompt=add_generation_prompt)
        except chat_templates.TemplateRefusal as exc:
            raise UserInputError(f"the chat template refuses what lm-eval asks: {exc}", where=self._folder) from exc
        return text if add_generation_prompt else text.partition(_GOES_ON)[0]
