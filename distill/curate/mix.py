"""The mix of sources: shares that the examples are brought to by leaving some out, never by repeating any.

Shares are weights; they need not add up to one. With `num_examples`, each source gives its share of that number or all
it has, and a source that has too little is not made up for by others. Without it, the scarcest source gives all it has
and sets the scale: the shares are then exact to one example.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

from distill.curate.candidates import Sample
from distill.curate.selection import Reasons, SetFilter
from distill.errors import DataError, RecipeError, nearest
from distill.recipe import Mix

NUM_EXAMPLES = "curate.mix.num_examples"


def outside_mix(mix: Mix) -> SetFilter:
    """Return the samples over a source's quota. Which samples stay is decided by a hash of their keys."""

    def reasons(samples: Sequence[Sample]) -> Reasons:
        left: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            left[sample.source].append(sample)
        quota = quotas(mix, {source: len(of_source) for source, of_source in left.items()})
        return {
            sample.position: f"{quota[source]} of {len(of_source)} of source {source!r} are taken"
            for source, of_source in left.items()
            for sample in sorted(of_source, key=_draw_key)[quota[source] :]
        }

    return reasons


def check_sources(mix: Mix, sources: Collection[str]) -> None:
    """Raise RecipeError unless the shares name every source of the problems, and nothing else."""
    for name in sorted(mix.shares.keys() - set(sources)):
        message = f"{name!r} is no source of the problems; {nearest(name, sources)}"
        raise RecipeError(message, where="recipe", field="curate.mix.shares")
    for name in sorted(set(sources) - mix.shares.keys()):
        message = f"says nothing of source {name!r}; give it a share, 0 to leave it out"
        raise RecipeError(message, where="recipe", field="curate.mix.shares")


def quotas(mix: Mix, left: Mapping[str, int]) -> Counter[str]:
    """Examples a source may keep. Rounded up, so that a set that meets the shares meets them again.

    Raises DataError where the scarcest source has nothing left, so that no scale keeps the shares.
    """
    weights = {source: Fraction(str(share)) for source, share in mix.shares.items() if share}
    total = sum(weights.values())
    if mix.num_examples is not None:
        scale = Fraction(mix.num_examples) / total
    else:
        for source in sorted(weights):
            if not left.get(source) and any(left.values()):
                message = f"has a share in the mix, and no example is left of it; give it 0, or set {NUM_EXAMPLES}"
                raise DataError(message, where="curate.mix", field=source)
        scale = min(Fraction(left.get(source, 0)) / weight for source, weight in weights.items())
    return Counter({source: min(left.get(source, 0), math.ceil(scale * w)) for source, w in weights.items()})


def _draw_key(sample: Sample) -> tuple[bytes, str]:
    return hashlib.blake2b(sample.key.encode(), digest_size=8).digest(), sample.key
