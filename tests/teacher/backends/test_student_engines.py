"""Students' folders opened to be scored, on both engines: the project's own and transformers' `generate`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from distill.errors import CheckpointError, RecipeError
from distill.protocols import Reporting, Teacher
from distill.recipe import Instruction
from distill.records import Problem, Sampling, TraceRequest
from teacher.backends import check_folder, describe_prompt_of, open_student

ENGINES = pytest.mark.parametrize("engine", ["native", "transformers"])


def request_of(text: str, sample: int = 0) -> TraceRequest:
    return TraceRequest(problem=Problem(prompt=text, answer="1", grader="math", source="t"), sample_index=sample)


def texts(model, requests, sampling) -> dict[tuple[str, int], str]:
    return {(c.request.problem.prompt, c.request.sample_index): c.text for c in model.generate(requests, sampling)}


PROMPTS = ["1 + 1 = ?", "What is the greatest common divisor of 12 and 18?", "x", "Sort 3 1 2 in ascending order."]


@ENGINES
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_greedy_equals_transformers_generate(make_checkpoint, architecture, engine):
    """Both engines, several prompts at once, against the library's own `generate`, one prompt at a time."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = make_checkpoint(architecture)
    model = open_student(folder, engine=engine, batch_size=3)
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


@ENGINES
def test_both_say_how_they_stand_while_they_write(qwen_dir, engine):
    model = open_student(qwen_dir, engine=engine, batch_size=2)
    assert isinstance(model, Reporting)
    requests = [request_of("1 + 1 = ?", sample) for sample in range(2)]
    written = sum(c.num_tokens for c in model.generate(requests, Sampling(max_tokens=9)))
    facts = model.facts()
    assert written <= facts["tokens"] <= 18  # transformers counts the padding behind an answer that ended first
    assert facts["tokens_per_s"] > 0


def sampled(folder, engine, batch_size, requests, seed=5) -> dict[tuple[str, int], str]:
    sampling = Sampling(temperature=0.8, top_p=0.9, max_tokens=150, seed=seed)
    return texts(open_student(folder, engine=engine, batch_size=batch_size), requests, sampling)


@ENGINES
def test_samples_follow_from_requests_and_seed(qwen_dir, engine):
    requests = [request_of(prompt, sample) for prompt in PROMPTS for sample in range(4)]
    first = sampled(qwen_dir, engine, 16, requests)
    assert sampled(qwen_dir, engine, 16, requests) == first
    assert len(set(first.values())) == len(requests), "samples of one question must be distinct"
    other = sampled(qwen_dir, engine, 16, requests, seed=6)
    assert all(other[key] != first[key] for key in first)


def test_a_sample_of_the_engine_does_not_depend_on_its_batch(qwen_dir):
    requests = [request_of(prompt, sample) for prompt in PROMPTS for sample in range(4)]
    together = sampled(qwen_dir, "native", 16, requests)
    apart = sampled(qwen_dir, "native", 1, requests[::-1])
    assert together == apart


def test_transformers_leaves_the_callers_noise_and_the_folders_settings_alone(make_checkpoint):
    """A generation_config.json with a top-k of one would make every sample the greedy one."""
    folder = make_checkpoint()
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True, "top_k": 1}))
    state = torch.random.get_rng_state()
    done = sampled(folder, "transformers", 4, [request_of("1 + 1 = ?", sample) for sample in range(4)])
    assert len(set(done.values())) == 4
    assert torch.equal(torch.random.get_rng_state(), state)


def test_one_folder_has_one_identity_but_for_the_engine(qwen_dir):
    native, peer = (open_student(qwen_dir, engine=name, batch_size=1).identity for name in ("native", "transformers"))
    assert (native.name, native.weights, native.template) == (peer.name, peer.weights, peer.template)
    assert (native.backend, peer.backend) == ("native", "transformers")


@ENGINES
def test_the_prefilled_think_tag_is_put_back(make_checkpoint, engine):
    model = open_student(make_checkpoint(template="thinking"), engine=engine, batch_size=2)
    (done,) = model.generate([request_of("1+1")], Sampling(max_tokens=5))
    assert done.text.startswith("<think>\n")
    plain = open_student(make_checkpoint(), engine=engine, batch_size=2)
    (done,) = plain.generate([request_of("1+1")], Sampling(max_tokens=5))
    assert not done.text.startswith("<think>")


@ENGINES
def test_a_base_without_a_chat_template_is_asked_the_question_alone(make_checkpoint, engine):
    model = open_student(make_checkpoint(template=None), engine=engine, batch_size=2)
    (done,) = model.generate([request_of("1 + 1")], Sampling(max_tokens=5))
    assert done.num_prompt_tokens == len("1 + 1\n")


INSTRUCTION = Instruction(system_prompt="Be brief.", prompt_suffix="Box it.")


@ENGINES
@pytest.mark.parametrize(
    ("template", "system_prompt", "asked"),
    [("plain", "Be brief.", "1 + 1\n\nBox it."), (None, None, "Be brief.\n\n1 + 1\n\nBox it.")],
    ids=["template", "no template"],
)
def test_a_student_is_asked_with_the_instruction_that_it_learned(
    make_checkpoint, engine, template, system_prompt, asked
):
    """As if the question were spelled with it; a model without a template gets all as one text."""
    folder = make_checkpoint(template=template)
    told = open_student(folder, engine=engine, batch_size=2, instruction=INSTRUCTION)
    alone = Instruction(system_prompt=system_prompt)
    spelled = open_student(folder, engine=engine, batch_size=2, instruction=alone)
    greedy = Sampling(max_tokens=8, temperature=0)
    (done,), (same,) = told.generate([request_of("1 + 1")], greedy), spelled.generate([request_of(asked)], greedy)
    assert (done.text, done.num_prompt_tokens) == (same.text, same.num_prompt_tokens)
    assert told.identity != spelled.identity


@ENGINES
def test_a_text_to_write_is_asked_for_without_the_instruction(qwen_dir, engine):
    """Beside a question in the same words, which has it."""
    told = open_student(qwen_dir, engine=engine, batch_size=2, instruction=INSTRUCTION)
    bare = open_student(qwen_dir, engine=engine, batch_size=2)
    question = request_of("1 + 1")
    text = TraceRequest(problem=question.problem.model_copy(update={"grader": "none"}), sample_index=0)
    greedy = Sampling(max_tokens=8, temperature=0)
    done = {c.request.problem.grader: c for c in told.generate([question, text], greedy)}
    (same,) = bare.generate([question], greedy)
    assert (done["none"].text, done["none"].num_prompt_tokens) == (same.text, same.num_prompt_tokens)
    assert done["math"].num_prompt_tokens > same.num_prompt_tokens


@pytest.mark.parametrize("refuses", ["{{ raise_exception('no system') }}", ""], ids=["refused", "left out"])
def test_a_template_without_a_system_turn_is_named(make_checkpoint, refuses):
    folder = make_checkpoint()
    path = folder / "chat_template.jinja"
    loop = "{% for message in messages %}"
    skip = f"{{% if message['role'] == 'system' %}}{refuses}{{% else %}}"
    text = path.read_text().replace(loop, loop + skip).replace("{% endfor %}", "{% endif %}{% endfor %}")
    path.write_text(text)
    fault = r"recipe: teacher\.system_prompt: the chat template of .* has no system turn"
    for engine in ("native", "transformers"):
        with pytest.raises(RecipeError, match=fault):
            open_student(folder, engine=engine, batch_size=2, instruction=INSTRUCTION)
        open_student(folder, engine=engine, batch_size=2, instruction=Instruction(prompt_suffix="Box it."))
    with pytest.raises(RecipeError, match=fault):
        check_folder(folder, instruction=INSTRUCTION)
    with pytest.raises(RecipeError, match=fault):
        describe_prompt_of(folder, INSTRUCTION)


@ENGINES
def test_context_is_a_limit_of_its_own(make_checkpoint, engine):
    model = open_student(make_checkpoint(context=64), engine=engine, batch_size=4)
    prompts = ["x" * 100, "1", "1" * 25]
    done = {c.request.problem.prompt: c for c in model.generate([request_of(p) for p in prompts], Sampling())}
    assert done["x" * 100].finish_reason == "length"
    assert done["x" * 100].num_tokens == 0
    unread = engine == "native"  # its last token is written, but needs no place in the context
    for prompt in prompts[1:]:
        assert done[prompt].num_prompt_tokens + done[prompt].num_tokens <= 64 + unread


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
    "index outside": (damage_index, "must name a file in this folder"),
    "missing weight": (lambda d: edit_weights(d, lambda w: w.pop(NORM)), NORM),
    "wrong shape": (lambda d: edit_weights(d, lambda w: w.update({NORM: torch.ones(31)})), NORM),
    "NaN": (lambda d: edit_weights(d, lambda w: w[NORM].fill_(float("nan"))), NORM),
    "no tokenizer": (lambda d: [p.unlink() for p in d.glob("tokenizer*")], "tokenizer.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_folder_is_one_line(broken, name):
    damage, words = DAMAGES[name]
    damage(broken)
    opened = [lambda e=engine: open_student(broken, engine=e, batch_size=1) for engine in ("native", "transformers")]
    for reader in (*opened, lambda: check_folder(broken, as_student=True)):
        with pytest.raises(CheckpointError) as caught:
            reader()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


@ENGINES
def test_a_missing_folder_is_one_line(tmp_path, engine):
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json: no such file"):
        open_student(tmp_path / "nowhere", engine=engine, batch_size=1)


@ENGINES
def test_the_token_that_closes_a_turn_ends_an_answer(qwen_dir, tmp_path, engine):
    """A base whose EOS is another token than its template's end of turn, as Qwen2.5's is."""
    folder = shutil.copytree(qwen_dir, tmp_path / "base")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        settings.update({"eos_token_id": 0} if "eos_token_id" in settings else {"eos_token": "<|pad|>"})
        (folder / name).write_text(json.dumps(settings))
    sampling = Sampling(temperature=1.0, top_p=1, max_tokens=300)
    requests = [request_of(prompt) for prompt in PROMPTS]
    done = list(open_student(folder, engine=engine, batch_size=4).generate(requests, sampling))
    assert any(c.finish_reason == "stop" for c in done)
    assert not any("<|im_end|>" in c.text for c in done)


@ENGINES
def test_text_is_split_as_tokenizer_json_says(qwen_dir, engine):
    """The character tokenizer beside a `qwen2` config stays one; AutoTokenizer would give it Qwen's pre-tokenizer."""
    from tokenizers import Tokenizer

    text = "12 + 3\n= ?"
    model = open_student(qwen_dir, engine=engine, batch_size=1)
    (done,) = model.generate([request_of(text)], Sampling(max_tokens=1))
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    plain = Tokenizer.from_file(str(qwen_dir / "tokenizer.json")).encode(rendered, add_special_tokens=False)
    assert done.num_prompt_tokens == len(plain.ids)
