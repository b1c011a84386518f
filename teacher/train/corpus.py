"""Training text for the pico teacher: questions with worked solutions, and elementary facts to practise on.

Problems come from the training side of the split only. Loss is taken on what the teacher shall write (the reasoning,
the answer and the end token), not on the question; on facts it is taken throughout.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from tokenizers import Tokenizer

from distill.packing import Document, Rows, concatenate, pack_rows
from distill.problems.practice import elementary_facts, mixed_steps
from distill.problems.stream import pico_families, stream
from distill.problems.worked import worked_solution
from distill.records import Problem
from distill.tokenizer import train_tokenizer

PAD, BOS, EOS, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, USER, ASSISTANT)
PLAIN_TOKENS = ("<think>", "</think>")

CHAT_TEMPLATE = (
    "{{- '<|bos|>' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '<|user|>' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' + message['content'] + '<|eos|>' -}}"
    "{%- else -%}{{- message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|><think>\\n' -}}{%- endif -%}"
)

FACT_LINES = 12


def make_tokenizer(*, vocab_size: int, seed: int, per_family: int = 400) -> Tokenizer:
    """A tokenizer trained on a sample of the teacher's own text."""
    texts = [text for problem in _draw(seed, per_family) for text in (problem.prompt, worked_solution(problem))]
    return train_tokenizer(texts, vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, plain_tokens=PLAIN_TOKENS)


def build_corpus(
    tokenizer: Tokenizer, *, num_problems: int, facts_share: float, row_length: int, seed: int, num_workers: int
) -> Rows:
    """`num_problems` worked problems in equal parts per family, and facts as `facts_share` of all documents."""
    per_chunk = 200
    num_chunks = max(1, num_problems // (per_chunk * len(pico_families())))
    work = partial(_chunk, tokenizer.to_str(), per_chunk, facts_share, row_length)
    seeds = [seed * 1_000_003 + 7919 * index for index in range(num_chunks)]
    num_workers = min(num_workers, num_chunks)
    if num_workers == 1:  # a process of its own would import torch for nothing
        return concatenate([work(chunk_seed) for chunk_seed in seeds], seed=seed)
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        return concatenate(list(pool.map(work, seeds, chunksize=4)), seed=seed)


def _draw(seed: int, per_family: int) -> Iterator[Problem]:
    for family, parameters in pico_families().items():
        yield from itertools.islice(stream(family, parameters, seed=seed % 2**31, split="train"), per_family)


def _chunk(tokenizer_json: str, per_family: int, facts_share: float, row_length: int, seed: int) -> Rows:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rng = random.Random(json.dumps(["teacher", seed]))
    problems = list(_draw(seed, per_family))
    prompts = tokenizer.encode_batch([f"{BOS}{USER}{p.prompt}{ASSISTANT}" for p in problems])
    answers = tokenizer.encode_batch([worked_solution(p) + EOS for p in problems])
    documents = [
        Document(prompt.ids + answer.ids, len(prompt.ids)) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    num_facts = round(len(documents) * facts_share / (1 - facts_share))
    facts = [
        elementary_facts(rng, FACT_LINES) if rng.random() < 0.6 else mixed_steps(problems, rng, FACT_LINES)
        for _ in range(num_facts)
    ]
    encoded = tokenizer.encode_batch([BOS + text + EOS for text in facts])
    documents += [Document(text.ids[:row_length], 1) for text in encoded]
    rng.shuffle(documents)
    return pack_rows(documents, row_length=row_length, pad_id=tokenizer.token_to_id(PAD))
