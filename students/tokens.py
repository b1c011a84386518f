"""Training text to tokens: prompt and completion of every example, exactly as the shipped checkpoint will see them.

The prompt is what `apply_chat_template(add_generation_prompt=True)` gives at inference; the completion is what the same
template puts after it, up to and with the end-of-turn token. The two are tokenised apart, as they are at inference,
where the model continues a finished prompt: so the inference prompt is always a prefix of the training tokens. Labels
are made here, -100 over the prompt, and not by the trainer: nothing later can mask the end of turn or cut an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pyarrow as pa
from transformers import PreTrainedTokenizerBase as Tokenizer

from distill import chat_templates
from distill.chat_templates import TemplateRefusal
from distill.errors import CheckpointError, DataError, UserInputError
from distill.progress import Progress
from distill.reasoning import THINK_LINE
from distill.recipe import UNINSTRUCTED, Instruction, SFTConfig
from distill.records import Example, Message
from distill.special_tokens import SpecialTokens, special_tokens
from students.examples import count_rows, learned_turns, read_examples

IGNORED = -100
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "length": pa.int32()})


@dataclass
class Fault:
    """Number of examples that have a fault, their tokens where those were counted, and the first of them."""

    count: int = 0
    num_tokens: int = 0
    first: str = ""

    def add(self, example: Example, detail: str, num_tokens: int = 0) -> None:
        self.count += 1
        self.num_tokens += num_tokens
        self.first = self.first or f"problem {example.problem_id} of {example.source}: {detail}"


@dataclass
class TokenCounts:
    """Findings of tokenising. Tokens are the student's, counted once an example, padding excluded.

    `too_long` are among the examples that are counted, unless they are dropped (`sft.too_long`).
    """

    num_examples: int = 0
    num_tokens: int = 0
    num_completion_tokens: int = 0
    longest: int = 0
    too_long: Fault = field(default_factory=Fault)
    empty: Fault = field(default_factory=Fault)
    unfitting: Fault = field(default_factory=Fault)
    special: Fault = field(default_factory=Fault)
    unknown: Fault = field(default_factory=Fault)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> TokenCounts:
        """Back from `dataclasses.asdict`, as one process writes it for the others."""
        return cls(**{name: Fault(**value) if isinstance(value, dict) else value for name, value in tree.items()})


def render_prompt(tokenizer: Tokenizer, question: str, instruction: Instruction = UNINSTRUCTED) -> str:
    """The prompt of a question, its special tokens veiled. Raises DataError where the template refuses it."""
    (prompt,) = _render(tokenizer, [instruction.turns(question)], add_generation_prompt=True)
    return prompt


def render(tokenizer: Tokenizer, question: str, completion: str, history: Sequence[Message] = ()) -> tuple[str, str]:
    """Prompt and completion as the template writes them; the completion ends with the end-of-turn token.

    Special tokens that the texts spell out are veiled (`distill.special_tokens`). Raises CheckpointError where the
    template does not give back what it was given: reasoning deleted or wrapped anew, or another token than EOS at the
    end of the turn; DataError for a completion that does not go on from the reasoning which the prompt opens.
    """
    (texts,) = _render_all(tokenizer, [_turns(question, completion, history)])
    return texts


def _render_each(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[tuple[str, str] | UserInputError]:
    """What `render` gives or raises for each, all rendered together where none has a fault."""
    conversations = [_turns(example.question, example.completion, example.history) for example in examples]
    try:
        return list(_render_all(tokenizer, conversations))
    except UserInputError:
        return [_rendered_or_fault(tokenizer, turns) for turns in conversations]


def _rendered_or_fault(tokenizer: Tokenizer, turns: list[dict[str, str]]) -> tuple[str, str] | UserInputError:
    try:
        (texts,) = _render_all(tokenizer, [turns])
    except UserInputError as exc:
        return exc
    return texts


def _render_all(tokenizer: Tokenizer, conversations: Sequence[list[dict[str, str]]]) -> list[tuple[str, str]]:
    prompts = _render(tokenizer, [turns[:-1] for turns in conversations], add_generation_prompt=True)
    wholes = _render(tokenizer, conversations, add_generation_prompt=False)
    return [
        (_with_system_turn(tokenizer, prompt, turns), _rest(tokenizer, prompt, whole, turns[-1]["content"]))
        for prompt, whole, turns in zip(prompts, wholes, conversations, strict=True)
    ]


def _with_system_turn(tokenizer: Tokenizer, prompt: str, turns: Sequence[dict[str, str]]) -> str:
    """The prompt. Raises DataError where the template has left a system turn out of it without a word."""
    first = turns[0]
    if first["role"] == "system" and special_tokens(tokenizer).veil(first["content"]).strip() not in prompt:
        raise DataError("the chat template has no system turn")
    return prompt


def _rest(tokenizer: Tokenizer, prompt: str, whole: str, completion: str) -> str:
    """What of the training text `whole` stands behind the prompt, up to and with the end of turn."""
    opened = prompt.endswith(THINK_LINE)
    if opened and not completion.startswith(THINK_LINE):
        raise DataError(f"begins with {completion[:20]!r}, not with {THINK_LINE!r}, which the prompt ends with")
    if not whole.startswith(prompt):
        raise CheckpointError(
            f"the training text does not begin with the inference prompt {prompt[-40:]!r}", where="chat template"
        )
    answer = special_tokens(tokenizer).veil(completion.removeprefix(THINK_LINE) if opened else completion)
    rest = whole[len(prompt) :]
    if not rest.startswith(answer):
        raise CheckpointError(f"rewrites the completion: {answer[:40]!r} became {rest[:40]!r}", where="chat template")
    if not rest[len(answer) :].startswith(str(tokenizer.eos_token)):
        raise CheckpointError(
            f"ends a turn with {rest[len(answer) :][:20]!r}, not with the EOS token {tokenizer.eos_token!r}",
            where="chat template",
        )
    return answer + str(tokenizer.eos_token)


def _turns(question: str, completion: str, history: Sequence[Message]) -> list[dict[str, str]]:
    spoken = [("user", question), ("assistant", completion)]
    return [
        {"role": role, "content": text} for role, text in (*((turn.role, turn.content) for turn in history), *spoken)
    ]


def _render(
    tokenizer: Tokenizer, conversations: Sequence[list[dict[str, str]]], *, add_generation_prompt: bool
) -> list[str]:
    """The conversations as the template writes them. Raises DataError where it refuses one (some do a system turn)."""
    veiled = special_tokens(tokenizer).veil_within(conversations)
    try:
        return chat_templates.render_all(tokenizer, veiled, add_generation_prompt=add_generation_prompt)
    except TemplateRefusal as exc:
        raise DataError(f"the chat template refuses it ({exc})") from exc


def write_tokens(
    examples_path: Path, tokenizer: Tokenizer, sft: SFTConfig, out_path: Path, progress: Progress
) -> TokenCounts:
    """Tokenise all examples into one Arrow stream (memory-mapped by the trainer) and count what is wrong with them.

    Nothing is cut, and nothing dropped but what `sft.too_long` says: the counts say whether the file may be trained on.
    """
    counts = TokenCounts()
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(out_path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        total = count_rows(examples_path)
        with progress.task("tokenise", total, unit="examples") as task:
            for examples in read_examples(examples_path):
                learned = [one for example in examples for one in learned_turns(example, sft.train_on)]
                writer.write_batch(_tokenise(learned, tokenizer, sft, counts))
                task.advance(len(examples))
    return counts


def _tokenise(examples: Sequence[Example], tokenizer: Tokenizer, sft: SFTConfig, counts: TokenCounts) -> pa.RecordBatch:
    specials = special_tokens(tokenizer)
    texts = []
    for example, rendered in zip(examples, _render_each(tokenizer, examples), strict=True):
        if isinstance(rendered, UserInputError):
            # The template gave back the preflight's own text: what it does not give back has a fault of its own.
            counts.unfitting.add(example, str(rendered))
            continue
        if sft.special_tokens_in_text == "refuse":
            _refuse_special_tokens(example, specials, counts)
        texts.append((example, *rendered))
    prompts = _encode([prompt for _, prompt, _ in texts], tokenizer, specials)
    answers = _encode([answer for _, _, answer in texts], tokenizer, specials)
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    kept = []
    for text, prompt_ids, answer_ids in zip(texts, prompts, answers, strict=True):
        if _count(text[0], prompt_ids, answer_ids, tokenizer, sft, counts):
            kept.append(text)
            rows["input_ids"].append(prompt_ids + answer_ids)
            rows["labels"].append([IGNORED] * len(prompt_ids) + answer_ids)
            rows["length"].append(len(prompt_ids) + len(answer_ids))
    decoded = tokenizer.batch_decode(rows["input_ids"], clean_up_tokenization_spaces=False) if kept else ()
    for (example, prompt, answer), back in zip(kept, decoded, strict=True):
        if normalize("NFC", back) != normalize("NFC", specials.unveil(prompt + answer)):
            counts.unknown.add(example, "its tokens do not read as its text")
    return pa.RecordBatch.from_pydict(rows, schema=SCHEMA)


def _refuse_special_tokens(example: Example, specials: SpecialTokens, counts: TokenCounts) -> None:
    for text in (*(turn.content for turn in example.history), example.question, example.completion):
        if (name := specials.first_in(text)) is not None:
            counts.special.add(example, f"it spells out {name!r}")
            return


def _encode(texts: list[str], tokenizer: Tokenizer, specials: SpecialTokens) -> list[list[int]]:
    """Token ids of rendered texts; those without a stand-in, which are nearly all, in one call."""
    veiled = {number for number, text in enumerate(texts) if specials.is_veiled(text)}
    plain = [text for number, text in enumerate(texts) if number not in veiled]
    encoded = iter(tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else ())
    return [specials.encode(text) if number in veiled else next(encoded) for number, text in enumerate(texts)]


def _count(
    example: Example, prompt: list[int], answer: list[int], tokenizer: Tokenizer, sft: SFTConfig, counts: TokenCounts
) -> bool:
    """Count one example and its faults; False where it is dropped."""
    length = len(prompt) + len(answer)
    if answer[-1] != tokenizer.eos_token_id:
        raise CheckpointError(
            f"the last label is token {answer[-1]}, not the end of turn {tokenizer.eos_token_id}", where="tokenizer"
        )
    if length > sft.max_length:
        counts.too_long.add(example, f"{length} tokens", length)
        if sft.too_long == "drop":
            return False
    counts.num_examples += 1
    counts.num_tokens += length
    counts.num_completion_tokens += len(answer)
    counts.longest = max(counts.longest, length)
    if not example.question.strip() or not example.completion.strip():
        counts.empty.add(example, "an empty question or completion")
    if answer.count(tokenizer.eos_token_id) > 1:
        counts.special.add(example, f"it ends its turn twice, by {tokenizer.eos_token!r} within the completion")
    return True
