"""Samples that a run wants: their keys and the requests for them, made when they are looked at.

A million requests with their problems do not fit into memory, and need not: a sample is a problem's number and an
index.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

from distill.problems.packed import PackedProblems
from distill.records import SampleKeys, Sampling, TeacherIdentity, TraceRequest

Place = tuple[int, int]  # number of the problem, index of the sample


class WantedSamples:
    """So many samples of every problem, in the order of the problems. `num_samples` may be raised as a run goes on."""

    def __init__(self, problems: PackedProblems, teacher: TeacherIdentity, sampling: Sampling) -> None:
        self.problems = problems
        self.num_samples = array("I", bytes(4 * len(problems)))
        self._keys = SampleKeys(teacher, sampling)

    def __len__(self) -> int:
        return sum(self.num_samples)

    def key(self, place: Place) -> str:
        return self.key_of(self.problems.id(place[0]), place[1])

    def key_of(self, problem_id: str, sample_index: int) -> str:
        return self._keys.of(problem_id, sample_index)

    def keys(self) -> Iterator[str]:
        """All keys, by problem and index: the order in which traces are exported."""
        for number, count in enumerate(self.num_samples):
            identity = self.problems.id(number)
            for index in range(count):
                yield self._keys.of(identity, index)


class Requests(Sequence[TraceRequest]):
    """Requests for samples of `problems`, eight bytes each until they are looked at."""

    def __init__(self, problems: PackedProblems, places: Iterable[Place] = ()) -> None:
        self._problems = problems
        self._numbers, self._indices = array("I"), array("I")
        for place in places:
            self.append(place)

    def append(self, place: Place) -> None:
        self._numbers.append(place[0])
        self._indices.append(place[1])

    def places(self) -> Iterator[Place]:
        return zip(self._numbers, self._indices, strict=True)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> TraceRequest: ...

    @overload
    def __getitem__(self, index: slice) -> Requests: ...

    def __getitem__(self, index: int | slice) -> TraceRequest | Requests:
        if isinstance(index, slice):
            return Requests(self._problems, zip(self._numbers[index], self._indices[index], strict=True))
        problem = self._problems[self._numbers[index]]
        return TraceRequest.model_construct(problem=problem, sample_index=self._indices[index])


def chunks(places: Iterable[Place], size: int) -> Iterator[list[Place]]:
    remaining = iter(places)
    while chunk := list(islice(remaining, size)):
        yield chunk
