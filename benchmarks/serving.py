"""Generation through the vLLM backend against vLLM's own benchmark of the same server: same prompts, lengths, load.

    python -m benchmarks.serving [--requests 96] [--new-tokens 64] [--concurrency 16] [--repeats 5]

One server, started by the backend. Both sides ask its chat endpoint, streamed, with a seed a request, end tokens
ignored, so that every answer has the same length; they take turns (the order changes each time), and the medians
count. Ours is timed from the call of `generate` to its last completion; theirs is what `vllm bench serve` reports.
Results go to benchmarks/results/<device>/serving.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.device import device_name
from distill.manifest import write_atomically
from distill.problems import load_problems
from distill.recipe import ReasoningGymSource, VllmTeacher
from distill.records import Problem, Sampling, TraceRequest
from teacher.backends.vllm.backend import VllmBackend, open_vllm, served_name

ROOT = Path(__file__).resolve().parent.parent
TEMPERATURE, TOP_P = 0.6, 0.95


def main() -> None:
    arguments = parse_arguments()
    config = VllmTeacher.model_validate(
        {
            "model": arguments.model,
            "flags": {"max-model-len": 512, "max-num-seqs": arguments.concurrency},
            "max_concurrency": arguments.concurrency,
            "extra_body": {"ignore_eos": True},
        }
    )
    source = ReasoningGymSource(families="distill/problems/pico.yaml", count=arguments.requests, seed=5)
    problems = load_problems([source], base_dir=ROOT)[: arguments.requests]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = open_vllm(config, base_dir=ROOT, log_dir=folder)
        try:
            url = teacher.url
            theirs = vllm_bench(teacher, url, problems, folder, arguments)
            sides: dict[str, Callable[[int], float]] = {
                "potstill": lambda turn: ours(teacher, problems, arguments.new_tokens, turn),
                "vllm bench serve": theirs,
            }
            for side in sides.values():  # warm up
                side(0)
            measured: dict[str, list[float]] = {name: [] for name in sides}
            for turn in range(1, arguments.repeats + 1):
                for name in sorted(sides, reverse=turn % 2 == 0):
                    measured[name].append(sides[name](turn))
        finally:
            teacher.close()
    report(teacher, arguments, measured)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="teacher/pico")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def ours(teacher: VllmBackend, problems: list[Problem], new_tokens: int, turn: int) -> float:
    """New tokens a second through the backend."""
    requests = [TraceRequest(problem=problem, sample_index=turn) for problem in problems]
    sampling = Sampling(temperature=TEMPERATURE, top_p=TOP_P, max_tokens=new_tokens, seed=turn)
    started = time.perf_counter()
    done = list(teacher.generate(requests, sampling))
    elapsed = time.perf_counter() - started
    assert [c.num_tokens for c in done] == [new_tokens] * len(problems)
    return len(problems) * new_tokens / elapsed


def vllm_bench(
    teacher: VllmBackend, url: str, problems: list[Problem], folder: Path, arguments: argparse.Namespace
) -> Callable[[int], float]:
    """New tokens a second by vLLM's benchmark, whose program is run in this process: its import takes half a minute."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": problem.prompt}) + "\n" for problem in problems))
    os.environ["OPENAI_API_KEY"] = teacher.key  # where it looks for it
    command = ["--backend", "openai-chat", "--base-url", url, "--endpoint", "/v1/chat/completions"]
    command += ["--model", served_name(teacher.config.model), "--tokenizer", teacher.config.model]
    command += ["--dataset-name", "custom", "--dataset-path", str(data), "--skip-chat-template", "--disable-shuffle"]
    command += ["--num-prompts", str(len(problems)), "--custom-output-len", str(arguments.new_tokens), "--ignore-eos"]
    command += ["--max-concurrency", str(arguments.concurrency), "--disable-tqdm"]
    command += ["--temperature", str(TEMPERATURE), "--top-p", str(TOP_P)]
    parser = FlexibleArgumentParser()
    add_cli_args(parser)

    def run(turn: int) -> float:
        import asyncio

        parsed = parser.parse_args([*command, "--extra-body", json.dumps({"seed": turn})])
        with contextlib.redirect_stdout(io.StringIO()):
            result: dict[str, Any] = asyncio.run(main_async(parsed))
        assert result["completed"] == len(problems), result
        assert result["total_output_tokens"] == len(problems) * arguments.new_tokens, result["total_output_tokens"]
        return float(result["output_throughput"])

    return run


def report(teacher: VllmBackend, arguments: argparse.Namespace, measured: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in measured.items()}
    ratios = [a / b for a, b in zip(measured["potstill"], measured["vllm bench serve"], strict=True)]
    result = {
        "device": device_name(),
        "versions": {"vllm": teacher.version},
        "model": served_name(teacher.config.model),
        "shape": {name: getattr(arguments, name) for name in ("requests", "new_tokens", "concurrency", "repeats")},
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "tokens_per_s": {name: [round(value, 1) for value in values] for name, values in measured.items()},
        "median_tokens_per_s": {name: round(value, 1) for name, value in medians.items()},
        "ratio_of_medians": round(medians["potstill"] / medians["vllm bench serve"], 3),
        "median_of_ratios": round(statistics.median(ratios), 3),
    }
    path = ROOT / "benchmarks" / "results" / device_name() / "serving.json"
    write_atomically(path, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
