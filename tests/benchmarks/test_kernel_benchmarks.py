"""The benchmark of the kernels: what it prints and writes at toy sizes, and what it makes of wrong results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.__main__ import measured, measured_or_failed
from benchmarks.kernels.case import Case, Peer, PeerMissing, Work, differing_share, relative_error
from benchmarks.kernels.ceilings import Ceilings
from benchmarks.kernels.families import all_cases
from benchmarks.kernels.inputs import e4m3_bits
from benchmarks.kernels.report import Row, line, total
from benchmarks.kernels.timing import poisoned
from tests.repository import REPOSITORY

CPU = torch.device("cpu")
CEILINGS = Ceilings(2e9, 4e9, 1e12, 2e12)


def doubling(run=lambda x: 2 * x, **peers: Peer | PeerMissing) -> Case:
    """A kernel that doubles its input."""

    def build(_: torch.device) -> Work:
        return Work(
            run,
            make=lambda seed: torch.randn(64, generator=torch.Generator().manual_seed(seed)),
            error=lambda got, x: relative_error(got, 2 * x),
            tolerance=1e-6,
            size_bytes=4_000,
            peers=lambda: peers,
        )

    return Case("double", "64", build)


def half_written(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out[:32] = 2 * x[:32]
    return out


def test_a_right_kernel_has_a_time_and_a_share_of_its_floor() -> None:
    row, missing = measured(doubling(), CEILINGS, CPU)
    assert not missing
    assert row.us is not None
    assert row.error == 0
    assert row.floor_us == pytest.approx(1.0)  # 4,000 bytes at 4 GB/s, the faster of a copy and a read
    assert row.share_of_floor == pytest.approx(1 / row.us)
    assert row.as_json()["gb_per_s"] == pytest.approx(4_000 / row.us / 1e3)


@pytest.mark.parametrize("run", [lambda x: 2.001 * x, half_written], ids=["another result", "half of it unwritten"])
def test_a_wrong_kernel_has_no_time(run) -> None:
    row, _ = measured(doubling(run), CEILINGS, CPU)
    assert row.us is None
    assert "FAILED" in line(row)
    json.dumps(row.as_json(), allow_nan=False)


def test_a_kernel_that_does_not_run_is_a_row_that_says_so() -> None:
    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no room\nand a long story")

    row, missing = measured_or_failed(doubling(refuse), CEILINGS, CPU)
    assert not missing
    assert row.us is None
    assert row.failed == "RuntimeError: no room"
    assert "FAILED: RuntimeError: no room" in line(row)
    json.dumps(row.as_json(), allow_nan=False)


def test_peers_that_fail_or_differ_are_left_out_with_their_reason() -> None:
    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not on this device\nand a long story")

    row, missing = measured(
        doubling(
            good=Peer(lambda pair: pair[0] + pair[1], prepare=lambda x: (x, x), tolerance=1e-6),
            wrong=Peer(lambda x: 3 * x, tolerance=1e-6),
            refusing=Peer(refuse),
            absent=PeerMissing("is not installed"),
        ),
        CEILINGS,
        CPU,
    )
    assert list(row.peers) == ["good"]
    assert missing["wrong"] == "its result is another: error 5.00e-01"
    assert missing["refusing"] == "RuntimeError: not on this device"
    assert missing["absent"] == "is not installed"


def test_the_floor_is_the_longer_of_bytes_and_arithmetic() -> None:
    assert CEILINGS.floor_us(4_000, 10**6, "bf16") == pytest.approx(1.0)
    assert CEILINGS.floor_us(4_000, 10**7, "bf16") == pytest.approx(10.0)
    assert CEILINGS.floor_us(4_000, 10**7, "fp8") == pytest.approx(5.0)
    assert CEILINGS.floor_us(8_000, 10**9, None) == pytest.approx(2.0)


def test_a_total_keeps_only_peers_that_took_every_shape() -> None:
    rows = [
        Row("k", "a", 10.0, 5.0, 100, 7, 1e-3, {"x": 1.0, "y": 2.0}),
        Row("k", "b", 20.0, 6.0, 200, 8, 2e-3, {"x": 3.0}),
    ]
    whole = total("all", rows)
    assert (whole.us, whole.floor_us, whole.size_bytes, whole.flop, whole.error) == (30.0, 11.0, 300, 15, 2e-3)
    assert whole.peers == {"x": 4.0}
    assert total("all", [*rows, Row("k", "c", None, 1.0, 1, 1, float("nan"), {}, "wrong")]).us is None


def test_poison_is_what_empty_memory_holds_within() -> None:
    with poisoned():
        inside = torch.empty(100), torch.empty(100, dtype=torch.int32)
        e4m3 = torch.empty(100, dtype=torch.float8_e4m3fn)
    assert inside[0].isnan().all()
    assert (inside[1] == 2**31 - 1).all()
    assert e4m3.float().isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_random_e4m3_holds_every_number_and_no_nan() -> None:
    bits = e4m3_bits(CPU, 0, 40, 1_000).view(torch.uint8)
    assert sorted(bits.unique().tolist()) == [n for n in range(256) if n not in (0x7F, 0xFF)]
    assert torch.equal(bits, e4m3_bits(CPU, 0, 40, 1_000).view(torch.uint8))


def test_shares_of_differing_bits_tell_minus_zero_from_zero() -> None:
    zeros = torch.zeros(4)
    assert differing_share([zeros], [torch.tensor([0.0, -0.0, 0.0, 1.0])]) == 0.5
    with pytest.raises(ValueError, match="against"):
        differing_share([zeros], [zeros.double()])


def test_cases_have_names_of_their_own() -> None:
    for toy in (False, True):
        names = [case.name for case in all_cases(toy=toy)]
        assert len(set(names)) == len(names)


@pytest.mark.slow
def test_the_program_prints_a_table_and_writes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.kernels", "--dry-run", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout[-2_000:] + result.stderr[-2_000:]
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert written["sizes"] == "toy"
    kernels = {row["kernel"] for row in written["rows"]}
    assert kernels >= {case.kernel for case in all_cases(toy=True)}
    for row in written["rows"]:
        assert row["us"] > 0
        assert row["floor_us"] > 0
        assert f"{row['kernel']} " in result.stdout
    gemm = [row for row in written["rows"] if row["kernel"] == "block_gemm" and row["shape"].startswith("20 x ")]
    assert gemm[-1]["shape"] == "20 x all shapes"
    assert gemm[-1]["us"] == pytest.approx(sum(row["us"] for row in gemm[:-1]))
    assert all(why for why in written["peers_left_out"].values())


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    command = [sys.executable, "-m", "benchmarks.kernels", "--dry-run", "--only", "no such kernel"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 1
    assert "no case matches" in result.stderr


def test_tuning_without_a_gpu_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.kernels.tune"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 1
    assert result.stderr.strip() == "tuning needs a GPU: on a CPU the plain-torch twin has nothing to choose"
