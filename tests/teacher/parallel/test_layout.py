"""Which rank holds what: everything, and nothing twice that should be once."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from distill.errors import RecipeError
from distill.training.row_order import RowOrder
from teacher.model.config import DeepseekV3Config
from teacher.model.names import empty_model
from teacher.parallel.layout import Layout
from teacher.parallel.pipeline.stage import EMBEDDING, own_entries
from tests.teacher.parallel.spread_runs import ARCHITECTURE

MODEL = DeepseekV3Config.model_validate({"vocab_size": 300, **ARCHITECTURE})
sizes = st.integers(1, 6)


@given(sizes, sizes, sizes)
def test_ranks_and_coordinates_are_each_others_inverse(pp, ep, dp) -> None:
    layout = Layout(pp=pp, ep=ep, dp=dp)
    seen = [layout.coordinates(rank) for rank in range(layout.num_ranks)]
    assert [layout.rank(*at) for at in seen] == list(range(layout.num_ranks))
    assert len(set(seen)) == pp * ep * dp
    groups = {(at.pp, at.dp): [rank for rank, other in enumerate(seen) if other[:2] == at[:2]] for at in seen}
    assert all(ranks == list(range(ranks[0], ranks[0] + ep)) for ranks in groups.values())  # neighbours


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipev"])
@pytest.mark.parametrize("pp", [1, 2])
def test_stages_hold_the_model_between_them(schedule, pp) -> None:
    layout, model = Layout(pp=pp, schedule=schedule), empty_model(MODEL)
    held = [own_entries(model, layout, rank) for rank in range(pp)]
    assert set().union(*held) == set(model.state_dict())
    twice = [name for name in model.state_dict() if sum(name in names for names in held) > 1]
    assert twice == ([EMBEDDING] if pp == 2 and schedule == "1f1b" else [])


@pytest.mark.parametrize(
    ("changes", "num_ranks", "message"),
    [
        ({"pp": 2, "dp": 3}, 4, "layout: pp 2 x dp 3 x ep 1 are 6 processes, 4 were started"),
        ({"pp": 5, "microbatches": 5}, 5, "layout.pp: 5 stages (1f1b) are more than 4 layers"),
        ({"ep": 3}, 3, "layout.ep: 8 experts do not divide among 3 ranks"),
        ({"ep": 2, "microbatches": 3}, 2, "layout.microbatches: rows_per_step 16 does not divide among"),
        (
            {"pp": 2, "schedule": "zbv", "microbatches": 2},
            2,
            "layout.schedule: zbv needs a micro-batch a stage, 4, got 2",
        ),
        ({"dispatch": "fp8"}, 1, "layout.dispatch: fp8 goes in tiles of 128, which do not divide hidden_size 16"),
    ],
)
def test_what_does_not_fit_is_said_by_name(changes, num_ranks, message) -> None:
    layout = Layout.model_validate({"dispatch": "fp32"} | changes)
    with pytest.raises(RecipeError) as caught:
        layout.checked(num_ranks=num_ranks, rows_per_step=16, model=MODEL, where="it.yaml")
    assert str(caught.value).startswith(f"it.yaml: {message}")
    assert caught.value.exit_code == 2


def test_a_row_order_gives_every_row_once_an_epoch_from_any_step() -> None:
    order = RowOrder(22, 4, seed=3)
    steps = [order.rows(step).tolist() for step in range(11)]
    for epoch in (steps[:5], steps[5:10]):
        assert len({row for rows in epoch for row in rows}) == 20
    assert steps[0] != steps[5]
    for step in (10, 2, 7, 0):  # backwards too, and by one that has seen nothing
        assert order.rows(step).tolist() == steps[step] == RowOrder(22, 4, seed=3).rows(step).tolist()
    assert order.position(7) == (1, 8)
