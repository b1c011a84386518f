"""Training text to tokens: prompt and completion of every example, exactly as the shipped checkpoint will see them.

The prompt is what `apply_chat_template(add_generation_prompt=True)` gives at inference; the completion is what the same
template puts after it, up to and with the end-of-turn token. The two are tokenised apart, as they are at inference,
where the model continues a finished prompt: so the inference prompt is always a prefix of the training tokens. Labels
are made here, -100 over the prompt, and not by the trainer: nothing later can mask the end of turn or cut an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase as Tokenizer

from distill import chat_templates
from distill.errors import CheckpointError, DataError
from distill.progress import Progress
from distill.reasoning import THINK_LINE
from distill.records import Example

IGNORED = -100
CHUNK = 1024
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "length": pa.int32()})


@dataclass
class Fault:
    """Number of examples that have a fault, and the first of them."""

    count: int = 0
    first: str = ""

    def add(self, example: Example, detail: str) -> None:
        self.count += 1
        self.first = self.first or f"problem {example.problem_id} of {example.source}: {detail}"


@dataclass
class TokenCounts:
    """Findings of tokenising. Tokens are counted once an example, padding excluded."""

    num_examples: int = 0
    num_tokens: int = 0
    num_completion_tokens: int = 0
    longest: int = 0
    too_long: Fault = field(default_factory=Fault)
    empty: Fault = field(default_factory=Fault)
    unknown: Fault = field(default_factory=Fault)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> TokenCounts:
        """Back from `dataclasses.asdict`, as one process writes it for the others."""
        return cls(**{name: Fault(**value) if isinstance(value, dict) else value for name, value in tree.items()})


def read_examples(path: Path) -> Iterator[list[Example]]:
    """Chunks of the examples of a Parquet file. Raises DataError."""
    try:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(CHUNK, columns=list(Example.model_fields)):
            yield [Example.model_validate(row) for row in batch.to_pylist()]
    except FileNotFoundError as exc:
        raise DataError("no such file of examples", where=path) from exc
    except ValidationError as exc:
        fault = exc.errors()[0]
        raise DataError(f"{fault['msg']}", where=path, field=".".join(str(part) for part in fault["loc"])) from exc
    except (pa.ArrowException, OSError) as exc:
        raise DataError(f"not a readable Parquet file of examples ({exc})", where=path) from exc


def render_prompt(tokenizer: Tokenizer, question: str) -> str:
    return chat_templates.render(tokenizer, _turns(question))


def render(tokenizer: Tokenizer, question: str, completion: str) -> tuple[str, str]:
    """Prompt and completion as the template writes them; the completion ends with the end-of-turn token.

    Raises CheckpointError where the template does not give back what it was given: reasoning deleted or wrapped anew,
    or another token than EOS at the end of the turn.
    """
    (texts,) = render_all(tokenizer, [(question, completion)])
    return texts


def render_all(tokenizer: Tokenizer, examples: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same for many pairs of question and completion."""
    prompts = chat_templates.render_all(tokenizer, (_turns(question) for question, _ in examples))
    wholes = chat_templates.render_all(tokenizer, (_turns(*pair) for pair in examples), add_generation_prompt=False)
    return [
        (prompt, _rest(tokenizer, prompt, whole, completion))
        for prompt, whole, (_, completion) in zip(prompts, wholes, examples, strict=True)
    ]


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]


def _rest(tokenizer: Tokenizer, prompt: str, whole: str, completion: str) -> str:
    """What of the training text `whole` stands behind the prompt, up to and with the end of turn."""
    if not whole.startswith(prompt):
        raise CheckpointError(
            f"the training text does not begin with the inference prompt {prompt[-40:]!r}", where="chat template"
        )
    answer = completion.removeprefix(THINK_LINE) if prompt.endswith(THINK_LINE) else completion
    rest = whole[len(prompt) :]
    if not rest.startswith(answer):
        raise CheckpointError(f"rewrites the completion: {answer[:40]!r} became {rest[:40]!r}", where="chat template")
    if not rest[len(answer) :].startswith(str(tokenizer.eos_token)):
        raise CheckpointError(
            f"ends a turn with {rest[len(answer) :][:20]!r}, not with the EOS token {tokenizer.eos_token!r}",
            where="chat template",
        )
    return answer + str(tokenizer.eos_token)


def write_tokens(
    examples_path: Path, tokenizer: Tokenizer, max_length: int, out_path: Path, progress: Progress
) -> TokenCounts:
    """Tokenise all examples into one Arrow stream (memory-mapped by the trainer) and count what is wrong with them.

    Nothing is cut and nothing dropped: the counts say whether the file may be trained on.
    """
    counts = TokenCounts()
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(out_path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        total = _num_rows(examples_path)
        with progress.task("tokenise", total, unit="examples") as task:
            for examples in read_examples(examples_path):
                writer.write_batch(_tokenise(examples, tokenizer, max_length, counts))
                task.advance(len(examples))
    return counts


def _num_rows(path: Path) -> int:
    try:
        return pq.read_metadata(path).num_rows if path.is_file() else 0
    except (pa.ArrowException, OSError) as exc:
        raise DataError(f"not a readable Parquet file of examples ({exc})", where=path) from exc


def _tokenise(examples: list[Example], tokenizer: Tokenizer, max_length: int, counts: TokenCounts) -> pa.RecordBatch:
    texts = render_all(tokenizer, [(example.question, example.completion) for example in examples])
    prompts = tokenizer([prompt for prompt, _ in texts], add_special_tokens=False)["input_ids"]
    answers = tokenizer([answer for _, answer in texts], add_special_tokens=False)["input_ids"]
    for example, prompt, answer in zip(examples, prompts, answers, strict=True):
        _count(example, prompt, answer, tokenizer, max_length, counts)
    ids = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    decoded = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    for example, (prompt, answer), back in zip(examples, texts, decoded, strict=True):
        if normalize("NFC", back) != normalize("NFC", prompt + answer):
            counts.unknown.add(example, "its tokens do not read as its text")
    labels = [[IGNORED] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
    return pa.RecordBatch.from_pydict(
        {"input_ids": ids, "labels": labels, "length": [len(row) for row in ids]}, schema=SCHEMA
    )


def _count(
    example: Example, prompt: list[int], answer: list[int], tokenizer: Tokenizer, max_length: int, counts: TokenCounts
) -> None:
    length = len(prompt) + len(answer)
    counts.num_examples += 1
    counts.num_tokens += length
    counts.num_completion_tokens += len(answer)
    counts.longest = max(counts.longest, length)
    if length > max_length:
        counts.too_long.add(example, f"{length} tokens")
    if not example.question.strip() or not example.completion.strip():
        counts.empty.add(example, "an empty question or completion")
    if answer[-1] != tokenizer.eos_token_id:
        raise CheckpointError(
            f"the last label is token {answer[-1]}, not the end of turn {tokenizer.eos_token_id}", where="tokenizer"
        )
