"""lm-eval's own tasks through our engine: the numbers of lm-eval's `hf` model, and of lm-eval on the same answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DataError, RecipeError
from distill.ledger import Ledger
from distill.progress import silent
from distill.protocols import Likelihood, PlainAnswer, PlainPrompt, ScoredText, TokenModel
from distill.recipe import EvalConfig, LmEvalConfig
from distill.records import ScoreCard, TeacherIdentity
from eval.lm_eval.kept import KeptTokens
from eval.lm_eval.scoring import score_task
from eval.lm_eval.tasks import load_tasks
from eval.suites import check_suites
from teacher.backends import open_student
from tests.eval.scripted import SUBJECT
from tests.eval.task_rows import SUMS, write_arc, write_gsm8k, write_wikitext
from tests.published_models import published
from tests.repository import REPOSITORY

PICO = REPOSITORY / "students" / "pico" / "qwen2-0.2m"
# FP32 on both sides, sums in other orders; log-likelihoods are of a few hundred nats.
TOLERANCE = 2e-3


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # seconds of other programs
        yield


def scored(
    model: TokenModel, task: str, folder: Path, bench_data: Path, **changes: Any
) -> tuple[dict[tuple[str, str], ScoreCard], dict[str, list[dict[str, Any]]], int]:
    """Cards by suite and metric, the samples of every task, and how many answers the model was asked for."""
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        kept = KeptTokens(model, ledger, silent())
        how: dict[str, Any] = {"config": LmEvalConfig(), "seed": 0, "limit": None, "bench_data": bench_data}
        cards = score_task(kept, SUBJECT, task, folder / "lm_eval", silent(), **how | changes)
    files = (folder / "lm_eval").glob("*.jsonl")
    samples = {path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in files}
    return {(card.suite, card.metric): card for card in cards}, samples, kept.num_asked


def by_lm_eval(model: Any, task: str, bench_data: Path, **settings: Any) -> tuple[dict[str, Any], list[Any]]:
    """lm-eval's own results, and what was answered to each document."""
    import lm_eval

    tasks = list(load_tasks(task, bench_data)["tasks"].values())
    if isinstance(model, Path):
        settings |= {"model_args": {"pretrained": str(model), "dtype": "float32", "device": "cpu"}, "batch_size": 1}
        model = "hf"
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=1000, **settings)
    samples = sorted(found["samples"][task], key=lambda sample: (sample["doc_id"], sample["filter"]))
    return found["results"][task], [sample["resps"] for sample in samples]


def check_against_hf(folder: Path, task: str, tmp_path: Path, *, batch_size: int = 8, **changes: Any) -> None:
    model = open_student(folder, engine="native", batch_size=batch_size)
    cards, samples, _ = scored(model, task, tmp_path / "ours", tmp_path, **changes)
    model.close()
    config = changes.get("config", LmEvalConfig())
    settings = {"num_fewshot": config.num_fewshot, "apply_chat_template": config.chat_template}
    results, answers = by_lm_eval(folder, task, tmp_path, **settings)
    ours = sorted(samples[task], key=lambda sample: (sample["doc_id"], sample["filter"]))
    for sample, wanted in zip(ours, answers, strict=True):
        if isinstance(wanted[0][0], str):
            assert sample["resps"] == wanted
            continue
        for (found,), (expected,) in zip(sample["resps"], wanted, strict=True):
            value, *greedy = found if isinstance(found, list) else [found]
            expected_value, *expected_greedy = expected if isinstance(expected, tuple) else [expected]
            assert value == pytest.approx(expected_value, abs=TOLERANCE, rel=1e-5)
            assert greedy == expected_greedy
    metrics = {name: value for name, value in results.items() if "," in name and "_stderr" not in name}
    assert metrics.keys() == {metric for _, metric in cards}
    for (_, metric), card in cards.items():
        name, _, used = metric.partition(",")
        assert card.value == pytest.approx(metrics[metric], rel=1e-5)
        stderr = results[f"{name}_stderr,{used}"]
        assert card.stderr == (None if stderr == "N/A" else pytest.approx(stderr, rel=1e-5))


def test_a_pico_student_scores_what_it_scores_by_hf(tmp_path: Path) -> None:
    write_arc(tmp_path, count=8)
    check_against_hf(PICO, "arc_challenge", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("arc_challenge", LmEvalConfig(num_fewshot=3)),
        ("arc_challenge", LmEvalConfig(chat_template=True)),
        ("wikitext", LmEvalConfig()),
        ("gsm8k", LmEvalConfig(num_fewshot=2)),
        ("gsm8k", LmEvalConfig(num_fewshot=1, chat_template=True)),
    ],
    ids=["few-shot", "chat template", "rolling", "generated", "generated, chat template"],
)
def test_whatever_is_asked_for_is_hfs(tmp_path: Path, task: str, config: LmEvalConfig) -> None:
    write_arc(tmp_path)
    write_gsm8k(tmp_path)
    context = json.loads((PICO / "config.json").read_text())["max_position_embeddings"]
    write_wikitext(tmp_path, ["what is 1 + 2 ? 3 . " * (context // 4), "short", "b " * (context + 1)])
    check_against_hf(PICO, task, tmp_path, config=config)


@pytest.mark.slow
def test_a_published_model_scores_what_it_scores_by_hf(tmp_path: Path) -> None:
    write_arc(tmp_path)
    check_against_hf(published("SmolLM2-135M-Instruct"), "arc_challenge", tmp_path)


class Scripted:
    """A token model with a pico student's vocabulary: what it writes and how likely it finds a text is given."""

    num_positions = 4096
    identity = TeacherIdentity(name="s", weights="s", template="s", backend="script", backend_version="0")

    def __init__(self, answer: Callable[[str], str] = str) -> None:
        from transformers import AutoTokenizer

        from teacher.backends.vocabulary import FolderVocabulary

        tokenizer = AutoTokenizer.from_pretrained(PICO, trust_remote_code=False)
        self.vocabulary = FolderVocabulary(tokenizer, PICO)
        self.answer = answer
        self.asked: list[Any] = []
        self.most: int | None = None

    def likelihoods(self, wanted: Sequence[ScoredText]) -> Iterator[tuple[int, Likelihood]]:
        for number, text in reversed(list(enumerate(wanted))):  # any order is allowed
            if self.most == 0:
                raise KeyboardInterrupt
            self.most = None if self.most is None else self.most - 1
            self.asked.append(text)
            yield number, Likelihood(-0.1 * (sum(text.context_ids + text.continuation_ids) % 97), number % 3 == 0)

    def continuations(self, wanted: Sequence[PlainPrompt]) -> Iterator[tuple[int, PlainAnswer]]:
        for number, prompt in enumerate(wanted):
            self.asked.append(prompt)
            yield number, PlainAnswer(self.answer(self.vocabulary.spell(*prompt.prompt_ids)), "stop", 1, 1)


def replayed(samples: list[dict[str, Any]]) -> Any:
    """An lm-eval model that says what the samples say."""
    from lm_eval.api.model import LM

    of_document = {sample["doc_id"]: iter(resp[0] for resp in sample["resps"]) for sample in samples}

    class Replayed(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [tuple(next(of_document[request.doc_id])) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [next(of_document[request.doc_id]) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

    return Replayed()


def solve(prompt: str) -> str:
    """Right on every second sum, and on one only by the looser of GSM8K's two readings."""
    question = prompt.rpartition("Question: ")[2].partition("\n")[0]
    number = next(number for number, (asked, _) in enumerate(SUMS) if asked.split() == question.split())
    right = SUMS[number][1]
    return f" {right}" if number % 2 == 0 else f" It is {right.rpartition(' ')[2]}" if number == 3 else " #### 1"


@pytest.mark.parametrize("task", ["gsm8k", "arc_challenge"])
@pytest.mark.slow
def test_lm_eval_makes_the_same_numbers_of_the_same_answers(tmp_path: Path, task: str) -> None:
    write_arc(tmp_path)
    write_gsm8k(tmp_path)
    cards, samples, _ = scored(Scripted(solve), task, tmp_path / "ours", tmp_path)
    results, _ = by_lm_eval(replayed(samples[task]), task, tmp_path)
    assert len(cards) == 2
    for (suite, metric), card in cards.items():
        name, _, used = metric.partition(",")
        assert (suite, card.value, card.stderr) == (
            f"lm_eval:{task}",
            results[metric],
            results[f"{name}_stderr,{used}"],
        )
        assert card.ci95 is not None
        assert math.isclose(card.ci95[1] - card.value, 1.96 * results[f"{name}_stderr,{used}"])
        assert card.num_questions == results["sample_len"]
    if task == "gsm8k":
        assert {metric: card.value for (_, metric), card in cards.items()} == {
            "exact_match,strict-match": 3 / 5,
            "exact_match,flexible-extract": 4 / 5,
        }


@pytest.mark.slow
def test_what_had_arrived_is_not_asked_again(tmp_path: Path) -> None:
    write_arc(tmp_path)
    straight = scored(Scripted(), "arc_challenge", tmp_path / "straight", tmp_path)
    model = Scripted()
    model.most = 50
    with pytest.raises(KeyboardInterrupt):
        scored(model, "arc_challenge", tmp_path / "stopped", tmp_path)
    assert not (tmp_path / "stopped" / "lm_eval").exists()
    model.most = None
    # The script's likelihoods do not depend on the call, but for which are greedy.
    cards, _, asked = scored(model, "arc_challenge", tmp_path / "stopped", tmp_path)
    assert (cards, asked) == (straight[0], 120 - 50)
    assert len(model.asked) == len(set(model.asked)) == 120
    assert scored(model, "arc_challenge", tmp_path / "stopped", tmp_path)[2] == 0
    fewer = scored(model, "arc_challenge", tmp_path / "stopped", tmp_path, limit=5)
    assert (fewer[0]["lm_eval:arc_challenge", "acc,none"].num_questions, fewer[2]) == (5, 0)
    assert scored(model, "arc_challenge", tmp_path / "stopped", tmp_path, config=LmEvalConfig(num_fewshot=1))[2] == 120


def test_tasks_of_a_tag_are_parts_of_it(tmp_path: Path) -> None:
    write_arc(tmp_path)
    (tmp_path / "lm_eval/allenai/ai2_arc/ARC-Easy").symlink_to("ARC-Challenge")
    cards, samples, _ = scored(Scripted(), "ai2_arc", tmp_path / "ours", tmp_path)
    assert {suite for suite, _ in cards} == {"lm_eval:ai2_arc/arc_easy", "lm_eval:ai2_arc/arc_challenge"}
    assert samples.keys() == {"arc_easy", "arc_challenge"}


def test_what_cannot_be_asked_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"suites: lm-eval \S+ has no task 'helaswag'; did you mean 'hellaswag'\?"):
        check_suites(["pico", "lm_eval:helaswag"])
    with pytest.raises(RecipeError, match=r"'humaneval' runs programs that the model wrote, without a sandbox"):
        check_suites(["lm_eval:humaneval"])
    with pytest.raises(RecipeError, match=r"'meqsum' needs the metric '\w+' of the Hub, a program"):
        load_tasks("meqsum", None)
    with pytest.raises(ValueError, match=r"transformers does not score texts"):
        EvalConfig(suites=("lm_eval:hellaswag",), engine="transformers")
    write_arc(tmp_path)
    (tmp_path / "lm_eval/allenai/ai2_arc/ARC-Challenge/test.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"ARC-Challenge: has no file of the split 'test', which arc_challenge asks for"
    ):
        load_tasks("arc_challenge", tmp_path)
