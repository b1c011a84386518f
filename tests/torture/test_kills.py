"""SIGKILL at random moments and at every named place: nothing lost, nothing doubled, the same bytes in the end."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.failpoints import FAILPOINTS
from tests.torture.chain_client import STAGES, Chain, chain_server, doubled, kill_at_random, lines, lost, result

# Those that this chain comes through; the others belong to merging (tests/distill/test_ledger_merge.py), to training.
PLACES = [name for name in FAILPOINTS if name.startswith(("stage.", "file.", "ledger.", "export."))]


@pytest.fixture(scope="module")
def chain() -> Iterator[Chain]:
    with chain_server() as running:
        yield running


@pytest.fixture(scope="module")
def straight(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run leaves that nobody kills."""
    folder = tmp_path_factory.mktemp("straight")
    assert chain.run(folder) == 0
    assert chain.seconds.keys() >= set(STAGES)
    return result(folder)


def batter(chain: Chain, straight: dict[str, bytes], tmp_path: Path, num_kills: int, seed: int) -> str:
    """Fresh runs, killed again and again, until there were `num_kills`; returns the line that reports them."""
    rng, kills, runs, asked, samples = random.Random(seed), 0, 0, 0, 0
    chain.killed_in.clear()
    while kills < num_kills:
        folder = tmp_path / str(runs)
        kills += kill_at_random(chain, folder, rng, min(num_kills - kills, rng.randrange(3, 12)))
        assert not lost(folder)
        assert doubled(folder) == 0
        assert result(folder) == straight
        asked += len(lines(folder / "asked"))
        samples += len(set(lines(folder / "asked")))
        runs += 1
    places = ", ".join(f"{chain.killed_in[stage]} in {stage}" for stage in ("", *STAGES)).replace(" in ,", " before,")
    return f"{kills} kills ({places}) over {runs} runs: {samples} samples, {asked} teacher calls, 0 lost, 0 doubled"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_random_kills(chain: Chain, straight: dict[str, bytes], tmp_path: Path) -> None:
    batter(chain, straight, tmp_path, 3, seed=1)


@pytest.mark.torture
@pytest.mark.timeout(3_600)
def test_two_hundred_random_kills(
    chain: Chain, straight: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = batter(chain, straight, tmp_path, 200, seed=2)
    with capsys.disabled():
        print(f"\n{report}")  # noqa: T201
    assert min(chain.killed_in[stage] for stage in STAGES) >= 10, report


def kill_at(
    places: list[str], chain: Chain, straight: dict[str, bytes], tmp_path: Path, counts: list[int]
) -> Counter[str]:
    """At the n-th passing of every one of `places`, each in a run of its own."""
    hit: Counter[str] = Counter()
    for place in places:
        for count in counts:
            folder, at = tmp_path / f"{place}-{count}", f"{place}:{count}"
            if place.startswith("export."):
                assert chain.run(folder, num_samples=1) == 0  # has published fewer samples
            hit[place] += chain.run(folder, failpoint=at) == -signal.SIGKILL
            assert not (folder / "acknowledged").exists() or not lost(folder)
            assert chain.run(folder) == 0
            assert doubled(folder) == 0
            assert result(folder) == straight, f"{place}:{count}"
    return hit


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_at_three_named_places(chain: Chain, straight: dict[str, bytes], tmp_path: Path) -> None:
    """One of each kind, where most is half done; all of them in `make torture`."""
    places = ["stage.ended", "ledger.committed", "export.set_aside"]
    hit = kill_at(places, chain, straight, tmp_path, [1])
    assert all(hit[place] for place in places), hit


@pytest.mark.torture
@pytest.mark.timeout(3_600)
def test_kills_at_every_passing_of_every_named_place(
    chain: Chain, straight: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hit = kill_at(PLACES, chain, straight, tmp_path, [1, 2, 3, 5, 8, 13])
    with capsys.disabled():
        print(f"\n{sum(hit.values())} kills at named places: {dict(hit)}")  # noqa: T201
    assert all(hit[place] for place in PLACES), hit
