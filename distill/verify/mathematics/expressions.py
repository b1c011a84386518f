r"""Terms: one expression of LaTeX to sympy, and whether two have one value.

latex2sympy (math-verify's own parser) reads a term strictly: what it does not know is not skipped, as it is by
math-verify's search for something to parse. Text never reaches `sympify` or `parse_expr`, which would run it.

Values are compared with as many digits as it takes, relative to their size: 2^{-100} is not 2^{-101}, 10^{20} is not
10^{20}+1. Terms with variables are compared at points on both sides of zero; where those cannot tell, `simplify` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from distill.verify.mathematics.numerals import Numeral, stands_for

COMMANDS = frozenset(
    re.findall(
        r"\S+",
        r"""frac sqrt cdot times div pi infty binom log ln lg exp sin cos tan cot sec csc arcsin arccos arctan arccot
    arcsec
    arccsc sinh cosh tanh arcsinh arccosh arctanh gcd lcm max min lfloor rfloor lceil rceil sum prod int lim circ bmod
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon
    phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega det to partial mathbb operatorname
    overline bar hat vec tilde prime left right""",
    )
)
COMMAND = re.compile(r"\\([A-Za-z]+|.)")
UNREADABLE = re.compile(r"[?&;$@#\"~`]|\\\\|\d_|\)_|[^\x00-\x7f]|^\s*$|[<>=]|\.\.|\\to\b|(?<![A-Za-z}])'")
RANGE = re.compile(r"\\(?:sum|prod|lim)\s*_\s*\{[^{}]*\}")
ANGLE = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")
RECURRING_IN = re.compile(r"(\d*\.\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
MIXED = re.compile(r"(?<![\d.^_])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}")
DECIMAL = re.compile(r"\d+\.\d*|\.\d+")
COMPLEX = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])|(?<=[a-zA-Z0-9}) ])i\b")
BOUND = re.compile(r"\\(?:sum|prod|int|lim)")
POINTS: tuple[tuple[Fraction, ...], ...] = (
    (Fraction(17, 11), Fraction(5, 7), Fraction(29, 13), Fraction(8, 19), Fraction(41, 17), Fraction(3, 23)),
    (Fraction(9, 13), Fraction(31, 11), Fraction(6, 17), Fraction(23, 7), Fraction(2, 5), Fraction(19, 12)),
    (Fraction(-7, 9), Fraction(-13, 6), Fraction(4, 15), Fraction(-11, 10), Fraction(33, 16), Fraction(-1, 3)),
    (Fraction(-25, 14), Fraction(3, 8), Fraction(-17, 12), Fraction(10, 9), Fraction(-5, 11), Fraction(14, 5)),
)
DIGITS = 40
SAME = 30  # digits that have to agree
MAX_DIGITS = 4_000
MAX_NESTING = 12  # of brackets; the time that the parser takes grows steeply with them
MAX_ARGUMENT = 1e7  # of a factorial, and the largest exponent: beyond, a value is not worked out


class UnreadableTermError(ValueError):
    """A term that is no expression that we know how to read."""


@lru_cache(maxsize=512)
def parse(latex: str) -> Any:
    """The expression, unevaluated, its decimals exact. Raises UnreadableTermError."""
    from latex2sympy2_extended import latex2sympy
    from sympy import Basic, Expr, I, Matrix, Symbol

    if (
        _nesting(latex) > MAX_NESTING
        or UNREADABLE.search(RANGE.sub("", latex))
        or any(name not in COMMANDS for name in COMMAND.findall(latex))
    ):
        raise UnreadableTermError(latex[:80])
    text = DECIMAL.sub(_exact, RECURRING_IN.sub(_exact_recurring, latex))
    text = MIXED.sub(_mixed, text)
    text = ANGLE.sub(r"(\\frac{\1\\pi}{180})", text)
    is_complex = COMPLEX.search(text) is not None
    try:
        read = latex2sympy(text, is_real=not is_complex, convert_degrees=False, normalization_config=None)
    except RecursionError as exc:
        raise UnreadableTermError(latex[:80]) from exc
    except MemoryError:
        raise
    except Exception as exc:  # antlr's listeners raise plain exceptions
        raise UnreadableTermError(latex[:80]) from exc
    if not isinstance(read, Basic) or not isinstance(read, (Expr, Matrix)):
        raise UnreadableTermError(latex[:80])
    if is_complex and not BOUND.search(text):
        read = read.xreplace({symbol: I for symbol in read.atoms(Symbol) if symbol.name == "i"})
    return read


def _nesting(latex: str) -> int:
    depth = deepest = 0
    for character in latex:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return max(deepest, latex.count("|") // 2)


def _exact(decimal: re.Match[str]) -> str:
    """A decimal as a fraction: sympy's floats would be rounded, and spread."""
    value = Fraction(decimal[0])
    return str(value) if value.denominator == 1 else f"{{\\frac{{{value.numerator}}}{{{value.denominator}}}}}"


def _mixed(number: re.Match[str]) -> str:
    """`2\\frac{1}{2}` in a term; an improper fraction makes it a product."""
    whole, above, below = (int(part) for part in number.groups())
    if 0 < above < below:
        return f"(\\frac{{{whole * below + above}}}{{{below}}})"
    return f"{whole}\\cdot\\frac{{{above}}}{{{below}}}"


def _exact_recurring(match: re.Match[str]) -> str:
    whole, _, places = match[1].partition(".")
    nines = (10 ** len(match[2]) - 1) * 10 ** len(places)
    above = int((whole + places) or 0) * (10 ** len(match[2]) - 1) + int(match[2])
    return f"{{\\frac{{{above}}}{{{nines}}}}}"


def same_value(one: str, other: str) -> bool:
    """Tell whether two terms have one value, wherever they have one. Raises UnreadableTermError."""
    return same_expressions(parse(one), parse(other))


def same_expressions(one: Any, other: Any) -> bool:
    if one == other:
        return not one.has(*_undefined())
    symbols = sorted(one.free_symbols | other.free_symbols, key=lambda symbol: str(symbol.name))
    if not symbols:
        return _same_constants(one, other)
    agreed = _at_points(one, other, symbols)
    if agreed is not None:
        return agreed
    from sympy import simplify

    difference = simplify(one.doit() - other.doit())
    return bool(difference.is_zero)


def is_constant(latex: str) -> bool:
    return not parse(latex).free_symbols


def decimal_stands_for(decimal: Numeral, latex: str) -> bool:
    """Tell whether a decimal is the term's value to its digits."""
    value = _number(parse(latex), DIGITS)
    if value is None or abs(value.imag) > abs(value.real) * 10.0**-SAME:
        return False
    from mpmath import mp, nstr

    with mp.workdps(DIGITS):
        return stands_for(decimal, Fraction(nstr(value.real, DIGITS - 5, min_fixed=-mp.inf, max_fixed=mp.inf)))


def real_value(latex: str) -> float | None:
    """The term as a float, for putting terms in order; infinite ones too."""
    from sympy import oo

    expression = parse(latex)
    if expression.free_symbols:
        return None
    if expression == oo or expression == -oo or expression.doit() in (oo, -oo):
        return float("inf") if expression.doit() == oo else float("-inf")
    value = _number(expression, 20)
    return None if value is None or abs(value.imag) > 1e-15 else float(value.real)


def ratio_is_constant(one: str, other: str) -> int | None:
    """Sign of the constant ratio of `one` to `other`, as of the differences of equations' sides; None where none is."""
    from sympy import fraction, simplify, together

    first, second = parse(one), parse(other)
    if first.free_symbols != second.free_symbols or not first.free_symbols:
        return None
    symbols = sorted(first.free_symbols, key=lambda symbol: str(symbol.name))
    for above, below in (
        (first, second),
        (fraction(together(first.doit()))[0], fraction(together(second.doit()))[0]),
    ):
        ratios = [ratio for ratio in (_ratio(above, below, symbols, point) for point in POINTS) if ratio is not None]
        if len(ratios) < 2:
            constant = simplify(above / below)
            if constant.is_number and constant.is_finite and not constant.is_zero:
                return 1 if constant.is_positive else -1
        elif ratios[0] != 0 and all(_close(ratios[0], ratio) for ratio in ratios[1:]):
            return 1 if ratios[0].real > 0 else -1
    return None


def _ratio(above: Any, below: Any, symbols: Sequence[Any], point: Sequence[Fraction]) -> Any:
    first, second = (_number(_put(side, symbols, point), DIGITS) for side in (above, below))
    return None if first is None or second is None or second == 0 else first / second


def _at_points(one: Any, other: Any, symbols: Sequence[Any]) -> bool | None:
    """Compare at points; None where they do not tell: no value at most of them, or equal on one side of zero alone."""
    outcomes: list[bool | None] = []
    for point in POINTS:
        values = [_number(_put(side, symbols, point), DIGITS) for side in (one, other)]
        outcomes.append(None if values[0] is None or values[1] is None else _close(values[0], values[1]))
        if outcomes[0] is False:
            return False
    told = [outcome for outcome in outcomes if outcome is not None]
    if len(told) < 2:
        return None
    return True if all(told) else None if all(outcome is not False for outcome in outcomes[:2]) else False


def _put(expression: Any, symbols: Sequence[Any], point: Sequence[Fraction]) -> Any:
    from sympy import Rational

    values = {}
    for place, symbol in enumerate(symbols):
        value = point[place % len(point)] + place // len(point)
        values[symbol] = Rational(value.numerator, value.denominator)
    return expression.xreplace(values)


def _same_constants(one: Any, other: Any) -> bool:
    from sympy import oo

    infinite = [side.doit() if side.has(oo) else None for side in (one, other)]
    if infinite[0] in (oo, -oo) or infinite[1] in (oo, -oo):
        return bool(infinite[0] == infinite[1])
    first, second = _number(one, DIGITS), _number(other, DIGITS)
    if first is None or second is None:
        return False
    if not _close(first, second):
        vanishing = min(abs(first), abs(second)) == 0 or max(abs(first), abs(second)) < 10.0**-SAME
        return vanishing and max(abs(first), abs(second)) < 10.0**-SAME and _vanishes(one - other)
    if first == second == 0:
        return True
    # Large numbers that agree in their first digits may still differ in the last.
    from mpmath import log10

    digits = int(log10(abs(first)) if first else 0)
    if digits < DIGITS - SAME:
        return True
    if digits + SAME > MAX_DIGITS:
        return False
    first, second = (_number(side, digits + DIGITS) for side in (one, other))
    return first is not None and second is not None and bool(abs(first - second) < 10.0**-5)


def _vanishes(difference: Any) -> bool:
    from sympy import simplify

    return bool(simplify(difference.doit()) == 0)


def _close(one: Any, other: Any) -> bool:
    from mpmath import mp

    with mp.workdps(DIGITS):
        return bool(abs(one - other) <= max(abs(one), abs(other)) * mp.mpf(10) ** -SAME)


def _number(expression: Any, digits: int) -> Any:
    """The value as mpmath has it, to `digits` significant digits; None where there is none."""
    from mpmath import mp, mpc
    from sympy import nan

    if _is_enormous(expression):
        return None
    value = expression.evalf(digits, maxn=digits + 100)
    if value.has(nan, *_undefined()) or value.free_symbols:
        return None
    real, imaginary = value.as_real_imag()
    if not (real.is_Number and imaginary.is_Number):
        value = expression.doit().evalf(digits)
        real, imaginary = value.as_real_imag()
        if not (real.is_Number and imaginary.is_Number):
            return None
    with mp.workdps(digits):
        return mpc(real._to_mpmath(mp.prec), imaginary._to_mpmath(mp.prec))


def _is_enormous(expression: Any) -> bool:
    """Tell whether there is a tower or a factorial in it whose digits alone would fill the memory."""
    from sympy import Pow, binomial, factorial, preorder_traversal

    for node in preorder_traversal(expression):
        if isinstance(node, (Pow, factorial)):
            argument = node.exp if isinstance(node, Pow) else node.args[0]
            if not argument.free_symbols and _size(argument) > MAX_ARGUMENT:
                return True
        elif isinstance(node, binomial) and not node.free_symbols and _size(node.args[0]) > MAX_ARGUMENT:
            return True
    return False


def _size(expression: Any) -> float:
    """About its absolute value, from floats; infinite where they do not reach."""
    from sympy import Add, Mul, Pow, factorial

    try:
        if isinstance(expression, Pow):
            return float(_size(expression.base) ** (_sign(expression.exp) * _size(expression.exp)))
        if isinstance(expression, Add):
            return sum(map(_size, expression.args))
        if isinstance(expression, Mul):
            return math.prod(map(_size, expression.args))
        if isinstance(expression, factorial):
            return math.gamma(_size(expression.args[0]) + 1)
        return abs(float(expression)) if expression.is_Number or expression.is_NumberSymbol else 1.0
    except OverflowError:
        return math.inf
    except (ValueError, ZeroDivisionError, TypeError):
        return 1.0


def _sign(expression: Any) -> int:
    return -1 if expression.could_extract_minus_sign() else 1


def _undefined() -> tuple[Any, ...]:
    from sympy import nan, zoo

    return nan, zoo
