"""Small data sets in the form of public ones, for lm-eval's own task definitions; the questions are made up here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SCIENCE = [
    ("Which of these melts first in the sun?", ["an ice cube", "a stone", "a coin", "a brick"], 0),
    ("What do plants take in through their roots?", ["sound", "water", "light", "music"], 1),
    ("Which organ pumps blood through the body?", ["the liver", "the skin", "the heart", "the lung"], 2),
    ("What pulls a dropped ball to the ground?", ["heat", "wind", "colour", "gravity"], 3),
    ("Which animal lays eggs?", ["a hen", "a cow", "a dog", "a cat"], 0),
    ("What is needed for a fire to burn?", ["helium", "oxygen", "gold", "salt"], 1),
    ("Which of these conducts electricity best?", ["wood", "glass", "copper wire", "rubber"], 2),
    ("What causes day and night?", ["tides", "clouds", "the seasons", "Earth turning on its axis"], 3),
    ("Water that turns into vapour does what?", ["evaporates", "freezes", "melts", "sinks"], 0),
    ("Which planet is closest to the Sun?", ["Mars", "Mercury", "Saturn", "Neptune"], 1),
    ("What gas do people breathe out more of than they breathe in?", ["neon", "argon", "carbon dioxide", "radon"], 2),
    ("What is the hardest of these minerals?", ["talc", "gypsum", "calcite", "diamond"], 3),
    ("Which tool measures temperature?", ["a thermometer", "a ruler", "a balance", "a clock"], 0),
    ("A caterpillar becomes what?", ["a bee", "a butterfly", "a spider", "a worm"], 1),
    ("Which of these is a mammal?", ["a frog", "a trout", "a whale", "a crow"], 2),
    ("What do we call frozen rain that falls in lumps?", ["dew", "fog", "mist", "hail"], 3),
    ("Which part of a plant makes most of its food?", ["the leaves", "the bark", "the roots", "the seeds"], 0),
    ("What does a compass needle point to?", ["the Moon", "magnetic north", "the sea", "the Sun"], 1),
    ("Which force slows a sliding box?", ["gravity", "magnetism", "friction", "buoyancy"], 2),
    ("What is the centre of an atom called?", ["the shell", "the ion", "the cell", "the nucleus"], 3),
    ("Sound cannot travel through what?", ["a vacuum", "air", "water", "steel"], 0),
    ("Which of these is a source of renewable energy?", ["coal", "wind", "oil", "gas"], 1),
    ("What layer of Earth do we live on?", ["the core", "the mantle", "the crust", "the plasma"], 2),
    ("Which sense organ detects light?", ["the ear", "the nose", "the tongue", "the eye"], 3),
    ("What happens to most metals when heated?", ["they expand", "they vanish", "they sing", "they cool"], 0),
    ("How many legs has an insect?", ["four", "six", "eight", "ten"], 1),
    ("Which of these rocks forms from cooled lava?", ["chalk", "marble", "basalt", "sandstone"], 2),
    ("What do bees collect from flowers?", ["sand", "salt", "iron", "nectar"], 3),
    ("The Moon shines because it does what?", ["reflects sunlight", "burns", "glows by itself", "melts"], 0),
    ("Which of these is a liquid at room temperature?", ["iron", "mercury", "helium", "quartz"], 1),
]
SUMS = [
    (f"Tom has {a} apples and gets {b} more. How many apples has he now?", f"He has {a} + {b} = {a + b}.\n#### {a + b}")
    for a, b in [(3, 4), (12, 5), (7, 8), (20, 21), (9, 9), (30, 12), (2, 6), (14, 3), (40, 5), (11, 11)]
]


def write_arc(bench_data: Path, count: int = len(SCIENCE)) -> None:
    """ARC-Challenge as `allenai/ai2_arc` has it."""
    rows = [
        {
            "id": f"made-up-{number}",
            "question": question,
            "choices": {"text": choices, "label": list("ABCD")},
            "answerKey": "ABCD"[right],
        }
        for number, (question, choices, right) in enumerate(SCIENCE)
    ]
    folder = bench_data / "lm_eval" / "allenai" / "ai2_arc" / "ARC-Challenge"
    splits = {"train": rows[-6:], "validation": rows[-6:], "test": rows[:count]}
    _write(folder, splits)


def write_gsm8k(bench_data: Path) -> None:
    """GSM8K as `openai/gsm8k` has it."""
    rows = [{"question": question, "answer": answer} for question, answer in SUMS]
    _write(bench_data / "lm_eval" / "openai" / "gsm8k" / "main", {"train": rows[5:], "test": rows[:5]})


def write_wikitext(bench_data: Path, pages: Iterable[str]) -> None:
    """WikiText-2 as `EleutherAI/wikitext_document_level` has it."""
    rows = [{"page": page} for page in pages]
    folder = bench_data / "lm_eval" / "EleutherAI" / "wikitext_document_level" / "wikitext-2-raw-v1"
    _write(folder, dict.fromkeys(("train", "validation", "test"), rows))


def _write(folder: Path, splits: Mapping[str, list[dict[str, Any]]]) -> None:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
