"""A slice of DeepSeek-V3 at full width on a GPU: a dense layer and a few MoE layers, with random weights.

They are in FP8, written once as a checkpoint folder that ours and vLLM load; transformers, which has no fast FP8
experts, has BF16 ones of the same shapes. A decode step's time is what 64 more tokens a sequence cost, divided by 64:
two whole runs of each engine, scheduling and sampling included. The floor counts the bytes that a step must read:
weights once, of the routed experts those that a batch is expected to meet, and the cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from teacher.model.config import DeepseekV3Config
from teacher.model.fp8 import QUANTIZATION_CONFIG, scale_shape
from teacher.model.names import empty_model, is_quantised, places

V3 = {
    "vocab_size": 129_280, "hidden_size": 7_168, "intermediate_size": 18_432, "moe_intermediate_size": 2_048,
    "num_attention_heads": 128, "q_lora_rank": 1_536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "max_position_embeddings": 8_192, "eos_token_id": 1, "bos_token_id": 0,
}  # fmt: skip
TOY = V3 | {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
    "num_attention_heads": 4, "q_lora_rank": 128, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4,
    "topk_group": 2, "qk_nope_head_dim": 32, "v_head_dim": 32, "max_position_embeddings": 1_024,
}  # fmt: skip
CONTEXT, FEW, MANY = 1_024, 4, 68  # tokens of a prompt; tokens written in a step's two runs
PREFILL = 8  # prompts of CONTEXT tokens at once
SHARD_BYTES = 4 << 30


class Scale(NamedTuple):
    config: DeepseekV3Config
    context: int
    few: int
    many: int
    batches: list[int]


def scale(*, moe_layers: int, batches: list[int], toy: bool) -> Scale:
    layers = {"num_hidden_layers": 1 + moe_layers, "first_k_dense_replace": 1}
    if toy:
        return Scale(DeepseekV3Config(**TOY, **layers), 64, 2, 6, [1, 2])
    return Scale(DeepseekV3Config(**V3, **layers), CONTEXT, FEW, MANY, batches)


def write_random(folder: Path, config: DeepseekV3Config, device: torch.device) -> None:
    """A checkpoint in V3's FP8 format, matrix by matrix from the device, never whole in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    num_bytes = 0

    def flush() -> None:
        nonlocal num_bytes
        file = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()
        num_bytes = 0

    for name, (_, shape) in places(config, shapes).items():
        numbers = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        if is_quantised(name, shape):
            shard[name] = (numbers * 100).clamp(-448, 448).to(torch.float8_e4m3fn).cpu()
            scales = torch.full(scale_shape((shape[0], shape[1])), 1e-2 / shape[1] ** 0.5)
            shard[name + "_scale_inv"] = scales
            num_bytes += scales.nbytes
        elif "correction_bias" in name:
            shard[name] = torch.zeros(shape)
        else:
            scaled = torch.ones(shape) if "norm" in name else numbers / shape[-1] ** 0.5
            shard[name] = scaled.to(torch.bfloat16).cpu()
        num_bytes += shard[name].nbytes
        if num_bytes > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tree = config.to_json() | {"torch_dtype": "bfloat16", "quantization_config": QUANTIZATION_CONFIG}
    (folder / "config.json").write_text(json.dumps(tree))


# --- engines: each returns {"decode": {batch: seconds a step}, "prefill": tokens a second} ----------------------------


def ours(folder: Path, scale: Scale, device: torch.device | None = None) -> dict[str, Any]:
    from teacher.engine.engine import Engine
    from teacher.engine.sequence import Sequence
    from teacher.model.block_checkpoint import load_blocks
    from teacher.models.latent.model import LatentModel
    from teacher.models.latent.weights import fuse_entries

    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    config, entries = load_blocks(folder, device)
    model = LatentModel(fuse_entries(config, entries))
    del entries
    print(f"ours: loaded in {time.perf_counter() - started:.0f} s", flush=True)
    pages = max(scale.batches) * (-(-(scale.context + scale.many) // 64) + 1)
    engine = Engine(
        model, batch_size=max(scale.batches), eos_token_ids=(), num_pages=pages, prefix_caching=False,
    )  # fmt: skip

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        list(engine.run([Sequence(n, ids, max_tokens=num_tokens, seed=n) for n, ids in enumerate(prompts)]))

    return timed(generate, scale)


def vllm(folder: Path, scale: Scale) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    llm = LLM(
        str(folder), skip_tokenizer_init=True, enable_prefix_caching=False, max_num_seqs=max(scale.batches),
        max_model_len=scale.config.max_position_embeddings, gpu_memory_utilization=0.9, max_num_batched_tokens=8_192,
    )  # fmt: skip
    print(f"vllm: ready in {time.perf_counter() - started:.0f} s", flush=True)

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)

    return timed(generate, scale)


def transformers(folder: Path, scale: Scale) -> dict[str, Any]:
    from transformers import DeepseekV3Config as PeerConfig, DeepseekV3ForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tree = {key: value for key, value in scale.config.to_json().items() if key != "num_nextn_predict_layers"}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = DeepseekV3ForCausalLM(PeerConfig(**tree, attn_implementation="sdpa")).eval()

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        ids = torch.tensor(prompts, device=device)
        settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    return timed(generate, scale._replace(batches=[32] if 32 in scale.batches else scale.batches[:1]))


ENGINES: dict[str, Callable[[Path, Scale], dict[str, Any]]] = {"ours": ours, "vllm": vllm, "transformers": transformers}


def timed(generate: Callable[[list[list[int]], int], None], scale: Scale, *, seed: int = 1) -> dict[str, Any]:
    """Each batch warms itself up by a whole run."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = scale.config.vocab_size

    def prompts(count: int) -> list[list[int]]:
        return torch.randint(2, vocabulary, (count, scale.context), generator=generator).tolist()

    def seconds(count: int, num_tokens: int) -> float:
        given = prompts(count)
        _synchronise()
        started = time.perf_counter()
        generate(given, num_tokens)
        _synchronise()
        return time.perf_counter() - started

    decode: dict[int, float] = {}
    for batch in scale.batches:
        seconds(batch, scale.few)
        seconds(batch, scale.many)
        pairs = [(seconds(batch, scale.few), seconds(batch, scale.many)) for _ in range(3)]
        steps = sorted((more - less) / (scale.many - scale.few) for less, more in pairs)
        decode[batch] = steps[1]
        print(
            f"  batch {batch}: {1e3 * steps[1]:.3f} ms a step ({', '.join(f'{1e3 * s:.3f}' for s in steps)})",
            flush=True,
        )
    seconds(PREFILL, 1)
    prefill = PREFILL * scale.context / sorted(seconds(PREFILL, 1) for _ in range(3))[1]
    print(f"  prefill {prefill:.0f} tokens/s", flush=True)
    return {"decode": decode, "prefill": prefill}


def _synchronise() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


# --- the table --------------------------------------------------------------------------------------------------------


def rows(scale: Scale, results: dict[str, Any], bytes_per_s: float) -> Iterable[dict[str, Any]]:
    for engine, result in results.items():
        for batch, step_s in result["decode"].items():
            floor_s = step_bytes(scale, int(batch)) / bytes_per_s
            yield {
                "engine": engine, "scenario": "decode", "batch": int(batch), "step_ms": 1e3 * step_s,
                "tokens_per_s": int(batch) / step_s, "floor_ms": 1e3 * floor_s, "share_of_floor": floor_s / step_s,
            }  # fmt: skip
        yield {
            "engine": engine, "scenario": "prefill", "batch": PREFILL, "step_ms": None,
            "tokens_per_s": result["prefill"], "floor_ms": None, "share_of_floor": None,
        }  # fmt: skip


def step_bytes(scale: Scale, batch: int) -> float:
    """Bytes that a decode step must read: FP8 weights, BF16 absorbed factors and head, and every sequence's latents."""
    config = scale.config
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    entry = latent + config.qk_rope_head_dim
    assert config.q_lora_rank is not None
    attention = hidden * (config.q_lora_rank + entry) + config.q_lora_rank * heads * config.qk_head_dim
    attention += heads * config.v_head_dim * hidden + 2 * heads * latent * (config.qk_nope_head_dim + config.v_head_dim)
    cache = batch * (scale.context + (scale.few + scale.many) / 2) * entry * 2
    dense = 3 * hidden * config.intermediate_size
    expert = 3 * hidden * config.moe_intermediate_size
    met = config.n_routed_experts * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch)
    moe = expert * (met + config.n_shared_experts) + 2 * hidden * config.n_routed_experts
    num_moe = config.num_hidden_layers - config.first_k_dense_replace
    total = config.num_hidden_layers * (attention + cache) + config.first_k_dense_replace * dense + num_moe * moe
    return total + 2 * config.vocab_size * hidden
