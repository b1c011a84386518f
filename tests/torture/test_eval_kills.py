"""SIGKILL during evaluation, at random and at named places, and a torn log: the same scores, no answer asked twice."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.ledger import Ledger
from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint, serving
from tests.teacher.backends.tiny_models import save_tiny_model
from tests.torture.chain_client import Chain, chain_server, lines, result
from tests.torture.eval_server import NUM_QUESTIONS

NUM_SAMPLES = 2
OF_A_MODEL = 2 * NUM_QUESTIONS * NUM_SAMPLES  # in two suites
MODELS = ("teacher", "mini-base")
PLACES = [f"{kind}/{stage}" for kind in ("stage.begun", "stage.ended") for stage in ("eval", "eval-model")]
PLACES += ["file.written", "file.renamed", "ledger.migrated", "ledger.inserted", "ledger.committed", "ledger.graded"]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[ChatEndpoint]:
    with serving(ChatEndpoint()) as running:
        yield running


@pytest.fixture(scope="module")
def chain(endpoint: ChatEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    models = tmp_path_factory.mktemp("models")
    save_tiny_model(models / "base")
    about = "architecture: qwen2\nnum_parameters: 9000\nlicence: apache-2.0\nsft: {lr: 1e-3}\n"
    (models / "mini.yaml").write_text(f"name: mini\nbase: {models / 'base'}\n{about}")
    with chain_server("tests.torture.eval_server", url=endpoint.url, models=str(models)) as running:
        yield running


@pytest.fixture(scope="module")
def straight(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an evaluation leaves that nobody kills."""
    folder = tmp_path_factory.mktemp("straight")
    assert chain.run(folder) == 0
    assert len(lines(folder / "acknowledged")) == len(MODELS) * OF_A_MODEL
    return scores(folder)


def scores(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in result(folder).items() if name.startswith("eval/")}


def kept(folder: Path) -> set[str]:
    """Keys of all samples in the ledgers of a run."""
    found: set[str] = set()
    for path in folder.glob("eval/*/ledger.sqlite"):
        with Ledger.open(path) as ledger:
            found |= {row[0] for row in ledger.scan()}
    return found


def check(folder: Path, straight: dict[str, bytes]) -> None:
    """A run that was killed on its way and has ended since."""
    assert scores(folder) == straight
    stored = kept(folder)
    assert set(lines(folder / "acknowledged")) <= stored
    assert len(stored) == len(MODELS) * OF_A_MODEL
    assert lines(folder / "doubled") == [], "a model was asked for what it had answered"


def batter(chain: Chain, straight: dict[str, bytes], tmp_path: Path, num_kills: int, seed: int) -> int:
    """Fresh runs, each killed up to eight times at random moments of random parts, until there were `num_kills`."""
    rng, kills, runs = random.Random(seed), 0, 0
    chain.killed_in.clear()
    while kills < num_kills:
        folder, wanted = tmp_path / str(runs), min(num_kills - kills, rng.randrange(3, 9))
        parts = [name for name, seconds in chain.seconds.items() if name and seconds > 0]  # in their order
        while True:
            part = rng.choice(parts)
            kill = (part, rng.uniform(0, 1.1) * chain.seconds[part]) if wanted else None
            status = chain.run(folder, kill=kill)
            if status == -signal.SIGKILL:
                kills, wanted = kills + 1, wanted - 1
                assert set(lines(folder / "acknowledged")) <= kept(folder)
                parts = parts[parts.index(chain.part) if chain.part in parts else 0 :]  # what is still to come
                continue
            assert status == 0
            if (folder / "eval" / "manifest.json").exists():
                break
        check(folder, straight)
        runs += 1
    return runs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_random_kills(chain: Chain, straight: dict[str, bytes], tmp_path: Path) -> None:
    batter(chain, straight, tmp_path, 3, seed=1)


@pytest.mark.torture
@pytest.mark.timeout(3_600)
def test_sixty_random_kills(
    chain: Chain,
    endpoint: ChatEndpoint,
    straight: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = len(endpoint.payloads)
    runs = batter(chain, straight, tmp_path, 60, seed=2)
    asked, wanted = len(endpoint.payloads) - before, runs * OF_A_MODEL
    with capsys.disabled():
        parts = dict(chain.killed_in)
        print(f"\n60 kills {parts} over {runs} runs: {wanted} answers wanted of the endpoint, {asked} asked")  # noqa: T201


def kill_at(
    places: list[str], chain: Chain, straight: dict[str, bytes], tmp_path: Path, counts: list[int]
) -> Counter[str]:
    """At the n-th passing of every one of `places`, each in a run of its own."""
    hit: Counter[str] = Counter()
    for place in places:
        for count in counts:
            folder = tmp_path / f"{place.replace('/', '-')}-{count}"
            status = chain.run(folder, failpoint=f"{place}:{count}")
            if status == 0:
                break  # it is passed less often than that
            assert status == -signal.SIGKILL
            hit[place] += 1
            assert chain.run(folder) == 0
            check(folder, straight)
    return hit


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_at_three_named_places(chain: Chain, straight: dict[str, bytes], tmp_path: Path) -> None:
    places = ["ledger.committed", "ledger.graded", "stage.ended/eval-model"]
    hit = kill_at(places, chain, straight, tmp_path, [1])
    assert all(hit[place] for place in places), hit


@pytest.mark.torture
@pytest.mark.timeout(3_600)
def test_kills_at_every_passing_of_every_named_place(
    chain: Chain, straight: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hit = kill_at(PLACES, chain, straight, tmp_path, [1, 2, 3, 5])
    with capsys.disabled():
        print(f"\n{sum(hit.values())} kills at named places: {dict(hit)}")  # noqa: T201
    assert all(hit[place] for place in PLACES), hit


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_torn_tail_costs_the_samples_in_it_alone(chain: Chain, straight: dict[str, bytes], tmp_path: Path) -> None:
    """A power cut: the log of the ledger ends in the middle of what was written last."""
    died = tmp_path / "died"
    assert chain.run(died, failpoint="ledger.committed:4") == -signal.SIGKILL
    rng = random.Random(3)
    for number in range(3):
        folder = tmp_path / str(number)
        shutil.copytree(died, folder)
        (log,) = folder.glob("eval/*/ledger.sqlite-wal")
        whole = log.stat().st_size
        with log.open("r+b") as file:
            file.truncate(whole - rng.randrange(1, 4_000))
        left = kept(folder)
        (folder / "acknowledged").write_text("".join(f"{key}\n" for key in left))  # what a power cut leaves
        assert 0 < len(left) < OF_A_MODEL
        assert chain.run(folder) == 0
        check(folder, straight)
