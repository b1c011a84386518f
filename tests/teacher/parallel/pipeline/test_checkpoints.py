"""A checkpoint of one layout is that of any other, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from distill.errors import CheckpointError, RecipeError
from distill.failpoints import VARIABLE
from distill.progress import silent
from teacher.parallel.groups import Ranks
from teacher.train import checkpoints
from tests.teacher.parallel.process_ranks import run_ranks
from tests.teacher.parallel.spread_runs import Trained, config_of, joined, joined_moments, spread_run, state_of, trained

STEPS, EVERY = 4, {"every": 2, "keep": 2}
FROM_TO = [
    ({}, {"pp": 2, "microbatches": 2}),
    ({"pp": 2, "ep": 2, "microbatches": 2}, {"ep": 4}),
    *(
        pytest.param(before, after, marks=pytest.mark.slow)
        for before, after in (
            ({"ep": 4, "dp": 2}, {"pp": 2, "microbatches": 2}),
            ({"pp": 2, "dp": 2, "microbatches": 2}, {"pp": 2, "ep": 2, "schedule": "zbv", "microbatches": 4}),
            ({"pp": 2, "ep": 2, "schedule": "dualpipev", "microbatches": 4}, {"dp": 3}),
        )
    ),
]


def loaded(ranks: Ranks, layout: dict, folder: Path) -> Trained:
    # 48 rows a step for three copies: how a run is spread and cut is not what it learns, but rows_per_step is.
    run = spread_run(ranks, config_of(layout, num_steps=STEPS, rows_per_step=24, checkpoint=EVERY), folder)
    assert run.resume() == STEPS
    return state_of(run)


def made(folder: Path, layout: dict) -> tuple[list[Trained], Path]:
    config = config_of(layout, num_steps=STEPS, rows_per_step=24, checkpoint=EVERY)
    return run_ranks(trained, config.layout.num_ranks, folder / "made", config, folder / "kept"), folder / "kept"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("before", "after"), FROM_TO)
def test_any_layout_goes_on_from_any_other(tmp_path, before, after) -> None:
    old, new = config_of(before).layout, config_of(after).layout
    results, folder = made(tmp_path, before)
    again = run_ranks(loaded, new.num_ranks, tmp_path / "loaded", after, folder)
    for join in (joined, joined_moments):
        wanted, got = join(old, results), join(new, again)
        assert set(wanted) == set(got)
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor), name
    assert any(tensor.any() for tensor in joined_moments(new, again).values())


def test_every_number_is_written_once(tmp_path) -> None:
    """Weights and their two moments: nothing that several ranks hold is in several of their files."""
    results, folder = made(tmp_path, {"ep": 2, "dp": 2})
    layout = config_of({"ep": 2, "dp": 2}).layout
    biases = {name for name in results[0].held if name.endswith("correction_bias")}
    wanted = sum(tensor.numel() * (1 if name in biases else 3) for name, tensor in joined(layout, results).items())
    files = sorted((folder / "step-00000004").glob("*.distcp"))
    metadata = dcp.FileSystemReader(folder / "step-00000004").read_metadata()
    chunks = [chunk.sizes.numel() for entry in metadata.state_dict_metadata.values() for chunk in entry.chunks]
    assert sum(chunks) == wanted
    assert len(chunks) == len(metadata.storage_data)
    assert sum(stored.length for stored in metadata.storage_data.values()) == sum(path.stat().st_size for path in files)
    assert len(files) == 4
    assert max(path.stat().st_size for path in files) < 1.2 * min(path.stat().st_size for path in files)


def resumed_somewhere(ranks: Ranks, changes: dict, folder: Path) -> str:
    run = spread_run(ranks, config_of({}, num_steps=STEPS, rows_per_step=24, **changes), folder)
    try:
        return f"resumed after {run.resume()}"
    except (RecipeError, CheckpointError) as exc:
        return f"{type(exc).__name__}: {exc}"


def test_only_a_whole_checkpoint_of_the_same_recipe_counts(tmp_path) -> None:
    _, folder = made(tmp_path, {})
    assert [found.record["step"] for found in checkpoints.complete(folder)] == [4, 2]
    record = checkpoints.complete(folder)[0].record
    assert record["position"] == {"epoch": 4, "rows_used": 0}  # 40 rows give one batch of 24 an epoch
    assert [row["step"] for row in record["log"]] == [0, 1, 2, 3]

    def outcome(name: str, **changes) -> str:
        (result,) = run_ranks(resumed_somewhere, 1, tmp_path / name, changes, folder)
        return result

    assert outcome("same") == "resumed after 4"
    assert "checkpoint.json: lr: the run there has 0.01, this one 0.02" in outcome("lr", lr=0.02)
    newest = folder / "step-00000004"
    (data,) = newest.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])  # torn
    assert outcome("torn") == "resumed after 2"
    data.write_bytes(whole)
    metadata = newest / ".metadata"
    metadata.write_bytes(bytes(metadata.stat().st_size))  # of the right size, and not what it was
    assert outcome("damaged").startswith("CheckpointError: ")
    (newest / checkpoints.RECORD).unlink()
    assert outcome("unmarked") == "resumed after 2"
    (folder / "step-00000002").rename(folder / ".step-00000002.part")
    assert outcome("none") == "resumed after 0"


def killed_while_saving(ranks: Ranks, config, folder: Path, place: str) -> None:
    if ranks.rank == 0:
        os.environ[VARIABLE] = place
    spread_run(ranks, config, folder).run(silent())


@pytest.mark.parametrize(("place", "kept"), [("checkpoint.written:2", [2]), ("checkpoint.complete:2", [4, 2])])
def test_a_kill_while_saving_leaves_what_was_complete(tmp_path, place, kept) -> None:
    config = config_of({"ep": 2}, num_steps=STEPS, checkpoint=EVERY)
    run_ranks(killed_while_saving, 2, tmp_path / "killed", config, tmp_path / "kept", place, lost=(0, 1))
    assert [found.record["step"] for found in checkpoints.complete(tmp_path / "kept")] == kept
    run_ranks(trained, 2, tmp_path / "again", config, tmp_path / "kept")
    assert [found.record["step"] for found in checkpoints.complete(tmp_path / "kept")] == [4, 2]
    assert not list((tmp_path / "kept").glob(".step-*"))
