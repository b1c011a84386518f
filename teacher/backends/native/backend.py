"""The native backend: this project's engine in this process, on the GPU where there is one, or over ranks.

The prompt is the folder's own chat template with generation prompt. Where that opens the reasoning (`<think>` and a
line break), the completion's text gets it back in front, so that every trace begins alike whatever the backend; and
there `max_thinking_tokens` holds, all tokens before `</think>` counted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator, Sequence as Many
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from distill.errors import CheckpointError, DataError, PotstillError, UserInputError
from distill.logprobs import TokenLogprobs
from distill.protocols import Likelihood, PlainAnswer, PlainPrompt, ScoredText
from distill.reasoning import END_OF_THINKING, FORCED_END, THINK_LINE
from distill.recipe import UNINSTRUCTED, Instruction
from distill.records import Completion, Sampling, TeacherIdentity, TraceRequest
from distill.special_tokens import special_tokens
from distill.weights import folder_identity
from teacher.backends.chat_template import ChatTemplate
from teacher.backends.native.fleet import Fleet
from teacher.backends.native.live import LiveEngine, LocalEngine, WorkerEngines, generate_in_workers
from teacher.backends.native.pace import Pace
from teacher.backends.native.scoring import likelihood_of, plain_answer, plain_sequence, scored_sequence
from teacher.backends.native.workers import EngineSettings
from teacher.backends.tokenizer import (
    encode_prompt,
    encode_text,
    most_characters,
    render_question,
)
from teacher.backends.vocabulary import FolderVocabulary
from teacher.engine.engine import Engine
from teacher.engine.guide import Guides
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Sequence, ThinkingLimit
from teacher.engine.stopping import cut
from teacher.live import (
    REPETITION,
    CallFormat,
    Conversation,
    GeneratedSample,
    GenerationRequest,
    OnDone,
    OnTokens,
    PlainText,
    PromptTooLong,
    RequestOptions,
    StreamHandle,
)
from teacher.models.invariant.models import INVARIANT

# Part of every sample's key. Raise it when the same weights, request and seed would give another text; the second is
# that of other precisions than FP32, whose texts also change with the kernels' rounding.
ENGINE_VERSION, ROUNDED_ENGINE_VERSION = "3", "4"


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
        instruction: Instruction = UNINSTRUCTED,
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.engine = engine
        # What outlives the engine: a part of the identity, and how the last texts end.
        self._precision, self._eos_token_ids = engine.precision, engine.eos_token_ids
        self.max_workers = max_workers
        self._as_student = as_student
        self._instruction = instruction
        self._alive: LiveEngine | None = engine if isinstance(engine, Fleet) else None
        self._starting = threading.Lock()
        self._last_prompt: tuple[GenerationRequest, tuple[str, list[int]]] | None = None
        self._pace = Pace(engine)

    @property
    def batch_size(self) -> int:
        """Sequences in progress together, over all ranks."""
        return self.engine.batch_size

    @cached_property
    def identity(self) -> TeacherIdentity:
        version = ENGINE_VERSION if self._precision == "float32" else f"{ROUNDED_ENGINE_VERSION}-{self._precision}"
        identity = folder_identity(self.folder, backend="native", backend_version=version)
        return identity.asked_with(self._instruction.words)

    def facts(self) -> dict[str, str | float]:
        """Tokens written and read by the call of `generate` that is under way, for the eyes of who waits."""
        return self._pace.facts()

    def generate(self, requests: Many[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield a completion a request, each as soon as it is finished. Raises DataError for a prompt too long."""
        prefixes: dict[int, str] = {}
        sequences = []
        prompts: dict[tuple[str, str], tuple[str, list[int]]] = {}  # samples of one question share its prompt
        for number, request in enumerate(requests):
            question = request.problem.prompt, request.problem.grader
            if question not in prompts:
                prompts[question] = self._prompt(request)
            prefix, prompt_ids = prompts[question]
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

    @cached_property
    def vocabulary(self) -> FolderVocabulary:
        return FolderVocabulary(self.tokenizer, self.folder)

    @property
    def num_positions(self) -> int:
        return self.engine.max_positions

    def likelihoods(self, wanted: Many[ScoredText]) -> Iterator[tuple[int, Likelihood]]:
        """As `distill.protocols.TokenModel`. In this process: prompts keep all cores busy, unlike decoding."""
        self._pace = Pace(self.engine)
        sequences = [scored_sequence(number, text) for number, text in enumerate(wanted)]
        with contextlib.closing(self.engine.run(sequences)) as finished:
            for done in finished:
                yield done.key, likelihood_of(done)

    def continuations(self, wanted: Many[PlainPrompt]) -> Iterator[tuple[int, PlainAnswer]]:
        """As `distill.protocols.TokenModel`."""
        sequences = [plain_sequence(number, prompt) for number, prompt in enumerate(wanted)]
        with contextlib.closing(self._finished(sequences)) as finished:
            for done in finished:
                yield done.key, plain_answer(done, self._spell_plain, self._eos_token_ids)

    def _spell_plain(self, token_ids: Many[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def submit(
        self, request: GenerationRequest, sampling: Sampling, on_done: OnDone, on_tokens: OnTokens | None = None
    ) -> StreamHandle:
        """Begin one sample; it joins the batch that is running. `on_done` is called once, from another thread, and
        before it `on_tokens` with the tokens of each step.

        Raises DataError for a prompt too long, or with tokens that the model does not have, UserInputError for a bias
        of such tokens, and for a grammar that cannot be kept.
        """
        prefix, prompt_ids = self._wanted_prompt(request)
        sequence = self._begin(0, request.request, sampling, prefix, prompt_ids)
        self._apply(request.options, sequence, thinks=bool(prefix))
        sequence.streamed = on_tokens is not None

        def finished(outcome: Sequence[int] | PotstillError) -> None:
            if isinstance(outcome, PotstillError):
                on_done(outcome)
                return
            completion, stop_reason = self._completion(request.request, prefix, outcome)
            tokens = outcome.prompt_ids, outcome.generated_ids
            drafts = outcome.num_drafts, outcome.num_accepted
            on_done(GeneratedSample(completion, *tokens, prefix, stop_reason, *drafts, outcome.prompt_logprobs))

        return StreamHandle(self._live.submit(sequence, finished, on_tokens), sequence.prompt_ids, prefix)

    @cached_property
    def call_format(self) -> CallFormat | None:
        return self._template.call_format

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Raises PromptTooLong for a text whose length alone says that it cannot be a prompt."""
        self._check_length(text)
        return encode_text(self.tokenizer, text, add_special_tokens=add_special_tokens)

    def _encode_rendered(self, prompt: str) -> list[int]:
        """As `encode`, for what the chat template wrote."""
        self._check_length(prompt)
        return encode_prompt(self.tokenizer, prompt)

    def _check_length(self, text: str) -> None:
        if len(text) > self.max_characters:
            least, limit = -(-len(text) // self._most_characters), self.engine.max_positions - 1
            raise PromptTooLong(least, limit, is_least=True, where="http", field="prompt")

    @property
    def max_characters(self) -> int:
        return (self.engine.max_positions - 1) * self._most_characters

    @cached_property
    def _most_characters(self) -> int:
        return most_characters(self.tokenizer)

    def spell(self, *token_ids: int) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @property
    def fault(self) -> PotstillError | None:
        """The reason why it should be given no more."""
        return None if self._alive is None else self._alive.fault

    def gauges(self) -> dict[str, float]:
        return self.engine.gauges if isinstance(self.engine, Fleet) else {}

    @cached_property
    def _guides(self) -> Guides:
        return Guides(self.tokenizer.backend_tokenizer, self._eos_token_ids)

    @property
    def _live(self) -> LiveEngine:
        with self._starting:
            if self._alive is None and self.max_workers < 2:
                self._alive = LocalEngine(self.engine)
            elif self._alive is None:
                tokenizer = self.tokenizer.backend_tokenizer.to_str()
                settings = replace(self._worker_engine, tokenizer=tokenizer)
                self._alive = WorkerEngines.started(settings, num_workers=self.max_workers)
            return self._alive

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def _wanted_prompt(self, wanted: GenerationRequest) -> tuple[str, list[int]]:
        """As `_rendered`, once for all samples of one request: they come one behind the other."""
        last = self._last_prompt
        if last is None or not _ask_the_same(last[0], wanted):
            self._last_prompt = last = wanted, self._rendered(wanted)
        return last[1]

    def _rendered(self, wanted: GenerationRequest) -> tuple[str, list[int]]:
        """As `_prompt`, for all that can be asked; the continuation of a text opens nothing."""
        if isinstance(wanted.prompt, tuple):
            return "", list(wanted.prompt)
        if isinstance(wanted.prompt, PlainText):
            return "", self.encode(wanted.prompt.text, add_special_tokens=wanted.prompt.add_special_tokens)
        if wanted.prompt is None and not wanted.partial_answer and self.tokenizer.chat_template:
            return self._prompt(wanted.request)
        asked = Conversation(({"role": "user", "content": wanted.request.problem.prompt},))
        prompt = self._template.render(wanted.prompt or asked)
        written = special_tokens(self.tokenizer).veil(wanted.partial_answer)
        if not prompt.endswith(THINK_LINE):
            return "", self._encode_rendered(prompt + written)
        return "" if written else THINK_LINE, self._encode_rendered(prompt + written.removeprefix(THINK_LINE))

    def _prompt(self, request: TraceRequest) -> tuple[str, list[int]]:
        """Opening of the answer that the prompt has already written, and the prompt's tokens."""
        problem = request.problem
        prompt = render_question(self.tokenizer, problem.prompt, self._instruction.around(problem))
        return THINK_LINE if prompt.endswith(THINK_LINE) else "", encode_prompt(self.tokenizer, prompt)

    def _begin(
        self, number: int, request: TraceRequest, sampling: Sampling, prefix: str, prompt_ids: list[int]
    ) -> Sequence[int]:
        """The sequence that writes what follows `prefix`."""
        self._check(prompt_ids, request)
        limit = self._thinking_limit(sampling) if prefix else None
        seed, draw = request.seed(sampling), _draw(sampling)
        return Sequence(number, prompt_ids, sampling.max_tokens, seed, draw, thinking=limit)

    def _check(self, prompt_ids: list[int], request: TraceRequest) -> None:
        where, field = request.problem.source, f"prompt {request.problem.prompt[:40]!r}"
        if not prompt_ids:
            raise DataError("has no tokens", where=where, field=field)
        if len(prompt_ids) >= self.engine.max_positions:
            raise PromptTooLong(len(prompt_ids), self.engine.max_positions - 1, where=where, field=field)
        if max(prompt_ids) >= len(self.tokenizer):
            message = f"has the token {max(prompt_ids)}; the model has {len(self.tokenizer)} tokens"
            raise DataError(message, where=where, field=field)

    def _apply(self, options: RequestOptions, sequence: Sequence[int], *, thinks: bool) -> None:
        """Apply what HTTP can say beyond a Sampling. `thinks`: the sequence begins within its reasoning."""
        if unknown := [token for token, _ in options.logit_bias if token >= len(self.tokenizer)]:
            message = f"there is no token {unknown[0]}; the model has {len(self.tokenizer)} tokens"
            raise UserInputError(message, field="logit_bias")
        sequence.sampling_params = replace(
            sequence.sampling_params,
            top_k=options.top_k,
            min_p=options.min_p,
            logit_bias=options.logit_bias,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            repetition_penalty=options.repetition_penalty,
            prompt_logprobs=options.prompt_logprobs,
        )
        sequence.stops, sequence.repetition = options.stop, options.repetition_detection
        if options.grammar is not None:
            sequence.grammar = grammar = replace(options.grammar, thinks=thinks)
            try:
                sequence.guide = self._guides.guide(grammar)
            except ValueError as exc:
                raise UserInputError(str(exc), field=grammar.field) from exc

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
            self._pace = Pace(self.engine)
            return self.engine.run(sequences)

        def on_start(engines: WorkerEngines) -> None:
            self._pace = Pace(engines)

        settings = self._worker_engine
        if any(sequence.stops for sequence in sequences):
            settings = replace(settings, tokenizer=self.tokenizer.backend_tokenizer.to_str())
        return generate_in_workers(settings, sequences, num_workers=num_workers, on_start=on_start)

    @property
    def _worker_engine(self) -> EngineSettings:
        engine = self.engine
        kind = {"speculate": engine.speculate, "batch_invariant": self._precision == INVARIANT}
        if self._precision == "bfloat16":
            kind["dtype"] = self._precision
        return EngineSettings(self.folder, engine.batch_size, engine.eos_token_ids, **kind)

    def close(self) -> None:
        """Finish what was submitted, free weights and cache; the teacher cannot be used afterwards."""
        if self._alive is not None:
            self._alive.close()
        del self.engine, self._pace


def _ask_the_same(one: GenerationRequest, other: GenerationRequest) -> bool:
    """Tell samples of one request: what they are asked is one object."""
    same = one.prompt is other.prompt and one.request.problem is other.request.problem
    return same and one.partial_answer == other.partial_answer


def _draw(sampling: Sampling) -> SamplingParams:
    return SamplingParams(sampling.temperature, sampling.top_p, sampling.top_logprobs)


def _logprobs(sequence: Sequence[int]) -> str:
    sampled = [(token, own) for token, (own, _) in zip(sequence.generated_ids, sequence.logprobs, strict=True)]
    return TokenLogprobs("id", sampled, [top for _, top in sequence.logprobs]).packed()
