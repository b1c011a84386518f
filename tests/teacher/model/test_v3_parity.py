"""Parity with transformers' deepseek_v3, an implementation that we did not write, over a sweep of configs."""

import pytest
import torch
import transformers

from teacher.model.checkpoint import load_checkpoint, save_checkpoint
from teacher.model.rope import rotate
from tests.teacher.v3_models import random_model, tiny_config

YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
SWEEP = {
    "all": {},
    "no_q_lora": {"q_lora_rank": None},
    "no_yarn": {"rope_scaling": None},
    "yarn_40": {"rope_scaling": {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn_unequal_mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn_without_mscale": {"rope_scaling": {**YARN, "mscale": 0.0, "mscale_all_dim": 0.0}},
    "yarn_mscale_all_dim_alone": {"rope_scaling": {**YARN, "mscale": 0.0, "mscale_all_dim": 0.8}},
    "one_group": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    "all_groups": {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 5},
    "one_expert": {"num_experts_per_tok": 1, "topk_group": 1},
    "every_expert": {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 8},
    "gates_not_normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "two_shared_experts": {"n_shared_experts": 2},
    "no_dense_layer": {"first_k_dense_replace": 0},
    "all_dense": {"first_k_dense_replace": 3},
    "rope_in_halves": {"rope_interleave": False},
    "theta": {"rope_theta": 500.0},
    "one_head": {"num_attention_heads": 1, "v_head_dim": 16},
    "large_eps": {"rms_norm_eps": 0.1},
}


@pytest.fixture(scope="module", params=SWEEP, ids=list(SWEEP))
def pair(request, tmp_path_factory):
    """(our model, transformers' model), the latter read from our checkpoint folder in FP32."""
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(tiny_config(**SWEEP[request.param])).eval()
    save_checkpoint(model, folder, dtype=torch.float32)
    peer = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, peer


def test_logits_agree(pair):
    model, peer = pair
    ids = torch.randint(0, 64, (3, 50), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        ours, theirs = model(ids).logits_BTV, peer(ids).logits
    assert theirs.std() > 0.1  # the comparison is worth something
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["dense", "grouped"])
def test_other_forms_of_the_experts_agree_too(pair, kind):
    model, peer = pair
    if kind == "grouped" and (model.config.moe_intermediate_size % 4 or model.config.hidden_size % 4):
        pytest.skip("grouped_mm wants 16-byte rows")
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, experts=kind).logits_BTV, peer(ids).logits, atol=1e-4, rtol=0)


def test_our_loader_reads_what_transformers_saves(pair, tmp_path):
    model, peer = pair
    peer.config.num_nextn_predict_layers = 0  # transformers drops the MTP module
    peer.save_pretrained(tmp_path)
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(load_checkpoint(tmp_path)(ids).logits_BTV, model(ids).logits_BTV, atol=1e-6, rtol=0)


def test_mtp_equals_its_equations_written_out():
    """Eq. 21-23 of DeepSeek-V3 with transformers' own decoder layer as the Transformer block."""
    config = tiny_config()
    model = random_model(config).eval()
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(6))
    peer_config = transformers.DeepseekV3Config(**config.to_json())
    peer_config._attn_implementation = "eager"
    module = transformers.models.deepseek_v3.modeling_deepseek_v3
    block = module.DeepseekV3DecoderLayer(peer_config, config.num_hidden_layers).eval()
    mtp = model.model.layers[config.num_hidden_layers]
    block.load_state_dict({k: v for k, v in mtp.state_dict().items() if k in block.state_dict()})
    rotary = module.DeepseekV3RotaryEmbedding(peer_config)

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    with torch.no_grad():
        peer = transformers.DeepseekV3ForCausalLM(peer_config).eval()
        peer.load_state_dict({k: v for k, v in model.state_dict().items() if k in peer.state_dict()})
        hidden = peer.model(ids[:, :-1]).last_hidden_state
        embedded = torch.nn.functional.embedding(ids[:, 1:], model.model.embed_tokens.weight)
        joined = (
            torch.cat((norm(embedded, mtp.enorm.weight), norm(hidden, mtp.hnorm.weight)), -1) @ mtp.eh_proj.weight.T
        )
        length = joined.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        out = block(joined, attention_mask=mask, position_embeddings=rotary(joined, torch.arange(length)[None]))
        wanted = norm(out, mtp.shared_head.norm.weight) @ model.lm_head.weight.T
        got = model(ids).mtp_logits_BTV[:, :-1]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_mtp_sees_the_next_token_and_nothing_later():
    model = random_model(tiny_config()).eval()
    ids = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(7))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 64
    with torch.no_grad():
        moved = (model(ids).mtp_logits_BTV - model(changed).mtp_logits_BTV).abs().amax(-1)[0] > 1e-4
    assert moved.tolist() == [False] * 5 + [True] * 7


def test_padding_and_packing_by_mask_and_positions():
    model = random_model(tiny_config()).eval()
    first, second = torch.arange(5).view(1, 5), torch.arange(20, 29).view(1, 9)
    positions = torch.cat((torch.arange(5), torch.arange(9))).view(1, 14)
    document = torch.tensor([0] * 5 + [1] * 9)
    mask = ((document[:, None] == document) & torch.ones(14, 14, dtype=torch.bool).tril())[None, None]
    with torch.no_grad():
        packed = model(torch.cat((first, second), 1), position_ids_BT=positions, attention_mask_B1TT=mask).logits_BTV
        alone = torch.cat((model(first).logits_BTV, model(second).logits_BTV), dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_rotation_keeps_length_and_depends_on_distance_alone():
    generator = torch.Generator().manual_seed(8)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)
    angles = torch.outer(torch.arange(40.0), torch.tensor([1.0, 0.3, 0.1, 0.03]))

    def at(x, position):
        return rotate(x, angles[position].cos(), angles[position].sin(), interleave=True)

    assert at(q, 7).norm().item() == pytest.approx(q.norm().item(), rel=1e-6)
    products = [(at(q, offset + 11) * at(k, offset)).sum().item() for offset in range(20)]
    assert max(products) - min(products) < 1e-4
