"""A schedule's timeline as an SVG, and its numbers beside the papers'.

    python -m benchmarks.schedules.draw [1f1b|zb1p|dualpipe|dualpipev ...] [--ranks 8] [--microbatches 20] [--out DIR]

writes `<schedule>-<ranks>x<microbatches>.svg` for each, and prints one line. Durations are F = 1, B = 2, W = 1 and
F&B = 3 (no gain from overlapping but the hidden communication) unless told otherwise.
"""

from __future__ import annotations

import argparse
import sys
from html import escape
from pathlib import Path

from benchmarks.schedules.schedules import SCHEDULES, Durations, Work, paper_bound
from benchmarks.schedules.simulate import Timeline, simulate

UNIT, ROW, LEFT, TOP = 22.0, 26, 64, 58  # pixels: a unit of time, a rank's row, the margins
COLOURS = {"F": "#f2b84b", "B": "#4f8fd6", "I": "#7fb7ea", "W": "#6fbf73"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, input alone", "W": "backward, weights alone"}
OTHER_DIRECTION = 0.62  # opacity: DualPipe's second direction, the second stage of a rank of DualPipeV


def svg(timeline: Timeline) -> str:
    """One row a rank; numbers are micro-batches. Of an overlapped pair the forward is drawn above the backward. Paler:
    the other direction, or the way back up."""
    schedule = timeline.schedule
    unit = min(UNIT, 30_000 / max(1.0, timeline.makespan))
    width = int(LEFT + timeline.makespan * unit + 16)
    height = TOP + ROW * schedule.num_ranks + 24
    title = (
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_stages} stages, {schedule.microbatches} "
        f"micro-batches; bubble {timeline.bubble:g} of {timeline.makespan:g}, "
        f"at most {max(timeline.activations)} activations"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 720)}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="18" font-size="13">{escape(title)}</text>',
        *_legend(),
    ]
    for rank, spans in enumerate(timeline.spans_by_rank):
        top = TOP + ROW * rank
        parts.append(f'<text x="8" y="{top + 17}">rank {rank}</text>')
        end = LEFT + timeline.makespan * unit
        parts.append(f'<rect x="{LEFT}" y="{top}" width="{end - LEFT:.1f}" height="{ROW - 3}" fill="#eeeeee"/>')
        for start, finish, action in spans:
            share = (ROW - 3) / len(action)
            for place, work in enumerate(action):
                box = LEFT + start * unit, top + place * share, (finish - start) * unit, share
                parts.append(_box(work, _is_other(timeline, rank, work), box))
    parts.append(f'<text x="{LEFT}" y="{height - 8}">0</text>')
    parts.append(f'<text x="{end:.1f}" y="{height - 8}" text-anchor="end">{timeline.makespan:g}</text></svg>')
    return "\n".join(parts) + "\n"


def _legend() -> list[str]:
    parts, x = [], 8
    for kind, colour in COLOURS.items():
        parts.append(f'<rect x="{x}" y="30" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 19}" y="41">{NAMES[kind]}</text>')
        x += 40 + 6 * len(NAMES[kind])
    return parts


def _is_other(timeline: Timeline, rank: int, work: Work) -> bool:
    schedule = timeline.schedule
    if schedule.name == "dualpipe":
        return work.microbatch >= schedule.microbatches // 2
    return work.stage != rank


def _box(work: Work, other: bool, box: tuple[float, float, float, float]) -> str:
    x, y, width, height = box
    opacity = f' fill-opacity="{OTHER_DIRECTION}"' if other else ""
    said = f"{work.kind}, stage {work.stage}, micro-batch {work.microbatch}"
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    style = f'fill="{COLOURS[work.kind]}"{opacity} stroke="white" stroke-width="0.8"'
    drawn = f"<rect {place} {style}><title>{said}</title></rect>"
    if width < 7 * len(str(work.microbatch)):
        return drawn
    size = 11 if height > 15 else 9
    middle = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 0.36 * size:.1f}"'
    return drawn + f'<text {middle} font-size="{size}" text-anchor="middle">{work.microbatch}</text>'


def summary(timeline: Timeline, times: Durations) -> str:
    """Simulated numbers, the papers' in brackets."""
    bound = paper_bound(timeline.schedule, times)
    return (
        f"{timeline.schedule.name:10s} {timeline.schedule.num_ranks} ranks, {timeline.schedule.num_stages} stages: "
        f"makespan {timeline.makespan:g}, bubble {timeline.bubble:g} ({bound.bubble:g}), "
        f"{timeline.bubble / timeline.makespan:.1%} idle, "
        f"activations {max(timeline.activations)} ({bound.activations}), "
        f"parameters {timeline.schedule.copies}x ({bound.parameters}x)"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schedules", nargs="*", metavar="SCHEDULE", help=f"of {', '.join(SCHEDULES)}; all by default")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=20)
    for name, value in Durations().__dict__.items():
        parser.add_argument(f"--{name}", type=float, default=value, metavar="TIME")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR")
    given = parser.parse_args(arguments)
    if unknown := set(given.schedules) - set(SCHEDULES):
        parser.error(f"unknown schedule {min(unknown)!r}; there are {', '.join(SCHEDULES)}")
    try:
        times = Durations(given.forward, given.backward, given.weights, given.overlapped)
        made = [SCHEDULES[name](given.ranks, given.microbatches) for name in given.schedules or SCHEDULES]
    except ValueError as error:
        parser.error(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    for schedule in made:
        timeline = simulate(schedule, times)
        path = given.out / f"{schedule.name}-{given.ranks}x{given.microbatches}.svg"
        path.write_text(svg(timeline), encoding="utf-8")
        sys.stdout.write(f"{summary(timeline, times)}, {path}\n")


if __name__ == "__main__":
    main()
