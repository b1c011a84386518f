"""Language consistency: prose is counted, mathematics and code are not, a mixture shows its share."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from distill.verify.language import LANGUAGES, SCRIPTS, share_of_language

TEXTS = {
    "en": "First we have to find the number of apples that are left. Then we divide them by two and get the answer.",
    "de": "Zuerst müssen wir die Zahl der Äpfel finden, die noch übrig sind. Dann teilen wir sie durch zwei.",
    "fr": "D'abord nous devons trouver le nombre de pommes qui sont dans la boîte. Ensuite on les divise par deux.",
    "es": "Primero hay que encontrar el número de manzanas que están en la caja. Entonces se divide por dos y ya.",
    "it": "Prima dobbiamo trovare il numero di mele che sono nella scatola. Poi si divide per due e questo è tutto.",
    "zh": "首先我们需要计算剩下的苹果数量。然后把它们平均分成两份,得到答案。",
    "ja": "まず、残っているりんごの数を計算する必要があります。それから二つに分けて答えを得ます。",
    "ko": "먼저 남은 사과의 수를 계산해야 합니다. 그런 다음 둘로 나누어 답을 얻습니다.",
    "ru": "Сначала мы должны найти число яблок, которые остались в коробке. Потом делим его на два и это ответ.",
    "uk": "Спочатку ми маємо знайти число яблук, які є в коробці. Потім ділимо його на два, і це є відповідь.",
    "ar": "أولا يجب أن نجد عدد التفاح المتبقي ثم نقسمه على اثنين.",
    "el": "Πρώτα πρέπει να βρούμε τον αριθμό των μήλων που μένουν.",
    "he": "קודם עלינו למצוא את מספר התפוחים שנותרו.",
    "hi": "पहले हमें बचे हुए सेबों की संख्या ज्ञात करनी होगी।",
}


@pytest.mark.parametrize("written", TEXTS)
@pytest.mark.parametrize("asked", TEXTS)
def test_a_text_is_its_own_language_and_no_other(written: str, asked: str) -> None:
    share = share_of_language(TEXTS[written], asked)
    assert share is not None
    if written == asked:
        assert share == 1.0
    elif SCRIPTS[written] == SCRIPTS[asked] or {written, asked} == {"zh", "ja"}:
        assert share <= 0.6  # some sentence may have too few function words
    else:
        assert share == 0.0


def test_a_mixture_shows_its_share() -> None:
    english = "we know that the sum is even "
    for rounds in range(1, 10):
        text = english * rounds + "所以答案是偶数其实"  # seven words; nine characters, four words and a half
        share = share_of_language(text, "en")
        assert share == pytest.approx(7 * rounds / (7 * rounds + 4.5))


@pytest.mark.parametrize(
    "left_out",
    [
        "$x = \\text{die Zahl}$",
        "\\[ \\sum_{n=1}^\\infty a_n \\]",
        "\\(所以\\)",
        "$$所以$$",
        "\\begin{align*} a &= b \\\\ &= c \\end{align*}",
        "```python\nfür = wenn(x)\n```",
        "`所以`",
        '[asy] draw(A--B); label("所以"); [/asy]',
        "https://пример.example/страница",
        "<think>",
        "3 + 4 = 7, x, y, n, ABC, \\frac{1}{2}",
        "sin log gcd",
        "π α θ",
    ],
)
def test_mathematics_and_code_are_no_language(left_out: str) -> None:
    assert share_of_language(left_out, "en") is None
    for language in ("en", "zh"):
        assert share_of_language(f"{TEXTS[language]} {left_out} {TEXTS[language]}", language) == 1.0


def test_prices_are_no_mathematics() -> None:
    assert share_of_language("It costs $5 und der Preis ist nicht mit dabei $3.", "zh") == 0.0


def test_nothing_to_count_and_unknown_languages() -> None:
    for text in ("", "   ", "1 + 1 = 2", "\\boxed{5}", "\ud800"):
        assert share_of_language(text, "en") is None
    with pytest.raises(ValueError, match="'xx' is none of"):
        share_of_language("a", "xx")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200), st.sampled_from(LANGUAGES))
def test_a_share_is_a_share(text: str, language: str) -> None:
    share = share_of_language(text, language)
    assert share is None or 0 <= share <= 1


def test_hostile_texts_take_linear_time() -> None:
    started = time.process_time()
    for piece in ("$", "$$", "\\[", "```", "`", "[asy]", "\\begin{align}", "\\text{", "<a", "the ", "的", "a'"):
        share_of_language(piece * (200_000 // len(piece)), "en")
    assert time.process_time() - started < 30  # three seconds


def test_gold_solutions_are_english() -> None:
    if not (folder := os.environ.get("POTSTILL_BENCH_DATA")):
        pytest.skip("POTSTILL_BENCH_DATA is not set")
    shares = []
    for name, field in (
        ("gsm8k_test.jsonl", "answer"),
        ("math500.jsonl", "solution"),
        ("aime24.json", "reference_solution"),
    ):
        rows = [json.loads(line)[field] for line in (Path(folder) / name).read_text().splitlines() if line]
        shares += [share for row in rows if (share := share_of_language(row, "en")) is not None]
    assert len(shares) > 1_800
    assert sum(share >= 0.95 for share in shares) / len(shares) > 0.995
    assert min(shares) > 0.7
