"""Benchmarks as problems: from a folder, from the Hub by the real library, and what is said where neither has them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.benchmarks import BENCHMARKS, bench_folder, hub_identities
from distill.errors import DataError, RecipeError
from distill.problems import load_problems, source_files
from distill.problems.benchmark import read_benchmark
from distill.recipe import BenchmarkSource, Recipe, parse
from tests.distill.published_data_sets import published_data_sets
from tests.repository import REPOSITORY

ROWS = [
    {"question": "How many eggs?", "answer": "She has 16 - 3 = <<16-3=13>>13 eggs.\n#### 13"},
    {"question": "How many dollars?", "answer": "#### 1 of them is torn.\nSo 70,000 are left.\n#### 70,000"},
    {"question": "How cold?", "answer": "It fell.\n#### -5"},
]


def folder_of(tmp_path: Path, rows: list[dict[str, Any]], file: str = "gsm8k_train.jsonl") -> Path:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / file).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return tmp_path


def test_a_folder_s_questions_are_read_with_their_references(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ROWS)
    problems = load_problems([BenchmarkSource(name="gsm8k")], base_dir=Path(), bench_data=folder)
    assert [problem.prompt for problem in problems] == [row["question"] for row in ROWS]
    assert [problem.answer for problem in problems] == ["13", "70000", "-5"], "what follows the last ####, plain"
    assert {(problem.grader, problem.source) for problem in problems} == {("math", "gsm8k")}
    few = load_problems([BenchmarkSource(name="gsm8k", limit=2)], base_dir=Path(), bench_data=folder)
    assert few == problems[:2]


def test_a_file_is_known_by_its_bytes_and_the_hub_by_names(tmp_path: Path) -> None:
    folder, source = folder_of(tmp_path, ROWS), BenchmarkSource(name="gsm8k")
    parts = [("gsm8k", "train")]
    files = source_files([source], base_dir=Path(), bench_data=folder)
    assert files == {"problems:gsm8k/train": folder / "gsm8k_train.jsonl"}
    assert hub_identities(parts, folder) == {}
    assert source_files([source], base_dir=Path()) == {}
    identity = {"repo": "openai/gsm8k", "revision": "main", "config": "main", "split": "train"}
    assert hub_identities(parts, None) == {"hub": {"gsm8k/train": identity}}


def test_the_recipe_goes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_BENCH_DATA", "of-the-environment")
    assert bench_folder("mine", tmp_path) == tmp_path / "mine"
    assert bench_folder(None, tmp_path) == tmp_path / "of-the-environment"
    monkeypatch.setenv("POTSTILL_BENCH_DATA", "")
    assert bench_folder(None, tmp_path) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"question": "q", "answer": "13"}', r"gsm8k_train.jsonl:1: not a question with an answer: has no '####'"),
        ('{"question": "q"}', r"gsm8k_train.jsonl:1: answer: missing"),
        ('{"question": "", "answer": "#### 1"}', r"gsm8k_train.jsonl:1: not a question"),
        ('{"question": "q", "answer": "#### 1"}\n[1]', r"gsm8k_train.jsonl:2: must be a JSON object"),
        ("\n", r"gsm8k_train.jsonl: holds no question"),
    ],
)
def test_what_is_no_question_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "gsm8k_train.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_benchmark("gsm8k", "train", tmp_path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gsm8k_train\.jsonl: missing benchmark file of 'gsm8k', split train"):
        load_problems([BenchmarkSource(name="gsm8k")], base_dir=Path(), bench_data=tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"name": "gsm8"}, r"name: unknown benchmark 'gsm8'; did you mean 'gsm8k'\?"),
        ({"name": "math500"}, r"split: math500 has test alone, got 'train'"),
        ({"name": "gsm8k", "split": "validation"}, r"split: must be 'train' or 'test', got 'validation'"),
    ],
)
def test_a_benchmark_that_there_is_not_is_refused(source: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse(BenchmarkSource, source, where="recipe")


def recipe_tree(**changes: Any) -> dict[str, Any]:
    return {
        "name": "t",
        "problems": [{"kind": "benchmark", "name": "gsm8k", "split": "train"}],
        "teacher": {"backend": "native", "model": "teacher/pico"},
        "distill": {"students": ["qwen2-0.2m"]},
        "eval": {"suites": ["gsm8k"]},
        **changes,
    }


def test_a_suite_s_own_questions_are_not_learned() -> None:
    assert parse(Recipe, recipe_tree(), where="recipe").problems[0].name == "gsm8k"
    test = [{"kind": "benchmark", "name": "gsm8k", "split": "test"}]
    with pytest.raises(RecipeError, match=r"problems\.0\.split: the suite 'gsm8k' asks the questions of its test"):
        parse(Recipe, recipe_tree(problems=test), where="recipe")
    assert parse(Recipe, recipe_tree(problems=test, eval={"suites": ["math500"]}), where="recipe")


def test_the_folder_s_old_place_names_the_new_one() -> None:
    with pytest.raises(RecipeError, match=r"eval\.bench_data: is `bench_data` at the top of the recipe"):
        parse(Recipe, recipe_tree(eval={"suites": ["gsm8k"], "bench_data": "x"}), where="recipe")


CARD = b"""---
configs:
- config_name: main
  data_files: [{split: train, path: main/train-*}, {split: test, path: main/test-*}]
- config_name: socratic
  data_files: [{split: train, path: socratic/train-*}]
---
"""
ASK = """
import json, sys
from distill.errors import PotstillError
from distill.problems.benchmark import describe_benchmark, read_benchmark
from distill.recipe import DEFAULT_LIMITS
for line in sys.argv[1:]:
    what, name, split = line.split()
    try:
        if what == "read":
            print(*[problem.answer for problem in read_benchmark(name, split, None)])
        else:
            print(describe_benchmark(name, split, None, DEFAULT_LIMITS))
    except PotstillError as exc:
        print(exc.exit_code, exc)
"""


def table(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def ask(*questions: str, endpoint: str, home: Path, offline: bool = False) -> list[str]:
    """In a process of its own: the library reads the Hub's address when it is imported. It says nothing of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-c", ASK, *questions]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.slow
def test_without_a_folder_they_come_from_the_hub(tmp_path: Path) -> None:
    """Looked up without a download; read; found in the cache when the Hub is gone; a Hub without them is one line."""
    gsm8k = {
        "README.md": CARD,
        "main/train-00000-of-00001.parquet": table(ROWS),
        "main/test-00000-of-00001.parquet": table(ROWS[:1]),
        "socratic/train-00000-of-00001.parquet": table(ROWS[:1]),
    }
    aime = {"README.md": b"---\nlicense: mit\n---\n", "data/train-00000-of-00001.parquet": table([{"problem": "p"}])}
    home, aime24 = tmp_path / "home", BENCHMARKS["aime24"].repo
    with published_data_sets({"openai/gsm8k": gsm8k, aime24: aime}) as hub:
        said = ask("describe gsm8k train", "describe aime25 test", endpoint=hub.url, home=home)
        assert said[0] == "gsm8k train: openai/gsm8k on the Hub"
        assert said[1].startswith("2 math-ai/aime25: problems.repo: no such data set")
        assert not [path for path in hub.downloads if path.endswith(".parquet")]
        said = ask("read gsm8k train", "read gsm8k test", "read aime24 test", endpoint=hub.url, home=home)
        assert said == ["13 70000 -5", "13", f"2 {aime24}[train]: row 1: answer: missing"]
        assert not [path for path in hub.downloads if path.startswith("socratic/")]
        gone = hub.url
    both = ("read gsm8k train", "describe gsm8k train")
    assert ask(*both, endpoint=gone, home=home, offline=True) == ["13 70000 -5", "gsm8k train: openai/gsm8k on the Hub"]
    for line in ask(*both, endpoint=gone, home=tmp_path / "other-home"):
        assert line.startswith("3 gsm8k: neither bench_data nor POTSTILL_BENCH_DATA names a folder with its questions")
        assert "on the Hub openai/gsm8k: cannot be fetched (the Hub does not answer: " in line
