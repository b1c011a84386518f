"""lm-eval asks `potstill serve`'s application, and scores what its own `hf` model scores on the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.records import Sampling
from teacher.http.app import build_app
from tests.repository import REPOSITORY
from tests.teacher.backends.native.test_native_backend import open_it
from tests.teacher.http.listening import listening

pytestmark = pytest.mark.slow

FOLDER = REPOSITORY / "students" / "pico" / "qwen2-0.4m"
# FP32 in other orders of summation, five digits a token, up to a dozen tokens a choice.
TOLERANCE = 2e-3
COMMON = {"dataset_path": "json", "test_split": "test"}
TASKS = {
    "sums_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "What is {{a}} + {{b}}?\n",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "sums_written": {
        "output_type": "generate_until",
        "doc_to_text": "What is {{a}} + {{b}}?\n",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"a": a, "b": b, "choices": [f"{a} + {b} = {a + b + off}" for off in (-1, 0, 10)], "gold": 1}
        for a, b in [(3, 4), (10, 5), (7, 8), (21, 4), (9, 9), (30, 12)]
    ]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        tree = {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}, **COMMON, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def url() -> Any:
    app = build_app(open_it(Path(FOLDER)), model="pico", sampling=Sampling(temperature=0.0))
    with listening(app) as (host, port):
        yield f"http://{host}:{port}/v1"


def scored(model: str, arguments: dict[str, Any], task: str, tasks: Any, **settings: Any) -> tuple[dict, list]:
    """The scores, and what was answered to each question."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=tasks, bootstrap_iters=0, **settings
    )
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return found["results"][task], [sample["filtered_resps"] for sample in samples]


def by_hf(task: str, tasks: Any, **settings: Any) -> tuple[dict, list]:
    arguments = {"pretrained": str(FOLDER), "dtype": "float32", "device": "cpu"}
    return scored("hf", arguments, task, tasks, batch_size=1, **settings)


@pytest.mark.parametrize("sent", [{"tokenized_requests": True}, {"tokenized_requests": False}], ids=["tokens", "text"])
def test_log_likelihoods_are_hfs(url: str, tasks: Any, sent: dict[str, bool]) -> None:
    arguments = {"model": "pico", "base_url": f"{url}/completions", "tokenizer": str(FOLDER), **sent}
    scores, answers = scored("local-completions", arguments, "sums_choice", tasks, batch_size=4)
    wanted_scores, wanted = by_hf("sums_choice", tasks)
    assert scores["acc,none"] == wanted_scores["acc,none"]
    assert scores["acc_norm,none"] == wanted_scores["acc_norm,none"]
    for told, expected in zip(answers, wanted, strict=True):
        assert [value for value, _ in told] == pytest.approx([value for value, _ in expected], abs=TOLERANCE)
        assert [greedy for _, greedy in told] == [greedy for _, greedy in expected]


def test_texts_are_hfs(url: str, tasks: Any) -> None:
    arguments = {"model": "pico", "base_url": f"{url}/completions", "tokenizer": str(FOLDER), "num_concurrent": 3}
    scores, answers = scored("local-completions", arguments, "sums_written", tasks, batch_size=1)
    # lm-eval's own model leaves special tokens out of its texts, which a base writes at times.
    answers = [[text.replace("<|im_start|>", "") for text in texts] for texts in answers]
    assert (answers, scores["exact_match,none"]) == _of(by_hf("sums_written", tasks))


def test_chats_are_hfs(url: str, tasks: Any) -> None:
    arguments = {"model": "pico", "base_url": f"{url}/chat/completions", "num_concurrent": 3}
    scores, answers = scored(
        "local-chat-completions", arguments, "sums_written", tasks, apply_chat_template=True, batch_size=1
    )
    assert (answers, scores["exact_match,none"]) == _of(by_hf("sums_written", tasks, apply_chat_template=True))
    assert answers != by_hf("sums_written", tasks)[1], "the template makes a difference"


def _of(found: tuple[dict, list]) -> tuple[list, float]:
    return found[1], found[0]["exact_match,none"]
