"""What each memory switch of training saves: bytes that a rank holds, on one GPU, for a stage of V3's width.

    python -m benchmarks.memory [--dry-run] [--out DIR]

One dense layer and one MoE layer of DeepSeek-V3 with 8 of its 256 experts (a rank's share under EP32), BF16 arithmetic,
FP32 weights, one sequence of 4,096 tokens. `kept` is what the forward pass leaves allocated for the backward pass,
`peak` the most that a step allocates beyond weights and gradients, `moments` the optimizer's. Each row is a process's
measurement of its own model. Results go to benchmarks/results/<gpu>/memory.json; with --dry-run, or without a GPU, the
widths are toys and only the moments are measured, since a CPU's allocator does not say what it gave away.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import device_name, driver_version, write_result
from teacher.model.config import DeepseekV3Config
from teacher.model.initialise import initialise
from teacher.model.transformer import DeepseekV3
from teacher.parallel.layout import Layout
from teacher.parallel.meshes import Meshes, opened_meshes
from teacher.parallel.stage import pipeline_blocks
from teacher.train.activations import SavedActivations
from teacher.train.config import BETAS, MemoryConfig
from teacher.train.spread import MOMENTS
from teacher.train.zero import ZeroAdamW

GIB = 1 << 30
V3 = {
    "vocab_size": 1024, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 3, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 8, "num_experts_per_tok": 8,
}  # fmt: skip
TOY = V3 | {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 2}
SWITCHES = {
    "none": MemoryConfig(),
    "moments bf16": MemoryConfig(moments="bf16"),
    "recompute": MemoryConfig(recompute=True),
    "activations fp8": MemoryConfig(activations="fp8"),
    "all": MemoryConfig(moments="bf16", recompute=True, activations="fp8"),
}


@dataclass
class Row:
    switch: str
    moments_gib: float
    kept_gib: float | None = None
    peak_gib: float | None = None
    step_ms: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dry-run", action="store_true", help="toy widths on the CPU; nothing is written without --out"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of benchmarks/results/<gpu>")
    arguments = parser.parse_args()
    toy = arguments.dry_run or not torch.cuda.is_available()
    device = torch.device("cpu" if toy else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        with opened_meshes(
            Layout(), rank=0, init_method=store, device=torch.device("cuda", 0) if not toy else device
        ) as meshes:
            rows = [measured(name, memory, meshes, toy=toy) for name, memory in SWITCHES.items()]
    result: dict[str, Any] = {
        "device": device_name(device),
        "sizes": "toy" if toy else "DeepSeek-V3's width: 1 dense and 2 MoE layers, 8 experts, 4,096 tokens",
        "torch": torch.__version__,
        "driver": None if toy else driver_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": [asdict(row) for row in rows],
    }
    for row in rows:
        print(row)
    if arguments.out or not toy:
        print(write_result("memory", result, device=device_name(device), folder=arguments.out))


def measured(name: str, memory: MemoryConfig, meshes: Meshes, *, toy: bool) -> Row:
    config = DeepseekV3Config.model_validate(TOY if toy else V3)
    with meshes.device:
        model = initialise(DeepseekV3(config), generator=torch.Generator(meshes.device).manual_seed(0))
    (block,) = pipeline_blocks(model, meshes.layout, (0,), experts="sorted" if toy else "grouped")
    SavedActivations([block], recompute=memory.recompute, fp8=memory.activations == "fp8")
    ids = torch.randint(0, config.vocab_size, (1, 64 if toy else 4096), device=meshes.device)

    def forward() -> torch.Tensor:
        with torch.autocast(meshes.device.type, torch.bfloat16, enabled=not toy):
            loss = block(ids).float().logsumexp(-1).mean()
        block.take_statistics()
        return loss

    forward().backward()  # gradients exist, kernels are compiled
    row = Row(name, 0.0)
    if not toy:
        row.kept_gib, row.peak_gib, row.step_ms = activation_memory(forward)
    named = dict(model.named_parameters())
    optimizer = ZeroAdamW(named, meshes, betas=BETAS, weight_decay=0.1, moments=MOMENTS[memory.moments])
    row.moments_gib = sum(part.exp_avg.nbytes + part.exp_avg_sq.nbytes for part in optimizer.parts) / GIB
    return row


def activation_memory(forward: Any) -> tuple[float, float, float]:
    """(GiB kept after the forward pass, GiB at the step's peak, its milliseconds), beyond what there was."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = forward()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        forward().backward()
    end.record()
    torch.cuda.synchronize()
    return kept / GIB, peak / GIB, start.elapsed_time(end) / 3


if __name__ == "__main__":
    main()
