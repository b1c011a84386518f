"""A schedule covers each page once, in shares of equal length; the kernel's equals the twin's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.mla_schedule import schedule_decode
from teacher.kernels.attention.reference import START_PAGES, schedule_decode_twin

LENGTHS = st.lists(st.integers(0, 700), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200)
@given(lengths=LENGTHS, num_shares=st.integers(1, 9))
def test_each_page_is_in_one_share(lengths: list[int], num_shares: int) -> None:
    schedule = schedule_decode_twin(torch.tensor(lengths, dtype=torch.int32), num_shares)
    num_pages = [-(-length // PAGE) for length in lengths]
    seen: list[tuple[int, int]] = []
    shares_of: dict[int, list[int]] = {}
    longest = max(sum(-(-pages // 2) * 2 + START_PAGES for pages in num_pages) // num_shares + 2, 2)
    for number, (first, first_page, last, end) in enumerate(schedule.shares_Z4.tolist()):
        load = 0
        for sequence in range(first, last + 1):
            begin = first_page if sequence == first else 0
            stop = end if sequence == last else num_pages[sequence]
            if begin < stop:
                assert begin % 2 == 0
                seen += [(sequence, page) for page in range(begin, stop)]
                shares_of.setdefault(sequence, []).append(number)
                load += stop - begin
        assert load <= longest
    assert seen == [(sequence, page) for sequence, pages in enumerate(num_pages) for page in range(pages)]
    for sequence, (first, count) in enumerate(schedule.sequences_B2.tolist()):
        assert list(range(first, first + count)) == shares_of.get(sequence, []) or count == 0
        assert count == len(shares_of.get(sequence, []))


@pytest.mark.parametrize("num_shares", [1, 4, 66, 132])
def test_the_kernel_equals_its_twin(device: str, num_shares: int) -> None:
    generator = torch.Generator().manual_seed(num_shares)
    for lengths in ([1], [0], [65536], [0, 64, 0, 65], torch.randint(0, 5000, (129,), generator=generator).tolist()):
        tensor = torch.tensor(lengths, dtype=torch.int32, device=device)
        got, wanted = schedule_decode(tensor, num_shares), schedule_decode_twin(tensor, num_shares)
        assert torch.equal(got.shares_Z4, wanted.shares_Z4)
        assert torch.equal(got.sequences_B2, wanted.sequences_B2)


def test_no_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="num_shares must be at least 1, got 0"):
        schedule_decode(torch.tensor([1], dtype=torch.int32), 0)
