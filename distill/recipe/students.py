"""Students: their bases, and how they are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from distill.licences import Licence
from distill.recipe.config import Config, Distinct, each_once

Method = Literal["distilled", "direct"]  # learns the whole trace; the bare answer, as a control


class SFTConfig(Config):
    """Supervised fine-tuning on traces: loss on the completion only."""

    lr: float = Field(gt=0, lt=1)
    num_epochs: float = Field(3.0, gt=0)
    batch_size: int = Field(64, ge=1, description="examples an optimizer step, over all devices")
    micro_batch_size: int = Field(64, ge=1, description="examples a forward pass on one device")
    max_length: int = Field(32_768, ge=16, description="tokens of the student's; no example is ever cut")
    too_long: Literal["error", "drop"] = Field("error", description="what happens to examples beyond max_length")
    special_tokens_in_text: Literal["text", "refuse"] = Field(
        "text", description="special tokens spelled out in a question or completion: learned as plain text, or an error"
    )
    train_on: Literal["last", "all"] = Field("last", description="assistant turns of a conversation that are learned")
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


class PublishedScore(Config):
    """A base's score on a benchmark, as its makers published it."""

    value: float = Field(ge=0, le=100, description="percent")
    shots: int | None = Field(None, ge=0, description="worked examples in the prompt; none: its source does not say")
    source: str = Field(min_length=1, description="where it was published")


class StudentConfig(Config):
    """One student of the zoo: a base and how it learns."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    base: str = Field(description="checkpoint folder, GGUF file, or a repository of the Hub")
    revision: str = "main"
    architecture: Literal["qwen2", "qwen3", "llama"]
    num_parameters: int = Field(ge=1, description="of the base, embeddings counted once where tied")
    context_length: int | None = Field(None, ge=16, description="positions that the base was made for")
    licence: Licence = Field(description="the base's, by its identifier on the Hub")
    chat_template: str | None = Field(None, description="template file to bake in; none: the base's own")
    eos_token: str | None = Field(None, description="end of turn, where the base's own EOS is another token")
    pad_token: str | None = Field(
        None,
        description="padding: a token of the vocabulary, or `add` for a new one; none: the base's, or a reserved one",
    )
    published: dict[str, PublishedScore] = Field(
        default_factory=dict, description="scores of the base before it learns, by benchmark"
    )
    sft: SFTConfig

    @model_validator(mode="after")
    def _examples_fit_the_context(self) -> StudentConfig:
        length, context = self.sft.max_length, self.context_length
        if context is not None and length > context and self.sft.rope_theta is None:
            raise ValueError(f"sft.max_length: {length} is past context_length {context}; set sft.rope_theta with it")
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that the trained weights depend on.

        The base and the template count by their content, wherever they lie; what is only said of a student, and how
        often training is saved, changes no weight.
        """
        said = ("name", "base", "revision", "num_parameters", "context_length", "licence", "published", "chat_template")
        settings = self.model_dump(mode="json", exclude=set(said))
        del settings["sft"]["save_steps"]
        return settings


class ChosenStudent(Config):
    """A student of a recipe that has settings of its own; what it leaves out is the section's."""

    name: str = Field(description="a name in students/zoo, or the path of a student file")
    methods: Distinct[Method] | None = None
    overrides: dict[str, Any] = Field(default_factory=dict, description="laid over the section's overrides")


class Choice(NamedTuple):
    """A student of a recipe with all that holds for it."""

    name: str
    methods: tuple[Method, ...]
    overrides: dict[str, Any]


def _each_name_once(students: tuple[str | ChosenStudent, ...]) -> tuple[str | ChosenStudent, ...]:
    each_once(tuple(student if isinstance(student, str) else student.name for student in students))
    return students


class DistillConfig(Config):
    students: Annotated[tuple[str | ChosenStudent, ...], Field(min_length=1), AfterValidator(_each_name_once)] = Field(
        description="names in students/zoo, or paths of student files, or one of these with settings of its own"
    )
    methods: Distinct[Method] = ("distilled",)
    overrides: dict[str, Any] = Field(default_factory=dict, description="laid over every student's sft settings")
    num_workers: int = Field(1, ge=1, description="students trained side by side, each in a process of its own")

    @property
    def choices(self) -> list[Choice]:
        """Every student, in the order of the recipe."""
        each = [ChosenStudent(name=student) if isinstance(student, str) else student for student in self.students]
        return [Choice(one.name, one.methods or self.methods, {**self.overrides, **one.overrides}) for one in each]
