"""The zoo: every student validates, and the published ones carry their published settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from distill.errors import CheckpointError, RecipeError
from students.base_folder import local_base, locate, resolve_base
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


# Small published models, by repository without its organisation: the same figures, and the size of a head where it is
# not hidden / heads.
SMALL = {
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 49_152, True, None),
    "SmolLM2-360M": ("llama", 960, 2560, 32, 15, 5, 49_152, True, None),
    "SmolLM2-1.7B": ("llama", 2048, 8192, 24, 32, 32, 49_152, True, None),
    "Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, 151_936, True, None),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151_936, True, None),
    "Qwen2.5-3B": ("qwen2", 2048, 11_008, 36, 16, 2, 151_936, True, None),
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 151_936, True, 128),
    "Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 151_936, True, 128),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 151_936, True, 128),
    "Qwen3-8B": ("qwen3", 4096, 12_288, 36, 32, 8, 151_936, False, 128),
    "Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 128_256, True, 64),
    "Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128_256, True, 128),
}
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
PICO = {"qwen2-0.2m", "llama-0.4m", "qwen2-0.4m", "qwen2-0.8m"}


def shape_of(base: str) -> str:
    return base.partition("/")[2].removesuffix("-Instruct").replace("-Coder", "")


def count(kind, hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, head_dim=None) -> int:
    """Parameters of the model that transformers makes of these figures, a tied head once."""
    config = CONFIGS[kind](
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        **({"head_dim": head_dim} if head_dim else {}),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_zoo_is_listed_smallest_first():
    students = list_students()
    sizes = [student.num_parameters for student in students]
    assert sizes == sorted(sizes)
    assert all(locate(student.chat_template).is_file() for student in students)
    names = {student.name for student in students}
    assert names > PICO | PUBLISHED.keys()
    small = [student for student in students if student.name not in PICO | PUBLISHED.keys()]
    assert {shape_of(student.base) for student in small} == SMALL.keys()
    assert all(student.name == student.base.partition("/")[2].lower() for student in small)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_student_has_its_published_recipe_and_size(name):
    base, lr, *shape = PUBLISHED[name]
    student = find_student(name)
    assert (student.base, student.sft.lr) == (base, lr)
    assert (student.sft.batch_size, student.sft.max_length, student.sft.min_lr_ratio) == (64, 32_768, 0.1)
    assert student.num_parameters == count(student.architecture, *shape)


@pytest.mark.parametrize("shape", SMALL)
def test_small_students_have_the_size_of_their_base(shape):
    size = count(*SMALL[shape])
    for student in list_students():
        if shape_of(student.base) == shape and student.name not in PUBLISHED:
            assert (student.architecture, student.num_parameters) == (SMALL[shape][0], size)


def test_licences_are_those_of_the_bases():
    for student in list_students():
        if student.base.startswith("meta-llama/Llama-3.2"):
            assert student.licence == "llama3.2"
        elif student.base.startswith("Qwen/Qwen2.5-3B"):
            assert student.licence == "other:qwen-research"
        elif not student.base.startswith("meta-llama"):
            assert student.licence == "apache-2.0"


@pytest.mark.parametrize(
    ("licence", "message"),
    [
        ("appache-2.0", r"licence: .*'appache-2.0'; did you mean 'apache-2.0'\?"),
        ("Qwen RESEARCH LICENSE", "licence: .*; one that the Hub has no identifier for is other:NAME"),
        ("other:", "licence: not a licence identifier"),
    ],
)
def test_a_licence_is_one_that_the_hub_knows(tmp_path, licence, message):
    text = Path("students/zoo/qwen2-0.2m.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("licence: apache-2.0", f'licence: "{licence}"'))
    with pytest.raises(RecipeError, match=message):
        find_student(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text(text.replace("licence: apache-2.0", "licence: Apache-2.0"))
    assert find_student(tmp_path / "mine.yaml").licence == "apache-2.0"


def test_longer_examples_than_the_context_need_a_rope_theta():
    with pytest.raises(RecipeError, match=r"sft\.max_length: 16384 is past context_length 8192; set sft\.rope_theta"):
        find_student("smollm2-135m-instruct", {"max_length": 16_384})
    assert find_student("smollm2-135m-instruct", {"max_length": 16_384, "rope_theta": 1e6}).sft.max_length == 16_384


def test_a_repository_that_was_fetched_is_found_before_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    student = find_student("smollm2-135m-instruct")
    assert local_base(student.base) is None
    fetched = tmp_path / "models" / "SmolLM2-135M-Instruct"
    fetched.mkdir(parents=True)
    assert local_base(student.base) is None, "an empty folder is no base"
    (fetched / "config.json").write_text("{}")
    assert resolve_base(student).resolve() == fetched
    own = student.model_copy(update={"base": "./SmolLM2-135M-Instruct"})
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        resolve_base(own)


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
