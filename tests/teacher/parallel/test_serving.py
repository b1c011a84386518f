"""Engines over processes that share their experts: what each writes is what one engine with all of them writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from teacher.engine.engine import Engine
from teacher.engine.scheduler import Chunk
from teacher.engine.sequence import Sequence
from teacher.engine.step import build_step, halved
from teacher.model.block_checkpoint import load_blocks
from teacher.model.checkpoint import save_checkpoint
from teacher.models.latent.model import LatentModel
from teacher.models.latent.weights import Fp8MoEWeights, fuse_entries
from teacher.parallel.groups import Ranks
from tests.teacher.parallel.process_ranks import DEVICES, run_ranks
from tests.teacher.parallel.spread_engines import (
    WIDTHS,
    Written,
    assert_one_engine_writes,
    num_graphs,
    requests,
    spread_engine,
    written,
)
from tests.teacher.v3_models import random_model, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spread")
    save_checkpoint(random_model(tiny_config(**WIDTHS), std=0.05).to(torch.bfloat16), path, fp8=True)
    return path


def one_rank(ranks: Ranks, folder: Path, options: dict[str, Any]) -> tuple[list[int], list[Written], int]:
    engine, model, _ = spread_engine(ranks, folder, **options)
    held = [len(w.mlp.experts.down_EDI) for w in model.weights.layers if isinstance(w.mlp, Fp8MoEWeights)]
    turns = [written(engine, requests((ranks.rank + turn) % 4)) for turn in range(2)]
    return held, turns, num_graphs(engine)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("num_ranks", "options", "held"),
    [
        (2, {}, [4, 4]),
        (4, {"in_halves": True}, [2, 2]),
        (2, {"in_halves": True, "num_redundant": 2}, [5, 5]),
    ],
    ids=str,
)
def test_ranks_write_what_one_writes(
    folder: Path, tmp_path: Path, num_ranks: int, options: dict[str, Any], held: list[int], device: str
) -> None:
    results = run_ranks(one_rank, num_ranks, tmp_path, folder, options, device=device)
    assert all(of_rank == held for of_rank, _, _ in results)
    assert all((graphs > 0) == (device == "cuda") for _, _, graphs in results)
    assert_one_engine_writes([turns for _, turns, _ in results], folder, device)


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
