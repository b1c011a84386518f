"""A student's or base's folder behind a server, to be scored: its prompts are made here and asked as token ids.

So a prompt is the native backend's, token for token, whatever the server would make of a conversation: bases without a
chat template are asked as they are there, and what a question spells out of special tokens stays text. The server is a
vLLM of ours, which starts with the first sample that the ledger lacks, or an endpoint that somebody else has started.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from distill.errors import CheckpointError, EnvironmentFault
from distill.model_folder import check_model_folder, read_config_json
from distill.progress import Progress
from distill.protocols import Likelihood, PlainAnswer, PlainPrompt, ScoredText
from distill.reasoning import THINK_LINE
from distill.recipe import EndpointEngine, Instruction, OpenAITeacher, ServedEngine, VllmEngine, VllmTeacher
from distill.records import Completion, Sampling, TeacherIdentity, TraceRequest
from distill.weights import folder_identity
from teacher.backends.openai import OpenAICompatibleTeacher
from teacher.backends.openai.answers import Answer
from teacher.backends.tokenizer import check_instruction, encode_prompt, end_tokens, load_tokenizer, render_question
from teacher.backends.vllm.backend import open_vllm
from teacher.backends.vocabulary import FolderVocabulary
from teacher.models.load import read_facts


class Server(Protocol):
    """Who answers requests to `/completions`."""

    @property
    def identity(self) -> TeacherIdentity: ...

    def complete(self, payloads: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Answer]]: ...

    def facts(self) -> dict[str, str | float]: ...

    def close(self) -> None: ...


def open_served_student(
    folder: Path,
    engine: ServedEngine,
    *,
    name: str,
    instruction: Instruction,
    log_dir: Path,
    progress: Progress | None = None,
) -> ServedStudent:
    """`name` is the model's in its run, by which an endpoint may serve it.

    Raises CheckpointError for anything wrong in the folder, EnvironmentFault for a vLLM that is missing or an endpoint
    that does not answer, RecipeError for one that does not serve the model.
    """
    check_model_folder(folder)
    shared = {
        field: getattr(engine, field) for field in type(engine).model_fields if field not in ("served", "backend")
    }
    if isinstance(engine, VllmEngine):
        config = VllmTeacher.model_validate({**shared, "model": str(folder.resolve())})
        server: Server = open_vllm(config, base_dir=folder, log_dir=log_dir, progress=progress)
        return ServedStudent(folder, server, engine, instruction)
    endpoint = OpenAITeacher.model_validate({**shared, "model": engine.served.get(name, name)})
    return ServedStudent(folder, OpenAICompatibleTeacher(endpoint), engine, instruction)


class ServedStudent:
    """A `Teacher` and a `TokenModel`."""

    def __init__(self, folder: Path, server: Server, engine: ServedEngine, instruction: Instruction) -> None:
        facts = read_facts(folder)
        self.folder = folder
        self.tokenizer = load_tokenizer(folder, facts, of_base=True)
        check_instruction(self.tokenizer, instruction, folder)
        self._server, self._engine, self._instruction = server, engine, instruction
        self._ends = sorted(end_tokens(folder, self.tokenizer, facts))
        self._limit = engine.flags.get("max-model-len") if isinstance(engine, VllmEngine) else None
        self._context = _context(folder, self._limit)

    @cached_property
    def identity(self) -> TeacherIdentity:
        """The folder's, as the native backend has it, and the engine's name and version."""
        served = self._server.identity
        if isinstance(self._engine, EndpointEngine):
            version = served.backend_version
            served = folder_identity(self.folder, backend=served.backend, backend_version=version).asked_with(
                [self._engine.extra_body] if self._engine.extra_body else []
            )
        # Where the server is given fewer positions, answers end by length that went on elsewhere.
        limited = [{"max_model_len": self._limit}] if self._limit is not None else []
        return served.asked_with([*self._instruction.words, *limited])

    @cached_property
    def vocabulary(self) -> FolderVocabulary:
        return FolderVocabulary(self.tokenizer, self.folder)

    @property
    def num_positions(self) -> int:
        """Two fewer than the model has: a server reads the token that is scored last, and wants to write one more."""
        return self._context - 2

    def facts(self) -> dict[str, str | float]:
        return self._server.facts()

    def close(self) -> None:
        self._server.close()

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions as they finish. A prompt that fills the model's context ends at once, by length."""
        asked, payloads = [], []
        for request in requests:
            problem = request.problem
            prompt = render_question(self.tokenizer, problem.prompt, self._instruction.around(problem))
            opening, ids = THINK_LINE if prompt.endswith(THINK_LINE) else "", encode_prompt(self.tokenizer, prompt)
            if len(ids) >= self._context:
                counts = {"num_prompt_tokens": len(ids), "num_tokens": 0}
                yield Completion(request=request, text=opening, finish_reason="length", **counts)
                continue
            asked.append((request, opening, len(ids)))
            payloads.append(self._payload(ids, sampling, request.seed(sampling), with_special_tokens=True))
        with contextlib.closing(self._server.complete(payloads)) as answers:  # type: ignore[type-var]
            for number, answer in answers:
                request, opening, num_prompt_tokens = asked[number]
                assert answer.finish_reason is not None  # `Answer.finish` has seen to it
                yield Completion(
                    request=request,
                    text=opening + answer.content.encode("utf-8", "replace").decode(),
                    finish_reason=answer.finish_reason,
                    num_prompt_tokens=num_prompt_tokens,
                    num_tokens=answer.num_tokens,
                )

    def continuations(self, wanted: Sequence[PlainPrompt]) -> Iterator[tuple[int, PlainAnswer]]:
        payloads = []
        for prompt in wanted:
            payload = self._payload(list(prompt.prompt_ids), prompt.sampling, prompt.seed, with_special_tokens=False)
            payloads.append(payload | dict(prompt.shaping) | ({"stop": list(prompt.stop)} if prompt.stop else {}))
        with contextlib.closing(self._server.complete(payloads)) as answers:  # type: ignore[type-var]
            for number, answer in answers:
                assert answer.finish_reason is not None
                counts = len(wanted[number].prompt_ids), answer.num_tokens
                yield number, PlainAnswer(self._without_special(answer.content), answer.finish_reason, *counts)

    def _without_special(self, text: str) -> str:
        """An endpoint may spell special tokens out."""
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text.encode("utf-8", "replace").decode()

    def likelihoods(self, wanted: Sequence[ScoredText]) -> Iterator[tuple[int, Likelihood]]:
        """By `echo`: the logprobs of the prompt's own tokens."""
        asked = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "return_tokens_as_token_ids": True}
        payloads = [{"prompt": [*text.context_ids, *text.continuation_ids], **asked} for text in wanted]
        with contextlib.closing(self._server.complete(payloads)) as answers:  # type: ignore[type-var]
            for number, answer in answers:
                yield number, self._likelihood(wanted[number], answer)

    def _likelihood(self, text: ScoredText, answer: Answer) -> Likelihood:
        first, end = len(text.context_ids), len(text.context_ids) + len(text.continuation_ids)
        kept = answer.logprobs
        if kept is None or len(kept.sampled) < end:
            message = "tells no logprobs of a prompt (`echo` of /completions), which lm-eval's tasks need"
            raise EnvironmentFault(message, where=self.identity.name)
        own = [float(value or 0.0) for _, value in kept.sampled[first:end]]
        likeliest = [top[0][1] if top else 0.0 for top in kept.top[first:end]]
        return Likelihood(sum(own), all(value >= best for value, best in zip(own, likeliest, strict=True)))

    def _payload(
        self, prompt_ids: list[int], sampling: Sampling, seed: int, *, with_special_tokens: bool
    ) -> dict[str, Any]:
        """A request. What OpenAI's API has no word for goes to our vLLM alone; other servers have their own ends."""
        payload: dict[str, Any] = {
            "prompt": prompt_ids,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": min(sampling.max_tokens, self._context - len(prompt_ids)),
            "seed": seed,
        }
        if self._engine.stream:
            payload |= {"stream": True, "stream_options": {"include_usage": True}}
        if isinstance(self._engine, VllmEngine):
            payload |= {"stop_token_ids": self._ends, "skip_special_tokens": not with_special_tokens}
        return payload


def _context(folder: Path, limit: object) -> int:
    """Tokens of prompt and answer together: the model's positions, or fewer where the server is given fewer."""
    context = read_config_json(folder).get("max_position_embeddings")
    if not isinstance(context, int) or isinstance(context, bool) or context < 4:
        message = f"must be a number of positions, got {context!r}"
        raise CheckpointError(message, where=folder / "config.json", field="max_position_embeddings")
    return min(context, limit) if isinstance(limit, int) else context
