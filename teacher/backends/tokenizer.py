"""A checkpoint folder's tokenizer: prompts as its chat template renders them, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill import chat_templates
from distill.errors import CheckpointError, RecipeError, UserInputError
from distill.reading.json_text import read_json
from distill.recipe import Instruction
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
    # AutoTokenizer would put the pre-tokenizer of a family in the place of the file's own.
    try:
        if converted:
            tokenizer = _converted(folder)
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as exc:
        raise CheckpointError(f"is not a usable tokenizer: {exc}", where=path) from exc
    # Whatever the file says: a prompt that is too long is refused, not cut.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if not tokenizer.chat_template and not of_base:
        raise CheckpointError("no chat template", where=folder / "chat_template.jinja")
    if len(tokenizer) > facts.vocab_size:
        message = f"has {len(tokenizer)} tokens, more than config.json's vocab_size {facts.vocab_size}"
        raise CheckpointError(message, where=path)
    return tokenizer


def _converted(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer made of the files that its family had before there was tokenizer.json."""
    from transformers import AutoTokenizer  # brings every model's code: half of the time in which a process starts

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def render_question(tokenizer: PreTrainedTokenizerBase, question: str, instruction: Instruction) -> str:
    """Text of the prompt, up to where the answer begins.

    Without a chat template: the system prompt and a blank line, the question and a line break.
    """
    turns = instruction.turns(question)
    if not tokenizer.chat_template:
        return special_tokens(tokenizer).veil("\n\n".join(turn["content"] for turn in turns)) + "\n"
    return render(tokenizer, turns)


def check_instruction(tokenizer: PreTrainedTokenizerBase, instruction: Instruction, folder: Path) -> None:
    """Raise RecipeError where the folder's chat template refuses a system turn, or leaves it out without a word."""
    if not instruction.system_prompt or not tokenizer.chat_template:
        return
    marker = "potstill-system"
    why = ""
    try:
        shows = marker in render(tokenizer, Instruction(system_prompt=marker).turns("?"))
    except UserInputError as exc:
        shows, why = False, f" ({exc})"
    if not shows:
        message = f"the chat template of {folder} has no system turn{why}; use prompt_suffix"
        raise RecipeError(message, where="recipe", field="teacher.system_prompt")


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
) -> str:
    """Text of a conversation, up to where the answer begins.

    Special tokens that its texts spell out are veiled: they end no turn, and begin none (`encode_prompt`). Raises
    UserInputError where there is no template or it refuses this, CheckpointError for one that is broken or has no end.
    """
    if not tokenizer.chat_template:
        raise UserInputError("this model has no chat template; it goes on with plain texts alone", field="messages")
    specials = special_tokens(tokenizer)
    veiled, offered = specials.veil_within(messages), specials.veil_within(tools) or None
    try:
        return chat_templates.render(tokenizer, veiled, tools=offered, add_generation_prompt=add_generation_prompt)
    except chat_templates.TemplateRefusal as exc:
        message = f"the chat template of this model refuses them: {exc}"
        raise UserInputError(message, field="messages") from exc


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a rendered prompt. A template writes the special tokens itself; without one they are added."""
    specials = special_tokens(tokenizer)
    if not specials.is_veiled(prompt):
        return encode_text(tokenizer, prompt, add_special_tokens=not tokenizer.chat_template)
    begin = [] if tokenizer.chat_template else encode_text(tokenizer, "", add_special_tokens=True)
    return begin + specials.encode(prompt)  # models without a template begin with BOS, if with anything


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> list[int]:
    """As `tokenizer.encode`, which keeps other threads from running for as long as it takes; this does not."""
    (encoding,) = tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return encoding.ids


def most_characters(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of characters that one token stands for at the most.

    Its own text has as many: in byte-level vocabularies a byte is written as a character. A normaliser may have joined
    up to four before (Unicode's NFC: the longest canonical decomposition has four). A text can do better only where the
    tokenizer drops some of it: characters that it does not know, blanks beside special tokens.
    """
    longest = max(map(len, tokenizer.get_vocab()))
    return longest if tokenizer.backend_tokenizer.normalizer is None else 4 * longest


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
        value = read_json(path, CheckpointError).get("eos_token_id")
    except AttributeError as exc:
        raise CheckpointError("is not a JSON object", where=path) from exc
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
    try:
        after = chat_templates.render(tokenizer, turns, add_generation_prompt=False).rpartition(marker)[2]
    except chat_templates.TemplateRefusal as exc:
        raise CheckpointError(f"refuses a question and its answer: {exc}", where=tokenizer.name_or_path) from exc
    closing = tokenizer.encode(after, add_special_tokens=False)[:1]
    return ends | {token for token in closing if token in tokenizer.added_tokens_decoder}
