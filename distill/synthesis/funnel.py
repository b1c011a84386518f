"""The funnel of written questions: what each filter lets through, in the form of curation's."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from distill.curate.shown import COMPLETION_CHARACTERS, NUM_EXAMPLES, QUESTION_CHARACTERS, cut
from distill.recipe import Mode
from distill.records import Record

# In the order in which they run.
FILTERS = ("readable", "numbers_varied", "decontaminate", "deduplicate", "agreement", "same_answer", "count")
SHOWN_REASONS = 3


class DroppedQuestion(Record):
    """A question that is not kept. `key` is the sample's, `text` the question, or all that was written."""

    key: str
    seed_id: str
    mode: Mode
    filter: str
    detail: str
    text: str


class QuestionFunnel:
    """Counts every question once: `ask` for it, then `drop` or `keep` it."""

    def __init__(self) -> None:
        self.num_kept = 0
        self._asked, self._kept, self._dropped = Counter[Mode](), Counter[Mode](), Counter[str]()
        self._unreadable = Counter[str]()
        self._examples: dict[str, list[dict[str, str]]] = defaultdict(list)

    def ask(self, mode: Mode) -> None:
        self._asked[mode] += 1

    def keep(self, mode: Mode) -> None:
        self._kept[mode] += 1
        self.num_kept += 1

    def drop(self, one: DroppedQuestion, seed: str) -> None:
        self._dropped[one.filter] += 1
        if one.filter == "readable":
            self._unreadable[one.detail] += 1
        if len(self._examples[one.filter]) < NUM_EXAMPLES:
            texts = {"question": cut(seed, QUESTION_CHARACTERS), "completion": cut(one.text, COMPLETION_CHARACTERS)}
            self._examples[one.filter].append({"key": one.key, "detail": f"{one.mode}: {one.detail}", **texts})

    def steps(self) -> list[dict[str, Any]]:
        """`[{"filter", "in", "out"}]`; of what cannot be read also the reasons, by number."""
        found: list[dict[str, Any]] = []
        left = self._asked.total()
        for name in FILTERS:
            found.append({"filter": name, "in": left, "out": (left := left - self._dropped[name])})
        found[0]["reasons"] = dict(self._unreadable.most_common())
        return found

    def with_examples(self) -> list[dict[str, Any]]:
        return [{**step, "examples": self._examples.get(step["filter"], [])} for step in self.steps()]

    def counts(self) -> dict[str, Any]:
        modes = {mode: {"asked": asked, "kept": self._kept[mode]} for mode, asked in sorted(self._asked.items())}
        return {"asked": self._asked.total(), "kept": self.num_kept, "modes": modes, "funnel": self.steps()}

    def why(self) -> str:
        """What became of the questions, the most frequent first, in one line."""
        lost = Counter({name: count for name, count in self._dropped.items() if name != "readable"})
        lost.update(self._unreadable)
        parts = [f"{count} went with {name!r}" for name, count in lost.most_common(SHOWN_REASONS)]
        return f"of {self._asked.total()} asked for " + (", ".join(parts) or "none came")
