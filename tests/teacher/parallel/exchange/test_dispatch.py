"""Experts over gloo processes: what they compute, forward and backward, is what one process computes."""

from __future__ import annotations

import pytest
import torch

from teacher.kernels.quantise.reference import quantise_twin
from teacher.model.config import DeepseekV3Config
from teacher.model.experts import Experts
from teacher.model.fp8 import BLOCK
from teacher.model.router import Routing
from teacher.parallel.exchange.dispatch import Exchange
from teacher.parallel.exchange.moe import ExpertParallelExperts
from teacher.parallel.exchange.wire import Wire
from teacher.parallel.groups import Ranks
from teacher.parallel.placement.placement import Placement
from tests.teacher.parallel.process_ranks import needs_gpus, own, run_ranks

HIDDEN, INNER, EXPERTS, PER_TOKEN = 128, 16, 16, 3
FP32 = Wire(out="fp32", back="fp32")
# Sums over the ranks' shares instead of over choices: a few roundings of FP32 in another order.
ORDER = {"atol": 2e-5, "rtol": 2e-5}
# Of the norm, against one process whose tokens and output gradients were rounded to E4M3 as the wire rounds them: what
# is left is BF16 on the way back, each share of a sum by 2^-9 at most, a hop.
BF16_ERROR = 2**-8


def sizes_of(num_ranks: int) -> list[int]:
    """Tokens a rank; the second has none, the last one."""
    return [7 if rank == 0 else 0 if rank == 1 else 1 if rank == num_ranks - 1 else 5 for rank in range(num_ranks)]


def experts() -> Experts:
    fields = {
        "vocab_size": 8, "hidden_size": HIDDEN, "intermediate_size": 8, "moe_intermediate_size": INNER,
        "num_hidden_layers": 1, "num_attention_heads": 1, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 2, "v_head_dim": 8, "n_routed_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN,
    }  # fmt: skip
    whole = Experts(DeepseekV3Config.model_validate(fields))
    generator = torch.Generator().manual_seed(1)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1, generator=generator)
    return whole


def problem(num_tokens: int, routing: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, indices, weights, and a gradient of the output."""
    generator = torch.Generator().manual_seed(num_tokens)
    x, grad = (torch.randn(num_tokens, HIDDEN, generator=generator) for _ in range(2))
    scores = torch.rand(num_tokens, EXPERTS, generator=generator)
    if routing == "skewed":
        scores = scores * torch.arange(EXPERTS).div(EXPERTS).pow(4)
    if routing == "one":  # every token to the same experts, which live on one or two ranks
        scores = scores[:1].expand(num_tokens, -1)
    weights, indices = scores.topk(PER_TOKEN, dim=1)
    return x, indices, weights, grad


def rounded(x: torch.Tensor) -> torch.Tensor:
    values, scale_inv = quantise_twin(x)
    return values.float() * scale_inv.repeat_interleave(BLOCK, dim=1)


def alone(routing: str, num_tokens: int, form: Wire = FP32) -> list[torch.Tensor]:
    """Output, and the gradients of x, weights, gate_up and down, on one process."""
    whole = experts()
    x, indices, weights, grad = problem(num_tokens, routing)
    if form.out == "fp8":
        x, grad = rounded(x), rounded(grad)
    x.requires_grad_(), weights.requires_grad_()
    out = whole(x, Routing(indices, weights, weights), "sorted")
    out.backward(grad)
    return [out.detach(), x.grad, weights.grad, whole.gate_up_proj.grad, whole.down_proj.grad]


def spread(ranks: Ranks, routing: str, form: Wire, two_hops: bool) -> list[torch.Tensor]:
    """The same of this rank's tokens and experts."""
    placement = Placement.contiguous(
        num_experts=EXPERTS, num_ranks=ranks.num_ranks, ranks_per_node=ranks.ranks_per_node
    )
    whole = experts().to(ranks.device)
    layer = ExpertParallelExperts(whole, Exchange(ranks, placement, wire=form, two_hops=two_hops))
    sizes = sizes_of(ranks.num_ranks)
    x, indices, weights, grad = (own(ranks, part, sizes) for part in problem(sum(sizes), routing))
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = layer(x, Routing(indices, weights, weights), "sorted")
    out.backward(grad)
    assert layer.gate_up_proj.grad is not None
    found = [out.detach(), x.grad, weights.grad, layer.gate_up_proj.grad, layer.down_proj.grad]
    return [tensor.cpu() for tensor in found]


def everything(ranks: Ranks) -> dict[tuple, list[torch.Tensor]]:
    cases = {(routing, FP32, False) for routing in ("random", "skewed", "one")} | {("random", Wire(), False)}
    if ranks.num_ranks > ranks.ranks_per_node:
        cases |= {("random", FP32, True), ("one", FP32, True), ("random", Wire(), True)}
    return {case: spread(ranks, *case) for case in sorted(cases, key=repr)}


@pytest.mark.parametrize(
    ("num_ranks", "ranks_per_node"),
    [(2, 2), (4, 2), pytest.param(8, 4, marks=pytest.mark.torture), pytest.param(8, 2, marks=pytest.mark.torture)],
)
def test_experts_over_ranks_compute_what_one_process_does(tmp_path, num_ranks, ranks_per_node) -> None:
    assert_alone_computes(run_ranks(everything, num_ranks, tmp_path, ranks_per_node=ranks_per_node))


@pytest.mark.gpu
@needs_gpus(1)
def test_experts_over_gpus_compute_what_one_process_does(tmp_path) -> None:
    """Each a node of its own too, so that there are two hops."""
    for ranks_per_node in (2, 1):
        folder = tmp_path / str(ranks_per_node)
        assert_alone_computes(run_ranks(everything, 2, folder, ranks_per_node=ranks_per_node, device="cuda"))


def assert_alone_computes(of_ranks: list[dict[tuple, list[torch.Tensor]]]) -> None:
    num_ranks = len(of_ranks)
    for case in of_ranks[0]:
        routing, form, _ = case
        wanted = alone(routing, sum(sizes_of(num_ranks)), form)
        for place, (which, right) in enumerate(zip(("out", "x", "weights", "gate_up", "down"), wanted, strict=True)):
            got = torch.cat([of_rank[case][place] for of_rank in of_ranks])
            if form == FP32:
                torch.testing.assert_close(got, right, **ORDER, msg=lambda said, c=case, w=which: f"{c} {w}: {said}")
            else:
                assert (got - right).norm() <= BF16_ERROR * right.norm(), (case, which)
