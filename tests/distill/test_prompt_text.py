"""A rendered prompt in words."""

from __future__ import annotations

import pytest

from distill.prompt_text import describe_prompt, own_words

QUESTION = "What is 2 + 3?"
QWEN = "<|im_start|>system\nYou are Qwen, a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>"
LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (QWEN, "You are Qwen, a helpful assistant."),
        (LLAMA, "Cutting Knowledge Date: December 2023 Today Date: 26 Jul 2024"),
        ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n", ""),
        ("<|bos|><|user|>{}<|assistant|><think>\n", ""),
        ("<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜>", ""),
        ("<s>[INST] {} [/INST]", ""),
        ("Human: {}\n\nAssistant:", ""),
        ("Think step by step.\n{}\n", "Think step by step."),
        ("{}\n", ""),
    ],
)
def test_what_a_template_says_of_its_own(template: str, words: str) -> None:
    prompt = template.replace("{}", QUESTION)
    assert own_words(prompt, QUESTION) == words
    described = describe_prompt(prompt, QUESTION)
    assert described.startswith(f"the template itself adds {words!r}; prompt " if words else "prompt ")
    assert QUESTION not in described
    assert "\n" not in described


def test_a_long_prompt_is_cut() -> None:
    assert len(describe_prompt("<|user|>" + "x" * 10_000 + QUESTION, QUESTION)) < 11_000
    assert describe_prompt(QUESTION + "y" * 10_000, QUESTION).endswith("y…'")
