"""A rank that is killed in mid-run: the others end and say so, and the run goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from distill.failpoints import VARIABLE
from teacher.model.checkpoint import load_checkpoint
from teacher.parallel.groups import Ranks
from tests.repository import REPOSITORY
from tests.teacher.parallel.process_ranks import run_ranks
from tests.teacher.parallel.spread_runs import config_of, joined, joined_moments, missed, spread_run, trained

LAYOUT = {"pp": 2, "ep": 2, "microbatches": 2}
SETTINGS = {"num_steps": 12, "checkpoint": {"every": 3}}


def until_a_rank_is_lost(ranks: Ranks, config, folder: Path, place: str) -> tuple[str, float]:
    os.environ[VARIABLE] = place
    return missed(spread_run(ranks, config, folder))


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_run_goes_on_under_any_layout(tmp_path) -> None:
    config = config_of(LAYOUT, **SETTINGS)
    undisturbed = run_ranks(trained, 4, tmp_path / "whole", config)
    killed = tmp_path / "kept", "step.ended/7.2"
    started = time.monotonic()
    results = run_ranks(until_a_rank_is_lost, 4, tmp_path / "killed", config, *killed, lost=(2,), wait_for_lost=False)
    assert time.monotonic() - started < 60
    for rank, result in enumerate(results):
        if rank != 2:
            message, _ = result
            assert f"rank {rank} lost its peers" in message
            assert "\n" not in message

    subprocess.run(["cp", "-r", tmp_path / "kept", tmp_path / "kept_too"], check=True)
    again = run_ranks(trained, 4, tmp_path / "again", config, tmp_path / "kept")
    assert [row["step"] for row in again[0].log] == list(range(12))
    assert without_speed(again[0].log) == without_speed(undisturbed[0].log)
    for join in (joined, joined_moments):
        wanted, got = join(config.layout, undisturbed), join(config.layout, again)
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())

    other = config_of({"dp": 2}, **SETTINGS)
    elsewhere = run_ranks(trained, 2, tmp_path / "elsewhere", other, tmp_path / "kept_too")
    assert without_speed(elsewhere[0].log)[:6] == without_speed(undisturbed[0].log)[:6]  # before the checkpoint
    for row, one in zip(elsewhere[0].log, undisturbed[0].log, strict=True):
        # Sums of FP32 in another order, as in test_spread_training.
        assert row["loss"] == pytest.approx(one["loss"], rel=1e-3), row["step"]
        assert row["mtp_loss"] == pytest.approx(one["mtp_loss"], rel=1e-3), row["step"]


def without_speed(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_s")} for row in log]


# --- the command ------------------------------------------------------------------------------------------------------


def recipe(folder: Path) -> Path:
    architecture = config_of().architecture | {"hidden_size": 32, "max_position_embeddings": 512, "n_group": 1}
    tree = {
        "architecture": architecture | {"topk_group": 1}, "vocab_size": 400, "num_problems": 1_600, "row_length": 256,
        "rows_per_step": 8, "num_steps": 6, "warmup_steps": 2, "checkpoint": {"every": 2},
        "layout": {"pp": 2, "ep": 2, "microbatches": 2, "dispatch": "fp32", "combine": "fp32"},
    }  # fmt: skip
    path = folder / "spread.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def torchrun(
    num_ranks: int, *arguments: str, restarts: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}",
        f"--max-restarts={restarts}", "--monitor-interval=0.5", "-m", "potstill", "pretrain", *arguments,
    ]  # fmt: skip
    outside = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=outside, capture_output=True, text=True, timeout=280, check=False)


def said(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("potstill: ")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_trains_is_killed_and_goes_on_elsewhere(tmp_path) -> None:
    path, out = recipe(tmp_path), tmp_path / "teacher"
    options = [str(path), "--out", str(out), "--held-out", "1"]
    started = time.monotonic()
    killed = torchrun(4, *options, **{VARIABLE: "step.ended/4.3"})
    assert killed.returncode != 0
    assert time.monotonic() - started < 120  # the corpus is made first, by four processes on two cores
    assert not out.exists()
    assert {path.name for path in out.with_name("teacher.checkpoints").glob("step-*")} == {
        "step-00000002",
        "step-00000004",
    }

    resumed = torchrun(2, *options, "--set", "layout.pp=1")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert resumed.stdout == f"wrote {out}\n"
    record = json.loads((out / "training.json").read_text())
    assert [row["step"] for row in record["log"]] == [0, 5]
    assert record["layout"]["pp"] == 1
    model = load_checkpoint(out)
    assert model.config.num_nextn_predict_layers == 1
    assert (out / "tokenizer.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["layout.dp=3"], "layout: pp 2 x dp 3 x ep 2 are 12 processes, 2 were started"),
        (["layout.pq=1"], "layout.pq: unknown key; allowed: combine, dispatch, dp, ep, "),
    ],
)
def test_a_bad_layout_is_one_line_and_exit_2(tmp_path, changes, message) -> None:
    overrides = [part for change in changes for part in ("--set", change)]
    result = torchrun(2, str(recipe(tmp_path)), "--out", str(tmp_path / "teacher"), *overrides)
    (line,) = said(result)
    assert line.startswith(f"potstill: {tmp_path / 'spread.yaml'}: {message}")
    assert "exitcode  : 2" in result.stderr
    assert not (tmp_path / "teacher").exists()
