"""The native backend as a Teacher: identity, text, determinism, errors."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.errors import CheckpointError, DataError, EnvironmentFault
from distill.logprobs import TokenLogprobs
from distill.protocols import Teacher
from distill.recipe import NativeTeacher
from distill.records import Problem, Sampling, TraceRequest
from teacher.backends import open_teacher
from teacher.model.checkpoint import load_checkpoint
from tests.teacher.v3_models import tiny_config, write_model_folder

SAMPLING = Sampling(temperature=0.7, top_p=0.95, max_tokens=24, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    write_model_folder(path, tiny_config(), fp8=True, std=0.1)
    return path


def open_it(folder, batch_size=4):
    return open_teacher(NativeTeacher(model=folder.name, batch_size=batch_size), base_dir=folder.parent)


def requests(count=6, samples=2):
    problems = [Problem(prompt=f"{n} + {n}?", answer=str(2 * n), grader="math", source="test") for n in range(count)]
    return [TraceRequest(problem=problem, sample_index=k) for problem in problems for k in range(samples)]


def test_every_request_gets_one_completion_with_its_reasoning_tag(folder):
    teacher = open_it(folder)
    assert isinstance(teacher, Teacher)
    wanted = requests()
    completions = list(teacher.generate(wanted, SAMPLING))
    assert sorted(wanted.index(done.request) for done in completions) == list(range(len(wanted)))
    tokenizer = teacher.tokenizer
    for done in completions:
        assert done.text.startswith("<think>\n")
        assert "<|im_end|>" not in done.text
        assert (done.finish_reason == "length") == (done.num_tokens == 24)
        prompt = f"<|im_start|>user\n{done.request.problem.prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n"
        assert done.num_prompt_tokens == len(tokenizer.encode(prompt, add_special_tokens=False))
        written = tokenizer.encode(done.text.removeprefix("<think>\n"), add_special_tokens=False)
        assert len(written) == done.num_tokens - (done.finish_reason == "stop")


def test_texts_depend_on_request_and_seed_but_not_on_order_or_batch(folder):
    def texts(batch_size, wanted, sampling=SAMPLING):
        done = open_it(folder, batch_size).generate(wanted, sampling)
        return {(c.request.problem.id, c.request.sample_index): c.text for c in done}

    first = texts(1, requests())
    assert texts(5, requests()[::-1]) == first
    assert len(set(first.values())) == len(first)
    other_seed = texts(5, requests(), SAMPLING.model_copy(update={"seed": 4}))
    assert all(other_seed[key] != text for key, text in first.items())
    greedy = texts(5, requests(), SAMPLING.model_copy(update={"temperature": 0.0}))
    assert len(set(greedy.values())) == len(first) // 2


def test_identity_changes_with_weights_and_template_only(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / folder.name)
    assert open_it(copy).identity == open_it(folder).identity
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    changed = open_it(copy).identity
    assert changed.template != open_it(folder).identity.template
    assert changed.weights == open_it(folder).identity.weights
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors")
    assert open_it(copy).identity.weights != changed.weights


def test_prompt_longer_than_the_context(folder):
    problem = Problem(prompt="x" * 200, answer="1", grader="math", source="long.jsonl")
    with pytest.raises(DataError, match=r"long\.jsonl.*tokens; the model takes 127"):
        list(open_it(folder).generate([TraceRequest(problem=problem, sample_index=0)], SAMPLING))


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        ("tokenizer.json", None, ("tokenizer.json", "no such file")),
        ("tokenizer.json", "{", ("tokenizer.json", "usable")),
        ("chat_template.jinja", None, ("chat_template.jinja",)),
        ("generation_config.json", "[1]", ("generation_config.json",)),
        ("generation_config.json", '{"eos_token_id": "x"}', ("generation_config.json", "eos_token_id")),
        ("config.json", None, ("config.json", "no such file")),
        ("model.safetensors", "x", ("model.safetensors", "truncated")),
    ],
)
def test_broken_folders(folder, tmp_path, file, content, parts):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        open_it(copy)
    for part in parts:
        assert part in str(caught.value)


def test_tokenizer_larger_than_the_embedding(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tree = json.loads((copy / "tokenizer.json").read_text())
    tree["added_tokens"][-1] |= {"id": 101, "content": "<|one more|>"}
    (copy / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=r"more than config\.json's vocab_size 101"):
        open_it(copy)


# --- logprobs and budget forcing --------------------------------------------------------------------------------------


def prompt_ids_of(teacher, request):
    prompt = f"<|im_start|>user\n{request.problem.prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    return teacher.tokenizer.encode(prompt, add_special_tokens=False)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_logprobs_are_those_of_a_whole_forward_pass(folder, workers):
    teacher = open_it(folder)
    teacher.max_workers = workers
    model = load_checkpoint(folder).eval()
    sampling = SAMPLING.model_copy(update={"top_logprobs": 4, "max_thinking_tokens": 9})
    for done in teacher.generate(requests(count=4), sampling):
        kept = TokenLogprobs.unpacked(done.logprobs)
        assert (kept.unit, len(kept.sampled), len(kept.top)) == ("id", done.num_tokens, done.num_tokens)
        prompt, written = prompt_ids_of(teacher, done.request), [token for token, _ in kept.sampled]
        assert done.text == "<think>\n" + teacher.tokenizer.decode(written).removesuffix("<|im_end|>")
        with torch.no_grad():
            logits = model(torch.tensor([prompt + written]), with_mtp=False).logits_BTV[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(written)[:, None])[:, 0].tolist()
        assert [value for _, value in kept.sampled] == pytest.approx(own, abs=1e-4)
        best = logprobs.topk(4).values.tolist()
        assert [[value for _, value in top] for top in kept.top] == [pytest.approx(row, abs=1e-4) for row in best]
        assert all(
            logprobs[t, token] == pytest.approx(value, abs=1e-4)
            for t, top in enumerate(kept.top)
            for token, value in top
        )


def test_no_logprobs_unless_asked_for(folder):
    assert {done.logprobs for done in open_it(folder).generate(requests(), SAMPLING)} == {None}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_thinking_ends_at_its_budget_and_the_answer_is_sampled_on(folder, workers):
    teacher = open_it(folder)
    teacher.max_workers = workers
    wanted = requests(count=8)
    free = {c.request.key(teacher.identity, SAMPLING): c.text for c in teacher.generate(wanted, SAMPLING)}
    limited = SAMPLING.model_copy(update={"max_thinking_tokens": 8})
    forced = 0
    for done in teacher.generate(wanted, limited):
        unlimited = free[done.request.key(teacher.identity, SAMPLING)].removeprefix("<think>\n")
        thought, tag, answer = done.text.removeprefix("<think>\n").partition("</think>")
        assert done.num_tokens <= 24
        if "</think>" in teacher.tokenizer.decode(teacher.tokenizer.encode(unlimited)[:8]) or not tag:
            assert done.text.removeprefix("<think>\n") == unlimited  # ended by itself in time: nothing is touched
            continue
        forced += 1
        assert len(teacher.tokenizer.encode(thought)) == 9  # eight of its own and the line break
        assert unlimited.startswith(thought.removesuffix("\n"))
        assert answer.startswith("\n\n")
        assert done.finish_reason == "stop" or (done.num_tokens == 24 and len(answer) > 2)
    assert forced > 8


def test_a_budget_needs_the_closing_tag_as_one_token(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tree = json.loads((copy / "tokenizer.json").read_text())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != "</think>"]
    (copy / "tokenizer.json").write_text(json.dumps(tree))
    limited = SAMPLING.model_copy(update={"max_thinking_tokens": 8})
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: max_thinking_tokens needs </think> as one token; here"
    ):
        list(open_it(copy).generate(requests(), limited))


# --- worker processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_write_what_one_process_writes(folder):
    wanted = requests(count=8)
    teacher = open_it(folder, batch_size=4)
    teacher.max_workers = 1
    alone = {c.request.key(teacher.identity, SAMPLING): c for c in teacher.generate(wanted, SAMPLING)}
    teacher.max_workers = 2
    together = {c.request.key(teacher.identity, SAMPLING): c for c in teacher.generate(wanted, SAMPLING)}
    assert together == alone
    assert len(alone) == 16


@pytest.mark.slow
def test_a_worker_that_dies_is_a_fault_of_the_environment(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    teacher = open_it(copy, batch_size=4)
    teacher.max_workers = 2
    (copy / "model.safetensors").unlink()
    with pytest.raises(EnvironmentFault, match=r"generation worker.*model\.safetensors"):
        list(teacher.generate(requests(), SAMPLING))


@pytest.mark.slow
def test_abandoning_the_iterator_ends_the_workers(folder):
    teacher = open_it(folder, batch_size=4)
    teacher.max_workers = 2
    completions = teacher.generate(requests(count=100), SAMPLING)
    next(completions)
    running = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "teacher.backends.native.workers"], capture_output=True
    )
    pids = [int(pid) for pid in running.stdout.split()]
    assert len(pids) == 2
    completions.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
