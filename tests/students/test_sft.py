"""Training students: what the tokens are, that the loss falls, that the result stops, that no fault is silent."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.errors import CheckpointError, DataError, RecipeError, TrainingFailure
from distill.progress import silent
from distill.recipe import SFTConfig
from students import bases, sft
from students.length_buckets import LengthBuckets
from students.sft import train_student
from students.tokens import IGNORED, render, write_tokens
from students.trainer import CompletionTrainer
from tests.students.tiny_bases import make_base, make_examples, make_student, write_examples

QUESTION = "1 + 2 + 3?"
WORKED = "<think>\n1 + 2 = 3\n3 + 3 = 6\n</think>\n\n\\boxed{6}"


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return make_examples(tmp_path_factory.mktemp("data") / "examples.parquet")


def answer(folder, question: str, max_new_tokens: int = 100) -> str:
    """What a finished checkpoint writes greedily, read as a stranger would: by its own template and configs alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize(("architecture", "style"), [("qwen2", "chatml"), ("llama", "llama3")])
def test_a_student_learns_its_traces_and_stops(tmp_path, architecture, style):
    base = make_base(tmp_path / "base", architecture=architecture, style=style, hidden=64)
    student = make_student(base, architecture=architecture, style=style, num_epochs=40, lr=5e-3)
    log = train_student(student, make_examples(tmp_path / "e.parquet", 16), "distilled", tmp_path / "out")
    losses = [step["loss"] for step in log["steps"]]
    assert losses[-1] < losses[0] / 10
    text = answer(tmp_path / "out", "4 + 4?")
    assert text.endswith(student.eos_token)
    assert text.count(student.eos_token) == 1
    assert "</think>\n\n\\boxed{" in text
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == len(load_file(base / "model.safetensors"))
    assert json.loads((tmp_path / "out" / "train_log.json").read_text()) == log


def test_a_direct_student_learns_the_bare_answer(tmp_path, base):
    data = make_examples(tmp_path / "direct.parquet", 16, direct=True)
    train_student(make_student(base, num_epochs=30, lr=5e-3), data, "direct", tmp_path / "out")
    text = answer(tmp_path / "out", "4 + 4?", 20)
    assert text.startswith("\\boxed{")
    assert text.endswith("<|im_end|>")
    plain = AutoTokenizer.from_pretrained(base).chat_template
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == plain


@pytest.mark.parametrize("method", ["distilled", "direct"])
@pytest.mark.parametrize(("architecture", "style"), [("qwen2", "chatml"), ("llama", "llama3")])
def test_the_inference_prompt_is_a_prefix_of_the_training_tokens(tmp_path, architecture, style, method):
    folder = make_base(tmp_path / "base", architecture=architecture, style=style)
    tokenizer = bases.open_tokenizer(make_student(folder, architecture=architecture, style=style), method, folder)
    data = make_examples(tmp_path / "e.parquet", 8, direct=method == "direct")
    write_tokens(data, tokenizer, SFTConfig(lr=1e-3, max_length=128), tmp_path / "t.arrow", silent())
    tokenizer.save_pretrained(tmp_path / "shipped")
    shipped = AutoTokenizer.from_pretrained(tmp_path / "shipped")
    rows = Dataset.from_file(str(tmp_path / "t.arrow"))
    for row, example in zip(rows, Dataset.from_parquet(str(data)), strict=True):
        turns = [{"role": "user", "content": example["question"]}]
        prompt = shipped.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"] == [IGNORED] * len(prompt) + row["input_ids"][len(prompt) :]
        assert row["labels"][-1] == shipped.eos_token_id
        whole = shipped.decode(row["input_ids"])
        assert example["completion"] in whole
        assert ("<think>" in whole) == (method == "distilled")


def test_render_keeps_the_reasoning_of_the_trained_turn_only(base):
    tokenizer = bases.open_tokenizer(make_student(base), "distilled", base)
    prompt, completion = render(tokenizer, QUESTION, WORKED)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert completion == WORKED.removeprefix("<think>\n") + "<|im_end|>"
    turn = {"role": "user", "content": "again?"}
    history = [turn, {"role": "assistant", "content": WORKED}, turn]
    later = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    assert "1 + 2 = 3" not in later
    assert "\\boxed{6}" in later


def test_a_template_that_deletes_reasoning_is_an_error(base):
    tokenizer = bases.open_tokenizer(make_student(base), "distilled", base)
    tokenizer.chat_template = tokenizer.chat_template.replace("and not loop.last ", "")
    with pytest.raises(CheckpointError, match="does not begin with the inference prompt"):
        render(tokenizer, QUESTION, WORKED)
    tokenizer = bases.open_tokenizer(make_student(base), "direct", base)
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | upper")
    with pytest.raises(CheckpointError, match="rewrites the completion"):
        render(tokenizer, "1?", "\\boxed{x}")


def test_an_example_past_max_length_is_named_and_nothing_is_written(tmp_path, base, examples):
    with pytest.raises(
        DataError, match=r"truncation: \d+ of 64 examples are longer .*first: problem p\d+ of sums: \d+ t"
    ):
        train_student(make_student(base, max_length=50), examples, "distilled", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_that_the_tokenizer_cannot_write_is_an_error(tmp_path, base, examples):
    from students.examples import read_examples

    first = next(read_examples(examples))[0]
    odd = first.model_copy(update={"question": "1 ÷ 2?", "problem_id": "odd"})
    data = write_examples(tmp_path / "e.parquet", [first, odd])
    with pytest.raises(DataError, match=r"unknown_text: 1 of 2 .*problem odd"):
        train_student(make_student(base), data, "distilled", tmp_path / "out")


def test_bad_inputs_are_one_line(tmp_path, base, examples):
    student = make_student(base)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        train_student(student.model_copy(update={"base": str(tmp_path / "none")}), examples, "direct", tmp_path / "out")
    with pytest.raises(DataError, match="no such file of examples"):
        train_student(student, tmp_path / "none.parquet", "distilled", tmp_path / "out")
    (tmp_path / "torn.parquet").write_bytes(examples.read_bytes()[:200])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        train_student(student, tmp_path / "torn.parquet", "distilled", tmp_path / "out")
    with pytest.raises(DataError, match="no examples to train on"):
        train_student(student, write_examples(tmp_path / "no.parquet", []), "distilled", tmp_path / "out")
    with pytest.raises(RecipeError, match=r"sft\.batch_size: 8 examples do not divide"):
        train_student(make_student(base, micro_batch_size=3), examples, "distilled", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _broken(base, folder, name: str):
    shutil.copytree(base, folder)
    weights = folder / "model.safetensors"
    if name == "no weights":
        weights.unlink()
    elif name == "torn weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif name == "nan":
        model = AutoModelForCausalLM.from_pretrained(base)
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
        model.save_pretrained(folder)
    elif name == "shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    elif name == "missing weight":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    elif name == "index":
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere/model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif name == "config":
        (folder / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no weights", r"model\.safetensors: no such file"),
        ("torn weights", "is truncated or not a safetensors file"),
        ("nan", r"model\.layers\.1\.mlp\.up_proj\.weight: has values that are not finite"),
        ("shape", r"config\.json: intermediate_size: the weights have \[64, 32\]"),
        ("missing weight", "num_hidden_layers: is 3, the weights have 2"),
        ("index", r"weight_map\.model\.norm\.weight: must name a file in this folder, got '\.\./elsewhere"),
        ("config", r"config\.json: is not valid JSON"),
    ],
)
def test_a_broken_base_is_one_line(tmp_path, base, examples, fault, message):
    folder = _broken(base, tmp_path / "broken", fault)
    with pytest.raises(CheckpointError, match=message) as caught:
        train_student(make_student(folder), examples, "distilled", tmp_path / "out")
    assert "broken" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_base_is_known_by_its_content_alone(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    assert bases.identity(copy) == bases.identity(base)
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes() + b" ")
    assert bases.identity(copy) != bases.identity(base)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, base, examples):
    student = make_student(base, lr=0.99, max_grad_norm=1e30, warmup_ratio=0, num_epochs=20)
    huge = AutoModelForCausalLM.from_pretrained(base)
    for parameter in huge.parameters():
        parameter.data.mul_(1e12)
    huge.save_pretrained(tmp_path / "huge")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "huge")
    huge_student = student.model_copy(update={"base": str(tmp_path / "huge")})
    with pytest.raises(TrainingFailure, match=r"tiny-distilled: (loss|gradient norm) is (nan|inf) at step \d+"):
        train_student(huge_student, examples, "distilled", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _trainer(tmp_path, base, examples, **settings):
    student = make_student(base, **settings)
    tokenizer = bases.open_tokenizer(student, "distilled", base)
    write_tokens(examples, tokenizer, student.sft, tmp_path / "t.arrow", silent())
    rows = Dataset.from_file(str(tmp_path / "t.arrow"))
    return CompletionTrainer(
        model=bases.open_model(student, base, tokenizer),
        args=sft.arguments(student, tmp_path / "work", 17),
        train_dataset=rows,
        processing_class=tokenizer,
        lengths=rows["length"],
        examples_a_step=8,
        where="test",
    )


def _gradients(trainer, batch):
    trainer.model.zero_grad()
    trainer.model.train()
    items = (batch["labels"][:, 1:] != IGNORED).sum()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def test_the_plain_loss_is_the_librarys(tmp_path, base, examples, monkeypatch):
    trainer = _trainer(tmp_path, base, examples)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    loss, gradients = _gradients(trainer, batch)
    monkeypatch.setattr(trainer, "_dense_loss", super(CompletionTrainer, trainer).compute_loss)
    expected, expected_gradients = _gradients(trainer, batch)
    # Same float32 sums in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def test_packed_examples_do_not_see_each_other(tmp_path, base, examples):
    padded, packed = _trainer(tmp_path, base, examples), _trainer(tmp_path, base, examples, packing=True)
    rows = [padded.train_dataset[i] for i in range(8)]
    loss, gradients = _gradients(padded, padded.data_collator(rows))
    flat = packed.data_collator(rows)
    assert flat["input_ids"].shape[0] == 1
    packed_loss, packed_gradients = _gradients(packed, flat)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-4, atol=1e-5)


def test_packing_trains_to_the_same_weights(tmp_path, base, examples):
    for packing in (False, True):
        train_student(make_student(base, packing=packing), examples, "distilled", tmp_path / f"{packing}")
    padded, packed = (load_file(tmp_path / f"{packing}" / "model.safetensors") for packing in (False, True))
    # Adam divides rounding noise by itself where a gradient is near zero: looser than one step's 1e-5.
    torch.testing.assert_close(packed, padded, rtol=1e-3, atol=1e-3)


def test_buckets_hold_every_index_once_and_depend_on_seed_and_epoch_alone():
    lengths = torch.randint(10, 200, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    buckets = LengthBuckets(lengths, 32, seed=17)
    first = list(buckets)
    torch.manual_seed(5)
    assert list(buckets) == first
    buckets.set_epoch(1)
    assert list(buckets) != first
    assert sorted(buckets) == list(range(1000))
    whole = [max(b := [lengths[i] for i in first[k : k + 32]]) * 32 / sum(b) for k in range(0, 992, 32)]
    assert sum(whole) / len(whole) < 1.15  # padded to the longest; unsorted batches pad to about 1.9


def test_gradient_accumulation_gives_the_same_steps(tmp_path, base, examples):
    whole = train_student(make_student(base), examples, "distilled", tmp_path / "whole")
    parts = train_student(make_student(base, micro_batch_size=2), examples, "distilled", tmp_path / "parts")
    for one, other in zip(whole["steps"], parts["steps"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)


def test_a_finished_student_is_not_trained_again(tmp_path, base, examples):
    log = train_student(make_student(base), examples, "distilled", tmp_path / "out")
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert train_student(make_student(base), examples, "distilled", tmp_path / "out") == log
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
    train_student(make_student(base, num_epochs=1), examples, "distilled", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns != stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_bfloat16_with_gradient_checkpointing_ships_bfloat16(tmp_path, base, examples):
    student = make_student(base, dtype="bfloat16", gradient_checkpointing=True, num_epochs=4)
    log = train_student(student, examples, "distilled", tmp_path / "out")
    assert log["steps"][-1]["loss"] < log["steps"][0]["loss"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_rope_theta_is_raised_for_longer_contexts(tmp_path, examples):
    base = make_base(tmp_path / "base", max_position_embeddings=64)
    with pytest.raises(CheckpointError, match=r"positions: sft\.max_length=128 is past the base's 64 positions"):
        train_student(make_student(base), examples, "distilled", tmp_path / "out")
    train_student(make_student(base, rope_theta=300_000), examples, "distilled", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 300_000
    assert config["max_position_embeddings"] == 128
