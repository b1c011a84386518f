"""The routed experts with gradients: kernels against their twins, and both against FP64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from teacher.kernels.moe.training import experts_training as training, grouped, grouped_gemm, grouped_quantise
from teacher.kernels.moe.training.experts_training import (
    MainGrads,
    Precision,
    quantise_experts,
    routed_experts_training,
)

NUM_EXPERTS, HIDDEN, INNER, TOP_K = 4, 384, 128, 2  # 384: an odd number of groups, so that tiles of 256 have a rest
ROUTINGS = ["uniform", "skewed", "one takes all", "some have none"]
PRECISIONS: list[Precision] = ["fp8", "bf16"]
NAMES = ("out", "x", "gates", "gate_up", "down")


class Case(NamedTuple):
    x: torch.Tensor
    indices: torch.Tensor
    gates: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    grad: torch.Tensor


def routing_on(device: str) -> str:
    """Where the kernels are interpreted, each expert with tokens costs seconds; these tests need no second one."""
    return "one takes all" if device == "cpu" else "uniform"


def case(num_tokens: int, routing: str, device: str, *, inner: int = INNER) -> Case:
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    logits = normal(num_tokens, NUM_EXPERTS)
    if routing == "skewed":
        logits += torch.arange(NUM_EXPERTS) * 1.5
    if routing == "some have none":
        logits[:, 1] = -100
    top_k = 1 if routing == "one takes all" else TOP_K
    if routing == "one takes all":
        logits[:, 2] = 100
    gates = torch.rand(num_tokens, top_k, generator=generator) + 0.1
    tensors = (
        normal(num_tokens, HIDDEN).to(torch.bfloat16),
        logits.topk(top_k).indices.to(torch.int32),
        gates,
        (normal(NUM_EXPERTS, 2 * inner, HIDDEN) * 0.05).to(torch.bfloat16),
        (normal(NUM_EXPERTS, HIDDEN, inner) * 0.05).to(torch.bfloat16),
        normal(num_tokens, HIDDEN).to(torch.bfloat16),
    )
    return Case(*(tensor.to(device) for tensor in tensors))


def poison() -> None:
    """Fill freed memory with NaN, so that what a kernel leaves unwritten shows."""
    if torch.cuda.is_available():
        torch.full((1 << 26,), float("nan"), device="cuda")


def run(given: Case, precision: Precision, **options: object) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().float().requires_grad_() for t in (given.gates, given.gate_up, given.down)]
    x = given.x.detach().clone().requires_grad_()
    poison()
    out = routed_experts_training(x, given.indices, *leaves, precision=precision, **options)
    out.backward(given.grad)
    return out.detach(), x.grad, *(leaf.grad for leaf in leaves)


def exact(given: Case) -> tuple[torch.Tensor, ...]:
    """Every expert on every token in FP64, through autograd."""
    x, gates, gate_up, down = (t.double().requires_grad_() for t in (given.x, given.gates, given.gate_up, given.down))
    chosen = torch.zeros(len(x), NUM_EXPERTS, dtype=torch.float64, device=x.device)
    weights = chosen.scatter(1, given.indices.long(), gates)
    gate, up = torch.einsum("nd,eid->eni", x, gate_up).chunk(2, dim=-1)
    out = torch.einsum("eni,edi,ne->nd", F.silu(gate) * up, down, weights)
    out.backward(given.grad.double())
    return out.detach(), x.grad, gates.grad, gate_up.grad, down.grad


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def as_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (grouped, grouped_gemm, grouped_quantise):
        for name in ("runs_kernels", "runs_bf16_kernels"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda tensor: False)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_are_as_exact_as_the_twins(
    device: str, routing: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_tokens in (150,) if device == "cpu" else (1, 5, 130, 4_096):
        given = case(num_tokens, routing, device)
        wanted = exact(given)
        got = run(given, precision)
        with monkeypatch.context() as patch:
            as_twin(patch)
            twin = run(given, precision)
        for name, ours, theirs, truth in zip(NAMES, got, twin, wanted, strict=True):
            # 5%: the kernels sum in another order; 1e-6: for what is exact in both.
            assert error(ours, truth) < 1.05 * error(theirs, truth) + 1e-6, name
            # Three bits of mantissa twice or thrice on the way; eight in BF16. One token's gates may cancel.
            assert error(theirs, truth) < (0.12 if precision == "fp8" else 0.012) or num_tokens == 1, name


def fill_empty_with_nan(patch: pytest.MonkeyPatch) -> None:
    """Have `torch.empty` and `torch.empty_like` return NaN (integers: -7), so that reading what nobody wrote shows."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def filled(*args: object, **options: object) -> torch.Tensor:
            tensor = make(*args, **options)
            if tensor.dtype == torch.float8_e4m3fn:
                tensor.view(torch.uint8).fill_(0x7F)
            else:
                tensor.fill_(float("nan") if tensor.dtype.is_floating_point else -7)
            return tensor

        return filled

    for name in ("empty", "empty_like"):
        patch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("routing", ["uniform", "some have none", "one takes all"])
def test_nothing_unwritten_is_read(
    device: str, routing: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_tokens in (1,) if device == "cpu" else (1, 5, 130, 4_096):
        given = case(num_tokens, routing, device)
        clean = run(given, precision)
        with monkeypatch.context() as patch:
            fill_empty_with_nan(patch)
            poisoned = run(given, precision)
        for name, ours, theirs in zip(NAMES, poisoned, clean, strict=True):
            assert torch.isfinite(ours).all(), f"{name} of {num_tokens} tokens"
            assert torch.equal(ours, theirs), f"{name} of {num_tokens} tokens"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_experts_without_tokens_get_zeros(device: str, precision: Precision) -> None:
    given = case(20, "some have none", device)
    _, _, _, gate_up, down = run(given, precision)
    for gradient in (gate_up, down):
        assert gradient[1].count_nonzero() == 0
        assert gradient[0].count_nonzero() > 0
        assert gradient.isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_main_grads_are_added_to(device: str, precision: Precision) -> None:
    given = case(30, routing_on(device), device)
    _, x, gates, gate_up, down = run(given, precision)
    mains = MainGrads(torch.ones_like(gate_up), torch.ones_like(down))
    _, x_again, gates_again, *none = run(given, precision, main_grads=mains)
    assert none == [None, None]
    assert torch.equal(x, x_again)
    assert torch.equal(gates, gates_again)
    # Adding one rounds at 2^-24 of it.
    torch.testing.assert_close(mains.gate_up_E2ID, gate_up + 1, rtol=2e-7, atol=0)
    torch.testing.assert_close(mains.down_EDI, down + 1, rtol=2e-7, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_repeats_are_the_same_to_the_last_bit(device: str, precision: Precision) -> None:
    given = case(40, routing_on(device), device)
    first = run(given, precision)
    for _ in range(1 if device == "cpu" else 20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(given, precision), strict=True))


def test_weights_quantised_beforehand_change_nothing(device: str) -> None:
    given = case(10, routing_on(device), device)
    quantised = quantise_experts(given.gate_up.float(), given.down.float())
    again = run(given, "fp8", quantised=quantised)
    assert all(torch.equal(a, b) for a, b in zip(run(given, "fp8"), again, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_compiles_without_a_graph_break(device: str, precision: Precision) -> None:
    given = case(12, routing_on(device), device)
    eager = run(given, precision)
    compiled = torch.compile(routed_experts_training, backend="aot_eager", fullgraph=True)
    leaves = [t.detach().float().requires_grad_() for t in (given.gates, given.gate_up, given.down)]
    x = given.x.detach().clone().requires_grad_()
    out = compiled(x, given.indices, *leaves, precision=precision)
    out.backward(given.grad)
    got = (out.detach(), x.grad, *(leaf.grad for leaf in leaves))
    assert all(torch.equal(a, b) for a, b in zip(got, eager, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_tokens(device: str, precision: Precision) -> None:
    given = case(4, "uniform", device)
    none = given._replace(x=given.x[:0], indices=given.indices[:0], gates=given.gates[:0], grad=given.grad[:0])
    out, x, _, gate_up, down = run(none, precision)
    assert out.shape == x.shape == (0, HIDDEN)
    assert gate_up.count_nonzero() == down.count_nonzero() == 0


def test_what_does_not_fit_is_refused(device: str) -> None:
    given = case(3, "uniform", device)
    with pytest.raises(ValueError, match="do not belong together"):
        routed_experts_training(given.x, given.indices[:2], given.gates, given.gate_up, given.down)
    with pytest.raises(ValueError, match="'fp8' or 'bf16'"):
        routed_experts_training(*given[:5], precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="buffer must be contiguous FP32"):
        run(given, "bf16", main_grads=MainGrads(given.gate_up, given.down))


def used_rows(grouping: grouped.Grouping) -> int:
    return int((grouping.experts_T >= 0).sum()) * 128


def test_quantisation_both_ways_equals_its_twin_bit_for_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(70, "skewed", device)
    grouping = grouped.group_rows(given.indices, NUM_EXPERTS)
    rows = used_rows(grouping)
    grad = torch.randn(len(grouping.pairs_R), INNER, generator=torch.Generator().manual_seed(1)).to(device)
    grad = grad.to(torch.bfloat16)
    from teacher.kernels.quantise.reference import quantise_twin

    gate_up = quantise_twin(torch.cat((grad, grad.flip(0)), dim=1))

    def both() -> tuple[torch.Tensor, ...]:
        poison()
        ways = grouped_quantise.gather_quantise(given.x, grouping, TOP_K, columnwise=True)
        gradients = grouped_quantise.swiglu_backward_quantise(grad, gate_up, given.gates.flatten(), grouping)
        quantised = [*ways.rows, *gradients.rows]
        columns = [*ways.columns, *gradients.columns, *gradients.inner]
        turned = [t[:, :rows] if t.dtype == torch.float8_e4m3fn else t[: rows // 128] for t in columns]
        return *(t[:rows] for t in quantised), *turned

    got = both()
    weights = grouped_quantise.quantise_expert_weight(given.gate_up)
    as_twin(monkeypatch)
    for ours, theirs in zip(
        (*got, *weights), (*both(), *grouped_quantise.quantise_expert_weight(given.gate_up)), strict=True
    ):
        assert ours.dtype == theirs.dtype
        if ours.dtype == torch.float8_e4m3fn:
            ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
        assert torch.equal(ours, theirs)


def test_the_form_without_gradients_is_the_same(device: str) -> None:
    given = case(9, "uniform", device)
    wanted = routed_experts_training(*given[:5], precision="bf16")
    assert torch.equal(training.routed_experts_bf16(*given[:5]), wanted)
