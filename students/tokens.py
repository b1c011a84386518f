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
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from distill.errors import CheckpointError, DataError, UserInputError
from distill.progress import Progress
from distill.reasoning import THINK_LINE
from distill.recipe import SFTConfig
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


def render_prompt(tokenizer: Tokenizer, question: str, history: Sequence[Message] = ()) -> str:
    turns = [*_plain(history), {"role": "user", "content": question}]
    return _render(tokenizer, turns, add_generation_prompt=True)


def render(tokenizer: Tokenizer, question: str, completion: str, history: Sequence[Message] = ()) -> tuple[str, str]:
    """Prompt and completion as the template writes them; the completion ends with the end-of-turn token.

    Special tokens that the texts spell out are veiled (`distill.special_tokens`). Raises CheckpointError where the
    template does not give back what it was given: reasoning deleted or wrapped anew, or another token than EOS at the
    end of the turn; DataError for a completion that does not go on from the reasoning which the prompt opens.
    """
    prompt = render_prompt(tokenizer, question, history)
    opened = prompt.endswith(THINK_LINE)
    if opened and not completion.startswith(THINK_LINE):
        raise DataError(f"begins with {completion[:20]!r}, not with {THINK_LINE!r}, which the prompt ends with")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": completion}]
    whole = _render(tokenizer, [*_plain(history), *turns])
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
    return prompt, answer + str(tokenizer.eos_token)


def _plain(history: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in history]


def _render(tokenizer: Tokenizer, turns: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    """The turns as the template writes them. Raises DataError where it refuses them, as some do a system turn."""
    veiled = special_tokens(tokenizer).veil_within(turns)
    try:
        return str(tokenizer.apply_chat_template(veiled, add_generation_prompt=add_generation_prompt, tokenize=False))
    except TemplateError as exc:
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
    for example in examples:
        try:
            prompt, answer = render(tokenizer, example.question, example.completion, example.history)
        except UserInputError as exc:
            # The template gave back the preflight's own text: what it does not give back has a fault of its own.
            counts.unfitting.add(example, str(exc))
            continue
        if sft.special_tokens_in_text == "refuse":
            _refuse_special_tokens(example, specials, counts)
        texts.append((example, prompt, answer))
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
