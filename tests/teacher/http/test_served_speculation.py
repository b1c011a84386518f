"""The native backend with its MTP layer drafting: the same completions, and drafts that are counted where one looks."""

from __future__ import annotations

import queue
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from distill.errors import CheckpointError
from distill.recipe import NativeTeacher
from teacher.backends import open_teacher
from teacher.backends.native.backend import NativeBackend
from teacher.http.app import build_app
from teacher.live import GeneratedSample, GenerationRequest
from tests.teacher.backends.native.test_native_backend import SAMPLING, requests
from tests.teacher.v3_models import tiny_config, write_model_folder

GREEDY = SAMPLING.model_copy(update={"temperature": 0.0, "top_logprobs": 2, "max_thinking_tokens": 9})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    write_model_folder(path, tiny_config(), std=0.05)  # so small that it repeats itself, which drafts foresee
    return path


def teacher(folder: Path, *, speculate: bool, workers: int = 1) -> NativeBackend:
    config = NativeTeacher(model=folder.name, batch_size=4, speculate=speculate)
    opened: NativeBackend = open_teacher(config, base_dir=folder.parent)
    opened.max_workers = workers
    return opened


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_completions_and_identity_are_the_same(folder: Path, workers: int) -> None:
    plain, fast = teacher(folder, speculate=False), teacher(folder, speculate=True, workers=workers)
    assert fast.identity == plain.identity
    for sampling in (SAMPLING, GREEDY):
        by_key = [
            {done.request.key(plain.identity, sampling): done for done in backend.generate(requests(), sampling)}
            for backend in (plain, fast)
        ]
        assert {key: done.text for key, done in by_key[1].items()} == {
            key: done.text for key, done in by_key[0].items()
        }
    live: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for request in requests():
        fast.submit(GenerationRequest(request), GREEDY, live.put)
    outcomes = [live.get(timeout=250) for _ in requests()]
    fast.close()
    assert all(isinstance(outcome, GeneratedSample) for outcome in outcomes)
    assert sum(outcome.num_drafts for outcome in outcomes) > sum(outcome.num_accepted for outcome in outcomes) > 0
    for outcome in outcomes:
        # The prompt's end gives one token, each draft one more, and each that came true another, if it was not last.
        tokens = 1 + outcome.num_drafts + outcome.num_accepted
        assert outcome.completion.num_tokens in (tokens, tokens - 1)


def test_a_server_counts_drafts(folder: Path) -> None:
    app = build_app(teacher(folder, speculate=True), model="pico", sampling=GREEDY, max_waiting=8, max_batch=4)
    with TestClient(app) as client:
        assert "potstill_drafts_total{" not in client.get("/metrics").text
        for n, stream in enumerate((False, True, False, True, False)):
            body = {"model": "pico", "messages": [{"role": "user", "content": f"{n} + {n}?"}], "stream": stream}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
        counted = dict(re.findall(r'potstill_drafts_total\{fate="(\w+)"\} ([\d.]+)', client.get("/metrics").text))
        tokens = float(
            re.findall(r'potstill_tokens_total\{kind="completion"\} ([\d.]+)', client.get("/metrics").text)[0]
        )
    accepted, rejected = float(counted["accepted"]), float(counted["rejected"])
    assert accepted > 0
    assert 0 <= 5 + 2 * accepted + rejected - tokens <= 5  # a sample's last draft may stand for no token more


def test_a_model_without_the_layer_is_refused(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "plain", tiny_config(num_nextn_predict_layers=0))
    with pytest.raises(CheckpointError, match=r"config\.json: num_nextn_predict_layers: .* the model has none"):
        teacher(tmp_path / "plain", speculate=True)
