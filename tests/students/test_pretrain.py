"""Making bases: real runs of a few steps on the CPU, from the corpus to folders that transformers opens."""

from __future__ import annotations

import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from distill.errors import RecipeError, TrainingFailure
from distill.packing import Rows
from distill.problems.split import split_of
from distill.problems.stream import pico_families
from distill.progress import silent
from students.pretrain.bases import load_bases_config, make_bases
from students.pretrain.corpus import END_OF_TEXT, IM_END, IM_START, PAD, CorpusConfig, build_corpus, make_tokenizer
from students.pretrain.train import BasePretraining, BasesConfig, build_model

VOCAB_SIZE = 512
NUM_DOCUMENTS = 1_600  # one chunk of the corpus
BARE = re.compile(
    r"<\|im_start\|>user\n(.+)<\|im_end\|>\n<\|im_start\|>assistant\n\\boxed\{.+\}<\|im_end\|>\n", re.DOTALL
)
STEP = re.compile(r"(?:\d+ [a-z ]+: )?(-?\d+) ([-+*/]|mod) (-?\d+) = (-?\d+)")
REWRITTEN = re.compile(r"= [-+*()\d ]+")
APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": Fraction, "mod": int.__mod__}
ITEM = re.compile(r"-?\d+|\d+ [a-z ]+|[-+*()\d ]+")


def config_of(**changes: Any) -> BasesConfig:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "lr": 1e-2}
    fields = {
        "vocab_size": VOCAB_SIZE,
        "corpus": {"num_documents": NUM_DOCUMENTS},
        "rows_per_step": 4,
        "num_steps": 60,
        "warmup_steps": 5,
        "bases": {"tiny-qwen2": {"architecture": "qwen2", **shape}, "tiny-llama": {"architecture": "llama", **shape}},
    }
    return BasesConfig.model_validate(fields | changes)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer(vocab_size=VOCAB_SIZE, seed=23, per_family=100)


def corpus(tokenizer: Tokenizer, *, num_workers: int = 1, seed: int = 23, **changes: Any) -> Rows:
    return build_corpus(
        tokenizer, CorpusConfig(**{"num_documents": NUM_DOCUMENTS, **changes}), seed=seed, num_workers=num_workers
    )


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer) -> Rows:
    return corpus(tokenizer)


# --- corpus -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(rows: Rows, tokenizer: Tokenizer) -> list[str]:
    texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in rows.ids]
    whole = "".join(text.replace(PAD, "") for text in texts)
    assert whole.endswith(END_OF_TEXT)
    return whole.removesuffix(END_OF_TEXT).split(END_OF_TEXT)


def kind_of(document: str) -> str:
    """What a document is by its form alone; a question's lines come before the items of a reading exercise."""
    if IM_START in document:
        return "bare answer"
    lines = document.split("\n")
    if any(not STEP.fullmatch(line) and not REWRITTEN.fullmatch(line) for line in lines):
        return "reading exercise"
    return "arithmetic"


def question_of(exercise: str) -> str:
    lines = exercise.split("\n")
    while ITEM.fullmatch(lines[-1]) or STEP.fullmatch(lines[-1]):
        lines.pop()
    return "\n".join(lines)


def test_documents_come_in_the_shares_asked_for(documents: list[str]) -> None:
    assert len(documents) == NUM_DOCUMENTS
    counts = Counter(kind_of(document) for document in documents)
    for kind, share in (("bare answer", 0.15), ("reading exercise", 0.2), ("arithmetic", 0.65)):
        tolerance = 4 * (NUM_DOCUMENTS * share * (1 - share)) ** 0.5  # four standard errors of the binomial
        assert abs(counts[kind] - NUM_DOCUMENTS * share) < tolerance, counts


def test_a_question_has_a_bare_answer_or_its_items_and_never_steps(documents: list[str]) -> None:
    for document in documents:
        assert "think>" not in document
        match kind_of(document):
            case "bare answer":
                assert BARE.fullmatch(document), document
            case "reading exercise":
                assert "boxed" not in document
                steps = [line for line in document.split("\n") if STEP.fullmatch(line)]
                assert len({STEP.fullmatch(line).group(2, 3) for line in steps}) <= 1, document
                assert not any(REWRITTEN.fullmatch(line) for line in document.split("\n"))


def test_the_corpus_holds_training_side_questions_alone(documents: list[str]) -> None:
    bare = [BARE.fullmatch(document)[1] for document in documents if kind_of(document) == "bare answer"]
    read = [question_of(document) for document in documents if kind_of(document) == "reading exercise"]
    for questions in (bare, read):
        assert len(questions) > 150
        assert {split_of(question) for question in questions} == {"train"}
        openings = {question.split()[0] for question in questions}
        assert openings >= {"State", "Solve", "Find", "Your", "Multiply", "Simplify"}


def test_every_line_of_arithmetic_is_true(documents: list[str]) -> None:
    checked = 0
    for line in (line for document in documents for line in document.split("\n")):
        if step := STEP.fullmatch(line):
            a, operator, b, result = step.groups()
            assert APPLY[operator](int(a), int(b)) == int(result), line
            checked += 1
    assert checked > 3 * NUM_DOCUMENTS


@pytest.mark.slow
def test_the_corpus_depends_on_the_seed_and_not_on_the_workers(tokenizer: Tokenizer) -> None:
    one, two = (corpus(tokenizer, num_workers=number, num_documents=2 * NUM_DOCUMENTS) for number in (1, 2))
    assert np.array_equal(one.ids, two.ids)
    other = corpus(tokenizer, seed=24)
    assert other.ids[:50].tobytes() != one.ids[:50].tobytes()


def test_shares_shape_the_corpus(tokenizer: Tokenizer) -> None:
    none = {"elementary_share": 0, "mixed_steps_share": 0, "sequence_share": 0, "reading_share": 0}
    only = corpus(tokenizer, **none)
    text = "".join(tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in only.ids)
    assert text.count(END_OF_TEXT) == text.count("\\boxed{") == NUM_DOCUMENTS
    assert text.count(IM_END) == 2 * NUM_DOCUMENTS


# --- training ---------------------------------------------------------------------------------------------------------


def trained(
    rows: Rows, tokenizer: Tokenizer, *, name: str = "tiny-qwen2", spoil: Any = None, **changes: Any
) -> tuple[Any, list[dict[str, float]]]:
    config = config_of(**changes)
    torch.manual_seed(config.seed)
    model = build_model(config.bases[name], tokenizer, VOCAB_SIZE)
    if spoil is not None:
        with torch.no_grad():
            spoil(model)
    device, pad_id = torch.device("cpu"), model.config.pad_token_id
    run = BasePretraining(model, rows, config.bases[name], config, pad_id=pad_id, device=device)
    run.run(silent())
    return model, run.log


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-llama"])
def test_the_loss_falls_and_the_log_says_how(rows: Rows, tokenizer: Tokenizer, name: str) -> None:
    _, log = trained(rows, tokenizer, name=name)
    assert [row["step"] for row in log] == [0, 50, 59]
    assert log[0]["loss"] == pytest.approx(np.log(VOCAB_SIZE), rel=0.05)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert [row["tokens"] for row in log] == [4 * 256 * (row["step"] + 1) for row in log]
    assert log[0]["seconds"] <= log[-1]["seconds"]


def test_equal_seeds_give_equal_weights(rows: Rows, tokenizer: Tokenizer) -> None:
    one, two, other = (trained(rows, tokenizer, num_steps=4, seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_padding_has_no_part_in_the_loss(rows: Rows, tokenizer: Tokenizer) -> None:
    pad_id = tokenizer.token_to_id(PAD)
    wider = Rows(
        *(
            np.pad(part, ((0, 0), (0, 64)), constant_values=value)
            for part, value in zip(rows, (pad_id, False), strict=True)
        )
    )
    losses = [trained(part, tokenizer, num_steps=1)[1][0]["loss"] for part in (rows, wider)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)  # logged with five digits


def plant_nan(model: Any) -> None:
    model.model.norm.weight[3] = float("nan")


def absurd(lr: float) -> dict[str, Any]:
    bases = config_of().model_dump(mode="json")["bases"]
    return {"bases": {name: {**base, "lr": lr} for name, base in bases.items()}, "warmup_steps": 1}


@pytest.mark.parametrize("changes", [absurd(3e37), {"spoil": plant_nan}])
def test_a_loss_that_is_not_finite_ends_the_run(rows: Rows, tokenizer: Tokenizer, changes: dict[str, Any]) -> None:
    with pytest.raises(TrainingFailure, match=r"lr: the loss is (nan|inf) at step \d+; lower lr") as caught:
        trained(rows, tokenizer, num_steps=3, **changes)
    assert caught.value.exit_code == 4


# --- the folders ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("made")
    (out / "tiny-llama").mkdir()
    (out / "tiny-llama" / "of an older one").write_text("x")
    return make_bases(config_of(num_steps=12, rows_per_step=2), out, progress=silent())


def test_bases_are_whole_folders(folders: list[Path]) -> None:
    assert [folder.name for folder in folders] == ["tiny-qwen2", "tiny-llama"]
    assert {path.name for path in folders[0].parent.iterdir()} == {"tiny-qwen2", "tiny-llama"}
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {
            "README.md",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "pretrain.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }


def test_transformers_opens_them(folders: list[Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder, kind in zip(folders, ("Qwen2ForCausalLM", "LlamaForCausalLM"), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert type(model).__name__ == kind
        assert model.dtype == torch.float32
        assert (model.config.eos_token_id, model.config.pad_token_id) == (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )
        assert (tokenizer.eos_token, tokenizer.pad_token) == (IM_END, PAD)
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1?"}], add_generation_prompt=True)
        ids = torch.tensor([chat["input_ids"]])
        assert torch.isfinite(model(ids).logits).all()
        assert tokenizer.decode(ids[0]) == f"{IM_START}user\n1 + 1?{IM_END}\n{IM_START}assistant\n"


def test_card_and_log_say_how_they_were_made(folders: list[Path]) -> None:
    for folder in folders:
        record = json.loads((folder / "pretrain.json").read_text())
        assert record["recipe"] == config_of(num_steps=12, rows_per_step=2).model_dump(mode="json")
        assert record["tokens"] == record["log"][-1]["tokens"] == 12 * 2 * 256
        card = (folder / "README.md").read_text()
        for line in (
            f"# {folder.name}: a pico base",
            f"{record['num_parameters']:,} parameters (2 layers, hidden size 32)",
            "| command | `make pico-bases` |",
            "| seed | 23 |",
            "| steps | 12 of 2 rows of 256 tokens |",
            "| tokens | 6,144 (padding included) |",
            f"| seconds | {record['seconds']:.0f} on one {record['hardware']}",
            f"| last loss | {record['log'][-1]['loss']:.4f} |",
            "| - reading exercises | 20% |",
        ):
            assert line in card


def test_an_unknown_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"bases: no base 'qwen2-0\.5m'; did you mean 'qwen2-0\.\dm'\?"):
        make_bases(load_bases_config(), tmp_path, names=["qwen2-0.5m"], progress=silent())
    assert not list(tmp_path.iterdir())


def test_the_recipe_of_the_repository_covers_the_families() -> None:
    config = load_bases_config(overrides={"num_steps": 5})
    assert config.num_steps == 5
    assert config.corpus.bare_answer_share == pytest.approx(0.15)
    assert len(pico_families()) == 8
