"""A pipeline of two gloo processes trains as one process does, whatever the schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.pipelining import ScheduleDualPipeV

from benchmarks.schedules.schedules import dual_pipe_v
from teacher.model.config import DeepseekV3Config
from teacher.model.initialise import initialise
from teacher.model.transformer import DeepseekV3
from teacher.parallel.groups import Ranks
from teacher.parallel.layout import Layout
from teacher.parallel.meshes import form_meshes
from teacher.parallel.pipeline.pipeline import Pipeline
from teacher.parallel.pipeline.stage import pipeline_blocks
from tests.teacher.parallel.process_ranks import run_ranks

MICROBATCHES, POSITIONS, BALANCE = 8, 12, 0.05
SCHEDULES = ("1f1b", "zbv", "dualpipev")


def model(**changes) -> DeepseekV3:
    fields = {
        "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
        "num_hidden_layers": 4, "num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "max_position_embeddings": 16,
    }  # fmt: skip
    config = DeepseekV3Config.model_validate(fields | changes)
    return initialise(DeepseekV3(config), std=0.1, generator=torch.Generator().manual_seed(0))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that count upwards by 1, 2 or 3: there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    start, stride = (
        torch.randint(low, high, (MICROBATCHES * 2, 1), generator=generator) for low, high in ((0, 24), (1, 4))
    )
    tokens = (start + stride * torch.arange(POSITIONS + 1)) % 24
    return tokens[:, :-1], tokens[:, 1:]


def next_token_loss(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()) / MICROBATCHES


def alone(steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every step, and the weights at the end, of one process that adds up the same micro-batches."""
    whole = model()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for step in range(steps):
        total = 0.0
        for ids, targets in zip(*(part.chunk(MICROBATCHES) for part in batch(step)), strict=True):
            out = whole(ids, experts="sorted")
            loss = next_token_loss(out.logits_BTV, targets)
            (loss + BALANCE / MICROBATCHES * out.balance_loss).backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, whole.state_dict()


def piped(ranks: Ranks, steps: int) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    results = {}
    for schedule in SCHEDULES:
        whole = model()
        layout = Layout(pp=2, schedule=schedule, microbatches=MICROBATCHES)
        meshes = form_meshes(layout, ranks)
        shape, balance = (2, POSITIONS), BALANCE / MICROBATCHES
        pipeline = Pipeline(whole, meshes, loss=next_token_loss, shape=shape, balance_weight=balance)
        optimizer = torch.optim.SGD(pipeline.blocks.parameters(), lr=0.3, momentum=0.9)
        losses = []
        for step in range(steps):
            loss = pipeline.step(*batch(step))
            optimizer.step()
            optimizer.zero_grad()
            losses += [] if loss is None else [float(loss)]
        held = {id(parameter) for parameter in pipeline.blocks.parameters()}
        state = {name: parameter.detach() for name, parameter in whole.named_parameters() if id(parameter) in held}
        results[schedule] = losses, state
    return results


@pytest.mark.timeout(900)
@pytest.mark.parametrize("steps", [3, pytest.param(50, marks=pytest.mark.torture)])
def test_two_processes_learn_what_one_does(tmp_path, steps) -> None:
    wanted, weights = alone(steps)
    assert wanted[-1] < wanted[0] * (0.5 if steps == 30 else 1.0)  # there was something to learn
    of_ranks = run_ranks(piped, 2, tmp_path, steps)
    for schedule in SCHEDULES:
        (losses,) = (of_rank[schedule][0] for of_rank in of_ranks if of_rank[schedule][0])
        # The same sums in the same order; measured 1e-7, the rounding of the mean over micro-batches.
        assert losses == pytest.approx(wanted, rel=1e-5), schedule
        trained = {name: tensor for of_rank in of_ranks for name, tensor in of_rank[schedule][1].items()}
        assert set(trained) == {name for name in weights if "correction_bias" not in name}
        for name, tensor in trained.items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=1e-5)


def test_blocks_of_any_number_compute_what_the_model_does() -> None:
    whole = model()
    ids, _ = batch(0)
    wanted = whole(ids, experts="sorted").logits_BTV
    for num_stages in (1, 2, 3, 4):
        hidden = ids
        for block in pipeline_blocks(whole, Layout(pp=num_stages), range(num_stages)):
            hidden = block(hidden)
        assert torch.equal(hidden, wanted)


def test_the_last_block_predicts_two_tokens_and_counts_as_the_model_does() -> None:
    whole = model(num_nextn_predict_layers=1)
    ids, _ = batch(0)
    wanted = whole(ids, experts="sorted")
    blocks, hidden = pipeline_blocks(whole, Layout(pp=3), range(3)), ids
    for block in blocks:
        hidden = block(hidden, input_ids_BT=ids)
    assert torch.equal(hidden[0], wanted.logits_BTV)
    assert torch.equal(hidden[1], wanted.mtp_logits_BTV)
    assert [router for block in blocks for router in block.routers()] == whole.routers()
    loads, balance = zip(*(seen for block in blocks if (seen := block.take_statistics())), strict=True)
    assert torch.equal(torch.cat(loads), wanted.load_LE)
    torch.testing.assert_close(sum(balance), wanted.balance_loss)
    assert blocks[-1].take_statistics() is None


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="4 layers make 1 to 4 stages, got 5"):
        pipeline_blocks(model(), Layout(pp=5), range(5))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("extra", [0, 3])
def test_our_dualpipev_is_torchs(num_ranks, extra) -> None:
    microbatches = 2 * num_ranks + extra
    torchs = SimpleNamespace(pp_group_size=num_ranks, _n_microbatches=microbatches)
    for rank, actions in enumerate(dual_pipe_v(num_ranks, microbatches).actions_by_rank):
        theirs = ScheduleDualPipeV._calculate_single_rank_operations(torchs, rank)
        ours = [[(one.kind, one.stage, one.microbatch) for one in action] for action in actions]
        kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
        said = [
            [
                (kinds[part.computation_type.name], part.stage_index, part.microbatch_index)
                for part in action.sub_actions or [action]
            ]
            for action in theirs
            if action is not None
        ]
        assert ours == said


def under_autocast(ranks: Ranks) -> list[float]:
    layout = Layout(pp=2, schedule="dualpipev", microbatches=MICROBATCHES)
    pipeline = Pipeline(model(), form_meshes(layout, ranks), loss=next_token_loss, shape=(2, POSITIONS))
    optimizer = torch.optim.SGD(pipeline.blocks.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            total = pipeline.step(*batch(step))
        optimizer.step()
        optimizer.zero_grad()
        losses += [] if total is None else [float(total)]
    return losses


def test_stages_give_what_they_promised_under_autocast(tmp_path) -> None:
    """BF16 rounds to 2^-9; the losses of three steps follow those in FP32."""
    (losses, _), wanted = run_ranks(under_autocast, 2, tmp_path), alone(3)[0]
    assert losses == pytest.approx(wanted, rel=3e-2)
