"""A whole model whose experts are spread over processes, and what the layer refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from teacher.model.config import DeepseekV3Config
from teacher.model.experts import Experts
from teacher.model.initialise import initialise
from teacher.model.router import Routing
from teacher.model.transformer import DeepseekV3
from teacher.parallel.dispatch import Exchange
from teacher.parallel.groups import Ranks
from teacher.parallel.low_latency import LowLatency
from teacher.parallel.moe import ExpertParallelExperts, local_experts, replayed, shard_experts
from teacher.parallel.placement import Placement
from teacher.parallel.wire import Wire
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
    decode = LowLatency(exchange, hidden=16, per_token=3, max_tokens=16, capacity=2)
    sharded = shard_experts(model(), exchange, decode)
    logits, loss = loss_of(sharded, ids(ranks.rank))
    loss.backward()
    layers = [module for module in sharded.modules() if isinstance(module, ExpertParallelExperts)]
    with torch.no_grad():
        decoded = replayed(layers, lambda: sharded(ids(ranks.rank)).logits_BTV)
        short = sharded(ids(ranks.rank)).logits_BTV  # what the step gave before it was made good
        overflowed = decode.take_overflow()
    gradients = {name: parameter.grad for name, parameter in sharded.named_parameters()}
    differs = not torch.allclose(short, logits, atol=1e-4)
    return {"logits": logits, "gradients": gradients, "decoded": decoded, "lost": overflowed, "differs": differs}


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
    assert all(got["lost"] for got in of_ranks)
    assert any(got["differs"] for got in of_ranks)  # so that the replay had something to make good


def one_rank(*, capacity: int | None = None, **placed: Any) -> tuple[Exchange, LowLatency]:
    ranks = Ranks(0, 1, 1, torch.device("cpu"), None, None, None)
    placement = Placement(
        **({"experts_S": tuple(range(8)), "num_experts": 8, "num_ranks": 1, "ranks_per_node": 1} | placed)
    )
    exchange = Exchange(ranks, placement, wire=FP32)
    form = LowLatency(
        exchange, hidden=16, per_token=3, max_tokens=4, capacity=capacity, make_mailbox=lambda *sizes: Loop(*sizes)
    )
    return exchange, form


class Loop:
    """A mailbox of one rank to itself."""

    def __init__(self, ranks: Ranks, capacity: int, row_bytes: int) -> None:
        self.inbox_QB = torch.zeros(capacity + 1, row_bytes, dtype=torch.uint8)[:capacity]

    def put(self, rows_NB, sources_P, places_P, *, offset=0) -> None:
        kept = torch.where(places_P >= 0, places_P, self.inbox_QB.shape[0])
        whole = self.inbox_QB._base[:, offset : offset + rows_NB.shape[1]]
        whole.index_copy_(0, kept, rows_NB[sources_P])

    def deliver(self) -> None: ...


def test_decoding_never_waits_for_the_device() -> None:
    """Fake tensors hold no data: whatever asks for it, as a CUDA graph would forbid, raises."""
    weights = torch.randn(8, 16, 16), torch.randn(8, 16, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _, form = one_rank(capacity=2)
        x, scores = torch.randn(4, 16), torch.rand(4, 8)
        given, indices = scores.topk(3, dim=1)
        arrived = form.dispatch(x, indices, given)
        fake = [mode.from_tensor(weight) for weight in weights]
        call = arrived.x(torch.float32), arrived.slots_MK, arrived.weights_MK, *fake
        out = form.combine(local_experts(*call, kind="dense", static_shapes=True), arrived)
        assert out.shape == (4, 16)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            local_experts(*call, kind="dense")  # the form that does wait
        with pytest.raises(DataDependentOutputException):
            form.take_overflow()


def test_what_cannot_be_is_refused() -> None:
    exchange, form = one_rank()
    layer = ExpertParallelExperts(Experts(config()), exchange, form)
    routing = Routing(torch.zeros(5, 3, dtype=torch.int64), torch.ones(5, 3), torch.ones(5, 8))
    with torch.no_grad(), pytest.raises(ValueError, match="5 tokens, at most 4 fit"):
        layer(torch.zeros(5, 16), routing, "sorted")
    with pytest.raises(ValueError, match="4 experts, but a placement of 8"):
        ExpertParallelExperts(Experts(config(n_routed_experts=4, n_group=1, topk_group=1)), exchange)
    with pytest.raises(ValueError, match="capacity of 0"):
        one_rank(capacity=0)
    with pytest.raises(ValueError, match="the placement is for 2 ranks"):
        Exchange(exchange.ranks, Placement.contiguous(num_experts=8, num_ranks=2))
    replicated, _ = one_rank(experts_S=(*range(8), 0))
    with pytest.raises(ValueError, match="would drift apart"):
        ExpertParallelExperts(Experts(config()), replicated)(torch.zeros(5, 16), routing, "sorted")
