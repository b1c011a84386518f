"""The engine: absorbed decoding equals the training forward, transformers' generate, and itself in any batch."""

import pytest
import torch
import transformers

from teacher.engine.engine import Engine
from teacher.engine.runner import ModelRunner
from teacher.engine.sampler import SamplingParams, sample
from teacher.engine.scheduler import Chunk
from teacher.engine.sequence import Sequence
from teacher.engine.step import in_order
from teacher.kernels.attention.mla_cache import PAGE
from teacher.models.latent.model import LatentModel
from tests.teacher.v3_models import random_model, tiny_config

CONFIGS = {"all": {}, "no_q_lora": {"q_lora_rank": None}, "no_yarn": {"rope_scaling": None, "first_k_dense_replace": 0}}


def prompts(count, seed=0, longest=20):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, 64, (length,), generator=generator).tolist() for length in lengths]


def run(model, sequences, *, batch_size=4, eos=(), **draw):
    engine = Engine(LatentModel.of(model), batch_size=batch_size, eos_token_ids=eos)
    for sequence in sequences:
        sequence.sampling_params = SamplingParams(**draw)
    return {sequence.key: sequence for sequence in engine.run(sequences)}


@pytest.fixture(scope="module", params=CONFIGS, ids=list(CONFIGS))
def model(request):
    return random_model(tiny_config(**CONFIGS[request.param])).eval()


def test_prefill_and_decode_equal_the_training_forward(model):
    rows = prompts(3, longest=9)
    runner = ModelRunner(LatentModel.of(model), 3)
    sequences = [Sequence(i, row, max_tokens=9, seed=0, pages=[2 - i]) for i, row in enumerate(rows)]
    logits = {sequence.key: [] for sequence in sequences}
    for step in range(7):
        chunks = in_order([Chunk(sequence, sequence.num_left) for sequence in sequences])
        for chunk, row in zip(chunks, runner.forward(chunks, []).logits_ZV, strict=True):
            logits[chunk.sequence.key].append(row)
        for sequence in sequences:
            sequence.num_computed = sequence.num_tokens
            sequence.generated_ids.append(7 + step)
    with torch.no_grad():
        for index, row in enumerate(rows):
            wanted = model(torch.tensor([row + [7 + i for i in range(6)]]), with_mtp=False).logits_BTV[0, -7:]
            torch.testing.assert_close(torch.stack(logits[index]), wanted, atol=2e-5, rtol=0)


def test_greedy_tokens_equal_transformers_generate(model):
    peer = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**model.config.to_json())).eval()
    peer.load_state_dict({k: v for k, v in model.state_dict().items() if k in peer.state_dict()})
    rows = prompts(9)
    done = run(model, [Sequence(i, row, max_tokens=15, seed=0) for i, row in enumerate(rows)])
    for index, row in enumerate(rows):
        ids = torch.tensor([row])
        settings = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = peer.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(row) :]
        assert done[index].generated_ids == wanted.tolist()


def test_cache_holds_the_latent_and_the_rope_key_alone(model):
    config = model.config
    runner = ModelRunner(LatentModel.of(model), 2)
    per_layer = config.kv_lora_rank + config.qk_rope_head_dim
    assert runner.model.cache_shape.bytes_per_token(torch.float32) == config.num_hidden_layers * per_layer * 4
    assert runner.cache.entries_LPSE.shape == (config.num_hidden_layers, 4, PAGE, per_layer)  # a whole extent
    with torch.no_grad():
        runner.forward([Chunk(Sequence(0, [1, 2, 3], max_tokens=1, seed=0, pages=[1]), 3)], [])
        attention = model.model.layers[0].self_attn
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor([1, 2, 3])))
        latent = attention.kv_a_layernorm(attention.kv_a_proj_with_mqa(x)[:, : config.kv_lora_rank])
    torch.testing.assert_close(runner.cache.entries_LPSE[0, 1, :3, : config.kv_lora_rank], latent, atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 16, 40])
def test_a_sample_does_not_depend_on_its_batch(batch_size):
    model = random_model(tiny_config(), std=0.1).eval()
    wanted = {}
    for index, row in enumerate(prompts(24)):
        alone = run(model, [Sequence(index, row, max_tokens=30, seed=index)], temperature=0.8, top_p=0.9, eos=[5])
        wanted[index] = alone[index].generated_ids
    sequences = [Sequence(i, row, max_tokens=30, seed=i) for i, row in enumerate(prompts(24))]
    done = run(model, sequences, batch_size=batch_size, temperature=0.8, top_p=0.9, eos=[5])
    assert {key: sequence.generated_ids for key, sequence in done.items()} == wanted
    reasons = {sequence.finish_reason for sequence in done.values()}
    assert reasons == {"stop", "length"}  # both ways of ending occur, so slots were freed and refilled


def test_samples_of_one_prompt_share_the_prefill_and_differ():
    model = random_model(tiny_config(), std=0.1).eval()
    done = run(model, [Sequence(i, [3, 4, 5], max_tokens=8, seed=i) for i in range(6)], temperature=1.0, batch_size=8)
    alone = run(model, [Sequence(2, [3, 4, 5], max_tokens=8, seed=2)], temperature=1.0)
    assert done[2].generated_ids == alone[2].generated_ids
    assert len({tuple(sequence.generated_ids) for sequence in done.values()}) == 6


def test_ends_at_eos_at_max_tokens_and_at_the_last_position():
    model = random_model(tiny_config(max_position_embeddings=24, rope_scaling=None)).eval()
    free = run(model, [Sequence(0, [1, 2, 3, 4], max_tokens=100, seed=0)])[0]
    assert (free.finish_reason, len(free.generated_ids)) == ("length", 21)  # 24 positions, and one token after them
    short = run(model, [Sequence(0, [1, 2, 3, 4], max_tokens=1, seed=0)])[0]
    assert (short.finish_reason, short.generated_ids) == ("length", free.generated_ids[:1])
    end = free.generated_ids[6]
    stopped = run(model, [Sequence(0, [1, 2, 3, 4], max_tokens=100, seed=0)], eos=[end])[0]
    first = free.generated_ids.index(end)
    assert (stopped.finish_reason, stopped.generated_ids) == ("stop", free.generated_ids[: first + 1])


def test_text_goes_on_over_many_pages_and_extents():
    config = tiny_config(max_position_embeddings=600, rope_scaling=None)
    model = random_model(config).eval()
    done = run(model, [Sequence(i, row, max_tokens=150 + i, seed=i) for i, row in enumerate(prompts(5))], batch_size=3)
    with torch.no_grad():
        for index, row in enumerate(prompts(5)):
            ids = torch.tensor([row + done[index].generated_ids])
            logits = model(ids, with_mtp=False).logits_BTV[0, len(row) - 1 : -1]
            top = logits.topk(2).values
            agrees = logits.argmax(-1) == torch.tensor(done[index].generated_ids)
            assert (agrees | (top[:, 0] - top[:, 1] < 1e-4)).all()


# --- sampler ----------------------------------------------------------------------------------------------------------


def nucleus(probabilities, top_p):
    kept, mass = [], 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: -probabilities[t]):
        kept.append(token)
        mass += probabilities[token]
        if mass >= top_p:
            break
    return {token: probabilities[token] / mass for token in kept}


@pytest.mark.parametrize("num_tokens", [10, 300])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.95), (2.0, 0.5), (0.6, 1e-9)])
def test_sampler_draws_the_nucleus_distribution(num_tokens, temperature, top_p):
    logits = torch.randn(num_tokens, generator=torch.Generator().manual_seed(num_tokens)) * (
        0.5 if num_tokens > 64 else 2
    )
    wanted = nucleus((logits / temperature).double().softmax(0).tolist(), top_p)
    count = 20_000
    grid = [(i + 0.5) / count for i in range(count)]  # an even grid instead of luck
    draw = SamplingParams(temperature=temperature, top_p=top_p)
    drawn = torch.tensor(sample(logits.expand(count, -1), grid, [draw] * count))
    shares = (torch.bincount(drawn, minlength=num_tokens) / count).tolist()
    for token, share in enumerate(shares):
        assert share == pytest.approx(wanted.get(token, 0.0), abs=2e-4)


def test_wide_rows_do_not_change_narrow_ones():
    narrow = torch.zeros(1, 300)
    narrow[0, 7] = 10.0
    both = torch.cat((narrow, torch.zeros(1, 300)))
    for uniform in (0.0, 0.3, 0.999):
        drawn = [
            sample(rows, [uniform] * len(rows), [SamplingParams(1.0, 0.9)] * len(rows))[0] for rows in (narrow, both)
        ]
        assert drawn[0] == drawn[1]


def test_temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    assert sample(logits, [0.9, 0.9], [SamplingParams(0, 0.5)] * 2) == [1, 0]
