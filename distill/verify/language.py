"""Language consistency: how much of a text is in the language asked for.

DeepSeek-R1 (arXiv 2501.12948, section 2.3.2) rewards "the proportion of target language words in the CoT". Here a word
is counted when it is prose: mathematics, code, addresses, single letters and names of functions are no language's. Its
script decides (a Latin word is not Chinese); among languages of one script, the function words of its sentence do, as
far as the languages of `function_words.yaml` go. A run of Han counts one word for every two characters.

Not an identifier: it says how much of a text may be the language that is named, and gives the benefit of the doubt.
A sentence with few function words, and a language without a list, count by script alone. Kana tell Japanese from
Chinese.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from pathlib import Path

import yaml

SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(re.findall(r"\w+", "cs da de en es fi fr hu id it nb nl pl pt ro sv tr vi"), ("LATIN",)),
    **dict.fromkeys(("bg", "ru", "uk"), ("CYRILLIC",)),
    **dict.fromkeys(("ar", "fa", "ur"), ("ARABIC",)),
    "zh": ("CJK", "BOPOMOFO"),
    "ja": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
    "ko": ("HANGUL",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "th": ("THAI",),
    "bn": ("BENGALI",),
    "ta": ("TAMIL",),
}
LANGUAGES = tuple(sorted(SCRIPTS))  # ISO 639-1

MIN_HITS = 3  # different function words of another language before a sentence is taken for it
MIN_KANA = 2  # in a sentence that is no Chinese
MIN_HAN = 6  # in a sentence without kana that is no Japanese

CODE = re.compile(r"```.*?(?:```|\Z)|\[asy\].*?(?:\[/asy\]|\Z)|`[^`\n]*`|https?://\S+|</?\w{1,20}>", re.DOTALL)
DISPLAY = re.compile(
    r"\$\$.*?(?:\$\$|\Z)|\\\[.*?(?:\\\]|\Z)|\\\(.*?(?:\\\)|\Z)"
    r"|\\begin\{(?:equation|align|gather|multline|array|cases|[bpvBV]?matrix)\*?\}.*?(?:\\end\{\w+\*?\}|\Z)",
    re.DOTALL,
)
INLINE = re.compile(r"\$([^$\n]{1,400})\$")
PROSE = re.compile(r"(?<!\\)\b[^\W\d_]{3,}\s+[^\W\d_]{3,}")
COMMAND = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+|\\.", re.DOTALL)
# Han and kana stand in one run of letters: each is a word of its own script.
HAN, KANA = "\u3005\u3400-\u9fff\uf900-\ufaff", "\u3040-\u30ff"
WORD = re.compile(
    rf"[{HAN}]+|[{KANA}]+|(?![{HAN}{KANA}])[^\W\d_](?:(?![{HAN}{KANA}])[^\W\d_]|[\u0300-\u036f\u0900-\u0d7f'’])*"
)
SENTENCE = re.compile(r"[.!?。！？\n;；]+")
# Names that stand in formulas of every language.
FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp lim max min gcd lcm mod det rank dim "
        "sqrt abs floor ceil sgn deg ker arg inf sup cm mm km kg mph ft",
    )
)


def share_of_language(text: str, language: str) -> float | None:
    """Words of `language` (ISO 639-1, one of LANGUAGES) over all words, in 0..1; None where there are none to count.

    >>> share_of_language("So the answer is 所以答案是 $x = 3$.", "en")
    0.5
    """
    if language not in SCRIPTS:
        raise ValueError(f"{language!r} is none of {', '.join(LANGUAGES)}")
    total = own = 0.0
    for sentence in SENTENCE.split(_prose(text)):
        counted = [(word, weight) for word in WORD.findall(sentence) if (weight := _weight(word))]
        total += sum(weight for _, weight in counted)
        if not _is_of_another(sentence, language):
            own += sum(weight for word, weight in counted if _script(word[0]) in SCRIPTS[language])
    return own / total if total else None


def words_in_other_scripts(text: str, question: str) -> float | None:
    """Words of `text` in scripts that `question` has no word of, over all its words, in 0..1; None without words.

    Han, kana and the two together are one script: a Japanese question may be answered in either.

    >>> words_in_other_scripts("So 所以 the sum is $x = 3$.", "What is the sum?")
    0.2
    """
    allowed = {_script_family(word) for word in WORD.findall(_prose(question)) if _weight(word)}
    counted = [(word, weight) for word in WORD.findall(_prose(text)) if (weight := _weight(word))]
    total = sum(weight for _, weight in counted)
    if not allowed or not total:
        return None
    return sum(weight for word, weight in counted if _script_family(word) not in allowed) / total


def _script_family(word: str) -> str:
    script = _script(word[0])
    return "CJK" if script in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else script


def _prose(text: str) -> str:
    """The text without code and mathematics."""
    text = DISPLAY.sub(" ", CODE.sub(" ", text))
    # `costs $5 and the other $3`: what stands between two prices is prose.
    text = INLINE.sub(lambda match: match[0] if PROSE.search(COMMAND.sub(" ", match[1])) else " ", text)
    return COMMAND.sub(" ", text)


def _weight(word: str) -> float:
    """Count the words that a run of letters stands for: none where it is a symbol or a name of a formula."""
    script = _script(word[0])
    if script in ("CJK", "HIRAGANA", "KATAKANA", "THAI"):
        return max(1.0, len(word) / 2)
    if len(word) == 1 or word in FUNCTIONS or (script in ("LATIN", "GREEK") and word.isupper() and len(word) <= 4):
        return 0.0
    return 1.0


def _is_of_another(sentence: str, language: str) -> bool:
    """Tell whether the sentence's kana or function words are clearly those of another language of the same script."""
    if language in ("zh", "ja"):
        scripts = [_script(character) for character in sentence]
        kana = sum(script in ("HIRAGANA", "KATAKANA") for script in scripts)
        return kana >= MIN_KANA if language == "zh" else not kana and scripts.count("CJK") >= MIN_HAN
    listed = _function_words()
    if language not in listed:
        return False
    words = {word.casefold() for word in WORD.findall(sentence)}
    own = len(words & listed[language])
    return any(
        len(words & theirs) >= max(MIN_HITS, own + 2)
        for other, theirs in listed.items()
        if other != language and SCRIPTS[other] == SCRIPTS[language]
    )


@lru_cache(maxsize=1)
def _function_words() -> dict[str, frozenset[str]]:
    text = Path(__file__).with_name("function_words.yaml").read_text(encoding="utf-8")
    return {language: frozenset(words.split()) for language, words in yaml.safe_load(text).items()}


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    """The script's name as Unicode's character names begin: LATIN, CJK, CYRILLIC."""
    return unicodedata.name(character, "").split(" ", 1)[0]
