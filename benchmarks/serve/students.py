"""Published students' models on a GPU, in BF16: tokens a second, with all prompts at once and as places get free.

The models are those of `potstill models fetch small` in `models/`, or in the folder that POTSTILL_MODELS names; what is
not there is left out. The prompts are questions of GSM8K's training set with the instruction that the small recipe
gives, from the folder that POTSTILL_BENCH_DATA names, or from the Hub.

- steady: as many prompts as sequences in flight, all at once, 256 tokens each (end tokens are ignored); medians.
- admitted: thousands of prompts, each begun when a place gets free, to its end token or 512 tokens; texts are decoded.

Temperature 0.6, top-p 1, for both engines, a process for each number in flight, which vLLM is told when it starts. Ours
is the engine as the native backend opens it, its graphs captured before the clock runs; vLLM's is `LLM.generate`, with
FlashInfer's sampler where that is installed. Rows are written as soon as they are measured.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.generation import ROOT, held_out_problems
from distill.recipe import Instruction
from teacher.backends.tokenizer import encode_prompt, load_tokenizer, render_question
from teacher.models.load import read_facts

NAMES = ("Qwen2.5-Coder-1.5B-Instruct", "SmolLM2-135M-Instruct")
INSTRUCTION = Instruction(prompt_suffix="\nPlease reason step by step, and put your final answer within \\boxed{}.")
GSM8K = "gsm8k_train.jsonl"
TEMPERATURE, TOP_P = 0.6, 1.0
STEADY, ADMITTED = KINDS = "steady", "admitted"

# Token ids of prompts, tokens each at the most, whether end tokens are ignored; tokens that were written.
Generate = Callable[[list[list[int]], int, bool], int]


class Run(NamedTuple):
    num_prompts: int
    num_tokens: int
    seconds: float


class Scale(NamedTuple):
    in_flight: list[int]
    num_tokens: int  # steady
    max_tokens: int  # admitted
    prompts: dict[int, int]  # admitted, by how many are in flight; the others: `most_prompts`
    most_prompts: int
    repeats: int
    questions: Callable[[int], Iterable[str]]  # so many

    def num_prompts(self, in_flight: int) -> int:
        return self.prompts.get(in_flight, self.most_prompts)


def scenarios() -> dict[str, Path]:
    """The models that are here: folders by name."""
    models = Path(os.environ.get("POTSTILL_MODELS", ROOT / "models"))
    return {name: models / name for name in NAMES if (models / name / "config.json").is_file()}


def gsm8k(count: int) -> list[str]:
    """The first questions to train on. Raises OSError where neither the folder nor the Hub has them."""
    if data := os.environ.get("POTSTILL_BENCH_DATA"):
        lines = (Path(data) / GSM8K).read_text(encoding="utf-8").splitlines()[:count]
        return [json.loads(line)["question"] for line in lines]
    from datasets import load_dataset

    try:
        return load_dataset("openai/gsm8k", "main", split="train")["question"][:count]
    except Exception as exc:  # whatever of its kinds it has for a Hub that cannot be reached
        raise OSError(f"GSM8K: neither POTSTILL_BENCH_DATA nor the Hub has it: {type(exc).__name__}") from exc


def scale(*, toy: bool) -> Scale:
    if toy:
        return Scale([1, 2], 4, 8, {}, 5, 1, lambda count: [problem.prompt for problem in held_out_problems(count)])
    return Scale([1, 64, 256, 512], 256, 512, {1: 32, 64: 512}, 4_096, 3, gsm8k)


def prompts_of(folder: Path, questions: Iterable[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(folder, read_facts(folder), of_base=True)
    return [encode_prompt(tokenizer, render_question(tokenizer, question, INSTRUCTION)) for question in questions]


def ours(folder: Path, scale: Scale, in_flight: int) -> Iterator[dict[str, Any]]:
    from teacher.backends.native.opening import open_native
    from teacher.engine.sampler import SamplingParams
    from teacher.engine.sequence import Sequence

    started = time.perf_counter()
    backend = open_native(folder, batch_size=in_flight, as_student=True)
    engine, ends = backend.engine, backend.engine.eos_token_ids
    print(f"  ready in {time.perf_counter() - started:.1f} s, graphs captured", flush=True)
    drawn = SamplingParams(TEMPERATURE, TOP_P)

    def generate(prompts: list[list[int]], max_tokens: int, ignores_end: bool) -> int:
        engine.eos_token_ids = frozenset() if ignores_end else ends
        wanted = [Sequence(n, ids, max_tokens, seed=n, sampling_params=drawn) for n, ids in enumerate(prompts)]
        num_tokens = 0
        for done in engine.run(wanted):
            num_tokens += len(done.generated_ids)
            backend.spell(*done.generated_ids)
        return num_tokens

    return timed(generate, folder, scale, in_flight)


def vllm(folder: Path, scale: Scale, in_flight: int) -> Iterator[dict[str, Any]]:
    os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    if importlib.util.find_spec("flashinfer"):
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "1"
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder), dtype="bfloat16", max_model_len=2_048, max_num_seqs=in_flight, gpu_memory_utilization=0.8)

    def generate(prompts: list[list[int]], max_tokens: int, ignores_end: bool) -> int:
        drawn = SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, max_tokens=max_tokens, ignore_eos=ignores_end)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], drawn, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return timed(generate, folder, scale, in_flight)


ENGINES: dict[str, Callable[[Path, Scale, int], Iterator[dict[str, Any]]]] = {"ours": ours, "vllm": vllm}


def timed(generate: Generate, folder: Path, scale: Scale, in_flight: int) -> Iterator[dict[str, Any]]:
    """Both measurements of one number in flight, each as soon as it is there; no question is read twice."""
    num_admitted = scale.num_prompts(in_flight)
    prompts = iter(prompts_of(folder, scale.questions((1 + scale.repeats) * in_flight + num_admitted)))

    def steady() -> Run:
        return _run(generate, list(itertools.islice(prompts, in_flight)), scale.num_tokens, True)

    steady()
    yield _measured(STEADY, in_flight, [steady() for _ in range(scale.repeats)])
    yield _measured(ADMITTED, in_flight, [_run(generate, list(prompts), scale.max_tokens, False)])


def _run(generate: Generate, prompts: list[list[int]], max_tokens: int, ignores_end: bool) -> Run:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    started = time.perf_counter()
    num_tokens = generate(prompts, max_tokens, ignores_end)
    return Run(len(prompts), num_tokens, time.perf_counter() - started)


def _measured(kind: str, in_flight: int, runs: list[Run]) -> dict[str, Any]:
    rates = [run.num_tokens / run.seconds for run in runs]
    rate = statistics.median(rates)
    print(f"  {in_flight} in flight, {kind}: {rate:.0f} tokens/s ({', '.join(f'{r:.0f}' for r in rates)})", flush=True)
    return {
        "scenario": kind, "batch": in_flight, "prompts": runs[0].num_prompts,
        "tokens": [run.num_tokens for run in runs], "tokens_per_s": rate,
    }  # fmt: skip
