"""The figures of the report: as PNG on white, and as SVG whose colours follow the page's theme, wide and narrow.

matplotlib knows no CSS. So the SVG is drawn in marker colours that occur nowhere else, and each is replaced by the CSS
variable of the same meaning afterwards; text stays text, in the page's own font. A wide figure shrunk to a telephone
could not be read: it is drawn again for a narrow page, with the same letters.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from distill.printable import printable
from distill.records import ScoreCard
from eval.compare import SuiteComparison
from eval.scored import Model
from eval.training_curves import Curve

# Distinct in hue and in lightness (colour-blind safe); each role has a marker of its own besides.
INK, MUTED, GRID, PAPER = "#1b2430", "#5c6877", "#dfe4ea", "#fefefe"
COLOURS = {"base": "#8a94a3", "direct": "#d9820b", "distilled": "#0a7d8c", "teacher": "#6f42c1"}
MARKERS = {"base": "s", "direct": "^", "distilled": "o", "teacher": "D"}
LABELS = {"base": "base", "direct": "SFT on bare answers", "distilled": "distilled", "teacher": "teacher"}
ROLES = ("base", "direct", "distilled")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "card"} | {c: role for role, c in COLOURS.items()}
_STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollars
}
STYLES = ("-", "--", ":", "-.")  # of lines, where there are more than colours
TITLES = {"distilled": "loss, distilled", "direct": "loss, bare answers"}
WIDE_INCHES, NARROW_INCHES = 8.6, 4.4


@dataclass(frozen=True)
class Figure:
    """One chart of the page: `wide` and `narrow` are inline SVG, the others files of the wide one: PNG and SVG."""

    wide: str
    narrow: str
    pixels: bytes
    vector: str


Draw = Callable[[Any, bool], None]  # draws on a matplotlib figure; True: for a narrow page


def render(
    name: str, draw: Draw, height: float, title: str, about: str, *, narrow_height: float | None = None
) -> Figure:
    """Draw a figure of `height` inches; `title` and `about` are for those who do not see it.

    On a narrow page it is 0.6 inches higher, or `narrow_height` high.
    """
    with _drawn(f"{name} wide", draw, (WIDE_INCHES, height), narrow=False) as figure:
        wide, pixels = _vector(figure), _pixels(figure)
    with _drawn(f"{name} narrow", draw, (NARROW_INCHES, narrow_height or height + 0.6), narrow=True) as figure:
        narrow = _vector(figure)
    return Figure(_apply_theme(wide, title, about), _apply_theme(narrow, title, about), pixels, wide)


def picture(draw: Draw, height: float) -> tuple[bytes, str]:
    """A figure for the files alone, as PNG and as SVG."""
    with _drawn("", draw, (WIDE_INCHES, height), narrow=False) as figure:
        return _pixels(figure), _vector(figure)


@contextmanager
def _drawn(salt: str, draw: Draw, size: tuple[float, float], *, narrow: bool) -> Iterator[Any]:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    # Ids of one page must differ: they are hashes of what they name and of the salt.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Canvas(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, narrow)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not again for every file
        yield figure


def _vector(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _pixels(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return data.getvalue()


def _apply_theme(svg: str, title: str, about: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]+"', "<g", svg)  # names of groups are alike in every figure, and nothing asks for them
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px; font-family: inherit", svg)
    opening = re.match(r"<svg[^>]*>", svg)
    assert opening is not None
    box = re.search(r'viewBox="[^"]+"', opening.group())
    assert box is not None
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box.group()} role="img">'
    )
    return f"{head}<title>{escape(title)}</title><desc>{escape(about)}</desc>{svg[opening.end() :]}"


def accuracy_by_parameters(suite: SuiteComparison) -> Draw:
    """Accuracy against parameters (log), one line a role and architecture, error bars the 95% intervals."""

    def draw(figure: Any, narrow: bool) -> None:
        from matplotlib.ticker import FuncFormatter, NullLocator

        axes = figure.add_subplot()
        sizes: set[int] = set()
        for role in ROLES:
            models = suite.of_role(role)
            architectures = list(dict.fromkeys(model.cards[0].architecture for model in models))
            for order, architecture in enumerate(architectures):
                of = [model for model in models if model.cards[0].architecture == architecture]
                sizes |= _line(axes, of, role, suite.name, first=order == 0)
        _names(axes, suite, sorted(sizes), narrow=narrow)
        for teacher in suite.of_role("teacher"):
            if card := teacher.card(suite.name):
                _teacher_line(axes, card, teacher.name)
        axes.set_xscale("log")
        axes.set_xticks(_labelled_sizes(sorted(sizes)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axes.margins(x=0.12)
        axes.set_ylim(0, 102)
        axes.set_xlabel("parameters (log scale)")
        axes.set_ylabel(f"pass@1 on {suite.name}, %")
        axes.grid(axis="x", visible=False)
        _legend(figure, axes, narrow)

    return draw


def _teacher_line(axes: Any, card: ScoreCard, name: str) -> None:
    colour = COLOURS["teacher"]
    axes.axhline(100 * card.value, color=colour, linestyle=(0, (5, 3)), linewidth=1.6)
    axes.axhspan(*(100 * bound for bound in card.ci95), color=colour, alpha=0.10, linewidth=0)
    axes.text(
        0.0,
        100 * card.value - 1.2,
        f"{name} {100 * card.value:.1f}%",
        color=colour,
        transform=axes.get_yaxis_transform(),
        verticalalignment="top",
    )


def _legend(figure: Any, axes: Any, narrow: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=2 if narrow else 4, handletextpad=0.4)


def _line(axes: Any, models: Sequence[Model], role: str, suite: str, *, first: bool) -> set[int]:
    cards = [card for model in models if (card := model.card(suite))]
    x = [card.num_parameters for card in cards]
    y = [100 * card.value for card in cards]
    errors = [
        [max(0.0, 100 * (card.value - card.ci95[0])) for card in cards],
        [max(0.0, 100 * (card.ci95[1] - card.value)) for card in cards],
    ]
    axes.errorbar(
        x,
        y,
        yerr=errors,
        color=COLOURS[role],
        marker=MARKERS[role],
        markersize=8 if role == "distilled" else 6.5,
        linewidth=2.4 if role == "distilled" else 1.6,
        elinewidth=1.2,
        capsize=3,
        # A second architecture is hollow: of like size as the first, but not a point on its line.
        markerfacecolor=COLOURS[role] if first else PAPER,
        markeredgewidth=1.6,
        label=LABELS[role] if first else None,
        zorder=3 if role == "distilled" else 2,
    )
    return set(x)


def _names(axes: Any, suite: SuiteComparison, sizes: Sequence[int], *, narrow: bool) -> None:
    """Names of the distilled students, towards the middle of the chart: above, of a second architecture below."""
    models = suite.of_role("distilled")
    for model in models:
        card = model.card(suite.name)
        if card is None:
            continue
        first = card.architecture == models[0].cards[0].architecture
        place = 0.5
        if len(sizes) > 1:
            place = math.log(card.num_parameters / sizes[0]) / math.log(sizes[-1] / sizes[0])
        axes.annotate(
            model.student,
            (card.num_parameters, 100 * card.value),
            xytext=(0, 17 if first else -24),
            horizontalalignment="left" if place < 0.25 else "right" if place > 0.75 else "center",
            textcoords="offset points",
            fontsize=8 if narrow else 9,
            color=INK,
        )


def accuracy_by_family(suite: SuiteComparison) -> Draw:
    """One row a family: where the students stand on average as bases, after bare answers, after traces; the teacher."""

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.add_subplot()
        means = {role: family_means(suite, role) for role in (*ROLES, "teacher")}
        families = sorted(suite.families, key=lambda family: means["distilled"].get(family, 0.0))
        for place, family in enumerate(families):
            known = [100 * of[family] for of in means.values() if family in of]
            axes.plot([min(known), max(known)], [place, place], color=GRID, linewidth=3, zorder=1)
        for role, of in means.items():
            points = [(100 * of[family], place) for place, family in enumerate(families) if family in of]
            if points:
                axes.scatter(
                    [x for x, _ in points],
                    [y for _, y in points],
                    s=70 if role == "distilled" else 46,
                    color=COLOURS[role],
                    marker=MARKERS[role],
                    label=LABELS[role],
                    zorder=3,
                )
        axes.set_yticks(range(len(families)), [printable(family).replace("_", " ") for family in families])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlim(-2, 102)
        axes.set_ylim(-0.6, len(families) - 0.4)
        axes.set_xlabel("pass@1, mean over the students, %")
        axes.grid(axis="y", visible=False)
        _legend(figure, axes, narrow)

    return draw


def family_means(suite: SuiteComparison, role: str) -> dict[str, float]:
    """Mean pass@1 of a role's models, a family."""
    means = {}
    for family in suite.families:
        cards = [model.card(f"{suite.name}/{family}") for model in suite.of_role(role)]
        values = [card.value for card in cards if card]
        if values:
            means[family] = sum(values) / len(values)
    return means


def training_curves(curves: Sequence[Curve]) -> Draw:
    """A panel of losses a method, and one of learning rates; a line a student, alike in all of them."""

    def draw(figure: Any, narrow: bool) -> None:
        methods = list(dict.fromkeys(curve.method for curve in curves))
        panels = len(methods) + 1
        students = list(dict.fromkeys(curve.student for curve in curves))
        colours = list(COLOURS.values())
        handles: dict[str, Any] = {}
        for number, method in enumerate([*methods, None], start=1):
            axes = figure.add_subplot(panels, 1, number) if narrow else figure.add_subplot(1, panels, number)
            for curve in curves:
                if method not in (None, curve.method) or (method is None and curve.method != methods[0]):
                    continue
                place = students.index(curve.student)
                (handles[curve.student],) = axes.plot(
                    [step for step, _, _ in curve.steps],
                    [lr if method is None else loss for _, loss, lr in curve.steps],
                    color=colours[place % len(colours)],
                    linestyle=STYLES[place // len(colours) % len(STYLES)],
                    linewidth=1.6,
                )
            axes.set_xlabel("step")
            axes.set_title("learning rate" if method is None else TITLES.get(method, f"loss, {method}"), fontsize=10)
            axes.set_ylim(bottom=0)
            if method is None:
                axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
        columns = (45 if narrow else 95) // (max(map(len, students)) + 8)  # in letters, as many as a line holds
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=max(1, min(4, columns)))

    return draw


def filter_funnel(funnel: Sequence[Mapping[str, Any]]) -> Draw:
    """Horizontal bars: traces that are left after each filter."""

    def draw(figure: Any, _narrow: bool) -> None:
        axes = figure.add_subplot()
        steps = funnel[::-1]
        places = range(len(steps))
        axes.barh(places, [step["in"] for step in steps], color=GRID, height=0.6)
        axes.barh(places, [step["out"] for step in steps], color=COLOURS["distilled"], height=0.6)
        for place, step in zip(places, steps, strict=True):
            text = f"  {step['out']:,} of {step['in']:,}"
            axes.text(step["in"], place, text, verticalalignment="center", fontsize=9)
        axes.set_yticks(places, [step["filter"].replace("_", " ") for step in steps])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.margins(x=0.2)
        axes.set_xlabel("traces kept")
        axes.grid(axis="y", visible=False)

    return draw


def short_count(value: float) -> str:
    """`412k`, `0.41M`, `1.5B`: what a person reads of a parameter count."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"


def _labelled_sizes(sizes: Sequence[int]) -> list[int]:
    """Ticks that do not run into each other on a log axis: at least 15% apart."""
    ticks: list[int] = []
    for size in sizes:
        if not ticks or size >= 1.15 * ticks[-1]:
            ticks.append(size)
    return ticks
