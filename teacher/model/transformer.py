"""The whole model, for training and scoring whole sequences; generation with the latent cache is `teacher.engine`.

Parameter names are those of Hugging Face `deepseek_v3` checkpoints, except that an MoE layer's experts are stacked; the
MTP module is `model.layers.<num_hidden_layers>`.

The forward pass has static shapes, no data-dependent control flow and no host synchronisation (with the `grouped` or
`dense` experts), so it compiles as one graph and can be captured in a CUDA graph. Build on a device with
`with torch.device(...)`, then call `teacher.model.initialise.initialise`.

Shape legend: B sequences, T positions, D hidden, V vocabulary, L MoE layers (MTP's last), E routed experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from teacher.model.config import DeepseekV3Config
from teacher.model.experts import ExpertsKind
from teacher.model.layers import DecoderLayer, DeepseekMoE, MoEStatistics, MTPLayer
from teacher.model.norm import RMSNorm
from teacher.model.rope import RotaryTable
from teacher.model.router import Router


class Output(NamedTuple):
    """`logits_BTV[:, i]` predicts token i+1, `mtp_logits_BTV[:, i]` token i+2 (None without MTP).

    `load_LE`: tokens sent to each expert, FP32, in the order of `DeepseekV3.routers()`. `balance_loss`: sequence-wise
    auxiliary loss summed over MoE layers, before the factor alpha. Both empty or zero in a model without MoE layers.
    """

    logits_BTV: Tensor
    mtp_logits_BTV: Tensor | None
    load_LE: Tensor
    balance_loss: Tensor


class Trunk(nn.Module):
    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            (DecoderLayer if index < config.num_hidden_layers else MTPLayer)(config, index)
            for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DeepseekV3(nn.Module):
    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryTable(config)

    def forward(
        self,
        input_ids_BT: Tensor,
        *,
        next_ids_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        attention_mask_B1TT: Tensor | None = None,
        experts: ExpertsKind = "sorted",
        with_mtp: bool = True,
    ) -> Output:
        """Logits for every position of whole sequences.

        `next_ids_BT` are the tokens that follow each position, for the MTP module; by default the input shifted left,
        whose last column repeats the last token (its prediction means nothing: leave the last positions out of the
        loss). `position_ids_BT` and `attention_mask_B1TT` (bool, True = may attend) are for packed or padded rows;
        without a mask attention is causal.
        """
        rotation = self.rotary(input_ids_BT.shape[1], position_ids_BT)
        hidden = self.model.embed_tokens(input_ids_BT)
        statistics: list[MoEStatistics] = []
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            hidden, seen = layer(hidden, rotation, attention_mask_B1TT, experts)
            statistics += [seen] if seen is not None else []
        hidden = self.model.norm(hidden)
        mtp_logits = None
        if with_mtp and self.config.num_nextn_predict_layers:
            if next_ids_BT is None:
                next_ids_BT = torch.cat((input_ids_BT[:, 1:], input_ids_BT[:, -1:]), dim=1)
            embedding = self.model.embed_tokens(next_ids_BT)
            mtp = self.model.layers[self.config.num_hidden_layers]
            mtp_hidden, seen = mtp.predict(hidden, embedding, rotation, attention_mask_B1TT, experts)
            statistics += [seen] if seen is not None else []
            mtp_logits = self.lm_head(mtp_hidden)
        if statistics:
            load = torch.stack([seen.load_E for seen in statistics])
            balance = torch.stack([seen.balance_loss for seen in statistics]).sum()
        else:
            load, balance = hidden.new_zeros(0, self.config.n_routed_experts), hidden.new_zeros(())
        return Output(self.lm_head(hidden), mtp_logits, load, balance)

    def routers(self, *, with_mtp: bool = True) -> list[Router]:
        """Routers in the order of `Output.load_LE`."""
        count = self.config.num_layers if with_mtp else self.config.num_hidden_layers
        mlps = [layer.mlp for layer in self.model.layers[:count]]
        return [mlp.gate for mlp in mlps if isinstance(mlp, DeepseekMoE)]
