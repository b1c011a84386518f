"""The Triton side of `teacher.kernels.sampling.sample`: boundaries in a row's order are found by searching its bits.

FP32 numbers that are not negative lie in the order of their bit patterns. A search holds two patterns: the tail of the
lower one (all tokens at least that likely) reaches a target, that of the upper one does not. One pass over the row
looks at three patterns between them and leaves a quarter, so that some sixteen passes find the boundary to the last
bit. A program takes a row; a search that the row's settings do not ask for is not made, nor one that ends at the
likeliest token, since that alone reaches the target: so most tokens of a model that is sure cost three passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_A_PASS = 4_096
NUM_WARPS = 16


@triton.jit
def _worth(row_ptr, start, num_tokens, COUNT: tl.constexpr, TOKENS: tl.constexpr):
    """The bits of some tokens' probabilities, and what each adds to a tail."""
    tokens = start + tl.arange(0, TOKENS)
    inside = tokens < num_tokens
    p = tl.load(row_ptr + tokens, mask=inside, other=0.0)
    return p.to(tl.int32, bitcast=True), tl.where(inside, 1.0, 0.0) if COUNT else p


@triton.jit
def _tail(row_ptr, num_tokens, pattern, COUNT: tl.constexpr, TOKENS: tl.constexpr):
    """Sum of what lies at or above a pattern: tokens, or probability. FP64, summed in one order."""
    total = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, num_tokens, TOKENS):
        bits, worth = _worth(row_ptr, start, num_tokens, COUNT, TOKENS)
        total += tl.where(bits >= pattern, worth, 0.0)
    return tl.sum(total.to(tl.float64), axis=0)


@triton.jit
def _three_tails(row_ptr, num_tokens, a, b, c, COUNT: tl.constexpr, TOKENS: tl.constexpr):
    at_a = tl.zeros((TOKENS,), tl.float32)
    at_b = tl.zeros((TOKENS,), tl.float32)
    at_c = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, num_tokens, TOKENS):
        bits, worth = _worth(row_ptr, start, num_tokens, COUNT, TOKENS)
        at_a += tl.where(bits >= a, worth, 0.0)
        at_b += tl.where(bits >= b, worth, 0.0)
        at_c += tl.where(bits >= c, worth, 0.0)
    sums = tl.sum(at_a.to(tl.float64), axis=0), tl.sum(at_b.to(tl.float64), axis=0)
    return sums[0], sums[1], tl.sum(at_c.to(tl.float64), axis=0)


@triton.jit
def _search(row_ptr, num_tokens, target, low, top, COUNT: tl.constexpr, BEYOND: tl.constexpr, TOKENS: tl.constexpr):
    """The highest pattern from `low` on whose tail reaches `target` (BEYOND: exceeds it), and what lies above it.

    `top` is above every pattern of the row.
    """
    above = target * 0.0
    while top - low > 1:
        quarter = tl.maximum((top - low) // 4, 1)
        a = low + quarter
        b = tl.minimum(a + quarter, top)
        c = tl.minimum(b + quarter, top)
        at_a, at_b, at_c = _three_tails(row_ptr, num_tokens, a, b, c, COUNT, TOKENS)
        if BEYOND:
            in_a, in_b, in_c = at_a > target, at_b > target, at_c > target
        else:
            in_a, in_b, in_c = at_a >= target, at_b >= target, at_c >= target
        in_b = in_b & (b < top)
        in_c = in_c & (c < top)
        above = tl.where(in_c, above, tl.where(in_b, at_c, tl.where(in_a, at_b, at_a)))
        top = tl.where(in_c, top, tl.where(in_b, c, tl.where(in_a, b, a)))
        low = tl.where(in_c, c, tl.where(in_b, b, tl.where(in_a, a, low)))
    return low, above


@triton.jit
def _draw(p_ptr, settings_ptr, tokens_ptr, num_tokens, stride, TOKENS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = p_ptr + row * stride
    uniform = tl.load(settings_ptr + row * 4)
    top_p = tl.load(settings_ptr + row * 4 + 1)
    min_p = tl.load(settings_ptr + row * 4 + 2)
    top_k = tl.load(settings_ptr + row * 4 + 3)

    # 1. The likeliest token, and the sum of all.
    most = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, num_tokens, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        most = tl.maximum(most, tl.load(row_ptr + tokens, mask=tokens < num_tokens, other=0.0))
    best = tl.max(most, axis=0)
    highest = best.to(tl.float64)
    top = best.to(tl.int32, bitcast=True) + 1
    lowest = top * 0  # the pattern of the least likely token that may be drawn
    mass = _tail(row_ptr, num_tokens, lowest, False, TOKENS)

    # 2. top-k: the pattern of the k-th best token, and what the best k weigh.
    kept = mass * 0.0 + 1.0  # of the best k tokens: of all, one, whatever rounding makes of the sum
    if top_k < num_tokens:
        lowest, above = _search(row_ptr, num_tokens, top_k, lowest, top, True, False, TOKENS)
        likelihood = lowest.to(tl.float32, bitcast=True).to(tl.float64)
        kept = _tail(row_ptr, num_tokens, lowest + 1, False, TOKENS) + (top_k - above) * likelihood
        mass = kept
    # 3. Nucleus: how far the best tokens reach top_p of that.
    if top_p < 1.0:
        low = tl.where(top_p * kept <= highest, top - 1, lowest)
        pattern, above = _search(row_ptr, num_tokens, top_p * kept, low, top, False, False, TOKENS)
        likelihood = pattern.to(tl.float32, bitcast=True).to(tl.float64)
        # Of equally likely tokens the first ones, down to that which crosses the border.
        num_equal = tl.maximum(tl.ceil((top_p * kept - above) / tl.maximum(likelihood, 1e-300)), 1.0)
        mass = tl.minimum(mass, above + num_equal * likelihood)
        lowest = tl.maximum(lowest, pattern)
    # 4. min-p: a pattern that needs no search.
    if min_p > 0.0:
        limit = min_p * highest
        rounded = limit.to(tl.float32)
        pattern = rounded.to(tl.int32, bitcast=True) + (rounded.to(tl.float64) < limit).to(tl.int32)
        pattern = tl.minimum(pattern, top - 1)
        mass = tl.minimum(mass, _tail(row_ptr, num_tokens, pattern, False, TOKENS))
        lowest = tl.maximum(lowest, pattern)

    # 5. The token at which the sum in falling order passes the uniform number.
    target = uniform * tl.maximum(mass, highest)
    low = tl.where(target < highest, top - 1, lowest)
    pattern, above = _search(row_ptr, num_tokens, target, low, top, False, True, TOKENS)
    likelihood = pattern.to(tl.float32, bitcast=True).to(tl.float64)
    rank = tl.floor((target - above) / tl.maximum(likelihood, 1e-300)).to(tl.int32)
    # 6. Of equally likely ones, the rank-th by index.
    seen = rank * 0
    picked = rank * 0
    for start in range(0, num_tokens, TOKENS):
        bits, inside = _worth(row_ptr, start, num_tokens, True, TOKENS)
        equal = ((bits == pattern) & (inside > 0)).to(tl.int32)
        order = seen + tl.cumsum(equal, axis=0)
        tokens = start + tl.arange(0, TOKENS)
        # The last one that is not beyond the rank: where rounding asks for one more than there are, the last.
        picked = tl.maximum(picked, tl.max(tl.where((equal > 0) & (order <= rank + 1), tokens, 0), axis=0))
        seen += tl.sum(equal, axis=0)
    tl.store(tokens_ptr + row, picked.to(tl.int64))


def draw_kernel(probabilities_NV: Tensor, settings_N4: Tensor) -> Tensor:
    """Launch `draw`: int64 [N] from FP32 [N, V] and FP64 settings [N, 4] (uniform, top_p, min_p, top_k)."""
    num_rows, num_tokens = probabilities_NV.shape
    tokens_N = torch.empty(num_rows, dtype=torch.int64, device=probabilities_NV.device)
    if num_rows:
        size = min(TOKENS_A_PASS, triton.next_power_of_2(num_tokens))
        _draw[(num_rows,)](
            probabilities_NV, settings_N4, tokens_N, num_tokens, probabilities_NV.stride(0), TOKENS=size,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return tokens_N
