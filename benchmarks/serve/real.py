"""Published students' models on a CPU, in FP32 and BF16, at a few streams: tokens a second, whole runs.

The models are those of `potstill models fetch small` in `models/`, or in the folder that POTSTILL_MODELS names; what is
not there is left out. Every request writes the same number of tokens, greedily, end tokens ignored; all have a thread
a core. Ours is the engine as `teacher.dtype` opens it, transformers its `generate` over one padded batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.generation import ROOT
from benchmarks.serve.pico import Scale, generate_padded, timed
from distill.cores import num_cores
from teacher.engine.engine import Engine
from teacher.engine.sequence import Sequence
from teacher.models.load import load_model

NAMES = ("SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct")
DTYPES = ("float32", "bfloat16")
STREAMS = [1, 6, 32]
# On a processor without products in BF16 torch takes seconds a token: such an engine is left out, and named.
LIMIT_S = 900.0


def scenarios() -> dict[str, tuple[Path, str]]:
    """The models that are here, in each type: folder and torch's name of the type, by `NAME in TYPE`."""
    models = Path(os.environ.get("POTSTILL_MODELS", ROOT / "models"))
    here = [models / name for name in NAMES if (models / name / "config.json").is_file()]
    return {f"{folder.name} in {dtype}": (folder, dtype) for folder in here for dtype in DTYPES}


def scale(*, toy: bool) -> Scale:
    return Scale([1], 4, 1) if toy else Scale(STREAMS, 32, 3)


def ours(folder: Path, dtype: str, scale: Scale) -> dict[str, Any]:
    torch.set_num_threads(num_cores())
    model = load_model(folder, torch.device("cpu"), dtype=getattr(torch, dtype))
    engine = Engine(model, batch_size=max(scale.requests), eos_token_ids=())

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        wanted = [Sequence(number, ids, max_tokens=num_tokens, seed=number) for number, ids in enumerate(prompts)]
        assert sum(len(done.generated_ids) for done in engine.run(wanted)) == len(prompts) * num_tokens

    return timed(generate, folder, scale, scale.requests)


def transformers(folder: Path, dtype: str, scale: Scale) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_cores())
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
    )
    return timed(generate_padded(model.eval()), folder, scale, scale.requests)


ENGINES: dict[str, Callable[[Path, str, Scale], dict[str, Any]]] = {"ours": ours, "transformers": transformers}


def rows(scenario: str, scale: Scale, results: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for engine, result in results.items():
        for streams, seconds in result.items():
            step_s = seconds / scale.num_tokens
            yield {
                "engine": engine, "scenario": scenario, "batch": int(streams), "step_ms": 1e3 * step_s,
                "tokens_per_s": int(streams) / step_s, "floor_ms": None, "share_of_floor": None,
            }  # fmt: skip
