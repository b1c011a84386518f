"""Engines over processes that share their experts behind one teacher: what they write, and how they end."""

from __future__ import annotations

import os
import queue
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from distill.errors import CheckpointError, DataError, EnvironmentFault, PotstillError, RecipeError
from distill.recipe import NativeTeacher
from distill.records import Completion
from teacher.backends import open_teacher
from teacher.backends.native import fleet as fleets
from teacher.backends.native.backend import NativeBackend
from teacher.engine.engine import Engine
from teacher.http.app import build_app
from teacher.live import GeneratedSample, GenerationRequest, RequestOptions
from teacher.model.block_checkpoint import load_blocks
from teacher.models.latent.model import LatentModel
from teacher.models.latent.weights import fuse_entries
from teacher.parallel.groups import SHARED_GPU_ENV, device_of
from tests.students.tiny_bases import make_base
from tests.teacher.backends.native.test_native_backend import SAMPLING, requests
from tests.teacher.v3_models import tiny_config, write_model_folder

WIDTHS = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128,
    "kv_lora_rank": 128, "num_attention_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "max_position_embeddings": 256, "rope_scaling": None,
}  # fmt: skip
# Where there is a GPU the ranks compute on it.
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
# Large weights: few draws are so close that rounding turns them. But a GPU rounds all of an engine to BF16, and large
# weights make more of it: there, small ones and the likeliest tokens.
STD, TEMPERATURE = (0.05, 0.0) if torch.cuda.is_available() else (0.3, SAMPLING.temperature)
SHORT = SAMPLING.model_copy(update={"max_tokens": 6, "temperature": TEMPERATURE})
LONG = SAMPLING.model_copy(update={"max_tokens": 150})


@pytest.fixture(scope="module", autouse=True)
def _gpu_for_all() -> Iterator[None]:
    """Where there is one GPU alone, ranks share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SHARED_GPU_ENV, "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    write_model_folder(path, tiny_config(**WIDTHS), fp8=True, std=STD)
    return path


def opened(folder: Path, **settings: Any) -> NativeBackend:
    config = NativeTeacher(model=folder.name, batch_size=3, **{"num_ranks": 2, **settings})
    backend = open_teacher(config, base_dir=folder.parent)
    assert isinstance(backend, NativeBackend)
    return backend


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Iterator[NativeBackend]:
    backend = opened(folder)
    yield backend
    backend.close()


def in_one_process(folder: Path) -> NativeBackend:
    """All experts in one engine, in FP8 as the ranks have them."""
    plain = open_teacher(NativeTeacher(model=folder.name), base_dir=folder.parent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LatentModel(fuse_entries(*load_blocks(folder, device)))
    engine = Engine(model, batch_size=6, eos_token_ids=plain.engine.eos_token_ids, decode=plain.engine._decode)
    return NativeBackend(folder, plain.tokenizer, engine)


def by_request(completions: list[Completion]) -> dict[tuple[str, int], Completion]:
    return {(done.request.problem.prompt, done.request.sample_index): done for done in completions}


@pytest.mark.slow
def test_ranks_write_what_one_engine_writes(folder: Path, teacher: NativeBackend) -> None:
    """More requests than places; their rounding differs, and a near tie turns the rest of a text."""
    alone = in_one_process(folder)
    wanted = by_request(list(alone.generate(requests(count=10), SHORT)))
    found = by_request(list(teacher.generate(requests(count=10), SHORT)))
    assert teacher.identity == alone.identity
    assert found.keys() == wanted.keys()
    assert sum(found[key].text == wanted[key].text for key in wanted) >= 0.6 * len(wanted)
    assert all(found[key].num_prompt_tokens == wanted[key].num_prompt_tokens for key in wanted)


def submitted(teacher: NativeBackend, sampling: Any = SAMPLING, count: int = 3, **streamed: Any) -> Any:
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    begun = [
        teacher.submit(GenerationRequest(request), sampling, outcomes.put, **streamed)
        for request in requests(count=count)
    ]
    return begun, outcomes


@pytest.mark.slow
def test_requests_come_at_any_time_and_are_streamed(teacher: NativeBackend) -> None:
    """After an idle time too: all ranks have to begin together."""
    for _ in range(3):
        grown: list[int] = []
        _, outcomes = submitted(teacher, count=1, on_tokens=lambda tokens, logprobs, into=grown: into.extend(tokens))
        answers = [outcomes.get(timeout=100) for _ in range(2)]
        assert all(isinstance(answer, GeneratedSample) for answer in answers)
        assert 0 < len(grown) <= sum(len(answer.token_ids) for answer in answers)
        time.sleep(0.2)


@pytest.mark.slow
def test_penalties_and_scored_prompts_reach_every_rank(folder: Path, teacher: NativeBackend) -> None:
    """Greedy; a penalty of two for each token that is there already leaves few that come twice."""
    greedy = SAMPLING.model_copy(update={"temperature": 0.0, "max_tokens": 40})
    plain = RequestOptions(prompt_logprobs=2)
    told, alone = {}, in_one_process(folder)
    for name, backend, options in (
        ("alone", alone, plain),
        ("plain", teacher, plain),
        ("penalised", teacher, replace(plain, frequency_penalty=2.0, repetition_penalty=10.0)),
    ):
        outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for request in requests(count=3, samples=1):
            backend.submit(GenerationRequest(request, options=options), greedy, outcomes.put)
        answers = [outcomes.get(timeout=100) for _ in range(3)]
        told[name] = sorted(answers, key=lambda answer: answer.completion.request.problem.prompt)
    alone.close()
    num_distinct = {name: sum(len(set(answer.token_ids)) for answer in answers) for name, answers in told.items()}
    assert num_distinct["penalised"] > num_distinct["plain"]
    for one, other in zip(told["alone"], told["plain"], strict=True):
        values = [[own for own, _ in answer.prompt_logprobs] for answer in (one, other)]
        assert len(values[0]) == len(one.prompt_ids) - 1
        # Sums of FP8 products in another order.
        assert values[1] == pytest.approx(values[0], rel=0.05, abs=0.2)


@pytest.mark.slow
def test_whoever_leaves_frees_a_place(teacher: NativeBackend) -> None:
    """All six places are taken by long answers that nobody wants any more."""
    begun, outcomes = submitted(teacher, LONG, count=3)
    for one in begun:
        one.cancel()
    for _ in begun:
        assert isinstance(outcomes.get(timeout=100), EnvironmentFault)
    _, outcomes = submitted(teacher, count=1)
    assert isinstance(outcomes.get(timeout=100), GeneratedSample)


@pytest.mark.slow
def test_abandoned_generation_is_forgotten(teacher: NativeBackend) -> None:
    some = teacher.generate(requests(count=6), LONG)
    next(some)
    some.close()
    assert sum(map(len, teacher.engine._in_flight)) == 0  # type: ignore[union-attr]
    assert len(list(teacher.generate(requests(count=1), SAMPLING))) == 2


def test_a_prompt_that_is_too_long_is_refused_before_it_is_sent(teacher: NativeBackend) -> None:
    long = requests(count=1)[0]
    long = long.model_copy(update={"problem": long.problem.model_copy(update={"prompt": "x" * 300})})
    with pytest.raises(DataError, match="the model takes 255"):
        list(teacher.generate([long], SAMPLING))


@pytest.mark.slow
def test_experts_move_while_it_writes_and_it_says_so(folder: Path) -> None:
    """All that a recipe can ask of ranks, at once."""
    moving = {"num_redundant": 2, "rebalance": {"every_steps": 3, "least_gain": 0.001}, "in_halves": True}
    teacher = opened(folder, **moving)
    alone = by_request(list(in_one_process(folder).generate(requests(count=10), SHORT)))
    with TestClient(build_app(teacher, model="v3", sampling=SAMPLING)) as client:
        assert "potstill_expert_imbalance" not in client.get("/metrics").text
        found = by_request(list(teacher.generate(requests(count=10), SHORT)))
        told = dict(line.split() for line in client.get("/metrics").text.splitlines() if "_expert" in line[:16])
    assert sum(found[key].text == alone[key].text for key in alone) >= 0.6 * len(alone)
    assert float(told["potstill_experts_moved"]) > 0
    assert 1 <= float(told["potstill_expert_imbalance"]) <= float(told["potstill_expert_imbalance_before"])


@pytest.mark.slow
@pytest.mark.parametrize("under_way", [True, False])
def test_a_rank_that_is_killed_ends_all_and_is_named(folder: Path, under_way: bool) -> None:
    teacher = opened(folder)
    crew = teacher.engine._crew  # type: ignore[union-attr]
    outcomes: Any = None
    if under_way:
        _, outcomes = submitted(teacher, LONG, count=2)
    crew[1]._process.kill()
    since = time.monotonic()
    while teacher.fault is None:
        assert time.monotonic() - since < 60
        time.sleep(0.05)
    if under_way:
        assert any(isinstance(outcomes.get(timeout=60), EnvironmentFault) for _ in range(4))
    assert "generation worker: ended with status -9" in str(teacher.fault)
    assert crew[0]._process.wait(30) != 0
    with pytest.raises(EnvironmentFault, match="ended with status -9"):
        list(teacher.generate(requests(count=1), SAMPLING))
    teacher.close()


@pytest.mark.slow
def test_weights_that_cannot_be_read_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    for path in folder.iterdir():
        (tmp_path / "teacher" / path.name).write_bytes(path.read_bytes())
    (shard,) = (tmp_path / "teacher").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(PotstillError, match=shard.name) as caught:
        opened(tmp_path / "teacher")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_ranks": 3}, "teacher.num_ranks: 8 experts do not divide among 3 ranks"),
        ({"num_redundant": 1}, "teacher.num_ranks: 8 experts and 1 more do not divide among 2 ranks"),
        (
            {"num_nodes": 2, "head_address": "127.0.0.1"},
            r"teacher.num_nodes: nodes know each other by a key: set one in \$POTSTILL_API_KEY",
        ),
    ],
)
def test_what_cannot_be_spread_is_refused_at_once(
    folder: Path, changes: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POTSTILL_API_KEY", raising=False)
    with pytest.raises(RecipeError, match=problem):
        opened(folder, **changes)


def test_ranks_share_gpus_where_that_is_asked_for_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for variable in (SHARED_GPU_ENV, "NCCL_HOSTID"):
        monkeypatch.setenv(variable, "")  # and back to what it was, whatever is set below
    with pytest.raises(EnvironmentFault, match="cuda: 4 ranks of this node need a GPU each, it has 2"):
        fleets._checked(folder, NativeTeacher(model="teacher", num_ranks=4))
    assert [device_of(rank, 2).index for rank in range(4)] == [0, 1, 0, 1]  # of two nodes
    assert os.environ[SHARED_GPU_ENV] == os.environ["NCCL_HOSTID"] == ""
    monkeypatch.setenv(SHARED_GPU_ENV, "1")
    assert fleets._checked(folder, NativeTeacher(model="teacher", num_ranks=4)) == 4
    assert [(device_of(rank, 4).index, os.environ["NCCL_HOSTID"]) for rank in (1, 2)] == [(1, "1"), (0, "2")]


def test_an_address_that_is_taken_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_API_KEY", "k")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=f"127.0.0.1:{port}: cannot be bound"):
            opened(folder, num_nodes=2, head_address="127.0.0.1", rpc_port=port)


def test_models_without_shared_experts_are_refused(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    with pytest.raises(RecipeError, match="only deepseek_v3 models have experts to share over ranks, this is 'qwen2'"):
        fleets._checked(tmp_path / "base", NativeTeacher(model="base", num_ranks=2))


def test_widths_that_fp8_does_not_take_are_refused(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "teacher", tiny_config(), fp8=True, std=0.1)
    with pytest.raises(CheckpointError, match="hidden_size 48: is no multiple of 128"):
        opened(tmp_path / "teacher")
