"""Engines over gloo processes that share their experts: what each writes is what one engine with all of them writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from process_ranks import run_ranks

from teacher.model.block_checkpoint import load_blocks
from teacher.model.checkpoint import save_checkpoint
from teacher.parallel.groups import Ranks
from teacher.parallel.placement import Placement
from teacher.parallel.serving import load_spread
from teacher.serve.engine import Engine
from teacher.serve.latent_model import LatentModel
from teacher.serve.scheduler import Chunk
from teacher.serve.sequence import Sequence
from teacher.serve.step import build_step, halved
from teacher.serve.weights import Fp8MoEWeights, fuse_entries
from tests.teacher.v3_models import random_model, tiny_config

CPU = torch.device("cpu")
BATCH, STEP = 3, 200
# Each rank's share of a token is rounded to BF16 (2^-9), and a half's attention may take its other form: either turns
# an E4M3 number behind it now and then (2^-4).
ROUNDING = 6e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(
        hidden_size=128, intermediate_size=256, moe_intermediate_size=128, q_lora_rank=128, kv_lora_rank=128,
        num_attention_heads=4, v_head_dim=32, max_position_embeddings=512, rope_scaling=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("spread")
    save_checkpoint(random_model(config, std=0.05).to(torch.bfloat16), path, fp8=True)
    return path


def requests(rank: int) -> list[Sequence[int]]:
    """The first rank has more than a batch; the second none; the third one prompt, too long for the small inboxes."""
    lengths = [[5, 17, 40, 9, 1], [], [170], [3, 2]][rank]
    generator = torch.Generator().manual_seed(rank)
    prompts = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    return [Sequence(n, prompt, max_tokens=4 + n, seed=n) for n, prompt in enumerate(prompts)]


def written(engine: Engine, sequences: list[Sequence[int]]) -> tuple[dict[int, list[int]], torch.Tensor | None]:
    """Tokens, and the logits behind the prompts that the first step reads."""
    logits_of, seen = engine.runner.logits, []
    engine.runner.logits = lambda *given: seen.append(logits_of(*given)) or seen[-1]
    texts = {done.key: done.generated_ids for done in engine.run(sequences)}
    engine.runner.logits = logits_of
    return texts, seen[0] if seen else None


def one_rank(ranks: Ranks, folder: Path, experts: tuple[int, ...] | None, in_halves: bool) -> list[Any]:
    placement = experts and Placement(experts, 8, ranks.num_ranks, ranks.num_ranks)
    sizes = {"batch_size": BATCH, "max_step_tokens": STEP}
    model, lockstep = load_spread(folder, ranks, **sizes, placement=placement, in_halves=in_halves)
    held = [len(w.mlp.experts.down_EDI) for w in model.weights.layers if isinstance(w.mlp, Fp8MoEWeights)]
    engine = Engine(model, batch_size=BATCH, eos_token_ids=(), max_step_tokens=STEP, num_pages=20, lockstep=lockstep)
    return [held, *(written(engine, requests((ranks.rank + turn) % 4)) for turn in range(2))]


@pytest.mark.parametrize(
    ("num_ranks", "experts", "in_halves"),
    [(2, None, False), (4, None, True), (2, (0, 1, 2, 3, 7, 4, 5, 6, 7, 0), True)],
    ids=str,
)
def test_ranks_write_what_one_writes(
    folder: Path, tmp_path: Path, num_ranks: int, experts: tuple[int, ...] | None, in_halves: bool
) -> None:
    results = run_ranks(one_rank, num_ranks, tmp_path, folder, experts, in_halves)
    alone = Engine(
        LatentModel(fuse_entries(*load_blocks(folder, CPU))), batch_size=BATCH, eos_token_ids=(), max_step_tokens=STEP,
        num_pages=20, prefix_caching=False,
    )  # fmt: skip
    same = total = 0
    for rank, (held, *turns) in enumerate(results):
        assert set(held) == {len(experts or range(8)) // num_ranks}
        for turn, (texts, logits_ZV) in enumerate(turns):
            wanted, wanted_logits_ZV = written(alone, requests((rank + turn) % 4))
            assert texts.keys() == wanted.keys()
            assert [len(texts[key]) for key in texts] == [len(wanted[key]) for key in texts]
            if wanted_logits_ZV is not None:
                error = (logits_ZV - wanted_logits_ZV).norm() / wanted_logits_ZV.norm()
                assert error < ROUNDING
            same += sum(texts[key] == wanted[key] for key in texts)
            total += len(texts)
    assert same >= 0.7 * total  # a near tie turns the rest of a text


@pytest.mark.parametrize("decoding", [[], [1], [1, 1, 2, 2, 2], [2] * 7])
@pytest.mark.parametrize("prompts", [[2], [40], [3, 90, 5]])
def test_halves_of_a_step_are_the_step(decoding: list[int], prompts: list[int]) -> None:
    chunks = []
    for number, rows in enumerate([*decoding, *prompts]):
        reads = number >= len(decoding)
        sequence = Sequence(
            number, list(range(10, 10 + 70 + rows)), 9, 0, pages=[3 * number, 3 * number + 1, 3 * number + 2]
        )
        sequence.num_computed = 70 if reads else 69 + rows
        chunks.append(Chunk(sequence, rows if reads else 1, draft=7 if not reads and rows == 2 else None))
    step = build_step(chunks, CPU)
    halves = halved(step, lambda group: ("planned", len(group)))
    for part in ("token_ids_M", "positions_M", "slots_M"):
        assert torch.equal(torch.cat([getattr(half, part) for half in halves]), getattr(step, part))
    sizes = [len(half.token_ids_M) for half in halves]
    assert abs(sizes[0] - sizes[1]) <= 2
    for half in halves:  # every row is somebody's, and sees its sequence up to itself
        row = 0
        for group in half.decodes:
            assert len(group.pages) == len(group.lengths)
            for length in group.lengths:
                seen = half.positions_M[row : row + group.num_queries].tolist()
                assert seen == list(range(length - group.num_queries, length))
                row += group.num_queries
        for chunk in half.chunks:
            assert chunk.start == row
            assert half.positions_M[chunk.start : chunk.end].tolist() == list(
                range(chunk.context - chunk.num_queries, chunk.context)
            )
            row = chunk.end
        assert row == len(half.token_ids_M)


def test_a_rank_reads_its_own_experts_alone(folder: Path) -> None:
    _, whole = load_blocks(folder, CPU)
    _, own = load_blocks(folder, CPU, experts=[5, 0, 5])
    for name, entry in whole.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            for part, of_all in zip(own[name], entry, strict=True):
                wanted = torch.stack([of_all[5].float(), of_all[0].float(), of_all[5].float()])
                assert torch.equal(part.float(), wanted)
        else:
            assert own[name] is not None
    assert own.keys() == whole.keys()


def test_ranks_do_not_speculate(folder: Path) -> None:
    class Off:
        is_on = False

        def begin(self, num_rows: int, num_warm_ups: int) -> bool:
            return True

    model = LatentModel(fuse_entries(*load_blocks(folder, CPU)))
    with pytest.raises(ValueError, match="do not speculate"):
        Engine(model, batch_size=1, eos_token_ids=(), speculate=True, lockstep=Off())
