"""The zoo: every student validates, and the published ones carry their published settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from distill.errors import RecipeError
from students.bases import locate
from students.zoo import find_student, list_students

# Base, learning rate, hidden, intermediate, layers, heads, key-value heads, vocabulary, tied: the published configs.
PUBLISHED = {
    "r1-distill-qwen-1.5b": ("Qwen/Qwen2.5-Math-1.5B", 1e-4, 1536, 8960, 28, 12, 2, 151_936, True),
    "r1-distill-qwen-7b": ("Qwen/Qwen2.5-Math-7B", 8e-5, 3584, 18_944, 28, 28, 4, 152_064, False),
    "r1-distill-qwen-14b": ("Qwen/Qwen2.5-14B", 7e-5, 5120, 13_824, 48, 40, 8, 152_064, False),
    "r1-distill-qwen-32b": ("Qwen/Qwen2.5-32B", 6e-5, 5120, 27_648, 64, 40, 8, 152_064, False),
    "r1-distill-llama-8b": ("meta-llama/Llama-3.1-8B", 5e-5, 4096, 14_336, 32, 32, 8, 128_256, False),
    "r1-distill-llama-70b": ("meta-llama/Llama-3.3-70B-Instruct", 2e-5, 8192, 28_672, 80, 64, 8, 128_256, False),
}


def test_the_zoo_lists_ten_students_smallest_first():
    students = list_students()
    sizes = [student.num_parameters for student in students]
    assert len(students) == 10
    assert sizes == sorted(sizes)
    assert all(locate(student.chat_template).is_file() for student in students)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_student_has_its_published_recipe_and_size(name):
    base, lr, hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = PUBLISHED[name]
    student = find_student(name)
    assert (student.base, student.sft.lr) == (base, lr)
    assert (student.sft.batch_size, student.sft.max_length, student.sft.min_lr_ratio) == (64, 32_768, 0.1)
    kind = Qwen2Config if student.architecture == "qwen2" else LlamaConfig
    config = kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert student.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_math_bases_raise_rope_theta_for_32k():
    raised = {student.name for student in list_students() if student.sft.rope_theta}
    assert raised == {"r1-distill-qwen-1.5b", "r1-distill-qwen-7b"}


def test_overrides_are_laid_over_sft():
    assert find_student("qwen2-0.2m", {"lr": "5e-4"}).sft.lr == 5e-4
    with pytest.raises(RecipeError, match=r"sft\.learning_rate: unknown key"):
        find_student("qwen2-0.2m", {"learning_rate": 1e-3})


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(RecipeError, match=r"no student 'qwen2-0\.3m' in the zoo; did you mean 'qwen2-0\.\dm'\?"):
        find_student("qwen2-0.3m")


def test_a_student_file_of_ones_own(tmp_path):
    text = Path("students/zoo/qwen2-0.2m.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("name: qwen2-0.2m", "name: mine"))
    assert find_student(tmp_path / "mine.yaml").name == "mine"
    with pytest.raises(RecipeError, match="cannot be read"):
        find_student(tmp_path / "other.yaml")
