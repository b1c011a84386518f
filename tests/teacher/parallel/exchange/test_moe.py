"""A whole model whose experts are spread over processes, and what the layer refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from teacher.model.config import DeepseekV3Config
from teacher.model.experts import Experts
from teacher.model.initialise import initialise
from teacher.model.router import Routing
from teacher.model.transformer import DeepseekV3
from teacher.parallel.exchange.dispatch import Exchange
from teacher.parallel.exchange.moe import ExpertParallelExperts, shard_experts
from teacher.parallel.exchange.wire import Wire
from teacher.parallel.groups import Ranks
from teacher.parallel.placement.placement import Placement
from tests.teacher.parallel.process_ranks import run_ranks

FP32 = Wire(out="fp32", back="fp32")


def config(**changes: Any) -> DeepseekV3Config:
    fields = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
        "num_hidden_layers": 3, "num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
        "topk_group": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 16,
    }  # fmt: skip
    return DeepseekV3Config.model_validate(fields | changes)


def model() -> DeepseekV3:
    return initialise(DeepseekV3(config()), std=0.3, generator=torch.Generator().manual_seed(0))


def ids(rank: int) -> torch.Tensor:
    """Ranks have batches of unlike sizes."""
    return torch.randint(0, 32, (1 + rank, 8), generator=torch.Generator().manual_seed(rank))


def loss_of(whole: DeepseekV3, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = whole(given)
    return out.logits_BTV.detach(), out.logits_BTV.square().sum() + out.mtp_logits_BTV.square().sum()


def spread(ranks: Ranks) -> dict[str, Any]:
    placement = Placement.contiguous(num_experts=8, num_ranks=ranks.num_ranks)
    exchange = Exchange(ranks, placement, wire=FP32)
    sharded = shard_experts(model(), exchange)
    logits, loss = loss_of(sharded, ids(ranks.rank))
    loss.backward()
    with torch.no_grad():
        decoded = sharded(ids(ranks.rank)).logits_BTV
    gradients = {name: parameter.grad for name, parameter in sharded.named_parameters()}
    return {"logits": logits, "gradients": gradients, "decoded": decoded}


def test_a_sharded_model_is_the_model(tmp_path) -> None:
    of_ranks = run_ranks(spread, 2, tmp_path)
    whole = model()
    experts: dict[str, torch.Tensor] = {}
    for rank, got in enumerate(of_ranks):
        whole.zero_grad()
        logits, loss = loss_of(whole, ids(rank))
        loss.backward()
        torch.testing.assert_close(got["logits"], logits, atol=1e-5, rtol=1e-5)  # FP32 sums in another order
        torch.testing.assert_close(got["decoded"], logits, atol=1e-5, rtol=1e-5)
        for name, parameter in whole.named_parameters():
            if ".experts." in name:
                experts[name] = experts.get(name, 0) + parameter.grad
            else:
                torch.testing.assert_close(got["gradients"][name], parameter.grad, atol=1e-3, rtol=1e-4)
    for name, summed in experts.items():  # an expert learns from the tokens of every rank
        spread_out = torch.cat([got["gradients"][name] for got in of_ranks])
        torch.testing.assert_close(spread_out, summed, atol=1e-3, rtol=1e-4)
    assert len(experts) == 2 * 3  # of two MoE layers and the MTP module's


def one_rank(**placed: Any) -> Exchange:
    ranks = Ranks(0, 1, 1, torch.device("cpu"), None, None, None)
    placement = Placement(
        **({"experts_S": tuple(range(8)), "num_experts": 8, "num_ranks": 1, "ranks_per_node": 1} | placed)
    )
    return Exchange(ranks, placement, wire=FP32)


def test_what_cannot_be_is_refused() -> None:
    exchange = one_rank()
    routing = Routing(torch.zeros(5, 3, dtype=torch.int64), torch.ones(5, 3), torch.ones(5, 8))
    with pytest.raises(ValueError, match="4 experts, but a placement of 8"):
        ExpertParallelExperts(Experts(config(n_routed_experts=4, n_group=1, topk_group=1)), exchange)
    with pytest.raises(ValueError, match="the placement is for 2 ranks"):
        Exchange(exchange.ranks, Placement.contiguous(num_experts=8, num_ranks=2))
    replicated = one_rank(experts_S=(*range(8), 0))
    with pytest.raises(ValueError, match="would drift apart"):
        ExpertParallelExperts(Experts(config()), replicated)(torch.zeros(5, 16), routing, "sorted")
