"""Savings of each memory switch of training: bytes that a rank holds, for three layers of V3's kind.

    python -m benchmarks.memory [--dry-run] [--out DIR]

One dense layer and two MoE layers with 8 experts each, BF16 arithmetic, FP32 weights, one sequence. `kept` is what the
forward pass leaves allocated for the backward pass, `moments` the optimizer's; on a GPU also `peak`, the most that a
step allocates beyond weights and gradients, and the time of a step. On a GPU the widths are DeepSeek-V3's and the
allocator is torch's; on a CPU they are smaller, with queries and values of one width, for which attention is one
operation there, and what is allocated is asked of glibc. Results go to benchmarks/results/<device>/memory.json, with
--dry-run (toy widths) only where --out names a folder.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.device import device_name, where_and_when, write_result
from distill.training.loop import BETAS
from teacher.model.config import DeepseekV3Config
from teacher.model.initialise import initialise
from teacher.model.transformer import DeepseekV3
from teacher.parallel.layout import Layout
from teacher.parallel.meshes import Meshes, opened_meshes
from teacher.parallel.pipeline.stage import pipeline_blocks
from teacher.train.activations import SavedActivations
from teacher.train.config import MemoryConfig
from teacher.train.spread import MOMENTS
from teacher.train.zero import ZeroAdamW

MIB = 1 << 20
M_MMAP_THRESHOLD = -3  # of <malloc.h>
V3 = {
    "vocab_size": 1024, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 3, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 8, "num_experts_per_tok": 8,
}  # fmt: skip
SMALL = V3 | {
    "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 128, "num_attention_heads": 4,
    "q_lora_rank": 256, "qk_nope_head_dim": 64, "num_experts_per_tok": 4,
}  # fmt: skip
TOY = SMALL | {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 2}
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
    moments_mib: float
    kept_mib: float | None = None
    peak_mib: float | None = None
    step_ms: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dry-run", action="store_true", help="toy widths on the CPU; nothing is written without --out"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of benchmarks/results/<device>")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available() and not arguments.dry_run
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    fields, tokens = (V3, 4096) if on_gpu else (TOY, 64) if arguments.dry_run else (SMALL, 512)
    config = DeepseekV3Config.model_validate(fields)
    if not on_gpu:
        # Blocks of 16 KiB and more by mmap: glibc counts those over all of its arenas.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 14)
    with (
        tempfile.TemporaryDirectory() as folder,
        opened_meshes(Layout(), rank=0, init_method=f"file://{folder}/store", device=device) as meshes,
    ):
        rows = []
        for name, memory in SWITCHES.items():
            rows.append(measured(name, memory, config, tokens, meshes))
            print(rows[-1], flush=True)
    result: dict[str, Any] = {
        **where_and_when(device),
        "sizes": {"tokens": tokens, **fields},
        "rows": [asdict(row) for row in rows],
    }
    if arguments.out or not arguments.dry_run:
        print(write_result("memory", result, device=device_name(device), folder=arguments.out))


def measured(name: str, memory: MemoryConfig, config: DeepseekV3Config, tokens: int, meshes: Meshes) -> Row:
    on_gpu = meshes.device.type == "cuda"
    with meshes.device:
        model = initialise(DeepseekV3(config), generator=torch.Generator(meshes.device).manual_seed(0))
    (block,) = pipeline_blocks(model, meshes.layout, (0,), experts="grouped" if on_gpu else "sorted")
    SavedActivations([block], recompute=memory.recompute, fp8=memory.activations == "fp8")
    ids = torch.randint(0, config.vocab_size, (1, tokens), device=meshes.device)

    def forward() -> torch.Tensor:
        with torch.autocast(meshes.device.type, torch.bfloat16):
            loss = block(ids).float().logsumexp(-1).mean()
        block.take_statistics()
        return loss

    forward().backward()  # gradients exist, kernels are compiled
    before = allocated(meshes.device)
    loss = forward()
    row = Row(name, 0.0, (allocated(meshes.device) - before) / MIB)
    loss.backward()
    if on_gpu:
        row.peak_mib, row.step_ms = step_peak(forward)
    named = dict(model.named_parameters())
    optimizer = ZeroAdamW(named, meshes, betas=BETAS, weight_decay=0.1, moments=MOMENTS[memory.moments])
    row.moments_mib = sum(part.exp_avg.nbytes + part.exp_avg_sq.nbytes for part in optimizer.parts) / MIB
    return row


class _MallInfo2(ctypes.Structure):
    """glibc's struct mallinfo2; `hblkhd` are bytes in blocks by mmap."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in _names]


def allocated(device: torch.device) -> int:
    """Bytes in use, of torch's allocator on a GPU, else of this process in large blocks."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallInfo2
    return int(mallinfo2().hblkhd)


def step_peak(forward: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """(MiB at a step's peak beyond what there was, its milliseconds)."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward().backward()
    peak = torch.cuda.max_memory_allocated() - before
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        forward().backward()
    end.record()
    torch.cuda.synchronize()
    return peak / MIB, start.elapsed_time(end) / 3


if __name__ == "__main__":
    main()
