"""The training forward: compiles as one graph, trains, reports load; bias update and balance loss by definition."""

import pytest
import torch

from teacher.model.balance import sequence_balance_loss, update_bias
from teacher.model.config import DeepseekV3Config
from teacher.model.counts import count_parameters
from tests.teacher.v3_models import random_model, tiny_config


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "grouped"])
def test_forward_compiles_as_one_graph_and_equals_eager(kind):
    model = random_model(tiny_config(hidden_size=32, moe_intermediate_size=16)).to(torch.bfloat16)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: model(x, experts=kind), fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(ids), model(ids, experts=kind), strict=True):
        torch.testing.assert_close(got, wanted)


def test_every_parameter_gets_a_gradient():
    model = random_model(tiny_config())
    out = model(torch.arange(24).view(2, 12), experts="dense")
    (out.logits_BTV.square().mean() + out.mtp_logits_BTV.square().mean() + out.balance_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_load_counts_every_choice_once():
    config = tiny_config()
    out = random_model(config)(torch.arange(24).view(2, 12))
    assert out.load_LE.shape == (3, config.n_routed_experts)  # two MoE layers and the MTP module's
    assert out.load_LE.sum(dim=1).tolist() == [24.0 * config.num_experts_per_tok] * 3


@pytest.mark.slow
def test_bias_update_moves_load_towards_the_mean():
    model = random_model(tiny_config())
    ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = model(ids).load_LE
        routers = model.routers()
        bias = routers[0].e_score_correction_bias.clone()
        update_bias(routers, before, 0.001)
        step = routers[0].e_score_correction_bias - bias
        torch.testing.assert_close(step, 0.001 * torch.sign(before[0].mean() - before[0]))
        for _ in range(400):
            update_bias(routers, model(ids).load_LE, 0.001)
        after = model(ids).load_LE
    spread = [(load.max(dim=1).values / load.mean(dim=1)).mean() for load in (before, after)]
    assert spread[1] < spread[0]


def test_balance_loss_is_one_when_even_and_grows_with_concentration():
    even = torch.full((2, 8, 4), 0.5)
    everywhere = torch.arange(16).view(2, 8, 1) % 4
    assert sequence_balance_loss(even, everywhere).item() == pytest.approx(1.0)
    peaked = torch.full((2, 8, 4), 0.01)
    peaked[..., 0] = 0.97
    assert sequence_balance_loss(peaked, torch.zeros_like(everywhere)).item() == pytest.approx(4 * 0.97)


def test_published_sizes_of_deepseek_v3():
    v3 = DeepseekV3Config(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=3,
        num_nextn_predict_layers=1,
    )
    counts = count_parameters(v3)
    assert round(counts.total / 1e9) == 671
    assert round(counts.active / 1e9) in (37, 38)  # the paper says 37B; with the embedding it is 37.6B
    assert (
        round(counts.mtp_total / 1e9, 1) == 11.6
    )  # the README of the weights: 14B with embedding and head of 0.93B each
