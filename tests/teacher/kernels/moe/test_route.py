"""The router's kernel against its twin bit for bit, and the twin against the model's router."""

from __future__ import annotations

import pytest
import torch

from teacher.kernels.moe.route import route
from teacher.kernels.moe.route_reference import Routes, route_twin

V3 = Routes(num_experts_per_tok=8, n_group=8, topk_group=4, norm_topk_prob=True, routed_scaling_factor=2.5)
CASES = [
    (256, V3),
    (16, V3._replace(num_experts_per_tok=4, n_group=4, topk_group=2)),
    (64, V3._replace(num_experts_per_tok=6, n_group=1, topk_group=1, norm_topk_prob=False)),
    (32, V3._replace(num_experts_per_tok=3, n_group=2, topk_group=2)),
]


@pytest.mark.parametrize(("num_experts", "routes"), CASES)
@pytest.mark.parametrize("ties", [False, True])
def test_the_kernel_equals_its_twin_bit_for_bit(device: str, num_experts: int, routes: Routes, ties: bool) -> None:
    counts = (1, 5, 4_099) if device == "cuda" else (1, 5, 514 if num_experts == 16 and ties else 6)
    for num_tokens in counts:
        generator = torch.Generator().manual_seed(num_tokens)
        logits = torch.randn(num_tokens, num_experts, generator=generator) * 3
        bias = torch.randn(num_experts, generator=generator) * 0.1
        if ties:
            logits, bias = logits.round(), torch.zeros(num_experts)
        for got, wanted in zip(
            route(logits.to(device), bias.to(device), routes),
            route_twin(logits.to(device), bias.to(device), routes),
            strict=True,
        ):
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)


def test_a_token_counts_once_for_each_of_its_experts(device: str) -> None:
    logits = torch.randn(40, 16, generator=torch.Generator().manual_seed(3)).to(device)
    choice = route(logits, torch.zeros(16, device=device), CASES[1][1])
    assert choice.load_E.sum() == 40 * 4
    assert all(len(set(row)) == 4 for row in choice.indices_NK.tolist())
    assert choice.load_E.tolist() == torch.bincount(choice.indices_NK.flatten().long(), minlength=16).tolist()
    torch.testing.assert_close(choice.weights_NK.sum(1), torch.full((40,), 2.5, device=device))


@pytest.mark.parametrize("n_group", [1, 4])
def test_the_twin_is_the_models_router(n_group: int) -> None:
    pytest.importorskip("pydantic")  # the model's config needs it; a host that only runs kernels may lack it
    from teacher.model.router import Router
    from tests.teacher.v3_models import tiny_config

    config = tiny_config(n_group=n_group, topk_group=max(1, n_group // 2))
    torch.manual_seed(0)
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.normal_(std=0.1)
    x = torch.randn(200, config.hidden_size)
    wanted = router(x)
    routes = Routes(*(getattr(config, name) for name in Routes._fields))
    got = route_twin(x @ router.weight.T, router.e_score_correction_bias, routes)
    by_expert = torch.zeros_like(wanted.scores_NE)
    torch.testing.assert_close(
        by_expert.scatter(1, got.indices_NK.long(), got.weights_NK),
        by_expert.scatter(1, wanted.indices_NK, wanted.weights_NK),
        rtol=1e-5,  # another sigmoid, another matrix product
        atol=1e-6,
    )


def test_groups_that_do_not_divide_the_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="10 experts do not fall into 4 groups"):
        route(torch.ones(1, 10), torch.ones(10), V3._replace(n_group=4))
