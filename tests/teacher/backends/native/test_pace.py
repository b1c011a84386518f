"""How the native engine's work stands is known from its first step, in this process and in workers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from distill.protocols import Reporting
from distill.records import Sampling
from teacher.backends.native import workers
from teacher.backends.native.live import WorkerEngines
from teacher.backends.native.pace import Pace
from teacher.backends.native.workers import EngineSettings, begin_line
from teacher.engine.engine import EngineCounts
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Sequence
from tests.teacher.backends.native.test_native_backend import SAMPLING, open_it, requests
from tests.teacher.v3_models import tiny_config, write_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    write_model_folder(path, tiny_config(), fp8=True, std=0.1)
    return path


def test_facts_grow_with_every_step_and_end_with_what_was_written(folder: Path) -> None:
    teacher = open_it(folder, batch_size=4)
    teacher.max_workers = 1
    assert isinstance(teacher, Reporting)
    assert teacher.facts() == {"prompt_tokens": 0, "tokens": 0, "tokens_per_s": 0.0, "running": 0, "waiting": 0}
    stream = teacher.generate(requests(count=4), SAMPLING)
    done = [next(stream)]
    under_way = teacher.facts()
    assert under_way["tokens"] >= done[0].num_tokens
    assert under_way["prompt_tokens"] > 0
    assert under_way["tokens_per_s"] > 0
    assert (under_way["running"], under_way["waiting"]) != (0, 0)
    done += stream
    written = sum(completion.num_tokens for completion in done)
    ended = teacher.facts()
    assert {name: ended[name] for name in ("tokens", "running", "waiting")} == {
        **{"tokens": written, "running": 0, "waiting": 0}
    }
    again = list(teacher.generate(requests(count=1), Sampling(max_tokens=1)))
    assert teacher.facts()["tokens"] == len(again), "each call counts its own"
    teacher.close()


class Told:
    """A worker that has told how its work stands."""

    def __init__(self, counts: list[tuple[int, ...]]) -> None:
        self._lines = [json.dumps({"counts": EngineCounts(*one)}) for one in counts]

    def write(self, line: str) -> None: ...

    def lines(self) -> Iterator[str]:
        return iter(self._lines)

    def check(self) -> None: ...

    def kill(self) -> None: ...


def test_counts_of_workers_are_the_last_of_each_added_up() -> None:
    engines = WorkerEngines([Told([(5, 1, 2, 3), (90, 40, 2, 0)]), Told([(10, 2, 1, 1)]), Told([])], ExitStack())
    engines.close()
    assert engines.counts == EngineCounts(100, 42, 3, 1)
    pace = Pace(engines)
    assert pace.facts()["tokens"] == 0
    engines._counts[2] = EngineCounts(30, 20, 4, 0)
    assert {name: pace.facts()[name] for name in ("prompt_tokens", "tokens", "running")} == {
        **{"prompt_tokens": 10, "tokens": 20, "running": 7}
    }


def test_a_worker_tells_its_counts_as_it_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "COUNTS_EVERY_S", 0.0)
    settings = EngineSettings(folder, batch_size=2, eos_token_ids=frozenset())
    sequences = [Sequence(n, [5, 6, 7], 9, n, SamplingParams(0.0)) for n in range(3)]
    lines = io.StringIO(
        "\n".join([json.dumps(settings.packed()), begin_line(enumerate(sequences)), workers.END_LINE]) + "\n"
    )
    output = io.StringIO()
    workers._work(lines, output)
    news = [json.loads(line) for line in output.getvalue().splitlines()]
    counts = [EngineCounts(*one["counts"]) for one in news if isinstance(one, dict)]
    written = [one.num_written_tokens for one in counts]
    assert written == sorted(written)
    assert 0 < written[0] < written[-1] <= 27
    assert {one.num_running + one.num_waiting for one in counts[:3]} == {3}
    assert len([one for one in news if isinstance(one, list)]) == 3
