"""The recipe: one typed, frozen description of a whole run. Every public default of the pipeline lives here.

A recipe is YAML; `load_recipe(path, overrides)` validates it against `Recipe` and turns every fault into one
`RecipeError` line naming file and field. Unknown keys are errors that name the nearest match. Values that YAML hands
over as strings (`4e-5`) are coerced. A recipe may name one parent (`extends: other.yaml`, relative to itself): mappings
merge (but for one whose `backend` or `kind` differs), everything else replaces. Student recipes
(`students/zoo/*.yaml`) are read by `load_student`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from distill.errors import RecipeError, nearest
from distill.records import Sampling


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


# --- prompts ----------------------------------------------------------------------------------------------------------


class ReasoningGymSource(Config):
    """Procedural problems.

    `families` is a problem-set file (`distill/problems/*.yaml`) or a mapping family -> parameters. `split` decides
    which part of the world the problems come from: a problem's own hash puts it in `train` or `held_out`, so that the
    two never meet whatever the seeds are.
    """

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    families: str | dict[str, dict[str, Any]]
    count: int = Field(ge=1, description="problems in all, spread evenly over the families")
    seed: int = Field(1, ge=0)
    split: Literal["train", "held_out"] = "train"


class LocalSource(Config):
    """JSON Lines or Parquet on this machine."""

    kind: Literal["local"] = "local"
    path: str
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    choices_field: str | None = None
    grader: Literal["math", "choice", "code", "judge"] = "math"
    tests_field: str | None = Field(None, description="for programs: test code, assertions, or inputs with outputs")
    setup_field: str | None = Field(None, description="for programs: code that the tests need to have run")
    entry_point_field: str | None = Field(None, description="for programs: the function that check(candidate) is given")
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _programs_have_tests(self) -> Self:
        if (self.grader == "code") != (self.tests_field is not None):
            raise ValueError("tests_field: goes with grader 'code', and with no other")
        return self


class DatasetSource(Config):
    """A data set of the Hugging Face Hub, read with `datasets`."""

    kind: Literal["dataset"] = "dataset"
    repo: str
    revision: str = "main"
    config: str | None = None
    split: str = "train"
    prompt_field: str = "problem"
    answer_field: str = "answer"
    choices_field: str | None = None
    grader: Literal["math", "choice", "code", "judge"] = "math"
    tests_field: str | None = Field(None, description="for programs: test code, assertions, or inputs with outputs")
    setup_field: str | None = Field(None, description="for programs: code that the tests need to have run")
    entry_point_field: str | None = Field(None, description="for programs: the function that check(candidate) is given")
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _programs_have_tests(self) -> Self:
        if (self.grader == "code") != (self.tests_field is not None):
            raise ValueError("tests_field: goes with grader 'code', and with no other")
        return self


ProblemSource = Annotated[ReasoningGymSource | LocalSource | DatasetSource, Field(discriminator="kind")]


# --- teacher and generation -------------------------------------------------------------------------------------------

FlagValue = bool | int | float | str | list[Any] | dict[str, Any] | None
RESERVED_FLAGS = {
    *("api-key", "api-server-count", "data-parallel-address", "data-parallel-rpc-port", "data-parallel-size-local"),
    *("data-parallel-start-rank", "disable-fastapi-docs", "headless", "host", "middleware", "model", "port"),
    *("revision", "served-model-name", "tokenizer-revision", "uds"),
}


class NativeTeacher(Config):
    """This project's own model and latent cache, in this process."""

    backend: Literal["native"] = "native"
    model: str = Field(description="checkpoint folder")
    batch_size: int = Field(64, ge=1)


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


class ServedTeacher(Config):
    """How a model behind an OpenAI-compatible endpoint is asked, whoever started the endpoint."""

    model: str = Field(description="the served model's name")
    revision: str = "unknown"
    api_key_env: str = "OPENAI_API_KEY"
    system_prompt: str | None = None
    max_concurrency: int = Field(256, ge=1, description="requests in flight at the most; how many it is adapts")
    timeout_s: float = Field(14_400, gt=0, description="a whole answer; 32,768 tokens can take hours")
    idle_timeout_s: float = Field(
        600, gt=0, description="nothing comes of a streamed answer, the wait for a place included"
    )
    stream: bool = Field(
        True, description="false: for an endpoint that does not stream, or streams without token counts"
    )
    max_retries: int = Field(8, ge=0)
    extra_body: dict[str, Any] = Field(default_factory=dict, description="fields added to every request, as they are")
    budget_forcing: Literal["completions", "chat", "server"] = Field(
        "completions", description="how the end of thinking is forced (sampling.max_thinking_tokens); docs/teacher.md"
    )
    price_per_million_prompt_tokens: float | None = Field(None, ge=0, description="for the costs shown and noted")
    price_per_million_completion_tokens: float | None = Field(None, ge=0)
    think_prefilled: bool = Field(True, description="the served template already opens <think>: put it back in front")

    @field_validator("extra_body")
    @classmethod
    def _potstill_sets_the_rest(cls, body: dict[str, Any]) -> dict[str, Any]:
        if taken := SET_BY_POTSTILL & body.keys():
            raise ValueError(f"{min(taken)!r} is set by potstill itself")
        return body

    def cost(self, num_prompt_tokens: int, num_completion_tokens: int) -> float | None:
        """In the currency of the prices; None where there is none."""
        prompt, completion = self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens
        if prompt is None and completion is None:
            return None
        return ((prompt or 0.0) * num_prompt_tokens + (completion or 0.0) * num_completion_tokens) / 1e6


class OpenAITeacher(ServedTeacher):
    """Any OpenAI-compatible endpoint: vLLM, SGLang, DeepSeek's own."""

    backend: Literal["openai"] = "openai"
    base_url: str = "http://127.0.0.1:8000/v1"


class VllmServing(Config):
    """How a vLLM server of ours is started and watched.

    `flags` are those of `vllm serve` without their dashes: true and false stand for `--x` and `--no-x`, a mapping for
    JSON, null takes back what a parent recipe set. What says where the server listens, what it is called and who may
    ask it is not among them: that is potstill's to set.
    """

    flags: dict[str, FlagValue] = {}
    environment: dict[str, str] = Field({}, description="variables for the server, beyond those of this process")
    startup_timeout_s: float | None = Field(None, gt=0, description="none: from the size of the weights")
    max_restarts: int = Field(3, ge=0, description="how often a server that died is started again")

    @field_validator("flags")
    @classmethod
    def _ours_are_not_given(cls, flags: dict[str, FlagValue]) -> dict[str, FlagValue]:
        for name in flags:
            if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
                raise ValueError(f"{name!r} is not a flag's name (written without dashes in front: max-model-len)")
            if name in RESERVED_FLAGS:
                raise ValueError(f"{name!r} is set by potstill")
        return flags


class VllmTeacher(ServedTeacher, VllmServing):
    """A vLLM server that potstill starts, watches and ends; over several nodes with data parallelism."""

    backend: Literal["vllm"] = "vllm"
    model: str = Field(description="checkpoint folder, or a repository of the Hub")
    revision: str = Field("main", description="of a Hub repository")
    num_nodes: int = Field(1, ge=1, description="nodes that share the ranks of data-parallel-size")
    head_address: str | None = Field(None, description="address of node 0, as the other nodes reach it")
    rpc_port: int = Field(13_345, ge=1, le=65_535, description="port of node 0 at which the other nodes report")

    @model_validator(mode="after")
    def _ranks_fill_the_nodes(self) -> VllmTeacher:
        size = self.flags.get("data-parallel-size", 1)
        if self.num_nodes > 1 and (isinstance(size, bool) or not isinstance(size, int) or size % self.num_nodes):
            raise ValueError(f"flags.data-parallel-size must be a multiple of num_nodes {self.num_nodes}, got {size!r}")
        if self.num_nodes > 1 and self.head_address is None:
            raise ValueError("head_address: several nodes need the address of the first")
        return self


class RayTeacher(ServedTeacher, VllmServing):
    """Many replicas over a Ray cluster: each a vLLM server on its node, or one endpoint of a pool.

    With `base_urls` nothing is started: `model` is then the name under which all of them serve it.
    """

    backend: Literal["ray"] = "ray"
    model: str = Field(description="checkpoint folder (on every node), a repository of the Hub, or the served name")
    revision: str = "main"
    address: str | None = Field(None, description="of a running cluster; none: Ray starts on this machine")
    base_urls: tuple[str, ...] = Field((), description="a pool of endpoints, instead of servers of our own")
    num_replicas: int = Field(1, ge=1, description="servers to start")
    cpus_per_replica: float = Field(1, ge=0)
    gpus_per_replica: float = Field(0, ge=0)


TeacherConfig = Annotated[NativeTeacher | OpenAITeacher | VllmTeacher | RayTeacher, Field(discriminator="backend")]


class AdaptiveSampling(Config):
    """Rounds of `num_samples` samples a prompt, graded in between: how long a prompt goes on getting rounds."""

    max_samples: int = Field(16, ge=1, description="samples a prompt at the most")
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


class GenerateConfig(Config):
    num_samples: int = Field(1, ge=1, description="samples a prompt; with `adaptive`, in each round")
    adaptive: AdaptiveSampling | None = Field(None, description="more samples where they are worth it; none: a fixed n")
    sampling: Sampling = Sampling()
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


# --- curation ---------------------------------------------------------------------------------------------------------


class Difficulty(Config):
    """Problems by the share of their samples that are correct; both bounds are inclusive."""

    min_pass_rate: float = Field(0.0, ge=0, le=1)
    max_pass_rate: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Difficulty:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(f"min_pass_rate {self.min_pass_rate} is above max_pass_rate {self.max_pass_rate}")
        return self


class NearDuplicates(Config):
    """Texts whose sets of shingles overlap: MinHash proposes pairs, the exact Jaccard similarity decides."""

    of: Literal["questions", "completions", "both"] = "questions"
    threshold: float = Field(0.8, ge=0.3, le=1, description="Jaccard similarity from which one of two texts goes")
    shingle_words: int = Field(5, ge=1, le=20, description="words and signs a shingle")
    num_perm: int = Field(128, ge=16, le=1024, description="numbers a signature; more miss fewer pairs")


class BestOfN(Config):
    """Of each problem's correct samples, the shortest or longest."""

    keep: int = Field(1, ge=1)
    by: Literal["shortest", "longest"] = "shortest"


class Mix(Config):
    """Shares of the sources among the examples: reached by leaving out, never by repeating."""

    shares: dict[str, Annotated[float, Field(ge=0)]] = Field(description="a weight for every source; 0 leaves it out")
    num_examples: int | None = Field(None, ge=1, description="examples in all; none: what the scarcest source allows")

    @model_validator(mode="after")
    def _something_is_left(self) -> Mix:
        if not any(self.shares.values()):
            raise ValueError("shares: all are 0")
        return self


class CurateConfig(Config):
    """Filters in the order in which they run. Each is a switch; the funnel counts what each one drops."""

    correct_only: bool = True
    complete_reasoning: bool = Field(True, description="drop traces without a closed <think> block and a final answer")
    max_tokens: int | None = Field(None, ge=1, description="drop longer traces (teacher tokens)")
    language: str | None = Field(None, description="drop traces that are not in this language (ISO 639-1)")
    min_language_share: float = Field(0.9, gt=0, le=1, description="language: share of the words that must be in it")
    max_repetition: float | None = Field(0.5, ge=0, le=1, description="share of lines that repeat an earlier line")
    drop_loops: bool = Field(True, description="drop traces that end in a loop, or are mostly one")
    decontaminate: bool = Field(True, description="drop examples whose question occurs in an evaluation suite")
    min_containment: float | None = Field(
        0.3, gt=0, le=1, description="decontaminate: share of an evaluation question's 8-word runs; none: no such test"
    )
    difficulty: Difficulty | None = Field(None, description="keep problems that are solved this often")
    deduplicate: bool = True
    near_duplicates: NearDuplicates | None = Field(None, description="drop questions or completions nearly the same")
    best_of_n: BestOfN | None = Field(None, description="keep the shortest or longest correct samples of a problem")
    max_per_problem: int | None = Field(None, ge=1)
    mix: Mix | None = Field(None, description="bring the sources to these shares")

    @field_validator("language")
    @classmethod
    def _language_is_known(cls, language: str | None) -> str | None:
        from distill.verify.language import LANGUAGES

        if language is not None and language not in LANGUAGES:
            raise ValueError(f"unknown language {language!r}; {nearest(language, LANGUAGES)}")
        return language


class CodeLimits(Config):
    """What a program that is graded may use, for each test with standard input or for all function tests together."""

    timeout_s: float = Field(10.0, gt=0, description="of processor time; by the clock half as much again")
    memory_mib: int = Field(1_024, ge=64)
    output_mib: int = Field(4, ge=1)
    num_threads: int = Field(16, ge=1)


class JudgeConfig(Config):
    """A model that decides, at temperature 0, whether a final answer says the same as the reference."""

    teacher: TeacherConfig = Field(description="any backend; its identity is part of the verdict's key")
    num_votes: int = Field(1, ge=1, le=15, description="reference and answer change places from one to the next")
    max_tokens: int = Field(8_192, ge=16, description="of one vote, reasoning included")
    on_unverifiable: bool = Field(False, description="also judge what the rules cannot decide, not `judge` alone")


class VerifyConfig(Config):
    num_workers: int = Field(2, ge=1)
    timeout_s: float = Field(10.0, gt=0, description="per answer; its grader is killed after it")
    memory_mib: int = Field(1_024, ge=128, description="that grading one answer may take beside the graders' own")
    code: CodeLimits = CodeLimits()
    judge: JudgeConfig | None = Field(None, description="none: problems whose grader is `judge` stay unverifiable")
    relabel: Literal["never", "majority"] = Field(
        "never",
        description="take the majority's answer for a reference that is suspected; never of procedural problems",
    )
    suspect_min_samples: int = Field(4, ge=2, description="graded answers, none correct, before it is suspected")
    suspect_min_share: float = Field(0.75, gt=0.5, le=1, description="of these answers that must be the same")


# --- students ---------------------------------------------------------------------------------------------------------


class SFTConfig(Config):
    """Supervised fine-tuning on traces: loss on the completion only."""

    lr: float = Field(gt=0, lt=1)
    num_epochs: float = Field(3.0, gt=0)
    batch_size: int = Field(64, ge=1, description="examples an optimizer step, over all devices")
    micro_batch_size: int = Field(64, ge=1, description="examples a forward pass on one device")
    max_length: int = Field(32_768, ge=16, description="tokens; a longer example is an error, never cut")
    scheduler: Literal["cosine_with_min_lr", "linear", "constant"] = "cosine_with_min_lr"
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = False
    packing: bool = False
    rope_theta: float | None = Field(None, gt=0, description="raise the base's rope theta for longer contexts")
    save_steps: int = Field(200, ge=1)


class StudentConfig(Config):
    """One student of the zoo: a base and how it learns."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    base: str = Field(description="checkpoint folder, or a repository of the Hub")
    revision: str = "main"
    architecture: Literal["qwen2", "qwen3", "llama"]
    num_parameters: int = Field(ge=1, description="of the base, embeddings counted once where tied")
    licence: str
    chat_template: str | None = Field(None, description="template file to bake in; none: the base's own")
    eos_token: str | None = Field(None, description="end of turn, where the base's own EOS is another token")
    sft: SFTConfig


class DistillConfig(Config):
    students: tuple[str, ...] = Field(min_length=1, description="names in students/zoo, or paths of student files")
    methods: tuple[Literal["distilled", "direct"], ...] = ("distilled",)
    overrides: dict[str, Any] = Field(default_factory=dict, description="laid over every student's sft settings")
    num_workers: int = Field(1, ge=1, description="students trained side by side, each in a process of its own")


# --- evaluation, report, push -----------------------------------------------------------------------------------------


class EvalConfig(Config):
    suites: tuple[str, ...] = Field(("pico",), min_length=1)
    held_out: ReasoningGymSource | None = Field(None, description="the problems behind the suite `pico`")
    bench_data: str | None = Field(None, description="folder of benchmark files; else POTSTILL_BENCH_DATA")
    num_samples: int = Field(4, ge=1, description="samples a question; pass@1 is their mean")
    sampling: Sampling = Sampling()
    batch_size: int = Field(128, ge=1)
    limit: int | None = Field(None, ge=1, description="questions a suite")
    roles: tuple[Literal["teacher", "base", "direct", "distilled"], ...] = ("teacher", "base", "direct", "distilled")


class PushConfig(Config):
    repo: str = Field("potstill-{student}", description="repository name; {student} is filled in")
    student: str | None = Field(None, description="which student; none: the best distilled one")
    private: bool = True


class PushTracesConfig(Config):
    """The traces as a data set of the Hub."""

    repo: str = Field("potstill-{recipe}-traces", description="repository name; {recipe} is filled in")
    private: bool = True
    include_rejected: bool = Field(False, description="every sample as a second configuration, with what dropped it")
    licence: str | None = Field(None, description="of the data set; none: those of its sources")
    licences: dict[str, str] = Field(default_factory=dict, description="of the sources, where they are not procedural")
    language: str = "en"
    shard_mb: int = Field(500, ge=1, description="uncompressed size of a Parquet file, about")


class Recipe(Config):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    problems: tuple[ProblemSource, ...] = Field(min_length=1)
    teacher: TeacherConfig
    generate: GenerateConfig = GenerateConfig()
    verify: VerifyConfig = VerifyConfig()
    curate: CurateConfig = CurateConfig()
    distill: DistillConfig
    eval: EvalConfig = EvalConfig()
    push: PushConfig = PushConfig()
    push_traces: PushTracesConfig = PushTracesConfig()

    @model_validator(mode="after")
    def _held_out_is_held_out(self) -> Recipe:
        if "pico" in self.eval.suites and self.eval.held_out is None:
            raise ValueError("eval.held_out: the suite 'pico' needs its problems")
        if self.eval.held_out is not None and self.eval.held_out.split != "held_out":
            raise ValueError("eval.held_out.split: must be 'held_out'")
        return self


# --- reading ----------------------------------------------------------------------------------------------------------

M = TypeVar("M", bound=BaseModel)


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge, override (`a.b=value`, value parsed as YAML) and validate a recipe. Raises RecipeError."""
    tree = _read_tree(path)
    for text in overrides:
        _apply_override(tree, text)
    return parse(Recipe, tree, where=path)


def load_student(path: Path, sft_overrides: Mapping[str, Any] | None = None) -> StudentConfig:
    """Read one student file of the zoo, with `sft_overrides` laid over its `sft` settings. Raises RecipeError."""
    tree = _read_tree(path)
    if sft_overrides:
        tree = _merged(tree, {"sft": dict(sft_overrides)})
    return parse(StudentConfig, tree, where=path)


def parse(model: type[M], tree: Any, *, where: Path | str) -> M:
    """Validate `tree` as `model`; the first fault becomes a RecipeError with file, dotted field and what is allowed."""
    try:
        return model.model_validate(tree)
    except ValidationError as exc:
        raise _translated(exc, model, where) from exc


class _UniqueKeys(yaml.SafeLoader):
    """YAML as usual, but a key that is given twice is a fault: the first value would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = path.resolve() if seen else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise RecipeError(f"cannot be read ({getattr(exc, 'strerror', None) or exc})", where=path) from exc
    try:
        tree = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as exc:
        raise RecipeError(f"not valid YAML: {exc}", where=path) from exc
    if not isinstance(tree, dict):
        raise RecipeError(f"must be a mapping, got {type(tree).__name__}", where=path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise RecipeError(f"must be a path, got {parent!r}", where=path, field="extends")
    parent_path = (path.parent / parent).resolve()
    if parent_path in (*seen, path.resolve()):
        raise RecipeError(f"{parent!r} extends this file again", where=path, field="extends")
    return _merged(_read_tree(parent_path, (*seen, path.resolve())), tree)


def _merged(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both and _same_kind(result[key], value) else value
    return result


def _same_kind(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Whether both describe the same thing: a teacher of another backend shares no settings with its parent's."""
    return all(tag not in above or above[tag] == below.get(tag) for tag in ("backend", "kind"))


def _apply_override(tree: dict[str, Any], text: str) -> None:
    dotted, equals, raw = text.partition("=")
    if not equals or not dotted:
        raise RecipeError(f"must be a.b=value, got {text!r}", where="--set")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as exc:
        raise RecipeError(f"{raw!r} is not valid YAML", where="--set", field=dotted) from exc
    *parents, last = dotted.split(".")
    node: Any = tree
    for name in parents:
        node = _step(node, name, dotted, create=True)
    if isinstance(node, list):
        _step(node, last, dotted, create=False)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError("goes through a plain value", where="--set", field=dotted)


def _step(node: Any, name: str, dotted: str, *, create: bool) -> Any:
    if isinstance(node, dict):
        return node.setdefault(name, {}) if create else node[name]
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise RecipeError(f"index {name!r} is not in 0..{len(node) - 1}", where="--set", field=dotted)
        return node[int(name)]
    raise RecipeError("goes through a plain value", where="--set", field=dotted)


def _translated(exc: ValidationError, model: type[BaseModel], where: Path | str) -> RecipeError:
    fault = exc.errors()[0]
    loc = [str(part) for part in fault["loc"]]
    message, got = fault["msg"], fault.get("input")
    if fault["type"] == "extra_forbidden":
        message = f"unknown key; {nearest(loc[-1], _keys_beside(model, fault['loc']))}"
    elif fault["type"] == "missing":
        message = "required, but not given"
    elif fault["type"] == "value_error":
        message = message.removeprefix("Value error, ")
    elif not isinstance(got, (dict, list)):
        message = f"{message}, got {got!r}"
    return RecipeError(message, where=where, field=".".join(loc))


def _keys_beside(model: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    """The allowed keys at the place of an unknown one: walk the JSON schema, taking a union's member by its tag."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})

    def resolved(node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            node = definitions[node["$ref"].rsplit("/", 1)[1]]
        return node

    node = schema
    for part in loc[:-1]:
        node = resolved(node)
        mapping = node.get("discriminator", {}).get("mapping", {})
        if isinstance(part, int):
            node = node.get("items", {})
        elif part in mapping:
            node = {"$ref": mapping[part]}
        else:
            node = node.get("properties", {}).get(part, {})
            if "allOf" in node:
                node = node["allOf"][0]
            for option in node.get("anyOf", ()):
                if "$ref" in option:
                    node = option
    return set(resolved(node).get("properties", {}))
