"""Pre-training text of the pico bases: what a small model may know before anybody teaches it to reason.

Four kinds of document, none of them a question with its worked solution:
- elementary facts, a few lines of single steps;
- free-standing step sequences, without the question they could belong to;
- reading exercises: a question's items copied out, nothing worked out;
- questions with bare answers, in the chat format (training side of the split only).
"""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from pydantic import Field
from tokenizers import Tokenizer

from distill.packing import Document, Rows, concatenate, pack_rows
from distill.problems.practice import elementary_facts, mixed_steps, reading_exercise, step_sequence
from distill.problems.stream import pico_families, stream
from distill.problems.worked import worked_steps
from distill.recipe import Config
from distill.records import Problem
from distill.tokenizer import train_tokenizer

END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, PAD)
# transformers gives every qwen2 folder Qwen's own pre-tokenizer, which would split the operators: as added tokens they
# are found before it, so that all readers of the folder see the same ids.
PLAIN_TOKENS = ("<think>", "</think>", " + ", " - ", " * ", " / ", " = ")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

FACT_LINES = 8


class CorpusConfig(Config):
    """Shares are of documents; what is left over are bare answers."""

    num_documents: int = Field(ge=1)
    elementary_share: float = Field(0.15, ge=0, le=1)
    mixed_steps_share: float = Field(0.15, ge=0, le=1)
    sequence_share: float = Field(0.35, ge=0, le=1)
    reading_share: float = Field(0.2, ge=0, le=1)
    row_length: int = Field(256, ge=16)

    @property
    def bare_answer_share(self) -> float:
        return 1 - self.elementary_share - self.mixed_steps_share - self.sequence_share - self.reading_share


def bare_answer(problem: Problem) -> str:
    return (
        f"{IM_START}user\n{problem.prompt}{IM_END}\n"
        f"{IM_START}assistant\n\\boxed{{{problem.answer}}}{IM_END}\n{END_OF_TEXT}"
    )


def make_tokenizer(*, vocab_size: int, seed: int, per_family: int = 400) -> Tokenizer:
    texts = [text for problem in _draw(seed, per_family) for text in (bare_answer(problem), *worked_steps(problem))]
    return train_tokenizer(texts, vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, plain_tokens=PLAIN_TOKENS)


def build_corpus(tokenizer: Tokenizer, config: CorpusConfig, *, seed: int, num_workers: int) -> Rows:
    per_chunk = 200
    num_chunks = max(1, config.num_documents // (per_chunk * len(pico_families())))
    work = partial(_chunk, tokenizer.to_str(), per_chunk, config)
    seeds = [seed * 1_000_003 + 104_729 * (index + 1) for index in range(num_chunks)]
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        return concatenate(list(pool.map(work, seeds, chunksize=4)), seed=seed)


def _draw(seed: int, per_family: int) -> list[Problem]:
    return [
        problem
        for family, parameters in pico_families().items()
        for problem in itertools.islice(stream(family, parameters, seed=seed % 2**31, split="train"), per_family)
    ]


def _chunk(tokenizer_json: str, per_family: int, config: CorpusConfig, seed: int) -> Rows:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rng = random.Random(f"base {seed}")
    problems = _draw(seed, per_family)
    texts = []
    for problem in problems:
        kind = rng.random() - config.elementary_share
        if kind < 0:
            texts.append(elementary_facts(rng, FACT_LINES) + END_OF_TEXT)
        elif (kind := kind - config.mixed_steps_share) < 0:
            texts.append(mixed_steps(problems, rng, FACT_LINES) + END_OF_TEXT)
        elif (kind := kind - config.sequence_share) < 0:
            texts.append(step_sequence(problem, rng) + END_OF_TEXT)
        elif (kind := kind - config.reading_share) < 0:
            texts.append(reading_exercise(problem, rng) + END_OF_TEXT)
        else:
            texts.append(bare_answer(problem))
    documents = [Document(encoded.ids) for encoded in tokenizer.encode_batch(texts)]
    return pack_rows(documents, row_length=config.row_length, pad_id=tokenizer.token_to_id(PAD))
