"""Placements of experts by loads that a router was seen to give: the most loaded rank over the mean.

    python -m benchmarks.placement [--problems 160] [--dry-run] [--out DIR]

The bundled teacher reads problems with its own answers, in three windows: two of every kind of problem, then one of two
kinds alone. Before each of its MoE layers a router of DeepSeek-V3's form (256 experts in eight groups, eight a token
out of four groups; random weights and no bias, as before training evens loads out) chooses for the same tokens, and its
choices are counted. A window's loads then lie on 32 ranks with a spare slot each: in order of the experts, as the
window before had placed them, and placed anew where that gains enough
(`teacher.parallel.placement.balance.rebalanced`); over all ranks, or with groups kept on one of four nodes. Results,
the counts included, go to benchmarks/results/<device>/placement.json. With --dry-run problems are few, and nothing is
written unless --out names a folder.

Shape legend: L layers, E experts, N tokens, D hidden.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import where_and_when, write_result
from benchmarks.generation import BUNDLED, asked, held_out_problems
from benchmarks.kernels.elementwise import EXPERTS, V3_ROUTES
from benchmarks.speculation import MAX_TOKENS
from distill.records import Problem
from teacher.engine.engine import Engine
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Sequence
from teacher.kernels.moe.route import route
from teacher.model.checkpoint import load_checkpoint
from teacher.models.latent.model import LatentModel
from teacher.parallel.placement.balance import imbalance, rebalanced
from teacher.parallel.placement.placement import Placement

RANKS, REDUNDANT, RANKS_PER_NODE = 32, 32, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=160, help="of a window")
    parser.add_argument("--dry-run", action="store_true", help="few problems; nothing is written without --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of benchmarks/results/<device>")
    arguments = parser.parse_args()
    count = 8 if arguments.dry_run else arguments.problems
    loads: dict[str, list[list[int]]] = {}
    for name, problems in windows(count).items():
        started = time.perf_counter()
        loads[name] = counted(answered(problems)).tolist()
        num_tokens = sum(loads[name][0]) // V3_ROUTES.num_experts_per_tok
        print(f"{name}: {num_tokens} tokens, {time.perf_counter() - started:.0f} s", flush=True)
    rows = [row for per_node in (RANKS, RANKS_PER_NODE) for row in placed(loads, per_node)]
    print(f"{'window':20s} {'nodes':>5s} {'layer':>5s} {'in order':>9s} {'carried over':>12s} {'anew':>7s} {'ms':>6s}")
    for row in rows:
        print(
            f"{row['window']:20s} {row['nodes']:5d} {row['layer']:5d} {row['in_order']:9.3f} "
            f"{row['carried_over']:12.3f} {row['anew']:7.3f} {row['us'] / 1e3:6.1f}"
        )
    if arguments.out or not arguments.dry_run:
        result = where_and_when(torch.device("cpu")) | {"problems": count, "rows": rows, "loads": loads}
        print(write_result("placement", result, folder=arguments.out))


def windows(count: int) -> dict[str, list[Problem]]:
    problems = held_out_problems(8 * count)
    kinds = sorted({problem.source for problem in problems})[:2]
    few = [problem for problem in problems[2 * count :] if problem.source in kinds]
    return {
        "all kinds": problems[:count],
        "all kinds, later": problems[count : 2 * count],
        " and ".join(kinds): few[:count],
    }


def answered(problems: list[Problem]) -> list[list[int]]:
    """Tokens of each problem and the teacher's answer to it."""
    model = LatentModel.load(BUNDLED, torch.device("cpu"))
    prompts = asked(BUNDLED, problems)
    sequences = [Sequence(n, ids, MAX_TOKENS, n, SamplingParams(0.6)) for n, ids in enumerate(prompts)]
    engine = Engine(model, batch_size=64, eos_token_ids=model.config.eos_token_ids)
    return [[*done.prompt_ids, *done.generated_ids] for done in engine.run(sequences)]


@torch.inference_mode()
def counted(texts: list[list[int]]) -> Tensor:
    """Choices of each expert [layers, experts]."""
    model = load_checkpoint(BUNDLED)
    routers = model.routers(with_mtp=False)
    generator = torch.Generator().manual_seed(0)
    weights_LED = torch.randn(len(routers), EXPERTS, model.config.hidden_size, generator=generator)
    loads_LE = torch.zeros(len(routers), EXPERTS, dtype=torch.int64)

    def count(layer: int, hidden_ND: Tensor) -> None:
        logits_NE = hidden_ND @ weights_LED[layer].T / model.config.hidden_size**0.5
        loads_LE[layer] += route(logits_NE, torch.zeros(EXPERTS), V3_ROUTES).load_E

    for layer, router in enumerate(routers):
        router.register_forward_pre_hook(lambda _, given, layer=layer: count(layer, given[0]))
    for ids in texts:
        model(torch.tensor([ids]), with_mtp=False)
    return loads_LE


def placed(loads: dict[str, list[list[int]]], ranks_per_node: int) -> list[dict[str, Any]]:
    """A row a window and layer. Windows follow each other: each begins with what the one before had placed."""
    nodes = RANKS // ranks_per_node
    sizes = {"num_experts": EXPERTS, "num_ranks": RANKS, "ranks_per_node": ranks_per_node}
    in_order = Placement.contiguous(**sizes, num_redundant=REDUNDANT)
    rows = []
    for layer in range(len(next(iter(loads.values())))):
        current = in_order
        for window, loads_LE in loads.items():
            loads_E = loads_LE[layer]
            started = time.perf_counter()
            found = rebalanced(current, loads_E, num_groups=V3_ROUTES.n_group if nodes > 1 else 1)
            rows.append(
                {
                    "window": window,
                    "nodes": nodes,
                    "ranks": RANKS,
                    "experts": EXPERTS,
                    "redundant": REDUNDANT,
                    "layer": layer,
                    "in_order": imbalance(in_order, loads_E),
                    "without_redundant": imbalance(Placement.contiguous(**sizes), loads_E),
                    "carried_over": found.before,
                    "anew": found.after,
                    "us": 1e6 * (time.perf_counter() - started),
                }
            )
            current = found.placement
    return rows


if __name__ == "__main__":
    main()
