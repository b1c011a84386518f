"""Experts that move while engines serve: the same texts, every slot its expert's bytes, and ranks evenly loaded."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from distill.errors import DataError, EnvironmentFault
from teacher.engine.sequence import Sequence
from teacher.model.block_checkpoint import load_blocks
from teacher.model.checkpoint import save_checkpoint
from teacher.models.latent.weights import Fp8MoEWeights, fuse_entries
from teacher.parallel.exchange.fixed_places import FixedPlaces
from teacher.parallel.groups import Ranks
from teacher.parallel.placement import rebalance
from teacher.parallel.placement.placement import Placement
from teacher.parallel.placement.rebalance import PlacedMoEWeights, Rebalancing, Report
from teacher.parallel.serving import SpreadModel, load_spread
from tests.teacher.parallel.process_ranks import DEVICES, run_ranks
from tests.teacher.parallel.spread_engines import (
    BATCH,
    STEP,
    WIDTHS,
    Written,
    assert_one_engine_writes,
    num_graphs,
    requests,
    spread_engine,
    written,
)
from tests.teacher.v3_models import random_model, tiny_config

EXPERTS, REDUNDANT, PER_TOKEN = 16, 4, 4
HOT = ((1, 2), (13, 14))  # of each layer: over four ranks on a rank of its own


def folder_of(path: Path, bias: float) -> Path:
    """Random weights, of which every token chooses the hot experts as far as `bias` goes."""
    config = tiny_config(**WIDTHS, n_routed_experts=EXPERTS, num_experts_per_tok=PER_TOKEN)
    model = random_model(config, std=0.05)
    biases = [tensor for name, tensor in model.named_buffers() if "correction_bias" in name]
    for tensor, hot in zip(biases, HOT, strict=False):  # the last is the MTP module's
        tensor.zero_()
        tensor[list(hot)] = bias
    save_checkpoint(model.to(torch.bfloat16), path, fp8=True)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("skewed"), bias=2.0)


def moe_layers(model: SpreadModel) -> list[PlacedMoEWeights]:
    return [layer.mlp for layer in model.weights.layers if isinstance(layer.mlp, PlacedMoEWeights)]


def addresses(layers: list[PlacedMoEWeights]) -> list[int]:
    tensors = [(*w.experts, w.tables.slots_EC, w.tables.num_copies_E, w.load_E) for w in layers]
    return [tensor.data_ptr() for of_layer in tensors for tensor in of_layer]


class Moved(NamedTuple):
    """Of a rank: what it wrote, what it holds, and after each step how all experts lay and how far its texts were.

    `graphs`: how many CUDA graphs there were before experts moved, and at the end.
    """

    turns: list[Written]
    held: list[list[torch.Tensor]]
    tables: list[tuple[torch.Tensor, torch.Tensor]]
    steps: list[tuple[list[Placement], dict[int, int]]]
    reports: list[Report]
    graphs: tuple[int, int]


def moving(ranks: Ranks, folder: Path, every_steps: int, in_halves: bool) -> Moved:
    rebalancing = Rebalancing(every_steps=every_steps, least_gain=0.05)
    options = {"num_redundant": REDUNDANT, "rebalancing": rebalancing, "in_halves": in_halves}
    engine, model, lockstep = spread_engine(ranks, folder, **options)
    layers, steps, reports, graphs = moe_layers(model), [], [], []
    lockstep.balancer.on_report = reports.append
    before = addresses(layers)

    def after_step() -> None:
        running = engine.scheduler.running
        graphs.append(num_graphs(engine))
        steps.append((list(lockstep.balancer.placements), {s.key: len(s.generated_ids) for s in running}))

    turns = [written(engine, requests((ranks.rank + turn) % 4), after_step) for turn in range(2)]
    assert addresses(layers) == before  # what a CUDA graph has captured
    held = [[part.view(torch.uint8).cpu() for part in w.experts] for w in layers]
    tables = [(w.tables.slots_EC.cpu(), w.tables.num_copies_E.cpu()) for w in layers]
    return Moved(turns, held, tables, steps, reports, (graphs[every_steps - 1], graphs[-1]))


def is_within_a_text(before: dict[int, int], after: dict[int, int]) -> bool:
    return any(0 < before[key] < after[key] for key in before.keys() & after.keys())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("num_ranks", "every_steps", "in_halves"), [(2, 3, False), (4, 2, False), (2, 2, True)])
def test_texts_stay_while_experts_move(
    folder: Path, tmp_path: Path, num_ranks: int, every_steps: int, in_halves: bool, device: str
) -> None:
    results: list[Moved] = run_ranks(moving, num_ranks, tmp_path, folder, every_steps, in_halves, device=device)
    assert_one_engine_writes([of_rank.turns for of_rank in results], folder, device)
    if device == "cuda":
        assert max(of_rank.graphs[0] for of_rank in results) > 0  # those captured before the moves serve on

    first = Placement.contiguous(num_experts=EXPERTS, num_redundant=REDUNDANT, num_ranks=num_ranks)
    placements = [of_step for of_step, _ in results[0].steps]
    last = placements[-1]
    assert len({*last, first}) == 3  # each layer by its own loads
    pairs = itertools.pairwise([[first] * 2, *placements])
    changes = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in pairs]
    assert changes[: every_steps + 2] == [0] * every_steps + [1, 1]  # a layer a step
    assert max(changes) == 1
    moved = [step for step, change in enumerate(changes) if change and step]
    assert any(is_within_a_text(r.steps[step - 1][1], r.steps[step][1]) for r in results for step in moved)

    whole = [w.mlp for w in fuse_entries(*load_blocks(folder, torch.device("cpu"))).layers]
    whole = [[part.view(torch.uint8) for part in w.experts] for w in whole if isinstance(w, Fp8MoEWeights)]
    for rank, of_rank in enumerate(results):
        assert [of_step for of_step, _ in of_rank.steps] == placements
        assert of_rank.reports == results[0].reports
        for layer, placement in enumerate(last):
            for part, of_all in zip(of_rank.held[layer], whole[layer], strict=True):
                assert torch.equal(part, of_all[list(placement.of_rank(rank))])
            wanted = placement.tables()
            slots_EC, num_copies_E = of_rank.tables[layer]
            assert torch.equal(slots_EC, wanted.slots_EC)
            assert torch.equal(num_copies_E, wanted.num_copies_E)


def prompts(rank: int) -> list[Sequence[int]]:
    """A turn of two steps: one that reads them all, and one of the tokens behind the first. The same in every turn."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 64, (BATCH, STEP // BATCH), generator=generator).tolist()
    return [Sequence(n, of_one, max_tokens=2, seed=n) for n, of_one in enumerate(ids)]


class Loaded(NamedTuple):
    """Of a rank: by (layer, whether it had moved) the choices that came here; counts, and what they must be."""

    arrived: Counter[tuple[int, bool]]
    counted: list[int]
    chosen: int
    reports: list[Report]


def loaded(ranks: Ranks, folder: Path) -> Loaded:
    """Two turns, whose loads say where experts go; two behind the moves; and one after looking at loads again.

    On a GPU without graphs, which count padding and do not call what counts here, and step by step as on a CPU.
    """
    rebalancing = Rebalancing(every_steps=4, least_gain=0.1)
    options = {"num_redundant": REDUNDANT, "rebalancing": rebalancing, "in_halves": True}
    engine, model, lockstep = spread_engine(ranks, folder, {"cuda_graphs": False, "run_ahead": False}, **options)
    layers, arrived, reports, balancer = moe_layers(model), Counter(), [], lockstep.balancer
    balancer.on_report = reports.append
    first, dispatch = balancer.placements[0], FixedPlaces.dispatch

    def counting(form: FixedPlaces, x: Any, indices: Any, weights: Any, tables: Any) -> Any:
        received = dispatch(form, x, indices, weights, tables)
        layer = next(number for number, w in enumerate(layers) if w.tables is tables)
        arrived[layer, balancer.placements[layer] != first] += int(received.choice.load_E.sum())
        return received

    FixedPlaces.dispatch = counting  # this process is the test's own
    for _ in range(5):
        num_before = engine.num_computed_tokens
        list(engine.run([] if ranks.rank == 1 else prompts(ranks.rank)))
    chosen = PER_TOKEN * (engine.num_computed_tokens - num_before)
    return Loaded(arrived, [int(w.load_E.sum()) for w in layers], chosen, reports)


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_are_evenly_loaded_behind_the_moves(folder: Path, tmp_path: Path, device: str) -> None:
    results: list[Loaded] = run_ranks(loaded, 4, tmp_path, folder, device=device)

    def measured(layer: int, has_moved: bool) -> float:
        of_ranks = [of_rank.arrived[layer, has_moved] for of_rank in results]
        return max(of_ranks) * len(of_ranks) / sum(of_ranks)

    before, after = ([measured(layer, has_moved) for layer in range(2)] for has_moved in (False, True))
    assert min(before) > 2
    assert max(after) <= 1.1
    first, second = results[0].reports
    assert first.num_layers_moved == 2
    # Copies take turns token by token, and the second layer serves one step more before it moves.
    assert first.before == pytest.approx((sum(before) / 2, max(before)), rel=0.01)
    assert first.after.mean <= first.after.worst < 1.1
    assert second.before == second.after  # what is even stays
    assert (second.num_layers_moved, second.num_slots_moved) == (0, 0)
    for of_rank in results:
        assert of_rank.counted == [of_rank.chosen] * 2  # since the second rebalancing; a rank without rows counts none
    assert [of_rank.chosen > 0 for of_rank in results] == [True, False, True, True]


def hesitating(ranks: Ranks, folder: Path) -> list[tuple[bool, list[Report]]]:
    """Whether all stayed where it was, for two bounds of gain."""
    results = []
    for least_gain in (0.2, 0.001):
        options = {"num_redundant": REDUNDANT, "rebalancing": Rebalancing(every_steps=2, least_gain=least_gain)}
        engine, model, lockstep = spread_engine(ranks, folder, **options)
        lockstep.balancer.on_report = (reports := []).append
        parts = [part.view(torch.uint8) for w in moe_layers(model) for part in w.experts]
        before = [part.clone() for part in parts]
        for _ in range(2):
            list(engine.run(prompts(ranks.rank)))
        stayed = all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
        results.append((stayed, reports))
    return results


def test_even_loads_move_nothing(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "even", bias=0.0)
    for (stayed, [hesitant]), (stayed_eagerly, [eager]) in run_ranks(hesitating, 2, tmp_path, folder):
        assert stayed
        assert (hesitant.num_layers_moved, hesitant.num_slots_moved) == (0, 0)
        assert hesitant.before == hesitant.after == eager.before
        assert not stayed_eagerly
        assert eager.num_layers_moved > 0
        assert eager.after.mean < eager.before.mean


def dying(ranks: Ranks, folder: Path) -> tuple[str, float]:
    engine, *_ = spread_engine(
        ranks, folder, num_redundant=REDUNDANT, rebalancing=Rebalancing(every_steps=2, least_gain=0.05)
    )
    if ranks.rank == 1:
        rebalance.move_weights = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        list(engine.run(requests(0)))
    except EnvironmentFault as fault:
        return str(fault), time.monotonic() - started
    raise AssertionError("nobody was missed")


def test_a_rank_that_dies_in_a_move_is_missed(folder: Path, tmp_path: Path) -> None:
    message, waited_s = run_ranks(dying, 2, tmp_path, folder, timeout_s=20.0, lost=(1,))[0]
    assert "rank 0 lost its peers in an exchange among 2 ranks" in message
    assert waited_s < 20.0


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((0, 0.1), "every_steps: must be 1 or more"), ((1, 0.0), "least_gain: must lie"), ((1, 1.0), "least_gain: must")],
)
def test_settings_that_make_no_sense_say_why(numbers: tuple[int, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Rebalancing(*numbers)


def test_redundant_experts_that_do_not_divide_are_refused(folder: Path) -> None:
    ranks = Ranks(0, 3, 3, torch.device("cpu"), None, None, None)
    with pytest.raises(DataError, match="num_redundant: 16 experts and 4 redundant ones do not divide among 3 ranks"):
        load_spread(folder, ranks, batch_size=BATCH, max_step_tokens=STEP, num_redundant=REDUNDANT)
