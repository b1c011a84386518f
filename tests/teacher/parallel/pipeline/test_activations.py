"""What is kept for the backward pass: less of it, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from distill.errors import EnvironmentFault
from teacher.model.experts import ExpertsKind
from teacher.model.transformer import DeepseekV3
from teacher.parallel.groups import Ranks
from teacher.train.activations import SavedActivations
from tests.teacher.parallel.process_ranks import run_ranks
from tests.teacher.parallel.spread_runs import (
    alone,
    config_of,
    joined,
    joined_moments,
    needs_split_recomputation,
    spread_run,
    trained,
)
from tests.teacher.v3_models import random_model, tiny_config

WIDE = {  # tiles of 128 need widths of 128
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128,
    "v_head_dim": 128, "num_attention_heads": 2,
}  # fmt: skip
KINDS: tuple[ExpertsKind, ...] = ("sorted", "dense", "grouped")


def gradients(model: DeepseekV3, kind: ExpertsKind = "sorted") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    out = model(ids, experts=kind)
    loss = out.logits_BTV.logsumexp(-1).mean() + out.mtp_logits_BTV.square().mean() + out.balance_loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("q_lora_rank", [20, None])
def test_recomputation_changes_no_bit(kind, q_lora_rank) -> None:
    config = tiny_config(q_lora_rank=q_lora_rank)
    wanted_loss, wanted = gradients(random_model(config), kind)
    model = random_model(config)
    SavedActivations([model], recompute=True, fp8=False)
    for _ in range(2):
        model.zero_grad()
        loss, found = gradients(model, kind)
        assert torch.equal(loss, wanted_loss)
        for name, gradient in wanted.items():
            assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_of_norms_and_queries_are_gone_after_the_forward_pass(recompute) -> None:
    # Attention of unlike widths is composed on a CPU, of copies of its inputs; with equal ones it keeps the inputs.
    model = random_model(tiny_config(v_head_dim=20))
    SavedActivations([model], recompute=recompute, fp8=False)
    layer = model.model.layers[0]
    storages: list[StorageWeakRef] = []

    def note(_module, _given, out: torch.Tensor) -> None:
        storages.append(StorageWeakRef(out.untyped_storage()))

    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.register_forward_hook(note)
    expanded = layer.self_attn.expanded

    def noted(*arguments):
        out = expanded(*arguments)
        storages.extend(StorageWeakRef(one.untyped_storage()) for one in out)
        return out

    layer.self_attn.expanded = noted
    out = model(torch.arange(24).view(2, 12))
    assert [storage.expired() for storage in storages] == [recompute] * 5
    out.logits_BTV.sum().backward()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_in_fp8_round_gradients_a_little(kind, recompute) -> None:
    config = tiny_config(**WIDE)
    wanted_loss, wanted = gradients(random_model(config, std=0.05), kind)
    model = random_model(config, std=0.05)
    SavedActivations([model], recompute=recompute, fp8=True)
    loss, found = gradients(model, kind)
    assert torch.equal(loss, wanted_loss)  # the forward pass is what it was
    rounded = 0
    for name, gradient in wanted.items():
        error = float((found[name] - gradient).norm() / gradient.norm())
        # E4M3 has three bits of mantissa: a number is off by 2^-4 at the most, 2^-5.5 on average, and a gradient is a
        # sum over tokens of such numbers. Through SwiGLU in the experts it is two of them.
        assert error < 2**-4, (name, error)
        rounded += error > 1e-4
    assert rounded > 10


@pytest.mark.slow
@needs_split_recomputation
def test_a_split_backward_pass_recomputes_too(tmp_path) -> None:
    """zbv asks for the gradients of inputs and of weights apart."""
    layout = {"pp": 2, "schedule": "zbv", "microbatches": 4}
    config, memory = config_of(layout, num_steps=4), {"recompute": True}
    plain = run_ranks(trained, 2, tmp_path / "plain", config)
    again = run_ranks(trained, 2, tmp_path / "again", config_of(layout, num_steps=4, memory=memory))
    wanted, found = joined(config.layout, plain), joined(config.layout, again)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def asked_of_old_torch(ranks: Ranks) -> list[str]:
    said = []
    torch.__version__ = "2.11.0+cu130"  # this process is the test's own
    for schedule, recompute in (("zbv", True), ("dualpipev", True), ("zbv", False), ("1f1b", True)):
        layout = {"pp": 2, "schedule": schedule, "microbatches": 4}
        try:
            spread_run(ranks, config_of(layout, memory={"recompute": recompute}))
        except EnvironmentFault as fault:
            said.append(str(fault))
    return said


def test_recomputation_of_split_backward_passes_is_refused_where_torch_adds_up_wrongly(tmp_path) -> None:
    for said in run_ranks(asked_of_old_torch, 2, tmp_path):
        assert said == [
            f"torch: recomputation with {schedule} needs torch 2.12 or later, this is 2.11.0+cu130"
            for schedule in ("zbv", "dualpipev")
        ]


def test_moments_in_bf16_learn_alike(tmp_path) -> None:
    config = config_of({"dp": 2}, num_steps=20, memory={"moments": "bf16"})
    log, _ = alone(config)
    results = run_ranks(trained, 2, tmp_path, config)
    moments = [moment for result in results for _, *both in result.moments.values() for moment in both]
    assert {moment.dtype for moment in moments} == {torch.bfloat16}
    assert all(tensor.any() for name, tensor in joined_moments(config.layout, results).items() if "lm_head" in name)
    # A moment in BF16 is off by 2^-9 of itself, and so is a step; losses of twenty such steps by about as much.
    assert results[0].log[-1]["loss"] == pytest.approx(log[-1]["loss"], rel=2**-6)
    assert results[0].log[-1]["loss"] != log[-1]["loss"]
