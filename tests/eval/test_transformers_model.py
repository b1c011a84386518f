from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from distill.errors import CheckpointError
from distill.protocols import Teacher
from distill.records import Problem, Sampling, TraceRequest
from eval.decoding import Noise, sample_tokens
from eval.transformers_model import open_transformers_model


def request_of(text: str, sample: int = 0) -> TraceRequest:
    return TraceRequest(problem=Problem(prompt=text, answer="1", grader="math", source="t"), sample_index=sample)


def texts(model, requests, sampling) -> dict[tuple[str, int], str]:
    return {(c.request.problem.prompt, c.request.sample_index): c.text for c in model.generate(requests, sampling)}


PROMPTS = ["1 + 1 = ?", "What is the greatest common divisor of 12 and 18?", "x", "Sort 3 1 2 in ascending order."]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_greedy_equals_transformers_generate(make_checkpoint, architecture):
    """Our loop, left-padded and compacted, against the library's own, one prompt at a time."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = make_checkpoint(architecture)
    model = open_transformers_model(folder, batch_size=3)
    assert isinstance(model, Teacher)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    sampling = Sampling(temperature=0, top_p=1, max_tokens=200)
    done = {c.request.problem.prompt: c for c in model.generate([request_of(p) for p in PROMPTS], sampling)}
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = theirs.generate(**ids, do_sample=False, max_new_tokens=200)[0, ids["input_ids"].shape[1] :].tolist()
        stopped = out[-1] == 2
        got = done[prompt]
        assert got.text == tokenizer.decode(out[:-1] if stopped else out)
        assert got.finish_reason == ("stop" if stopped else "length")
        assert (got.num_tokens, got.num_prompt_tokens) == (len(out), ids["input_ids"].shape[1])


def test_a_sample_does_not_depend_on_its_batch(qwen_dir):
    requests = [request_of(prompt, sample) for prompt in PROMPTS for sample in range(4)]
    sampling = Sampling(temperature=0.8, top_p=0.9, max_tokens=150, seed=5)
    together = texts(open_transformers_model(qwen_dir, batch_size=16), requests, sampling)
    apart = texts(open_transformers_model(qwen_dir, batch_size=1), requests[::-1], sampling)
    assert together == apart
    assert len(set(together.values())) == len(requests), "samples of one question must be distinct"
    other = texts(open_transformers_model(qwen_dir, batch_size=16), requests, sampling.model_copy(update={"seed": 6}))
    assert all(other[key] != together[key] for key in together)


def test_the_prefilled_think_tag_is_put_back(make_checkpoint):
    model = open_transformers_model(make_checkpoint(template="thinking"), batch_size=2)
    (done,) = model.generate([request_of("1+1")], Sampling(max_tokens=5))
    assert done.text.startswith("<think>\n")
    plain = open_transformers_model(make_checkpoint(), batch_size=2)
    (done,) = plain.generate([request_of("1+1")], Sampling(max_tokens=5))
    assert not done.text.startswith("<think>")


def test_context_is_a_limit_of_its_own(make_checkpoint):
    model = open_transformers_model(make_checkpoint(context=64), batch_size=4)
    done = {c.request.problem.prompt: c for c in model.generate([request_of("x" * 100), request_of("1")], Sampling())}
    assert done["x" * 100].finish_reason == "length"
    assert done["x" * 100].num_tokens == 0
    assert done["1"].num_prompt_tokens + done["1"].num_tokens <= 64


def test_sampling_matches_the_nucleus():
    """Frequencies against the truncated, renormalised distribution; tokens outside the nucleus never appear."""
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    temperature, top_p, draws = 0.7, 0.9, 40_000
    probs = torch.softmax(logits / temperature, 0).double().numpy()
    order = np.argsort(-probs)
    kept = order[: int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1]
    expected = np.zeros(5)
    expected[kept] = probs[kept] / probs[kept].sum()
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = Counter(sample_tokens(logits.expand(draws, 5), uniform, temperature, top_p).tolist())
    observed = np.array([drawn[token] / draws for token in range(5)])
    assert set(drawn) == set(kept.tolist())
    assert np.abs(observed - expected).max() < 4 * np.sqrt(0.25 / draws)  # four standard errors at the widest


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_unit_interval_stay_in_the_nucleus(uniform):
    logits = torch.tensor([[0.0, 5.0, float("-inf"), 4.0]])
    for top_p in (0.5, 0.99, 1.0):
        token = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, top_p).item()
        assert token in ({1} if top_p == 0.5 else {0, 1, 3} if top_p == 1.0 else {1, 3})


def test_noise_streams_survive_compaction():
    whole = Noise([7, 8, 9])
    expected = np.stack([whole.next().numpy() for _ in range(300)])
    cut = Noise([7, 8, 9])
    head = np.stack([cut.next().numpy() for _ in range(100)])
    cut.keep([2])
    tail = np.stack([cut.next().numpy() for _ in range(200)])
    assert np.array_equal(head, expected[:100])
    assert np.array_equal(tail[:, 0], expected[100:, 2])


@pytest.fixture
def broken(qwen_dir, tmp_path):
    return shutil.copytree(qwen_dir, tmp_path / "broken")


def edit_weights(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


NORM = "model.layers.0.input_layernorm.weight"


def damage_index(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    text = json.dumps({"weight_map": {NORM: "../outside.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text)


def set_model_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen"}))


DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "unknown architecture": (set_model_type, "did you mean 'qwen"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "torn weights": (lambda d: (d / "model.safetensors").write_bytes(b"\x10" * 40), "broken"),
    "index outside": (damage_index, "outside the folder"),
    "missing weight": (lambda d: edit_weights(d, lambda w: w.pop(NORM)), NORM),
    "wrong shape": (lambda d: edit_weights(d, lambda w: w.update({NORM: torch.ones(31)})), NORM),
    "NaN": (lambda d: edit_weights(d, lambda w: w[NORM].fill_(float("nan"))), NORM),
    "no tokenizer": (lambda d: [p.unlink() for p in d.glob("tokenizer*")], "tokenizer.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_folder_is_one_line(broken, name):
    damage, words = DAMAGES[name]
    damage(broken)
    with pytest.raises(CheckpointError) as caught:
        open_transformers_model(broken, batch_size=1)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no such model folder"):
        open_transformers_model(tmp_path / "nowhere", batch_size=1)


def test_the_token_that_closes_a_turn_ends_an_answer(qwen_dir, tmp_path):
    """A base whose EOS is another token than its template's end of turn, as Qwen2.5's is."""
    folder = shutil.copytree(qwen_dir, tmp_path / "base")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        settings.update({"eos_token_id": 0} if "eos_token_id" in settings else {"eos_token": "<|pad|>"})
        (folder / name).write_text(json.dumps(settings))
    sampling = Sampling(temperature=1.0, top_p=1, max_tokens=300)
    requests = [request_of(prompt) for prompt in PROMPTS]
    done = list(open_transformers_model(folder, batch_size=4).generate(requests, sampling))
    assert any(c.finish_reason == "stop" for c in done)
    assert not any("<|im_end|>" in c.text for c in done)


def test_text_is_split_as_tokenizer_json_says(qwen_dir):
    """The character tokenizer beside a `qwen2` config stays one; AutoTokenizer would give it Qwen's pre-tokenizer."""
    from tokenizers import Tokenizer

    text = "12 + 3\n= ?"
    (done,) = open_transformers_model(qwen_dir, batch_size=1).generate([request_of(text)], Sampling(max_tokens=1))
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    plain = Tokenizer.from_file(str(qwen_dir / "tokenizer.json")).encode(rendered, add_special_tokens=False)
    assert done.num_prompt_tokens == len(plain.ids)
