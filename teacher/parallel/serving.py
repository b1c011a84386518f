"""The engine over ranks: each decodes sequences of its own (data parallel), the routed experts lie spread over all.

The deployment of DeepSeek-V3 s.3.4: attention and shared expert are on every rank, a rank holds some of the routed
experts, and every layer's tokens travel to theirs and back. So all ranks pass through their layers together. Before a
step they agree how many tokens the fullest has: few go through small inboxes, and may be a CUDA graph; more, as where
any of them reads a prompt, through large ones. A rank that has nothing to compute serves its experts to the others.

Shape legend: M rows, D hidden, K experts a token.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from teacher.kernels.experts import ExpertWeights
from teacher.kernels.quantise import Quantised
from teacher.kernels.route import Choice
from teacher.model.block_checkpoint import load_blocks
from teacher.model.config import DeepseekV3Config, read_config
from teacher.parallel.dispatch import Exchange
from teacher.parallel.fixed_places import FixedPlaces, routed_experts_over_ranks
from teacher.parallel.groups import Ranks, lost_peers
from teacher.parallel.placement import Placement
from teacher.parallel.wire import Wire
from teacher.serve.decode_graph import padded
from teacher.serve.fp8_products import Fp8Products
from teacher.serve.latent_model import LatentModel
from teacher.serve.weights import Fp8MoEWeights, fuse_entries

_AGREE_S = 300.0


class SpreadProducts(Fp8Products):
    """`teacher.serve.products.Products` whose routed experts are those of all ranks: `experts` is collective."""

    def __init__(self, config: DeepseekV3Config, ranks: Ranks, placement: Placement, few: int, many: int) -> None:
        super().__init__(config)
        exchange = Exchange(ranks, placement, wire=Wire(out="fp8", back="bf16"))
        kind = FixedPlaces
        if ranks.device.type == "cuda":
            from teacher.parallel.symmetric_places import SymmetricFixedPlaces

            kind = SymmetricFixedPlaces
        sized = {"hidden": config.hidden_size, "per_token": config.num_experts_per_tok}
        self._few, self._many = (kind(exchange, **sized, max_tokens=most) for most in (few, many))
        self._form = self._few

    def choose(self, most_rows: int) -> bool:
        """For the next step, whose fullest rank has so many rows; whether they go through the small inboxes."""
        self._form = self._few if most_rows <= self._few.max_tokens else self._many
        return self._form is self._few

    def serve(self, experts: ExpertWeights) -> None:
        """The others' tokens of one layer, and none of this rank's."""
        hidden, per_token, device = self._form.hidden, self._form.per_token, experts.down_EDI.device
        nothing = torch.empty(0, hidden, dtype=torch.bfloat16, device=device)
        indices = torch.empty(0, per_token, dtype=torch.int32, device=device)
        routed_experts_over_ranks(self._form, nothing, indices, indices.float(), experts)

    def _routed(self, x: Quantised, choice: Choice, weights: ExpertWeights) -> Tensor:
        return routed_experts_over_ranks(self._form, x, choice.indices_NK, choice.weights_NK, weights)


class RanksInStep:
    """`teacher.serve.engine.Lockstep` over gloo."""

    def __init__(self, ranks: Ranks, products: SpreadProducts, experts: list[ExpertWeights]) -> None:
        self.is_on = True
        self._products, self._experts = products, experts
        # Captures and compilations lie between two agreements.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=_AGREE_S))

    def begin(self, num_rows: int, num_warm_ups: int) -> bool:
        agreed = torch.tensor([num_rows, num_warm_ups])
        with lost_peers(self._group):
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._group)
        most_rows, most_warm_ups = agreed.tolist()
        self.is_on = most_rows > 0
        is_few = self._products.choose(most_rows)
        missing = most_warm_ups - num_warm_ups if is_few else 0
        for _ in range(missing + (self.is_on and not num_rows)):
            for experts in self._experts:
                self._products.serve(experts)
        return is_few


def load_spread(
    folder: Path, ranks: Ranks, *, batch_size: int, max_step_tokens: int, placement: Placement | None = None
) -> tuple[LatentModel, RanksInStep]:
    """A checkpoint folder's model in FP8, of whose routed experts this rank reads its own alone. Collective.

    `placement` says which; None: equal shares in order. The numbers are the engine's, and the same on all ranks.
    Raises CheckpointError as `load_blocks`, DataError for experts that do not divide among the ranks.
    """
    placement = placement or Placement.contiguous(
        num_experts=read_config(folder).n_routed_experts, num_ranks=ranks.num_ranks, ranks_per_node=ranks.ranks_per_node
    )
    config, entries = load_blocks(folder, ranks.device, experts=placement.of_rank(ranks.rank))
    weights = fuse_entries(config, entries)
    products = SpreadProducts(config, ranks, placement, padded(max(batch_size, 128)), max_step_tokens)
    experts = [layer.mlp.experts for layer in weights.layers if isinstance(layer.mlp, Fp8MoEWeights)]
    return LatentModel(weights, products=products), RanksInStep(ranks, products, experts)
