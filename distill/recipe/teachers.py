"""Teachers, which write the traces, and how many traces they write.

A field that changes none of a teacher's texts carries a `Mark`: it is no part of the teacher's identity.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from distill.recipe.config import BatchSize, Config, Mark
from distill.recipe.instruction import InstructedTeacher
from distill.records import FIRST_HINTED, Sampling

FlagValue = bool | int | float | str | list[Any] | dict[str, Any] | None
RESERVED_FLAGS = {
    *("api-key", "api-server-count", "data-parallel-address", "data-parallel-rpc-port", "data-parallel-size-local"),
    *("data-parallel-start-rank", "disable-fastapi-docs", "headless", "host", "middleware", "model", "port"),
    *("revision", "served-model-name", "tokenizer-revision", "uds"),
}


NUMERIC_FLAGS = ("dtype", "hf-overrides", "kv-cache-dtype", "quantization", "speculative-config")

# The key that a native server asks for, and its nodes each other; a vLLM one has the variable that its recipe names.
SERVER_KEY_ENV = "POTSTILL_API_KEY"


class OverNodes(Config):
    """Nodes that share the ranks of a teacher, and how they find each other."""

    num_nodes: Annotated[int, Mark.PLACE] = Field(1, ge=1, description="nodes that share the ranks")
    head_address: Annotated[str | None, Mark.PLACE] = Field(
        None, description="address of node 0, as the other nodes reach it"
    )
    rpc_port: Annotated[int, Mark.PLACE] = Field(
        13_345, ge=1, le=65_535, description="port of node 0 at which the other nodes report"
    )

    @model_validator(mode="after")
    def _head_is_known(self) -> Self:
        if self.num_nodes > 1 and self.head_address is None:
            raise ValueError("head_address: several nodes need the address of the first")
        return self


class ExpertRebalancing(Config):
    """Experts change their ranks by how much they are used, as DeepSeek-V3's do (2412.19437 s.3.4.1)."""

    every_steps: int = Field(10_000, ge=1, description="of the engine; minutes, at the pace of a large model")
    least_gain: float = Field(0.05, gt=0, lt=1, description="of the imbalance; a layer that gains less stays")


class NativeTeacher(InstructedTeacher, OverNodes):
    """This project's own engine: a `deepseek_v3` folder, or a student's (qwen2, qwen3, llama).

    In this process, or over ranks (processes, a GPU each), which share the requests and the routed experts.
    """

    backend: Literal["native"] = "native"
    model: str = Field(description="checkpoint folder, or GGUF file")
    batch_size: Annotated[BatchSize, Mark.SPEED] = Field(
        "auto", description="sequences in progress together, on each rank; auto: by a GPU's memory, 64 on a CPU or rank"
    )
    speculate: Annotated[bool, Mark.SPEED] = Field(
        False, description="draft a token a step with the MTP layer; same texts"
    )
    batch_invariant: bool = Field(
        False, description="on a CPU: the same bits for a request whatever is computed beside it; slower"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of a student's folder on a CPU: float32 is auto; bfloat16 reads half the bytes, if the CPU has it",
    )
    num_ranks: int = Field(1, ge=1, description="of a deepseek_v3 folder, in FP8; each has sequences of its own")
    num_redundant: Annotated[int, Mark.SPEED] = Field(
        0, ge=0, description="slots beyond one an expert, for those that are used most"
    )
    rebalance: Annotated[ExpertRebalancing | None, Mark.SPEED] = Field(
        None, description="none: experts stay where they are at first"
    )
    in_halves: Annotated[bool, Mark.SPEED] = Field(
        False, description="ranks compute half of a large step while the other half's tokens travel"
    )

    @model_validator(mode="after")
    def _ranks_fill_the_nodes(self) -> NativeTeacher:
        if self.num_ranks % self.num_nodes:
            raise ValueError(f"num_ranks: must be a multiple of num_nodes {self.num_nodes}, got {self.num_ranks}")
        for name in ("speculate", "batch_invariant") if self.num_ranks > 1 else ():
            if getattr(self, name):
                raise ValueError(f"{name}: is for one rank, got num_ranks {self.num_ranks}")
        if self.dtype != "auto" and (self.num_ranks > 1 or self.batch_invariant):
            raise ValueError(f"dtype: {self.dtype} goes neither with ranks nor with batch_invariant")
        for name in ("in_halves", "num_redundant", "rebalance") if self.num_ranks == 1 else ():
            if getattr(self, name):
                raise ValueError(f"{name}: is for several ranks")
        return self


# Fields of a request that have a place of their own in the recipe, or none at all.
SET_BY_POTSTILL = {
    *(
        "model",
        "messages",
        "prompt",
        "n",
        "seed",
        "stop",
        "temperature",
        "top_p",
        "max_tokens",
        "max_completion_tokens",
    ),
    *("stream", "stream_options", "logprobs", "top_logprobs", "thinking_token_budget", "return_token_ids"),
}


class Asking(Config):
    """How a model behind an OpenAI-compatible endpoint is asked, whoever started the endpoint."""

    api_key_env: Annotated[str, Mark.PLACE] = "OPENAI_API_KEY"
    max_concurrency: Annotated[int, Mark.SPEED] = Field(
        256, ge=1, description="requests in flight at the most; how many it is adapts"
    )
    timeout_s: Annotated[float, Mark.PATIENCE] = Field(
        14_400, gt=0, description="a whole answer; 32,768 tokens can take hours"
    )
    idle_timeout_s: Annotated[float, Mark.PATIENCE] = Field(
        600, gt=0, description="nothing comes of a streamed answer, the wait for a place included"
    )
    stream: Annotated[bool, Mark.SPEED] = Field(
        True, description="false: for an endpoint that does not stream, or streams without token counts"
    )
    max_retries: Annotated[int, Mark.PATIENCE] = Field(8, ge=0)
    extra_body: dict[str, Any] = Field(default_factory=dict, description="fields added to every request, as they are")

    @field_validator("extra_body")
    @classmethod
    def _potstill_sets_the_rest(cls, body: dict[str, Any]) -> dict[str, Any]:
        if taken := SET_BY_POTSTILL & body.keys():
            raise ValueError(f"{min(taken)!r} is set by potstill itself")
        return body


class ServedTeacher(InstructedTeacher, Asking):
    """A model behind an OpenAI-compatible endpoint, whoever started the endpoint."""

    model: str = Field(description="the served model's name")
    revision: str = "unknown"
    budget_forcing: Literal["completions", "chat", "server"] = Field(
        "completions", description="how the end of thinking is forced (sampling.max_thinking_tokens); docs/serving.md"
    )
    price_per_million_prompt_tokens: Annotated[float | None, Mark.PRICE] = Field(
        None, ge=0, description="for the costs shown and noted"
    )
    price_per_million_completion_tokens: Annotated[float | None, Mark.PRICE] = Field(None, ge=0)
    think_prefilled: bool = Field(
        True, description="the served template already opens <think>: put it back in front of tagged reasoning"
    )

    @property
    def opens_thinking(self) -> bool:
        return self.think_prefilled and self.reasoning == "tagged"

    def cost(self, num_prompt_tokens: int, num_completion_tokens: int) -> float | None:
        """The cost in the currency of the prices; None where there is none."""
        prompt, completion = self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens
        if prompt is None and completion is None:
            return None
        return ((prompt or 0.0) * num_prompt_tokens + (completion or 0.0) * num_completion_tokens) / 1e6


class OpenAITeacher(ServedTeacher):
    """Any OpenAI-compatible endpoint: vLLM, SGLang, DeepSeek's own."""

    backend: Literal["openai"] = "openai"
    base_url: str = "http://127.0.0.1:8000/v1"


class VllmServing(Config):
    """A vLLM server of ours: how it is started and watched.

    `flags` are those of `vllm serve` without their dashes: true and false stand for `--x` and `--no-x`, a mapping for
    JSON, null takes back what a parent recipe set. What says where the server listens, what it is called and who may
    ask it is not among them: that is potstill's to set.
    """

    flags: dict[str, FlagValue] = Field(default_factory=dict)
    environment: dict[str, str] = Field(
        default_factory=dict, description="variables for the server, beyond those of this process"
    )
    startup_timeout_s: Annotated[float | None, Mark.PATIENCE] = Field(
        None, gt=0, description="none: from the size of the weights"
    )
    max_restarts: Annotated[int, Mark.PATIENCE] = Field(
        3, ge=0, description="how often a server that died is started again"
    )

    @property
    def numerics(self) -> dict[str, FlagValue]:
        """The flags that change what the same weights write; the others say how fast they do."""
        return {name: self.flags[name] for name in NUMERIC_FLAGS if self.flags.get(name) is not None}

    @property
    def num_gpus(self) -> int:
        """GPUs that one server takes: its ranks of every kind."""
        sizes = [self.flags.get(f"{kind}-parallel-size") or 1 for kind in ("tensor", "pipeline", "data")]
        return math.prod(size for size in sizes if isinstance(size, int))

    @field_validator("flags")
    @classmethod
    def _ours_are_not_given(cls, flags: dict[str, FlagValue]) -> dict[str, FlagValue]:
        for name in flags:
            if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
                raise ValueError(f"{name!r} is not a flag's name (written without dashes in front: max-model-len)")
            if name in RESERVED_FLAGS:
                raise ValueError(f"{name!r} is set by potstill")
            if name == "trust-remote-code" and flags[name] is not False:
                raise ValueError(f"{name!r} would run Python code of the model's folder, which potstill never does")
        return flags


class VllmEngine(Asking, VllmServing):
    """A vLLM server of ours for every model that is scored, one after the other; several replicas by its own flags."""

    backend: Literal["vllm"] = "vllm"


class EndpointEngine(Asking):
    """An endpoint that serves the models that are scored, started elsewhere.

    Whether it serves these very weights cannot be seen from here: the scores are named after the folders.
    """

    backend: Literal["openai"] = "openai"
    base_url: str = "http://127.0.0.1:8000/v1"
    served: dict[str, str] = Field(
        default_factory=dict, description="names under which models are served, by their names in the run"
    )


ServedEngine = VllmEngine | EndpointEngine


class VllmTeacher(ServedTeacher, VllmServing, OverNodes):
    """A vLLM server that potstill starts, watches and ends; over several nodes with data parallelism."""

    backend: Literal["vllm"] = "vllm"
    model: str = Field(description="checkpoint folder, GGUF file, or a repository of the Hub")
    revision: str = Field("main", description="of a Hub repository")

    @model_validator(mode="after")
    def _ranks_fill_the_nodes(self) -> VllmTeacher:
        size = self.flags.get("data-parallel-size", 1)
        if self.num_nodes > 1 and (isinstance(size, bool) or not isinstance(size, int) or size % self.num_nodes):
            raise ValueError(f"flags.data-parallel-size must be a multiple of num_nodes {self.num_nodes}, got {size!r}")
        return self


class RayTeacher(ServedTeacher, VllmServing):
    """Many replicas over a Ray cluster: each a vLLM server on its node, or one endpoint of a pool.

    With `base_urls` nothing is started: `model` is then the name under which all of them serve it.
    """

    backend: Literal["ray"] = "ray"
    model: str = Field(description="checkpoint folder (on every node), a repository of the Hub, or the served name")
    revision: str = "main"
    address: Annotated[str | None, Mark.PLACE] = Field(
        None, description="of a running cluster; none: Ray starts on this machine"
    )
    base_urls: Annotated[tuple[str, ...], Mark.PLACE] = Field(
        (), description="a pool of endpoints, instead of servers of our own"
    )
    num_replicas: Annotated[int, Mark.SPEED] = Field(1, ge=1, description="servers to start")
    cpus_per_replica: Annotated[float, Mark.SPEED] = Field(1, ge=0)
    gpus_per_replica: Annotated[float, Mark.SPEED] = Field(0, ge=0)


TeacherConfig = Annotated[NativeTeacher | OpenAITeacher | VllmTeacher | RayTeacher, Field(discriminator="backend")]


class AdaptiveSampling(Config):
    """Rounds of `num_samples` samples a prompt, graded in between: how long a prompt goes on getting rounds."""

    max_samples: int = Field(16, ge=1, lt=FIRST_HINTED, description="samples a prompt at the most")
    min_correct: int = Field(1, ge=1, description="a prompt with so many correct samples is done")
    give_up_after: int = Field(8, ge=1, description="a prompt without a correct one among so many samples is done")
    pass_rate: tuple[float, float] = Field(
        (0.0, 1.0), description="else it goes on while the share of correct samples lies between these"
    )

    @model_validator(mode="after")
    def _bounds_are_shares(self) -> AdaptiveSampling:
        low, high = self.pass_rate
        if not 0 <= low <= high <= 1:
            raise ValueError(f"pass_rate: must be two shares between 0 and 1, the lesser first, got [{low}, {high}]")
        return self


class Hints(Config):
    """A second try at questions of which no sample is right, with the reference as a hint.

    STaR's rationalisation (arXiv 2203.14465, section 3.2). The hint is no part of the example; a trace is kept where
    its answer is right and it does not speak of what it was told.
    """

    num_samples: int = Field(4, ge=1, lt=FIRST_HINTED, description="samples a question")


class GenerateConfig(Config):
    num_samples: int = Field(1, ge=1, lt=FIRST_HINTED, description="samples a prompt; with `adaptive`, in each round")
    adaptive: AdaptiveSampling | None = Field(None, description="more samples where they are worth it; none: a fixed n")
    hints: Hints | None = Field(None, description="a second try where no sample is right; none: there is none")
    sampling: Sampling = Sampling()
    special_tokens_in_text: Literal["text", "refuse"] = Field(
        "text",
        description="special tokens of the teacher's that a question spells out: asked as plain text, or an error",
    )
    grade: bool = Field(True, description="grade while generating: the yield is shown, curation finds the verdicts")
    part: str | None = Field(
        None,
        pattern=r"^[1-9]\d{0,5}/[1-9]\d{0,5}$",
        description="`2/4`: the second of four parts of the prompts, for one of four machines with a ledger of its own",
    )

    @model_validator(mode="after")
    def _rounds_fit_and_the_part_exists(self) -> GenerateConfig:
        if self.adaptive is not None and self.adaptive.max_samples < self.num_samples:
            message = f"must be at least num_samples {self.num_samples}, got {self.adaptive.max_samples}"
            raise ValueError(f"adaptive.max_samples: {message}")
        if self.part is not None and int(self.part.split("/")[0]) > int(self.part.split("/")[1]):
            raise ValueError(f"part: must be one of 1/n to n/n, got {self.part}")
        return self
