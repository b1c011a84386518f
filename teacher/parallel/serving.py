"""The engine over ranks: each decodes sequences of its own (data parallel), the routed experts lie spread over all.

The deployment of DeepSeek-V3 s.3.4: attention and shared expert are on every rank, a rank holds some of the routed
experts, and every layer's tokens travel to theirs and back. So all ranks pass through their layers together. Before a
step they agree how many tokens the fullest has: few go through small inboxes, and may be a CUDA graph; more, as where
any of them reads a prompt, through large ones. A rank that has nothing to compute serves its experts to the others.

Steps of many tokens may go in halves (s.3.4.1): while one half's tokens travel, the device computes the other's
attention, shared expert and routed experts. What travels has a stream of its own:

    compute   attention A   attention B    shared A, experts A   shared B, experts B   attention A of the next layer
    travel                  to experts A   to experts B          back A                back B

With `Rebalancing` experts move while the engines serve (`teacher.parallel.placement.rebalance`): every layer has a
placement of its own, and all share the inboxes.

Shape legend: M rows, D hidden, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from teacher.engine.decode_graph import padded
from teacher.engine.step import Step, halved
from teacher.kernels.moe.route_reference import Choice
from teacher.model.block_checkpoint import load_blocks
from teacher.model.config import DeepseekV3Config, read_config
from teacher.models.latent.fp8_products import Fp8Products, Input
from teacher.models.latent.model import LatentModel
from teacher.models.latent.weights import fuse_entries
from teacher.parallel.exchange.fixed_places import FixedPlaces, received_experts, routed_experts_over_ranks
from teacher.parallel.groups import Ranks, lost_peers
from teacher.parallel.placement.placement import Placement
from teacher.parallel.placement.rebalance import Balancer, PlacedMoEWeights, Rebalancing, placed

_AGREE_S = 300.0


class TransferStream:
    """A stream beside the one that computes; on a CPU all is one behind the other."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, run: Callable[[], Any]) -> Transfer:
        """`run` once all that computes so far is done. What it reads must be kept until `Transfer.end`."""
        if self._stream is None:
            return Transfer(run(), None)
        # What travels is computed first, and inboxes that were computed with have been read: to peers, this rank's
        # arrival at the barrier within the transfer means both.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result, event = run(), torch.cuda.Event()
            event.record()
        return Transfer(result, event)


class Transfer(NamedTuple):
    result: Any
    arrival: torch.cuda.Event | None

    def end(self) -> Any:
        """Let what computes from here on wait for it; returns its result."""
        if self.arrival is not None:
            torch.cuda.current_stream().wait_event(self.arrival)
        return self.result


class DispatchInFlight(NamedTuple):
    """A half's tokens on their way to a layer's experts, with what they were made of."""

    form: FixedPlaces
    x: Input
    choice: Choice
    transfer: Transfer  # of `ExpertInputs`


class SpreadProducts(Fp8Products):
    """`teacher.models.latent.products.Products` whose routed experts are those of all ranks: `experts` is collective.

    A step's fullest rank has up to `few` rows, or up to `many`, and then goes in halves if `in_halves`. Choices add to
    their layer's `load_E` if `counts`.
    """

    def __init__(
        self,
        config: DeepseekV3Config,
        ranks: Ranks,
        *,
        slots_per_rank: int,
        few: int,
        many: int,
        in_halves: bool,
        counts: bool,
    ) -> None:
        super().__init__(config)
        self._counts = counts
        kind = FixedPlaces  # over exchanges: NVLink ends at the node
        if ranks.device.type == "cuda" and ranks.ranks_per_node == ranks.num_ranks:
            from teacher.parallel.exchange.symmetric_places import SymmetricFixedPlaces

            kind = SymmetricFixedPlaces
        sized = {
            "slots_per_rank": slots_per_rank, "hidden": config.hidden_size, "per_token": config.num_experts_per_tok
        }  # fmt: skip
        self._few = kind(ranks, **sized, max_tokens=few)
        # A cut at whole sequences leaves the halves a row apart.
        many_of_each = [many // 2 + 1] * 2 if in_halves else [many]
        self._many = [kind(ranks, **sized, max_tokens=most) for most in many_of_each]
        self.forms = [self._few]  # of the next step, one for each of its parts
        self._transfers = TransferStream(ranks.device)

    def choose(self, most_rows: int) -> bool:
        """Choose the next step's inboxes by the rows of its fullest rank; tell whether they are the small ones."""
        is_few = most_rows <= self._few.max_tokens
        self.forms = [self._few] if is_few else self._many
        return is_few

    def serve(self, weights: PlacedMoEWeights) -> None:
        """The others' tokens of one layer, and none of this rank's."""
        device, (few, *_) = weights.bias_E.device, self.forms
        nothing = torch.empty(0, few.hidden, dtype=torch.bfloat16, device=device)
        indices = torch.empty(0, few.per_token, dtype=torch.int32, device=device)
        received = [form.dispatch(nothing, indices, indices.float(), weights.tables) for form in self.forms]
        for form, of_form in zip(self.forms, received, strict=True):
            form.combine(received_experts(form, of_form, weights.experts), of_form)

    def experts(self, x: Input, weights: PlacedMoEWeights) -> Tensor:
        (form,) = self.forms
        choice = self._choice(x, weights)
        routed_MD = routed_experts_over_ranks(
            form, x.quantised, choice.indices_NK, choice.weights_NK, weights.experts, weights.tables
        )
        return routed_MD + self.mlp(x, weights.shared)

    def send(self, x: Input, weights: PlacedMoEWeights, form: FixedPlaces) -> DispatchInFlight:
        """Tokens of one half set out for their experts."""
        choice = self._choice(x, weights)
        given = x.quantised, choice.indices_NK, choice.weights_NK, weights.tables
        return DispatchInFlight(form, x, choice, self._transfers.begin(lambda: form.dispatch(*given)))

    def arrive(self, sent: DispatchInFlight, weights: PlacedMoEWeights) -> Callable[[], Tensor]:
        """They are computed and set out for home; the result waits for them, [M, D]."""
        shared_MD = self.mlp(sent.x, weights.shared)
        received = sent.transfer.end()
        out_QD = received_experts(sent.form, received, weights.experts)
        transfer = self._transfers.begin(lambda: sent.form.combine(out_QD, received))
        read = [sent, received, out_QD]

        def home() -> Tensor:
            routed_MD: Tensor = transfer.end()
            read.clear()  # not before: the stream of transfers read them, which the allocator knows nothing of
            return routed_MD + shared_MD

        return home

    def _choice(self, x: Input, weights: PlacedMoEWeights) -> Choice:
        choice = super()._choice(x, weights)
        if self._counts:
            weights.load_E.add_(choice.load_E)
        return choice


class SpreadModel(LatentModel):
    """A `LatentModel` that takes steps in halves where its products say so."""

    products: SpreadProducts

    def hidden(self, step: Step, entries_LPSE: Tensor) -> Tensor:
        if len(self.products.forms) == 1:
            return super().hidden(step, entries_LPSE)
        # See the module's table: where one half's tokens set out, the other half's attention follows.
        halves = halved(step, self.plan)
        x_MD = [self.weights.embedding[half.token_ids_M] for half in halves]
        branches: list[Callable[[], Tensor] | None] = [None, None]
        for layer, cache_PSE in zip(self.weights.layers, entries_LPSE, strict=True):
            # Attention of both halves; each one's tokens set out as soon as they are normed.
            sent = []
            for number, half in enumerate(halves):
                branch_MD = None if (branch := branches[number]) is None else branch()
                x_MD[number], normed = self._attended(layer, x_MD[number], branch_MD, half, cache_PSE)
                if isinstance(layer.mlp, PlacedMoEWeights):
                    sent.append(self.products.send(normed, layer.mlp, self.products.forms[number]))
                else:
                    branches[number] = _ready(self.products.mlp(normed, layer.mlp))
            if isinstance(layer.mlp, PlacedMoEWeights):
                # Experts of both halves; what comes home is waited for only where the next layer's norm reads it.
                branches = [self.products.arrive(of_half, layer.mlp) for of_half in sent]
        ends = [x if branch is None else x + branch() for x, branch in zip(x_MD, branches, strict=True)]
        return self._norm(torch.cat(ends), self.weights.norm)


def _ready(result: Tensor) -> Callable[[], Tensor]:
    return lambda: result


class RanksInStep:
    """`teacher.engine.engine.Lockstep` over gloo. `balancer`, if any: what moves experts between two steps."""

    def __init__(
        self,
        products: SpreadProducts,
        layers: Sequence[PlacedMoEWeights],
        group: dist.ProcessGroup,
        balancer: Balancer | None,
    ) -> None:
        self.is_on = True
        self.balancer = balancer
        self._products, self._layers, self._group = products, layers, group

    def wait(self, num_waiting: int, is_closing: bool) -> tuple[int, bool]:
        most_waiting, stay = self._most(num_waiting, not is_closing)
        return most_waiting, not stay

    def begin(self, num_rows: int, num_warm_ups: int) -> bool:
        most_rows, most_warm_ups = self._most(num_rows, num_warm_ups)
        self.is_on = most_rows > 0
        # Between two steps no rank is in a layer: only here may experts move.
        if self.is_on and self.balancer is not None:
            self.balancer.before_step()
        is_few = self._products.choose(most_rows)
        # Layers are collective: a rank with nothing of its own takes part as often as the others pass through them.
        missing = most_warm_ups - num_warm_ups if is_few else 0
        for _ in range(missing + (self.is_on and not num_rows)):
            for layer in self._layers:
                self._products.serve(layer)
        return is_few

    def _most(self, *numbers: int) -> list[int]:
        most = torch.tensor(numbers)
        with lost_peers(self._group):
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self._group)
        return most.tolist()


def load_spread(
    folder: Path,
    ranks: Ranks,
    *,
    batch_size: int,
    max_step_tokens: int,
    num_redundant: int = 0,
    rebalancing: Rebalancing | None = None,
    in_halves: bool = False,
) -> tuple[SpreadModel, RanksInStep]:
    """A checkpoint folder's model in FP8, of whose routed experts this rank reads its own alone. Collective.

    Experts lie in order at first, `num_redundant` of them twice or more often (`Placement.contiguous`), and with
    `rebalancing` move by their loads. `in_halves`: steps of many tokens compute one half while the other travels. The
    numbers are the engine's; all that is given is the same on all ranks. Raises CheckpointError as `load_blocks`,
    DataError for experts that do not divide among the ranks.
    """
    placement = Placement.contiguous(
        num_experts=read_config(folder).n_routed_experts, num_redundant=num_redundant,
        num_ranks=ranks.num_ranks, ranks_per_node=ranks.ranks_per_node,
    )  # fmt: skip
    config, entries = load_blocks(folder, ranks.device, experts=placement.of_rank(ranks.rank))
    weights, layers = placed(fuse_entries(config, entries), placement)
    products = SpreadProducts(
        config, ranks, slots_per_rank=placement.slots_per_rank, few=padded(max(batch_size, 128)), many=max_step_tokens,
        in_halves=in_halves, counts=rebalancing is not None,
    )  # fmt: skip
    # Captures and compilations lie between two agreements.
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=_AGREE_S))
    balancer = None
    if rebalancing is not None:
        balancer = Balancer(rebalancing, layers, placement, ranks, group, num_groups=config.n_group)
    return SpreadModel(weights, products=products), RanksInStep(products, layers, group, balancer)
