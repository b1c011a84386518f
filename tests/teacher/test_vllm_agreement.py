"""Greedy tokens of native, transformers and vLLM on the same weights, and vLLM as the chain's teacher.

Native and transformers compute in FP32; vLLM in BF16, whose rounding moves logits. Where two of them part, the two
tokens must have been a tie: their logits, in FP32 after the common prefix, differ by less than the tolerance.
"""

from pathlib import Path

import httpx
import pytest
import torch
import transformers
import yaml
from v3_models import tiny_config, write_model_folder
from vllm_server import NAME, needs_vllm, vllm_server

from distill.problems import load_problems
from distill.recipe import ReasoningGymSource
from distill.records import Problem, Trace
from distill.tables import read_records
from distill.verify import extract_answer
from teacher.model.checkpoint import convert_checkpoint, load_checkpoint
from teacher.serve.engine import Engine
from teacher.serve.sequence import Sequence
from tests.pipelines.tiny_world import potstill

ROOT = Path(__file__).resolve().parents[2]
PICO = ROOT / "teacher" / "pico"
# FP32 against FP32: only the order of summation differs.
FP32_TIE = 1e-3
# BF16 keeps 8 bits: an activation is off by up to 0.4%, and a router near a tie may choose another expert.
BF16_TIE = 0.5
MAX_TOKENS = 48

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600), needs_vllm]


@pytest.fixture(scope="module", params=["random", "pico"])
def served(request, tmp_path_factory):
    """(BF16 folder, its prompts as token ids, base URL of vLLM serving it)."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "pico":
        if not (PICO / "config.json").exists():
            pytest.skip("teacher/pico is not in this tree")
        source, count = PICO, 50
    else:
        source, count = root / "fp8", 12
        shapes = {"hidden_size": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 4}
        shapes |= {"qk_nope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": 64, "max_position_embeddings": 512}
        # vLLM's rope table ends at factor * original, whatever max_position_embeddings says.
        shapes |= {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 128}}
        write_model_folder(source, tiny_config(**shapes), fp8=True, std=0.08)
    folder = root / "bf16"
    convert_checkpoint(source, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [
        tokenizer.encode(_rendered(tokenizer, problem.prompt), add_special_tokens=False) for problem in questions(count)
    ]
    with vllm_server(folder, root / "vllm.log") as url:
        yield folder, prompts, url


def questions(count: int) -> list[Problem]:
    source = ReasoningGymSource(families="distill/problems/pico.yaml", count=count, seed=7, split="held_out")
    return load_problems([source], base_dir=ROOT)[:count]


def _rendered(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def native_tokens(folder, prompts):
    model = load_checkpoint(folder)
    engine = Engine(model, batch_size=16, eos_token_ids=model.config.eos_token_ids)
    sequences = [Sequence(i, prompt, max_tokens=MAX_TOKENS, seed=0) for i, prompt in enumerate(prompts)]
    done = {sequence.key: sequence for sequence in engine.run(sequences, temperature=0.0, top_p=1.0)}
    return [done[i].generated_ids for i in range(len(prompts))]


def transformers_tokens(folder, prompts):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def vllm_tokens(url, prompts):
    body = {"model": NAME, "temperature": 0, "max_tokens": MAX_TOKENS, "return_token_ids": True, "prompt": prompts}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status().json()
    return [choice["token_ids"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]


def margins(folder, prompts, first, second):
    """For each prompt whose rows part: the FP32 difference of the two tokens' logits at that place."""
    model = load_checkpoint(folder)
    parted = []
    for prompt, one, other in zip(prompts, first, second, strict=True):
        place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if place is None:
            assert len(one) == len(other)
            continue
        with torch.no_grad():
            logits = model(torch.tensor([prompt + one[:place]]), with_mtp=False).logits_BTV[0, -1]
        parted.append(abs((logits[one[place]] - logits[other[place]]).item()))
    return parted


def test_greedy_tokens_agree(served):
    folder, prompts, url = served
    native = native_tokens(folder, prompts)
    assert all(margin < FP32_TIE for margin in margins(folder, prompts, native, transformers_tokens(folder, prompts)))
    parted = margins(folder, prompts, native, vllm_tokens(url, prompts))
    assert all(margin < BF16_TIE for margin in parted), parted


def test_vllm_logprobs_agree_with_ours(served):
    """An oracle for the whole forward pass that does not hang on single tokens."""
    folder, prompts, url = served
    model = load_checkpoint(folder)
    body = {"model": NAME, "temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "prompt": prompts[:4]}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status().json()
    for prompt, choice in zip(prompts, answer["choices"], strict=False):
        with torch.no_grad():
            ours = model(torch.tensor([prompt]), with_mtp=False).logits_BTV[0].log_softmax(-1)
        theirs = [
            entry[str(token)]["logprob"] for entry, token in zip(choice["prompt_logprobs"][1:], prompt[1:], strict=True)
        ]
        wanted = ours[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        # The median: where BF16 tips a router, a single position is off by whole nats (in transformers' BF16 too).
        assert (torch.tensor(theirs) - wanted).abs().median() < 0.05


def test_generate_reads_from_vllm(served, tmp_path):
    """`potstill generate` with the served model as its teacher; of pico's traces nearly all must be right."""
    folder, _, url = served
    recipe = {
        "name": "from-vllm",
        "problems": [
            {"kind": "reasoning_gym", "families": "distill/problems/pico.yaml", "count": 16, "split": "held_out"}
        ],
        "teacher": {"backend": "openai", "base_url": f"{url}/v1", "model": NAME, "max_concurrency": 8},
        "generate": {"num_samples": 2, "sampling": {"max_tokens": 160, "seed": 1}},
        "distill": {"students": ["qwen2-0.2m"]},
        "eval": {"suites": ["gsm8k"]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = potstill("generate", path, "--out", tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "from-vllm" / "generate"
    problems = {p.id: p for p in read_records(run / "problems.parquet", Problem)}
    traces = list(read_records(run / "traces", Trace))
    assert len(problems) == 16
    assert len(traces) == 32
    assert all(trace.text.startswith("<think>\n") and trace.num_tokens > 0 for trace in traces)
    if "pico" in str(folder):
        right = sum(extract_answer(t.text) == problems[t.problem_id].answer for t in traces)
        assert right >= 28
