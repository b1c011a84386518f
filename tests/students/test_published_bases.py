"""Bases as they are published: each case was once refused, or trained wrongly."""

from __future__ import annotations

import json
import shutil

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distill.errors import CheckpointError, RecipeError
from distill.progress import silent
from distill.recipe import UNINSTRUCTED, PublishedScore
from distill.weights import stored_tensors
from students import bases
from students.preflight import preflight
from students.publish.hub import lay_out
from students.sft import train_student
from students.tokens import IGNORED, write_tokens
from teacher.backends.tokenizer import render_question
from tests.students.tiny_bases import make_base, make_examples, make_student

# Qwen3's template (Qwen/Qwen3-0.6B) without its tools.
QWEN3 = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def edit(folder, name: str, **changes) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def respell(folder, token: str, other: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace(token, other))


def special_ids(folder) -> list[tuple[int, int]]:
    """End of turn and padding as config.json, generation_config.json and the tokenizer of a folder have them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = [json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")]
    ends = [tree["eos_token_id"] for tree in files]
    found = [
        (end[0] if isinstance(end, list) else end, tree["pad_token_id"]) for end, tree in zip(ends, files, strict=True)
    ]
    return [*found, (tokenizer.eos_token_id, tokenizer.pad_token_id)]


# --- padding ----------------------------------------------------------------------------------------------------------


def test_padding_that_ends_turns_too_is_replaced_by_a_reserved_token(tmp_path, base, examples):
    """SmolLM2-Instruct is published so: `<|im_end|>` ends turns and pads, `<|endoftext|>` is free."""
    folder = shutil.copytree(base, tmp_path / "base")
    edit(folder, "tokenizer_config.json", pad_token="<|im_end|>")
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 2
    train_student(make_student(folder, num_epochs=1), examples, "distilled", tmp_path / "out")
    assert special_ids(tmp_path / "out") == [(2, 0)] * 3


def test_without_a_free_token_one_is_added_by_choice(tmp_path, base, examples):
    folder = shutil.copytree(base, tmp_path / "base")
    respell(folder, "<|endoftext|>", "<|document|>")
    edit(folder, "tokenizer_config.json", pad_token="<|im_end|>")
    student = make_student(folder, num_epochs=1, dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"padding: .* none of the reserved ones; `pad_token: add` adds one"):
        train_student(student, examples, "distilled", tmp_path / "out")
    num_rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    added = student.model_copy(update={"pad_token": "add"})
    assert {finding.state for finding in preflight(added, "distilled")} == {"ok"}
    train_student(added, examples, "distilled", tmp_path / "out")
    assert special_ids(tmp_path / "out") == [(2, num_rows)] * 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == num_rows + 1


def test_a_named_padding_is_taken_if_it_can_be(base):
    student = make_student(base)
    named = student.model_copy(update={"pad_token": "<|im_start|>"})
    assert bases.open_tokenizer(named, "distilled", base).pad_token_id == 1
    with pytest.raises(RecipeError, match=r"tiny: pad_token: '<\|im_end\|>' ends turns: padding must be another token"):
        bases.open_tokenizer(student.model_copy(update={"pad_token": "<|im_end|>"}), "distilled", base)
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: pad_token '<none>' is not in .*vocabulary; `pad_token: a"
    ):
        bases.open_tokenizer(student.model_copy(update={"pad_token": "<none>"}), "distilled", base)


# --- weights and identity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_tied_head_is_shipped_once(tmp_path, base, examples, dtype):
    train_student(make_student(base, num_epochs=1, dtype=dtype), examples, "distilled", tmp_path / "out")
    shipped, published = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert shipped.keys() == published.keys()
    assert "lm_head.weight" not in shipped
    num_stored = sum(weight.numel() for weight in shipped.values())
    assert num_stored == AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters()
    assert sum(one.num_bytes for one in stored_tensors(tmp_path / "out").values()) == num_stored * (
        2 if dtype == "bfloat16" else 4
    )


def test_a_base_that_was_copied_or_is_spoken_of_otherwise_keeps_its_student(tmp_path, base, examples):
    student = make_student(base, num_epochs=1)
    log = train_student(student, examples, "distilled", tmp_path / "out")
    copy = shutil.copytree(base, tmp_path / "elsewhere")
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / "model.safetensors.metadata").write_text("1764565200.0")
    said = {"base": str(copy), "revision": "v2", "licence": "mit", "num_parameters": 19_000}
    score = PublishedScore(value=1.4, shots=5, source="its card")
    other = student.model_copy(update={**said, "published": {"gsm8k": score}})
    other = other.model_copy(update={"sft": student.sft.model_copy(update={"save_steps": 3})})
    assert train_student(other, examples, "distilled", tmp_path / "out") == log


def test_another_template_is_another_student(tmp_path, base, examples):
    template = tmp_path / "template.jinja"
    shutil.copyfile("students/templates/chatml_think.jinja", template)
    student = make_student(base, num_epochs=1).model_copy(update={"chat_template": str(template)})
    log = train_student(student, examples, "distilled", tmp_path / "out")
    template.write_text("{{- 'Sums. ' }}" + template.read_text())
    assert train_student(student, examples, "distilled", tmp_path / "out")["job"] != log["job"]


# --- licences ---------------------------------------------------------------------------------------------------------


def licensed(base, folder, front: str, **texts: str):
    shutil.copytree(base, folder)
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A base\n")
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("front", "stated"),
    [
        ("license: mit", "mit"),
        ("license: [mit]", "mit"),
        ("license: other\nlicense_name: Qwen-Research\nlicense_link: x", "other:qwen-research"),
    ],
)
def test_a_licence_that_the_bases_card_contradicts_is_refused(tmp_path, base, examples, front, stated):
    folder = licensed(base, tmp_path / "base", front)
    student = make_student(folder, num_epochs=1)
    message = rf"base: licence: the student says apache-2\.0, the base's README\.md says {stated}$"
    with pytest.raises(CheckpointError, match=message):
        train_student(student, examples, "distilled", tmp_path / "out")
    agreed = student.model_copy(update={"licence": stated})
    assert {finding.state for finding in preflight(agreed, "distilled")} == {"ok"}


@pytest.mark.parametrize(
    "front", ["license: apache-2.0", "license: other", "tags: [a]", "license: [", "- a", "license: 3"]
)
def test_a_card_that_states_no_licence_contradicts_none(tmp_path, base, front):
    folder = licensed(base, tmp_path / "base", front)
    assert {finding.state for finding in preflight(make_student(folder), "distilled")} == {"ok"}


def test_legal_texts_of_the_base_are_shipped_and_pushed(tmp_path, base, examples):
    texts = {"LICENSE": "Apache", "NOTICE.txt": "By somebody.", "USE_POLICY.md": "Do no harm."}
    folder = licensed(base, tmp_path / "base", "license: apache-2.0", **texts)
    train_student(make_student(folder, num_epochs=1), examples, "distilled", tmp_path / "out")
    lay_out(tmp_path / "out", "# Card\n", tmp_path / "pushed")
    for name, text in texts.items():
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "pushed" / name).read_text() == text
    assert (tmp_path / "pushed" / "README.md").read_text() == "# Card\n"


def test_a_llama_is_shipped_with_the_notice_that_its_licence_asks_for(tmp_path, base, examples):
    student = make_student(base, num_epochs=1).model_copy(update={"licence": "llama3.2"})
    train_student(student, examples, "distilled", tmp_path / "out")
    assert "Llama 3.2 is licensed under the Llama 3.2 Community License" in (tmp_path / "out" / "NOTICE").read_text()


# --- reasoning that a template switches -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("qwen3") / "base", architecture="qwen3")
    (folder / "chat_template.jinja").write_text(QWEN3)
    return folder


def test_the_control_of_a_hybrid_base_answers_without_thinking_wherever_it_is_asked(tmp_path, qwen3):
    student = make_student(qwen3, architecture="qwen3", num_epochs=1)
    assert {finding.state for finding in preflight(student, "direct")} == {"ok"}
    data = make_examples(tmp_path / "direct.parquet", 16, direct=True)
    train_student(student, data, "direct", tmp_path / "out")
    shipped = AutoTokenizer.from_pretrained(tmp_path / "out")
    question = [{"role": "user", "content": "1 + 1?"}]
    asked = shipped.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    served = render_question(PreTrainedTokenizerFast.from_pretrained(tmp_path / "out"), "1 + 1?", UNINSTRUCTED)
    assert served == asked
    thinking = shipped.apply_chat_template(question, add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert thinking.endswith("<|im_start|>assistant\n")


def test_a_hybrid_base_learns_to_think_with_its_own_template(tmp_path, qwen3, examples):
    student = make_student(qwen3, architecture="qwen3", num_epochs=1).model_copy(update={"chat_template": None})
    assert {finding.state for finding in preflight(student, "distilled", examples)} == {"ok"}
    tokenizer = bases.open_tokenizer(student, "distilled", qwen3)
    write_tokens(examples, tokenizer, student.sft, tmp_path / "t.arrow", silent())
    row = Dataset.from_file(str(tmp_path / "t.arrow"))[0]
    learned = tokenizer.decode([token for token in row["labels"] if token != IGNORED])
    assert learned.startswith("<think>\n")
    assert learned.endswith("<|im_end|>")


def test_a_template_that_asks_for_the_date_is_rendered_alike_on_every_day(tmp_path, base):
    """Llama 3.2's: a run that is resumed on the next day, and a server, must see the prompt that was trained on."""
    folder = shutil.copytree(base, tmp_path / "base")
    dated = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    own = AutoTokenizer.from_pretrained(base).chat_template
    (folder / "chat_template.jinja").write_text(dated + "{{- 'Today Date: ' + date_string + '\\n' }}" + own)
    tokenizer = bases.open_tokenizer(make_student(folder), "direct", folder)
    assert render_question(tokenizer, "1 + 1?", UNINSTRUCTED).startswith("Today Date: 26 Jul 2024\n<|im_start|>user")
    question = [{"role": "user", "content": "1 + 1?"}]
    assert "1 Jan 2020" in tokenizer.apply_chat_template(question, tokenize=False, date_string="1 Jan 2020")
