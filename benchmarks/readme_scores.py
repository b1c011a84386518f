"""Tables of scores: what the bundled and the real models learned, from the summaries of whole runs."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.readme_form import BENCHMARK_SETS, NotMeasuredError, Read, Row, table

ROLES = {"base": "base", "direct": "control: SFT on final answers only", "distilled": "distilled"}


def pico_seconds(read: Read) -> str:
    summary = read("pico-summary")
    stages = ", ".join(f"{stage['name']} {stage['seconds']:.0f} s" for stage in summary["stages"])
    total = minutes(sum(stage["seconds"] for stage in summary["stages"]))
    return f"After set-up, on {summary['num_cores']} cores of `{summary['device']}`, the stages take {total}: {stages}."


def pico_scores(read: Read) -> str:
    models = read("pico-summary")["models"]
    cards: dict[str, dict[str, Row]] = {}
    teacher = next(card for card in models if card["role"] == "teacher")
    for card in models:
        if card["role"] != "teacher":
            cards.setdefault(card["name"].removesuffix(f"-{card['role']}"), {})[card["role"]] = card
    rows = [
        [
            student,
            f"{of['base']['num_parameters']:,}",
            points(of["base"]),
            points(of["direct"]),
            f"**{points(of['distilled'])}**",
        ]
        for student, of in sorted(cards.items(), key=lambda item: (item[1]["base"]["num_parameters"], item[0]))
    ]
    sizes = f"{_millions(teacher['num_parameters'])} parameters, {_millions(teacher['num_active_parameters'])} active"
    per_question = teacher["num_samples"] // teacher["num_questions"]
    return (
        f"pass@1 (%) on {teacher['num_questions']} held-out problems, {per_question} samples each; ± is the standard "
        f"error clustered by question.\nThe teacher ({sizes}) scores {points(teacher)}.\n\n"
        + table(["student", "parameters", *ROLES.values()], rows)
    )


def small_scores(read: Read) -> str:
    """Real models, base against distilled and control, on every suite; nothing before there is a run to tell of."""
    try:
        summary = read("small/summary")
    except NotMeasuredError:
        return ""
    stages = ", ".join(f"{stage['name']} {stage['seconds']:,.0f} s" for stage in summary["stages"])
    opening = (
        f"Real models through the whole chain on one machine ({summary['device']}): the stages take "
        f"{minutes(summary['seconds'])} ({stages}).\n"
        "pass@1 (%) with its 95% interval, clustered by question; the gain over the base is paired over questions."
    )
    return "\n\n".join([opening, *(_suite_scores(suite, summary["students"]) for suite in summary["suites"])])


def _suite_scores(suite: Row, students: Sequence[Row]) -> str:
    of_student: dict[str, dict[str, Row]] = {}
    teacher = next((model for model in suite["models"] if model["role"] == "teacher"), None)
    for model in suite["models"]:
        if model["role"] != "teacher":
            of_student.setdefault(model["student"], {})[model["role"]] = model
    name = BENCHMARK_SETS.get(suite["name"], suite["name"])
    asked = f"{name}, {suite['num_questions']:,} questions, {suite['samples_per_question']} samples each"
    rows = []
    for student in students:
        if student["name"] in of_student:
            of = of_student[student["name"]]
            scores = [_with_interval(of[role]["scores"]["pass@1"]) if role in of else "" for role in ROLES]
            scores[-1] = f"**{scores[-1]}**" if scores[-1] else ""
            gained = student["gained"].get(suite["name"], {}).get("base")
            rows.append([student["name"], f"{student['num_parameters']:,}", *scores, _in_points(gained)])
    head = ["student", "parameters", *ROLES.values(), "gain over base"]
    scored = "" if teacher is None else f"; the teacher scores {_with_interval(teacher['scores']['pass@1'])}"
    return f"{asked}{scored}.\n\n{table(head, rows)}\n\n{suite['size_verdict']}"


def _with_interval(score: Row) -> str:
    low, high = (100 * bound for bound in score["ci95"])
    return f"{100 * score['value']:.1f} ({low:.1f} to {high:.1f})"


def _in_points(difference: Row | None) -> str:
    if difference is None:
        return ""
    low, high = (100 * bound for bound in difference["ci95"])
    return f"{100 * difference['value']:+.1f} ({low:+.1f} to {high:+.1f})"


def minutes(seconds: float) -> str:
    return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60} s"


def points(card: Row) -> str:
    """pass@1 and its standard error in percent."""
    return f"{100 * card['value']:.1f} ± {100 * card['stderr']:.1f}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M"
