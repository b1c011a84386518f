"""Each preflight check finds its fault, and a sound student has none."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.errors import CheckpointError, DataError, RecipeError
from distill.recipe import Instruction
from students import bases
from students.preflight import check_student, log_entry, preflight, stop_on_error
from tests.students.tiny_bases import make_base, make_examples, make_student

CHECKS = {
    "licence",
    "architecture",
    "tokenizer_identity",
    "padding",
    "chat_template",
    "prompt",
    "think_prefill",
    "training_text",
    "vocabulary",
    "positions",
}


def errors(student, method, folder, change=lambda tokenizer, config: None) -> set[str]:
    config, tokenizer = bases.open_config(folder), bases.open_tokenizer(student, method, folder)
    change(tokenizer, config)
    return {finding.check for finding in check_student(student, method, config, tokenizer) if finding.state == "error"}


def test_the_prompt_that_is_shown_has_the_words_that_are_learned(base):
    findings = preflight(make_student(base), "distilled", instruction=Instruction(prompt_suffix="Box it."))
    (prompt,) = [finding.text for finding in findings if finding.check == "prompt"]
    assert "QUESTION\\n\\nBox it." in prompt


@pytest.mark.parametrize("method", ["distilled", "direct"])
def test_a_sound_student_passes_every_check(tmp_path, base, method):
    data = make_examples(tmp_path / "e.parquet", direct=method == "direct")
    findings = preflight(make_student(base), method, data)
    assert {finding.state for finding in findings} == {"ok"}
    of_examples = {"examples", "template_fit", "truncation", "empty_text", "special_tokens", "unknown_text"}
    assert {finding.check for finding in findings} == CHECKS | of_examples
    entries = json.loads(json.dumps([log_entry(finding) for finding in findings]))
    assert {entry["check"] for entry in entries if entry["about"] == "examples"} == of_examples


def test_padding_that_is_eos_is_found(base):
    def pad_with_eos(tokenizer, config):
        tokenizer.pad_token = tokenizer.eos_token

    assert errors(make_student(base), "distilled", base, pad_with_eos) == {"padding"}


def test_another_end_of_turn_than_the_templates_is_found(base):
    qwen_base = make_student(base).model_copy(update={"eos_token": None})

    def endoftext(tokenizer, config):
        tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", "<|im_start|>"

    assert errors(qwen_base, "distilled", base, endoftext) == {"training_text"}


def test_think_prefilled_on_the_wrong_side_is_found(base):
    plain = make_student(base).model_copy(update={"chat_template": "students/templates/chatml_plain.jinja"})
    assert errors(plain, "distilled", base) == {"think_prefill"}
    think = (bases.locate("students/templates/chatml_think.jinja")).read_text()

    def thinking(tokenizer, config):
        tokenizer.chat_template = think

    # The bare answer is not the reasoning's continuation either: the text does not begin with the prompt.
    assert errors(make_student(base), "direct", base, thinking) == {"think_prefill", "training_text"}


def test_tokens_past_the_embedding_and_positions_past_the_rope_are_found(base):
    def small(tokenizer, config):
        config.vocab_size, config.max_position_embeddings = 50, 100

    assert errors(make_student(base), "distilled", base, small) == {"vocabulary", "positions"}
    assert errors(make_student(base, rope_theta=3e5), "distilled", base, small) == {"vocabulary"}


def test_a_template_that_breaks_is_found(base):
    def broken(tokenizer, config):
        tokenizer.chat_template = "{{ messages[0]['content'] | nothing }}"

    assert errors(make_student(base), "distilled", base, broken) == {"chat_template"}


def test_a_wrong_architecture_is_found(base):
    assert errors(make_student(base, architecture="llama"), "distilled", base) == {"architecture"}


def test_a_tokenizer_that_transformers_reads_another_way_is_found(tmp_path):
    folder = make_base(tmp_path / "base")
    words = AutoTokenizer.from_pretrained(folder).get_vocab()
    raw = Tokenizer(models.WordLevel({**words, " ": len(words), "?": len(words) + 1}, unk_token="?"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    assert "tokenizer_identity" in errors(make_student(folder), "distilled", folder)


def test_an_end_of_turn_or_template_that_is_not_there_raises(base):
    with pytest.raises(CheckpointError, match=r"eos_token '<\|stop\|>' is not in the base's vocabulary"):
        preflight(make_student(base).model_copy(update={"eos_token": "<|stop|>"}), "distilled")
    with pytest.raises(RecipeError, match=r"tiny: chat_template: .*none\.jinja' cannot be read"):
        preflight(make_student(base).model_copy(update={"chat_template": "none.jinja"}), "distilled")


def test_errors_stop_with_the_class_of_what_is_at_fault(tmp_path, base):
    findings = preflight(make_student(base, max_length=40), "distilled", make_examples(tmp_path / "e.parquet"))
    with pytest.raises(DataError, match=r"e\.parquet: truncation: \d+ of 64 examples"):
        stop_on_error(findings, base=base, examples_path=tmp_path / "e.parquet")
    findings = preflight(make_student(base, max_length=4_000), "distilled")
    with pytest.raises(CheckpointError, match="tiny: positions"):
        stop_on_error(findings, base=base, examples_path=tmp_path / "e.parquet")


def test_a_llama_base_without_padding_takes_the_reserved_one(tmp_path):
    folder = make_base(tmp_path / "base", architecture="llama", style="llama3")
    student = make_student(folder, architecture="llama", style="llama3")
    assert bases.open_tokenizer(student, "distilled", folder).pad_token == "<|finetune_right_pad_id|>"
    assert errors(student, "distilled", folder) == set()
    assert errors(student, "direct", folder) == set()
