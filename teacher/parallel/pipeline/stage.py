"""A rank's part of a V3 model: the layers of its stages, its share of their experts, and nothing else in memory.

The model is built without storage, its experts are cut to the rank's own, and only what the rank's stages hold is then
filled, under the names that the whole model has: from a generator that knows every weight by name, from a checkpoint
(`teacher.parallel.pipeline.weights`), or from another rank's. A model of any size fits where its parts do.

The MTP module belongs to the last stage. It needs the embedding, which the first stage holds: where those are on
different ranks the last one has a copy, whose gradients the optimizer adds to the first one's. The head is the last
stage's alone. In a V both ends are on one rank, as in DeepSeek-V3 s.3.2.1, and share the very same tensors.

Shape legend: B sequences of a micro-batch, T positions, D hidden, V vocabulary, L MoE layers, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from teacher.model.experts import ExpertsKind
from teacher.model.layers import DeepseekMoE, MoEStatistics, MTPLayer
from teacher.model.router import Router
from teacher.model.transformer import DeepseekV3
from teacher.parallel.exchange.dispatch import Exchange
from teacher.parallel.exchange.moe import shard_experts
from teacher.parallel.layout import Layout
from teacher.parallel.meshes import Meshes

EMBEDDING = "model.embed_tokens.weight"


class PipelineBlock(nn.Module):
    """A run of a model's layers; the first also embeds, the last also norms and predicts. Modules are the model's own.

    Takes token ids [B, T] or hidden states [B, T, D]; gives hidden states, or logits [B, T, V], or with an MTP module
    (logits, MTP logits), for which it must have the ids too. `load_LE` adds up the tokens sent to each expert in the
    order of `routers()`, and `balance` the sequence-wise loss, until `take_statistics`.
    """

    def __init__(self, model: DeepseekV3, layers: range, *, balance_weight: float, experts: ExpertsKind) -> None:
        super().__init__()
        trunk, depth = model.model, model.config.num_hidden_layers
        self.layers = nn.ModuleDict({str(index): trunk.layers[index] for index in layers})
        is_last = layers.stop == depth
        self.mtp: MTPLayer | None = trunk.layers[depth] if is_last and model.config.num_nextn_predict_layers else None
        self.is_first = layers.start == 0
        self.embed_tokens = trunk.embed_tokens if self.is_first or self.mtp is not None else None
        self.norm, self.lm_head = (trunk.norm, model.lm_head) if is_last else (None, None)
        self.rotary = model.rotary
        self.balance_weight, self.experts = balance_weight, experts
        self._seen: list[list[MoEStatistics]] = []

    def forward(self, given: Tensor, *, input_ids_BT: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        hidden_BTD = self.embed_tokens(given) if self.is_first else given
        rotation = self.rotary(hidden_BTD.shape[1], None)
        seen: list[MoEStatistics] = []
        for layer in self.layers.values():
            hidden_BTD, of_layer = layer(hidden_BTD, rotation, None, self.experts)
            seen += [] if of_layer is None else [of_layer]
        hidden_BTD = self._with_balance(hidden_BTD, seen)
        self._seen.append([MoEStatistics(*(part.detach() for part in one)) for one in seen])
        if self.lm_head is None:
            return hidden_BTD
        hidden_BTD = self.norm(hidden_BTD)
        logits_BTV = self.lm_head(hidden_BTD).float()  # under autocast too: the schedule was told what a stage gives
        if self.mtp is None:
            return logits_BTV
        assert input_ids_BT is not None
        return logits_BTV, self._predicted(self.mtp, hidden_BTD, input_ids_BT, rotation)

    def _predicted(self, mtp: MTPLayer, hidden_BTD: Tensor, ids_BT: Tensor, rotation: Any) -> Tensor:
        """Logits of the tokens after the next, as `DeepseekV3.forward` has them."""
        next_ids_BT = torch.cat((ids_BT[:, 1:], ids_BT[:, -1:]), dim=1)
        mtp_BTD, of_mtp = mtp.predict(hidden_BTD, self.embed_tokens(next_ids_BT), rotation, None, self.experts)
        if of_mtp is not None:
            mtp_BTD = self._with_balance(mtp_BTD, [of_mtp])
            self._seen[-1].append(MoEStatistics(*(part.detach() for part in of_mtp)))
        return self.lm_head(mtp_BTD).float()

    def _with_balance(self, hidden_BTD: Tensor, seen: list[MoEStatistics]) -> Tensor:
        if not seen or not self.balance_weight:
            return hidden_BTD
        loss = torch.stack([of_layer.balance_loss for of_layer in seen]).sum()
        return _WithLoss.apply(hidden_BTD, self.balance_weight * loss)

    def take_statistics(self) -> tuple[Tensor, Tensor] | None:
        """(load_LE, the balance loss summed over layers and micro-batches) since the last call; None without MoE."""
        seen, self._seen = [of_step for of_step in self._seen if of_step], []
        if not seen:
            return None
        load_LE = torch.stack([torch.stack([one.load_E for one in of_step]) for of_step in seen]).sum(dim=0)
        return load_LE, torch.stack([one.balance_loss for of_step in seen for one in of_step]).sum()

    def routers(self) -> list[Router]:
        layers = [*self.layers.values(), *([] if self.mtp is None else [self.mtp])]
        return [layer.mlp.gate for layer in layers if isinstance(layer.mlp, DeepseekMoE)]


class _WithLoss(torch.autograd.Function):
    """The hidden states as they are; on the way back `loss` gets the gradient that it would have in the sum."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return hidden_BTD.clone()  # a view could not be a stage's output: torch detaches that in place

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return grad_BTD, torch.ones_like(ctx.like)


def pipeline_blocks(
    model: DeepseekV3,
    layout: Layout,
    stages: Iterable[int],
    *,
    balance_weight: float = 0.0,
    experts: ExpertsKind = "sorted",
) -> list[PipelineBlock]:
    """The blocks of `stages`. Raises ValueError for more stages than layers."""
    depth = model.config.num_hidden_layers
    if layout.num_stages > depth:
        raise ValueError(f"{depth} layers make 1 to {depth} stages, got {layout.num_stages}")
    return [
        PipelineBlock(model, layout.layers(stage, depth), balance_weight=balance_weight, experts=experts)
        for stage in stages
    ]


def own_part(model: DeepseekV3, meshes: Meshes) -> DeepseekV3:
    """`model`, built without storage, with only this rank's experts in every MoE layer.

    Where one rank holds them all nothing is sent, and nothing rounded on the way.
    """
    config = model.config
    if meshes.layout.ep == 1:
        return model
    exchange = Exchange(meshes.experts, meshes.layout.placement(config.n_routed_experts), wire=meshes.layout.wire)
    return shard_experts(model, exchange)


def own_entries(model: DeepseekV3, layout: Layout, pp: int) -> list[str]:
    """Names, in the model's state, of the parameters and buffers that the pipeline's rank `pp` holds."""
    blocks = pipeline_blocks(model, layout, layout.stages_of(pp))
    held = {id(tensor) for block in blocks for tensor in [*block.parameters(), *block.buffers()]}
    return [name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in held]


def fill(model: DeepseekV3, names: Iterable[str], value: Callable[[str, tuple[int, ...]], Tensor]) -> None:
    """Give the entries `names` storage: `value(name, shape)`. The others stay without."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: value(name, shapes[name]) for name in names}, strict=False, assign=True)
