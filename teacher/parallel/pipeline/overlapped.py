"""A forward and a backward that DualPipe pairs, overlapped: while one's tokens travel, the other computes.

DeepSeek-V3 s.3.2.1 cuts both into attention, dispatch, MLP and combine and lets each one's exchanges hide behind the
other's arithmetic. Here each exchange of tokens between expert ranks (`teacher.parallel.exchange.dispatch`) is where
the turn changes (`teacher.parallel.turns`). Gradients are those of one behind the other, to the last bit.

torch has the place for such a function, `OVERLAP_F_B`, and none of its own; what a forward and a backward of a stage
are is written down in its schedule alone, so that this follows it (torch 2.11 to 2.13).
"""

from __future__ import annotations

from typing import Any

from torch.distributed.pipelining.schedules import OVERLAP_F_B, _wait_batch_p2p

from teacher.parallel import turns


def overlap_pairs(schedule: Any) -> None:
    """Have a `ScheduleDualPipeV` overlap the pairs of its plan."""
    schedule.register_custom_function(OVERLAP_F_B, _run_pair)


def _run_pair(action: Any, context: Any) -> None:
    forward, backward = action.sub_actions
    # The forward begins on every rank, so that exchanges of the two meet in one order.
    turns.in_turn(lambda: _forward(forward, context), lambda: _backward(backward, context))


def _forward(action: Any, context: Any) -> None:
    """Run one micro-batch's forward pass of one stage, as torch's schedule does for one that stands alone."""
    schedule, batch = context.schedule_ref, action.microbatch_index
    stages = {stage.stage_index: stage for stage in schedule._stages}
    stage = stages[action.stage_index]
    # 1. Receive: wait for the hidden states of the stage before, if that is another rank's; an action before this one
    #    has posted the receive. In a V the stage before may be this rank's own, and has handed them over (3).
    if not stage.is_first and action.stage_index - 1 not in stages:
        _wait_batch_p2p(schedule.fwd_recv_ops.pop((action.stage_index, batch)))
    # 2. Compute: attention, dispatch, MLP and combine of each layer; the turn changes at every exchange of tokens.
    output = stage.forward_one_chunk(batch, context.arg_mbs[batch], context.kwarg_mbs[batch])
    schedule._maybe_compute_loss(stage, output, context.target_mbs, batch)
    # 3. Hand over within the rank. Sends to another rank are actions of their own, behind the pair.
    if (following := stages.get(action.stage_index + 1)) is not None:
        following.set_local_fwd_input(output, batch)


def _backward(action: Any, context: Any) -> None:
    """Run one micro-batch's backward pass of one stage, gradients of inputs and weights at once."""
    schedule, batch = context.schedule_ref, action.microbatch_index
    stages = {stage.stage_index: stage for stage in schedule._stages}
    stage = stages[action.stage_index]
    # 1. Receive: wait for the gradients of the stage behind, if that is another rank's.
    if not stage.is_last and action.stage_index + 1 not in stages:
        _wait_batch_p2p(schedule.bwd_recv_ops.pop((action.stage_index, batch)))
    # 2. Compute: the same exchanges backwards, each one a change of turn. A stage's backward passes are counted, since
    #    torch wants to know which one is the last.
    loss = schedule._maybe_get_loss(stage, batch)
    schedule.backward_counter[action.stage_index] += 1
    is_last_batch = schedule.backward_counter[action.stage_index] == schedule._n_microbatches
    stage.backward_one_chunk(batch, loss=loss, full_backward=True, last_backward=is_last_batch)
    # 3. Hand over within the rank.
    if (before := stages.get(action.stage_index - 1)) is not None:
        before.set_local_bwd_input(stage.get_local_bwd_output(batch), batch)
