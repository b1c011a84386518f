"""Experts that move while the engine serves (DeepSeek-V3, arXiv 2412.19437 s.3.4.1: by the loads of the deployment).

    count      the router's kernel knows how many tokens chose each expert; every step adds it to its layer's counts
    place      every so many steps the ranks add up their counts, and find a placement for each layer, all the same one
    move       the weights, one layer before each of the next steps, so that none waits long; then the layer's tables

A V3 layer's slot is 44 MB, and a placement for its 256 experts tens of milliseconds of Python, while a step is under
way: hence one layer a step.

Weights, tables and counts change where they lie: CUDA graphs stay valid. Counts are of chosen experts, wherever they
were, and of all rows that travelled, a graph's padding and warm-ups among them; a rank without rows adds nothing.

Shape legend: L MoE layers, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import DataError
from teacher.models.latent.weights import Fp8MoEWeights, InferenceWeights
from teacher.parallel.groups import Ranks, all_reduce_sum
from teacher.parallel.placement.balance import rebalanced
from teacher.parallel.placement.migrate import move_weights, plan_moves
from teacher.parallel.placement.placement import Placement, SlotTables


@dataclass(frozen=True)
class Rebalancing:
    """Every `every_steps` steps (a layer's move is one), where a layer's imbalance falls by `least_gain` of itself.

    Raises DataError for less than a step, and for a gain outside (0, 1): without one equal placements would alternate.
    """

    every_steps: int
    least_gain: float

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise DataError(f"must be 1 or more, got {self.every_steps}", field="rebalancing.every_steps")
        if not 0.0 < self.least_gain < 1.0:
            raise DataError(f"must lie between 0 and 1, got {self.least_gain}", field="rebalancing.least_gain")


@dataclass(frozen=True)
class PlacedMoEWeights(Fp8MoEWeights):
    """The experts are this rank's own. `tables` say where all lie; `load_E`, int64, how often each was chosen here."""

    tables: SlotTables
    load_E: Tensor


class Imbalance(NamedTuple):
    """Load of the most loaded rank over the mean, of all layers: their mean, and the worst."""

    mean: float
    worst: float


class Report(NamedTuple):
    """Result of a rebalancing; both imbalances are under the loads that it went by."""

    num_layers_moved: int
    num_slots_moved: int
    before: Imbalance
    after: Imbalance


class _LayerOutcome(NamedTuple):
    """Result for one layer."""

    num_moves: int
    before: float
    after: float


def placed(weights: InferenceWeights, placement: Placement) -> tuple[InferenceWeights, list[PlacedMoEWeights]]:
    """The weights with tables and counts of each MoE layer; and these layers alone."""
    layers, moe_layers = [], []
    for layer in weights.layers:
        if isinstance(mlp := layer.mlp, Fp8MoEWeights):
            device = mlp.bias_E.device
            load_E = torch.zeros(placement.num_experts, dtype=torch.int64, device=device)
            moe_layers.append(PlacedMoEWeights(**vars(mlp), tables=placement.tables(device), load_E=load_E))
            layer = replace(layer, mlp=moe_layers[-1])
        layers.append(layer)
    return replace(weights, layers=tuple(layers)), moe_layers


class Balancer:
    """Placer of all layers, each with a placement of its own (`placements`), by counts that begin anew each time.

    `group` is for numbers on the host. Every rebalancing's report, alike on all ranks, goes to `on_report`.
    """

    def __init__(
        self,
        rebalancing: Rebalancing,
        layers: Sequence[PlacedMoEWeights],
        placement: Placement,
        ranks: Ranks,
        group: dist.ProcessGroup,
        *,
        num_groups: int,
    ) -> None:
        self.placements = [placement] * len(layers)
        self.on_report: Callable[[Report], object] = lambda report: None
        self._settings, self._layers, self._num_groups = rebalancing, layers, num_groups
        self._ranks, self._group = ranks, group
        self._num_steps = 0  # since the counts were read
        self._waiting: deque[tuple[int, list[int]]] = deque()  # layers to be placed, by these loads
        self._outcomes: list[_LayerOutcome] = []

    def before_step(self) -> None:
        """Move a layer at most; all ranks call it together, before each step that computes something.

        Raises EnvironmentFault where a rank is lost, as `move_weights`.
        """
        if self._num_steps >= self._settings.every_steps and not self._waiting:
            self._waiting.extend(enumerate(self._read_loads()))
            self._num_steps = 0
        self._num_steps += 1
        if self._waiting:
            self._outcomes.append(self._place(*self._waiting.popleft()))
            if not self._waiting:
                self._report()

    def _read_loads(self) -> list[list[int]]:
        """Loads over all ranks, [L][E]. The host waits for the step under way, asks over gloo, and places."""
        loads_LE = torch.stack([layer.load_E for layer in self._layers]).cpu()
        for layer in self._layers:
            layer.load_E.zero_()
        return all_reduce_sum(loads_LE, self._group).tolist()

    def _place(self, number: int, loads_E: list[int]) -> _LayerOutcome:
        layer, current = self._layers[number], self.placements[number]
        gain, groups = self._settings.least_gain, self._num_groups
        new, before, after = rebalanced(current, loads_E, num_groups=groups, least_gain=gain)
        if moves := plan_moves(current, new):
            move_weights(layer.experts, moves, self._ranks)
            layer.tables.become(new)
            self.placements[number] = new
        return _LayerOutcome(len(moves), before, after)

    def _report(self) -> None:
        num_moves, before, after = zip(*self._outcomes, strict=True)
        num_layers_moved = sum(moves > 0 for moves in num_moves)
        self._outcomes.clear()
        self.on_report(Report(num_layers_moved, sum(num_moves), _over_layers(before), _over_layers(after)))


def _over_layers(imbalances: Sequence[float]) -> Imbalance:
    return Imbalance(sum(imbalances) / len(imbalances), max(imbalances))
