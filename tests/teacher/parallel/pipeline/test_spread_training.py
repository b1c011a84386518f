"""Training over pipeline stages, spread experts and copies is training in one process."""

from __future__ import annotations

import pytest
import torch

from tests.teacher.parallel.process_ranks import run_ranks
from tests.teacher.parallel.spread_runs import alone, config_of, joined, trained

LAYOUTS = [
    {},
    {"pp": 2, "microbatches": 4},
    {"ep": 2, "microbatches": 2},
    {"dp": 2},
    {"pp": 2, "ep": 2, "microbatches": 2},
    {"pp": 2, "ep": 2, "dp": 2, "microbatches": 2},
    {"pp": 2, "ep": 2, "schedule": "zbv", "microbatches": 4},
    {"pp": 2, "ep": 2, "schedule": "dualpipev", "microbatches": 4},
]


@pytest.fixture(scope="module")
def wanted():
    return alone(config_of())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(f"{k}{v}" for k, v in layout.items()) or "one")
def test_any_layout_learns_what_one_process_does(tmp_path, layout, wanted) -> None:
    config = config_of(layout)
    results = run_ranks(trained, config.layout.num_ranks, tmp_path, config)
    log, weights = wanted
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]  # there was something to learn
    for of_rank in results:
        for row, one in zip(of_rank.log, log, strict=True):
            for key in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
                assert row[key] == pytest.approx(one[key], rel=1e-3, abs=2e-4), (row["step"], key)
    whole = joined(config.layout, results)
    assert set(whole) == set(weights)
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, weights[name], atol=2e-3, rtol=1e-3, msg=name)
