"""A checkpoint folder's tokenizer: prompts as its chat template renders them, and the tokens that end an answer."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.errors import CheckpointError
from distill.special_tokens import special_tokens
from teacher.models.gqa.config import FAMILIES
from teacher.models.load import ModelFacts

_OTHER_FILES = ("tokenizer.model", "vocab.json")  # tokenizer.json can be made of these


def load_tokenizer(folder: Path, facts: ModelFacts, *, of_base: bool = False) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder with its chat template, which a base may lack.

    Raises CheckpointError for a tokenizer that is missing, unreadable, or larger than the model's vocabulary.
    """
    path = folder / "tokenizer.json"
    converted = of_base and not path.exists() and any((folder / name).is_file() for name in _OTHER_FILES)
    if not path.exists() and not converted:
        raise CheckpointError("no such file", where=path)
    try:
        # AutoTokenizer would put the pre-tokenizer of a family in the place of the file's own.
        reader = AutoTokenizer if converted else PreTrainedTokenizerFast
        tokenizer = reader.from_pretrained(folder, local_files_only=True)
    except Exception as exc:
        raise CheckpointError(f"is not a usable tokenizer: {exc}", where=path) from exc
    if not tokenizer.chat_template and not of_base:
        raise CheckpointError("no chat template", where=folder / "chat_template.jinja")
    if len(tokenizer) > facts.vocab_size:
        message = f"has {len(tokenizer)} tokens, more than config.json's vocab_size {facts.vocab_size}"
        raise CheckpointError(message, where=path)
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Text of the prompt, up to where the answer begins; without a chat template the question and a line break.

    Special tokens that the question spells out are veiled: they end no turn, and begin none (`encode_prompt`).
    """
    veiled = special_tokens(tokenizer).veil(question)
    if not tokenizer.chat_template:
        return veiled + "\n"
    message = [{"role": "user", "content": veiled}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a rendered prompt. A template writes the special tokens itself; without one they are added."""
    specials = special_tokens(tokenizer)
    if tokenizer.chat_template:
        return specials.encode(prompt)
    if not specials.is_veiled(prompt):
        return tokenizer.encode(prompt)
    return tokenizer.encode("") + specials.encode(prompt)  # models of these families begin with BOS, if with anything


def end_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, facts: ModelFacts) -> tuple[int, ...]:
    """Every token that ends an answer: those of generation_config.json, else of config.json; for students and bases
    also the tokenizer's own and the one that closes a turn. Raises CheckpointError where there is none."""
    tokens = _of_generation_config(folder) or facts.eos_token_ids
    if facts.model_type in FAMILIES:
        tokens = tuple({*tokens, *_turn_end(tokenizer)})
    if not tokens:
        raise CheckpointError("required, but not given", where=folder / "config.json", field="eos_token_id")
    return tokens


def _of_generation_config(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json; empty where there is none."""
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (UnicodeDecodeError, ValueError, AttributeError) as exc:
        raise CheckpointError(f"is not a JSON object: {exc}", where=path) from exc
    tokens = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens if token is not None):
        raise CheckpointError(f"must be token ids, got {value!r}", where=path, field="eos_token_id")
    return tuple(token for token in tokens if token is not None)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's end token, and the one that closes a turn in the chat template: bases name only the former
    (Qwen2.5's is `<|endoftext|>`, while its template ends turns with `<|im_end|>`)."""
    ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if not tokenizer.chat_template:
        return ends
    marker = "potstill"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(marker)[2]
    closing = tokenizer.encode(after, add_special_tokens=False)[:1]
    return ends | {token for token in closing if token in tokenizer.added_tokens_decoder}
