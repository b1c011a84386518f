"""Near-duplicates against the definition: pairs measured one by one on sets of words, and datasketch's own index."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings, strategies as st

from distill.curate.near_duplicates import Signatures, jaccard, near_duplicates, shingles
from distill.recipe import NearDuplicates
from distill.words import runs, symbols_of


def exact(one: str, other: str, width: int) -> float:
    """Jaccard similarity by its definition, on the runs of words themselves."""
    sets = [set(runs(words, min(width, len(words)))) for words in (symbols_of(one), symbols_of(other))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def find(texts: dict[int, str], config: NearDuplicates) -> dict[int, tuple[int, float]]:
    signatures = Signatures(config)
    for name, text in texts.items():
        signatures.add(name, text)
    return near_duplicates(signatures, sorted(texts), lambda wanted: ((name, texts[name]) for name in wanted))


def corpus(seed: int, *, count: int, words: int = 60) -> dict[int, str]:
    """Random texts; each third is an earlier one with up to ten words changed."""
    random = Random(seed)
    texts: dict[int, str] = {}
    for name in range(count):
        made = [f"w{random.randrange(500)}" for _ in range(words)]
        if name % 3 == 2:
            made = texts[random.randrange(name)].split()
            for _ in range(random.randrange(11)):
                made[random.randrange(len(made))] = f"new{random.randrange(500)}"
        texts[name] = " ".join(made)
    return texts


@settings(max_examples=100, deadline=None)
@given(st.text("ab 1.+\n", min_size=1, max_size=60), st.text("ab 1.+\n", min_size=1, max_size=60), st.integers(1, 6))
def test_the_similarity_is_that_of_the_definition(one: str, other: str, width: int) -> None:
    if symbols_of(one) and symbols_of(other):
        assert jaccard(shingles(one, width), shingles(other, width)) == exact(one, other, width)
    assert len(shingles("", width)) == 0


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_every_pair_that_goes_is_a_pair_and_hardly_one_stays(threshold: float) -> None:
    texts = corpus(3, count=240)
    config = NearDuplicates(threshold=threshold)
    gone = find(texts, config)
    for name, (other, similarity) in gone.items():
        assert other not in gone
        assert other < name
        assert similarity == exact(texts[name], texts[other], config.shingle_words) >= threshold
    stays = [name for name in texts if name not in gone]
    missed = [
        (one, other)
        for place, one in enumerate(stays)
        for other in stays[:place]
        if exact(texts[one], texts[other], config.shingle_words) >= threshold
    ]
    assert len(gone) > 10
    assert len(missed) <= 0.05 * len(gone), "the banding misses few"
    assert find({name: texts[name] for name in stays}, config) == {}, "idempotent"
    assert find(dict(reversed(texts.items())), config) == gone


def test_pairs_are_those_of_the_library_s_own_index() -> None:
    texts = corpus(5, count=150)
    signatures = Signatures(NearDuplicates(threshold=0.6))
    index = MinHashLSH(threshold=0.6, num_perm=128, params=(signatures.num_bands, signatures.num_rows))
    for name, text in texts.items():
        signatures.add(name, text)
        minhash = MinHash(128, seed=1, scheme="affine64", hashfunc=int)
        minhash.update_batch(shingles(text, 5))
        index.insert(name, minhash)
    ours: dict[int, set[int]] = {name: {name} for name in texts}
    for bucket in signatures.buckets(texts):
        for name in bucket:
            ours[name] |= set(bucket)
    minhashes = {name: signatures.minhash(shingles(text, 5)) for name, text in texts.items()}
    for name, values in minhashes.items():
        query = MinHash(hashvalues=values, scheme="affine64", seed=1)
        assert set(index.query(query)) == ours[name]


def test_what_shares_a_bucket_without_being_alike_stays() -> None:
    """Few numbers a signature make many false alarms; the measurement takes them back."""
    texts = corpus(9, count=120, words=12)
    config = NearDuplicates(threshold=0.3, num_perm=16, shingle_words=2)
    signatures = Signatures(config)
    for name, text in texts.items():
        signatures.add(name, text)
    alarms = [bucket for bucket in signatures.buckets(texts) if len(bucket) > 1]
    false = [b for b in alarms if all(exact(texts[b[0]], texts[other], 2) < 0.3 for other in b[1:])]
    assert false
    for name, (other, _) in find(texts, config).items():
        assert exact(texts[name], texts[other], 2) >= 0.3


def test_only_texts_that_share_a_bucket_are_asked_for() -> None:
    texts = {0: "one two three four five six", 1: "one two three four five six", 2: "all else is new here today"}
    signatures = Signatures(NearDuplicates())
    for name, text in texts.items():
        signatures.add(name, text)
    asked: list[frozenset[int]] = []

    def read(wanted: frozenset[int]) -> Iterable[tuple[int, str]]:
        asked.append(wanted)
        return ((name, texts[name]) for name in wanted)

    assert near_duplicates(signatures, [1, 0, 2], read) == {0: (1, 1.0)}
    assert near_duplicates(signatures, [0, 1, 2], read, comparable=lambda one, other: False) == {}
    assert asked == [frozenset({0, 1})] * 2
