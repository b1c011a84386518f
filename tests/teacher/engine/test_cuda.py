"""What only a GPU can show: BF16 grouped experts forward and backward, a compiled training step, the engine on CUDA."""

import json

import pytest
import tokenizers
import torch

from teacher.engine.detokenizer import decode_by
from teacher.engine.engine import Engine
from teacher.engine.guide import Grammar, Guides
from teacher.engine.runner import ModelRunner
from teacher.engine.sampler import SamplingParams
from teacher.engine.scheduler import Chunk
from teacher.engine.sequence import Sequence
from teacher.engine.step import in_order
from teacher.http.structured import json_rule
from teacher.model.balance import update_bias
from teacher.model.block_checkpoint import load_blocks
from teacher.model.checkpoint import load_checkpoint
from teacher.model.experts import routed_experts
from teacher.model.initialise import initialise
from teacher.model.transformer import DeepseekV3
from teacher.models.latent.model import LatentModel
from teacher.models.latent.weights import fuse_entries
from tests.repository import REPOSITORY
from tests.teacher.v3_models import tiny_config

PICO = REPOSITORY / "teacher" / "pico"
# BF16 operands with FP32 accumulation: between 1e-3 and 1e-2 of the norm.
BF16_ERROR = 1e-2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def relative(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("num_tokens", [1, 100, 4096])
def test_grouped_experts_equal_dense_in_fp64(num_tokens):
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, 256, device="cuda", dtype=torch.float64)
    gate_up = torch.randn(16, 256, 256, device="cuda", dtype=torch.float64) * 0.06
    down = torch.randn(16, 256, 128, device="cuda", dtype=torch.float64) * 0.06
    weights, indices = torch.rand(num_tokens, 16, device="cuda", dtype=torch.float64).topk(4, dim=-1)
    out_gradient = torch.randn(num_tokens, 256, device="cuda", dtype=torch.float64)
    results = []
    for kind, dtype in (("dense", torch.float64), ("grouped", torch.bfloat16)):
        leaves = [leaf.clone().to(dtype).requires_grad_() for leaf in (x, gate_up, down, weights)]
        out = routed_experts(leaves[0], leaves[1], leaves[2], indices, leaves[3], kind=kind)
        out.backward(out_gradient.to(out.dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, wanted in zip(results[1], results[0], strict=True):
        assert relative(got, wanted) < 2 * BF16_ERROR


@pytest.mark.parametrize("kind", ["dense", "grouped"])
def test_a_compiled_step_learns(kind):
    torch.manual_seed(0)
    config = tiny_config(hidden_size=128, moe_intermediate_size=64, num_nextn_predict_layers=1)
    with torch.device("cuda"):
        model = initialise(DeepseekV3(config), std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    ids = torch.randint(0, config.vocab_size, (8, 64), device="cuda")

    def loss_of(ids_BT):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = model(ids_BT, experts=kind)
        flat = out.logits_BTV[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(flat, ids_BT[:, 1:].flatten()), out.load_LE

    compiled = torch.compile(loss_of, fullgraph=True)
    losses = []
    for _ in range(40):
        loss, load_LE = compiled(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_bias(model.routers(), load_LE, 1e-3)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_engine_on_cuda_writes_what_it_writes_on_the_cpu():
    prompts = [[1, 3, *range(20 + i, 40 + i), 4] for i in range(12)]
    written = []
    for device in ("cpu", "cuda"):
        engine = Engine(LatentModel.of(load_checkpoint(PICO).to(device)), batch_size=4, eos_token_ids=(2,))
        sequences = [Sequence(i, prompt, max_tokens=24, seed=i) for i, prompt in enumerate(prompts)]
        done = engine.run(sequences)
        written.append({sequence.key: sequence.generated_ids for sequence in done})
    agree = sum(written[0][i] == written[1][i] for i in range(len(prompts)))
    # FP32 on both sides; odd prompts make near ties, which another order of summation may turn.
    assert agree >= len(prompts) - 2


def written_on_cuda(model: LatentModel, **features: object) -> dict[int, list[int]]:
    engine = Engine(model, batch_size=8, eos_token_ids=(2,), **features)
    prompts = [[1, 3, *range(20 + i, 40 + 3 * i), 4] for i in range(12)]
    sequences = [Sequence(i, prompt, max_tokens=100, seed=i) for i, prompt in enumerate(prompts)]
    return {sequence.key: sequence.generated_ids for sequence in engine.run(sequences)}


@pytest.mark.parametrize("features", [{}, {"num_pages": 10, "max_chunk": 16}], ids=["roomy", "tight"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_graphs_write_what_kernel_by_kernel_launches_write(fp8: bool, features: dict[str, int]) -> None:
    """Batches shrink as sequences end, so several graphs serve. Padding takes other products: near ties may turn."""
    if fp8:
        model = LatentModel.load(PICO, torch.device("cuda"), with_mtp=True)
        assert model.precision == "fp8"
    else:
        model = LatentModel.of(load_checkpoint(PICO, torch.bfloat16).to("cuda"), with_mtp=True)
    with_graphs, without = (written_on_cuda(model, cuda_graphs=on, **features) for on in (True, False))
    assert sum(with_graphs[key] == without[key] for key in without) >= len(without) - 2
    waiting = written_on_cuda(model, run_ahead=False, **features)
    assert waiting == with_graphs
    drafting = written_on_cuda(model, speculate=True, **features)
    assert sum(drafting[key] == without[key] for key in without) >= len(without) - 4  # two rows: other products again


def shaped_and_plain(guides: Guides) -> list[Sequence[int]]:
    """Of three sequences one is penalised, one guided, one neither."""
    rule = json_rule({"type": "array", "items": {"enum": ["red", 7, None]}, "minItems": 1, "maxItems": 3})
    penalised = SamplingParams(0.8, presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.2)
    return [
        Sequence(
            n,
            [1, 3, *range(20, 40 + 3 * n), 4],
            max_tokens=100,
            seed=n,
            sampling_params=penalised if n % 3 == 0 else SamplingParams(0.8),
            guide=guides.guide(Grammar(f"answer: {rule}")) if n % 3 == 1 else None,
        )
        for n in range(12)
    ]


@pytest.mark.parametrize("features", [{}, {"run_ahead": False}, {"num_pages": 10}, {"speculate": True}], ids=str)
def test_penalties_and_grammars_beside_who_has_none(features: dict[str, int]) -> None:
    """The host shapes some rows' logits of a graph; what is drawn is what launches kernel by kernel draw."""
    model = LatentModel.of(load_checkpoint(PICO, torch.bfloat16).to("cuda"), with_mtp=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(PICO / "tokenizer.json"))
    guides, decode = Guides(tokenizer, [2]), decode_by(tokenizer)
    texts = []
    for settings in ({"cuda_graphs": False, "run_ahead": False}, features):
        engine = Engine(model, batch_size=8, eos_token_ids=(2,), **settings)
        done = {sequence.key: sequence for sequence in engine.run(shaped_and_plain(guides))}
        texts.append({key: sequence.generated_ids for key, sequence in done.items()})
        for key in range(1, 12, 3):
            assert (done[key].finish_reason, done[key].fault) == ("stop", None)
            assert 1 <= len(json.loads(decode(done[key].generated_ids[:-1]))) <= 3
    # Padding, and two rows a sequence, take other products: near ties may turn.
    assert sum(texts[0][key] == texts[1][key] for key in texts[0]) >= 8


def test_logprobs_of_a_prompt_on_cuda_are_those_on_the_cpu() -> None:
    prompts = [[1, 3, *range(20, 30 + 50 * n), 4] for n in range(5)]
    found = []
    for device in ("cpu", "cuda"):
        model = LatentModel.of(load_checkpoint(PICO).to(device))
        engine = Engine(model, batch_size=4, eos_token_ids=(2,), max_chunk=64)
        scored = SamplingParams(prompt_logprobs=3)
        sequences = [Sequence(n, ids, 4, seed=n, sampling_params=scored) for n, ids in enumerate(prompts)]
        done = {sequence.key: sequence.prompt_logprobs for sequence in engine.run(sequences)}
        found.append([own for n in range(5) for own, _ in done[n]])
    assert len(found[0]) == sum(len(ids) - 1 for ids in prompts)
    # FP32 products on both, summed in other orders; what is unlikely has large logits to be off by.
    assert found[1] == pytest.approx(found[0], abs=1e-2, rel=1e-3)


def test_fp8_on_cuda_writes_what_its_twins_write() -> None:
    cpu = LatentModel(fuse_entries(*load_blocks(PICO, torch.device("cpu"))))
    gpu = LatentModel(fuse_entries(*load_blocks(PICO, torch.device("cuda"))))
    logits = []
    for model in (cpu, gpu):
        runner = ModelRunner(model, 4, max_graphed=2)
        sequences = [Sequence(i, [1, 3, *range(20, 60 - i), 4], 9, 0, pages=[2 - i]) for i in range(2)]
        first = runner.forward(in_order([Chunk(s, s.num_left) for s in sequences]), []).logits_ZV
        for sequence in sequences:
            sequence.num_computed = sequence.num_tokens
            sequence.generated_ids.append(25)
        logits.append(
            torch.cat((first, runner.forward(in_order([Chunk(s, 1) for s in sequences]), []).logits_ZV)).cpu()
        )
    # Attention and absorbed factors are BF16 on both, in other orders; E4M3 rounds what differs to 2^-4 at times.
    assert relative(logits[1], logits[0]) < 5e-2
