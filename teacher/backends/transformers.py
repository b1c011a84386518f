"""The transformers backend: a student's folder through transformers' own `generate`, a peer to hold the engine against.

Requests go batch by batch, as they come, left-padded. A batch draws all its noise from one stream, seeded by the seeds
of its requests: the same requests in the same order and batch size give the same samples, those of one question differ,
and greedy answers are the engine's. What it does not promise is the independence of a sample from its batch: with
another batch size, or beside other requests, a request gets another sample of the same distribution. FP32 on a CPU,
BF16 on a GPU. No budget of thinking and no logprobs.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from distill.errors import CheckpointError
from distill.reasoning import THINK_LINE
from distill.recipe import Instruction
from distill.records import Completion, Sampling, TeacherIdentity, TraceRequest, content_id
from distill.weights import folder_identity
from teacher.backends.tokenizer import check_instruction, encode_prompt, end_tokens, load_tokenizer, render_question
from teacher.models.load import check_weights, read_facts


def open_transformers(folder: Path, *, batch_size: int, instruction: Instruction) -> TransformersBackend:
    """Open a student's or base's folder.

    Raises CheckpointError (one line) for anything wrong in it, RecipeError for a system prompt that its chat template
    has no place for.
    """
    facts = read_facts(folder)
    tokenizer = load_tokenizer(folder, facts, of_base=True)
    check_instruction(tokenizer, instruction, folder)
    ends = end_tokens(folder, tokenizer, facts)
    # transformers fills what is missing with random numbers, follows an index out of its folder and reads NaN.
    check_weights(folder)
    on_gpu = torch.cuda.is_available()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as exc:
        reason = str(exc).strip().splitlines()
        raise CheckpointError(reason[0] if reason else type(exc).__name__, where=folder) from exc
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    model = model.to("cuda" if on_gpu else "cpu").eval()
    return TransformersBackend(folder, model, tokenizer, ends, batch_size=batch_size, instruction=instruction)


class _TokenCounter(StoppingCriteria):
    """Counts what is written, step by step; it stops nothing."""

    def __init__(self) -> None:
        self.num_tokens, self.started = 0, time.monotonic()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.num_tokens += len(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def facts(self) -> dict[str, str | float]:
        rate = self.num_tokens / max(time.monotonic() - self.started, 1e-9)
        return {"tokens": self.num_tokens, "tokens_per_s": round(rate, 1)}


class TransformersBackend:
    """A `Teacher` over one transformers decoder."""

    def __init__(
        self,
        folder: Path,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        *,
        batch_size: int,
        instruction: Instruction,
    ) -> None:
        self.folder, self.tokenizer, self.batch_size = folder, tokenizer, batch_size
        self._instruction = instruction
        self._model, self._ends = model, sorted(ends)
        self._context: int = model.config.max_position_embeddings
        # `generate` lays its arguments over the folder's own, where a base may have a penalty or a top-k.
        model.generation_config = GenerationConfig()
        self._counter = _TokenCounter()

    @cached_property
    def identity(self) -> TeacherIdentity:
        version = importlib.metadata.version("transformers")
        identity = folder_identity(self.folder, backend="transformers", backend_version=version)
        return identity.asked_with(self._instruction.words)

    def facts(self) -> dict[str, str | float]:
        """Tokens written by the call of `generate` that is under way, rows that have ended and are padded included."""
        return self._counter.facts()

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions batch by batch. A prompt that fills the model's context ends at once, by length."""
        self._counter = _TokenCounter()
        problems = [request.problem for request in requests]
        prompts = [render_question(self.tokenizer, one.prompt, self._instruction.around(one)) for one in problems]
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        openings = [THINK_LINE if prompt.endswith(THINK_LINE) else "" for prompt in prompts]
        fitting = [number for number, prompt_ids in enumerate(ids) if len(prompt_ids) < self._context]
        for number in set(range(len(requests))) - set(fitting):
            yield self._completion(requests[number], openings[number], ids[number], [])
        for start in range(0, len(fitting), self.batch_size):
            batch = fitting[start : start + self.batch_size]
            seeds = [requests[number].seed(sampling) for number in batch]
            written = self._written([ids[number] for number in batch], seeds, sampling)
            for number, tokens in zip(batch, written, strict=True):
                yield self._completion(requests[number], openings[number], ids[number], tokens)

    def close(self) -> None:
        self._model = None

    def _written(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> Iterator[list[int]]:
        """Tokens of each answer, with the one that ended it."""
        device, width = self._model.device, max(map(len, prompts))
        padded = [[self._ends[0]] * (width - len(prompt)) + prompt for prompt in prompts]
        seen = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        drawn = {"do_sample": False}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        settings = GenerationConfig(
            max_new_tokens=min(sampling.max_tokens, self._context - min(map(len, prompts))),
            eos_token_id=self._ends,
            pad_token_id=self._ends[0],
            **drawn,
        )
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(int(content_id([*seeds], digits=15), 16))
            answers = self._model.generate(
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(seen, device=device),
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([self._counter]),
            )
        for prompt, answer in zip(prompts, answers[:, width:].tolist(), strict=True):
            # Beside shorter prompts, a row is carried on beyond its own context.
            room = min(sampling.max_tokens, self._context - len(prompt))
            length = next((place + 1 for place, token in enumerate(answer) if token in self._ends), len(answer))
            yield answer[: min(length, room)]

    def _completion(self, request: TraceRequest, opening: str, prompt_ids: list[int], tokens: list[int]) -> Completion:
        finished = bool(tokens) and tokens[-1] in self._ends
        kept = tokens[:-1] if finished else tokens
        text = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Completion(
            request=request,
            text=opening + text,
            finish_reason="stop" if finished else "length",
            num_prompt_tokens=len(prompt_ids),
            num_tokens=len(tokens),
        )
