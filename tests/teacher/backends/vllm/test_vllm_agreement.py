"""The vLLM backend with the real vLLM: greedy tokens of native, transformers and vLLM, and vLLM as the chain's teacher.

Native and transformers compute in FP32; vLLM in BF16, whose rounding moves logits. Where two of them part, the two
tokens must have been a tie: their logits, in FP32 after the common prefix, differ by less than the tolerance.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import torch
import transformers
import yaml

from distill.problems import load_problems
from distill.recipe import ReasoningGymSource, VllmTeacher
from distill.records import Problem, Sampling, Trace, TraceRequest
from distill.tables import read_records
from distill.verify import extract_answer
from teacher.backends import open_teacher
from teacher.engine.engine import Engine
from teacher.engine.sequence import Sequence
from teacher.model.checkpoint import load_checkpoint
from teacher.models.latent.model import LatentModel
from tests.pipelines.tiny_world import COMMAND, ENVIRONMENT, potstill
from tests.processes import below, command_lines
from tests.repository import REPOSITORY

CANARY = "sk-canary-0815"
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
# FP32 against FP32: only the order of summation differs.
FP32_TIE = 1e-3
# BF16 keeps 8 bits: an activation is off by up to 0.4%, and a router near a tie may choose another expert.
BF16_TIE = 0.5
MAX_TOKENS = 48

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900), needs_vllm]
SERVER = {"model": "teacher/pico", "flags": {"max-model-len": 512, "max-num-seqs": 16}, "max_concurrency": 16}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The bundled teacher behind the vLLM backend; its server is up."""
    root = tmp_path_factory.mktemp("vllm")
    config = VllmTeacher.model_validate(SERVER)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.closing(open_teacher(config, base_dir=REPOSITORY, log_dir=root)) as teacher,
    ):
        patch.setenv("POTSTILL_CACHE", str(root / "cache"))
        assert httpx.get(f"{teacher.url}/health").status_code == 200
        yield teacher


@pytest.fixture(scope="module")
def folder(teacher):
    """The BF16 copy that the server reads."""
    (copy,) = (Path(teacher._log).parent / "cache" / "bf16").glob("*/pico")
    return copy


@pytest.fixture(scope="module")
def prompts(folder):
    """Fifty held-out questions as the template's token ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer.encode(_rendered(tokenizer, p.prompt), add_special_tokens=False) for p in questions(50)]


def questions(count: int) -> list[Problem]:
    source = ReasoningGymSource(families="distill/problems/pico.yaml", count=count, seed=7, split="held_out")
    return load_problems([source], base_dir=REPOSITORY)[:count]


def _rendered(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def native_tokens(folder, prompts):
    model = load_checkpoint(folder)
    engine = Engine(LatentModel.of(model), batch_size=16, eos_token_ids=model.config.eos_token_ids)
    sequences = [Sequence(i, prompt, max_tokens=MAX_TOKENS, seed=0) for i, prompt in enumerate(prompts)]
    done = {sequence.key: sequence for sequence in engine.run(sequences)}
    return [done[i].generated_ids for i in range(len(prompts))]


def transformers_tokens(folder, prompts):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def vllm_tokens(teacher, folder):
    """The greedy tokens of the backend's completions: their text, encoded again."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    requests = [TraceRequest(problem=problem, sample_index=0) for problem in questions(50)]
    done = {c.request.problem.id: c for c in teacher.generate(requests, Sampling(temperature=0, max_tokens=MAX_TOKENS))}
    rows = []
    for request in requests:
        completion = done[request.problem.id]
        ids = tokenizer.encode(completion.text.removeprefix("<think>\n"), add_special_tokens=False)
        stopped = completion.finish_reason == "stop"
        rows.append([*ids, tokenizer.eos_token_id] if stopped else ids)
        assert len(rows[-1]) == completion.num_tokens
    return rows


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


def test_greedy_tokens_agree(teacher, folder, prompts):
    native = native_tokens(folder, prompts)
    assert all(margin < FP32_TIE for margin in margins(folder, prompts, native, transformers_tokens(folder, prompts)))
    parted = margins(folder, prompts, native, vllm_tokens(teacher, folder))
    assert all(margin < BF16_TIE for margin in parted), parted


def test_vllm_logprobs_agree_with_ours(teacher, folder, prompts):
    """An oracle for the whole forward pass that does not hang on single tokens."""
    model = load_checkpoint(folder)
    body = {"model": "pico", "temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "prompt": prompts[:4]}
    headers = {"Authorization": f"Bearer {teacher.key}"}
    answer = httpx.post(f"{teacher.url}/v1/completions", json=body, headers=headers, timeout=300)
    for prompt, choice in zip(prompts, answer.raise_for_status().json()["choices"], strict=False):
        with torch.no_grad():
            ours = model(torch.tensor([prompt]), with_mtp=False).logits_BTV[0].log_softmax(-1)
        theirs = [
            entry[str(token)]["logprob"] for entry, token in zip(choice["prompt_logprobs"][1:], prompt[1:], strict=True)
        ]
        wanted = ours[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        # The median: where BF16 tips a router, a single position is off by whole nats (in transformers' BF16 too).
        assert (torch.tensor(theirs) - wanted).abs().median() < 0.05


def test_a_dead_engine_is_replaced_and_no_sample_is_lost(teacher):
    """vLLM computes in a process behind the one that answers: SIGKILL to it, with samples in flight."""
    requests = [TraceRequest(problem=problem, sample_index=i) for problem in questions(12) for i in range(4)]
    server = teacher._server
    first_keeper = server._keeper.pid
    engines = [pid for pid in below(first_keeper) if b"EngineCore" in command_line(pid)]
    assert len(engines) == 1
    stream = teacher.generate(requests, Sampling(temperature=0.6, max_tokens=MAX_TOKENS, seed=3))
    arrived = [next(stream)]
    os.kill(engines[0], signal.SIGKILL)
    arrived += stream
    assert len(arrived) == 48
    assert {(c.request.problem.id, c.request.sample_index) for c in arrived} == {
        (r.problem.id, r.sample_index) for r in requests
    }
    assert server.alive
    assert server._keeper.pid != first_keeper
    assert not Path(f"/proc/{engines[0]}").exists()


def test_only_what_generation_needs_is_answered(teacher):
    """vLLM's key covers /v1 alone; its other routes are not there at all."""
    headers = {"Authorization": f"Bearer {teacher.key}"}
    for path in ("/metrics", "/docs", "/openapi.json", "/load", "/invocations", "/v1/responses"):
        assert httpx.get(f"{teacher.url}{path}", headers=headers).status_code == 404
    asked = {"model": "pico", "prompt": "12 + 34"}
    assert httpx.post(f"{teacher.url}/tokenize", json=asked).status_code == 404
    assert httpx.post(f"{teacher.url}/tokenize", json=asked, headers=headers).json()["count"] > 2
    assert httpx.get(f"{teacher.url}/v1/models").status_code == 401
    assert httpx.get(f"{teacher.url}/v1/models", headers=headers).json()["data"][0]["id"] == "pico"
    teacher.close()  # the next test starts a server of its own


def test_generate_keeps_its_samples_and_leaves_no_server_when_it_is_killed(tmp_path):
    """`potstill generate` on a recipe with `backend: vllm`, SIGKILLed with its server up; the same command ends it."""
    pico = {"kind": "reasoning_gym", "families": "distill/problems/pico.yaml", "count": 16, "split": "held_out"}
    recipe = {
        "name": "by-vllm",
        "problems": [pico],
        "teacher": {"backend": "vllm", **SERVER},
        "generate": {"num_samples": 2, "sampling": {"max_tokens": 160, "seed": 1}},
        "distill": {"students": ["qwen2-0.2m"]},
        "eval": {"suites": ["gsm8k"]},
    }
    path, runs = tmp_path / "recipe.yaml", tmp_path / "runs"
    path.write_text(yaml.safe_dump(recipe))
    environment = {"POTSTILL_CACHE": str(tmp_path / "cache"), "OPENAI_API_KEY": CANARY}
    command = [*COMMAND, "generate", str(path), "--out", str(runs)]
    killed = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**ENVIRONMENT, **environment, "POTSTILL_FAILPOINT": "stage.ended"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen: dict[int, bytes] = {}
    while killed.poll() is None:
        seen |= command_lines_with(str(tmp_path).encode())
        time.sleep(0.2)
    assert killed.returncode == -signal.SIGKILL, killed.stdout.read()
    assert any(b"vllm" in command for command in seen.values())
    assert not any(CANARY.encode() in command for command in seen.values())
    deadline = time.monotonic() + 60
    while left := command_lines_with(str(tmp_path).encode()):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    run = runs / "by-vllm" / "generate"
    assert not (run / "manifest.json").exists()
    result = potstill("generate", path, "--out", runs, **environment)
    assert result.returncode == 0, result.stderr
    assert json.loads((run / "manifest.json").read_text())["counts"]["reused"] == 32, "no server was needed again"
    problems = {p.id: p for p in read_records(run / "problems.parquet", Problem)}
    traces = list(read_records(run / "traces", Trace))
    assert (len(problems), len(traces)) == (16, 32)
    assert all(trace.text.startswith("<think>\n") and trace.num_tokens > 0 for trace in traces)
    assert sum(extract_answer(t.text) == problems[t.problem_id].answer for t in traces) >= 28
    written = [path for path in run.rglob("*") if path.is_file()]
    assert {"vllm.log", "ledger.sqlite", "manifest.json"} <= {path.name for path in written}
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]
    assert CANARY not in killed.stdout.read() + result.stdout + result.stderr


def command_line(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def command_lines_with(text):
    """Command lines of the living processes in which `text` occurs, and of those that call themselves vLLM's."""
    return {pid: line for pid, line in command_lines() if text in line}
