"""Schedules: every micro-batch is worked on once in an order that can be, and idle time is what the papers say."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from benchmarks.schedules import draw
from benchmarks.schedules.schedules import SCHEDULES, Durations, Schedule, Work, dual_pipe, dual_pipe_v, paper_bound
from benchmarks.schedules.simulate import Timeline, simulate

NAMES = sorted(SCHEDULES)


def made(name: str, depth: int, extra: int = 0) -> Schedule:
    """`depth` is PP: the number of stages."""
    ranks = depth // 2 if name == "dualpipev" else depth
    return SCHEDULES[name](ranks, 2 * depth + 2 * extra)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", range(2, 17, 2))
@pytest.mark.parametrize("overlapped", [2.25, 2.5, 3.0])
def test_bubble_and_activations_are_those_of_the_papers(name: str, depth: int, overlapped: float) -> None:
    """Exactly, where a forward and both halves of a backward take the same time; F&B may gain from overlapping."""
    times = Durations(forward=1.0, backward=2.0, weights=1.0, overlapped=overlapped)
    for extra in (0, 5):
        schedule = made(name, depth, extra)
        timeline, bound = simulate(schedule, times), paper_bound(schedule, times)
        assert timeline.bubble == pytest.approx(bound.bubble)
        assert max(timeline.activations) == bound.activations
        assert schedule.copies == bound.parameters == (2 if name == "dualpipe" else 1)


@pytest.mark.parametrize("depth", [3, 5, 7, 16])
@settings(max_examples=20, deadline=None)
@given(st.floats(0.5, 2.0), st.floats(0.5, 2.0), st.floats(0.2, 1.0))
def test_the_one_way_schedules_are_exact_for_other_durations(
    depth: int, forward: float, inputs: float, share: float
) -> None:
    """1F1B for any, ZB1P as long as weights' gradients fit where they are put: they take no longer than the others."""
    weights = share * min(forward, inputs)
    times = Durations(forward, inputs + weights, weights, forward + inputs + weights)
    for name in ("1f1b", "zb1p"):
        schedule = SCHEDULES[name](depth, 2 * depth)
        assert simulate(schedule, times).bubble == pytest.approx(paper_bound(schedule, times).bubble)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 8), st.integers(0, 6), st.floats(0, 0.5))
def test_every_micro_batch_is_worked_on_once_in_an_order_that_can_be(name, half, extra, transfer) -> None:
    schedule = made(name, 2 * half, extra)
    timeline = simulate(schedule, Durations(1.0, 2.1, 0.9, 2.7), transfer=transfer)
    work = Counter(
        (kind, one.stage, one.microbatch)
        for actions in schedule.actions_by_rank for action in actions for one in action
        for kind in ("IW" if one.kind == "B" else one.kind)
    )  # fmt: skip
    wanted = {(k, s, m) for k in "FIW" for s in range(schedule.num_stages) for m in range(schedule.microbatches)}
    assert set(work) == wanted
    assert set(work.values()) == {1}
    in_time(timeline, transfer)


def in_time(timeline: Timeline, transfer: float) -> None:
    """Nothing begins before what it needs is there, and a rank does one thing at a time."""
    begins, ends, where = {}, {}, {}
    for rank, spans in enumerate(timeline.spans_by_rank):
        for before, after in itertools.pairwise(spans):
            assert before.end <= after.start + 1e-9
        for start, end, action in spans:
            for one in action:
                key = ("F" if one.kind == "F" else "W" if one.kind == "W" else "I", one.stage, one.microbatch)
                begins[key], ends[key], where[key] = start, end, rank
    for (kind, stage, m), start in begins.items():
        needs = {"F": [("F", stage - 1, m)], "I": [("F", stage, m), ("I", stage + 1, m)], "W": [("I", stage, m)]}[kind]
        for need in needs:
            if need in ends:
                late = transfer if where[need] != where[kind, stage, m] else 0.0
                assert start >= ends[need] + late - 1e-9, (kind, stage, m, need)


def test_ranks_of_dualpipev_hold_two_stages_and_of_dualpipe_both_directions() -> None:
    for rank, actions in enumerate(dual_pipe_v(4, 8).actions_by_rank):
        assert {one.stage for action in actions for one in action} == {rank, 7 - rank}
    for rank, actions in enumerate(dual_pipe(4, 8).actions_by_rank):
        stages = {(one.stage, one.microbatch >= 4) for action in actions for one in action}
        assert stages == {(rank, False), (3 - rank, True)}


def test_an_order_that_waits_for_itself_is_an_error() -> None:
    stuck = Schedule("stuck", 2, 1, 1, (((Work("B", 0, 0),), (Work("F", 0, 0),)), ((Work("F", 1, 0),),)))
    with pytest.raises(ValueError, match="stuck: ranks wait for one another"):
        simulate(stuck, Durations())


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "message"),
    [
        ("1f1b", 4, 3, "at least 4 micro-batches"),
        ("dualpipe", 4, 6, "at least 8 micro-batches"),
        ("dualpipe", 3, 8, "must be even"),
        ("dualpipev", 0, 8, "0 ranks"),
    ],
)
def test_schedules_that_do_not_exist_say_why(name, ranks, microbatches, message) -> None:
    with pytest.raises(ValueError, match=message):
        SCHEDULES[name](ranks, microbatches)


def test_durations_must_be_positive() -> None:
    with pytest.raises(ValueError, match="weights less than backward"):
        Durations(weights=2.0)


def test_the_program_draws_every_schedule(tmp_path, capsys) -> None:
    draw.main(["--ranks", "4", "--microbatches", "8", "--out", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == list(SCHEDULES)
    assert "bubble 9 (9)" in said[0]
    for name in SCHEDULES:
        root = ET.parse(tmp_path / f"{name}-4x8.svg").getroot()
        titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
        schedule = SCHEDULES[name](4, 8)
        assert len(titles) == sum(len(action) for actions in schedule.actions_by_rank for action in actions)
        assert f"F, stage {schedule.num_stages - 1}, micro-batch 7" in titles
        width = float(root.get("width"))
        boxes = [box for box in root.iter("{http://www.w3.org/2000/svg}rect") if box.get("x")]
        assert all(float(box.get("x")) + float(box.get("width")) <= width for box in boxes)


@pytest.mark.parametrize("wrong", [["gpipe"], ["--microbatches", "3"], ["--weights", "5"]])
def test_what_the_program_does_not_know_is_refused(wrong, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        draw.main(wrong)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err
