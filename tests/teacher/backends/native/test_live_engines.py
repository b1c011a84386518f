"""Requests that join a running batch say what they say alone, here and in workers; faults reach all of them."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from distill.errors import DataError, EnvironmentFault
from distill.records import Problem, Sampling, TraceRequest
from teacher.backends.native.backend import NativeBackend
from teacher.backends.native.live import LocalEngine
from teacher.engine.loop import Cancelled, EngineLoop
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Sequence
from teacher.http.app import build_app
from teacher.http.feed import SampleFeed
from teacher.live import GeneratedSample, GenerationRequest, RequestOptions
from tests.teacher.backends.native.test_native_backend import SAMPLING, open_it, requests
from tests.teacher.v3_models import tiny_config, write_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    write_model_folder(path, tiny_config(), fp8=True, std=0.1)
    return path


def teacher(folder: Path, *, workers: int) -> NativeBackend:
    opened: NativeBackend = open_it(folder, batch_size=4)
    opened.max_workers = workers
    return opened


@pytest.mark.parametrize("workers", [1, 2])
def test_what_joins_a_running_batch_is_what_it_is_alone(folder: Path, workers: int) -> None:
    """Two kinds of sampling, more requests than places."""
    samplings = [SAMPLING, SAMPLING.model_copy(update={"temperature": 0.0, "top_logprobs": 2})]
    alone = teacher(folder, workers=1)
    wanted = {c.request.key(alone.identity, s): c for s in samplings for c in alone.generate(requests(count=6), s)}
    live = teacher(folder, workers=workers)
    outcomes: queue.SimpleQueue[tuple[Sampling, Any]] = queue.SimpleQueue()
    for sampling in samplings:
        for request in requests(count=6):
            live.submit(
                GenerationRequest(request),
                sampling,
                lambda outcome, sampling=sampling: outcomes.put((sampling, outcome)),
            )
    found = {}
    for _ in wanted:
        sampling, outcome = outcomes.get(timeout=250)
        assert isinstance(outcome, GeneratedSample), outcome
        assert len(outcome.token_ids) == outcome.completion.num_tokens
        found[outcome.completion.request.key(alone.identity, sampling)] = outcome.completion
    live.close()
    assert found.keys() == wanted.keys()
    for key, completion in found.items():
        assert completion.text == wanted[key].text
        assert (completion.num_tokens, completion.logprobs is None) == (
            wanted[key].num_tokens,
            wanted[key].logprobs is None,
        )


@pytest.mark.slow
def test_what_libraries_print_is_no_answer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's log goes to standard output, below Python's."""
    condition = "event == 'import' and given[0] == 'teacher.engine.engine'"
    hook = f"lambda event, given: {condition} and os.write(1, b'NCCL INFO cudaDriver\\n')"
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys\nsys.addaudithook({hook})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    live = teacher(folder, workers=2)
    assert len(list(live.generate(requests(count=4), SAMPLING))) == 8
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    live.submit(GenerationRequest(requests(count=1)[0]), SAMPLING, outcomes.put)
    assert isinstance(outcomes.get(timeout=100), GeneratedSample)
    live.close()


class _Runs:
    """Stands where the engine does: finishes what it runs one by one, and remembers in which run it was."""

    batch_size = 8

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.cancelled: list[int] = []

    def cancel(self, key: int) -> None:
        self.cancelled.append(key)

    def run(self, sequences: list[Sequence[int]], *, more: Any) -> Any:
        running = list(sequences)
        self.runs.append([s.key for s in running])
        while running:
            yield running.pop(0)
            joined = more()
            self.runs[-1] += [s.key for s in joined]
            running += joined


def test_what_comes_joins_the_run_whatever_its_settings_and_what_is_cancelled_leaves_it() -> None:
    engine, jobs, done = _Runs(), queue.SimpleQueue(), []
    hot, cold = SamplingParams(1.0, 1.0), SamplingParams(0.0, 1.0)
    for key, draw in enumerate([hot, hot, cold, hot]):
        jobs.put([Sequence(key, [1], max_tokens=1, seed=0, sampling_params=draw)])
    jobs.put(Cancelled(2))
    jobs.put(None)
    EngineLoop(engine, jobs, lambda sequence: done.append(sequence.key)).run()  # type: ignore[arg-type]
    assert engine.runs == [[0, 1, 3]]
    assert done == [0, 1, 3]
    assert engine.cancelled == [2]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_client_that_leaves_frees_its_places(folder: Path, workers: int) -> None:
    """Four places, eight long answers: the others could not be written while the first four are."""
    backend = teacher(folder, workers=workers)
    live = SampleFeed(backend, max_unfinished=16)
    endless = SAMPLING.model_copy(update={"max_tokens": 100, "temperature": 0.0})
    never_ends = RequestOptions(logit_bias=((2, -100.0),))
    left = live.submit([GenerationRequest(request, options=never_ends) for request in requests(count=4)], endless)
    for future in left:
        assert future.cancel()
    assert live.num_unfinished() == 0
    (answer,) = live.submit([GenerationRequest(requests(count=1)[0])], SAMPLING)
    assert answer.result(timeout=250).completion.num_tokens
    live.close()


@pytest.mark.slow
def test_a_run_in_several_lines_that_is_abandoned_leaves_its_places_to_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher.backends.native.live.LINE_SEQUENCES", 2)
    backend = teacher(folder, workers=2)
    engines: Any = backend._live

    def sequences(first: int, *, max_tokens: int) -> list[Sequence[int]]:
        return [Sequence(first + n, [5 + n, 7], max_tokens=max_tokens, seed=n) for n in range(11)]

    abandoned = engines.run(sequences(0, max_tokens=100))
    next(abandoned)
    abandoned.close()
    done = list(engines.run(sequences(100, max_tokens=3)))
    assert sorted(sequence.key for sequence in done) == list(range(100, 111))
    assert all(1 <= len(sequence.generated_ids) <= 3 for sequence in done)
    backend.close()


def test_a_broken_engine_settles_all_that_wait_and_all_that_come(folder: Path) -> None:
    class Broken(_Runs):
        def run(self, sequences: Any, **rest: Any) -> Any:
            raise RuntimeError("out of memory")

    local = LocalEngine(Broken())  # type: ignore[arg-type]
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for key in range(3):
        local.submit(Sequence(key, [1], max_tokens=1, seed=0), outcomes.put)
    for _ in range(3):
        outcome = outcomes.get(timeout=60)
        assert isinstance(outcome, EnvironmentFault)
        assert "the engine has ended" in str(outcome)
    local.close()


def test_a_worker_that_dies_settles_what_it_had(folder: Path) -> None:
    live = teacher(folder, workers=2)
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    long = SAMPLING.model_copy(update={"max_tokens": 100})
    for request in requests(count=8):
        live.submit(GenerationRequest(request), long, outcomes.put)
    for worker in live._live._crew:  # type: ignore[attr-defined]
        worker._process.kill()
    settled = [outcomes.get(timeout=250) for _ in requests(count=8)]
    assert any(isinstance(outcome, EnvironmentFault) for outcome in settled)
    live.close()


def test_the_server_is_live_and_names_a_prompt_that_is_too_long(folder: Path) -> None:
    backend = teacher(folder, workers=1)
    (wanted,) = backend.generate([TraceRequest(problem=_question("1 + 1?"), sample_index=0)], SAMPLING)
    with TestClient(build_app(backend, model="pico", sampling=SAMPLING, max_waiting=8, max_batch=4)) as client:
        body = {"model": "pico", "messages": [{"role": "user", "content": "1 + 1?"}], "seed": 3}
        answer = client.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == wanted.text
        long = {**body, "messages": [{"role": "user", "content": "x" * 200}]}
        refused = client.post("/v1/chat/completions", json=long)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "maximum context length is 127 tokens" in refused.text
        too_many = client.post("/v1/chat/completions", json={**body, "n": 13})
        assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n"), "never, however long it waits"
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def _question(text: str) -> Problem:
    return Problem(prompt=text, answer=None, grader="math", source="http")


def test_a_prompt_too_long_is_raised_at_once(folder: Path) -> None:
    with pytest.raises(DataError, match="the model takes 127"):
        teacher(folder, workers=1).submit(
            GenerationRequest(TraceRequest(problem=_question("x" * 200), sample_index=0)),
            SAMPLING,
            lambda outcome: None,
        )
