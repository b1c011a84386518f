"""cons@k's ballot: which answers of a question are the same, as far as its majority depends on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

from distill.protocols import Verifier
from distill.verify.audit import second_opinion
from distill.verify.votes import Groups, by_normal_form, same_answers
from eval.answers import Answer

COMPARED = ("math", "choice")  # graders that take any answer for the reference
RIGHT = "right"


def votes(answers: Sequence[Answer], verifier: Verifier) -> list[str | None]:
    """A name for each answer, shared by all answers of its question that are the same; None: it has no vote.

    Right answers are the same as each other: all equal the reference. Wrong ones are held against each other only
    where those that are written alike do not outvote the right ones, and all wrong ones together could. Programs have
    no vote: no two of them are written alike.
    """
    questions: dict[str, list[int]] = defaultdict(list)
    for place, answer in enumerate(answers):
        if answer.problem.grader != "code" and (answer.verdict.extracted or "").strip():
            questions[answer.problem.id].append(place)
    wrong: list[list[int]] = []
    grouped: list[Groups] = []
    pairs = []
    for places in questions.values():
        of_question = [place for place in places if not answers[place].verdict.correct]
        groups = by_normal_form([answers[place].verdict.extracted for place in of_question])
        if _is_open(groups, num_right=len(places) - len(of_question), grader=answers[places[0]].problem.grader):
            in_doubt = (pair for pair in combinations(groups, 2) if second_opinion(*pair) is None)  # not two numbers
            pairs += [(len(wrong), one, other) for one, other in in_doubt]
        wrong.append(of_question)
        grouped.append(groups)
    asked = [(answers[places[0]].problem, groups) for places, groups in zip(questions.values(), grouped, strict=True)]
    names: list[str | None] = [None] * len(answers)
    for places in questions.values():
        for place in places:
            names[place] = RIGHT
    for of_question, groups, joined in zip(wrong, grouped, same_answers(asked, pairs, verifier), strict=True):
        form_of = {spelling: form for form, spellings in groups.items() for spelling in spellings}
        for place in of_question:
            names[place] = f"wrong: {joined[form_of[answers[place].verdict.extracted or '']]}"
    return names


def _is_open(groups: Groups, *, num_right: int, grader: str) -> bool:
    """Could equal answers of other forms still outvote the right ones, or draw with them?"""
    sizes = [len(spellings) for spellings in groups.values()]
    return grader in COMPARED and len(sizes) > 1 and 0 < num_right <= sum(sizes) and max(sizes) <= num_right
