"""The native backend: this project's engine in this process, on the GPU where there is one, or over ranks.

The prompt is the folder's own chat template with generation prompt. Where that opens the reasoning (`<think>` and a
line break), the completion's text gets it back in front, so that every trace begins alike whatever the backend; and
there `max_thinking_tokens` holds, all tokens before `</think>` counted.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from distill.errors import CheckpointError, DataError, PotstillError, UserInputError
from distill.logprobs import TokenLogprobs
from distill.reasoning import END_OF_THINKING, FORCED_END, THINK_LINE
from distill.records import Completion, Sampling, TeacherIdentity, TraceRequest
from distill.special_tokens import special_tokens
from distill.weights import folder_identity
from teacher.backends.native.fleet import Fleet
from teacher.backends.native.live import LiveEngine, LocalEngine, WorkerEngines, generate_in_workers
from teacher.backends.native.workers import EngineSettings
from teacher.backends.tokenizer import encode_prompt, end_tokens, load_tokenizer, render
from teacher.engine.detokenizer import decode_by
from teacher.engine.engine import Engine
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Sequence, ThinkingLimit
from teacher.engine.stopping import cut
from teacher.live import (
    REPETITION,
    GeneratedSample,
    GenerationRequest,
    OnDone,
    OnTokens,
    RequestOptions,
    StreamHandle,
)
from teacher.models.invariant.models import INVARIANT
from teacher.models.load import ModelFacts, check_weights, load_model, read_facts

# Part of every sample's key. Raise it when the same weights, request and seed would give another text; the second is
# that of other precisions than FP32, whose texts also change with the kernels' rounding.
ENGINE_VERSION, ROUNDED_ENGINE_VERSION = "2", "3"
# Models up to this size generate in one process a core, each with a copy of the weights (FP32: 0.4 GB).
_WORKER_PARAMETERS = 100_000_000


def open_native(
    folder: Path,
    *,
    batch_size: int,
    speculate: bool = False,
    batch_invariant: bool = False,
    as_student: bool = False,
    over_ranks: Callable[[EngineSettings], Fleet] | None = None,
) -> NativeBackend:
    """Load a checkpoint folder, of the teacher's architecture or of a student's (`teacher.models.load`).

    `as_student`: it is there to be scored, bases included. It needs no chat template, and a prompt that fills its
    positions is an answer that ended by length, no fault. `over_ranks` opens the engine elsewhere than here. Raises
    what that raises, CheckpointError for anything wrong with weights, config or tokenizer, and with `speculate` for a
    model that has no MTP layer; UserInputError for `batch_invariant` on a GPU.
    """
    facts, tokenizer, eos_token_ids = _read_folder(folder, speculate=speculate, as_student=as_student)
    if over_ranks is not None:
        spelled = tokenizer.backend_tokenizer.to_str()
        fleet = over_ranks(EngineSettings(folder, batch_size, frozenset(eos_token_ids), tokenizer=spelled))
        return NativeBackend(folder, tokenizer, fleet)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = device.type == "cpu" and facts.num_parameters <= _WORKER_PARAMETERS
    decode = decode_by(tokenizer.backend_tokenizer)
    model = load_model(folder, device, with_mtp=speculate, batch_invariant=batch_invariant)
    limits = {"batch_size": batch_size, "eos_token_ids": eos_token_ids}
    engine = Engine(model, **limits, speculate=speculate, decode=decode)
    max_workers = torch.get_num_threads() if small else 1
    return NativeBackend(folder, tokenizer, engine, max_workers=max_workers, as_student=as_student)


def check_native(folder: Path, *, speculate: bool = False, as_student: bool = False) -> None:
    """Raise CheckpointError for what `open_native` would find wrong in the folder. Reads every weight, keeps none."""
    _read_folder(folder, speculate=speculate, as_student=as_student)
    check_weights(folder)


def _read_folder(
    folder: Path, *, speculate: bool, as_student: bool
) -> tuple[ModelFacts, PreTrainedTokenizerBase, tuple[int, ...]]:
    """All but the weights: what config.json says, the tokenizer, the tokens that end an answer."""
    facts = read_facts(folder)
    if speculate and not facts.has_mtp:
        message = "speculation drafts with an MTP layer, and the model has none"
        raise CheckpointError(message, where=folder / "config.json", field="num_nextn_predict_layers")
    tokenizer = load_tokenizer(folder, facts, of_base=as_student)
    return facts, tokenizer, end_tokens(folder, tokenizer, facts)


class NativeBackend:
    """A `Teacher` over one engine."""

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine | Fleet,
        *,
        max_workers: int = 1,
        as_student: bool = False,
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.engine = engine
        # What outlives the engine: a part of the identity, and how the last texts end.
        self._precision, self._eos_token_ids = engine.precision, engine.eos_token_ids
        self.max_workers = max_workers
        self._as_student = as_student
        self._alive: LiveEngine | None = engine if isinstance(engine, Fleet) else None
        self._numbers = itertools.count()

    @cached_property
    def identity(self) -> TeacherIdentity:
        version = ENGINE_VERSION if self._precision == "float32" else f"{ROUNDED_ENGINE_VERSION}-{self._precision}"
        return folder_identity(self.folder, backend="native", backend_version=version)

    def generate(self, requests: Many[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield a completion a request, each as soon as it is finished. Raises DataError for a prompt too long."""
        prefixes: dict[int, str] = {}
        sequences = []
        for number, request in enumerate(requests):
            prefix, prompt_ids = self._prompt(request)
            if self._as_student and len(prompt_ids) >= self.engine.max_positions:
                counts = {"num_prompt_tokens": len(prompt_ids), "num_tokens": 0}
                yield Completion(request=request, text=prefix, finish_reason="length", **counts)
                continue
            prefixes[number] = prefix
            sequences.append(self._begin(number, request, sampling, prefix, prompt_ids))
        # Whoever abandons this iterator abandons the engine's, which Python 3.12 would not close.
        with contextlib.closing(self._finished(sequences)) as finished:
            for done in finished:
                if done.fault is not None:
                    problem = requests[done.key].problem
                    raise DataError(done.fault, where=problem.source, field=f"prompt {problem.prompt[:40]!r}")
                completion, _ = self._completion(requests[done.key], prefixes[done.key], done)
                yield completion

    def submit(
        self, request: GenerationRequest, sampling: Sampling, on_done: OnDone, on_tokens: OnTokens | None = None
    ) -> StreamHandle:
        """Begin one sample; it joins the batch that is running. `on_done` is called once, from another thread, and
        before it `on_tokens` with the tokens of each step.

        Raises DataError for a prompt too long, or with tokens that the model does not have, UserInputError for a bias
        of such tokens.
        """
        number = next(self._numbers)
        if request.is_continuation:
            prefix, sequence = "", self._continuation(number, request, sampling)
        else:
            prefix, prompt_ids = self._prompt(request.request)
            sequence = self._begin(number, request.request, sampling, prefix, prompt_ids)
        self._apply(request.options, sequence)
        sequence.streamed = on_tokens is not None

        def finished(outcome: Sequence[int] | PotstillError) -> None:
            if isinstance(outcome, PotstillError):
                on_done(outcome)
                return
            completion, stop_reason = self._completion(request.request, prefix, outcome)
            tokens = outcome.prompt_ids, outcome.generated_ids
            drafts = outcome.num_drafts, outcome.num_accepted
            on_done(GeneratedSample(completion, *tokens, prefix, stop_reason, *drafts))

        self._live.submit(sequence, finished, on_tokens)
        return StreamHandle(lambda: self._live.cancel(number), sequence.prompt_ids, prefix)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def spell(self, *token_ids: int) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @property
    def fault(self) -> PotstillError | None:
        """The reason why it should be given no more."""
        return None if self._alive is None else self._alive.fault

    def gauges(self) -> dict[str, float]:
        return self.engine.gauges if isinstance(self.engine, Fleet) else {}

    @property
    def _live(self) -> LiveEngine:
        if self._alive is None and self.max_workers < 2:
            self._alive = LocalEngine(self.engine)
        elif self._alive is None:
            tokenizer = self.tokenizer.backend_tokenizer.to_str()
            settings = replace(self._worker_engine, tokenizer=tokenizer)
            self._alive = WorkerEngines.started(settings, num_workers=self.max_workers)
        return self._alive

    def _prompt(self, request: TraceRequest) -> tuple[str, list[int]]:
        """Opening of the answer that the prompt has already written, and the prompt's tokens."""
        prompt = render(self.tokenizer, request.problem.prompt)
        return THINK_LINE if prompt.endswith(THINK_LINE) else "", encode_prompt(self.tokenizer, prompt)

    def _begin(
        self, number: int, request: TraceRequest, sampling: Sampling, prefix: str, prompt_ids: list[int]
    ) -> Sequence[int]:
        """The sequence that writes what follows `prefix`."""
        self._checked(prompt_ids, request)
        limit = self._thinking_limit(sampling) if prefix else None
        seed, draw = request.seed(sampling), _draw(sampling)
        return Sequence(number, prompt_ids, sampling.max_tokens, seed, draw, thinking=limit)

    def _continuation(self, number: int, wanted: GenerationRequest, sampling: Sampling) -> Sequence[int]:
        request, prompt_ids = wanted.request, list(wanted.prompt_ids)
        if not prompt_ids:
            prompt, written = render(self.tokenizer, request.problem.prompt), wanted.partial_answer
            if prompt.endswith(THINK_LINE):
                written = written.removeprefix(THINK_LINE)
            prompt_ids = encode_prompt(self.tokenizer, prompt + special_tokens(self.tokenizer).veil(written))
        self._checked(prompt_ids, request)
        return Sequence(number, prompt_ids, sampling.max_tokens, request.seed(sampling), _draw(sampling))

    def _checked(self, prompt_ids: list[int], request: TraceRequest) -> list[int]:
        where, field = request.problem.source, f"prompt {request.problem.prompt[:40]!r}"
        if len(prompt_ids) >= self.engine.max_positions:
            message = f"has {len(prompt_ids)} tokens; the model takes {self.engine.max_positions - 1}"
            raise DataError(message, where=where, field=field)
        if max(prompt_ids) >= len(self.tokenizer):
            message = f"has the token {max(prompt_ids)}; the model has {len(self.tokenizer)} tokens"
            raise DataError(message, where=where, field=field)
        return prompt_ids

    def _apply(self, options: RequestOptions, sequence: Sequence[int]) -> None:
        """Apply what HTTP can say beyond a Sampling."""
        if unknown := [token for token, _ in options.logit_bias if token >= len(self.tokenizer)]:
            message = f"there is no token {unknown[0]}; the model has {len(self.tokenizer)} tokens"
            raise UserInputError(message, field="logit_bias")
        drawn = {"top_k": options.top_k, "min_p": options.min_p, "logit_bias": options.logit_bias}
        sequence.sampling_params = replace(sequence.sampling_params, **drawn)
        sequence.stops, sequence.repetition = options.stop, options.repetition_detection

    def _completion(self, request: TraceRequest, prefix: str, done: Sequence[int]) -> tuple[Completion, str | None]:
        """Make the completion, and say what ended it, if that is neither its end token nor its length.

        A loop is no finished answer: its reason is "length", like that of any text that was not brought to its end.
        """
        ends = done.generated_ids[-1] in self._eos_token_ids
        written = done.generated_ids[:-1] if ends else done.generated_ids
        text, stopped = cut(self.spell(*written), done.stops)
        completion = Completion(
            request=request,
            text=prefix + text,
            finish_reason="stop" if done.finish_reason == "stop" else "length",
            num_prompt_tokens=len(done.prompt_ids),
            num_tokens=len(done.generated_ids),
            logprobs=_logprobs(done) if done.logprobs else None,
        )
        return completion, REPETITION if done.finish_reason == "repetition" else stopped

    def _thinking_limit(self, sampling: Sampling) -> ThinkingLimit | None:
        if sampling.max_thinking_tokens is None:
            return None
        end = self.encode(END_OF_THINKING)
        if len(end) != 1:
            message = f"max_thinking_tokens needs {END_OF_THINKING} as one token; here it is {len(end)}"
            raise CheckpointError(message, where=self.folder / "tokenizer.json")
        return ThinkingLimit(sampling.max_thinking_tokens, end[0], tuple(self.encode(FORCED_END)))

    def _finished(self, sequences: list[Sequence[int]]) -> Generator[Sequence[int], None, None]:
        # A worker for every full batch: fewer requests than that are not worth starting processes for.
        num_workers = min(self.max_workers, len(sequences) // self.engine.batch_size)
        if num_workers < 2:
            return self.engine.run(sequences)
        return generate_in_workers(self._worker_engine, sequences, num_workers=num_workers)

    @property
    def _worker_engine(self) -> EngineSettings:
        engine = self.engine
        kind = {"speculate": engine.speculate, "batch_invariant": self._precision == INVARIANT}
        return EngineSettings(self.folder, engine.batch_size, engine.eos_token_ids, **kind)

    def close(self) -> None:
        """Finish what was submitted, free weights and cache; the teacher cannot be used afterwards."""
        if self._alive is not None:
            self._alive.close()
        del self.engine


def _draw(sampling: Sampling) -> SamplingParams:
    return SamplingParams(sampling.temperature, sampling.top_p, sampling.top_logprobs)


def _logprobs(sequence: Sequence[int]) -> str:
    sampled = [(token, own) for token, (own, _) in zip(sequence.generated_ids, sequence.logprobs, strict=True)]
    return TokenLogprobs("id", sampled, [top for _, top in sequence.logprobs]).packed()
