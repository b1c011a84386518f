"""The parts of a model on each rank: pipeline stages, experts and replicas, as pure functions of three sizes.

`pp` ranks share the layers, `ep` ranks share each layer's experts, and `dp` copies of those `pp * ep` ranks share the
batch. Everything but the experts is on every rank of its stage, and every rank has sequences of its own: the ranks of
an expert group are replicas of the dense part. So a stage's attention is replicated `dp * ep` times and each expert
`dp` times, as in DeepSeek-V3's training (arXiv 2412.19437 s.3.2: PP16, EP64, ZeRO-1). Serving with data-parallel
attention and spread experts (s.3.4) is the same with one stage and one copy: `Layout(ep=n)`.

    rank = (stage rank * dp + copy) * ep + expert rank

Expert groups are neighbours, so that the most frequent exchanges stay within a node where `ep` fits one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from distill.errors import RecipeError
from distill.recipe import Config
from teacher.model.config import DeepseekV3Config
from teacher.parallel.exchange.wire import Form, Wire
from teacher.parallel.placement.placement import Placement

ScheduleName = Literal["1f1b", "zbv", "dualpipev"]
STAGES_PER_RANK: dict[ScheduleName, int] = {"1f1b": 1, "zbv": 2, "dualpipev": 2}


class Coordinates(NamedTuple):
    """Place of a rank: along the pipeline, among the copies, among the expert ranks."""

    pp: int
    dp: int
    ep: int


class Layout(Config):
    """Sizes of a layout. `dispatch` and `combine` are the forms of tokens and of sums between expert ranks
    (`teacher.parallel.exchange.wire`).

    >>> layout = Layout(pp=2, ep=2)
    >>> layout.coordinates(3), layout.stages_of(1), layout.placement(num_experts=8).of_rank(1)
    (Coordinates(pp=1, dp=0, ep=1), (1,), (4, 5, 6, 7))
    """

    pp: int = Field(1, ge=1, description="ranks that share the layers")
    ep: int = Field(1, ge=1, description="ranks that share a layer's experts")
    dp: int = Field(1, ge=1, description="copies of all that")
    schedule: ScheduleName = "1f1b"
    overlapped: bool = Field(
        True, description="dualpipev: a forward and a backward that it pairs hide each other's exchanges of tokens"
    )
    microbatches: int = Field(1, ge=1, description="parts of a rank's batch that are in the pipeline one after another")
    dispatch: Form = "fp8"
    combine: Literal["bf16", "fp32"] = "bf16"
    timeout_s: float = Field(50.0, gt=0, description="how long a rank waits for another before it takes it for lost")

    @property
    def num_ranks(self) -> int:
        return self.pp * self.dp * self.ep

    @property
    def num_replicas(self) -> int:
        """Ranks that hold a stage's dense part, each with sequences of its own."""
        return self.dp * self.ep

    @property
    def num_stages(self) -> int:
        return self.pp * STAGES_PER_RANK[self.schedule]

    @property
    def wire(self) -> Wire:
        return Wire(out=self.dispatch, back=self.combine)

    def coordinates(self, rank: int) -> Coordinates:
        stage_rank, replica = divmod(rank, self.num_replicas)
        return Coordinates(stage_rank, *divmod(replica, self.ep))

    def rank(self, pp: int, dp: int, ep: int) -> int:
        return (pp * self.dp + dp) * self.ep + ep

    def stages_of(self, pp: int) -> tuple[int, ...]:
        """Stages of the pipeline's rank `pp`: one, or in a V the one on the way out and the one on the way back."""
        return (pp,) if STAGES_PER_RANK[self.schedule] == 1 else (pp, self.num_stages - 1 - pp)

    def layers(self, stage: int, num_layers: int) -> range:
        """A stage's decoder layers, shared out as evenly as they go; an MTP module comes with the last ones."""
        return range(num_layers * stage // self.num_stages, num_layers * (stage + 1) // self.num_stages)

    def placement(self, num_experts: int) -> Placement:
        return Placement.contiguous(num_experts=num_experts, num_ranks=self.ep)

    def checked(self, *, num_ranks: int, rows_per_step: int, model: DeepseekV3Config, where: str) -> Layout:
        """This layout, if that many processes can train that model with it. Raises RecipeError naming the field."""
        faults = {
            "layout": self.num_ranks != num_ranks
            and f"pp {self.pp} x dp {self.dp} x ep {self.ep} are {self.num_ranks} processes, {num_ranks} were started",
            "layout.pp": self.num_stages > model.num_hidden_layers
            and f"{self.num_stages} stages ({self.schedule}) are more than {model.num_hidden_layers} layers",
            "layout.ep": model.n_routed_experts % self.ep
            and f"{model.n_routed_experts} experts do not divide among {self.ep} ranks",
            "layout.microbatches": rows_per_step % (self.num_replicas * self.microbatches)
            and f"rows_per_step {rows_per_step} does not divide among dp {self.dp} x ep {self.ep} x "
            f"{self.microbatches} micro-batches",
            "layout.schedule": self.microbatches < self.num_stages
            and f"{self.schedule} needs a micro-batch a stage, {self.num_stages}, got {self.microbatches}",
            "layout.dispatch": self.dispatch == "fp8"
            and model.hidden_size % 128
            and f"fp8 goes in tiles of 128, which do not divide hidden_size {model.hidden_size}; take bf16 or fp32",
        }
        for field, fault in faults.items():
            if fault:
                raise RecipeError(fault, where=where, field=field)
        return self
