r"""Structure: a plainly set text to a `Value`. Lists, chains of relations, brackets, sets, intervals, matrices, terms.

Strict: what is not understood to its last sign raises UnreadableError, so that nothing is read out of `7?8`, `7 \to 8`
or `8 \cancel{7}`. A chain that is not true (`4 = 5`) is unreadable as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from distill.verify.mathematics import expressions
from distill.verify.mathematics.chains import read_chain, relations
from distill.verify.mathematics.keyboard import to_latex
from distill.verify.mathematics.numerals import GROUPED, read_numeral
from distill.verify.mathematics.regions import combine_regions, complement, is_region, region_of
from distill.verify.mathematics.sameness import same_terms
from distill.verify.mathematics.splitting import AND, OR, connect, split, whole
from distill.verify.mathematics.units import measured
from distill.verify.mathematics.values import (
    Applied,
    Based,
    Collection,
    Described,
    Domain,
    Equation,
    Grid,
    Inequality,
    Named,
    Ratio,
    Region,
    Residue,
    Row,
    System,
    Term,
    UnreadableError,
    Value,
    Words,
)
from distill.verify.mathematics.words import as_words
from distill.verify.typeset import closes_at, plain

MAX_DEPTH = 40
MAX_CHARS = 4_000  # of what is read; a longer text can only be the reference itself
MATRIX = re.compile(
    r"[(\[]?\s*\\begin\{(?P<kind>[pbBvV]?matrix|smallmatrix|array)\}\s*(?:\{[lcr|\s]*\})?(?P<body>.*)\\end\{(?P=kind)\}\s*[)\]]?",
    re.DOTALL,
)
BASED = re.compile(
    r"[({]*(?:\\text\{\s*)?(?P<digits>[0-9A-Z]*[0-9][0-9A-Z]*)\s*\}?[)}]*\s*(?:_\s*[{(\s]*(?:\\text\{\s*(?:base)?\s*)?[})\s]*"
    r"|\\text\{\s*\(?\s*(?:in\s+)?base\s*)(?P<base>\d+|[a-z]+)[\s})]*"
)
BASES = {
    name: str(number)
    for number, name in enumerate(
        re.findall(
            r"\S+", "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
        ),
        start=2,
    )
}
MODULO = re.compile(
    r"(?P<left>.*?)\s*(?:\\pmod\s*(?:\{(?P<a>[^{}]+)\}|(?P<c>\d+))|\(?\s*(?:\\bmod|\\mod|\\text\{\s*\(?mod\s*\}|(?<![A-Za-z])mod)\s*\{?(?P<b>[^(){}]+)\}?\s*(?:\)|\\text\{\)\})?)"
)
DOMAIN = re.compile(r"\\mathbb\s*\{?\s*([A-Z])\s*\}?|\\text\{\s*all (real numbers|reals|integers)\s*\}")
APPLIED = re.compile(
    r"(?P<head>\\mathcal\s*\{[A-Z]\}|\\operatorname\{[A-Za-z]+\}|\\text\{[A-Za-z]+\}|[A-Z])\s*\((?P<inner>.*)\)",
    re.DOTALL,
)
INTERVALS = re.compile(r"\\(?:cup|cap|setminus)")
TIME = re.compile(r"\d+(?::\d+)+")
LABEL = re.compile(r"\\text\{[^{}]*(?::|\bis)\s*\}\s*:?\s*(?=.)")
SENTENCE = re.compile(r"^\\text\{[^{}]*(?::|\bis)\s+([^{}A-Za-z]+)\}$")
LESS = re.compile(r"(\\mathbb\s*\{R\}\s*)-\s*(?=\\\{)")
COUNTED = re.compile(r"^\\text\{\s*([-+]?\d[\d.,:]*)\s*([^{}\d=]+)\}$")  # `\text{12 apples}`
TO = re.compile(r"(?<=\d)\s*(?:\\text\{\s*to\s*\}|(?<![A-Za-z])to(?![A-Za-z]))\s*(?=\d)")
PLUS_MINUS = re.compile(r"\\(?:pm|mp)\b")
ELLIPSIS = Described("...")


def prepare(text: str) -> str:
    """Plainly set LaTeX of an answer as it was written; a text that is too long to be read, unchanged."""
    if len(text) > MAX_CHARS:
        return text
    prepared = SENTENCE.sub(r"\1", to_latex(plain(text)).strip())
    prepared = TO.sub(":", COUNTED.sub(r"\1 \\text{\2}", prepared))
    prepared = LESS.sub(r"\1\\setminus ", prepared)
    return prepared if (label := LABEL.match(prepared)) is None else prepared[label.end() :]


def read(text: str, question: str = "") -> Value:
    """Read a prepared text. Raises UnreadableError, also for terms that no parser of ours takes."""
    if len(text) > MAX_CHARS:
        raise UnreadableError("too long")
    try:
        return _read(text, partial(read_term, question=question), 0)
    except (expressions.UnreadableTermError, RecursionError, ZeroDivisionError) as exc:
        raise UnreadableError(str(exc)[:80]) from exc


def read_term(text: str, question: str = "") -> Term:
    found = measured(text.strip(), question)
    latex = found.value
    numeral = read_numeral(latex)
    if numeral is None:
        expressions.parse(latex)
    return Term(latex, numeral, found.factor, found.unit, found.percent)


Reader = Callable[[str], Term]


def _read(text: str, term: Reader, depth: int) -> Value:
    if depth > MAX_DEPTH:
        raise UnreadableError("nested too deeply")
    text = connect(_bare(text))
    if (special := _domain(text) or _based(text)) is not None:
        return special
    if (word := as_words(text)) is not None and not _is_measured(text, term):
        return Words(word)
    if GROUPED.fullmatch(text.lstrip("-+ ")) or (text.count(",") and _is_measured(text, term)):
        return term(text)
    parts, links = split(text, ",;" + AND + OR)
    parts = _unconditional(parts)
    if len(parts) > 1:
        return _combined([_read_one(part, term, depth + 1) for part in parts], links)
    return _read_one(parts[0], term, depth)


def _bare(text: str) -> str:
    text = text.strip().rstrip(",;").strip()
    while text.startswith("{") and closes_at(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    if not text:
        raise UnreadableError("nothing")
    return text


def _is_measured(text: str, term: Reader) -> bool:
    """Tell whether it is a number with a unit, or with a currency before it."""
    if TIME.fullmatch(measured(text).value):
        return True
    try:
        return term(text).numeral is not None
    except (expressions.UnreadableTermError, UnreadableError):
        return False


def _unconditional(parts: Sequence[str]) -> list[str]:
    """Without `k \\in \\mathbb{Z}` and the like, which say what a letter of another part is."""
    kept = [part for part in parts if not re.fullmatch(r"\s*[a-z]\s*\\in\s*\\mathbb\s*\{[ZN]\}.*", part)]
    return kept if kept and len(kept) < len(parts) else list(parts)


def _read_one(text: str, term: Reader, depth: int) -> Value:
    text = _bare(text)
    recur = partial(_read, term=term, depth=depth + 1)
    if (special := _domain(text) or _based(text)) is not None:
        return special
    if (word := as_words(text)) is not None and not _is_measured(text, term):
        return Words(word)
    if (modulo := MODULO.fullmatch(text)) is not None:
        return _residue(modulo, term)
    sides, signs = relations(text)
    if signs:
        return read_chain(sides, signs, term, recur)
    if text == "\\ldots":
        return ELLIPSIS
    if (grid := _matrix(text, term)) is not None:
        return grid
    if INTERVALS.search(text):
        operands, operators = split(text, ("\\cup", "\\cap", "\\setminus"))
        if operators:
            return _set_operations([recur(operand) for operand in operands], operators)
    if (brackets := whole(text)) is not None:
        return _bracketed(*brackets, term=term, recur=recur)
    if (applied := APPLIED.fullmatch(text)) is not None and len(split(applied["inner"], ",")[0]) > 1:
        return Applied(
            re.sub(r"\s", "", applied["head"]), tuple(recur(item) for item in split(applied["inner"], ",")[0])
        )
    if ":" in text:
        return _ratio(text, term)
    if PLUS_MINUS.search(text):
        return _both_signs(text, recur)
    return term(text)


def _bracketed(opening: str, inner: str, closing: str, *, term: Reader, recur: Callable[[str], Value]) -> Value:
    if opening == "\\{":
        described, bar = split(inner, (":", "|"))
        if bar:
            return _described(described, inner, recur)
        if not inner.strip():
            return Region(())
        items, _ = split(connect(inner), ",;" + AND)
        values = [recur(item) for item in items]
        return Collection(tuple(_flat(values)), braced=True)
    items, _ = split(inner, ",;")
    if len(items) > 1:
        return Row(tuple(recur(item) for item in items), opening, closing)
    if (opening, closing) == ("(", ")"):
        return recur(inner)
    if (opening, closing) == ("[", "]"):
        return term(f"({inner})")
    raise UnreadableError(opening)


def _described(parts: Sequence[str], inner: str, recur: Callable[[str], Value]) -> Value:
    """`\\{x : 0 < x < 4\\}` is a region; another description is equal to itself alone."""
    if len(parts) == 2:
        try:
            value = recur(parts[1])
        except (UnreadableError, expressions.UnreadableTermError):
            value = None
        if isinstance(value, Named) and is_region(value.value) and value.name in parts[0]:
            return value.value
    return Described(re.sub(r"\s", "", inner.replace("|", ":")))


def _set_operations(operands: Sequence[Value], operators: Sequence[str]) -> Value:
    if all(isinstance(operand, Collection) and operand.braced for operand in operands) and set(operators) == {"\\cup"}:
        items = [item for operand in operands if isinstance(operand, Collection) for item in operand.items]
        return Collection(tuple(items), braced=True)
    result = region_of(operands[0])
    for operator, operand in zip(operators, operands[1:], strict=True):
        right = region_of(operand)
        if operator == "\\cup":
            result = combine_regions(result, right, union=True)
        else:
            result = combine_regions(result, right if operator == "\\cap" else complement(right), union=False)
    return result


def _residue(modulo: re.Match[str], term: Reader) -> Value:
    sides, signs = relations(modulo["left"].strip())
    if set(signs) - {"\\equiv", "="}:
        raise UnreadableError("a relation of residues")
    value = Residue(term(sides[-1]), term(modulo["a"] or modulo["b"] or modulo["c"]))
    return Named(sides[0].strip(), value) if signs else value


def _domain(text: str) -> Value | None:
    if text in ("\\emptyset", "\\{\\}"):
        return Region(())
    found = DOMAIN.fullmatch(text)
    if found is None:
        return None
    letter = found[1] or ("Z" if found[2] == "integers" else "R")
    return complement(Region(())) if letter == "R" else Domain(letter)


def _based(text: str) -> Value | None:
    found = BASED.fullmatch(text)
    if found is None:
        return None
    base = found["base"]
    if not base.isdigit() and base not in BASES:
        return None
    return Based(found["digits"].lstrip("0") or "0", BASES.get(base, base))


def _matrix(text: str, term: Reader) -> Value | None:
    factor, place = "", text.find("\\begin{")
    if place > 0 and text[:place].rstrip(" ([") and text.endswith("}"):
        factor, text = text[:place].strip().removesuffix("\\cdot").strip(), text[place:]
    found = MATRIX.fullmatch(text)
    if found is None:
        return None
    lines = [line for line in re.split(r"\\\\(?:\[[^\]]*\])?", found["body"].replace("\\hline", "")) if line.strip()]
    rows = tuple(tuple(_entry(cell, factor, term) for cell in line.split("&")) for line in lines)
    if not rows or len({len(row) for row in rows}) > 1:
        raise UnreadableError("rows of different lengths")
    return Grid(rows, found["kind"] in ("vmatrix", "Vmatrix"))


def _entry(cell: str, factor: str, term: Reader) -> Term:
    return term(f"{factor}({cell.strip()})" if factor else cell.strip())


def _ratio(text: str, term: Reader) -> Value:
    found = measured(text)
    parts, _ = split(found.value, ":")
    if not all(part.strip() for part in parts):
        raise UnreadableError("a colon")
    return Ratio(tuple(term(part) for part in parts), found.unit)


def _both_signs(text: str, recur: Callable[[str], Value]) -> Value:
    above = recur(text.replace("\\pm", "+").replace("\\mp", "-").lstrip("+ "))
    below = recur(text.replace("\\pm", "-").replace("\\mp", "+"))
    return Collection((above, below))


def _flat(values: Sequence[Value]) -> list[Value]:
    """Items of lists within a list (`2, \\pm 3`) beside the others."""
    flat: list[Value] = []
    for value in values:
        flat += value.items if isinstance(value, Collection) and not value.braced else [value]
    return flat


def _combined(values: list[Value], links: Sequence[str]) -> Value:
    values = _flat(values)
    if ELLIPSIS in values:  # a sequence: its order is what it says
        return Row(tuple(values), "...", "...")
    regions = [value.value if isinstance(value, Named) else value for value in values]
    if all(is_region(region) for region in regions):
        return _one_region(values, links)
    named = [value for value in values if isinstance(value, Named)]
    if named and len(named) == len(values):
        if len({one.name for one in named}) == 1:
            return Named(named[0].name, Collection(tuple(_flat([one.value for one in named]))))
        return System(tuple(named))
    if len(named) == 1 and values[0] is named[0]:  # `n = 3, 5, 8`
        return Named(named[0].name, Collection(tuple(_flat([named[0].value, *values[1:]]))))
    terms = [value for value in values if isinstance(value, Term)]
    if set(links) == {OR} and len(terms) == len(values) and all(same_terms(terms[0], other) for other in terms):
        return terms[0]  # one value in two forms
    if any(isinstance(value, (Equation, Inequality)) for value in values) and OR in links:
        raise UnreadableError("alternatives of equations")
    return Collection(tuple(values))


def _one_region(values: Sequence[Value], links: Sequence[str]) -> Value:
    names = {value.name for value in values if isinstance(value, Named)}
    if len(names) > 1:
        raise UnreadableError("regions of several names")
    regions = [region_of(value.value if isinstance(value, Named) else value) for value in values]
    result = regions[0]
    for link, region in zip(links, regions[1:], strict=True):
        both = combine_regions(result, region, union=False)
        # A comma means whichever of the two leaves anything.
        joined = link == OR or (link != AND and (not both.pieces or not names))
        result = combine_regions(result, region, union=True) if joined else both
    return Named(names.pop(), result) if names else result
