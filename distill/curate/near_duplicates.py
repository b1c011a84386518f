"""Near-duplicates: MinHash and banding propose pairs, the exact Jaccard similarity of their shingles decides.

A text is the set of its shingles, runs of a few words and signs. MinHash (Broder 1997) keeps a signature of
`num_perm` numbers of it, in which two texts agree at a place with the probability of their Jaccard similarity; texts
that agree in a whole band of the signature become a pair to look at (locality-sensitive hashing; Leskovec, Rajaraman,
Ullman, Mining of Massive Datasets, chapter 3). Since each pair is then measured on the shingles themselves, a false
alarm of the banding drops nothing; what it misses stays, mostly below or just above the threshold.

Signatures and the number of bands come from datasketch. The buckets are sorted columns of numbers here, because its
index holds some kilobytes a text in dictionaries: at a million texts that would be the machine's memory.

Shingles are compared by their 64-bit hashes: among n different shingles two are taken for one with a probability of
n^2 / 2^65.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from distill.recipe import NearDuplicates
from distill.words import symbols_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Hashes = NDArray[np.uint64]

SEED = 1  # of the permutations: which pairs are found depends on it, so it is no setting
PART = 8_192  # shingles a step: num_perm numbers of each are in memory
FALSE_ALARM_WEIGHT, MISS_WEIGHT = 0.1, 0.9  # a false alarm costs a measurement, a miss a duplicate
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no word's hash loses bits

Texts = Callable[[frozenset[Any]], Iterable[tuple[Any, str]]]


class Signatures:
    """Band hashes of texts under their names; the texts themselves are not kept."""

    def __init__(self, config: NearDuplicates) -> None:
        from datasketch import MinHash

        self.config = config
        self.num_bands, self.num_rows = _banding(config.threshold, config.num_perm)
        self._blank = MinHash(config.num_perm, seed=SEED, scheme="affine64", hashfunc=int)
        self._names: list[Hashable] = []
        self._bands: list[Hashes] = []

    def add(self, name: Hashable, text: str) -> None:
        """Remember a text. One without a word or sign is like no other and is left out."""
        hashes = shingles(text, self.config.shingle_words)
        if len(hashes):
            self._names.append(name)
            self._bands.append(_folded_rows(self.minhash(hashes), self.num_bands, self.num_rows))

    def minhash(self, hashes: Hashes) -> Hashes:
        """The signature of a set of shingles, `num_perm` numbers."""
        minhash = self._blank.copy()
        for start in range(0, len(hashes), PART):
            minhash.update_batch(hashes[start : start + PART])
        signature: Hashes = minhash.hashvalues
        return signature

    def buckets(self, names: Iterable[Hashable]) -> list[list[Any]]:
        """Groups of the given texts that agree in a band, two or more a group, in a fixed order."""
        import numpy as np

        wanted = set(names)
        rows = [row for row, name in enumerate(self._names) if name in wanted]
        if not rows:
            return []
        bands = np.stack([self._bands[row] for row in rows])
        found = []
        for column in bands.T:
            order = np.argsort(column, kind="stable")
            ends = np.flatnonzero(np.diff(column[order])) + 1
            for group in np.split(order, ends):
                if len(group) > 1:
                    found.append([self._names[rows[row]] for row in group])
        return found


def near_duplicates(
    signatures: Signatures,
    names: Sequence[Hashable],
    texts: Texts,
    *,
    comparable: Callable[[Any, Any], bool] = lambda one, other: True,
) -> dict[Any, tuple[Any, float]]:
    """Find those of `names` that go, each with the one that stays in its place and their similarity.

    `names` stand in the order of precedence: a text goes if its similarity to one that stays reaches the threshold.
    So what stays holds no such pair, and a second pass drops nothing. `texts` is asked once for the texts that share
    a bucket, in any order; their shingles are in memory together. `comparable` may except pairs.
    """
    members = signatures.buckets(names)
    buckets_of: dict[Any, list[int]] = defaultdict(list)
    for number, of_bucket in enumerate(members):
        for name in of_bucket:
            buckets_of[name].append(number)
    if not buckets_of:
        return {}
    shingles_of = {name: shingles(text, signatures.config.shingle_words) for name, text in texts(frozenset(buckets_of))}
    staying: dict[int, list[Any]] = defaultdict(list)
    gone: dict[Any, tuple[Any, float]] = {}
    for name in names:
        rivals = dict.fromkeys(other for bucket in buckets_of.get(name, ()) for other in staying[bucket])
        for other in rivals:
            if comparable(name, other):
                similarity = jaccard(shingles_of[name], shingles_of[other])
                if similarity >= signatures.config.threshold:
                    gone[name] = other, similarity
                    break
        else:
            for bucket in buckets_of.get(name, ()):
                staying[bucket].append(name)
    return gone


def shingles(text: str, num_words: int) -> Hashes:
    """The set of a text's shingles as sorted 64-bit hashes; a text shorter than one shingle is one shingle."""
    import numpy as np

    words = symbols_of(text)
    hashes = np.fromiter((_word_hash(word) for word in words), dtype=np.uint64, count=len(words))
    width = min(num_words, len(words))
    if not width:
        return hashes
    combined = np.zeros(len(words) - width + 1, dtype=np.uint64)
    for start in range(width):
        combined = combined * np.uint64(MULTIPLIER) + hashes[start : start + len(combined)]
    return np.unique(combined)


def jaccard(one: Hashes, other: Hashes) -> float:
    """Size of the intersection over size of the union of two sets, given as sorted arrays without repetition."""
    import numpy as np

    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def reasons(gone: Mapping[Any, tuple[Any, float]], what: str) -> dict[Any, str]:
    """`87% of the shingles are those of sample 3f...`, a name each."""
    return {name: f"{similarity:.0%} alike with {what} {other}" for name, (other, similarity) in gone.items()}


@lru_cache
def _banding(threshold: float, num_perm: int) -> tuple[int, int]:
    """Bands and rows a band; looking for the best of them takes a moment."""
    from datasketch import MinHashLSH

    lsh = MinHashLSH(threshold=threshold, num_perm=num_perm, weights=(FALSE_ALARM_WEIGHT, MISS_WEIGHT))
    return lsh.b, lsh.r


def _folded_rows(signature: Hashes, num_bands: int, num_rows: int) -> Hashes:
    """One number a band: equal where all rows of the band are equal."""
    import numpy as np

    rows = signature[: num_bands * num_rows].reshape(num_bands, num_rows)
    folded = np.zeros(num_bands, dtype=np.uint64)
    for row in rows.T:
        folded = folded * np.uint64(MULTIPLIER) + row
    return folded


@lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
