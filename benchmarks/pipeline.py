"""Pipeline schedules on GPUs: the measured bubble beside the simulator's, and the loss curve beside one process's.

    python -m benchmarks.pipeline [--ranks 2] [--only bubble|curve] [--dry-run] [--out DIR]

Steps of a model of V3's architecture with an MTP module, two layers of experts a stage of DualPipeV. Every action of a
rank (a forward, a backward or one of its halves, of one micro-batch on one stage) is timed by events around it. The
bubble is what of the step a rank works on nothing; the simulator reckons it from the schedule's order, the measured
means of each action's time and one measured transfer. Then a small model learns to count for fifty steps in FP32, over
the pipeline and on one rank with the same micro-batches.

Results go to benchmarks/results/<gpu>/pipeline-bubble.json and pipeline-curve.json. With --dry-run, or with fewer GPUs
than ranks, the sizes are toys, over gloo on the CPU, and nothing is written unless --out names a folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F

from benchmarks.device import device_name, where_and_when, write_result
from benchmarks.schedules.schedules import SCHEDULES, StageDurations, Work
from benchmarks.schedules.simulate import simulate
from distill.packing import Rows
from distill.progress import silent
from teacher.model.config import DeepseekV3Config
from teacher.parallel.groups import Ranks, opened_ranks
from teacher.parallel.layout import Layout
from teacher.parallel.meshes import Meshes, form_meshes
from teacher.parallel.pipeline.pipeline import Pipeline
from teacher.train.config import PretrainConfig
from teacher.train.spread import SpreadPretraining, draw_part


class Sizes(NamedTuple):
    config: dict[str, Any]
    microbatches: int
    rows: int  # of a micro-batch
    positions: int
    steps: int  # timed, after one that is not


V3_LIKE = {
    "vocab_size": 32_768, "hidden_size": 2_048, "intermediate_size": 8_192, "moe_intermediate_size": 1_024,
    "num_hidden_layers": 8, "first_k_dense_replace": 1, "num_attention_heads": 16, "q_lora_rank": 768,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "num_nextn_predict_layers": 1,
    "max_position_embeddings": 4_096,
}  # fmt: skip
SMALL = V3_LIKE | {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 4, "num_attention_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
    "topk_group": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
FULL, TOY = Sizes(V3_LIKE, 8, 4, 4_096, 5), Sizes(SMALL, 8, 2, 32, 2)
CURVE_STEPS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes over gloo; nothing is written without --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of benchmarks/results/<gpu>")
    arguments = parser.parse_args()
    toy = arguments.dry_run or torch.cuda.device_count() < arguments.ranks
    device = torch.device("cpu" if toy else "cuda")
    about = {**where_and_when(device), "sizes": "toy" if toy else "full"}
    for part in [arguments.only] if arguments.only else PARTS:
        result = about | PARTS[part](arguments.ranks, toy)
        if arguments.out or not toy:
            print(write_result(f"pipeline-{part}", result, device=device_name(device), folder=arguments.out))


def measure_bubbles(num_ranks: int, toy: bool) -> dict[str, Any]:
    rows = []
    for schedule in ("1f1b", "dualpipev"):
        row = _spawn(bubble, num_ranks, schedule, toy)
        rows.append(row)
        print(
            f"{schedule:10} step {row['step_ms']:.1f} ms, bubble {row['bubble_ms']:.2f} ms ({row['share']:.1%}), "
            f"simulated {row['simulated_bubble_ms']:.2f} ms of {row['simulated_step_ms']:.1f} ms",
            flush=True,
        )
    return {"config": (TOY if toy else FULL)._asdict(), "rows": rows}


def compare_curves(num_ranks: int, toy: bool) -> dict[str, Any]:
    alone, piped = (_spawn(curve, ranks, name, toy) for name, ranks in (("1f1b", 1), ("dualpipev", num_ranks)))
    apart = max(abs(a - b) / a for a, b in zip(alone, piped, strict=True))
    print(f"loss {piped[0]} to {piped[-1]}, at most {apart:.1e} from one process's", flush=True)
    return {"config": SMALL, "one_process": alone, "dualpipev": piped, "apart": apart}


PARTS: dict[str, Callable[[int, bool], dict[str, Any]]] = {"bubble": measure_bubbles, "curve": compare_curves}


def _spawn(body: Any, ranks: int, *given: Any) -> Any:
    """Its return value on the first rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _on_rank, (ranks, folder, body, *given), nprocs=ranks, start_method="spawn"
        )
        return json.loads((Path(folder) / "result.json").read_text())


def _on_rank(rank: int, num_ranks: int, folder: str, body: Any, name: str, toy: bool) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu") if toy else torch.device("cuda", rank)
    store = f"file://{folder}/store"
    with opened_ranks(rank=rank, num_ranks=num_ranks, init_method=store, device=device, timeout_s=120.0) as ranks:
        result = body(ranks, name, toy)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))


# --- the bubble -------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Events around every action of a pipeline's stages, on the device's clock, or the host's where that computes."""

    def __init__(self, pipeline: Pipeline, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[Work, Any, Any]] = []
        stages = getattr(pipeline.schedule, "_stages", None) or [pipeline.schedule._stage]
        for stage in stages:
            for method, kinds in (
                ("forward_one_chunk", ("F", "F")),
                ("backward_one_chunk", ("I", "B")),
                ("backward_weight_one_chunk", ("W", "W")),
            ):
                setattr(stage, method, self._timed(stage.stage_index, getattr(stage, method), kinds))

    def mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3 if self._on_gpu else end - start

    def take(self) -> list[tuple[Work, float]]:
        """Actions since the last call and their seconds; the device must have finished them."""
        taken = [(work, self.seconds(start, end)) for work, start, end in self._marks]
        self._marks.clear()
        return taken

    def _timed(self, stage: int, run: Any, kinds: tuple[Any, Any]) -> Any:
        def timed(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            start = self.mark()
            result = run(microbatch, *args, **kwargs)
            self._marks.append((Work(kinds[kwargs.get("full_backward", True)], stage, microbatch), start, self.mark()))
            return result

        return timed


def bubble(ranks: Ranks, schedule: Any, toy: bool) -> dict[str, Any]:
    sizes = TOY if toy else FULL
    config = DeepseekV3Config(**sizes.config)
    layout = Layout(pp=ranks.num_ranks, schedule=schedule, microbatches=sizes.microbatches)
    meshes = form_meshes(layout, ranks)
    shape = (sizes.rows, sizes.positions)
    model = draw_part(config, meshes, seed=0)
    experts = "sorted" if toy else "grouped"
    pipeline = Pipeline(model, meshes, loss=_loss, shape=shape, balance_weight=1e-4, experts=experts)
    watch = Stopwatch(pipeline, meshes.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (sizes.microbatches * sizes.rows, sizes.positions), generator=generator)
    ids = ids.to(meshes.device)
    steps, busy, actions = [], [], []
    for step in range(1 + sizes.steps):
        pipeline.blocks.zero_grad()
        watch.take()
        _meet(meshes)
        start = watch.mark()
        with torch.autocast(meshes.device.type, torch.bfloat16, enabled=not toy):
            pipeline.step(ids, ids)
        end = watch.mark()
        _meet(meshes)
        if step:
            taken = watch.take()
            steps.append(watch.seconds(start, end))
            busy.append(sum(seconds for _, seconds in taken))
            actions.append(taken)
        for block in pipeline.blocks:
            block.take_statistics()
    return _beside_simulator(ranks, schedule, sizes, _transfer(meshes, config, sizes), steps, busy, actions)


def _beside_simulator(
    ranks: Ranks,
    schedule: str,
    sizes: Sizes,
    transfer: float,
    steps: list[float],
    busy: list[float],
    actions: list[Any],
) -> dict[str, Any]:
    """Medians over the steps. A step is as long as the longest rank's; the bubble is that of the idlest."""
    own = steps, busy, [[(work.kind, work.stage, seconds) for work, seconds in step] for step in actions]
    gathered: list[Any] = [None] * ranks.num_ranks
    dist.all_gather_object(gathered, own, group=ranks.world)
    steps_R, busy_R, actions_R = zip(*gathered, strict=True)
    lengths = [max(of_ranks) for of_ranks in zip(*steps_R, strict=True)]
    least_busy = [min(of_ranks) for of_ranks in zip(*busy_R, strict=True)]
    bubbles = [length - worked for length, worked in zip(lengths, least_busy, strict=True)]
    times: dict[Any, list[float]] = defaultdict(list)
    for kind, stage, seconds in (action for of_rank in actions_R for step in of_rank for action in step):
        times[kind, stage].append(seconds)
    means = {key: statistics.mean(values) for key, values in times.items()}
    order = SCHEDULES[schedule](ranks.num_ranks, sizes.microbatches)
    timeline = simulate(order, StageDurations(means), transfer=transfer)
    return {
        "schedule": schedule,
        "ranks": ranks.num_ranks,
        "microbatches": sizes.microbatches,
        "tokens": sizes.rows * sizes.positions,
        "step_ms": 1e3 * statistics.median(lengths),
        "bubble_ms": 1e3 * statistics.median(bubbles),
        "share": statistics.median(bubbles) / statistics.median(lengths),
        "simulated_step_ms": 1e3 * timeline.makespan,
        "simulated_bubble_ms": 1e3 * timeline.bubble,
        "transfer_ms": 1e3 * transfer,
        "action_ms": {f"{kind}{stage}": 1e3 * seconds for (kind, stage), seconds in sorted(means.items())},
    }


def _loss(output: Any, labels_BT: torch.Tensor) -> torch.Tensor:
    main, mtp = (F.cross_entropy(logits.flatten(0, 1).float(), labels_BT.flatten()) for logits in output)
    return main + 0.3 * mtp


def _transfer(meshes: Meshes, config: DeepseekV3Config, sizes: Sizes) -> float:
    """Seconds of one stage's output from the first rank to the next, the median of ten."""
    hidden = torch.zeros(sizes.rows, sizes.positions, config.hidden_size, device=meshes.device)
    seconds = []
    for _ in range(11):
        _meet(meshes)
        started = time.perf_counter()
        if meshes.at.pp == 0:
            dist.send(hidden, 1)
        elif meshes.at.pp == 1:
            dist.recv(hidden, 0)
        if meshes.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _meet(meshes: Meshes) -> None:
    if meshes.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(meshes.world)
    if meshes.device.type == "cuda":
        torch.cuda.synchronize()


# --- the curve --------------------------------------------------------------------------------------------------------


def curve(ranks: Ranks, schedule: str, toy: bool) -> list[float]:
    layout = {"pp": ranks.num_ranks, "schedule": schedule, "microbatches": 8}
    architecture = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    config = PretrainConfig.model_validate(
        {
            "architecture": architecture,
            "vocab_size": SMALL["vocab_size"],
            "num_problems": 1,
            "row_length": 32,
            "rows_per_step": 32,
            "num_steps": CURVE_STEPS,
            "lr": 5e-3,
            "warmup_steps": 5,
            "layout": layout,
        }
    )
    generator = np.random.default_rng(0)
    start, stride = generator.integers(0, 24, (128, 1)), generator.integers(1, 4, (128, 1))
    ids = ((start + stride * np.arange(32)) % 24).astype(np.uint16)
    meshes = form_meshes(config.layout, ranks)
    model = draw_part(DeepseekV3Config(**SMALL), meshes, seed=0)
    run = SpreadPretraining(model, Rows(ids, np.ones_like(ids, dtype=bool)), config, meshes, log_every=1, bf16=False)
    run.run(silent())
    return [row["loss"] for row in run.log]


if __name__ == "__main__":
    main()
