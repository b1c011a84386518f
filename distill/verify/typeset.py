r"""Typesetting taken off: an answer without what changes its looks and not what it says, for mathematics and choice.

Dollars, spacing, sizes, colours, fonts and boxes go; Unicode's signs become LaTeX's; prose ends up in `\text{}`,
whichever of LaTeX's commands it stood in. One pass over the text with a stack of open groups: linear in its length.
"""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass, field

TOKEN = re.compile(r"\\(?:begin|end)\s*\{[A-Za-z]+\*?\}|\\[A-Za-z]+\*?|\\.|[{}$~\n]|[^\\{}$~\n]+|\\", re.DOTALL)
ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{(\w+)\*?\}")

SIGNS = {
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width, as Chinese text sets them
    **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011\u2012\ufe63", "-"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    **dict.fromkeys("\u201c\u201d\u2033\u00ab\u00bb", '"'),
    **dict.fromkeys("\u2018\u2019\u2032", "'"),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("°º˚", r"^\circ "),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    **dict.fromkeys("≤⩽", r"\le "),
    **dict.fromkeys("≥⩾", r"\ge "),
    **dict.fromkeys("≈≃≅", r"\approx "),
    **dict.fromkeys("→⟶", r"\to "),
    **{"，": ", ", "、": ", ", "。": ".", "．": ".", "％": r"\%", "：": ":", "；": ";"},
    **{"×": r"\times ", "✕": r"\times ", "÷": r"\div ", "∕": "/", "⁄": "/", "±": r"\pm ", "∓": r"\mp ", "≠": r"\ne "},
    **{
        "√": r"\sqrt ",
        "∛": r"\sqrt[3] ",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∖": r"\setminus ",
    },
    **{
        "≡": r"\equiv ",
        "∠": r"\angle ",
        "△": r"\triangle ",
        "⊥": r"\perp ",
        "∣": "|",
        "…": r"\ldots ",
        "⋯": r"\ldots ",
    },
    **{"π": r"\pi ", "𝜋": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda "},
    **{
        "μ": r"\mu ",
        "µ": r"\mu ",
        "φ": r"\phi ",
        "ω": r"\omega ",
        "Ω": r"\Omega ",
        "\u2126": r"\Omega ",
        "σ": r"\sigma ",
    },
    **{"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}"},
    **{"½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"},
    **{"⅕": r"\frac{1}{5}", "⅙": r"\frac{1}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}"},
    **{"⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil "},
}
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ", "0123456789+-()nix", strict=True))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n", strict=True))
SCRIPT = re.compile(f"([{''.join(RAISED)}]+)|([{''.join(LOWERED)}]+)")
RAISED_FRACTION = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹]+)[/⁄∕]([₀₁₂₃₄₅₆₇₈₉]+)")
TRAILING = re.compile(r"(?<!\\)\\$")  # `\ ` of which the end was stripped
EMPTY = re.compile(r"(?<=[\d)])\{\s*\}")
BRACED_SIGN = re.compile(r"(?<![}\])\\A-Za-z^_])\{\s*([:,=+<>-])\s*\}")
OTHER_SIGN = re.compile(f"[{re.escape(''.join(SIGNS))}]")
# `22\,333\,444`, `22 333 444`, `22,\!333`: groups of three digits, the same separator between all.
GROUPED = re.compile(
    r"(?<![\d.,^_])(?<!\\frac )(\d{1,3})"
    r"(?P<by>\\[,;: ]|~|[ ]|\{,\}|,\\!\s*|\\!,|\\,\{,\})\d{3}(?:(?P=by)\d{3})*(?![\d])"
)

SPACES = frozenset(
    re.findall(r"\S+", r"\, \; \: \> ~ \quad \qquad \enspace \thinspace \medspace \thickspace \space \hfill")
) | {"\\ "}
DROPPED = frozenset(
    re.findall(
        r"\S+",
        r"""\! \/ \( \) \[ \] \left \right \middle \displaystyle \textstyle \scriptstyle \scriptscriptstyle \limits
    \nolimits
    \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \Biggl \Biggr \bigm \Bigm \mleft \mright
    \tiny \scriptsize \footnotesize \small \normalsize \large \Large \LARGE \huge \Huge \bf \it \rm \sf \tt \sl \cal
    \bfseries \itshape \rmfamily \sffamily \boldmath \strut \mathstrut \nonumber \notag \noindent \centering
    \therefore \mathopen \mathclose \mathord \mathrel \mathbin \negthinspace \protect \relax""",
    )
)
# Their argument stays and they go.
WRAPPERS = frozenset(
    re.findall(
        r"\S+",
        r"""\boldsymbol \bm \pmb \mathbf \mathsf \mathit \mathtt \mathnormal \mathrm \underline \fbox \boxed \framebox
    \ensuremath \smash \mathop \symbf \symrm \bold \uline \uuline \underbar \colorboxed \mathstrut""",
    )
)
TEXTS = frozenset(
    re.findall(
        r"\S+",
        r"""\text \textbf \textit \textrm \textsf \texttt \textnormal \textsc \textsl \textup \textmd \emph \mbox \hbox
    \operatorname \operatorname*""",
    )
)
SKIPPED = frozenset(
    re.findall(r"\S+", r"\color \phantom \hphantom \vphantom \hspace \hspace* \vspace \label \tag \mkern \mskip")
)
SKIPPED_FIRST = frozenset(
    re.findall(r"\S+", r"\textcolor \colorbox \fcolorbox \style \href")
)  # colour, then what is set in it
LAYOUTS = frozenset(
    re.findall(r"\S+", "aligned align alignat gathered gather split equation math displaymath center multline")
)
SAME_AS = {
    **dict.fromkeys((r"\dfrac", r"\tfrac", r"\cfrac", r"\sfrac", r"\nicefrac", r"\xfrac", r"\ifrac"), r"\frac"),
    **dict.fromkeys((r"\leq", r"\leqslant", r"\leqq"), r"\le"),
    **dict.fromkeys((r"\geq", r"\geqslant", r"\geqq"), r"\ge"),
    **dict.fromkeys((r"\degree", r"\degrees", r"\textdegree"), r"^\circ"),
    **dict.fromkeys((r"\dots", r"\cdots", r"\dotsc", r"\dotsb", r"\hdots"), r"\ldots"),
    **dict.fromkeys((r"\varnothing", r"\O"), r"\emptyset"),
    **dict.fromkeys((r"\rightarrow", r"\longrightarrow", r"\Rightarrow", r"\implies"), r"\to"),
    **dict.fromkeys((r"\mid", r"\vert", r"\lvert", r"\rvert"), "|"),
    **dict.fromkeys((r"\backslash", r"\smallsetminus"), r"\setminus"),
    **dict.fromkeys((r"\simeq", r"\thickapprox", r"\doteq"), r"\approx"),
    **dict.fromkeys((r"\dbinom", r"\tbinom"), r"\binom"),
    **{r"\neq": r"\ne", r"\lt": "<", r"\gt": ">", r"\ast": r"\cdot", r"\colon": ":", r"\lor": r"\text{or}"},
    **{r"\land": r"\text{and}", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]"},
    **{r"\lparen": "(", r"\rparen": ")", r"\percent": r"\%", r"\minus": "-", r"\plus": "+"},
    **{
        r"\cr": r"\\",
        r"\pounds": "£",
        r"\euro": "€",
        r"\textdollar": r"\$",
        r"\textasciitilde": " ",
        r"\arsinh": r"\arcsinh",
    },
}
MARKDOWN = re.compile(r"(\*{2,}|_{2,}|`+)(?P<inner>[^*_`].*?)\1", re.DOTALL)
DEGREES = re.compile(r"\^\s*(?:\{\s*(?:\\circ|o|\\text\{o\}|\^\\circ)\s*\}|o(?![A-Za-z])|\\circ\b)")
WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
UNIT_LETTERS = re.compile(r"[mgshlLNJWV](?:[mgshlLNJWV]|[\s/^{}\d-])*")  # `\mathrm{m\,s^{-1}}`
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
LETTER = re.compile(r"[^\W\d_]")


@dataclass
class _Group:
    """A group that is open: what to do with its content when it closes."""

    kind: str = "group"  # group, wrap, text, font, skip
    parts: list[str] = field(default_factory=list)
    over: int | None = None


def plain(text: str) -> str:
    r"""The answer without its typesetting.

    >>> plain("\\textbf{(B)}\\ 15"), plain("$\\dfrac{1}{2}\\,$."), plain("2\u221a3"), plain("\\mathrm{2\\pi}")
    ('\\text{(B)} 15', '\\frac {1}{2}', '2\\sqrt 3', '2\\pi')
    """
    text = TRAILING.sub("", "".join(map(_plain_letter, text)).strip())
    text = SCRIPT.sub(_script, RAISED_FRACTION.sub(_raised_fraction, text))
    text = OTHER_SIGN.sub(lambda sign: SIGNS[sign[0]], text).strip()
    text = GROUPED.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    text = DEGREES.sub(r"^\\circ ", _retype(text))
    text = BRACED_SIGN.sub(r"\1", EMPTY.sub("", text))
    text = re.sub(r"[ \t\r\f\v]+", " ", text).strip()
    while True:
        shorter = _without_outer_braces(text.rstrip(" ,;:"))
        if shorter.endswith(".") and not shorter.endswith(".."):
            shorter = shorter[:-1]
        if (marked := MARKDOWN.fullmatch(shorter)) is not None:
            shorter = marked["inner"]
        if shorter == text:
            return text
        text = shorter.strip()


def _plain_letter(character: str) -> str:
    """Mathematical alphabets (`𝑥`, `𝟓`) are letters and digits in a font."""
    return unicodedata.normalize("NFKC", character) if 0x1D400 <= ord(character) <= 0x1D7FF else character


def _script(match: re.Match[str]) -> str:
    if match[1]:
        return "^{" + "".join(RAISED[sign] for sign in match[1]) + "}"
    return "_{" + "".join(LOWERED[sign] for sign in match[2]) + "}"


def _raised_fraction(match: re.Match[str]) -> str:
    above, below = ("".join((RAISED | LOWERED)[digit] for digit in part) for part in match.groups())
    return f"\\frac{{{above}}}{{{below}}}"


def _retype(text: str) -> str:
    """Write the tokens again, without those that only set."""
    has_matrix = "matrix" in text or "array" in text or "cases" in text
    stack = [_Group("top")]
    awaited: list[str] = []  # kinds of the groups that the last command takes
    for match in TOKEN.finditer(text):
        token = match.group()
        parts = stack[-1].parts
        if token == "{":
            stack.append(_Group(awaited.pop(0) if awaited else "group"))
            continue
        if token.isspace() and awaited:
            continue
        if awaited and token[0] != "\\" and awaited[0] in ("wrap", "font"):
            awaited.clear()  # `\mathbf x`: the next sign is its argument
        if token == "}":
            awaited.clear()
            if len(stack) == 1:
                parts.append("}")
            else:
                closed = stack.pop()
                stack[-1].parts.append(_closed(closed))
        elif (kinds := _awaits(token)) is not None:
            awaited = kinds
        elif (environment := ENVIRONMENT.fullmatch(token)) is not None:
            if environment[1] not in LAYOUTS:
                parts.append(token.replace(" ", ""))
        elif token == "\\over":
            stack[-1].over = len(parts)
        elif token in SPACES or token == "\n":
            parts.append(" ")
        elif token == "$":
            if stack[-1].kind == "text":
                parts.append(token)
        elif token not in DROPPED:
            parts.append(_said(token, has_matrix))
    while len(stack) > 1:  # never closed: not to be mended
        left_open = stack.pop()
        stack[-1].parts.append("{" + _over(left_open))
    return _over(stack[0])


def _awaits(token: str) -> list[str] | None:
    if token in WRAPPERS:
        return ["font" if token == "\\mathrm" else "wrap"]
    if token in TEXTS:
        return ["text"]
    if token in SKIPPED:
        return ["skip"]
    return ["skip", "wrap"] if token in SKIPPED_FIRST else None


def _said(token: str, has_matrix: bool) -> str:
    if token[0] != "\\":
        return token if has_matrix else token.replace("&", " ")
    said = SAME_AS.get(token, token)
    return said + " " if said[-1].isalpha() else said


def _closed(group: _Group) -> str:
    content = _over(group)
    if group.kind == "skip":
        return ""
    if group.kind == "group":
        return "{" + content + "}"
    bare = content.strip()
    if group.kind == "text":
        if _is_mathematics(bare):
            return bare.replace("$", "")
        content = re.sub(r"(?<!\\)\$", "", content)
        inner = re.fullmatch(r"\\text\{([^{}]*)\}", content.strip())
        if inner is not None:
            return content
        if "=" in content or not LETTER.search(re.sub(r"\\[A-Za-z]+", "", content)):
            return content
        return "\\text{" + content.replace("\\text{", "{") + "}"
    # A font's argument is a sign of mathematics, or a word: `\mathrm{km}`.
    if UNIT_LETTERS.fullmatch(bare):
        return "\\text{" + bare + "}"
    if WORDS.search(bare) and not re.search(r"\\(?:text|frac|sqrt|begin|mathbb|mathcal|sin|cos|tan|log|ln)\b", bare):
        return "\\text{" + bare + "}"
    return content if "\\" not in bare or len(bare) < 2 else "{" + content + "}"


def _is_mathematics(text: str) -> bool:
    """Whether `$x$` or `$$x$$` is all that a text holds."""
    inner = text.strip(f"$*{string.whitespace}")
    before, _, after = text.partition(inner) if inner else ("", "", "")
    return "$" in before and "$" in after and "$" not in inner


def _over(group: _Group) -> str:
    if group.over is None:
        return "".join(group.parts)
    above, below = group.parts[: group.over], group.parts[group.over :]
    return "\\frac{" + "".join(above).strip() + "}{" + "".join(below).strip() + "}"


def closes_at(text: str, start: int) -> int | None:
    """Where the brace that opens at `start` is closed."""
    depth = 0
    for match in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def _without_outer_braces(text: str) -> str:
    """In one pass, however many there are."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in BRACE.finditer(text) if text.startswith("{") else ():
        if match.group() == "{":
            opened.append(match.start())
        elif match.group() == "}" and opened:
            closing[opened.pop()] = match.start()
    start, end = 0, len(text)
    while closing.get(start) == end - 1:
        start, end = start + 1, end - 1
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
    return text[start:end]


def words_of(text: str) -> str:
    """What is left of a text for comparing it as words: letters, digits and signs, without case, spaces and commands.

    >>> words_of("\\\\text{June }20"), words_of("(C)")
    ('june20', 'c')
    """
    text = re.sub(r",?\s*(?<![A-Za-z])and(?![A-Za-z])\s*", ",", re.sub(r"\\text\{([^{}]*)\}", r"\1", text))
    text = re.sub(r"^\s*(?:an?|the)\s+(?=\w{3})", "", text, flags=re.IGNORECASE)
    text = re.sub(r"""[\s"'`{}]+""", "", text).casefold().rstrip(".!,;:")
    alone = re.fullmatch(r"[(\[]?([^\W\d_])[)\]]?", text)
    return alone[1] if alone else text
