"""Teacher generation at batch 64: the native engine against transformers' own `generate`, same weights and prompts.

    python -m benchmarks.generation [--model DIR] [--batch 64] [--new-tokens 128]

Every row generates the same number of tokens on both sides (end tokens are ignored), alternating and taking the best
of the repeats. The first rows give each side one thread and one batch; the last one gives both the whole machine and
two batches a core: transformers as many threads as cores, the native backend as many worker processes (their start
counts). The floor is what the arithmetic and the memory traffic of the decode steps need at the speeds that a
large matrix product and a large copy reach in this same run. Without `--model`, teacher/pico is used where it is there,
else random weights of its shapes. Results go to benchmarks/results/<device>/generation.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks.device import device_name, write_result
from distill.cores import num_cores
from distill.problems import load_problems
from distill.recipe import ReasoningGymSource
from distill.records import Problem
from teacher.backends.native.live import generate_in_workers
from teacher.backends.native.workers import EngineSettings
from teacher.engine.engine import Engine
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Sequence
from teacher.model.checkpoint import load_checkpoint, save_checkpoint
from teacher.model.config import DeepseekV3Config, YarnScaling
from teacher.model.counts import count_parameters
from teacher.model.initialise import initialise
from teacher.model.transformer import DeepseekV3
from teacher.models.latent.model import LatentModel
from teacher.models.load import ModelFacts

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "teacher" / "pico"
PICO = DeepseekV3Config(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=5,
    num_attention_heads=4,
    q_lora_rank=128,
    kv_lora_rank=512,
    qk_nope_head_dim=32,
    qk_rope_head_dim=64,
    v_head_dim=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    rope_scaling=YarnScaling(factor=4, original_max_position_embeddings=1024),
)


def main() -> None:
    transformers.logging.set_verbosity_error()  # it reports the MTP module, which it leaves out
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model or BUNDLED
        if not arguments.model and not (BUNDLED / "config.json").exists():
            folder = random_weights(Path(temporary) / "random-weights")
        model = load_checkpoint(folder)
        bench = Bench(folder, model, transformers_model(model, Path(temporary) / "peer"), arguments)
        cores = num_cores()
        prompts = tokenised_prompts(folder, model.config, max(arguments.batch, 2 * cores * arguments.batch))
        rows = [
            bench.row("greedy", prompts[: arguments.batch], temperature=0.0, num_threads=1),
            bench.row("temperature 0.6", prompts[: arguments.batch], temperature=0.6, num_threads=1),
        ]
        if cores > 1:
            rows.append(bench.row(f"temperature 0.6, {cores} cores", prompts, temperature=0.6, num_threads=cores))
    result = {
        "device": device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": folder.resolve().name,
        "rows": rows,
    }
    path = write_result("generation", result)
    print_table(result)
    print(f"\n{path.relative_to(ROOT)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    return parser.parse_args()


def random_weights(folder: Path) -> Path:
    save_checkpoint(initialise(DeepseekV3(PICO), std=0.05, generator=torch.Generator().manual_seed(0)), folder)
    return folder


def transformers_model(model: DeepseekV3, folder: Path) -> transformers.PreTrainedModel:
    """transformers' model with the very same FP32 weights (it cannot read ragged FP8 blocks itself)."""
    save_checkpoint(model, folder, dtype=torch.float32)
    return transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()


def tokenised_prompts(folder: Path, config: DeepseekV3Config | ModelFacts, count: int) -> list[list[int]]:
    if not (folder / "tokenizer.json").exists():
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, config.vocab_size, (count, 40), generator=generator).tolist()
    return asked(folder, held_out_problems(count)[:count])


def held_out_problems(count: int) -> list[Problem]:
    """At least `count`, of all kinds."""
    source = ReasoningGymSource(families="distill/problems/pico.yaml", count=count, seed=5, split="held_out")
    return load_problems([source], base_dir=ROOT)


def asked(folder: Path, problems: list[Problem]) -> list[list[int]]:
    """Token ids of the problems as prompts."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    messages = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    texts = [tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in messages]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def machine_speed() -> tuple[float, float]:
    """(FLOP/s of a large FP32 matrix product, bytes/s of a large copy), the best of five."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    source, target = torch.randn(1 << 25), torch.empty(1 << 25)
    product = min(seconds(lambda: a @ b) for _ in range(5))
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * 1536**3 / product, 2 * source.nbytes / copy


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Bench:
    folder: Path
    model: DeepseekV3
    peer: transformers.PreTrainedModel
    arguments: argparse.Namespace

    def row(self, name: str, prompts: list[list[int]], *, temperature: float, num_threads: int) -> dict:
        torch.set_num_threads(num_threads)
        peak, bandwidth = machine_speed()
        pairs = [
            (
                seconds(lambda: self.ours(prompts, temperature, num_threads)),
                seconds(lambda: self.theirs(prompts, temperature)),
            )
            for _ in range(self.arguments.repeats)
        ]
        time_s, peer_s = min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)
        new_tokens, batch = self.arguments.new_tokens, self.arguments.batch
        floor = sum(
            floor_seconds(self.model.config, prompts[start : start + batch], new_tokens, peak, bandwidth)
            for start in range(0, len(prompts), batch)
        )
        tokens = len(prompts) * new_tokens
        return {
            "name": name,
            "shape": {"prompts": len(prompts), "batch": batch, "new_tokens": new_tokens, "threads": num_threads},
            "seconds": time_s,
            "tokens_per_s": tokens / time_s,
            "peak_flop_per_s": peak,
            "bandwidth_bytes_per_s": bandwidth,
            "floor_seconds": floor,
            "share_of_floor": floor / time_s,
            "peers": {"transformers generate": {"seconds": peer_s, "tokens_per_s": tokens / peer_s}},
            "times_faster": peer_s / time_s,
        }

    def ours(self, prompts: list[list[int]], temperature: float, num_threads: int) -> None:
        new_tokens, batch = self.arguments.new_tokens, self.arguments.batch
        draw = SamplingParams(temperature, top_p=0.95)
        sequences = [
            Sequence(i, prompt, max_tokens=new_tokens, seed=i, sampling_params=draw) for i, prompt in enumerate(prompts)
        ]
        if num_threads == 1:
            engine = Engine(LatentModel.of(self.model), batch_size=batch, eos_token_ids=())
            done = list(engine.run(sequences))
        else:
            engine = EngineSettings(self.folder, batch, frozenset())
            done = list(generate_in_workers(engine, sequences, num_workers=num_threads))
        assert sum(len(sequence.generated_ids) for sequence in done) == len(prompts) * new_tokens

    def theirs(self, prompts: list[list[int]], temperature: float) -> None:
        new_tokens, batch = self.arguments.new_tokens, self.arguments.batch
        draw = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 0} if temperature else {}
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens} | draw
        for start in range(0, len(prompts), batch):
            rows = prompts[start : start + batch]
            longest = max(len(row) for row in rows)
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            out = self.peer.generate(ids, attention_mask=mask, **settings)
            assert out.shape[1] == longest + new_tokens


def floor_seconds(
    config: DeepseekV3Config, prompts: list[list[int]], new_tokens: int, peak: float, bandwidth: float
) -> float:
    """Arithmetic (active weights, absorbed attention) or traffic (all weights, live cache), the larger of each step."""
    counts = count_parameters(config)
    embedding = config.vocab_size * config.hidden_size
    entry = config.kv_lora_rank + config.qk_rope_head_dim
    total = 0.0
    for step in range(new_tokens):
        live = sum(len(prompt) + step for prompt in prompts) * config.num_hidden_layers
        attention = 2 * live * config.num_attention_heads * (entry + config.kv_lora_rank)
        flop = 2 * (counts.active - embedding) * len(prompts) + attention
        traffic = 4 * (counts.total - embedding + live * entry)
        total += max(flop / peak, traffic / bandwidth)
    return total


def print_table(result: dict) -> None:
    print(f"{result['device']}, {result['model']}")
    print(f"{'':32}{'tokens/s':>10}{'seconds':>10}{'floor':>10}{'share':>8}{'transformers':>14}{'faster':>8}")
    for row in result["rows"]:
        peer = row["peers"]["transformers generate"]["tokens_per_s"]
        print(
            f"{row['name']:32}{row['tokens_per_s']:10.0f}{row['seconds']:10.2f}{row['floor_seconds']:10.2f}"
            f"{row['share_of_floor']:8.0%}{peer:14.0f}{row['times_faster']:7.1f}x"
        )


if __name__ == "__main__":
    main()
